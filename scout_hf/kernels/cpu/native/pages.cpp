// Append and gather, int8 packing, and channel-wise bounds of blocks.
#include <math.h>

#include <atomic>

#include "isa.h"
#include "numbers.h"
#include "scout_cpu.h"
#include "team.h"

namespace {

constexpr int64_t WORTH_A_TEAM_BYTES = 256 << 10;

template <class Body>
struct Items {
  Body& body;
  int64_t count;
  std::atomic<int64_t> next{0};
};

// Calls body(i) for every i below `count`; on a team if it touches enough bytes.
template <class Body>
void for_each_item(int64_t count, int64_t bytes, int threads, Body body) {
  Items<Body> items{body, count};
  if (bytes < WORTH_A_TEAM_BYTES) threads = 1;
  scout_team_run(
      [](void* it) {
        Items<Body>& mine = *(Items<Body>*)it;
        for (;;) {
          const int64_t i = mine.next.fetch_add(1, std::memory_order_relaxed);
          if (i >= mine.count) return;
          mine.body(i);
        }
      },
      &items, threads < count ? threads : (int)count);
}

// The smallest bf16 >= x, for x >= 0.
uint16_t bf16_above(float x) {
  if (!(x <= 3.0e38f)) return x != x ? 0x7fc0 : 0x7f80;
  return (uint16_t)((scout::bits_of(x) + 0xffff) >> 16);
}

struct Int8Tile {
  int8_t *keys, *values;
  uint16_t *key_scales, *value_scales;
  int block, dim;
  Int8Tile(void* tile, int block, int dim) : block(block), dim(dim) {
    keys = (int8_t*)tile;
    values = keys + (int64_t)block * dim;
    key_scales = (uint16_t*)(values + (int64_t)block * dim);
    value_scales = key_scales + dim;
  }
  int8_t& key(int t, int d) const { return keys[((int64_t)(d / 2) * block + t) * 2 + d % 2]; }
  int8_t& value(int t, int d) const { return values[((int64_t)(t / 4) * dim + d) * 4 + t % 4]; }
  float key_number(int t, int d) const { return key(t, d) * scout::from_bf16(key_scales[d]); }
};

// Propagates NaN.
float larger(float before, float x) { return x <= before || before != before ? before : x; }

int8_t quantise(float x, float inverse) {
  const float scaled = x * inverse;
  if (!(fabsf(scaled) <= 128.0f)) return 0;  // then the scale is infinite or NaN
  return (int8_t)(scaled < 0.0f ? scaled - 0.5f : scaled + 0.5f);
}

float inverse_of(uint16_t scale) {
  const float s = scout::from_bf16(scale);
  return s > 0.0f && s < INFINITY ? 1.0f / s : 0.0f;
}

void pack(const uint8_t* plain, int dtype, int block, int dim, void* tile) {
  Int8Tile packed(tile, block, dim);
  float peaks[SCOUT_MAX_HEAD_DIM] = {}, inverses[SCOUT_MAX_HEAD_DIM], row[SCOUT_MAX_HEAD_DIM];
  for (int t = 0; t < block; t++) {
    scout::read_numbers(plain, (int64_t)t * dim, dim, dtype, row);
    for (int d = 0; d < dim; d++) {
      const float size = fabsf(row[d]);
      peaks[d] = larger(peaks[d], size);
    }
  }
  for (int d = 0; d < dim; d++) {
    packed.key_scales[d] = bf16_above(peaks[d] / 127.0f);
    inverses[d] = inverse_of(packed.key_scales[d]);
  }
  for (int t = 0; t < block; t++) {
    scout::read_numbers(plain, (int64_t)t * dim, dim, dtype, row);
    for (int d = 0; d < dim; d++) packed.key(t, d) = quantise(row[d], inverses[d]);
  }
  for (int t = 0; t < block; t++) {
    scout::read_numbers(plain, (int64_t)(block + t) * dim, dim, dtype, row);
    float peak = 0.0f;
    for (int d = 0; d < dim; d++) peak = larger(peak, fabsf(row[d]));
    packed.value_scales[t] = bf16_above(peak / 127.0f);
    const float inverse = inverse_of(packed.value_scales[t]);
    for (int d = 0; d < dim; d++) packed.value(t, d) = quantise(row[d], inverse);
  }
}

void unpack(const void* tile, int block, int dim, int dtype, void* keys, void* values) {
  const Int8Tile packed((void*)tile, block, dim);
  float row[SCOUT_MAX_HEAD_DIM];
  for (int t = 0; t < block; t++) {
    for (int d = 0; d < dim; d++) row[d] = packed.key_number(t, d);
    scout::write_numbers(row, dim, dtype, keys, (int64_t)t * dim);
    const float scale = scout::from_bf16(packed.value_scales[t]);
    for (int d = 0; d < dim; d++) row[d] = packed.value(t, d) * scale;
    scout::write_numbers(row, dim, dtype, values, (int64_t)t * dim);
  }
}

struct Store {
  const scout_store& s;
  int64_t tile_bytes, plain_bytes, row_bytes;

  explicit Store(const scout_store& store)
      : s(store),
        tile_bytes(scout_tile_bytes(store.dtype, store.block_size, store.head_dim)),
        plain_bytes(scout_tile_bytes(store.plain_dtype, store.block_size, store.head_dim)),
        row_bytes((int64_t)store.head_dim * scout::bytes_of(store.plain_dtype)) {}

  bool valid() const {
    return s.block_size >= 4 && s.block_size % 4 == 0 && s.head_dim % 2 == 0 && s.head_dim >= 1 && s.head_dim <= SCOUT_MAX_HEAD_DIM;
  }
  uint8_t* tile(int row, int head, int64_t block) const {
    return (uint8_t*)s.pages[row * s.pages_stride + block] + head * tile_bytes;
  }
  uint8_t* tail(int row, int head) const { return (uint8_t*)s.tail + ((int64_t)row * s.kv_heads + head) * plain_bytes; }
};

void copy_rows(uint8_t* to, const uint8_t* from, int64_t stride_bytes, int64_t rows, int64_t row_bytes) {
  if (stride_bytes == row_bytes) {
    memcpy(to, from, rows * row_bytes);
    return;
  }
  for (int64_t t = 0; t < rows; t++) memcpy(to + t * row_bytes, from + t * stride_bytes, row_bytes);
}

// Copies the new tokens of one row and head that belong to block `block` into an unpacked tile.
void copy_block(const scout_append_args& a, const Store& store, int row, int head, int64_t block, uint8_t* tile) {
  const int size = a.store.block_size, number = scout::bytes_of(a.store.plain_dtype);
  const int64_t start = block * size > a.store.length ? block * size : a.store.length;
  const int64_t end = a.store.length + a.tokens < (block + 1) * size ? a.store.length + a.tokens : (block + 1) * size;
  const int64_t offset = (start - block * size) * store.row_bytes, token = start - a.store.length;
  auto copy = [&](const void* from, const int64_t* strides, uint8_t* to) {
    const int64_t at = row * strides[0] + head * strides[1] + token * strides[2];
    copy_rows(to + offset, (const uint8_t*)from + at * number, strides[2] * number, end - start, store.row_bytes);
  };
  copy(a.keys, a.key_strides, tile);
  copy(a.values, a.value_strides, tile + store.plain_bytes / 2);
}

}  // namespace

extern "C" {

SCOUT_EXPORT int64_t scout_tile_bytes(int dtype, int block_size, int head_dim) {
  const int64_t numbers = 2 * (int64_t)block_size * head_dim;
  if (dtype != SCOUT_I8) return numbers * scout::bytes_of(dtype);
  return (numbers + 2 * (head_dim + block_size) + 63) / 64 * 64;
}

SCOUT_EXPORT int scout_append(const scout_append_args* args, int threads) {
  const scout_append_args& a = *args;
  const Store store(a.store);
  if (!store.valid()) return SCOUT_UNSUPPORTED;
  if (a.tokens < 1) return SCOUT_OK;
  const int size = a.store.block_size, lists = a.store.batch * a.store.kv_heads;
  const int64_t first = a.store.length / size, end = a.store.length + a.tokens, last = (end + size - 1) / size;
  const int64_t bytes = 2 * lists * a.tokens * store.row_bytes;
  if (a.store.dtype != SCOUT_I8) {
    const int64_t blocks = last - first;
    for_each_item(lists * blocks, bytes, threads, [&](int64_t i) {
      const int row = (int)(i / blocks) / a.store.kv_heads, head = (int)(i / blocks) % a.store.kv_heads;
      copy_block(a, store, row, head, first + i % blocks, store.tile(row, head, first + i % blocks));
    });
    return SCOUT_OK;
  }
  for_each_item(lists, bytes, threads, [&](int64_t i) {
    const int row = (int)i / a.store.kv_heads, head = (int)i % a.store.kv_heads;
    uint8_t* tail = store.tail(row, head);
    for (int64_t block = first; block < last; block++) {
      copy_block(a, store, row, head, block, tail);
      if ((block + 1) * size <= end)
        pack(tail, a.store.plain_dtype, size, a.store.head_dim, store.tile(row, head, block));
    }
  });
  return SCOUT_OK;
}

SCOUT_EXPORT int scout_gather(const scout_gather_args* args, int threads) {
  const scout_gather_args& a = *args;
  const Store store(a.store);
  if (!store.valid()) return SCOUT_UNSUPPORTED;
  const int64_t half = store.plain_bytes / 2, items = a.store.batch * a.store.kv_heads * a.count;
  const int64_t open = a.store.length / a.store.block_size;
  const int64_t known = (a.store.length + a.store.block_size - 1) / a.store.block_size;
  for (int64_t i = 0; i < items; i++)
    if (a.blocks[i] < 0 || a.blocks[i] >= known) return SCOUT_BAD_BLOCK;
  for_each_item(items, items * store.plain_bytes, threads, [&](int64_t i) {
    const int list = (int)(i / a.count), row = list / a.store.kv_heads, head = list % a.store.kv_heads;
    uint8_t *keys = (uint8_t*)a.keys + i * half, *values = (uint8_t*)a.values + i * half;
    const bool packed = a.store.dtype == SCOUT_I8 && a.blocks[i] < open;
    if (packed) {
      unpack(store.tile(row, head, a.blocks[i]), a.store.block_size, a.store.head_dim, a.store.plain_dtype, keys,
             values);
      return;
    }
    const uint8_t* from =
        a.store.dtype == SCOUT_I8 ? store.tail(row, head) : store.tile(row, head, a.blocks[i]);
    memcpy(keys, from, half);
    memcpy(values, from + half, half);
  });
  return SCOUT_OK;
}

SCOUT_EXPORT int scout_minmax(const scout_minmax_args* args, int threads) {
  const scout_minmax_args& a = *args;
  const Store store(a.store);
  if (!store.valid()) return SCOUT_UNSUPPORTED;
  const int size = a.store.block_size, D = a.store.head_dim, lists = a.store.batch * a.store.kv_heads;
  const int64_t blocks = a.last - a.first;
  for_each_item(lists * blocks, lists * blocks * size * store.row_bytes, threads, [&](int64_t i) {
    const int list = (int)(i / blocks), row = list / a.store.kv_heads, head = list % a.store.kv_heads;
    const int64_t block = a.first + i % blocks;
    const uint8_t* marks = a.padding_mask ? a.padding_mask + row * a.padding_mask_stride + block * size : nullptr;
    const uint8_t* tile = store.tile(row, head, block);
    const Int8Tile packed((void*)tile, size, D);
    float bounds[2 * SCOUT_MAX_HEAD_DIM], keys[SCOUT_MAX_HEAD_DIM];
    float *high = bounds, *low = bounds + D;
    bool seen = false;
    for (int t = 0; t < size; t++) {
      if (marks && !marks[t]) continue;
      if (a.store.dtype == SCOUT_I8)
        for (int d = 0; d < D; d++) keys[d] = packed.key_number(t, d);
      else
        scout::read_numbers(tile, (int64_t)t * D, D, a.store.dtype, keys);
      if (!seen) {
        memcpy(high, keys, sizeof(float) * D);
        memcpy(low, keys, sizeof(float) * D);
        seen = true;
        continue;
      }
      for (int d = 0; d < D; d++) {
        high[d] = larger(high[d], keys[d]);
        low[d] = -larger(-low[d], -keys[d]);
      }
    }
    // A block of only padding has no bounds; zeros keep its score finite, and it is never chosen.
    if (!seen) memset(bounds, 0, sizeof(float) * 2 * D);
    scout::write_numbers(bounds, 2 * D, a.store.plain_dtype, a.codes,
                         row * a.codes_row + head * a.codes_head + block * 2 * D);
  });
  return SCOUT_OK;
}

}  // extern "C"
