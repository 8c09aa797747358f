// 64-bit Arm with Advanced SIMD: 4 floats at a time.
#include "isa.h"
#include "scout_cpu.h"

#if defined(__aarch64__)
#include <arm_neon.h>

#define SCOUT_W 4
#define SCOUT_SIGN_VECTORS 4
namespace {
constexpr int W = SCOUT_W, SLICES = 2;
typedef float vf __attribute__((vector_size(4 * W)));
typedef int32_t vi __attribute__((vector_size(4 * W)));
typedef int16_t vh __attribute__((vector_size(4 * W)));
typedef uint8_t vb __attribute__((vector_size(4 * W)));
typedef uint16_t vw __attribute__((vector_size(4 * W)));
typedef vh v8;

inline void half_pair(const uint8_t* from, vf& a, vf& b) {
  float16x8_t both = vreinterpretq_f16_u8(vld1q_u8(from));
  a = (vf)vcvt_f32_f16(vget_low_f16(both));
  b = (vf)vcvt_high_f32_f16(both);
}
inline vh widen(const int8_t* from) { return (vh)vmovl_s8(vld1_s8(from)); }
inline vi madd(vi sum, vh a, vh b) {
  int32x4_t low = vmull_s16(vget_low_s16((int16x8_t)a), vget_low_s16((int16x8_t)b));
  int32x4_t high = vmull_high_s16((int16x8_t)a, (int16x8_t)b);
  return sum + (vi)vpaddq_s32(low, high);
}
inline vb look_up(vb table, vb index) { return (vb)vqtbl1q_u8((uint8x16_t)table, (uint8x16_t)index); }
inline vb average(vb a, vb b) { return (vb)vrhaddq_u8((uint8x16_t)a, (uint8x16_t)b); }
inline vh high_product(vh a, vh b) {
  const int32x4_t low = vmull_s16(vget_low_s16((int16x8_t)a), vget_low_s16((int16x8_t)b));
  return (vh)vshrn_high_n_s32(vshrn_n_s32(low, 16), vmull_high_s16((int16x8_t)a, (int16x8_t)b), 16);
}
inline vh larger(vh a, vh b) { return (vh)vmaxq_s16((int16x8_t)a, (int16x8_t)b); }
inline int16_t largest_of_eight(v8 v) { return vmaxvq_s16((int16x8_t)v); }
inline vw zip_low(vw a, vw b) { return (vw)vzip1q_u16((uint16x8_t)a, (uint16x8_t)b); }
inline vw zip_high(vw a, vw b) { return (vw)vzip2q_u16((uint16x8_t)a, (uint16x8_t)b); }
template <int R>
inline vb side_by_side(const uint8_t* const* blocks, int64_t at) {
  return (vb)vld1q_u8(blocks[0] + at);
}
inline vf larger(vf a, vf b) { return (vf)vmaxq_f32((float32x4_t)a, (float32x4_t)b); }
inline vf smaller(vf a, vf b) { return (vf)vminq_f32((float32x4_t)a, (float32x4_t)b); }
}  // namespace

#include "tile.inl"
#include "tile_many.inl"
#include "ranks.inl"
#include "sign_mass.inl"
#include "sign_places.inl"
#include "sign_peaks.inl"
#include "sign_shuffle.inl"

namespace {
bool runs() { return true; }
}  // namespace

extern const scout_isa scout_isa_neon = {
    "neon", runs, W, attend, attend_many, score, signs, peaks, signs_fit, logarithms, shares, into_bins, read};
#endif
