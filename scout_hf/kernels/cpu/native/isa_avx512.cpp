// AVX-512 F, BW, DQ, VL. Built with -mavx512f -mavx512bw -mavx512dq -mavx512vl -mfma -mf16c.
#include "isa.h"
#include "scout_cpu.h"

#if defined(__AVX512BW__)
#include "isa_avx512.inl"
#include "tile.inl"
#include "tile_many.inl"
#include "ranks.inl"
#include "sign_mass.inl"
#include "sign_places.inl"
#include "sign_peaks.inl"
#include "sign_shuffle.inl"

namespace {
bool runs() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}
}  // namespace

extern const scout_isa scout_isa_avx512 = {
    "avx512", runs, W, attend, attend_many, score, signs, peaks, signs_fit, logarithms, shares, into_bins, read};
#endif
