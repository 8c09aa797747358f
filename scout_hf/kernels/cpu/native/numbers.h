// Scalar conversion of stored numbers, for code that is not hot. Rounds to nearest even.
#pragma once

#include <stdint.h>
#include <string.h>

#include "scout_cpu.h"

namespace scout {

inline uint32_t bits_of(float x) {
  uint32_t bits;
  memcpy(&bits, &x, sizeof bits);
  return bits;
}

inline float from_bits(uint32_t bits) {
  float x;
  memcpy(&x, &bits, sizeof x);
  return x;
}

inline float from_bf16(uint16_t h) { return from_bits((uint32_t)h << 16); }

inline uint16_t to_bf16(float x) {
  uint32_t bits = bits_of(x);
  if (x != x) return (uint16_t)((bits >> 16) | 0x40);
  return (uint16_t)((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

inline float from_f16(uint16_t h) {
  uint32_t body = (uint32_t)(h & 0x7fff) << 13, sign = (uint32_t)(h & 0x8000) << 16;
  uint32_t top = (h & 0x7c00) == 0x7c00 ? 0x7f800000u : 0u;
  return from_bits(bits_of(from_bits(body) * 0x1p112f) | top | sign);
}

inline uint16_t to_f16(float x) {
  uint32_t bits = bits_of(x), sign = (bits >> 16) & 0x8000, size = bits & 0x7fffffff;
  if (size > 0x7f800000) return (uint16_t)(sign | 0x7e00);
  if (size >= 0x477ff000) return (uint16_t)(sign | 0x7c00);
  // Subnormal halves: adding 2^-1 * 2^-13... makes the float addition round at the right bit.
  if (size < 0x38800000) return (uint16_t)(sign | (bits_of(from_bits(size) + 0.5f) - bits_of(0.5f)));
  return (uint16_t)(sign | ((size - 0x38000000 + 0xfff + ((size >> 13) & 1)) >> 13));
}

inline int bytes_of(int dtype) { return dtype == SCOUT_F32 ? 4 : dtype == SCOUT_I8 ? 1 : 2; }

inline void read_numbers(const void* from, int64_t first, int64_t count, int dtype, float* into) {
  if (dtype == SCOUT_F32) {
    memcpy(into, (const float*)from + first, count * sizeof(float));
    return;
  }
  const uint16_t* halves = (const uint16_t*)from + first;
  if (dtype == SCOUT_F16)
    for (int64_t i = 0; i < count; i++) into[i] = from_f16(halves[i]);
  else
    for (int64_t i = 0; i < count; i++) into[i] = from_bf16(halves[i]);
}

inline void write_numbers(const float* numbers, int64_t count, int dtype, void* to, int64_t first) {
  if (dtype == SCOUT_F32) {
    memcpy((float*)to + first, numbers, count * sizeof(float));
    return;
  }
  uint16_t* halves = (uint16_t*)to + first;
  if (dtype == SCOUT_F16)
    for (int64_t i = 0; i < count; i++) halves[i] = to_f16(numbers[i]);
  else
    for (int64_t i = 0; i < count; i++) halves[i] = to_bf16(numbers[i]);
}

}  // namespace scout
