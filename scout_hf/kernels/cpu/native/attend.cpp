// Attention over listed tiles, in chunks of fixed size, so that results do not depend on the number of threads.
#include <math.h>
#include <sched.h>
#include <stdlib.h>

#include <atomic>
#include <memory>
#include <new>

#include "isa.h"
#include "numbers.h"
#include "pool.h"
#include "scout_cpu.h"
#include "team.h"

namespace {

constexpr int CHUNK_TOKENS = 1024, MAX_CHUNK_BLOCKS = 256;
constexpr int64_t WORTH_A_TEAM_BYTES = 64 << 10;

// Scratch memory of calls, one per thread.
struct Kept {
  void* memory = nullptr;
  int64_t bytes = 0;
  ~Kept() { free(memory); }
  // NULL if memory is short.
  void* at_least(int64_t need) {
    if (need > bytes) {
      free(memory);
      memory = malloc(need);
      bytes = memory ? need : 0;
    }
    return memory;
  }
};
thread_local Kept kept, kept_queries;

struct Attend {
  scout_attend_args a;
  const scout_isa* isa = nullptr;
  // Queries of all query heads of a KV head, `all_group`, go in strips of `group`; every strip is a list of its own.
  int lists, queries, all_group, group, strips, chunk_blocks, threads = 1;
  int64_t tile_bytes, tail_tile_bytes, end, blocks, items = 0, stride;
  bool has_tail;
  int64_t* first_item = nullptr;             // [lists + 1]
  std::atomic<int32_t>* unfinished = nullptr;  // [lists]
  float* partials = nullptr;                 // [items][group][head_dim + 2]
  void* memory = nullptr;
  int64_t memory_bytes = 0;
  std::atomic<int64_t> next{0}, attended{0};
  std::atomic<int> status{SCOUT_OK};

  // A work item: entries [first, last) of one list.
  struct Piece {
    int list, row, head, first_query, queries;
    int64_t first, last;
    bool tail;
  };

  int64_t entries(int list) const {
    if (!a.blocks) return blocks;
    return a.counts ? a.counts[list / strips] : a.count;
  }

  int64_t block_at(int list, int64_t entry) const {
    return a.blocks ? a.blocks[list / strips * a.blocks_stride + entry] : entry;
  }

  // int8 pages hold only whole blocks; the partly filled last block is a separate unpacked tile.
  bool ends_in_tail(int list, int64_t count) const {
    return has_tail && count && block_at(list, count - 1) == a.store.length / a.store.block_size;
  }

  const uint8_t* tile(int row, int head, int64_t block) const {
    return (const uint8_t*)a.store.pages[row * a.store.pages_stride + block] + head * tile_bytes;
  }

  const uint8_t* tail_tile(int row, int head) const {
    return (const uint8_t*)a.store.tail + ((int64_t)row * a.store.kv_heads + head) * tail_tile_bytes;
  }

  int prepare() {
    const scout_store& s = a.store;
    if (s.kv_heads < 1 || a.query_heads % s.kv_heads || s.block_size < 4 || s.block_size > SCOUT_MAX_BLOCK ||
        s.block_size % 4 || s.head_dim < 1 || s.head_dim > SCOUT_MAX_HEAD_DIM)
      return SCOUT_UNSUPPORTED;
    isa = scout_isa_for(s.head_dim, s.dtype == SCOUT_I8 ? s.block_size : 0);
    if (!isa) return SCOUT_UNSUPPORTED;
    queries = a.queries > 1 ? a.queries : 1;
    all_group = a.query_heads / s.kv_heads * queries;
    strips = (all_group + SCOUT_MANY - 1) / SCOUT_MANY;
    group = strips > 1 ? SCOUT_MANY : all_group;
    lists = s.batch * s.kv_heads * strips;
    // A chunk's result is small beside what is read for it.
    chunk_blocks = (group > CHUNK_TOKENS / 16 ? 16 * group : CHUNK_TOKENS) / s.block_size;
    if (chunk_blocks > MAX_CHUNK_BLOCKS) chunk_blocks = MAX_CHUNK_BLOCKS;
    tile_bytes = scout_tile_bytes(s.dtype, s.block_size, s.head_dim);
    tail_tile_bytes = scout_tile_bytes(s.plain_dtype, s.block_size, s.head_dim);
    end = a.end > 0 && a.end < s.length ? a.end : s.length;
    blocks = (end + s.block_size - 1) / s.block_size;
    has_tail = s.dtype == SCOUT_I8 && s.length % s.block_size;
    stride = (int64_t)group * (s.head_dim + 2);
    return SCOUT_OK;
  }

  // Not part of prepare(): a device may write the lists until the job starts.
  int plan() {
    int64_t listed = 0;
    for (int list = 0; list < lists; list++) {
      const int64_t count = entries(list), tail = ends_in_tail(list, count);
      items += (count - tail + chunk_blocks - 1) / chunk_blocks + tail + (count == 0);
      listed += count;
    }
    if (listed * tile_bytes < WORTH_A_TEAM_BYTES) threads = 1;
    if (threads > items) threads = (int)items;
    const int64_t heads = (lists + 1) * (int64_t)sizeof(int64_t), marks = lists * (int64_t)sizeof(std::atomic<int32_t>);
    const int64_t need = heads + (marks + 7) / 8 * 8 + items * stride * (int64_t)sizeof(float);
    if (need > memory_bytes) {
      free(memory);
      memory = malloc(need);
      memory_bytes = memory ? need : 0;
      if (!memory) return SCOUT_NO_MEMORY;
    }
    first_item = (int64_t*)memory;
    unfinished = (std::atomic<int32_t>*)(first_item + lists + 1);
    partials = (float*)((char*)unfinished + (marks + 7) / 8 * 8);
    int64_t at = 0;
    for (int list = 0; list < lists; list++) {
      const int64_t count = entries(list), tail = ends_in_tail(list, count);
      const int64_t own = (count - tail + chunk_blocks - 1) / chunk_blocks + tail + (count == 0);
      first_item[list] = at;
      new (&unfinished[list]) std::atomic<int32_t>((int32_t)own);
      at += own;
    }
    first_item[lists] = at;
    return SCOUT_OK;
  }

  Piece piece(int64_t item) const {
    int low = 0, high = lists;
    while (high - low > 1) {
      const int middle = (low + high) / 2;
      (first_item[middle] <= item ? low : high) = middle;
    }
    const int64_t count = entries(low), chunk = item - first_item[low];
    const bool tail = ends_in_tail(low, count);
    const int64_t whole = count - tail, first = chunk * chunk_blocks;
    const int of = low / strips, from = low % strips * group;
    Piece p{low,  of / a.store.kv_heads, of % a.store.kv_heads, from, all_group - from < group ? all_group - from : group,
            first, first + chunk_blocks, false};
    if (p.last > whole) p.last = whole;
    if (tail && first >= whole) p.first = whole, p.last = count, p.tail = true;
    return p;
  }

  const uint8_t* tile_of_item(int64_t item, int64_t* bytes) const {
    *bytes = 0;
    if (item >= items) return nullptr;
    const Piece p = piece(item);
    if (p.first >= p.last) return nullptr;
    *bytes = p.tail ? tail_tile_bytes : tile_bytes;
    if (p.tail) return tail_tile(p.row, p.head);
    const int64_t block = block_at(p.list, p.first);
    return block >= 0 && block < blocks ? tile(p.row, p.head, block) : nullptr;
  }

  void attend_piece(int64_t item) {
    const scout_store& s = a.store;
    const Piece p = piece(item);
    const uint8_t *tiles[MAX_CHUNK_BLOCKS], *padding_mask[MAX_CHUNK_BLOCKS];
    int count = 0, last_tokens = s.block_size;
    int64_t tokens_in_all = 0;
    bool marked = false;
    for (int64_t entry = p.first; entry < p.last; entry++) {
      const int64_t block = block_at(p.list, entry);
      const int64_t left = end - block * s.block_size;
      if (block < 0 || left <= 0) {
        status.store(SCOUT_BAD_BLOCK, std::memory_order_relaxed);
        continue;
      }
      const int tokens = left < s.block_size ? (int)left : s.block_size;
      int here = tokens;
      const uint8_t* marks = nullptr;
      if (a.padding_mask) {
        marks = a.padding_mask + p.row * a.padding_mask_stride + block * s.block_size;
        here = 0;
        for (int t = 0; t < tokens; t++) here += marks[t] != 0;
        if (!here) continue;
        if (here == tokens) marks = nullptr;
      }
      tiles[count] = p.tail ? tail_tile(p.row, p.head) : tile(p.row, p.head, block);
      padding_mask[count] = marks;
      marked |= marks != nullptr;
      tokens_in_all += here;
      last_tokens = tokens;
      count++;
    }
    if (!p.first_query) attended.fetch_add(tokens_in_all, std::memory_order_relaxed);
    scout_chunk c;
    c.tiles = tiles;
    c.padding_mask = marked ? padding_mask : nullptr;
    c.after = tile_of_item(item + 1, &c.after_bytes);
    c.tile_bytes = p.tail ? tail_tile_bytes : tile_bytes;
    c.count = count;
    c.last_tokens = last_tokens;
    c.block_size = s.block_size;
    c.head_dim = s.head_dim;
    c.dtype = p.tail ? s.plain_dtype : s.dtype;
    c.scale = a.scale;
    c.softcap = a.softcap;
    float* partial = partials + item * stride;
    float* query = (float*)kept_queries.at_least(group * s.head_dim * (int64_t)(sizeof(float) + sizeof(uint16_t)));
    if (!query) {
      status.store(SCOUT_NO_MEMORY, std::memory_order_relaxed);
      return;
    }
    uint16_t* raw = (uint16_t*)(query + group * s.head_dim);
    for (int g = 0; g < p.queries; g++) {
      const int64_t head = query_head(p, g), from = p.row * a.query_row + head * a.query_head + token(p, g) * a.query_token;
      scout::read_numbers(a.query, from, s.head_dim, a.query_dtype, query + g * s.head_dim);
      if (a.query_dtype == SCOUT_BF16)
        memcpy(raw + g * s.head_dim, (const uint16_t*)a.query + from, s.head_dim * sizeof(uint16_t));
    }
    c.group = p.queries;
    c.query = query;
    c.query_bf16 = a.query_dtype == SCOUT_BF16 ? raw : nullptr;
    c.out = partial;
    c.max = partial + (int64_t)group * s.head_dim;
    c.sum = c.max + group;
    // The other path reads packed tiles only whole.
    const bool many =
        (queries > 1 && all_group >= SCOUT_SEVERAL) || (c.dtype == SCOUT_I8 && last_tokens < s.block_size);
    (many ? isa->attend_many : isa->attend)(&c);
    if (unfinished[p.list].fetch_sub(1, std::memory_order_acq_rel) == 1) merge(p);
  }

  // Of query g of a piece.
  int64_t query_head(const Piece& p, int g) const {
    return p.head * (all_group / queries) + (p.first_query + g) / queries;
  }
  int64_t token(const Piece& p, int g) const { return (p.first_query + g) % queries; }

  // Run by the thread that finishes the list's last item; merges in list order, so that results are deterministic.
  void merge(const Piece& p) {
    const int D = a.store.head_dim;
    const int64_t first = first_item[p.list], last = first_item[p.list + 1];
    float acc[SCOUT_MAX_HEAD_DIM];
    for (int g = 0; g < p.queries; g++) {
      float e_max = -INFINITY, e_sum = 0.0f;
      for (int64_t i = first; i < last; i++) {
        const float max = partials[i * stride + group * D + g];
        e_max = max > e_max ? max : e_max;
      }
      memset(acc, 0, sizeof(float) * D);
      for (int64_t i = first; i < last; i++) {
        const float *partial = partials + i * stride, max = partial[group * D + g], sum = partial[group * D + group + g];
        const float factor = max == e_max ? 1.0f : expf(max - e_max);
        e_sum += sum * factor;
        for (int d = 0; d < D; d++) acc[d] += partial[g * D + d] * factor;
      }
      const bool empty = e_max == -INFINITY && !(e_sum != e_sum);
      const float scale = empty ? 0.0f : 1.0f / e_sum;
      for (int d = 0; d < D; d++) acc[d] *= scale;
      const int64_t which = (p.row * (int64_t)a.query_heads + query_head(p, g)) * queries + token(p, g);
      scout::write_numbers(acc, D, a.out_dtype, a.out, which * D);
      if (a.lse) a.lse[which] = empty ? -INFINITY : e_max + logf(e_sum);
    }
  }

  void work() {
    for (;;) {
      const int64_t item = next.fetch_add(1, std::memory_order_relaxed);
      if (item >= items) return;
      attend_piece(item);
    }
  }

  int64_t read_all() {
    int64_t sum = 0;
    for (;;) {
      const int64_t item = next.fetch_add(1, std::memory_order_relaxed);
      if (item >= items) return sum;
      const Piece p = piece(item);
      for (int64_t entry = p.first; entry < p.last; entry++) {
        int64_t bytes;
        const uint8_t* after = entry + 1 < p.last ? tile(p.row, p.head, block_at(p.list, entry + 1))
                                                  : tile_of_item(item + 1, &bytes);
        if (p.tail) continue;
        sum += isa->read(tile(p.row, p.head, block_at(p.list, entry)), tile_bytes, after);
      }
    }
  }
};

template <class Body>
int with_plan(const scout_attend_args* args, int threads, Body body) {
  Attend job;
  job.a = *args;
  job.threads = threads;
  int status = job.prepare();
  if (status != SCOUT_OK) return status;
  job.memory = kept.memory, job.memory_bytes = kept.bytes;
  status = job.plan();
  kept.memory = job.memory, kept.bytes = job.memory_bytes;
  if (status != SCOUT_OK) return status;
  body(job);
  return job.status.load();
}

// -- jobs of the pool ----------------------------------------------------------------------------------------------

struct Submitted {
  Attend job;
  scout_attend_args* origin;
  scout_step_job* step = nullptr;  // that `origin` is part of
  bool counted = false;
  std::atomic<int> stage{0};  // 0 untouched, 1 being planned, 2 ready, 3 failed
};

void run_submitted(void* context) {
  Submitted& submitted = *(Submitted*)context;
  int untouched = 0;
  if (submitted.stage.compare_exchange_strong(untouched, 1, std::memory_order_acq_rel)) {
    const int status = submitted.job.plan();
    if (status != SCOUT_OK) submitted.job.status.store(status);
    submitted.stage.store(status == SCOUT_OK ? 2 : 3, std::memory_order_release);
  }
  int stage;
  while ((stage = submitted.stage.load(std::memory_order_acquire)) == 1) sched_yield();
  if (stage == 2) submitted.job.work();
}

void add(int64_t* sum, int64_t number) { __atomic_fetch_add(sum, number, __ATOMIC_RELAXED); }

// Adds up what a job of a step has done; lists and counts stay as they are until its `done` is set.
void count_in(scout_step_job* step, const Attend& job) {
  const int lists = job.a.store.batch * job.a.store.kv_heads;
  int64_t listed = 0, chosen = 0;
  for (int list = 0; list < lists; list++) {
    listed += job.entries(list * job.strips);
    if (step->chosen) chosen += step->chosen[list];
  }
  add(&step->tokens, job.attended.load());
  add(&step->listed_blocks, listed);
  add(&step->chosen_blocks, chosen);
}

void finish_submitted(void* context) {
  Submitted* submitted = (Submitted*)context;
  const int status = submitted->job.status.load();
  submitted->origin->attended = submitted->job.attended.load();
  submitted->origin->status = status;
  if (submitted->step && submitted->stage.load()) {
    if (submitted->counted && status == SCOUT_OK) count_in(submitted->step, submitted->job);
    if (status != SCOUT_OK && submitted->step->trouble)
      __atomic_store_n(submitted->step->trouble, (int64_t)status, __ATOMIC_RELAXED);
  }
  // Release: a device may poll `done`, then read the results.
  if (submitted->job.a.done) __atomic_store_n(submitted->job.a.done, submitted->job.a.number, __ATOMIC_RELEASE);
  free(submitted->job.memory);
  delete submitted;
}

}  // namespace

extern "C" {

SCOUT_EXPORT int scout_attend(scout_attend_args* args, int threads) {
  return args->status = with_plan(args, threads, [&](Attend& job) {
           scout_team_run([](void* it) { ((Attend*)it)->work(); }, &job, job.threads);
           args->attended = job.attended.load();
         });
}

SCOUT_EXPORT int64_t scout_submit_attend(scout_pool* pool, scout_attend_args* args, const volatile uint64_t* flag,
                                         uint64_t value) {
  Submitted* submitted = new (std::nothrow) Submitted;
  if (!submitted) return SCOUT_NO_MEMORY;
  submitted->job.a = *args;
  submitted->origin = args;
  const int status = args->status = submitted->job.prepare();
  if (status != SCOUT_OK) {
    delete submitted;
    return status;
  }
  const int64_t ticket = scout_pool_post(pool, run_submitted, finish_submitted, submitted, flag, value);
  if (ticket < 0) delete submitted;
  return ticket;
}

SCOUT_EXPORT int64_t scout_submit_step(scout_pool* pool, scout_step_job* const* jobs, int64_t count) {
  std::unique_ptr<std::unique_ptr<Submitted>[]> made(new (std::nothrow) std::unique_ptr<Submitted>[count]);
  std::unique_ptr<scout_pool_job[]> posts(new (std::nothrow) scout_pool_job[count]);
  if (!made || !posts) return SCOUT_NO_MEMORY;
  for (int64_t i = 0; i < count; i++) {
    made[i].reset(new (std::nothrow) Submitted);
    if (!made[i]) return SCOUT_NO_MEMORY;
    Submitted& one = *made[i];
    one.job.a = jobs[i]->attend;
    one.job.a.number++;
    one.origin = &jobs[i]->attend;
    one.step = jobs[i];
    one.counted = jobs[i]->counted != 0;
    const int status = one.job.prepare();
    if (status != SCOUT_OK) return status;
    posts[i] = {run_submitted, finish_submitted, &one, jobs[i]->flag, one.job.a.number};
  }
  const int64_t last = scout_pool_post_all(pool, posts.get(), count);
  if (last < 0) return last;
  for (int64_t i = 0; i < count; i++) {
    made[i].release();  // finish_submitted deletes it, and may have done so
    jobs[i]->attend.number++;
    jobs[i]->ticket = last - count + 1 + i;
  }
  return last;
}

SCOUT_EXPORT int64_t scout_read_tiles(const scout_attend_args* args, int threads) {
  int64_t sum = 0;
  (void)threads;
  with_plan(args, 1, [&](Attend& job) { sum = job.read_all(); });
  return sum;
}

SCOUT_EXPORT int64_t scout_read_span(const void* start, int64_t bytes, int threads) {
  (void)threads;
  return scout_isa_for(64, 0)->read((const uint8_t*)start, bytes, (const uint8_t*)start + 2048);
}

}  // extern "C"
