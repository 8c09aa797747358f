// The attention mass of every block by sign codes, for AVX-512 with VBMI and VNNI.
//
// The tables of four rows of signs lie in one vector, and the four bytes of a token side by side: one instruction looks
// up four times four dimensions of 16 tokens, and a dot product with ones adds them up.
#define ALWAYS_INLINE __attribute__((always_inline)) inline

namespace {

constexpr int AT_ONCE = 4;  // rows of signs
constexpr int BATCH = 4;    // blocks whose masses are added up together

typedef __m512i vz;

bool signs_fit(int block_size) { return block_size % 64 == 0 || block_size == 32 || block_size == 16; }

// [rows / 4][H][low and high half of a byte][row][pattern]
template <int H>
inline void lay_tables(const scout_signs& s, vz* tables) {
  for (int row = 0; row < (s.rows + AT_ONCE - 1) / AT_ONCE * AT_ONCE; row++)
    for (int h = 0; h < H; h++)
      for (int half = 0; half < 2; half++) {
        uint8_t* to = (uint8_t*)&tables[(row / AT_ONCE * H + h) * 2 + half] + row % AT_ONCE * 16;
        if (row < s.rows)
          __builtin_memcpy(to, s.tables + ((int64_t)h * 2 * s.rows + 2 * row + half) * 16, 16);
        else
          __builtin_memset(to, 0, 16);
      }
}

// 64 bytes, or fewer and zeros.
template <bool WHOLE>
inline vz read_up_to(const uint8_t* from, int64_t bytes) {
  if (WHOLE || bytes >= 64) return _mm512_loadu_si512(from);
  return _mm512_maskz_loadu_epi8(bytes > 0 ? ~0ull >> (64 - bytes) : 0, from);
}

// Four rows of four vectors of 16 tokens, of which R blocks have as many each. WHOLE: all four rows are there; if not,
// the others are zeros.
template <int R>
struct Order;

template <>
struct Order<1> {
  // Of every 16 tokens four in each.
  template <bool WHOLE>
  ALWAYS_INLINE void read(const uint8_t* const* blocks, int64_t at, int64_t size, int rows, vz* signs) const {
    const vz none = _mm512_setzero_si512(), a = _mm512_loadu_si512(blocks[0] + at);
    const vz b = WHOLE || rows > 1 ? _mm512_loadu_si512(blocks[0] + at + size) : none;
    const vz c = WHOLE || rows > 2 ? _mm512_loadu_si512(blocks[0] + at + 2 * size) : none;
    const vz d = WHOLE || rows > 3 ? _mm512_loadu_si512(blocks[0] + at + 3 * size) : none;
    const vz ab = _mm512_unpacklo_epi8(a, b), AB = _mm512_unpackhi_epi8(a, b);
    const vz cd = _mm512_unpacklo_epi8(c, d), CD = _mm512_unpackhi_epi8(c, d);
    signs[0] = _mm512_unpacklo_epi16(ab, cd), signs[1] = _mm512_unpackhi_epi16(ab, cd);
    signs[2] = _mm512_unpacklo_epi16(AB, CD), signs[3] = _mm512_unpackhi_epi16(AB, CD);
  }
  inline void read_scales(const uint8_t* const* blocks, int64_t at, vz* bytes) const {
    const vz none = _mm512_setzero_si512(), all = _mm512_loadu_si512(blocks[0] + at);
    const vz low = _mm512_unpacklo_epi8(all, none), high = _mm512_unpackhi_epi8(all, none);
    bytes[0] = _mm512_unpacklo_epi16(low, none), bytes[1] = _mm512_unpackhi_epi16(low, none);
    bytes[2] = _mm512_unpacklo_epi16(high, none), bytes[3] = _mm512_unpackhi_epi16(high, none);
  }
};

inline vz sixteen(const uint8_t* from) { return _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)from)); }

// Byte i of dword t: `first` + t * step + i * apart, from the 64 bytes of one or of two vectors.
inline vz places(int first, int apart, int step = 1) {
  const vz tokens = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
  const vz all = _mm512_mullo_epi32(tokens, _mm512_set1_epi32(step * 0x01010101));
  return _mm512_add_epi8(all, _mm512_set1_epi32(first * 0x01010101 + apart * 0x03020100));
}

struct Halves {
  const vz first_half, second_half;
  Halves(vz first, vz second) : first_half(first), second_half(second) {}
  template <bool WHOLE>
  ALWAYS_INLINE void read(const uint8_t* const* blocks, int64_t at, int64_t, int rows, vz* signs) const {
#pragma GCC unroll 2
    for (int r = 0; r < 2; r++) {
      const vz a = read_up_to<WHOLE>(blocks[r] + at, rows * 32);
      const vz b = read_up_to<WHOLE>(blocks[r] + at + 64, rows * 32 - 64);
      signs[2 * r] = _mm512_permutex2var_epi8(a, first_half, b);
      signs[2 * r + 1] = _mm512_permutex2var_epi8(a, second_half, b);
    }
  }
};

template <>
struct Order<2> : Halves {
  Order() : Halves(places(0, 32), places(16, 32)) {}
  inline void read_scales(const uint8_t* const* blocks, int64_t at, vz* bytes) const {
    for (int k = 0; k < 4; k++) bytes[k] = sixteen(blocks[k / 2] + at + k % 2 * 16);
  }
};

template <>
struct Order<4> {
  const vz all = places(0, 16);
  template <bool WHOLE>
  ALWAYS_INLINE void read(const uint8_t* const* blocks, int64_t at, int64_t, int rows, vz* signs) const {
#pragma GCC unroll 4
    for (int r = 0; r < 4; r++) signs[r] = _mm512_permutexvar_epi8(all, read_up_to<WHOLE>(blocks[r] + at, rows * 16));
  }
  inline void read_scales(const uint8_t* const* blocks, int64_t at, vz* bytes) const {
    for (int k = 0; k < 4; k++) bytes[k] = sixteen(blocks[k] + at);
  }
};

template <int H>
struct Sums {
  vz of[H][4];
};

template <bool WHOLE, int H, class O>
ALWAYS_INLINE void add_rows(const O& order, const uint8_t* const* blocks, int64_t at, int64_t size, int rows,
                            const vz* tables, Sums<H>& sums) {
  const vz ones = _mm512_set1_epi8(1), half = _mm512_set1_epi8(15), table_of_row = _mm512_set1_epi32(0x30201000);
  vz signs[4];
  order.template read<WHOLE>(blocks, at, size, rows, signs);
#pragma GCC unroll 4
  for (int k = 0; k < 4; k++) {
    const vz low = (signs[k] & half) | table_of_row, high = (_mm512_srli_epi16(signs[k], 4) & half) | table_of_row;
#pragma GCC unroll 4
    for (int h = 0; h < H; h++) {
      const vz a = _mm512_permutexvar_epi8(low, tables[2 * h]), b = _mm512_permutexvar_epi8(high, tables[2 * h + 1]);
      sums.of[h][k] = _mm512_dpbusd_epi32(_mm512_dpbusd_epi32(sums.of[h][k], a, ones), b, ones);
    }
  }
}

// Less the offsets.
template <int H, int R, class O>
ALWAYS_INLINE Sums<H> add_up(const O& order, const uint8_t* const* blocks, const uint8_t* const* ahead, int64_t size,
                             int rows, const vz* tables, const int* offsets) {
  Sums<H> sums;
#pragma GCC unroll 4
  for (int h = 0; h < H; h++)
#pragma GCC unroll 4
    for (int k = 0; k < 4; k++) sums.of[h][k] = _mm512_set1_epi32(-offsets[h]);
  int row = 0;
  for (; row + AT_ONCE <= rows; row += AT_ONCE, tables += 2 * H) {
    // As much as is read now, since many prefetches at a time would wait for each other.
    for (int r = 0; r < R; r++)
      for (int line = 0; line < AT_ONCE / R; line++)
        __builtin_prefetch(ahead[r] + row * size + line * (R == 1 ? size : 64), 0, 2);
    add_rows<true>(order, blocks, row * size, size, AT_ONCE, tables, sums);
  }
  if (row < rows) add_rows<false>(order, blocks, row * size, size, rows - row, tables, sums);
  return sums;
}

// R blocks at a time, 64 tokens; 1: a block takes one or several turns.
template <int H, int R>
void masses(const scout_signs& s) {
  vz tables[SCOUT_MAX_HEAD_DIM / 16 * H];
  lay_tables<H>(s, tables);
  const Order<R> order;
  const int scales_bytes = s.block_size < 64 ? s.block_size : 64;
  for (int64_t block = 0; block < s.blocks; block += BATCH) {
    vf mass[H][BATCH];
    for (int i = 0; i < BATCH; i += R) {
      const uint8_t *blocks[R], *ahead[R];
      for (int r = 0; r < R; r++) {
        blocks[r] = code_at(s, block + i + r);
        ahead[r] = code_at(s, block + i + r + BATCH);
      }
      for (int first = 0; first < s.block_size; first += 64) {
        const Sums<H> sums = add_up<H, R>(order, blocks, ahead, s.block_size, s.rows, tables, s.offsets);
        for (int r = 0; r < R; r++) prefetch_all(ahead[r] + s.scales, scales_bytes);
        vz scale[4];
        order.read_scales(blocks, s.scales, scale);
#pragma GCC unroll 4
        for (int k = 0; k < 4; k++)
          scale[k] = _mm512_add_epi32(_mm512_slli_epi32(scale[k], 19), _mm512_set1_epi32(120 << 23));
#pragma GCC unroll 4
        for (int h = 0; h < H; h++) {
          const vf factor = splat(s.worth[h] * 0x1p23f), one = splat((127 - s.reference[h]) * 0x1p23f);
          vf of[4];
#pragma GCC unroll 4
          for (int k = 0; k < 4; k++)
            of[k] = mass_of((vf)_mm512_cvtepi32_ps(sums.of[h][k]), (vf)scale[k], factor, one);
          if (R == 4)
            for (int k = 0; k < 4; k++) mass[h][k] = of[k];
          else if (R == 2)
            mass[h][i] = of[0] + of[1], mass[h][i + 1] = of[2] + of[3];
          else
            mass[h][i] = (first ? mass[h][i] : vf{}) + ((of[0] + of[1]) + (of[2] + of[3]));
        }
        blocks[0] += 64, ahead[0] += 64;
      }
    }
    const int64_t left = s.blocks - block;
    for (int h = 0; h < H; h++) {
      const __m512 lanes = (__m512)sums_of_four(mass[h]);
      const __m128 all = _mm_add_ps(_mm_add_ps(_mm512_castps512_ps128(lanes), _mm512_extractf32x4_ps(lanes, 1)),
                                    _mm_add_ps(_mm512_extractf32x4_ps(lanes, 2), _mm512_extractf32x4_ps(lanes, 3)));
      _mm_mask_storeu_ps(s.out + h * s.out_stride + block, left >= BATCH ? 15 : (1 << left) - 1, all);
    }
  }
}

template <int ORDER>
void masses_of(const scout_signs& s) {
  switch (s.heads) {
    case 1: return masses<1, ORDER>(s);
    case 2: return masses<2, ORDER>(s);
    case 3: return masses<3, ORDER>(s);
    default: return masses<4, ORDER>(s);
  }
}

void signs(const scout_signs* s) {
  if (s->block_size == 16) return masses_of<4>(*s);
  if (s->block_size == 32) return masses_of<2>(*s);
  masses_of<1>(*s);
}

}  // namespace
