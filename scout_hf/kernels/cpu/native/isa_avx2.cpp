// AVX2 with FMA and F16C: 8 floats at a time. Built with -mavx2 -mfma -mf16c.
#include "isa.h"
#include "scout_cpu.h"

#if defined(__AVX2__)
#include <cpuid.h>
#include <immintrin.h>

#define SCOUT_W 8
namespace {
constexpr int W = SCOUT_W, SLICES = 1;
typedef float vf __attribute__((vector_size(4 * W)));
typedef int32_t vi __attribute__((vector_size(4 * W)));
typedef int16_t vh __attribute__((vector_size(4 * W)));

inline void half_pair(const uint8_t* from, vf& a, vf& b) {
  a = (vf)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)from));
  b = (vf)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)(from + 16)));
}
inline vh widen(const int8_t* from) { return (vh)_mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i*)from)); }
inline vi madd(vi sum, vh a, vh b) { return sum + (vi)_mm256_madd_epi16((__m256i)a, (__m256i)b); }
}  // namespace

#include "tile.inl"

namespace {
bool runs() {
  // Not every compiler knows a name for F16C.
  unsigned a, b, c = 0, d;
  const bool halves = __get_cpuid(1, &a, &b, &c, &d) && (c & bit_F16C);
  return halves && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
}
}  // namespace

extern const scout_isa scout_isa_avx2 = {"avx2", runs, W, attend, score, read};
#endif
