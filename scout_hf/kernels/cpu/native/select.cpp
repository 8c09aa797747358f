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

typedef float vf __attribute__((vector_size(16)));
typedef int32_t vi __attribute__((vector_size(16)));

}  // namespace

#include "logs.inl"

namespace {

constexpr int64_t RANGE_BLOCKS = 2048, WORTH_A_TEAM_BYTES = 64 << 10;
constexpr int HEADS_AT_ONCE = 16, PRODUCTS_AT_ONCE = 1024;

int64_t rounded(int64_t count) { return (count + SCOUT_ROUND - 1) / SCOUT_ROUND * SCOUT_ROUND; }

bool any(const uint8_t* marks, int count) {
  for (int i = 0; i < count; i++)
    if (marks[i]) return true;
  return false;
}

// Ids of the `want` largest scores, ascending; among equal scores the first. -inf is never chosen. May change `scores`,
// whose capacity is rounded up to a multiple of SCOUT_ROUND, as is that of `spare` and `places`.
int best(const scout_isa* isa, float* scores, int count, int want, float* spare, int32_t* places, int32_t* ids) {
  if (want <= 0) return 0;
  const int padded = (int)rounded(count);
  std::fill(scores + count, scores + padded, -INFINITY);
  int bins[SCOUT_BINS] = {}, chosen = 0;
  if (isa->into_bins(scores, padded, places, bins) <= want) {
    for (int i = 0; i < count; i++)
      if (scores[i] > -INFINITY) ids[chosen++] = i;
    return chosen;
  }
  int at = SCOUT_BINS - 1, above = 0, inside = 0;
  while (above + bins[at] < want) above += bins[at--];
  for (int i = 0; i < count; i++) {
    spare[inside] = scores[i];
    inside += places[i] == at;
  }
  const int rank = want - above - 1;
  std::nth_element(spare, spare + rank, spare + inside, [](float a, float b) { return a > b; });
  const float threshold = spare[rank];
  int ties = want - above, equal = 0;
  for (int i = 0; i < inside; i++) ties -= spare[i] > threshold, equal += spare[i] == threshold;
  // Mostly all ties are wanted. Branches would be mispredicted often.
  for (int i = 0; chosen < want && equal == ties; i++) {
    ids[chosen] = i;
    chosen += scores[i] >= threshold;
  }
  for (int i = 0; chosen < want; i++) {
    const bool tie = ties > 0 && scores[i] == threshold;
    ids[chosen] = i;
    chosen += scores[i] > threshold || tie;
    ties -= tie;
  }
  return chosen;
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
      if (a.fine && (!a.blocks || a.mass > 0 || a.fine < 1 || a.fine > a.candidates || a.coarse_dim < 8 ||
                     a.coarse_dim % 8 || a.coarse_dim > a.head_dim || a.coarse_dim > SCOUT_MAX_COARSE_DIM))
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
  float* fine_masses;                // [lists][group][fine], rounded up to a multiple of SCOUT_ROUND
  int32_t* fine_ids;                 // [lists][fine], as well
  float* totals;                     // [lists][group]
  int capacity;                      // candidates, rounded up to a multiple of SCOUT_ROUND
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

  // Codes of some blocks, or of those of `ids`.
  scout_coded coded(const uint8_t* codes, int64_t blocks, const int32_t* ids = nullptr) const {
    return {codes, a.codes_block, ids, blocks, a.block_size, (int64_t)a.block_size * (a.head_dim / 8)};
  }

  // By `scores`, with the first D dimensions of the query.
  void signs(int row, int head, const scout_coded& coded, int D, decltype(scout_sign_scores)* scores, float* into,
             int64_t stride) const {
    const int group = a.query_heads / a.kv_heads;
    float query[HEADS_AT_ONCE * SCOUT_MAX_HEAD_DIM];
    for (int g0 = 0; g0 < group; g0 += HEADS_AT_ONCE) {
      const int heads = std::min(HEADS_AT_ONCE, group - g0);
      for (int g = 0; g < heads; g++) {
        const int64_t from = row * a.query_row + (head * group + g0 + g) * a.query_head;
        scout::read_numbers(a.query, from, D, a.query_dtype, query + g * D);
      }
      scores(isa, coded, D, query, heads, into + g0 * stride, stride);
    }
  }

  // Some candidates, all or those of `ids`, which ascend.
  struct Scored {
    float *masses, *scores;  // [group][stride] and [stride]; the stride is a multiple of SCOUT_ROUND
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

  // Blocks of only padding have no share.
  void mean_shares(int list, int row, const Scored& s) const {
    const int group = a.query_heads / a.kv_heads;
    for (int h = 0; h < group; h++) {
      float* mass = s.masses + (int64_t)h * s.stride;
      std::fill(mass + s.count, mass + s.stride, -INFINITY);
      for (int i = 0; i < s.count && a.padding_mask; i++)
        if (!is_real(row, s.block(i))) mass[i] = -INFINITY;
    }
    scout_shares part = {s.masses, s.stride, group, s.stride, nullptr, totals + (int64_t)list * group, s.scores};
    if (a.recent) part.recent = a.recent + row * a.query_heads + list % a.kv_heads * group;
    isa->shares(&part);
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
      vf some;
      memcpy(&some, shares + i, sizeof some);
      some = exp2_of(some);
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

  // Chooses among the blocks whose best token has the largest share by the first dimensions of the codes.
  void coarse_then_fine(int list, int row, int head, const uint8_t* codes) {
    const int group = a.query_heads / a.kv_heads, stride = (int)rounded(a.fine);
    const int64_t at = (int64_t)list * capacity;
    const Scored all = all_of(list);
    int32_t* ids = fine_ids + (int64_t)list * stride;
    signs(row, head, coded(codes, a.candidates), a.coarse_dim, scout_sign_peaks, all.masses, capacity);
    mean_shares(list, row, all);
    mark(row, all, std::min(a.sinks, a.fine));
    const int count = best(isa, all.scores, all.count, a.fine, spare + at, places + at, ids);
    const Scored some = {fine_masses + (int64_t)list * group * stride, all.scores, stride, count, ids};
    signs(row, head, coded(codes, count, ids), a.head_dim, scout_sign_scores, some.masses, stride);
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
      signs(row, head, coded(codes, count), a.head_dim, scout_sign_scores, masses_of(list) + first, capacity);
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
    int chosen = best(isa, own_scores, s.count, want, spare + own, places + own, ids);
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
  job.capacity = (int)rounded(args->candidates);
  const int64_t numbers = (int64_t)job.lists * job.capacity;
  const int64_t heads = args->scorer == SCOUT_SIGN ? args->query_heads / args->kv_heads : 0;
  const int64_t fine = job.lists * rounded(args->fine), words = numbers * (3 + heads) + fine * (heads + 1);
  const int64_t need = (words + job.lists * heads) * sizeof(float) + job.lists * sizeof(std::atomic<int32_t>);
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
  job.totals = (float*)(job.fine_ids + fine);
  job.unfinished = (std::atomic<int32_t>*)(job.totals + job.lists * heads);
  for (int list = 0; list < job.lists; list++) new (&job.unfinished[list]) std::atomic<int32_t>(job.ranges);
  const bool large = numbers * args->code * scout::bytes_of(args->code_dtype) >= WORTH_A_TEAM_BYTES;
  scout_team_run([](void* it) { ((Select*)it)->work(); }, &job, large ? threads : 1);
  return SCOUT_OK;
}
