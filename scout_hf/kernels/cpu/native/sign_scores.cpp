// Lookup tables for sign codes. All rounding is here, so all instruction sets agree.
#include "sign_scores.h"

#include <math.h>
#include <string.h>

#include <algorithm>

namespace {

constexpr int BLOCKS_AT_ONCE = 512;  // their codes stay in L2 while the heads are processed in turn
constexpr int MOST_HEADS = 16;
constexpr float FARTHEST = 1e5f, NEAR_OVERFLOW = 0x1p125f;
constexpr int MOST = 127;            // of a table, or of a token's sum: -MOST to MOST, shifted so that the least is 0

typedef float vf __attribute__((vector_size(16)));
typedef int32_t vi __attribute__((vector_size(16)));
typedef uint8_t vb __attribute__((vector_size(4)));

inline vf splat(float x) { return vf{} + x; }

enum class Fit { TABLE, SUM };  // what -MOST to MOST must hold

// Fills the tables of one head, [dims / 4][16]; returns the value of one unit.
float make_tables(const float* query, int dims, Fit fit, uint8_t* entries, int* offset) {
  float peak = 0, all = 0;
  bool finite = true;
  for (int d = 0; d < dims; d += 4) {
    const float most = (fabsf(query[d]) + fabsf(query[d + 1])) + (fabsf(query[d + 2]) + fabsf(query[d + 3]));
    finite &= most < INFINITY;
    peak = std::max(peak, most);
    all += most;
  }
  *offset = 0;
  if (!finite || peak < 1e-30f) {
    memset(entries, 0, (size_t)dims * 4);
    return finite ? 0.0f : NAN;
  }
  // Rounding adds half a unit per table to a sum at most.
  const float units = fit == Fit::TABLE ? MOST / peak : (MOST - dims / 8) / all;
  for (int d = 0; d < dims; d += 4, entries += 16) {
    const vf low = vf{-1, 1, -1, 1} * query[d] + vf{-1, -1, 1, 1} * query[d + 1];
    const float same = query[d + 2] + query[d + 3], other = query[d + 2] - query[d + 3];
    const float high[4] = {-same, other, -other, same};
    const float most = (fabsf(query[d]) + fabsf(query[d + 1])) + (fabsf(query[d + 2]) + fabsf(query[d + 3]));
    const vf nearest = splat(0x1.8p23f);  // adding it rounds to an integer
    const vi up = __builtin_convertvector((splat(most * units) + nearest) - nearest, vi);
    for (int i = 0; i < 4; i++) {
      const vi rounded = __builtin_convertvector(((low + high[i]) * units + nearest) - nearest, vi);
      const vb bytes = __builtin_convertvector(rounded + up, vb);
      memcpy(entries + 4 * i, &bytes, 4);
    }
    *offset += up[0];
  }
  return 1 / units;
}

// What `coded` says of blocks from `first` on, for some heads.
scout_signs part_of(const scout_coded& coded, int64_t first, int64_t blocks, int dims, const uint8_t* tables,
                    const int* offsets, const float* worth, int heads) {
  scout_signs part = {};
  part.codes = coded.codes + (coded.ids ? 0 : first * coded.code_bytes), part.code_bytes = coded.code_bytes;
  part.ids = coded.ids ? coded.ids + first : nullptr, part.blocks = blocks, part.scales = coded.scales;
  part.block_size = coded.block_size, part.rows = dims / 8, part.heads = heads;
  part.tables = tables, part.offsets = offsets, part.worth = worth;
  return part;
}

}  // namespace

void scout_sign_scores(const scout_isa* isa, const scout_coded& coded, int dims, const float* query, int heads,
                       float* scores, int64_t stride) {
  uint8_t tables[MOST_HEADS * SCOUT_MAX_HEAD_DIM * 4];
  float worth[MOST_HEADS], mass[SCOUT_SIGN_HEADS * BLOCKS_AT_ONCE];
  float reference[MOST_HEADS] = {};
  int offsets[MOST_HEADS];
  for (int h = 0; h < heads; h++)
    worth[h] = make_tables(query + h * dims, dims, Fit::TABLE, tables + h * dims * 4, &offsets[h]);
  for (int64_t first = 0; first < coded.blocks; first += BLOCKS_AT_ONCE) {
    const int some = (int)std::min<int64_t>(BLOCKS_AT_ONCE, coded.blocks - first);
    for (int h = 0; h < heads; h += SCOUT_SIGN_HEADS) {
      scout_signs part = part_of(coded, first, some, dims, tables + h * dims * 4, offsets + h, worth + h,
                                 std::min(heads - h, (int)SCOUT_SIGN_HEADS));
      part.reference = reference + h, part.out = mass, part.out_stride = BLOCKS_AT_ONCE;
      for (bool again = true; again;) {
        again = false;
        isa->signs(&part);
        for (int i = 0; i < part.heads; i++) {
          float& own = reference[h + i];
          // A NaN query gives NaN scores.
          const float most = isa->logarithms(mass + i * BLOCKS_AT_ONCE, some, own + 0 * worth[h + i],
                                             scores + (h + i) * stride + first);
          if (own > FARTHEST || most < NEAR_OVERFLOW) continue;
          own += 200;
          again = true;
        }
      }
    }
  }
}

void scout_sign_peaks(const scout_isa* isa, const scout_coded& coded, int dims, const float* query, int heads,
                      float* peaks, int64_t stride) {
  uint8_t tables[SCOUT_SIGN_HEADS * SCOUT_MAX_COARSE_DIM * 4];
  float worth[SCOUT_SIGN_HEADS];
  int offsets[SCOUT_SIGN_HEADS];
  for (int h = 0; h < heads; h += SCOUT_SIGN_HEADS) {
    const int some = std::min(heads - h, (int)SCOUT_SIGN_HEADS);
    for (int i = 0; i < some; i++)
      worth[i] = make_tables(query + (h + i) * dims, dims, Fit::SUM, tables + i * dims * 4, &offsets[i]);
    for (int64_t first = 0; first < coded.blocks; first += BLOCKS_AT_ONCE) {
      const int64_t blocks = std::min<int64_t>(BLOCKS_AT_ONCE, coded.blocks - first);
      scout_signs part = part_of(coded, first, blocks, dims, tables, offsets, worth, some);
      part.out = peaks + h * stride + first, part.out_stride = stride;
      isa->peaks(&part);
    }
  }
}
