// The attention mass of every block by sign codes, for instruction sets that shuffle within 16 bytes.
//
// A table of 16 bytes per query head and four dimensions says what each pattern of four signs adds to a token's sum.
// All stays in bytes until the end, so that one instruction serves 4 dimensions of 4 * W tokens. For that, two numbers
// are kept: the sum modulo 256, and the mean of 8 lookups by rounding averages, which is at most 1.5 too large, whence
// 8 times the mean exceeds the sum by 12 at most. Up to 21 such means leave an excess below 256, and the sum modulo 256
// says which it is.
namespace {

constexpr int VB = 4 * W;   // bytes of a vector
constexpr int AT_ONCE = 4;  // rows of signs, that is 8 lookups, per mean
constexpr int BATCH = 4;    // vectors of tokens whose lanes are added up together
static_assert(SCOUT_MAX_HEAD_DIM / 8 / AT_ONCE * 12 < 256, "an excess must fit a byte");

template <int H>
inline void lay_tables(const scout_signs& s, int h0, vb* tables) {
  for (int i = 0; i < 2 * s.rows; i++)
    for (int h = 0; h < H; h++) {
      const uint8_t* from = s.tables + ((int64_t)(h0 + h) * 2 * s.rows + i) * 16;
      for (int lane = 0; lane < VB / 16; lane++) __builtin_memcpy((uint8_t*)&tables[i * H + h] + 16 * lane, from, 16);
    }
}

template <int H>
struct Sums {
  vb modulo[H];
  vw means[H], odd_means[H];  // even tokens + 256 * odd ones, and odd ones
};

// `N` rows of signs, `step` bytes from each other.
template <int H, int N, int R>
__attribute__((always_inline)) inline void add_rows(const uint8_t* const* blocks, int64_t at, int64_t step,
                                                    const vb* tables, Sums<H>& sums) {
  vb mean[AT_ONCE][H];
#pragma GCC unroll 4
  for (int v = 0; v < N; v++) {
    const vb signs = side_by_side<R>(blocks, at + v * step);
    const vb low = signs & 15, high = (vb)((vw)signs >> 4) & 15;
#pragma GCC unroll 4
    for (int h = 0; h < H; h++) {
      const vb a = look_up(tables[2 * v * H + h], low), b = look_up(tables[(2 * v + 1) * H + h], high);
      sums.modulo[h] = sums.modulo[h] + a + b;
      mean[v][h] = average(a, b);
      if (v == 1) mean[0][h] = average(mean[0][h], mean[1][h]);
      if (v == 3) mean[2][h] = average(mean[2][h], mean[3][h]);
      if (v == 3) mean[0][h] = average(mean[0][h], mean[2][h]);
    }
  }
#pragma GCC unroll 4
  for (int h = 0; h < H; h++) {
    const vb none = {};
    vb all = mean[0][h];
    if (N == 1) all = average(all, none);
    if (N < 3) all = average(all, none);
    if (N == 3) all = average(all, average(mean[2][h], none));
    sums.means[h] += (vw)all;
    sums.odd_means[h] += (vw)all >> 8;
  }
}

template <int H, int R>
__attribute__((always_inline)) inline Sums<H> add_up(const uint8_t* const* blocks, int64_t step, int rows,
                                                     const vb* tables) {
  Sums<H> sums = {};
  int64_t at = 0;
  for (; rows >= AT_ONCE; rows -= AT_ONCE, at += AT_ONCE * step, tables += 2 * AT_ONCE * H)
    add_rows<H, AT_ONCE, R>(blocks, at, step, tables, sums);
  if (rows == 1) add_rows<H, 1, R>(blocks, at, step, tables, sums);
  if (rows == 2) add_rows<H, 2, R>(blocks, at, step, tables, sums);
  if (rows == 3) add_rows<H, 3, R>(blocks, at, step, tables, sums);
  return sums;
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

template <int H>
inline void as_numbers(const Sums<H>& sums, int h, int offset, vf* numbers) {
  const vw modulo = (vw)sums.modulo[h], odd_means = sums.odd_means[h];
  const vw even = (sums.means[h] - (odd_means << 8)) << 3, odd = odd_means << 3;
  const vw even_sum = even - ((even - modulo) & 0xff), odd_sum = odd - ((odd - (modulo >> 8)) & 0xff);
  const vw exponent = vw{} + 0x4b00;  // of 2^23, whose last bit is worth 1
  const vf base = splat(0x1p23f + (float)offset);
  numbers[0] = (vf)zip_low(even_sum, exponent) - base;
  numbers[1] = (vf)zip_high(even_sum, exponent) - base;
  numbers[2] = (vf)zip_low(odd_sum, exponent) - base;
  numbers[3] = (vf)zip_high(odd_sum, exponent) - base;
}

bool signs_fit(int block_size) { return block_size % VB == 0 || (block_size >= 16 && VB % block_size == 0); }

// Two vectors of pairs, in fours: those of the even and of the odd fours of each of R blocks, `first` of which went before.
template <int R>
inline void store_pairs(const scout_signs& s, int h, int64_t block, int first, vf even, vf odd) {
  constexpr int EACH = W / 4 / R;
  float fours[2][W];
  store(fours[0], even), store(fours[1], odd);
  for (int r = 0; r < R && block + r < s.blocks; r++)
    for (int k = 0; k < EACH; k++) {
      float* out = s.out + h * s.out_stride + (block + r) * SCOUT_PAIRS + first / 2 + 8 * k;
      for (int half = 0; half < 2; half++) __builtin_memcpy(out + 4 * half, fours[half] + 4 * (r * EACH + k), 16);
    }
}

// R blocks lie side by side in every vector; R 1: a block takes one or several.
template <int H, int R, bool PAIRS>
void masses(const scout_signs& s, int h0) {
  vb tables[SCOUT_MAX_HEAD_DIM / 4 * H];
  lay_tables<H>(s, h0, tables);
  const int64_t last = s.blocks - 1, signs_bytes = (int64_t)s.rows * s.block_size;
  const int code_bytes = (int)signs_bytes + s.block_size;
  for (int64_t block = 0; block < s.blocks; block += BATCH * R) {
    vf mass[H][BATCH];
    for (int i = 0; i < BATCH; i++) {
      const uint8_t* blocks[R];
      for (int r = 0; r < R; r++) {
        const int64_t wanted = block + i * R + r;
        blocks[r] = code_at(s, wanted);
        if (h0 == 0) prefetch_span(code_at(s, wanted + BATCH * R), code_bytes);
      }
      for (int first = 0; first < s.block_size; first += VB) {
        const Sums<H> sums = add_up<H, R>(blocks, s.block_size, s.rows, tables);
        vf scales[4];
        as_scales(side_by_side<R>(blocks, signs_bytes), scales);
#pragma GCC unroll 4
        for (int h = 0; h < H; h++) {
          vf numbers[4];
          as_numbers(sums, h, s.offsets[h0 + h], numbers);
          const vf factor = splat(s.worth[h0 + h] * 0x1p23f), one = splat((127 - s.reference[h0 + h]) * 0x1p23f);
          if (PAIRS) {
            const vf even = mass_of(numbers[0], scales[0], factor, one) * splat(s.first_of_pair);
            const vf odd = mass_of(numbers[1], scales[1], factor, one) * splat(s.first_of_pair);
            store_pairs<R>(s, h0 + h, block + i * R, first, even + mass_of(numbers[2], scales[2], factor, one),
                           odd + mass_of(numbers[3], scales[3], factor, one));
            continue;
          }
          const vf part = (mass_of(numbers[0], scales[0], factor, one) + mass_of(numbers[1], scales[1], factor, one)) +
                          (mass_of(numbers[2], scales[2], factor, one) + mass_of(numbers[3], scales[3], factor, one));
          mass[h][i] = first ? mass[h][i] + part : part;
        }
        blocks[0] += VB;
      }
    }
    for (int h = 0; h < H && !PAIRS; h++) {
      float lanes[W];
      store(lanes, sums_of_four(mass[h]));
      float* out = s.out + (h0 + h) * s.out_stride + block;
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

template <int R, bool PAIRS>
void masses_of(const scout_signs& s) {
  int h = 0;
  for (; h + SCOUT_SIGN_GROUP <= s.heads; h += SCOUT_SIGN_GROUP) masses<SCOUT_SIGN_GROUP, R, PAIRS>(s, h);
#if SCOUT_SIGN_GROUP >= 4
  if (s.heads - h == 3) return masses<3, R, PAIRS>(s, h);
  if (s.heads - h == 2) return masses<2, R, PAIRS>(s, h);
#endif
  if (s.heads - h == 1) masses<1, R, PAIRS>(s, h);
}

void signs(const scout_signs* s) {
  if (s->first_of_pair != 0) return masses_of<W == 16 ? 2 : 1, true>(*s);
  if (s->block_size >= VB) return masses_of<1, false>(*s);
#if SCOUT_W == 16
  if (s->block_size == 16) return masses_of<4, false>(*s);
#endif
#if SCOUT_W > 4
  masses_of<2, false>(*s);
#endif
}

}  // namespace
