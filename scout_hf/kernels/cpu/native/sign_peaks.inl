// The largest estimated logit of every block by sign codes, for a first, coarse choice.
//
// A head's tables are so small that a token's sum over them fits a byte: four dimensions of 4 * W tokens take one lookup
// and one addition. A scale is 4 bits of mantissa times a power of two, within 16 bits.
namespace {

constexpr int AHEAD = 8;  // vectors of tokens, to prefetch

// 1024 times the scales of the even and of the odd tokens, from 1/16 to 31.
inline void as_factors(vb bytes, vh* factors) {
  const uint8_t powers[16] = {1, 1, 1, 1, 2, 4, 8, 16, 32, 64, 128, 255, 255, 255, 255, 255};
  vb table;
  for (int lane = 0; lane < VB / 16; lane++) __builtin_memcpy((uint8_t*)&table + 16 * lane, powers, 16);
  const vw power = (vw)look_up(table, (vb)((vw)bytes >> 4) & 15), mantissa = (vw)((bytes & 15) | 16);
  factors[0] = (vh)((power & 0xff) * (mantissa & 0xff) << 2);
  factors[1] = (vh)((power >> 8) * (mantissa >> 8) << 2);
}

template <int R>
inline void largest_of(vh v, int16_t* found) {
  constexpr int EACH = 2 * W / R;
  int16_t lanes[2 * W];
  store(lanes, v);
  for (int r = 0; r < R; r++) {
    v8 most = load<v8>(lanes + r * EACH);
    for (int k = 8; k < EACH; k += 8) {
      const v8 other = load<v8>(lanes + r * EACH + k);
      most = most > other ? most : other;
    }
    found[r] = largest_of_eight(most);
  }
}

// R blocks lie side by side in every vector; R 1: a block takes one or several.
template <int R>
void peaks_of(const scout_signs& s) {
  vb tables[SCOUT_SIGN_HEADS * SCOUT_MAX_COARSE_DIM / 4], places[SCOUT_MAX_COARSE_DIM / 4 * T];
  lay_tables(s, tables);
  const int lookups = 2 * s.rows;
  for (int64_t block = 0; block < s.blocks; block += T * R) {
    const uint8_t *blocks[T][R], *ahead[T][R];
    for (int t = 0; t < T; t++)
      for (int r = 0; r < R; r++) {
        blocks[t][r] = code_at(s, block + t * R + r);
        ahead[t][r] = code_at(s, block + (AHEAD + t) * R + r);
      }
    vh most[SCOUT_SIGN_HEADS][T];
    for (int first = 0; first < s.block_size; first += VB) {
      lay_places<R>(blocks, s.block_size, s.rows, places);
      vh factors[T][2];
      for (int t = 0; t < T; t++) as_factors(side_by_side<R>(blocks[t], s.scales), factors[t]);
      for (int h = 0; h < s.heads; h++) {
        // All lines: of every other half of a KiB alone, processors prefetch badly by themselves.
        for (int t = 0; t < T && !first; t++)
          for (int r = 0; r < R; r++) prefetch_code(ahead[t][r], (int)s.scales, s.scales, s.block_size, h, s.heads);
        vb sums[T];
#pragma GCC unroll 4
        for (int t = 0; t < T; t++) sums[t] = vb{};
        const vb* table = tables + h * lookups;
        for (int i = 0; i < lookups; i++)
#pragma GCC unroll 4
          for (int t = 0; t < T; t++) sums[t] += look_up(table[i], places[i * T + t]);
        const uint16_t none = (uint16_t)(s.offsets[h] << 8);
        const vw offset = vw{} + none;
#pragma GCC unroll 4
        for (int t = 0; t < T; t++) {
          const vh even = (vh)(((vw)sums[t] << 8) - offset), odd = (vh)(((vw)sums[t] & 0xff00) - offset);
          const vh here = larger(high_product(even, factors[t][0]), high_product(odd, factors[t][1]));
          most[h][t] = first ? larger(most[h][t], here) : here;
        }
      }
      for (int t = 0; t < T; t++) blocks[t][0] += VB;
    }
    for (int h = 0; h < s.heads; h++) {
      int16_t found[T * R];
      for (int t = 0; t < T; t++) largest_of<R>(most[h][t], found + t * R);
      float* out = s.out + h * s.out_stride + block;
      for (int i = 0; i < T * R && block + i < s.blocks; i++) out[i] = (float)found[i] * (s.worth[h] * 0.25f);
    }
  }
}

void peaks(const scout_signs* s) {
  if (s->block_size >= VB) return peaks_of<1>(*s);
#if SCOUT_W == 16
  if (s->block_size == 16) return peaks_of<4>(*s);
#endif
#if SCOUT_W > 4
  peaks_of<2>(*s);
#endif
}

}  // namespace
