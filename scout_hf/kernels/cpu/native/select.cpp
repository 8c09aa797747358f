// The blocks that a step attends to: digest scores, then the best of them in ascending order.
#include <math.h>
#include <stdlib.h>

#include <algorithm>
#include <atomic>
#include <new>

#include "isa.h"
#include "numbers.h"
#include "scout_cpu.h"
#include "team.h"

namespace {

constexpr int64_t RANGE_BLOCKS = 2048, WORTH_A_TEAM_BYTES = 64 << 10;
constexpr int BINS = 1024;

bool any(const uint8_t* marks, int count) {
  for (int i = 0; i < count; i++)
    if (marks[i]) return true;
  return false;
}

// Ids of the `want` largest scores, ascending; of equal ones the first. -inf is never chosen. `spare` holds `count`.
int best(const float* scores, int count, int want, float* spare, int32_t* ids) {
  int usable = 0;
  float low = INFINITY, high = -INFINITY;
  for (int i = 0; i < count; i++) {
    const float s = scores[i];
    usable += s > -INFINITY;
    low = s < low && s > -INFINITY ? s : low;
    high = s > high && s < INFINITY ? s : high;
  }
  float threshold = -INFINITY;
  int ties = 0;
  if (usable > want && want > 0) {
    int bins[BINS + 1] = {};
    float scale = high > low ? (BINS - 1) / (high - low) : 0.0f;
    if (!(scale < INFINITY)) scale = 0.0f;  // all but equal: one bin for all
    auto bin = [&](float s) { return s == INFINITY ? BINS : (int)((s - low) * scale); };
    for (int i = 0; i < count; i++)
      if (scores[i] > -INFINITY) bins[bin(scores[i])]++;
    int at = BINS, above = 0;
    while (above + bins[at] < want) above += bins[at--];
    int inside = 0;
    for (int i = 0; i < count; i++)
      if (scores[i] > -INFINITY && bin(scores[i]) == at) spare[inside++] = scores[i];
    const int rank = want - above - 1;
    std::nth_element(spare, spare + rank, spare + inside, [](float a, float b) { return a > b; });
    threshold = spare[rank];
    ties = want - above;
    for (int i = 0; i < inside; i++) ties -= spare[i] > threshold;
  }
  int chosen = 0;
  for (int i = 0; i < count && chosen < want; i++) {
    if (scores[i] > threshold)
      ids[chosen++] = i;
    else if (ties > 0 && scores[i] == threshold)
      ids[chosen++] = i, ties--;
  }
  return chosen;
}

struct Select {
  const scout_select_args& a;
  const scout_isa* isa;
  int lists, ranges;
  float* spare;                      // [lists][candidates]
  std::atomic<int32_t>* unfinished;  // [lists]
  std::atomic<int64_t> next{0};

  explicit Select(const scout_select_args& args) : a(args) {}

  const uint8_t* marks(int row, int64_t block) const {
    return a.exists ? a.exists + row * a.exists_stride + block * a.block_size : nullptr;
  }

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

  void score_range(int64_t item) {
    const int list = (int)(item / ranges), row = list / a.kv_heads, head = list % a.kv_heads;
    const int64_t first = item % ranges * RANGE_BLOCKS;
    const int64_t count = std::min<int64_t>(RANGE_BLOCKS, a.candidates - first);
    alignas(64) float w[2 * SCOUT_MAX_HEAD_DIM];
    weights(row, head, w);
    const int64_t row_bytes = (int64_t)a.code * scout::bytes_of(a.code_dtype);
    const int64_t start = row * a.codes_row + head * a.codes_head;
    const uint8_t* codes = (const uint8_t*)a.codes + start * scout::bytes_of(a.code_dtype) + first * row_bytes;
    float* scores = a.scores + (int64_t)list * a.candidates;
    isa->dots(codes, a.code_dtype, count, a.code, w, scores + first);
    if (unfinished[list].fetch_sub(1, std::memory_order_acq_rel) == 1) choose(list, row);
  }

  void choose(int list, int row) {
    float* scores = a.scores + (int64_t)list * a.candidates;
    const int want = std::min(a.want ? a.want[row] : a.count, a.candidates);
    int sinks = std::min(a.sinks, want);
    for (int i = 0; i < a.candidates; i++) {
      // Garbage in the keys must not hide in a block that is never read.
      if (scores[i] != scores[i]) scores[i] = 3.0e38f;
      if (a.exists && !any(marks(row, i), a.block_size))
        scores[i] = -INFINITY;
      else if (sinks > 0)
        scores[i] = INFINITY, sinks--;
    }
    int32_t* ids = a.blocks + list * a.blocks_stride;
    int chosen = best(scores, a.candidates, want, spare + (int64_t)list * a.candidates, ids);
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
  if (args->kv_heads < 1 || args->query_heads % args->kv_heads || args->code != 2 * args->head_dim ||
      args->head_dim > SCOUT_MAX_HEAD_DIM || args->code_dtype == SCOUT_I8)
    return SCOUT_UNSUPPORTED;
  job.isa = scout_isa_for(args->code, 0);
  if (!job.isa) return SCOUT_UNSUPPORTED;
  job.lists = args->batch * args->kv_heads;
  job.ranges = std::max(1, (int)((args->candidates + RANGE_BLOCKS - 1) / RANGE_BLOCKS));
  const int64_t numbers = (int64_t)job.lists * args->candidates;
  const int64_t need = numbers * sizeof(float) + job.lists * sizeof(std::atomic<int32_t>);
  if (need > kept.bytes) {
    free(kept.memory);
    kept.memory = malloc(need);
    kept.bytes = kept.memory ? need : 0;
    if (!kept.memory) return SCOUT_NO_MEMORY;
  }
  job.spare = (float*)kept.memory;
  job.unfinished = (std::atomic<int32_t>*)(job.spare + numbers);
  for (int list = 0; list < job.lists; list++) new (&job.unfinished[list]) std::atomic<int32_t>(job.ranges);
  const bool large = numbers * args->code * scout::bytes_of(args->code_dtype) >= WORTH_A_TEAM_BYTES;
  scout_team_run([](void* it) { ((Select*)it)->work(); }, &job, large ? threads : 1);
  return SCOUT_OK;
}
