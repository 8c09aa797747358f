// What AVX-512 files share: 16 floats at a time.
#include <immintrin.h>

#define SCOUT_W 16
namespace {
constexpr int W = SCOUT_W, SLICES = 2;
typedef float vf __attribute__((vector_size(4 * W)));
typedef int32_t vi __attribute__((vector_size(4 * W)));
typedef int16_t vh __attribute__((vector_size(4 * W)));

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
}  // namespace
