// What AVX-512 files share: 16 floats at a time.
#include <immintrin.h>

#define SCOUT_W 16
#define SCOUT_SIGN_VECTORS 4
namespace {
constexpr int W = SCOUT_W, SLICES = 2;
typedef float vf __attribute__((vector_size(4 * W)));
typedef int32_t vi __attribute__((vector_size(4 * W)));
typedef int16_t vh __attribute__((vector_size(4 * W)));
typedef uint8_t vb __attribute__((vector_size(4 * W)));
typedef uint16_t vw __attribute__((vector_size(4 * W)));
typedef int16_t v8 __attribute__((vector_size(16)));

inline void half_pair(const uint8_t* from, vf& a, vf& b) {
  a = (vf)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)from));
  b = (vf)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)(from + 32)));
}
inline vh widen(const int8_t* from) { return (vh)_mm512_cvtepi8_epi16(_mm256_loadu_si256((const __m256i*)from)); }
inline vi madd(vi sum, vh a, vh b) {
#ifdef __AVX512VNNI__
  return (vi)_mm512_dpwssd_epi32((__m512i)sum, (__m512i)a, (__m512i)b);
#else
  return sum + (vi)_mm512_madd_epi16((__m512i)a, (__m512i)b);
#endif
}

inline vb look_up(vb table, vb index) { return (vb)_mm512_shuffle_epi8((__m512i)table, (__m512i)index); }
inline vb average(vb a, vb b) { return (vb)_mm512_avg_epu8((__m512i)a, (__m512i)b); }
inline vw zip_low(vw a, vw b) { return (vw)_mm512_unpacklo_epi16((__m512i)a, (__m512i)b); }
inline vw zip_high(vw a, vw b) { return (vw)_mm512_unpackhi_epi16((__m512i)a, (__m512i)b); }
inline vh high_product(vh a, vh b) { return (vh)_mm512_mulhi_epi16((__m512i)a, (__m512i)b); }
inline vh larger(vh a, vh b) { return (vh)_mm512_max_epi16((__m512i)a, (__m512i)b); }
inline int16_t largest_of_eight(v8 v) {
  return (int16_t)(_mm_extract_epi16(_mm_minpos_epu16((__m128i)(v ^ 0x7fff)), 0) ^ 0x7fff);
}
inline vf larger(vf a, vf b) { return (vf)_mm512_max_ps((__m512)a, (__m512)b); }
inline vf smaller(vf a, vf b) { return (vf)_mm512_min_ps((__m512)a, (__m512)b); }

// 64 / R bytes of each of R blocks.
template <int R>
inline vb side_by_side(const uint8_t* const* blocks, int64_t at) {
  auto half = [&](int r) { return _mm256_loadu_si256((const __m256i*)(blocks[r] + at)); };
  auto quarter = [&](int r) { return _mm_loadu_si128((const __m128i*)(blocks[r] + at)); };
  if (R == 1) return (vb)_mm512_loadu_si512(blocks[0] + at);
  if (R == 2) return (vb)_mm512_inserti64x4(_mm512_castsi256_si512(half(0)), half(R - 1), 1);
  const __m256i low = _mm256_inserti128_si256(_mm256_castsi128_si256(quarter(0)), quarter(1 % R), 1);
  const __m256i high = _mm256_inserti128_si256(_mm256_castsi128_si256(quarter(2 % R)), quarter(3 % R), 1);
  return (vb)_mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1);
}
}  // namespace
