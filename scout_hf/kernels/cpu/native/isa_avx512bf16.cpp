// AVX-512 with bf16 and integer dot products and byte permutations: Zen 4, Sapphire Rapids and later.
// Built with the flags of isa_avx512.cpp and -mavx512vnni -mavx512bf16 -mavx512vbmi.
#include "isa.h"
#include "scout_cpu.h"

#if defined(__AVX512BF16__) && defined(__AVX512VBMI__)
#include "isa_avx512.inl"

#define SCOUT_BF16_DOT
#define SCOUT_BYTE_DOT
namespace {
inline vi byte_dot(vi sum, vi from_0_to_255, vi bytes) {
  return (vi)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)from_0_to_255, (__m512i)bytes);
}
inline void to_bf16(vf numbers, uint16_t* to) {
  _mm256_storeu_si256((__m256i*)to, (__m256i)_mm512_cvtneps_pbh((__m512)numbers));
}
inline vf bf16_dot(vf sum, vi a, vi b) { return (vf)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)b); }
}  // namespace

#include "tile.inl"
#include "tile_many.inl"
#include "ranks.inl"
#include "sign_mass.inl"
#include "sign_places.inl"
#include "sign_peaks.inl"
#include "sign_permute.inl"

namespace {
bool runs() {
  return __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vnni") &&
         __builtin_cpu_supports("avx512vbmi") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}
}  // namespace

extern const scout_isa scout_isa_avx512bf16 = {
    "avx512bf16", runs, W, attend, attend_many, score, signs, peaks, signs_fit, logarithms, shares, into_bins, read};
#endif
