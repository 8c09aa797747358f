// The baseline of the platform: SSE2 on x86-64, any vectors of 4 floats elsewhere.
#include "isa.h"
#include "scout_cpu.h"

#if defined(__SSE2__)
#include <emmintrin.h>
#endif

#define SCOUT_W 4
namespace {
constexpr int W = SCOUT_W, SLICES = 1;
typedef float vf __attribute__((vector_size(4 * W)));
typedef int32_t vi __attribute__((vector_size(4 * W)));
typedef int16_t vh __attribute__((vector_size(4 * W)));
typedef int8_t vb __attribute__((vector_size(2 * W)));
typedef uint16_t vu16 __attribute__((vector_size(2 * W)));

// Rescales the exponent by a multiplication, which also handles subnormals; infinities and NaN keep the top exponent.
inline vf from_half(const uint8_t* from) {
  vu16 raw;
  __builtin_memcpy(&raw, from, sizeof raw);
  vi bits = __builtin_convertvector(raw, vi);
  vi body = (bits & 0x7fff) << 13, sign = (bits & 0x8000) << 16;
  vf size = (vf)body * 0x1p112f;
  vi top = (vi)((bits & 0x7c00) == 0x7c00) & 0x7f800000;
  return (vf)((vi)size | top | sign);
}
inline void half_pair(const uint8_t* from, vf& a, vf& b) {
  a = from_half(from);
  b = from_half(from + sizeof(vu16));
}
inline vh widen(const int8_t* from) {
  vb bytes;
  __builtin_memcpy(&bytes, from, sizeof bytes);
  return __builtin_convertvector(bytes, vh);
}
inline vi madd(vi sum, vh a, vh b) {
#if defined(__SSE2__)
  return sum + (vi)_mm_madd_epi16((__m128i)a, (__m128i)b);
#else
  return sum + (((vi)a << 16) >> 16) * (((vi)b << 16) >> 16) + ((vi)a >> 16) * ((vi)b >> 16);
#endif
}
}  // namespace

#include "tile.inl"
#include "tile_many.inl"
#include "ranks.inl"
#include "sign_plain.inl"

namespace {
bool runs() { return true; }
}  // namespace

extern const scout_isa scout_isa_base = {
    "base", runs, W, attend, attend_many, score, signs, peaks, signs_fit, logarithms, shares, into_bins, read};
