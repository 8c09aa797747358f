// AVX2 with FMA and F16C: 8 floats at a time. Built with -mavx2 -mfma -mf16c.
#include "isa.h"
#include "scout_cpu.h"

#if defined(__AVX2__)
#include <cpuid.h>
#include <immintrin.h>

#define SCOUT_W 8
#define SCOUT_SIGN_VECTORS 2
namespace {
constexpr int W = SCOUT_W, SLICES = 1;
typedef float vf __attribute__((vector_size(4 * W)));
typedef int32_t vi __attribute__((vector_size(4 * W)));
typedef int16_t vh __attribute__((vector_size(4 * W)));
typedef uint8_t vb __attribute__((vector_size(4 * W)));
typedef uint16_t vw __attribute__((vector_size(4 * W)));
typedef int16_t v8 __attribute__((vector_size(16)));

inline void half_pair(const uint8_t* from, vf& a, vf& b) {
  a = (vf)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)from));
  b = (vf)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)(from + 16)));
}
inline vh widen(const int8_t* from) { return (vh)_mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i*)from)); }
inline vi madd(vi sum, vh a, vh b) { return sum + (vi)_mm256_madd_epi16((__m256i)a, (__m256i)b); }
inline vb look_up(vb table, vb index) { return (vb)_mm256_shuffle_epi8((__m256i)table, (__m256i)index); }
inline vb average(vb a, vb b) { return (vb)_mm256_avg_epu8((__m256i)a, (__m256i)b); }
inline vw zip_low(vw a, vw b) { return (vw)_mm256_unpacklo_epi16((__m256i)a, (__m256i)b); }
inline vw zip_high(vw a, vw b) { return (vw)_mm256_unpackhi_epi16((__m256i)a, (__m256i)b); }
inline vh high_product(vh a, vh b) { return (vh)_mm256_mulhi_epi16((__m256i)a, (__m256i)b); }
inline vh larger(vh a, vh b) { return (vh)_mm256_max_epi16((__m256i)a, (__m256i)b); }
inline int16_t largest_of_eight(v8 v) {
  return (int16_t)(_mm_extract_epi16(_mm_minpos_epu16((__m128i)(v ^ 0x7fff)), 0) ^ 0x7fff);
}
inline vf larger(vf a, vf b) { return (vf)_mm256_max_ps((__m256)a, (__m256)b); }
inline vf smaller(vf a, vf b) { return (vf)_mm256_min_ps((__m256)a, (__m256)b); }
// 32 / R bytes of each of R blocks.
template <int R>
inline vb side_by_side(const uint8_t* const* blocks, int64_t at) {
  if (R == 1) return (vb)_mm256_loadu_si256((const __m256i*)(blocks[0] + at));
  return (vb)_mm256_inserti128_si256(_mm256_castsi128_si256(_mm_loadu_si128((const __m128i*)(blocks[0] + at))),
                                     _mm_loadu_si128((const __m128i*)(blocks[R - 1] + at)), 1);
}
}  // namespace

#include "tile.inl"
#include "tile_many.inl"
#include "ranks.inl"
#include "sign_mass.inl"
#include "sign_places.inl"
#include "sign_peaks.inl"
#include "sign_shuffle.inl"

namespace {
bool runs() {
  // Not every compiler has a feature name for F16C.
  unsigned a, b, c = 0, d;
  const bool halves = __get_cpuid(1, &a, &b, &c, &d) && (c & bit_F16C);
  return halves && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
}
}  // namespace

extern const scout_isa scout_isa_avx2 = {
    "avx2", runs, W, attend, attend_many, score, signs, peaks, signs_fit, logarithms, shares, into_bins, read};
#endif
