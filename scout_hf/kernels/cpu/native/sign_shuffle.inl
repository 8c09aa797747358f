// The attention mass of every block by sign codes, for instruction sets that shuffle within 16 bytes.
//
// A table of 16 bytes per query head and four dimensions says what each pattern of four signs adds to a token's sum.
// All stays in bytes until the end, so that one instruction serves 4 dimensions of 4 * W tokens. For that, two numbers
// are kept: the sum modulo 256, and the mean of 8 lookups by rounding averages, which is at most 1.5 too large, whence
// 8 times the mean exceeds the sum by 12 at most. Up to 21 such means leave an excess below 256, and the sum modulo 256
// says which it is.
namespace {

constexpr int AT_ONCE = 8;             // lookups per mean
constexpr int BATCH = 4;               // vectors of tokens whose lanes are added up together
static_assert(SCOUT_MAX_HEAD_DIM / 4 / AT_ONCE * 12 < 256, "an excess must fit a byte");
static_assert(BATCH % T == 0, "a batch is done T vectors at a time");

struct Sums {
  vb modulo;
  vw means, odd_means;  // even tokens + 256 * odd ones, and odd ones
};

// Adds `N` lookups, an even number, to the sums modulo 256 of T vectors, and stores their means.
template <int N>
__attribute__((always_inline)) inline void look_up(const vb* places, const vb* tables, vb* modulo, vb* means) {
  vb mean[4][T];
#pragma GCC unroll 4
  for (int pair = 0; pair < N / 2; pair++) {
    const vb low = tables[2 * pair], high = tables[2 * pair + 1];
#pragma GCC unroll 4
    for (int t = 0; t < T; t++) {
      const vb a = look_up(low, places[2 * pair * T + t]), b = look_up(high, places[(2 * pair + 1) * T + t]);
      modulo[t] += a;
      SCOUT_IN_REGISTER(modulo[t]);  // adding these up in another order takes more registers
      modulo[t] += b;
      SCOUT_IN_REGISTER(modulo[t]);
      mean[pair][t] = average(a, b);
      if (pair == 1) mean[0][t] = average(mean[0][t], mean[1][t]);
      if (pair == 3) mean[2][t] = average(mean[2][t], mean[3][t]);
    }
  }
#pragma GCC unroll 4
  for (int t = 0; t < T; t++) {
    const vb none = {};
    vb all = mean[0][t];
    if (N == 2) all = average(all, none);
    if (N < 6) all = average(all, none);
    if (N == 6) all = average(all, average(mean[2][t], none));
    if (N == 8) all = average(all, mean[2][t]);
    store(means + t, all);
  }
}

__attribute__((always_inline)) inline void add_up(const vb* places, int lookups, const vb* tables, Sums* sums) {
  vb modulo[T], means[(SCOUT_MAX_HEAD_DIM / 4 + AT_ONCE - 1) / AT_ONCE * T], *end = means;
#pragma GCC unroll 4
  for (int t = 0; t < T; t++) modulo[t] = vb{};
  for (; lookups >= AT_ONCE; lookups -= AT_ONCE, places += AT_ONCE * T, tables += AT_ONCE, end += T)
    look_up<AT_ONCE>(places, tables, modulo, end);
  if (lookups == 2) look_up<2>(places, tables, modulo, end);
  if (lookups == 4) look_up<4>(places, tables, modulo, end);
  if (lookups == 6) look_up<6>(places, tables, modulo, end);
  if (lookups) end += T;
#pragma GCC unroll 4
  for (int t = 0; t < T; t++) {
    vw all = {}, odd = {};
    for (const vb* mean = means + t; mean < end; mean += T) {
      const vw both = (vw)*mean;
      all += both;
      odd += both >> 8;
    }
    sums[t] = Sums{modulo[t], all, odd};
  }
}

// The token's scales and its sums come in the same order: four at a time of the even, then of the odd ones.
inline void as_scales(vb bytes, vf* scales) {
  const vw none = {}, base = none + (120 << 7);
  const vw even = (((vw)bytes & 0xff) << 3) + base, odd = ((vw)bytes >> 8 << 3) + base;
  scales[0] = (vf)zip_low(none, even);
  scales[1] = (vf)zip_high(none, even);
  scales[2] = (vf)zip_low(none, odd);
  scales[3] = (vf)zip_high(none, odd);
}

inline void as_numbers(const Sums& sums, int offset, vf* numbers) {
  const vw modulo = (vw)sums.modulo, odd_means = sums.odd_means;
  const vw even = (sums.means - (odd_means << 8)) << 3, odd = odd_means << 3;
  const vw even_sum = even - ((even - modulo) & 0xff), odd_sum = odd - ((odd - (modulo >> 8)) & 0xff);
  const vw exponent = vw{} + 0x4b00;  // of 2^23, whose last bit is worth 1
  const vf base = splat(0x1p23f + (float)offset);
  numbers[0] = (vf)zip_low(even_sum, exponent) - base;
  numbers[1] = (vf)zip_high(even_sum, exponent) - base;
  numbers[2] = (vf)zip_low(odd_sum, exponent) - base;
  numbers[3] = (vf)zip_high(odd_sum, exponent) - base;
}

bool signs_fit(int block_size) { return block_size % VB == 0 || (block_size >= 16 && VB % block_size == 0); }

// R blocks lie side by side in every vector; R 1: a block takes one or several.
template <int R>
void masses(const scout_signs& s) {
  vb tables[SCOUT_SIGN_HEADS * SCOUT_MAX_HEAD_DIM / 4], places[SCOUT_MAX_HEAD_DIM / 4 * T];
  lay_tables(s, tables);
  const int64_t last = s.blocks - 1;
  const int signs_bytes = s.rows * s.block_size, lookups = 2 * s.rows;
  for (int64_t block = 0; block < s.blocks; block += BATCH * R) {
    vf mass[SCOUT_SIGN_HEADS][BATCH];
    for (int i = 0; i < BATCH; i += T) {
      const uint8_t *blocks[T][R], *ahead[T][R];
      for (int t = 0; t < T; t++)
        for (int r = 0; r < R; r++) {
          const int64_t wanted = block + (i + t) * R + r;
          blocks[t][r] = code_at(s, wanted);
          ahead[t][r] = code_at(s, wanted + BATCH * R);
        }
      for (int first = 0; first < s.block_size; first += VB) {
        lay_places<R>(blocks, s.block_size, s.rows, places);
        vf scales[T][4];
        for (int t = 0; t < T; t++) as_scales(side_by_side<R>(blocks[t], s.scales), scales[t]);
        for (int h = 0; h < s.heads; h++) {
          for (int t = 0; t < T && !first; t++)
            for (int r = 0; r < R; r++) prefetch_code(ahead[t][r], signs_bytes, s.scales, s.block_size, h, s.heads);
          Sums sums[T];
          add_up(places, lookups, tables + h * lookups, sums);
          const vf factor = splat(s.worth[h] * 0x1p23f), one = splat((127 - s.reference[h]) * 0x1p23f);
#pragma GCC unroll 4
          for (int t = 0; t < T; t++) {
            vf numbers[4], of[4];
            as_numbers(sums[t], s.offsets[h], numbers);
            for (int k = 0; k < 4; k++) of[k] = mass_of(numbers[k], scales[t][k], factor, one);
            const vf part = (of[0] + of[1]) + (of[2] + of[3]);
            mass[h][i + t] = first ? mass[h][i + t] + part : part;
          }
        }
        for (int t = 0; t < T; t++) blocks[t][0] += VB;
      }
    }
    for (int h = 0; h < s.heads; h++) {
      float lanes[W];
      store(lanes, sums_of_four(mass[h]));
      float* out = s.out + h * s.out_stride + block;
      for (int i = 0; i < BATCH; i++)
        for (int r = 0; r < R && block + i * R + r <= last; r++) {
          constexpr int EACH = W / 4 / R;
          float sum = lanes[r * EACH * 4 + i];
          for (int k = 1; k < EACH; k++) sum += lanes[(r * EACH + k) * 4 + i];
          out[i * R + r] = sum;
        }
    }
  }
}

void signs(const scout_signs* s) {
  if (s->block_size >= VB) return masses<1>(*s);
#if SCOUT_W == 16
  if (s->block_size == 16) return masses<4>(*s);
#endif
#if SCOUT_W > 4
  masses<2>(*s);
#endif
}

}  // namespace
