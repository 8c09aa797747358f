// Block selection: digest scores, then the top-k in ascending order.
#include <math.h>
#include <stdlib.h>

#include <algorithm>
#include <atomic>
#include <new>

#include "isa.h"
#include "numbers.h"
#include "scout_cpu.h"
#include "sign_scores.h"
#include "team.h"

namespace {

constexpr int64_t RANGE_BLOCKS = 2048, WORTH_A_TEAM_BYTES = 64 << 10;
constexpr int BINS = 1024, STRETCH = 16, HEADS_AT_ONCE = 16, PRODUCTS_AT_ONCE = 1024;

bool any(const uint8_t* marks, int count) {
  for (int i = 0; i < count; i++)
    if (marks[i]) return true;
  return false;
}

// Four scores at a time, with comparisons: compilers do not vectorise this for floats that may be NaN.
typedef float vf __attribute__((vector_size(16)));
typedef int32_t vi __attribute__((vector_size(16)));

struct Bounds {
  float low, high;  // over finite scores
  int valid;       // scores above -inf
};

// NaN becomes inf, so that a block with NaN keys is attended, not hidden. `count` is padded to a multiple of 4 by -inf.
Bounds bounds_of(float* scores, int count) {
  const vf none = vf{} - INFINITY, all = vf{} + INFINITY;
  vf low = vf{} + 3.0e38f, high = vf{} - 3.0e38f;
  vi valid = {};
  for (int i = 0; i < count; i += 4) {
    vf s;
    memcpy(&s, scores + i, sizeof s);
    s = s == s ? s : all;
    memcpy(scores + i, &s, sizeof s);
    const vi real = s > none;
    valid -= real;
    low = (real & (s < low)) ? s : low;
    high = ((s < all) & (s > high)) ? s : high;
  }
  Bounds bounds = {low[0], high[0], valid[0] + valid[1] + valid[2] + valid[3]};
  for (int i = 1; i < 4; i++) {
    bounds.low = std::min(bounds.low, low[i]);
    bounds.high = std::max(bounds.high, high[i]);
  }
  return bounds;
}

// The bin of every score: 0 for -inf, the last for inf, the others in between in ascending order.
void sort_into_bins(const float* scores, int count, const Bounds& bounds, int32_t* places, int* bins) {
  const vf none = vf{} - INFINITY, all = vf{} + INFINITY, low = vf{} + bounds.low, high = vf{} + bounds.high;
  float step = bounds.high > bounds.low ? (BINS - 3) / (bounds.high - bounds.low) : 0.0f;
  if (!(step < INFINITY)) step = 0.0f;  // scores almost equal: one bin for all
  for (int i = 0; i < count; i += 4) {
    vf s;
    memcpy(&s, scores + i, sizeof s);
    vf within = s < low ? low : s;
    within = within > high ? high : within;
    vi place = __builtin_convertvector((within - low) * step, vi) + 1;
    place = place < 1 ? vi{} + 1 : place;  // the range overflows a float
    place = (s == none) ? vi{} : place;
    place = (s == all) ? vi{} + (BINS - 1) : place;
    memcpy(places + i, &place, sizeof place);
  }
  for (int i = 0; i < count; i++) bins[places[i]]++;
}

// Ids of the `want` largest scores, ascending; among equal scores the first. -inf is never chosen. May change `scores`,
// whose capacity is rounded up to a multiple of 4, as is that of `spare` and `places`.
int best(float* scores, int count, int want, float* spare, int32_t* places, int32_t* ids) {
  if (want <= 0) return 0;
  const int padded = (count + 3) / 4 * 4;
  for (int i = count; i < padded; i++) scores[i] = -INFINITY;
  const Bounds bounds = bounds_of(scores, padded);
  float threshold = -INFINITY;
  int ties = 0;
  if (bounds.valid > want) {
    int bins[BINS] = {}, at = BINS - 1, above = 0, inside = 0;
    sort_into_bins(scores, padded, bounds, places, bins);
    while (above + bins[at] < want) above += bins[at--];
    for (int i = 0; i < count; i++) {
      spare[inside] = scores[i];
      inside += places[i] == at;
    }
    const int rank = want - above - 1;
    std::nth_element(spare, spare + rank, spare + inside, [](float a, float b) { return a > b; });
    threshold = spare[rank];
    ties = want - above;
    for (int i = 0; i < inside; i++) ties -= spare[i] > threshold;
  }
  int chosen = 0;
  for (int first = 0; first < count && chosen < want; first += STRETCH) {
    const int last = std::min(first + STRETCH, count);
    int some = 0;
    for (int i = first; i < last; i++) some |= scores[i] >= threshold;
    if (!some) continue;
    for (int i = first; i < last && chosen < want; i++) {
      if (scores[i] > threshold)
        ids[chosen++] = i;
      else if (ties > 0 && scores[i] == threshold)
        ids[chosen++] = i, ties--;
    }
  }
  return chosen;
}

inline vf load(const float* from) {
  vf value;
  memcpy(&value, from, sizeof value);
  return value;
}

// 2^x for x <= 0, to 1e-5; 0 below -126, and for NaN.
inline vf power(vf x) {
  const vf least = vf{} - 126.0f;
  const vi within = x > least;
  x = within ? x : least;
  const vi whole = __builtin_convertvector(x, vi);  // towards 0: the rest is in (-1, 0]
  const vf rest = x - __builtin_convertvector(whole, vf);
  const vf fraction = 1.0f + rest * (0.6930757f + rest * (0.239547f + rest * (0.0534019f + rest * 0.0069349f)));
  const vi exponent = (whole + 127) << 23;
  vf scale;
  memcpy(&scale, &exponent, sizeof scale);
  return within ? fraction * scale : vf{};
}

// log2 of x >= 0, to 1e-5; finite for 0.
inline vf logarithm(vf x) {
  vi bits;
  memcpy(&bits, &x, sizeof bits);
  const vi exponent = (bits >> 23) - 127;
  bits = (bits & 0x7fffff) | 0x3f800000;
  vf m;
  memcpy(&m, &bits, sizeof m);
  m = m - 1.0f;
  const vf low = 1.4425348f + m * (-0.7180336f + m * 0.4571581f);
  const vf high = -0.2773416f + m * (0.121473f - m * 0.0257924f);
  return __builtin_convertvector(exponent, vf) + m * (low + m * m * m * high);
}

// Vectors per digest of DOTS and DOTS4; 0 if that is not a whole number.
int parts_of(const scout_select_args& a) {
  const int64_t numbers = (int64_t)a.code * (a.scorer == SCOUT_DOTS4 ? 2 : 1);
  return numbers % a.head_dim ? 0 : (int)(numbers / a.head_dim);
}

// The instruction set to use; NULL if none fits, or sizes and types are inconsistent.
const scout_isa* isa_for(const scout_select_args& a) {
  const bool bytes = a.code_dtype == SCOUT_I8;
  if (a.kv_heads < 1 || a.query_heads % a.kv_heads || a.head_dim < 1) return nullptr;
  switch (a.scorer) {
    case SCOUT_MINMAX:
      if (a.code != 2 * a.head_dim || a.head_dim > SCOUT_MAX_HEAD_DIM || bytes) return nullptr;
      return scout_isa_for(a.code, 0);
    case SCOUT_SIGN:
      if (a.head_dim % 8 || a.head_dim > SCOUT_MAX_HEAD_DIM || !bytes || a.block_size < 1 ||
          a.block_size > SCOUT_MAX_BLOCK || a.code != a.block_size * (a.head_dim / 8 + 1))
        return nullptr;
      if (a.fine && (!a.coarse || !a.blocks || a.mass > 0 || a.fine < 1 || a.fine > a.candidates ||
                     a.coarse_code != 2 * SCOUT_PAIRS * (a.head_dim / 8 + 1)))
        return nullptr;
      return scout_isa_for_signs(a.block_size);
    case SCOUT_DOTS:
    case SCOUT_DOTS4: {
      const int parts = parts_of(a);
      if (a.query_heads != a.kv_heads || a.head_dim > 2 * SCOUT_MAX_HEAD_DIM || parts < 1 || parts > PRODUCTS_AT_ONCE ||
          (a.scorer == SCOUT_DOTS4 && !bytes))
        return nullptr;
      return scout_isa_for(a.head_dim, 0);
    }
    default: return nullptr;
  }
}

struct Select {
  const scout_select_args& a;
  const scout_isa* isa;
  int lists, ranges;
  float* spare;                      // [lists][capacity]
  int32_t* places;                   // [lists][capacity]
  float* scores;                     // [lists][capacity]
  float* masses;                     // SIGN: [lists][group][capacity], log2 for every query head
  float* fine_masses;                // [lists][group][fine], rounded up to a multiple of 4
  int32_t* fine_ids;                 // [lists][fine], as well
  int capacity;                      // candidates, rounded up to a multiple of 4, with coarse codes of 16
  std::atomic<int32_t>* unfinished;  // [lists]
  std::atomic<int64_t> next{0};

  explicit Select(const scout_select_args& args) : a(args) {}

  const uint8_t* marks(int row, int64_t block) const {
    return a.padding_mask ? a.padding_mask + row * a.padding_mask_stride + block * a.block_size : nullptr;
  }

  bool is_real(int row, int64_t block) const { return !a.padding_mask || any(marks(row, block), a.block_size); }

  // Upper bound of q.k over a block, summed over the group: relu(q) . max + min(q, 0) . min.
  void weights(int row, int head, float* into) const {
    const int group = a.query_heads / a.kv_heads, D = a.head_dim;
    float query[SCOUT_MAX_HEAD_DIM];
    memset(into, 0, sizeof(float) * 2 * D);
    for (int g = 0; g < group; g++) {
      const int64_t from = row * a.query_row + (head * group + g) * a.query_head;
      scout::read_numbers(a.query, from, D, a.query_dtype, query);
      for (int d = 0; d < D; d++) {
        into[d] += query[d] > 0.0f ? query[d] : 0.0f;
        into[D + d] += query[d] > 0.0f ? 0.0f : query[d];
      }
    }
  }

  void bounds(int row, int head, const uint8_t* codes, int64_t count, float* into) const {
    alignas(64) float w[2 * SCOUT_MAX_HEAD_DIM];
    weights(row, head, w);
    isa->dots(codes, a.code_dtype, count, a.code, w, into);
  }

  void signs(int row, int head, const scout_coded& coded, float* into, int64_t stride) const {
    const int group = a.query_heads / a.kv_heads, D = a.head_dim;
    float query[HEADS_AT_ONCE * SCOUT_MAX_HEAD_DIM];
    for (int g0 = 0; g0 < group; g0 += HEADS_AT_ONCE) {
      const int heads = std::min(HEADS_AT_ONCE, group - g0);
      for (int g = 0; g < heads; g++) {
        const int64_t from = row * a.query_row + (head * group + g0 + g) * a.query_head;
        scout::read_numbers(a.query, from, D, a.query_dtype, query + g * D);
      }
      scout_sign_scores(isa, coded, D, query, heads, into + g0 * stride, stride);
    }
  }

  // Some candidates, all or those of `ids`, which ascend.
  struct Scored {
    float *masses, *scores;  // [group][stride] and [stride]; the stride is a multiple of 4
    int stride, count;
    const int32_t* ids;
    int block(int i) const { return ids ? ids[i] : i; }
  };

  // Gives blocks of only padding the lowest score, and up to `sinks` leading real ones the highest.
  void mark(int row, const Scored& s, int sinks) const {
    for (int i = 0; i < s.count && (a.padding_mask || sinks > 0); i++) {
      if (!is_real(row, s.block(i)))
        s.scores[i] = -INFINITY;
      else if (sinks > 0)
        s.scores[i] = INFINITY, sinks--;
    }
  }

  // log2 of the mean over the group of each block's share of its head's mass, computed in logarithms, since a share may
  // be too small for a float. Blocks of only padding have no share.
  void mean_shares(int list, int row, const Scored& s) {
    const int group = a.query_heads / a.kv_heads, capacity = s.stride;
    float *own = s.masses, *into = s.scores;
    const vf none = vf{} - INFINITY;
    for (int h = 0; h < group; h++) {
      float* mass = own + (int64_t)h * capacity;
      std::fill(mass + s.count, mass + capacity, -INFINITY);
      for (int i = 0; i < s.count && a.padding_mask; i++)
        if (!is_real(row, s.block(i))) mass[i] = -INFINITY;
      vf most = none;
      for (int i = 0; i < capacity; i += 4) most = load(mass + i) > most ? load(mass + i) : most;
      const float highest = std::max(std::max(most[0], most[1]), std::max(most[2], most[3]));
      vf sum = {};
      for (int i = 0; i < capacity; i += 4) sum += power(load(mass + i) - highest);
      float all = highest + logarithm(vf{} + ((sum[0] + sum[1]) + (sum[2] + sum[3])))[0];
      if (a.recent) {
        const float other = a.recent[row * a.query_heads + list % a.kv_heads * group + h];
        const float top = std::max(all, other), less = std::min(all, other);
        if (less > -INFINITY) all = top + logarithm(1.0f + power(vf{} + (less - top)))[0];
        else all = top;
      }
      for (int i = 0; i < capacity; i += 4) {
        const vf share = load(mass + i) - all;
        memcpy(mass + i, &share, sizeof share);
      }
    }
    const float each = log2f((float)group);
    for (int i = 0; i < capacity; i += 4) {
      vf most = load(own + i), sum = {};
      for (int h = 1; h < group; h++) {
        const vf share = load(own + (int64_t)h * capacity + i);
        most = share > most ? share : most;
      }
      for (int h = 0; h < group; h++) sum += power(load(own + (int64_t)h * capacity + i) - most);
      const vf mean = group == 1 ? most : most + logarithm(sum) - each;
      memcpy(into + i, &mean, sizeof mean);
    }
  }

  void products(int row, int head, const uint8_t* codes, int64_t count, float* into) const {
    const int parts = parts_of(a), dtype = a.scorer == SCOUT_DOTS4 ? (int)SCOUT_I4 : a.code_dtype;
    alignas(64) float w[2 * SCOUT_MAX_HEAD_DIM];
    scout::read_numbers(a.query, row * a.query_row + head * a.query_head, a.head_dim, a.query_dtype, w);
    if (parts == 1) return isa->dots(codes, dtype, count, a.head_dim, w, into);
    float each[PRODUCTS_AT_ONCE];
    const int64_t step = PRODUCTS_AT_ONCE / parts;
    for (int64_t first = 0; first < count; first += step, codes += step * a.code * scout::bytes_of(a.code_dtype)) {
      const int64_t some = std::min(step, count - first);
      isa->dots(codes, dtype, some * parts, a.head_dim, w, each);
      for (int64_t i = 0; i < some; i++) {
        float best = each[i * parts];
        // Propagates NaN.
        for (int part = 1; part < parts; part++) {
          const float other = each[i * parts + part];
          best = best >= other || best != best ? best : other;
        }
        into[first + i] = best;
      }
    }
  }

  // How many blocks must be chosen, sinks and then the largest shares, so that the rest is at most `1 - a.mass` in all.
  int needed(int row, const float* shares, float* sizes) const {
    // Bins of an eighth of a power of two; the last one has all that is smaller than 2^-32, NaN and padding.
    constexpr int EIGHTHS = 256;
    float sums[EIGHTHS] = {};
    int counts[EIGHTHS] = {};
    auto bin = [](float share) { return share > -31.9f ? share < 0 ? (int)(share * -8) : 0 : EIGHTHS - 1; };
    int sinks = 0, first = 0;  // of what may be left out
    for (; first < a.candidates && sinks < a.sinks; first++) sinks += is_real(row, first);
    int real = 0;
    for (int i = 0; i < a.candidates; i += 4) {
      const vf some = power(load(shares + i));
      memcpy(sizes + i, &some, sizeof some);
    }
    for (int i = first; i < a.candidates; i++) {
      const int at = bin(shares[i]);
      sums[at] += sizes[i], counts[at]++;
      real += !(shares[i] == -INFINITY);
    }
    float left = 1 - a.mass;
    int at = EIGHTHS - 1, others = a.candidates - first - real;  // padding is never chosen, nor needed
    counts[at] -= others;
    int out = 0;
    for (; at >= 0 && sums[at] <= left; at--) left -= sums[at], out += counts[at];
    if (at >= 0) {
      int inside = 0;
      for (int i = first; i < a.candidates; i++)
        if (bin(shares[i]) == at && !(shares[i] == -INFINITY)) sizes[inside++] = sizes[i];
      std::sort(sizes, sizes + inside);
      for (int i = 0; i < inside && sizes[i] <= left; i++) left -= sizes[i], out++;
    }
    return sinks + real - out;
  }

  float* masses_of(int list) const { return masses + (int64_t)list * (a.query_heads / a.kv_heads) * capacity; }

  // Chooses among the blocks that are best by their coarse codes.
  void coarse_then_fine(int list, int row, int head, const uint8_t* codes) {
    const int group = a.query_heads / a.kv_heads, tokens = 2 * SCOUT_PAIRS, stride = (a.fine + 3) / 4 * 4;
    const Scored all = all_of(list);
    int32_t* ids = fine_ids + (int64_t)list * stride;
    const uint8_t* coarse = a.coarse + row * a.coarse_row + head * a.coarse_head;
    const int64_t groups = (a.candidates + SCOUT_PAIRS - 1) / SCOUT_PAIRS, at = (int64_t)list * capacity;
    const float first = (float)(a.block_size - 1);
    signs(row, head, {coarse, a.coarse_code, nullptr, groups, tokens, first, a.candidates}, all.masses, capacity);
    mean_shares(list, row, all);
    mark(row, all, std::min(a.sinks, a.fine));
    const int count = best(all.scores, all.count, a.fine, spare + at, places + at, ids);
    const Scored some = {fine_masses + (int64_t)list * group * stride, all.scores, stride, count, ids};
    signs(row, head, {codes, a.codes_block, ids, count, a.block_size, 0, 0}, some.masses, stride);
    choose(list, row, some);
  }

  void score_range(int64_t item) {
    const int list = (int)(item / ranges), row = list / a.kv_heads, head = list % a.kv_heads;
    const int64_t first = item % ranges * RANGE_BLOCKS;
    const int64_t count = std::min<int64_t>(RANGE_BLOCKS, a.candidates - first);
    const int64_t start = row * a.codes_row + head * a.codes_head + first * a.codes_block;
    const uint8_t* codes = (const uint8_t*)a.codes + start * scout::bytes_of(a.code_dtype);
    float* into = scores + (int64_t)list * capacity + first;
    if (a.fine) return coarse_then_fine(list, row, head, codes);
    if (a.scorer == SCOUT_SIGN)
      signs(row, head, {codes, a.codes_block, nullptr, count, a.block_size, 0, 0}, masses_of(list) + first, capacity);
    else if (a.scorer == SCOUT_MINMAX)
      bounds(row, head, codes, count, into);
    else
      products(row, head, codes, count, into);
    if (unfinished[list].fetch_sub(1, std::memory_order_acq_rel) == 1) choose(list, row, all_of(list));
  }

  Scored all_of(int list) const {
    return {masses_of(list), scores + (int64_t)list * capacity, capacity, a.candidates, nullptr};
  }

  void choose(int list, int row, const Scored& s) {
    float* own_scores = s.scores;
    const int rows = a.scorer == SCOUT_SIGN ? a.query_heads / a.kv_heads : 1;
    const float* found = rows * (int64_t)list * capacity + (a.scorer == SCOUT_SIGN ? masses : scores);
    for (int h = 0; h < rows && a.scores; h++)
      memcpy(a.scores + ((int64_t)list * rows + h) * a.candidates, found + (int64_t)h * capacity,
             sizeof(float) * a.candidates);
    if (a.scorer == SCOUT_SIGN && a.blocks) mean_shares(list, row, s);
    int want = std::min(a.want ? a.want[row] : a.count, a.candidates);
    if (a.scorer == SCOUT_SIGN && a.blocks && a.mass > 0 && a.candidates)
      want = std::min(want, std::max(a.least, needed(row, own_scores, spare + (int64_t)list * capacity)));
    mark(row, s, std::min(a.sinks, want));
    int32_t* ids = a.blocks + list * a.blocks_stride;
    const int64_t own = (int64_t)list * capacity;
    int chosen = best(own_scores, s.count, want, spare + own, places + own, ids);
    for (int i = 0; i < chosen && s.ids; i++) ids[i] = s.ids[ids[i]];
    for (int i = 0; i < a.newest; i++) ids[chosen++] = a.candidates + i;
    a.counts[list] = chosen;
  }

  void work() {
    for (;;) {
      const int64_t item = next.fetch_add(1, std::memory_order_relaxed);
      if (item >= (int64_t)lists * ranges) return;
      score_range(item);
    }
  }
};

struct Kept {
  void* memory = nullptr;
  int64_t bytes = 0;
  ~Kept() { free(memory); }
};
thread_local Kept kept;

}  // namespace

extern "C" SCOUT_EXPORT int scout_select(scout_select_args* args, int threads) {
  Select job(*args);
  job.isa = isa_for(*args);
  if (!job.isa) return SCOUT_UNSUPPORTED;
  job.lists = args->batch * args->kv_heads;
  job.ranges = args->fine ? 1 : std::max(1, (int)((args->candidates + RANGE_BLOCKS - 1) / RANGE_BLOCKS));
  const int round = args->fine ? SCOUT_PAIRS : 4;
  job.capacity = (args->candidates + round - 1) / round * round;
  const int64_t numbers = (int64_t)job.lists * job.capacity;
  const int64_t heads = args->scorer == SCOUT_SIGN ? args->query_heads / args->kv_heads : 0;
  const int64_t fine = (int64_t)job.lists * ((args->fine + 3) / 4 * 4);
  const int64_t need =
      (numbers * (3 + heads) + fine * (heads + 1)) * sizeof(float) + job.lists * sizeof(std::atomic<int32_t>);
  if (need > kept.bytes) {
    free(kept.memory);
    kept.memory = malloc(need);
    kept.bytes = kept.memory ? need : 0;
    if (!kept.memory) return SCOUT_NO_MEMORY;
  }
  job.scores = (float*)kept.memory;
  job.spare = job.scores + numbers;
  job.places = (int32_t*)(job.spare + numbers);
  job.masses = (float*)(job.places + numbers);
  job.fine_masses = job.masses + numbers * heads;
  job.fine_ids = (int32_t*)(job.fine_masses + fine * heads);
  job.unfinished = (std::atomic<int32_t>*)(job.fine_ids + fine);
  for (int list = 0; list < job.lists; list++) new (&job.unfinished[list]) std::atomic<int32_t>(job.ranges);
  const bool large = numbers * args->code * scout::bytes_of(args->code_dtype) >= WORTH_A_TEAM_BYTES;
  scout_team_run([](void* it) { ((Select*)it)->work(); }, &job, large ? threads : 1);
  return SCOUT_OK;
}
