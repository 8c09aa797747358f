// The native CPU library against plain code in double precision, for every instruction set of this machine, on a
// pseudo-random sample of cases: attention, selection, and tokens into and out of pages.
//
//   grid [--cases N] [--full] [--seed S] [--isa NAME] [--part NAME [--case NUMBER]]
//
// Ends with status 0 and a table of the largest errors, or with status 1 and a line for each of the first failures.
// Those name the part and the number of the case, to be run alone.
// tests/native/build.py compiles it. Buffers are exactly as large as scout_cpu.h says, for AddressSanitizer.
//
// How exact results must be. Attention in float: 2e-6 of max(1, |x|), where up to 8e-7 is found. That leaves room for
// scores of ordinary size only: a score near 200 is itself known to 1e-5, so where scores are large the bound grows
// with them (score_error).
// int8 is compared with attention over the numbers that its pages stand for; see World::loosen for its bound.
#include <math.h>
#include <signal.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <algorithm>
#include <initializer_list>
#include <map>
#include <string>
#include <thread>
#include <vector>

#if !defined(GRID_STATIC)
#include <dlfcn.h>
#endif

#include "pool.h"
#include "scout_cpu.h"

extern "C" int64_t scout_submit_attend(scout_pool* pool, scout_attend_args* args, const volatile uint64_t* flag,
                                       uint64_t value);

namespace {

const double EXACT = 2e-6;  // of attention in float
const int SCOUT_I4_CODES = -4;  // of check_dots: codes for DOTS4
const char* const DTYPES[] = {"f32", "f16", "bf16", "int8"};

// -- reports ---------------------------------------------------------------------------------------------------------

int failures = 0;
std::string running;  // the part and the number of the case

#if defined(__GNUC__)
__attribute__((format(printf, 1, 2)))
#endif
void fail(const char* format, ...) {
  if (++failures > 20) return;
  va_list rest;
  va_start(rest, format);
  printf("FAILED %s: %s: ", running.c_str(), scout_isa_name(scout_current_isa()));
  vprintf(format, rest);
  printf("\n");
  fflush(stdout);
  va_end(rest);
}

// A sanitizer says more.
#if !defined(__SANITIZE_ADDRESS__) && !defined(__SANITIZE_THREAD__) && !defined(__clang__)
#define GRID_CATCHES_CRASHES
void crashed(int number) {
  fail("signal %d", number);
  _Exit(1);
}
#endif

struct Worst {
  // Of ordinary cases, of those with a soft cap, and of those with large scores.
  double out[3] = {}, lse[3] = {}, of_bound = 0, unquantised = 0;
};
std::map<std::string, Worst> table;  // by instruction set and path

void keep(double& most, double error) { most = error > most ? error : most; }

// -- numbers ---------------------------------------------------------------------------------------------------------

struct Random {
  uint64_t state;
  uint64_t next() {
    uint64_t z = state += 0x9e3779b97f4a7c15;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9;
    z = (z ^ (z >> 27)) * 0x94d049bb133111eb;
    return z ^ (z >> 31);
  }
  int64_t below(int64_t n) { return (int64_t)(next() % (uint64_t)n); }
  bool chance(int percent) { return below(100) < percent; }
  double uniform() { return ((double)(next() >> 11) + 0.5) / 9007199254740992.0; }
  double normal() { return sqrt(-2 * log(uniform())) * cos(6.283185307179586 * uniform()); }
  template <class T>
  T pick(const std::vector<T>& from) {
    return from[(size_t)below((int64_t)from.size())];
  }
};

int bytes_of(int dtype) { return dtype == SCOUT_F32 ? 4 : dtype == SCOUT_I8 ? 1 : 2; }

// The number of a type that is nearest to x, of two the even one.
double rounded(int dtype, double x) {
  if (dtype == SCOUT_F32) return (double)(float)x;
  if (!(fabs(x) < INFINITY) || x == 0) return x;
  int exponent;
  frexp(x, &exponent);
  const int ulp = dtype == SCOUT_F16 ? std::max(exponent - 11, -24) : std::max(exponent - 8, -133);
  const double near = ldexp(nearbyint(ldexp(x, -ulp)), ulp);
  return fabs(near) < (dtype == SCOUT_F16 ? 65520.0 : 0x1p128) ? near : copysign(INFINITY, x);
}

// `x` must be a number of the type.
void put(int dtype, void* to, int64_t index, double x) {
  const float single = (float)x;
  if (dtype == SCOUT_F32) {
    ((float*)to)[index] = single;
    return;
  }
  uint32_t bits;
  memcpy(&bits, &single, 4);
  uint16_t& half = ((uint16_t*)to)[index];
  if (dtype == SCOUT_BF16)
    half = (uint16_t)(bits >> 16);
  else if (x != x)
    half = 0x7e00;
  else if (fabs(x) < 0x1p-14)
    half = (uint16_t)((bits >> 16 & 0x8000) | (int)(fabs(x) * 0x1p24));
  else if (fabs(x) > 65504)
    half = (uint16_t)((bits >> 16 & 0x8000) | 0x7c00);
  else
    half = (uint16_t)((bits >> 16 & 0x8000) | ((bits & 0x7fffffff) - (112u << 23)) >> 13);
}

double get(int dtype, const void* from, int64_t index) {
  if (dtype == SCOUT_F32) return ((const float*)from)[index];
  const uint16_t half = ((const uint16_t*)from)[index];
  if (dtype == SCOUT_BF16) {
    const uint32_t bits = (uint32_t)half << 16;
    float single;
    memcpy(&single, &bits, 4);
    return single;
  }
  const int exponent = half >> 10 & 31, mantissa = half & 1023;
  const double size = exponent == 31  ? (mantissa ? NAN : INFINITY)
                      : exponent == 0 ? mantissa * 0x1p-24
                                      : ldexp(1024 + mantissa, exponent - 25);
  return half & 0x8000 ? -size : size;
}

// Whether a result is what some number within `tolerance` of `want` rounds to.
bool close_to(int dtype, double got, double want, double tolerance) {
  if (want != want) return got != got;
  if (got == want) return true;
  return rounded(dtype, want - tolerance) <= got && got <= rounded(dtype, want + tolerance);
}

// Memory of just that size, all ones: NaN in every type, and no block number.
struct Bytes {
  uint8_t* at = nullptr;
  size_t size = 0;
  Bytes() {}
  explicit Bytes(int64_t wanted) : size((size_t)std::max<int64_t>(wanted, 0)) {
    at = (uint8_t*)malloc(size);
    if (size) memset(at, 0xff, size);
  }
  Bytes(Bytes&& other) : at(other.at), size(other.size) { other.at = nullptr; }
  Bytes& operator=(Bytes&& other) {
    std::swap(at, other.at);
    std::swap(size, other.size);
    return *this;
  }
  ~Bytes() { free(at); }
  template <class T>
  T* as() const {
    return (T*)at;
  }
  Bytes copy() const {
    Bytes other((int64_t)size);
    if (size) memcpy(other.at, at, size);
    return other;
  }
  bool operator==(const Bytes& other) const { return size == other.size && (!size || !memcmp(at, other.at, size)); }
};

// -- threads ---------------------------------------------------------------------------------------------------------

typedef void (*Team)(void (*)(void*), void*, unsigned, unsigned);

void own_team(void (*work)(void*), void* context, unsigned threads, unsigned) {
  std::vector<std::thread> others;
  for (unsigned i = 1; i < threads; i++) others.emplace_back(work, context);
  work(context);
  for (std::thread& other : others) other.join();
}

// The team that torch brings along. Not under ThreadSanitizer, which does not see how its threads wait for each other.
Team openmp_team() {
#if !defined(GRID_STATIC) && !defined(__SANITIZE_THREAD__)
  if (void* library = dlopen("libgomp.so.1", RTLD_NOW)) return (Team)dlsym(library, "GOMP_parallel");
#endif
  return nullptr;
}
Team openmp = nullptr;

// 2 threads are OpenMP's where there is any, 3 are std::thread's.
void use_team(int threads) { scout_set_team((void*)(threads == 2 && openmp ? openmp : own_team)); }

// -- a case of attention ---------------------------------------------------------------------------------------------

enum Lists { EVERYTHING, SAME_COUNT, RAGGED };
enum Marks { NO_MARKS, ALL_EXIST, LEFT_PADDING, HOLES, BLOCKS_GONE, ROW_GONE };
// LARGE: scores around 200. EQUAL: all keys are the same, and the first query is zero. VARIED: blocks of keys and the
// values of tokens differ by orders of magnitude.
enum Size { ORDINARY, LARGE, EQUAL, TINY, HUGE_VALUES, VARIED };

struct Case {
  int block = 32, dtype = SCOUT_BF16, plain = SCOUT_BF16, query_dtype = SCOUT_BF16, out_dtype = SCOUT_F32;
  int group = 4, dim = 128, kv_heads = 2, batch = 2, length = 300;
  int queries = 1, end = 0;  // as in the interface
  Lists lists = RAGGED;
  Marks marks = NO_MARKS;
  Size size = ORDINARY;
  float softcap = 0;
  int layout = 0;       // of the query
  bool ghosts = true;   // pages that nothing lists have no memory
  bool wants_lse = true;

  std::string text() const {
    char line[400];
    snprintf(line, sizeof line,
             "block %d kv %s(%s) query %s out %s group %d dim %d kv_heads %d batch %d length %d lists %d marks %d size "
             "%d softcap %g layout %d "
             "queries %d end %d",
             block, DTYPES[dtype], DTYPES[plain], DTYPES[query_dtype], DTYPES[out_dtype], group, dim, kv_heads, batch,
             length, lists, marks, size, (double)softcap, layout, queries, end);
    return line;
  }
};

// int8 tiles, as scout_tile_bytes() describes them.
struct Packed {
  int8_t *keys, *values;
  uint16_t *key_scales, *value_scales;
  int block, dim;
  Packed(void* tile, int block, int dim) : block(block), dim(dim) {
    keys = (int8_t*)tile;
    values = keys + block * dim;
    key_scales = (uint16_t*)(values + block * dim);
    value_scales = key_scales + dim;
  }
  int8_t& key(int t, int d) const { return keys[d / 2 * block * 2 + t * 2 + d % 2]; }
  int8_t& value(int t, int d) const { return values[t / 4 * dim * 4 + d * 4 + t % 4]; }
  double key_number(int t, int d) const { return key(t, d) * get(SCOUT_BF16, key_scales, d); }
  double value_number(int t, int d) const { return value(t, d) * get(SCOUT_BF16, value_scales, t); }
};

int64_t expected_tile_bytes(int dtype, int block, int dim) {
  const int64_t numbers = 2 * (int64_t)block * dim;
  if (dtype != SCOUT_I8) return numbers * bytes_of(dtype);
  const int64_t bytes = numbers + 2 * dim + 2 * block;
  return (bytes + 63) / 64 * 64;
}

double scale_above(double peak) {
  double scale = rounded(SCOUT_BF16, peak / 127);
  return scale * 127 < peak ? rounded(SCOUT_BF16, scale * (1 + 0x1p-7)) : scale;
}

// What the library should answer for one query head, and how far off it may be.
struct Answer {
  std::vector<double> out, loose;  // `loose`: what int8 may add to the error of each number
  std::vector<double> sizes;             // sums of the sizes of weighted values
  double lse = -INFINITY, loose_lse = 0, score_error = 0, out_per_score = 0, largest_value = 0;
};

struct World {
  Case c;
  int64_t blocks, seen, whole, tile_bytes, plain_bytes;
  std::vector<double> query;                 // [batch][query_heads][dim]
  std::vector<double> keys, values;          // [batch][kv_heads][length][dim], what the pages stand for
  std::vector<double> keys_before, values_before;  // int8: what was packed
  std::vector<std::vector<int32_t>> listed;  // [batch * kv_heads]
  std::vector<Bytes> pages;
  Bytes page_table, tail, query_bytes, list_bytes, count_bytes, mark_bytes, out, lse;
  scout_attend_args args = {};
  int64_t attended = 0;

  World(const Case& wanted, Random& random) : c(wanted) {
    blocks = (c.length + c.block - 1) / c.block;
    seen = (end() + c.block - 1) / c.block;
    whole = c.dtype == SCOUT_I8 ? c.length / c.block : blocks;  // blocks that have a page
    tile_bytes = expected_tile_bytes(c.dtype, c.block, c.dim);
    plain_bytes = expected_tile_bytes(c.plain, c.block, c.dim);
    make_lists(random);
    make_marks(random);
    make_query(random);
    make_numbers(random);
    make_pages(random);
    out = Bytes((int64_t)c.batch * heads() * c.dim * bytes_of(c.out_dtype));
    lse = Bytes(c.wants_lse ? (int64_t)c.batch * heads() * 4 : 0);
    fill_args();
  }

  // Each query of a head counts as a head of its own here.
  int group() const { return c.group * c.queries; }
  int heads() const { return c.kv_heads * group(); }
  int end() const { return c.end ? c.end : c.length; }
  int64_t number(int list, int64_t token) const { return ((int64_t)list * c.length + token) * c.dim; }
  bool padding_mask(int row, int64_t token) const { return !mark_bytes.size || mark_bytes.at[row * c.length + token]; }
  double scale() const { return 1 / sqrt((double)c.dim); }

  void make_lists(Random& random) {
    const int lists = c.batch * c.kv_heads;
    listed.resize((size_t)lists);
    const int64_t same = seen ? random.below(seen + 1) : 0;
    int64_t most = 0;
    for (auto& list : listed) {
      const int kind = (int)random.below(10);
      const int64_t count = c.lists == EVERYTHING   ? seen
                            : c.lists == SAME_COUNT ? same
                            : kind < 1              ? 0
                            : kind < 3              ? std::min<int64_t>(1, seen)
                                                    : random.below(seen + 1);
      for (int32_t block = 0; block < seen; block++) list.push_back(block);
      // The last block is listed in most cases, as a step lists it.
      const size_t fixed = count && c.lists != EVERYTHING && random.chance(70);
      for (size_t i = 0; i + fixed < list.size(); i++)
        std::swap(list[i], list[i + (size_t)random.below((int64_t)(list.size() - fixed - i))]);
      if (fixed) std::swap(list[0], list.back());
      list.resize((size_t)count);
      std::sort(list.begin(), list.end());
      most = std::max(most, count);
    }
    args.blocks_stride = most + (c.lists == RAGGED ? random.below(3) : 0);
    if (c.lists == EVERYTHING) return;
    list_bytes = Bytes(lists * args.blocks_stride * 4);
    for (int i = 0; i < lists; i++)
      std::copy(listed[(size_t)i].begin(), listed[(size_t)i].end(), list_bytes.as<int32_t>() + i * args.blocks_stride);
    args.count = (int32_t)same;
    if (c.lists == SAME_COUNT) return;
    args.count = 1 << 30;  // not to be looked at
    count_bytes = Bytes(lists * 4);
    for (int i = 0; i < lists; i++) count_bytes.as<int32_t>()[i] = (int32_t)listed[(size_t)i].size();
  }

  void make_marks(Random& random) {
    if (c.marks == NO_MARKS) return;
    mark_bytes = Bytes((int64_t)c.batch * c.length);
    for (int row = 0; row < c.batch; row++) {
      uint8_t* marks = mark_bytes.at + (int64_t)row * c.length;
      for (int t = 0; t < c.length; t++) marks[t] = random.chance(50) ? 1 : 255;
      const int64_t left = c.marks == LEFT_PADDING ? random.below(c.length + 1) : 0;
      for (int t = 0; t < c.length; t++)
        if (t < left || (c.marks >= HOLES && random.chance(30))) marks[t] = 0;
      if (c.marks >= BLOCKS_GONE)
        for (int t = 0; t < c.length; t++)
          if (t / c.block % 3 == row % 3) marks[t] = 0;
      if (c.marks == ROW_GONE && row == 1 && c.length) memset(marks, 0, (size_t)c.length);
    }
  }

  int64_t place(int row, int head) const {
    return row * args.query_row + head / c.queries * args.query_head + head % c.queries * args.query_token;
  }

  void make_query(Random& random) {
    const int64_t numbers = c.dim, each = c.queries;
    // Heads one after the other; with gaps; or the rows of one head after the other. Queries of a head lie together, or
    // those of all heads do.
    const int64_t pitch = c.layout == 1 ? numbers + 3 : numbers;
    args.query_token = c.layout == 0 ? numbers : c.layout == 1 ? c.kv_heads * c.group * pitch : c.batch * numbers;
    args.query_head = c.layout == 0 ? each * numbers : c.layout == 1 ? pitch : each * c.batch * numbers;
    args.query_row = c.layout == 0 ? heads() * numbers : c.layout == 1 ? each * args.query_token + 5 : numbers;
    query_bytes = Bytes((place(c.batch - 1, heads() - 1) + numbers) * bytes_of(c.query_dtype));
    const double factor = c.size == LARGE ? 100 : c.size == TINY ? 0x1p13 : 1;
    for (int row = 0; row < c.batch; row++)
      for (int head = 0; head < heads(); head++)
        for (int d = 0; d < c.dim; d++) {
          const bool zero = c.size == EQUAL && head == 0;
          const double q = zero ? 0 : rounded(c.query_dtype, random.normal() * factor);
          query.push_back(q);
          put(c.query_dtype, query_bytes.at, place(row, head) + d, q);
        }
  }

  void make_numbers(Random& random) {
    // Drawn from a few thousand, which is faster and as good.
    std::vector<double> drawn(4096);
    const double factor = c.size == TINY ? 0x1p-15 : 1;  // subnormal halves
    for (double& x : drawn) x = rounded(c.plain, random.normal() * factor);
    keys.resize((size_t)number(c.batch * c.kv_heads, 0));
    values.resize(keys.size());
    for (int list = 0; list < c.batch * c.kv_heads; list++) {
      double block_size = 1, token_size = c.size == HUGE_VALUES ? 0x1p18 : 1;
      for (int64_t t = 0; t < c.length; t++) {
        if (c.size == VARIED && t % c.block == 0) block_size = ldexp(1, (int)random.below(12) - 8);
        if (c.size == VARIED) token_size = ldexp(1, (int)random.below(12) - 11);
        // Padding holds large numbers, so that it shows where it must not.
        const double garbage = padding_mask(list / c.kv_heads, t) ? 1 : c.dtype == SCOUT_I8 ? 4 : 64;
        for (int d = 0; d < c.dim; d++) {
          const size_t at = (size_t)(number(list, t) + d);
          keys[at] = drawn[(size_t)random.below(4096)] * garbage * block_size;
          if (c.size == EQUAL) keys[at] = drawn[(size_t)(list * c.dim + d) % 4096];
          values[at] = drawn[(size_t)random.below(4096)] * garbage * token_size;
        }
      }
    }
  }

  void make_pages(Random& random) {
    pages.resize((size_t)(c.batch * whole));
    args.store.pages_stride = whole + random.below(3);
    page_table = Bytes(c.batch ? ((c.batch - 1) * args.store.pages_stride + whole) * 8 : 0);
    if (c.dtype == SCOUT_I8) keys_before = keys, values_before = values;
    std::vector<int64_t> order;  // of pages in memory: any
    for (int64_t i = 0; i < c.batch * whole; i++) order.push_back(i);
    for (size_t i = 0; i < order.size(); i++)
      std::swap(order[i], order[i + (size_t)random.below((int64_t)(order.size() - i))]);
    for (int64_t i : order) {
      const int row = (int)(i / whole);
      const int64_t block = i % whole;
      bool needed = !c.ghosts;
      for (int head = 0; head < c.kv_heads; head++) needed |= reads(row * c.kv_heads + head, block);
      // Addresses of nowhere: whoever looks at such a page falls.
      page_table.as<int64_t>()[row * args.store.pages_stride + block] = 0x1000 + i * 64;
      if (!needed) continue;
      Bytes& page = pages[(size_t)i] = Bytes(c.kv_heads * tile_bytes);
      page_table.as<int64_t>()[row * args.store.pages_stride + block] = (int64_t)page.at;
      for (int head = 0; head < c.kv_heads; head++) {
        const int list = row * c.kv_heads + head;
        if (!c.ghosts || reads(list, block)) fill_tile(list, block, page.at + head * tile_bytes);
      }
    }
    if (c.dtype != SCOUT_I8) return;
    tail = Bytes(c.batch * c.kv_heads * plain_bytes);
    for (int list = 0; list < c.batch * c.kv_heads && whole < blocks; list++)
      fill_plain(list, whole, tail.at + list * plain_bytes);
  }

  // Whether the library has a reason to look at a tile: it is listed, and not all of it is padding.
  bool reads(int list, int64_t block) const {
    if (!std::binary_search(listed[(size_t)list].begin(), listed[(size_t)list].end(), (int32_t)block)) return false;
    for (int64_t t = block * c.block; t < std::min<int64_t>(end(), (block + 1) * c.block); t++)
      if (padding_mask(list / c.kv_heads, t)) return true;
    return false;
  }

  void fill_plain(int list, int64_t block, uint8_t* tile) const {
    const int64_t first = block * c.block, last = std::min<int64_t>(c.length, first + c.block);
    for (int64_t t = first; t < last; t++)
      for (int d = 0; d < c.dim; d++) {
        put(c.plain, tile, (t - first) * c.dim + d, keys[(size_t)(number(list, t) + d)]);
        put(c.plain, tile + plain_bytes / 2, (t - first) * c.dim + d, values[(size_t)(number(list, t) + d)]);
      }
  }

  void fill_tile(int list, int64_t block, uint8_t* tile) {
    if (c.dtype != SCOUT_I8) return fill_plain(list, block, tile);
    const Packed packed(tile, c.block, c.dim);
    double* k = &keys[(size_t)number(list, block * c.block)];
    double* v = &values[(size_t)number(list, block * c.block)];
    for (int d = 0; d < c.dim; d++) {
      double peak = 0;
      for (int t = 0; t < c.block; t++) peak = std::max(peak, fabs(k[t * c.dim + d]));
      const double scale = scale_above(peak);
      put(SCOUT_BF16, packed.key_scales, d, scale);
      for (int t = 0; t < c.block; t++) {
        packed.key(t, d) = (int8_t)(scale > 0 ? nearbyint(k[t * c.dim + d] / scale) : 0);
        k[t * c.dim + d] = packed.key_number(t, d);
      }
    }
    for (int t = 0; t < c.block; t++) {
      double peak = 0;
      for (int d = 0; d < c.dim; d++) peak = std::max(peak, fabs(v[t * c.dim + d]));
      const double scale = scale_above(peak);
      put(SCOUT_BF16, packed.value_scales, t, scale);
      for (int d = 0; d < c.dim; d++) {
        packed.value(t, d) = (int8_t)(scale > 0 ? nearbyint(v[t * c.dim + d] / scale) : 0);
        v[t * c.dim + d] = packed.value_number(t, d);
      }
    }
  }

  uint8_t* tile(int list, int64_t block) const {
    const int row = list / c.kv_heads, head = list % c.kv_heads;
    if (block >= whole) return tail.at + list * plain_bytes;
    return (uint8_t*)page_table.as<int64_t>()[row * args.store.pages_stride + block] + head * tile_bytes;
  }

  void fill_args() {
    scout_store& s = args.store;
    s.pages = page_table.as<int64_t>();
    s.length = c.length;
    s.tail = tail.at;
    s.batch = c.batch, s.kv_heads = c.kv_heads, s.head_dim = c.dim, s.block_size = c.block;
    s.dtype = c.dtype, s.plain_dtype = c.plain;
    args.query = query_bytes.at;
    args.blocks = list_bytes.as<int32_t>();
    args.counts = count_bytes.as<int32_t>();
    args.padding_mask = c.marks == NO_MARKS ? nullptr : mark_bytes.at;
    args.padding_mask_stride = c.length;
    args.out = out.at;
    args.lse = c.wants_lse ? lse.as<float>() : nullptr;
    args.query_heads = c.kv_heads * c.group, args.query_dtype = c.query_dtype, args.out_dtype = c.out_dtype;
    args.queries = c.queries, args.end = c.end;
    args.status = 99;
    args.scale = (float)scale();
    args.softcap = c.softcap;
  }

  std::vector<int64_t> tokens_of(int list) const {
    std::vector<int64_t> tokens;
    for (int32_t block : listed[(size_t)list])
      for (int64_t t = (int64_t)block * c.block; t < std::min<int64_t>(end(), (int64_t)(block + 1) * c.block); t++)
        if (padding_mask(list / c.kv_heads, t)) tokens.push_back(t);
    return tokens;
  }

  Answer answer(int row, int head, bool before_packing = false) const {
    const std::vector<double>&k = before_packing ? keys_before : keys, &v = before_packing ? values_before : values;
    const int list = row * c.kv_heads + head / group();
    const double* q = &query[(size_t)(((int64_t)row * heads() + head) * c.dim)];
    const std::vector<int64_t> tokens = tokens_of(list);
    Answer a;
    a.out.assign((size_t)c.dim, 0);
    a.loose.assign((size_t)c.dim, 0);
    a.sizes.assign((size_t)c.dim, 0);
    if (tokens.empty()) return a;
    std::vector<double> weights;
    double most = -INFINITY, total = 0, largest = 0;
    for (int64_t t : tokens) {
      double dot = 0, size = 0;
      for (int d = 0; d < c.dim; d++) {
        const double product = q[d] * k[(size_t)(number(list, t) + d)];
        dot += product;
        size += fabs(product);
      }
      double score = dot * (double)args.scale;
      if (c.softcap != 0) score = (double)c.softcap * tanh(score / (double)c.softcap);
      weights.push_back(score);
      most = std::max(most, score);
      largest = std::max(largest, size * (double)args.scale);
    }
    for (double& w : weights) total += w = exp(w - most);
    for (double& w : weights) w /= total;
    a.lse = most + log(total);
    for (size_t i = 0; i < tokens.size(); i++)
      for (int d = 0; d < c.dim; d++) {
        const double part = weights[i] * v[(size_t)(number(list, tokens[i]) + d)];
        a.out[(size_t)d] += part, a.sizes[(size_t)d] += fabs(part);
      }
    for (size_t i = 0; i < tokens.size(); i++) {
      double spread = 0;
      for (int d = 0; d < c.dim; d++) {
        const double value = v[(size_t)(number(list, tokens[i]) + d)];
        a.largest_value = std::max(a.largest_value, fabs(value));
        spread = std::max(spread, fabs(value - a.out[(size_t)d]));
      }
      a.out_per_score += 2 * weights[i] * spread;
    }
    // Sums in float: a few roundings of partial sums that are no larger than the sum of sizes.
    a.score_error = 0x1p-23 * largest;
    if (c.dtype == SCOUT_I8 && !before_packing) loosen(a, list, q, tokens, weights);
    return a;
  }

  // The int8 path multiplies the query with a tile's key scales and rounds that to integers, the largest of which lies
  // between 2048 and 32766. A product is off by at most 1/2 * |largest| / 2048, which makes a score s_t off by
  //
  //   e_t = scale * |largest| / 4096 * sum_d |k_td|      with k the integers of the keys, largest over q_d * scale_d,
  //
  // if all roundings go the same way, which they do where a query repeats one number. (A soft cap makes this smaller.)
  // Weights w_t move by a factor of at most exp(e_t + e), e the largest e_t, and since they add up to 1 before and
  // after, the sum of w_t * v_t moves by no more than sum_t w_t * (exp(e_t + e) - 1) * |v_t - out|. log-sum-exp moves
  // by the log of the weighted mean of exp(e_t). Weights times the values' scales are then rounded to 1/255 of the
  // largest in the tile, half of that at most: another sum over tiles of
  //
  //   max_t(w_t * scale_t) / 510 * sum_t |v_t|           with v the integers of the values.
  //
  // Both are bounds for the worst case; what is found is far smaller, see the table.
  void loosen(Answer& a, int list, const double* q, const std::vector<int64_t>& tokens,
              const std::vector<double>& weights) const {
    std::vector<double> errors(tokens.size(), 0), weighted((size_t)c.dim, 0);
    for (size_t first = 0, last; first < tokens.size(); first = last) {
      const int64_t block = tokens[first] / c.block;
      for (last = first; last < tokens.size() && tokens[last] / c.block == block;) last++;
      if (block >= whole) break;  // the plain tail
      const Packed packed(tile(list, block), c.block, c.dim);
      double largest = 0, heaviest = 0;
      for (int d = 0; d < c.dim; d++)
        largest = std::max(largest, fabs(q[d] * get(SCOUT_BF16, packed.key_scales, d)));
      for (size_t i = first; i < last; i++) {
        const int t = (int)(tokens[i] % c.block);
        int sum = 0;
        for (int d = 0; d < c.dim; d++) sum += abs(packed.key(t, d));
        errors[i] = 1.01 * (double)args.scale * largest / 4096 * sum;
        heaviest = std::max(heaviest, weights[i] * get(SCOUT_BF16, packed.value_scales, t));
      }
      for (int d = 0; d < c.dim; d++) {
        int sum = 0;
        for (size_t i = first; i < last; i++) sum += abs(packed.value((int)(tokens[i] % c.block), d));
        weighted[(size_t)d] += 1.01 * heaviest / 510 * sum;
      }
    }
    const double most = *std::max_element(errors.begin(), errors.end());
    double mean = 0;
    for (size_t i = 0; i < tokens.size(); i++) {
      mean += weights[i] * exp(errors[i]);
      for (int d = 0; d < c.dim; d++) {
        const double away = fabs(values[(size_t)(number(list, tokens[i]) + d)] - a.out[(size_t)d]);
        a.loose[(size_t)d] += weights[i] * expm1(errors[i] + most) * away;
      }
    }
    for (int d = 0; d < c.dim; d++) a.loose[(size_t)d] += weighted[(size_t)d] * exp(2 * most);
    a.loose_lse = log(mean);
  }

  // Everything that a call writes, for comparisons bit for bit.
  int run(int threads) {
    if (out.size) memset(out.at, 0xff, out.size);
    if (lse.size) memset(lse.at, 0xff, lse.size);
    args.status = 99, args.attended = -1;
    use_team(threads);
    return scout_attend(&args, threads);
  }
};

std::vector<int> isas;

void compare(World& w, const std::vector<Answer>& answers, const std::vector<Answer>& before) {
  const Case& c = w.c;
  const bool dot = c.dtype == SCOUT_BF16 && c.query_dtype == SCOUT_BF16;  // a path of its own on some machines
  const std::string isa = scout_isa_name(scout_current_isa());
  Worst& worst = table[isa + " " + DTYPES[c.dtype] + (dot ? " bf16-query" : "")];
  const bool halves = (c.dtype == SCOUT_I8 ? c.plain : c.dtype) == SCOUT_BF16 && c.query_dtype == SCOUT_BF16 &&
                      isa == "avx512bf16" && c.queries > 1 && c.softcap == 0;
  // Each score of one of several queries is one sum from the first channel to the last.
  const double exact = c.queries > 1 ? 2 * EXACT : EXACT;
  const bool large = c.size == LARGE || c.size == VARIED;
  const int kind = large ? 2 : c.softcap != 0;
  int64_t attended = 0;
  for (int list = 0; list < c.batch * c.kv_heads; list++) attended += (int64_t)w.tokens_of(list).size();
  if (w.args.attended != attended)
    fail("%s: attended %lld tokens, not %lld", c.text().c_str(), (long long)w.args.attended, (long long)attended);
  for (size_t i = 0; i < answers.size(); i++) {
    const Answer& a = answers[i];
    const size_t row = i / (size_t)w.heads(), head = i % (size_t)w.heads();
    const double extra = large ? a.score_error : 0;
    for (int d = 0; d < c.dim; d++) {
      const double want = a.out[(size_t)d], got = get(c.out_dtype, w.out.at, (int64_t)i * c.dim + d);
      // Where numbers are tiny or huge, relative to them.
      const bool scaled = c.size == TINY || c.size == HUGE_VALUES;
      const double unit = scaled ? a.largest_value : std::max(1.0, fabs(want));
      // Weights rounded to bf16.
      const double rounding = halves ? 0x1.02p-8 * a.sizes[(size_t)d] : 0;
      const double tolerance = exact * unit + extra * a.out_per_score + a.loose[(size_t)d] + rounding;
      if (!close_to(c.out_dtype, got, want, tolerance))
        return fail("%s: row %zu head %zu channel %d is %.9g, not %.9g (within %.3g)", c.text().c_str(), row,
                    head, d, got, want, tolerance);
      if (c.out_dtype != SCOUT_F32) continue;
      if (!halves) keep(worst.out[kind], fabs(got - want) / (unit > 0 ? unit : 1));
      if (tolerance > 0) keep(worst.of_bound, fabs(got - want) / tolerance);
      if (!before.empty()) keep(worst.unquantised, fabs(got - before[i].out[(size_t)d]));
    }
    if (!c.wants_lse) continue;
    const double got = w.lse.as<float>()[i], tolerance = exact * std::max(1.0, fabs(a.lse)) + extra + a.loose_lse;
    if (a.lse == -INFINITY ? got != a.lse : !(fabs(got - a.lse) <= tolerance))
      return fail("%s: row %zu head %zu log-sum-exp is %.9g, not %.9g (within %.3g)", c.text().c_str(), row, head, got,
                  a.lse, tolerance);
    if (a.lse == -INFINITY) continue;
    keep(worst.lse[kind], fabs(got - a.lse) / std::max(1.0, fabs(a.lse)));
    keep(worst.of_bound, fabs(got - a.lse) / tolerance);
  }
}

scout_pool* pool = nullptr;

void check_attend(const Case& c, Random& random) {
  World w(c, random);
  std::vector<Answer> answers, before;
  for (int row = 0; row < c.batch; row++)
    for (int head = 0; head < w.heads(); head++) {
      answers.push_back(w.answer(row, head));
      if (c.dtype == SCOUT_I8 && c.size == ORDINARY && c.marks == NO_MARKS) before.push_back(w.answer(row, head, true));
    }
  const bool in_pool = random.chance(50);
  for (int isa : isas) {
    scout_use_isa(isa);
    const int status = w.run(1);
    // Vectors of 4 floats are the narrowest.
    const bool may_refuse = c.dim % 8 != 0;
    if (status == SCOUT_UNSUPPORTED && may_refuse && w.args.status == status) continue;
    if (status != SCOUT_OK || w.args.status != SCOUT_OK) {
      fail("%s: status %d, %d", c.text().c_str(), status, w.args.status);
      continue;
    }
    compare(w, answers, before);
    const Bytes out = w.out.copy(), lse = w.lse.copy();
    for (int threads : {2, 3}) {
      if (w.run(threads) != SCOUT_OK || !(w.out == out) || !(w.lse == lse))
        fail("%s: %d threads give other bits than one", c.text().c_str(), threads);
    }
    if (!in_pool) continue;
    // A device may write the lists until the flag says that they are there.
    const Bytes lists = w.list_bytes.copy(), counts = w.count_bytes.copy();
    for (Bytes* late : {&w.out, &w.list_bytes, &w.count_bytes})
      if (late->size) memset(late->at, 0xff, late->size);
    uint64_t flag = 6;
    const int64_t ticket = scout_submit_attend(pool, &w.args, &flag, 7);
    if (lists.size) memcpy(w.list_bytes.at, lists.at, lists.size);
    if (counts.size) memcpy(w.count_bytes.at, counts.at, counts.size);
    __atomic_store_n(&flag, 7, __ATOMIC_RELEASE);
    if (scout_pool_wait(pool, ticket, -1) != 1 || w.args.status != SCOUT_OK || !(w.out == out) || !(w.lse == lse))
      fail("%s: the pool gives other bits", c.text().c_str());
  }
}

Case random_case(Random& random) {
  Case c;
  c.block = random.pick<int>({8, 16, 32, 64, 128});
  c.dtype = random.pick<int>({SCOUT_F32, SCOUT_F16, SCOUT_BF16, SCOUT_I8});
  c.query_dtype = random.pick<int>({SCOUT_F32, SCOUT_F16, SCOUT_BF16});
  c.out_dtype = random.pick<int>({SCOUT_F32, SCOUT_F32, SCOUT_F16, SCOUT_BF16});
  c.group = random.pick<int>({1, 3, 4, 5, 7, 8, 16, 2, 20});
  c.dim = random.pick<int>({64, 64, 80, 96, 128, 128, 128, 192, 256, 8, 16, 48});
  // What no model has, but the interface allows.
  if (random.chance(8)) c.block = random.pick<int>({4, 12, 24, 100, 256});
  if (random.chance(8)) c.dim = random.pick<int>({20, 24, 40, 72, 320, 512, 576});
  return c;
}

// What the full grid leaves to chance.
void random_rest(Case& c, Random& random) {
  c.plain = c.dtype == SCOUT_I8 ? random.pick<int>({SCOUT_F32, SCOUT_F16, SCOUT_BF16}) : c.dtype;
  c.lists = random.pick<Lists>({EVERYTHING, SAME_COUNT, RAGGED, RAGGED});
  c.marks = random.pick<Marks>({NO_MARKS, NO_MARKS, NO_MARKS, ALL_EXIST, LEFT_PADDING, HOLES, BLOCKS_GONE, ROW_GONE});
  c.size = random.chance(60) ? ORDINARY : random.pick<Size>({LARGE, EQUAL, TINY, HUGE_VALUES, VARIED});
  if (c.size == TINY && c.dtype == SCOUT_I8) c.size = ORDINARY;
  if (c.size == HUGE_VALUES && (c.dtype == SCOUT_I8 || c.dtype == SCOUT_F16)) c.size = EQUAL;
  c.softcap = random.pick<float>({0, 0, 5, 30});
  c.layout = (int)random.below(3);
  if (random.chance(40)) c.queries = random.pick<int>({2, 3, 5, 16, 33});
  if (c.group > 8) c.queries = std::min(c.queries, 3);
  c.wants_lse = !random.chance(10);
  c.kv_heads = 1 + (int)random.below(3);
  c.batch = 1 + (int)random.below(3);
  c.length = 1 + (int)random.below(5 * c.block);
  if (random.chance(25)) c.length = (c.length + c.block - 1) / c.block * c.block;
  if (random.chance(2)) c.length = 0;
  if (c.length && random.chance(30)) c.end = 1 + (int)random.below(c.length);
  // Several chunks to a list, and work enough for several threads.
  if (random.chance(12)) {
    c.length = 900 + (int)random.below(3000), c.end = 0;
    c.queries = std::min(c.queries, 5);
    c.kv_heads = 1 + (int)random.below(2), c.batch = 1;
    if (c.group > 5) c.group = 5;
    if (random.chance(70)) c.lists = EVERYTHING;
  }
}

// Every combination of the dimensions that choose code; the rest by chance.
std::vector<Case> all_cases() {
  std::vector<Case> cases;
  for (int block : {8, 16, 32, 64, 128})
    for (int dtype : {SCOUT_F32, SCOUT_F16, SCOUT_BF16, SCOUT_I8})
      for (int query_dtype : {SCOUT_F32, SCOUT_F16, SCOUT_BF16})
        for (int out_dtype : {SCOUT_F32, SCOUT_F16, SCOUT_BF16})
          for (int group : {1, 3, 4, 5, 7, 8, 16})
            for (int dim : {64, 80, 96, 128, 192, 256, 8, 16, 20, 48}) {
              Case c;
              c.block = block, c.dtype = dtype, c.query_dtype = query_dtype, c.out_dtype = out_dtype;
              c.group = group, c.dim = dim;
              cases.push_back(c);
            }
  return cases;
}

// -- sizes and blocks that cannot be ---------------------------------------------------------------------------------

void check_refusals(Random& random) {
  for (int isa : isas) {
    scout_use_isa(isa);
    auto answers = [&](int want, const char* what, Case c, void (*change)(World&)) {
      World w(c, random);
      change(w);
      const int status = w.run(1);
      if (status != want || w.args.status != want)
        fail("%s: status %d, not %d", what, status, want);
    };
    const int no = SCOUT_UNSUPPORTED;
    answers(no, "block size 6", Case(), [](World& w) { w.args.store.block_size = 6; });
    answers(no, "block size 260", Case(), [](World& w) { w.args.store.block_size = 260; });
    answers(no, "head_dim 0", Case(), [](World& w) { w.args.store.head_dim = 0; });
    answers(no, "head_dim 584", Case(), [](World& w) { w.args.store.head_dim = 584; });
    answers(no, "head_dim 20", Case(), [](World& w) { w.args.store.head_dim = 20; });
    answers(no, "no KV heads", Case(), [](World& w) { w.args.store.kv_heads = 0; });
    answers(no, "9 query heads to 2", Case(), [](World& w) { w.args.query_heads = 9; });
    Case same;
    same.dim = 20;
    World w(same, random);
    if (scout_submit_attend(pool, &w.args, nullptr, 0) != no || w.args.status != no) fail("head_dim 20 is submitted");
    same.dim = 128;
    same.lists = SAME_COUNT;
    for (int dtype : {SCOUT_F32, SCOUT_BF16, SCOUT_I8}) {
      same.dtype = dtype, same.plain = dtype == SCOUT_I8 ? SCOUT_F16 : dtype;
      for (int length : {300, 320}) {
        same.length = length;
        same.ghosts = true;
        auto bad = [&](const char* what, void (*change)(World&)) {
          World w(same, random);
          if (!w.args.count) return;
          change(w);
          w.run(1);
          if (w.args.status != SCOUT_BAD_BLOCK)
            fail("%s, %s pages: status %d", what, DTYPES[dtype], w.args.status);
        };
        bad("a block behind the last", [](World& w) { w.list_bytes.as<int32_t>()[w.args.count - 1] = (int)w.blocks; });
        bad("a block far behind the last", [](World& w) { w.list_bytes.as<int32_t>()[0] = 1 << 30; });
        bad("a negative block", [](World& w) { w.list_bytes.as<int32_t>()[0] = -1; });
      }
    }
  }
  // A sanitizer sees what is left of a job that a stopped pool does not take.
  scout_pool* stopped = scout_pool_create(1, nullptr, 0, 0);
  scout_pool_stop(stopped);
  World w(Case(), random);
  if (scout_submit_attend(stopped, &w.args, nullptr, 0) >= 0) fail("a stopped pool takes a job");
  scout_pool_destroy(stopped);
}

// -- NaN -------------------------------------------------------------------------------------------------------------

enum Place { IN_KEY, IN_VALUE, IN_QUERY };

void check_nan(const Case& c, Place place, bool in_last, Random& random) {
  World w(c, random);
  const int list = (int)random.below(c.batch * c.kv_heads), row = list / c.kv_heads;
  std::vector<int64_t> tokens = w.tokens_of(list);
  if (tokens.empty()) return;
  const int64_t token = in_last ? tokens.back() : random.pick(tokens), block = token / c.block;
  const int t = (int)(token % c.block), d = (int)random.below(c.dim), query_head = (int)random.below(w.heads());
  const uint32_t sign = random.chance(50) ? 0x80000000u : 0;  // the NaN of inf - inf has it
  const bool packed = c.dtype == SCOUT_I8 && block < w.whole;
  for (int isa : isas) {
    scout_use_isa(isa);
    w.run(1);
    const Bytes out = w.out.copy(), lse = w.lse.copy();
    uint8_t* tile = w.tile(list, block);
    auto spoil = [&](int dtype, void* to, int64_t index) {
      put(dtype, to, index, NAN);
      if (sign) ((uint8_t*)to)[(index + 1) * bytes_of(dtype) - 1] |= 0x80;
    };
    Bytes kept(packed ? w.tile_bytes : w.plain_bytes);
    memcpy(kept.at, tile, kept.size);
    const Bytes query = w.query_bytes.copy();
    // The library packs positive NaN.
    if (place == IN_QUERY)
      spoil(c.query_dtype, w.query_bytes.at, w.place(row, query_head) + d);
    else if (packed && place == IN_KEY)
      put(SCOUT_BF16, Packed(tile, c.block, c.dim).key_scales, d, NAN);
    else if (packed)
      put(SCOUT_BF16, Packed(tile, c.block, c.dim).value_scales, t, NAN);
    else
      spoil(c.plain, tile + (place == IN_VALUE) * w.plain_bytes / 2, (int64_t)t * c.dim + d);
    w.run(1);
    memcpy(tile, kept.at, kept.size);
    memcpy(w.query_bytes.at, query.at, query.size);
    const bool reaches_query = place != IN_QUERY || !w.tokens_of(row * c.kv_heads + query_head / w.group()).empty();
    for (int64_t i = 0; i < (int64_t)c.batch * w.heads(); i++) {
      const bool hit = place == IN_QUERY ? reaches_query && i == (int64_t)row * w.heads() + query_head
                                         : i / w.group() == list;
      const float is = w.lse.as<float>()[i], was = lse.as<float>()[i];
      bool good = hit && place != IN_VALUE ? is != is : !memcmp(&is, &was, 4);
      for (int channel = 0; channel < c.dim; channel++) {
        const int64_t at = i * c.dim + channel;
        const double now = get(c.out_dtype, w.out.at, at);
        const bool must = hit && (place != IN_VALUE || packed || channel == d);
        good &= must ? now != now
                     : !memcmp(w.out.at + at * bytes_of(c.out_dtype), out.at + at * bytes_of(c.out_dtype),
                               (size_t)bytes_of(c.out_dtype));
      }
      if (good) continue;
      fail("%s: NaN in %s of list %d (token %lld of %lld, channel %d, query head %d) %s output %lld", c.text().c_str(),
           place == IN_KEY     ? "a key"
           : place == IN_VALUE ? "a value"
                               : "the query",
           list, (long long)token, (long long)tokens.size(), d, query_head, hit ? "misses" : "changes", (long long)i);
      break;
    }
  }
}

void check_some_nan(Random& random) {
  Case c = random_case(random);
  c.dim = random.pick<int>({8, 48, 64, 128});
  random_rest(c, random);
  c.size = random.chance(80) ? ORDINARY : LARGE;  // a weight of 0 must not hide it
  c.wants_lse = true;
  check_nan(c, random.pick<Place>({IN_KEY, IN_VALUE, IN_VALUE, IN_QUERY}), random.chance(40), random);
}

// -- tokens into pages -----------------------------------------------------------------------------------------------

struct Source {  // tokens in some layout
  std::vector<double> numbers;  // [list][token][dim]
  Bytes bytes;
  int64_t strides[3];
};

struct Pages {
  int block, dtype, plain, dim, kv_heads, batch;
  int64_t length, blocks, tile_bytes, plain_bytes;
  std::vector<Bytes> pages;
  Bytes page_table, tail;

  Pages(int block, int dtype, int plain, int dim, int kv_heads, int batch, int64_t length)
      : block(block), dtype(dtype), plain(plain), dim(dim), kv_heads(kv_heads), batch(batch), length(length) {
    blocks = dtype == SCOUT_I8 ? length / block : (length + block - 1) / block;
    tile_bytes = expected_tile_bytes(dtype, block, dim);
    plain_bytes = expected_tile_bytes(plain, block, dim);
    page_table = Bytes(batch * blocks * 8);
    for (int64_t i = 0; i < batch * blocks; i++) {
      pages.emplace_back(kv_heads * tile_bytes);
      page_table.as<int64_t>()[i] = (int64_t)pages.back().at;
    }
    if (dtype == SCOUT_I8) tail = Bytes(batch * kv_heads * plain_bytes);
  }

  scout_store store(int64_t tokens) const {
    scout_store s = {};
    s.pages = page_table.as<int64_t>(), s.pages_stride = blocks, s.length = tokens, s.tail = tail.at;
    s.batch = batch, s.kv_heads = kv_heads, s.head_dim = dim, s.block_size = block;
    s.dtype = dtype, s.plain_dtype = plain;
    return s;
  }
  uint8_t* tile(int list, int64_t at) const {
    return pages[(size_t)(list / kv_heads * blocks + at)].at + list % kv_heads * tile_bytes;
  }
  std::string text() const {
    char line[200];
    snprintf(line, sizeof line, "block %d %s(%s) dim %d kv_heads %d batch %d length %lld", block, DTYPES[dtype],
             DTYPES[plain], dim, kv_heads, batch, (long long)length);
    return line;
  }
  bool operator==(const Pages& other) const {
    for (size_t i = 0; i < pages.size(); i++)
      if (!(pages[i] == other.pages[i])) return false;
    return same_tail(other);
  }
  // Behind its filled end a tail keeps what the call before left there.
  bool same_tail(const Pages& other) const {
    const int64_t filled = length % block * dim * bytes_of(plain);
    for (int64_t half = 0; half < 2 * batch * kv_heads && tail.size; half++)
      if (memcmp(tail.at + half * plain_bytes / 2, other.tail.at + half * plain_bytes / 2, (size_t)filled))
        return false;
    return true;
  }
};

Source make_source(const Pages& p, Random& random) {
  Source s;
  const int kind = (int)random.below(3);
  const int64_t gap = random.below(4);
  if (kind == 0) {  // [batch][head][token][dim]
    s.strides[2] = p.dim, s.strides[1] = p.length * p.dim, s.strides[0] = p.kv_heads * s.strides[1];
  } else if (kind == 1) {  // [batch][token][head][dim], as a projection leaves it
    s.strides[1] = p.dim, s.strides[2] = p.kv_heads * p.dim, s.strides[0] = p.length * s.strides[2];
  } else {
    s.strides[2] = p.dim + gap, s.strides[0] = p.length * s.strides[2];
    s.strides[1] = p.batch * s.strides[0] + gap;
  }
  s.bytes = Bytes(((p.batch - 1) * s.strides[0] + (p.kv_heads - 1) * s.strides[1] + (p.length - 1) * s.strides[2] +
                   p.dim) * bytes_of(p.plain));
  std::vector<double> drawn(1024);
  for (double& x : drawn) x = rounded(p.plain, random.normal());
  for (int list = 0; list < p.batch * p.kv_heads; list++)
    for (int64_t t = 0; t < p.length; t++)
      for (int d = 0; d < p.dim; d++) {
        // Now and then a channel or a token of nothing but zeros.
        const bool zero = (d == 3 && list == 0) || t % 50 == 7;
        const double x = zero ? 0 : random.pick(drawn);
        s.numbers.push_back(x);
        put(p.plain, s.bytes.at, list / p.kv_heads * s.strides[0] + list % p.kv_heads * s.strides[1] +
            t * s.strides[2] + d, x);
      }
  return s;
}

int append(const Pages& p, const Source& keys, const Source& values, int64_t first, int64_t last, int threads) {
  scout_append_args a = {};
  a.store = p.store(first);
  a.keys = keys.bytes.at + first * keys.strides[2] * bytes_of(p.plain);
  a.values = values.bytes.at + first * values.strides[2] * bytes_of(p.plain);
  memcpy(a.key_strides, keys.strides, sizeof a.key_strides);
  memcpy(a.value_strides, values.strides, sizeof a.value_strides);
  a.tokens = last - first;
  use_team(threads);
  return scout_append(&a, threads);
}

// What pages hold against what was appended.
void check_pages(const Pages& p, const Source& keys, const Source& values) {
  for (int list = 0; list < p.batch * p.kv_heads; list++)
    for (int64_t t = 0; t < p.length; t++) {
      const int64_t block = t / p.block, at = (list * p.length + t) * p.dim;
      const int inside = (int)(t % p.block);
      const bool packed = p.dtype == SCOUT_I8 && block < p.blocks;
      const uint8_t* tile = p.dtype == SCOUT_I8 && !packed ? p.tail.at + list * p.plain_bytes : p.tile(list, block);
      for (int d = 0; d < p.dim; d++) {
        const double key = keys.numbers[(size_t)(at + d)], value = values.numbers[(size_t)(at + d)];
        bool good;
        if (packed) {
          const Packed q((void*)tile, p.block, p.dim);
          const double key_scale = get(SCOUT_BF16, q.key_scales, d);
          const double value_scale = get(SCOUT_BF16, q.value_scales, inside);
          // Half a step, and a little for the float arithmetic; steps as small as bf16 can say.
          good = fabs(q.key_number(inside, d) - key) <= 0.50001 * key_scale &&
                 fabs(q.value_number(inside, d) - value) <= 0.50001 * value_scale && abs(q.key(inside, d)) <= 127 &&
                 abs(q.value(inside, d)) <= 127 && key_scale < 0.2 && value_scale < 0.2;
        } else {
          good = get(p.plain, tile, (int64_t)inside * p.dim + d) == key &&
                 get(p.plain, tile + p.plain_bytes / 2, (int64_t)inside * p.dim + d) == value;
        }
        if (!good) return fail("%s: list %d token %lld channel %d", p.text().c_str(), list, (long long)t, d);
      }
    }
  // Scales are tight: some key of each channel and some number of each value is 126 or 127 steps.
  for (int list = 0; list < p.batch * p.kv_heads && p.dtype == SCOUT_I8; list++)
    for (int64_t block = 0; block < p.blocks; block++) {
      const Packed q(p.tile(list, block), p.block, p.dim);
      for (int d = 0; d < p.dim; d++) {
        int most = 0;
        for (int t = 0; t < p.block; t++) most = std::max(most, abs(q.key(t, d)));
        if (most && most < 125) fail("%s: keys of channel %d only reach %d", p.text().c_str(), d, most);
      }
      for (int t = 0; t < p.block; t++) {
        int most = 0;
        for (int d = 0; d < p.dim; d++) most = std::max(most, abs(q.value(t, d)));
        if (most && most < 125) fail("%s: values of token %d only reach %d", p.text().c_str(), t, most);
      }
    }
  // Whatever lies behind the last token stays as it was.
  for (int list = 0; list < p.batch * p.kv_heads && p.dtype != SCOUT_I8 && p.length % p.block; list++)
    for (int half = 0; half < 2; half++) {
      const uint8_t* tile = p.tile(list, p.blocks - 1) + half * p.tile_bytes / 2;
      for (int64_t at = p.length % p.block * p.dim * bytes_of(p.plain); at < p.tile_bytes / 2; at++)
        if (tile[at] != 0xff) return fail("%s: wrote behind the last token", p.text().c_str());
    }
}

Pages random_pages(Random& random) {
  const int block = random.pick<int>({4, 8, 16, 32, 64, 128}), dtype = random.pick<int>({0, 1, 2, 3, 3});
  const int plain = dtype == SCOUT_I8 ? random.pick<int>({0, 1, 2}) : dtype;
  const int dim = random.pick<int>({8, 20, 48, 64, 80, 128, 256});
  return Pages(block, dtype, plain, dim, 1 + (int)random.below(3), 1 + (int)random.below(3),
               1 + random.below(random.chance(10) ? 1500 : 4 * block));
}

void check_append(Random& random) {
  Pages bulk = random_pages(random);
  auto like = [&] {
    return Pages(bulk.block, bulk.dtype, bulk.plain, bulk.dim, bulk.kv_heads, bulk.batch, bulk.length);
  };
  const Source keys = make_source(bulk, random), values = make_source(bulk, random);
  if (append(bulk, keys, values, 0, bulk.length, 1) != SCOUT_OK) return fail("%s: refused", bulk.text().c_str());
  if (append(bulk, keys, values, bulk.length, bulk.length, 1) != SCOUT_OK)
    return fail("%s: no tokens are refused", bulk.text().c_str());
  check_pages(bulk, keys, values);
  const Pages single = like(), pieces = like(), team = like();
  for (int64_t t = 0; t < bulk.length; t++) append(single, keys, values, t, t + 1, 1);
  if (!(single == bulk)) fail("%s: one token at a time gives other pages", bulk.text().c_str());
  for (int64_t t = 0, last; t < bulk.length; t = last) {
    last = std::min(bulk.length, t + random.below(2 * bulk.block + 2));
    append(pieces, keys, values, t, last, 1);
  }
  if (!(pieces == bulk)) fail("%s: a few tokens at a time give other pages", bulk.text().c_str());
  append(team, keys, values, 0, bulk.length, 3);
  if (!(team == bulk)) fail("%s: three threads give other pages", bulk.text().c_str());

  // NaN and infinity go into a packed block and come out as something that cannot be overlooked.
  if (bulk.dtype != SCOUT_I8 || !bulk.blocks) return;
  for (double garbage : {(double)NAN, (double)INFINITY}) {
    const Pages spoilt = like();
    const int list = (int)random.below(bulk.batch * bulk.kv_heads), d = (int)random.below(bulk.dim);
    const int64_t t = random.below(bulk.blocks * bulk.block);
    auto spoil = [&](const Source& s, double x) {
      const int64_t at = list / bulk.kv_heads * s.strides[0] + list % bulk.kv_heads * s.strides[1] +
                         t * s.strides[2] + d;
      put(bulk.plain, s.bytes.at, at, x);
    };
    spoil(keys, garbage), spoil(values, garbage);
    append(spoilt, keys, values, 0, bulk.length, 1);
    const double was = keys.numbers[(size_t)((list * bulk.length + t) * bulk.dim + d)];
    spoil(keys, was), spoil(values, values.numbers[(size_t)((list * bulk.length + t) * bulk.dim + d)]);
    const Packed q(spoilt.tile(list, t / bulk.block), bulk.block, bulk.dim);
    if (get(SCOUT_BF16, q.key_scales, d) < INFINITY || get(SCOUT_BF16, q.value_scales, t % bulk.block) < INFINITY)
      fail("%s: %g in a key and a value disappears", bulk.text().c_str(), garbage);
  }
}

// -- pages into plain memory, bounds ---------------------------------------------------------------------------------

bool same_number(double a, double b) { return a == b || (a != a && b != b); }

double key_of(const Pages& p, int list, int64_t block, int t, int d) {
  if (p.dtype != SCOUT_I8) return get(p.plain, p.tile(list, block), (int64_t)t * p.dim + d);
  // bf16 times an integer of 8 bits is a float.
  return Packed(p.tile(list, block), p.block, p.dim).key_number(t, d);
}

double value_of(const Pages& p, int list, int64_t block, int t, int d) {
  if (p.dtype != SCOUT_I8) return get(p.plain, p.tile(list, block) + p.tile_bytes / 2, (int64_t)t * p.dim + d);
  return Packed(p.tile(list, block), p.block, p.dim).value_number(t, d);
}

void check_gather(Random& random) {
  Pages p = random_pages(random);
  append(p, make_source(p, random), make_source(p, random), 0, p.length, 1);
  const int lists = p.batch * p.kv_heads;
  const int64_t all = (p.length + p.block - 1) / p.block, count = random.below(2 * all + 1);
  Bytes blocks(lists * count * 8);
  for (int64_t at = 0; at < lists * count; at++) blocks.as<int64_t>()[at] = random.below(all);
  Bytes keys(lists * count * p.plain_bytes / 2), values(lists * count * p.plain_bytes / 2);
  scout_gather_args a = {};
  a.store = p.store(p.length);
  a.blocks = blocks.as<int64_t>(), a.count = count, a.keys = keys.at, a.values = values.at;
  use_team(1);
  if (scout_gather(&a, 1) != SCOUT_OK) fail("%s: refused", p.text().c_str());
  bool good = true;
  for (int64_t at = 0; at < lists * count; at++) {
    const int list = (int)(at / count);
    const int64_t block = blocks.as<int64_t>()[at], filled = std::min<int64_t>(p.block, p.length - block * p.block);
    const uint8_t* tail = p.tail.size ? p.tail.at + list * p.plain_bytes : nullptr;
    for (int64_t n = 0; n < filled * p.dim; n++) {
      const bool in_tail = p.dtype == SCOUT_I8 && block == p.blocks;
      const int t = (int)(n / p.dim), d = (int)(n % p.dim);
      const double key = in_tail ? get(p.plain, tail, n) : key_of(p, list, block, t, d);
      const double value = in_tail ? get(p.plain, tail + p.plain_bytes / 2, n) : value_of(p, list, block, t, d);
      good &= get(p.plain, keys.at, at * p.block * p.dim + n) == rounded(p.plain, key);
      good &= get(p.plain, values.at, at * p.block * p.dim + n) == rounded(p.plain, value);
    }
  }
  if (!good) fail("%s: other numbers than the pages hold", p.text().c_str());
  Bytes team_keys((int64_t)keys.size), team_values((int64_t)values.size);
  a.keys = team_keys.at, a.values = team_values.at;
  use_team(3);
  scout_gather(&a, 3);
  if (!(team_keys == keys) || !(team_values == values)) fail("%s: three threads differ", p.text().c_str());
}

void check_minmax(Random& random) {
  Pages p = random_pages(random);
  append(p, make_source(p, random), make_source(p, random), 0, p.length, 1);
  const int64_t whole = p.length / p.block, first = random.below(whole + 1);
  const int64_t last = first + random.below(whole - first + 1);
  const int code = 2 * p.dim;
  // Room for some blocks more than there are.
  const int64_t room = whole + random.below(3), head_stride = room * code + random.below(2);
  scout_minmax_args a = {};
  a.store = p.store(p.length);
  Bytes codes(((p.batch * p.kv_heads - 1) * head_stride + room * code) * bytes_of(p.plain));
  a.codes = codes.at, a.codes_head = head_stride, a.codes_row = p.kv_heads * head_stride;
  a.first = first, a.last = last;
  Bytes marks(p.batch * whole * p.block);
  const int kind = (int)random.below(3);
  for (size_t at = 0; at < marks.size; at++) marks.at[at] = !random.chance(kind == 1 ? 30 : 95);
  if (kind) a.padding_mask = marks.at, a.padding_mask_stride = whole * p.block;
  auto padding_mask = [&](int row, int64_t token) { return !kind || marks.at[row * whole * p.block + token]; };
  const int nan_list = random.chance(50) ? (int)random.below(p.batch * p.kv_heads) : -1;
  const int nan_channel = (int)random.below(p.dim);
  if (nan_list >= 0)
    for (int64_t block = first; block < last; block++) {
      const int64_t t = random.below(p.block);
      if (p.dtype == SCOUT_I8)
        put(SCOUT_BF16, Packed(p.tile(nan_list, block), p.block, p.dim).key_scales, nan_channel, NAN);
      else
        put(p.plain, p.tile(nan_list, block), t * p.dim + nan_channel, NAN);
    }
  use_team(1);
  if (scout_minmax(&a, 1) != SCOUT_OK) fail("%s: refused", p.text().c_str());
  Bytes want((int64_t)codes.size);
  for (int list = 0; list < p.batch * p.kv_heads; list++)
    for (int64_t block = first; block < last; block++)
      for (int d = 0; d < p.dim; d++) {
        double high = -INFINITY, low = INFINITY;
        bool garbage = false, seen = false;
        for (int t = 0; t < p.block; t++) {
          if (!padding_mask(list / p.kv_heads, block * p.block + t)) continue;
          const double key = key_of(p, list, block, t, d);
          seen = true, garbage |= key != key;
          high = std::max(high, key), low = std::min(low, key);
        }
        if (!seen) high = low = 0;
        if (garbage) high = low = NAN;
        const int64_t at = list * head_stride + block * code + d;
        put(p.plain, want.at, at, rounded(p.plain, high));
        put(p.plain, want.at, at + p.dim, rounded(p.plain, low));
      }
  for (int64_t at = 0; at < (int64_t)codes.size / bytes_of(p.plain); at++) {
    if (same_number(get(p.plain, codes.at, at), get(p.plain, want.at, at))) continue;
    fail("%s: blocks %lld to %lld, number %lld is %g, not %g", p.text().c_str(), (long long)first,
         (long long)last, (long long)at, get(p.plain, codes.at, at), get(p.plain, want.at, at));
    break;
  }
  Bytes team((int64_t)codes.size);
  a.codes = team.at;
  use_team(3);
  scout_minmax(&a, 3);
  if (!(team == codes)) fail("%s: three threads differ", p.text().c_str());
}

// -- selection -------------------------------------------------------------------------------------------------------

// INTEGERS have exact scores and many ties. SPREAD: a few digests are larger by many orders of magnitude, some scores
// nearly the largest and lowest that there are. NARROW: all lie within the smallest numbers.
enum Codes { INTEGERS, NORMAL_CODES, ALL_SAME, SPREAD, NARROW, NAN_CODES };

void check_select(Random& random) {
  const int dim = random.pick<int>({8, 16, 48, 64, 128}), group = random.pick<int>({1, 3, 4, 8});
  const int batch = 1 + (int)random.below(3), kv_heads = 1 + (int)random.below(3), lists = batch * kv_heads;
  const int block = random.pick<int>({8, 32}), code = 2 * dim;
  const int dtype = random.pick<int>({SCOUT_F32, SCOUT_F16, SCOUT_BF16});
  const int query_dtype = random.pick<int>({SCOUT_F32, SCOUT_F16, SCOUT_BF16});
  Codes kind = random.pick<Codes>({INTEGERS, INTEGERS, NORMAL_CODES, ALL_SAME, SPREAD, NARROW, NAN_CODES});
  if (kind == NARROW && dtype == SCOUT_F16) kind = NORMAL_CODES;
  const int many = dim > 64 ? 33 : dim > 16 ? 2048 : 5000;
  const int candidates = random.pick<int>({0, 1, 2, 7, 15, 16, 17, 65, 100, 300, 2049, many});
  auto some = [&] {
    return (int)random.pick<int>({0, 1, 2, candidates / 4, candidates / 2, std::max(0, candidates - 1), candidates,
                                  candidates + 3});
  };
  std::vector<int32_t> want((size_t)batch, (int32_t)some());
  const bool per_row = random.chance(60);
  if (per_row)
    for (int32_t& n : want) n = (int32_t)some();
  scout_select_args a = {};
  a.batch = batch, a.kv_heads = kv_heads, a.query_heads = kv_heads * group, a.head_dim = dim, a.block_size = block;
  a.query_dtype = query_dtype, a.code_dtype = dtype, a.code = a.codes_block = code, a.candidates = candidates;
  a.newest = (int)random.below(4), a.sinks = random.pick<int>({0, 0, 1, 2, 5});
  Bytes want_bytes(per_row ? batch * 4 : 0);
  for (size_t row = 0; row < (size_t)batch && per_row; row++) want_bytes.as<int32_t>()[row] = want[row];
  a.want = per_row ? want_bytes.as<int32_t>() : nullptr;
  a.count = per_row ? -7 : want[0];

  a.query_head = dim + random.below(3), a.query_row = a.query_heads * a.query_head + random.below(3);
  Bytes query(((batch - 1) * a.query_row + (a.query_heads - 1) * a.query_head + dim) * bytes_of(query_dtype));
  std::vector<double> weights((size_t)(lists * code), 0);
  for (int row = 0; row < batch; row++)
    for (int head = 0; head < a.query_heads; head++)
      for (int d = 0; d < dim; d++) {
        const double q = kind == INTEGERS ? (double)(random.below(7) - 3) : rounded(query_dtype, random.normal());
        put(query_dtype, query.at, row * a.query_row + head * a.query_head + d, q);
        double* w = &weights[(size_t)((row * kv_heads + head / group) * code)];
        (q > 0 ? w[d] : w[dim + d]) += q;
      }
  a.query = query.at;

  const int64_t room = candidates + random.below(3);
  a.codes_head = room * code + random.below(3), a.codes_row = kv_heads * a.codes_head;
  Bytes codes(candidates ? ((lists - 1) * a.codes_head + (int64_t)candidates * code) * bytes_of(dtype) : 0);
  a.codes = codes.at;
  std::vector<double> scores, sizes;
  for (int list = 0; list < lists; list++) {
    double total = 0;
    for (int d = 0; d < code; d++) total += fabs(weights[(size_t)(list * code + d)]);
    for (int i = 0; i < candidates; i++) {
      const bool outlier = random.chance(10);
      const double extreme = random.chance(50) ? 2.5e38 / total * (random.chance(50) ? 1 : -1) : 0;
      double score = 0, size = 0;
      for (int d = 0; d < code; d++) {
        double x = kind == INTEGERS ? (double)(random.below(7) - 3) : random.normal();
        if (kind == ALL_SAME) x = 1;
        if (kind == SPREAD && outlier) x *= dtype == SCOUT_F16 ? 1e4 : 1e33;
        if (kind == SPREAD && outlier && extreme != 0 && dtype != SCOUT_F16)
          x = weights[(size_t)(list * code + d)] > 0 ? extreme : -extreme;
        if (kind == NARROW) x *= 1e-39;
        if (kind == NAN_CODES && outlier && d == 5) x = NAN;
        x = rounded(dtype, x);
        put(dtype, codes.at, list * a.codes_head + (int64_t)i * code + d, x);
        score += weights[(size_t)(list * code + d)] * x;
        size += fabs(weights[(size_t)(list * code + d)] * x);
      }
      scores.push_back(score), sizes.push_back(size);
    }
  }

  const int marks_kind = (int)random.below(3);
  Bytes marks((int64_t)batch * candidates * block);
  for (size_t at = 0; at < marks.size; at++) {
    const int64_t row = (int64_t)at / (candidates * block), i = (int64_t)at / block % candidates;
    const bool gone = marks_kind == 1 ? i < candidates / 3 + row : random.chance(90) || (i + row) % 4 == 0;
    marks.at[at] = gone ? 0 : 1;
  }
  if (marks_kind) a.padding_mask = marks.at, a.padding_mask_stride = (int64_t)candidates * block;
  auto padding_mask = [&](int row, int i) {
    const uint8_t* from = marks.at + ((int64_t)row * candidates + i) * block;
    return !marks_kind || std::any_of(from, from + block, [](uint8_t mark) { return mark; });
  };

  const int64_t most = std::min(*std::max_element(want.begin(), want.end()), candidates) + a.newest;
  a.blocks_stride = most + random.below(2);
  Bytes blocks(lists * a.blocks_stride * 4), counts(lists * 4), given((int64_t)lists * candidates * 4);
  a.blocks = blocks.as<int32_t>(), a.counts = counts.as<int32_t>(), a.scores = given.as<float>();

  char text[300];
  snprintf(text, sizeof text,
           "codes %d %s query %s group %d dim %d candidates %d want %d sinks %d newest %d marks %d batch %d", kind,
           DTYPES[dtype], DTYPES[query_dtype], group, dim, candidates, want[0], a.sinks,
           a.newest, marks_kind, batch);
  use_team(1);
  if (scout_select(&a, 1) != SCOUT_OK) return fail("%s: refused", text);
  for (int list = 0; list < lists; list++) {
    const int row = list / kv_heads, wanted = std::min(want[(size_t)row], candidates);
    int sinks = std::min(a.sinks, wanted);
    std::vector<double> ranks;
    for (int i = 0; i < candidates; i++) {
      const size_t at = (size_t)(list * candidates + i);
      const double score = scores[at], is = given.as<float>()[at];
      if (score != score ? is == is : !(fabs(is - score) <= 2e-6 * sizes[at] + 1e-44))
        return fail("%s: list %d block %d has score %g, not %g", text, list, i, is, score);
      // Padding is never chosen; the first blocks always are; NaN must not hide in a block that is never read. Exact
      // where scores can be, otherwise by the library's own, since near ties are anybody's.
      const bool here = padding_mask(row, i), first = here && sinks > 0;
      sinks -= first;
      ranks.push_back(!here ? -INFINITY : first || score != score ? INFINITY : kind == INTEGERS ? score : is);
    }
    std::vector<int32_t> order;
    for (int32_t i = 0; i < candidates; i++)
      if (ranks[(size_t)i] > -INFINITY) order.push_back(i);
    std::stable_sort(order.begin(), order.end(),
                     [&](int32_t x, int32_t y) { return ranks[(size_t)x] > ranks[(size_t)y]; });
    if ((int)order.size() > wanted) order.resize((size_t)wanted);
    std::sort(order.begin(), order.end());
    for (int i = 0; i < a.newest; i++) order.push_back(candidates + i);
    const int count = counts.as<int32_t>()[list];
    if (count != (int)order.size())
      return fail("%s: list %d has %d blocks, not %zu", text, list, count, order.size());
    if (count && memcmp(order.data(), a.blocks + list * a.blocks_stride, order.size() * 4))
      return fail("%s: list %d has other blocks", text, list);
  }
  const Bytes was = blocks.copy(), was_counts = counts.copy(), was_scores = given.copy();
  for (int threads : {2, 3}) {
    use_team(threads);
    memset(blocks.at, 0xff, blocks.size);
    scout_select(&a, threads);
    if (!(blocks == was) || !(counts == was_counts) || !(given == was_scores))
      fail("%s: %d threads choose otherwise", text, threads);
    a.scores = nullptr;  // need not be wanted
  }
}

// What blocks of one list are ranked by, from the scores that the library gave: SIGN, the log2 of the mean over the
// group of each block's share of its head's mass. -inf for padding.
std::vector<double> ranks_of(const scout_select_args& a, int list, const std::vector<float>& scores) {
  const int heads = a.scorer == SCOUT_SIGN ? a.query_heads / a.kv_heads : 1;
  const auto real = [&](int i) {
    if (!a.padding_mask) return true;
    const uint8_t* from = a.padding_mask + list / a.kv_heads * a.padding_mask_stride + (int64_t)i * a.block_size;
    return std::any_of(from, from + a.block_size, [](uint8_t mark) { return mark; });
  };
  std::vector<double> ranks((size_t)a.candidates, -INFINITY), all((size_t)heads, -INFINITY);
  auto score = [&](int g, int i) -> double { return scores[(size_t)((list * heads + g) * a.candidates + i)]; };
  auto added = [](double x, double y) {
    const double top = std::max(x, y);
    return top == -INFINITY ? top : top + log2(exp2(x - top) + exp2(y - top));
  };
  for (int i = 0; i < a.candidates; i++) {
    if (!real(i)) continue;
    ranks[(size_t)i] = score(0, i);
    for (int g = 0; g < heads; g++) all[(size_t)g] = added(all[(size_t)g], score(g, i));
  }
  for (double& rank : ranks) {
    if (a.scorer != SCOUT_SIGN || rank == -INFINITY) continue;
    const int i = (int)(&rank - ranks.data());
    rank = -INFINITY;
    for (int g = 0; g < heads; g++) {
      const double share = score(g, i) - all[(size_t)g];
      rank = rank != rank || share != share ? NAN : added(rank, share);
    }
    rank -= log2(heads);
  }
  return ranks;
}

// Whether a list has the right blocks: exactly those of the highest ranks, or, where ranks come from float arithmetic,
// others of nearly the same rank. Any blocks if ranks are NaN.
bool right_choice(const scout_select_args& a, int list, std::vector<double> ranks, double near) {
  std::vector<int32_t> order;
  int sinks = std::min(a.sinks, a.count);
  bool known = true;
  for (int32_t i = 0; i < a.candidates; i++) {
    double& rank = ranks[(size_t)i];
    if (rank == -INFINITY) continue;
    order.push_back(i);
    known = known && rank == rank;
    if (sinks-- > 0) rank = INFINITY;
    if (rank != rank) rank = 0;
  }
  std::stable_sort(order.begin(), order.end(),
                   [&](int32_t x, int32_t y) { return ranks[(size_t)x] > ranks[(size_t)y]; });
  const size_t wanted = std::min((size_t)a.count, order.size());
  const int32_t* got = a.blocks + list * a.blocks_stride;
  if (a.counts[list] != (int)wanted + a.newest) return false;
  for (int i = 0; i < a.newest; i++)
    if (got[wanted + (size_t)i] != a.candidates + i) return false;
  std::vector<bool> chosen((size_t)a.candidates);
  for (size_t i = 0; i < wanted; i++) {
    if (got[i] < 0 || got[i] >= a.candidates || (i && got[i] <= got[i - 1])) return false;
    chosen[(size_t)got[i]] = true;
  }
  const double least = wanted ? ranks[(size_t)order[wanted - 1]] : 0;
  for (size_t i = 0; i < order.size(); i++) {
    const double rank = ranks[(size_t)order[i]];
    if (chosen[(size_t)order[i]] == (i < wanted)) continue;
    if (rank == INFINITY || (known && !(near > 0 && fabs(rank - least) <= near))) return false;
  }
  return std::count(chosen.begin(), chosen.end(), true) == (int64_t)wanted &&
         std::none_of(got, got + wanted, [&](int32_t i) { return ranks[(size_t)i] == -INFINITY; });
}

// Runs a selection with scores given, by several numbers of threads: always the same, and the lists scores ask for.
std::vector<float> scores_of(scout_select_args a, const std::string& text) {
  const int lists = a.batch * a.kv_heads, heads = a.scorer == SCOUT_SIGN ? a.query_heads / a.kv_heads : 1;
  a.blocks_stride = std::min(a.count, a.candidates) + a.newest;
  std::vector<float> scores;
  Bytes first;
  for (int threads : {1, 2, 3}) {
    Bytes blocks(lists * a.blocks_stride * 4), counts(lists * 4), given((int64_t)lists * heads * a.candidates * 4);
    a.blocks = blocks.as<int32_t>(), a.counts = counts.as<int32_t>(), a.scores = given.as<float>();
    use_team(threads);
    const int status = scout_select(&a, threads);
    if (status != SCOUT_OK) return fail("%s: status %d", text.c_str(), status), std::vector<float>();
    if (threads == 1) scores.assign(given.as<float>(), given.as<float>() + (int64_t)lists * heads * a.candidates);
    if (given.size && memcmp(scores.data(), given.at, given.size)) fail("%s: %d threads differ", text.c_str(), threads);
    double size = 0;
    for (float score : scores)
      if (fabs(score) > size) size = fabs(score);
    for (int list = 0; list < lists && threads == 1; list++)
      if (!right_choice(a, list, ranks_of(a, list, scores), a.scorer == SCOUT_SIGN ? 1e-4 + 1e-6 * size : 0))
        fail("%s: list %d has other blocks than the scores ask for", text.c_str(), list);
    if (threads == 1)
      first = blocks.copy();
    else if (!(first == blocks))
      fail("%s: %d threads choose otherwise", text.c_str(), threads);
  }
  return scores;
}

scout_select_args some_selection(Random& random, int candidates) {
  scout_select_args a = {};
  a.batch = 1 + (int)random.below(2), a.kv_heads = 1 + (int)random.below(2), a.candidates = candidates;
  a.count = random.pick<int>({0, 1, candidates / 3, candidates, candidates + 2});
  a.newest = (int)random.below(3), a.sinks = random.pick<int>({0, 0, 2});
  return a;
}

Bytes some_query(scout_select_args& a, Random& random, double size) {
  a.query_dtype = random.pick<int>({SCOUT_F32, SCOUT_F32, SCOUT_BF16});
  a.query_head = a.head_dim + random.below(3), a.query_row = a.query_heads * a.query_head + random.below(3);
  const int64_t numbers = (a.batch - 1) * a.query_row + (a.query_heads - 1) * a.query_head + a.head_dim;
  Bytes query(numbers * bytes_of(a.query_dtype));
  for (int row = 0; row < a.batch; row++)
    for (int head = 0; head < a.query_heads; head++)
      for (int d = 0; d < a.head_dim; d++)
        put(a.query_dtype, query.at, row * a.query_row + head * a.query_head + d,
            rounded(a.query_dtype, size * random.normal()));
  a.query = query.at;
  return query;
}

// What the library takes for 2^x and for the logarithm.
double straight_power(double x) { return ldexp(1 + x - floor(x), (int)floor(x)); }
double straight_log(double x) {
  int exponent;
  const double part = frexp(x, &exponent);
  return exponent - 1 + (2 * part - 1);
}

void check_signs(Random& random) {
  const int block = random.pick<int>({8, 16, 16, 32, 32, 64, 128, 256});
  const int dim = random.pick<int>({8, 16, 24, 32, 40, 64, 80, 104, 128, 128, 136, 256, 512, 576});
  const int group = random.pick<int>({1, 2, 3, 4, 5, 6, 7, 8, 16, 17});
  const int many = block * dim * group <= 16 * 64 * 4 ? random.pick<int>({513, 2051}) : 19;
  scout_select_args a = some_selection(random, random.pick<int>({0, 1, 2, 3, 4, 7, 8, 9, 15, 17, many}));
  const int lists = a.batch * a.kv_heads;
  a.scorer = SCOUT_SIGN, a.code_dtype = SCOUT_I8, a.head_dim = dim, a.block_size = block;
  a.query_heads = a.kv_heads * group, a.code = block * (dim / 8 + 1);
  a.codes_block = a.code + random.below(3);  // something else may lie between two codes
  // Of exponents: no more than 120, or far more than floats hold.
  const bool large = random.chance(30);
  const double size = random.chance(5) ? 0 : (large ? 100 : 1.5) / sqrt(dim);
  const Bytes query = some_query(a, random, size);
  const bool garbage = random.chance(5);
  if (garbage) put(a.query_dtype, query.at, (group - 1) * a.query_head + dim - 1, NAN);  // the first list's last head
  // Padding at the left, or anywhere.
  const int padding = (int)random.below(3);
  Bytes marks(padding ? (int64_t)a.batch * a.candidates * block : 0);
  for (size_t at = 0; at < marks.size; at++) {
    const int64_t row = (int64_t)at / (a.candidates * block), i = (int64_t)at / block % a.candidates;
    marks.at[at] = padding == 1 ? i > a.candidates / 4 + row || (i == a.candidates / 4 + row && at % 8 == 7)
                                : (i + row) % 3 != 1 && random.chance(30);
  }
  if (padding) a.padding_mask = marks.at, a.padding_mask_stride = (int64_t)a.candidates * block;
  const int64_t room = a.candidates + random.below(3);
  a.codes_head = room * a.codes_block + random.below(3), a.codes_row = a.kv_heads * a.codes_head + random.below(3);
  const int64_t last = (a.batch - 1) * a.codes_row + (a.kv_heads - 1) * a.codes_head;
  Bytes codes(a.candidates ? last + (a.candidates - 1) * a.codes_block + a.code : 0);
  a.codes = codes.at;
  for (size_t i = 0; i < codes.size; i++) codes.at[i] = (uint8_t)random.next();
  auto q = [&](int list, int g, int d) {
    const int64_t row = list / a.kv_heads, head = list % a.kv_heads * group + g;
    return get(a.query_dtype, a.query, row * a.query_row + head * a.query_head + d);
  };
  auto code_of = [&](int list, int i) {
    return codes.at + list / a.kv_heads * a.codes_row + list % a.kv_heads * a.codes_head + (int64_t)i * a.codes_block;
  };
  for (int list = 0; list < lists; list++)
    for (int i = 0; i < a.candidates; i++) {
      uint8_t* code = code_of(list, i);
      // Scales from 0.5 to 4, or from nearly nothing to 16.
      for (int t = 0; t < block; t++)
        code[dim / 8 * block + t] = (uint8_t)(large ? random.below(176) : 96 + random.below(48));
      // Tokens that all agree with one query, or all disagree, have sums at the ends of their range.
      // Blocks of only padding agree with the first head, which must not lose its say by that.
      const uint8_t* from = padding ? marks.at + ((int64_t)(list / a.kv_heads) * a.candidates + i) * block : nullptr;
      const bool gone = padding && std::none_of(from, from + block, [](uint8_t mark) { return mark; });
      const int kind = gone ? 0 : (int)random.below(6), g = gone ? 0 : (int)random.below(group);
      for (int t = 0; t < block && kind < 2; t++)
        for (int d = 0; d < dim; d++) {
          uint8_t& byte = code[d / 8 * block + t];
          byte = (uint8_t)((byte & ~(1 << d % 8)) | ((q(list, g, d) >= 0) == (kind == 0)) << d % 8);
        }
    }
  char text[200];
  snprintf(text, sizeof text, "block %d dim %d group %d batch %d kv_heads %d candidates %d size %g", block, dim, group,
           a.batch, a.kv_heads, a.candidates, size);
  std::vector<double> want((size_t)(lists * group * a.candidates)), loose = want;
  std::vector<double> most((size_t)(lists * group), -INFINITY);
  for (int list = 0; list < lists; list++)
    for (int g = 0; g < group; g++) {
      if (garbage && list == 0 && g == group - 1) continue;
      double peak = 0;
      for (int d = 0; d < dim; d += 4) {
        double all = 0;
        for (int k = d; k < d + 4; k++) all += fabs(q(list, g, k));
        peak = std::max(peak, all);
      }
      const double unit = peak / 127;
      for (int i = 0; i < a.candidates; i++) {
        const uint8_t* code = code_of(list, i);
        std::vector<double> exponents, moves;
        for (int t = 0; t < block; t++) {
          int middles = 0;  // parts so near the middle between two numbers that float may round them the other way
          const int byte = code[dim / 8 * block + t];
          const double scale = ldexp(16 + byte % 16, byte / 16 - 11);
          double sum = 0;
          for (int d = 0; d < dim && unit > 0; d += 4) {
            double part = 0;
            for (int k = d; k < d + 4; k++)
              part += code[k / 8 * block + t] >> k % 8 & 1 ? q(list, g, k) : -q(list, g, k);
            sum += nearbyint(part / unit);
            middles += fabs(part / unit - floor(part / unit) - 0.5) < 1e-4;
          }
          exponents.push_back(scale * unit * sum), moves.push_back(scale * unit * middles);
        }
        auto score_of = [&](double way) {
          std::vector<double> all = exponents;
          for (int t = 0; t < block; t++) all[(size_t)t] += way * moves[(size_t)t];
          const double top = floor(*std::max_element(all.begin(), all.end()));
          double mass = 0;
          for (double x : all) mass += straight_power(std::max(x - top, -500.0));
          return straight_log(mass) + top;
        };
        const size_t head = (size_t)(list * group + g), at = head * (size_t)a.candidates + (size_t)i;
        want[at] = score_of(0);
        loose[at] = 1.01 * std::max(want[at] - score_of(-1), score_of(1) - want[at]) + 1e-4 + 1e-6 * fabs(want[at]);
        most[head] = std::max(most[head], want[at]);
      }
    }
  for (int isa : isas) {
    scout_use_isa(isa);
    const std::vector<float> scores = scores_of(a, text);
    for (size_t at = 0; at < scores.size(); at++) {
      const size_t head = at / (size_t)a.candidates;
      const double score = scores[at], top = most[head];
      if (garbage && (int)head == group - 1) {
        if (score == score) return fail("%s: head %d scores %g with garbage in its query", text, group - 1, score);
        continue;
      }
      // Far below the best block of a head all that counts is that it is far below.
      const bool exact = !large || (top > -30 && want[at] > top - 20);
      if (!exact && top <= -30) continue;
      if (exact ? fabs(score - want[at]) <= loose[at] : score <= std::max(top - 19, want[at]) + loose[at]) continue;
      return fail("%s: head %d, block %d scores %g, not %g", text, (int)head, (int)at % a.candidates, score, want[at]);
    }
  }
}

// The largest logit of a block's tokens by the first `dim` dimensions of a code of `rows` rows, in the few steps that a
// first choice takes: sums of a token in -127 to 127, and scales of 4 bits times a power of two. NAN if float may round
// a summand the other way.
double peak_of(const uint8_t* code, int block, int rows, int dim, const std::vector<double>& query) {
  double all = 0;
  for (int d = 0; d < dim; d++) all += fabs(query[(size_t)d]);
  const double unit = all / (127 - dim / 8);
  if (all < 1e-30) return 0;
  int64_t most = INT64_MIN;
  for (int t = 0; t < block; t++) {
    int64_t sum = 0;
    for (int d = 0; d < dim; d += 4) {
      double part = 0;
      for (int k = d; k < d + 4; k++)
        part += code[k / 8 * block + t] >> k % 8 & 1 ? query[(size_t)k] : -query[(size_t)k];
      if (fabs(part / unit - floor(part / unit) - 0.5) < 1e-5) return NAN;
      sum += (int64_t)nearbyint(part / unit);
    }
    const int byte = code[rows * block + t], power = std::min(std::max(byte / 16 - 3, 0), 8);
    const int64_t product = sum * 256 * (16 + byte % 16) * (power < 8 ? 1 << power : 255) * 4;
    most = std::max(most, product >> 16);
  }
  return (double)most * unit / 4;
}

// Blocks are ranked by the first dimensions as if there were no others; among the best of these, they are chosen as if
// there were no other blocks.
void check_coarse(Random& random) {
  const int block = random.pick<int>({16, 32, 64, 128}), dim = random.pick<int>({8, 24, 64, 80, 128});
  const int group = random.pick<int>({1, 2, 3, 4, 5, 17}), rows = dim / 8 + 1;
  scout_select_args a = some_selection(random, random.pick<int>({1, 2, 7, 15, 16, 17, 33, 70}));
  const int lists = a.batch * a.kv_heads, first_rows = 1 + (int)random.below(rows - 1);
  a.scorer = SCOUT_SIGN, a.code_dtype = SCOUT_I8, a.head_dim = dim, a.block_size = block;
  a.query_heads = a.kv_heads * group, a.code = block * rows, a.codes_block = a.code + random.below(3);
  a.fine = 1 + (int)random.below(a.candidates), a.coarse_dim = 8 * first_rows;
  const Bytes query = some_query(a, random, 1.5 / sqrt(dim));
  const bool padded = random.chance(40);
  Bytes marks(padded ? (int64_t)a.batch * a.candidates * block : 0);
  for (size_t at = 0; at < marks.size; at++) marks.at[at] = (int64_t)at / block % a.candidates > a.candidates / 4;
  if (padded) a.padding_mask = marks.at, a.padding_mask_stride = (int64_t)a.candidates * block;
  a.codes_head = a.candidates * a.codes_block + random.below(3), a.codes_row = a.kv_heads * a.codes_head;
  const int last_row = a.batch - 1, last_head = a.kv_heads - 1;
  Bytes codes(last_row * a.codes_row + last_head * a.codes_head + (a.candidates - 1) * a.codes_block + a.code);
  for (size_t i = 0; i < codes.size; i++) codes.at[i] = (uint8_t)random.next();
  a.codes = codes.at;
  auto code_of = [&](int list, int i) {
    return codes.at + list / a.kv_heads * a.codes_row + list % a.kv_heads * a.codes_head + i * a.codes_block;
  };
  std::vector<float> scores((size_t)(lists * group * a.candidates));
  std::vector<bool> unsure((size_t)lists);
  for (int list = 0; list < lists; list++)
    for (int g = 0; g < group; g++) {
      std::vector<double> q((size_t)a.coarse_dim);
      const int64_t from = list / a.kv_heads * a.query_row + (list % a.kv_heads * group + g) * a.query_head;
      for (int d = 0; d < a.coarse_dim; d++) q[(size_t)d] = get(a.query_dtype, a.query, from + d);
      for (int i = 0; i < a.candidates; i++) {
        uint8_t* code = code_of(list, i);
        for (int t = 0; t < block && !g; t++)
          code[(rows - 1) * block + t] = (uint8_t)(random.chance(90) ? 96 + random.below(48) : random.next());
        const double peak = peak_of(code, block, rows - 1, a.coarse_dim, q);
        scores[(size_t)((list * group + g) * a.candidates + i)] = (float)peak;
        if (peak != peak) unsure[(size_t)list] = true;
      }
    }
  char text[200];
  snprintf(text, sizeof text, "block %d dim %d of %d group %d batch %d kv_heads %d candidates %d fine %d count %d sinks %d",
           block, a.coarse_dim, dim, group, a.batch, a.kv_heads, a.candidates, a.fine, a.count, a.sinks);
  a.blocks_stride = std::min(a.count, a.candidates) + a.newest;
  for (int isa : isas) {
    scout_use_isa(isa);
    Bytes blocks(lists * a.blocks_stride * 4), counts(lists * 4);
    a.blocks = blocks.as<int32_t>(), a.counts = counts.as<int32_t>();
    use_team(2);
    if (scout_select(&a, 2) != SCOUT_OK) return fail("%s: refused", text);
    for (int list = 0; list < lists; list++) {
      if (unsure[(size_t)list]) continue;
      std::vector<double> ranks = ranks_of(a, list, scores);
      std::vector<int32_t> order;
      int sinks = std::min(a.sinks, a.fine);
      for (int32_t i = 0; i < a.candidates; i++) {
        if (ranks[(size_t)i] == -INFINITY) continue;
        if (sinks-- > 0) ranks[(size_t)i] = INFINITY;
        order.push_back(i);
      }
      std::stable_sort(order.begin(), order.end(),
                       [&](int32_t x, int32_t y) { return ranks[(size_t)x] > ranks[(size_t)y]; });
      const size_t fine = std::min((size_t)a.fine, order.size());
      if (fine < order.size() && fabs(ranks[(size_t)order[fine - 1]] - ranks[(size_t)order[fine]]) < 1e-3) continue;
      order.resize(fine);
      std::sort(order.begin(), order.end());
      scout_select_args few = a;
      Bytes some((int64_t)fine * a.code), some_marks(padded ? (int64_t)fine * block : 0), found(a.blocks_stride * 4), n(4);
      for (size_t i = 0; i < fine; i++) {
        memcpy(some.at + i * (size_t)a.code, code_of(list, order[i]), (size_t)a.code);
        if (padded) memset(some_marks.at + i * (size_t)block, 1, (size_t)block);
      }
      few.fine = 0, few.batch = few.kv_heads = 1, few.query_heads = group, few.candidates = (int)fine;
      few.codes = some.at, few.codes_block = a.code, few.codes_head = few.codes_row = (int64_t)fine * a.code;
      few.padding_mask = padded ? some_marks.at : nullptr;
      few.query = (const uint8_t*)a.query + (list / a.kv_heads * a.query_row + list % a.kv_heads * group * a.query_head) *
                                                bytes_of(a.query_dtype);
      few.blocks = found.as<int32_t>(), few.counts = n.as<int32_t>();
      if (scout_select(&few, 1) != SCOUT_OK) return fail("%s: refused", text);
      const int32_t chosen = few.counts[0] - a.newest, *got = a.blocks + list * a.blocks_stride;
      bool right = a.counts[list] == few.counts[0];
      for (int32_t i = 0; right && i < chosen; i++) right = got[i] == order[(size_t)few.blocks[i]];
      for (int32_t i = 0; right && i < a.newest; i++) right = got[chosen + i] == a.candidates + i;
      if (!right) return fail("%s: list %d has other blocks", text, list);
    }
  }
}

void check_dots(Random& random) {
  const int numbers = random.pick<int>({8, 16, 48, 64, 256, 512, 576}), parts = random.pick<int>({1, 1, 2, 4, 8});
  const int dtype = random.pick<int>({SCOUT_I8, SCOUT_I8, SCOUT_F32, SCOUT_BF16, SCOUT_F16, SCOUT_I4_CODES});
  const bool packed = dtype == SCOUT_I4_CODES;
  scout_select_args a = some_selection(random, random.pick<int>({0, 1, 2, 3, 7, 15, 17, 70, 300}));
  const int lists = a.batch * a.kv_heads;
  a.scorer = packed ? SCOUT_DOTS4 : SCOUT_DOTS, a.code_dtype = packed ? (int)SCOUT_I8 : dtype;
  a.head_dim = numbers, a.query_heads = a.kv_heads, a.code = a.codes_block = numbers * parts / (packed ? 2 : 1), a.block_size = 32;
  const Bytes query = some_query(a, random, 1);
  a.codes_head = (a.candidates + random.below(3)) * a.code + random.below(3), a.codes_row = a.kv_heads * a.codes_head;
  const int64_t all = a.candidates ? (lists - 1) * a.codes_head + (int64_t)a.candidates * a.code : 0;
  Bytes codes(all * bytes_of(a.code_dtype));
  a.codes = codes.at;
  for (int64_t i = 0; i < all; i++)
    if (a.code_dtype == SCOUT_I8)
      codes.at[i] = (uint8_t)random.next();
    else
      put(dtype, codes.at, i, rounded(dtype, random.normal()));
  char text[200];
  snprintf(text, sizeof text, "%d x %d numbers of type %d, batch %d kv_heads %d candidates %d", parts, numbers, dtype,
           a.batch, a.kv_heads, a.candidates);
  auto number = [&](int64_t first, int64_t i) -> double {
    if (a.code_dtype != SCOUT_I8) return get(dtype, codes.at, first + i);
    if (!packed) return (int8_t)codes.at[first + i];
    const int byte = codes.at[first + i / 2], nibble = i % 2 ? byte >> 4 : byte & 15;
    return nibble - (nibble & 8 ? 16 : 0);
  };
  for (int isa : isas) {
    scout_use_isa(isa);
    const std::vector<float> scores = scores_of(a, text);
    for (size_t at = 0; at < scores.size(); at++) {
      const int list = (int)at / a.candidates;
      const int64_t first = list * a.codes_head + (int64_t)((int)at % a.candidates) * a.code;
      const int64_t from = list / a.kv_heads * a.query_row + list % a.kv_heads * a.query_head;
      double best = -INFINITY, size = 0;
      for (int part = 0; part < parts; part++) {
        double sum = 0;
        for (int n = 0; n < numbers; n++) {
          const double product = number(first, part * numbers + n) * get(a.query_dtype, a.query, from + n);
          sum += product, size += fabs(product);
        }
        best = std::max(best, sum);
      }
      if (!(fabs(scores[at] - best) <= 1e-6 * size))
        return fail("%s: list %d, block %d scores %g, not %g", text, list, (int)at % a.candidates, (double)scores[at],
                    best);
    }
  }
}

void check_select_refusals() {
  for (int isa : isas) {
    scout_use_isa(isa);
    auto answers = [&](const char* what, int scorer, void (*change)(scout_select_args&)) {
      scout_select_args a = {};
      a.scorer = scorer, a.batch = 1, a.kv_heads = a.query_heads = 2, a.head_dim = 64, a.block_size = 32;
      a.code_dtype = scorer == SCOUT_MINMAX ? SCOUT_BF16 : SCOUT_I8;
      Bytes query(2 * 64 * 4);
      memset(query.at, 0, query.size);
      a.query = query.at, a.query_head = 64;
      a.code = scorer == SCOUT_SIGN ? 32 * 9 : scorer == SCOUT_MINMAX ? 128 : scorer == SCOUT_DOTS ? 64 : 32;
      int32_t counts[2] = {7, 7};
      a.counts = counts;
      if (scout_select(&a, 1) != SCOUT_OK || counts[0] || counts[1]) fail("scorer %d is refused", scorer);
      change(a);
      if (scout_select(&a, 1) != SCOUT_UNSUPPORTED) fail("%s is taken by scorer %d", what, a.scorer);
    };
    for (int scorer : {SCOUT_MINMAX, SCOUT_SIGN, SCOUT_DOTS, SCOUT_DOTS4}) {
      answers("another scorer", scorer, [](scout_select_args& a) { a.scorer = a.scorer == SCOUT_DOTS4 ? 4 : -1; });
      answers("code 33", scorer, [](scout_select_args& a) { a.code = 33; });
      answers("no KV heads", scorer, [](scout_select_args& a) { a.kv_heads = 0; });
      answers("3 query heads to 2", scorer, [](scout_select_args& a) { a.query_heads = 3; });
      answers("head_dim 0", scorer, [](scout_select_args& a) { a.head_dim = 0; });
    }
    answers("int8", SCOUT_MINMAX, [](scout_select_args& a) { a.code_dtype = SCOUT_I8; });
    answers("bf16", SCOUT_SIGN, [](scout_select_args& a) { a.code_dtype = SCOUT_BF16; });
    answers("head_dim 584", SCOUT_SIGN, [](scout_select_args& a) { a.head_dim = 584, a.code = 32 * 74; });
    answers("head_dim 60", SCOUT_SIGN, [](scout_select_args& a) { a.head_dim = 60, a.code = 32 * 8; });
    answers("block size 512", SCOUT_SIGN, [](scout_select_args& a) { a.block_size = 512, a.code = 512 * 9; });
    answers("no block size", SCOUT_SIGN, [](scout_select_args& a) { a.block_size = 0, a.code = 0; });
    answers("a group", SCOUT_DOTS, [](scout_select_args& a) { a.query_heads = 4; });
    answers("bf16", SCOUT_DOTS4, [](scout_select_args& a) { a.code_dtype = SCOUT_BF16; });
    answers("1160 numbers", SCOUT_DOTS, [](scout_select_args& a) { a.head_dim = a.code = 1160; });
  }
}

// -- the rest --------------------------------------------------------------------------------------------------------

void check_interface(Random& random) {
  if (scout_abi() != SCOUT_ABI) fail("the library has another interface");
  for (int dtype : {SCOUT_F32, SCOUT_F16, SCOUT_BF16, SCOUT_I8})
    for (int block : {4, 8, 16, 32, 64, 100, 128, 256})
      for (int dim : {8, 16, 48, 64, 80, 96, 128, 192, 256, 512, 576})
        if (scout_tile_bytes(dtype, block, dim) != expected_tile_bytes(dtype, block, dim))
          fail("tile of %s, block %d, head_dim %d", DTYPES[dtype], block, dim);
  if (scout_use_isa(-1) == SCOUT_OK || scout_use_isa(scout_isa_count()) == SCOUT_OK) fail("an unknown ISA is taken");
  // Every half there is, read and written: the bounds of a block of one number.
  for (int dtype : {SCOUT_F16, SCOUT_BF16})
    for (int first = 0; first < 65536; first += 256) {
      Pages p(4, dtype, dtype, 256, 1, 1, 4);
      for (int at = 0; at < 1024; at++) ((uint16_t*)p.tile(0, 0))[at] = (uint16_t)(first + at % 256);
      Bytes codes(512 * 2);
      scout_minmax_args a = {};
      a.store = p.store(4), a.codes = codes.at, a.last = 1;
      scout_minmax(&a, 1);
      for (int d = 0; d < 512; d++)
        if (!same_number(get(dtype, codes.at, d), get(dtype, p.tile(0, 0), d % 256)))
          return fail("%s %04x is read or written wrongly", DTYPES[dtype], first + d % 256);
    }
  // The yardsticks read what they should and nothing else.
  for (int isa : isas) {
    scout_use_isa(isa);
    for (int dtype : {SCOUT_BF16, SCOUT_I8}) {
      Case c;
      c.dtype = dtype, c.lists = EVERYTHING, c.length = 2100, c.batch = 1;
      World w(c, random);
      scout_read_tiles(&w.args, 1);
    }
    Bytes span(100003);
    if (!scout_read_span(span.at, (int64_t)span.size, 1)) fail("a span is not read");
  }
}

void print_table() {
  printf("\nlargest errors, of max(1, |x|); out in f32\n%-28s %8s %8s %12s %8s %12s %8s %9s %12s\n", "", "out", "lse",
         "softcap out", "lse", "scores~200", "lse", "of bound", "unquantised");
  for (const auto& line : table) {
    const Worst& w = line.second;
    printf("%-28s %8.1e %8.1e %12.1e %8.1e %12.1e %8.1e %9.2f", line.first.c_str(), w.out[0], w.lse[0], w.out[1],
           w.lse[1], w.out[2], w.lse[2], w.of_bound);
    if (w.unquantised > 0) printf(" %12.1e", w.unquantised);
    printf("\n");
  }
}

}  // namespace

int main(int count, char** words) {
  int cases = 1000;
  bool full = false;
  uint64_t seed = 1;
  int64_t only_case = -1;
  std::string only_isa, only_part;
  for (int i = 1; i < count; i++) {
    const std::string word = words[i];
    const char* value = i + 1 < count ? words[i + 1] : "";
    if (word == "--full")
      full = true;
    else if (word == "--cases")
      cases = atoi(value), i++;
    else if (word == "--seed")
      seed = strtoull(value, nullptr, 10), i++;
    else if (word == "--isa")
      only_isa = value, i++;
    else if (word == "--part")
      only_part = value, i++;
    else if (word == "--case")
      only_case = atoll(value), i++;
    else
      return printf("unknown option %s\n", words[i]), 2;
  }
  for (int i = 0; i < scout_isa_count(); i++)
    if (only_isa.empty() || only_isa == scout_isa_name(i)) isas.push_back(i);
  if (isas.empty()) return printf("this machine has no %s\n", only_isa.c_str()), 2;
#if defined(GRID_CATCHES_CRASHES)
  signal(SIGSEGV, crashed);
  signal(SIGBUS, crashed);
#endif
  openmp = openmp_team();
  pool = scout_pool_create(2, nullptr, 0, 20);
  printf("%s, seed %llu, %s:", full ? "full grid" : "sample", (unsigned long long)seed,
         openmp ? "OpenMP and std::thread" : "std::thread");
  for (int isa : isas) printf(" %s", scout_isa_name(isa));
  printf("\n");
  fflush(stdout);

  auto part = [&](const char* name, int64_t number, auto body) {
    if (!only_part.empty() && only_part != name) return;
    const int before = failures;
    for (int64_t i = only_case < 0 ? 0 : only_case; i < (only_case < 0 ? number : only_case + 1); i++) {
      running = std::string(name) + " " + std::to_string(i);
      Random random{seed * 1000003 + (uint64_t)i * 8191 + (uint64_t)name[0]};
      random.next();
      body(random, i);
    }
    printf("%-10s %s\n", name, failures == before ? "ok" : "FAILED");
    fflush(stdout);
  };
  const int few = full ? 1000 : std::max(1, cases / 8);
  part("interface", 1, [](Random& random, int64_t) { check_interface(random); });
  part("refusals", 1, [](Random& random, int64_t) { check_refusals(random); });
  part("append", few, [](Random& random, int64_t) { check_append(random); });
  part("gather", few, [](Random& random, int64_t) { check_gather(random); });
  part("minmax", few, [](Random& random, int64_t) { check_minmax(random); });
  part("select", few, [](Random& random, int64_t) {
    for (int isa : isas) {
      Random same = random;
      scout_use_isa(isa);
      check_select(same);
    }
  });
  part("choices", 1, [](Random&, int64_t) { check_select_refusals(); });
  part("signs", few, [](Random& random, int64_t) { check_signs(random); });
  part("coarse", few, [](Random& random, int64_t) { check_coarse(random); });
  part("dots", few, [](Random& random, int64_t) { check_dots(random); });
  part("nan", full ? 5000 : cases, [](Random& random, int64_t) { check_some_nan(random); });
  const std::vector<Case> grid = full ? all_cases() : std::vector<Case>();
  part("attend", full ? (int64_t)grid.size() : cases, [&](Random& random, int64_t i) {
    Case c = full ? grid[(size_t)i] : random_case(random);
    random_rest(c, random);
    check_attend(c, random);
  });
  scout_pool_destroy(pool);
  print_table();
  if (failures) printf("%d failures\n", failures);
  return failures ? 1 : 0;
}
