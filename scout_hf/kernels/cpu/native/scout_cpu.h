// The C ABI of scout_hf's CPU library, loaded by ctypes. No torch, no Python.
//
// A page holds one block of one row: for every KV head a tile with the keys, then the values of that block,
// [kv_heads][K, V][block_size][head_dim]. An int8 tile is packed as described at scout_tile_bytes().
// Pointers are borrowed for the call; a submitted job copies the structs, not the memory that they point to.
#pragma once

#include <stddef.h>
#include <stdint.h>

#define SCOUT_ABI 9

#if defined(_WIN32)
#define SCOUT_EXPORT __declspec(dllexport)
#else
#define SCOUT_EXPORT __attribute__((visibility("default")))
#endif

#ifdef __cplusplus
extern "C" {
#endif

enum { SCOUT_F32 = 0, SCOUT_F16 = 1, SCOUT_BF16 = 2, SCOUT_I8 = 3 };

// Scorers of a block's digest for one KV head.
// MINMAX: digests of 2 * head_dim numbers, the channel-wise maxima and minima; an upper bound of q.k, summed over the
// query heads of the group.
// SIGN: digests of block_size * (head_dim / 8 + 1) bytes. First [head_dim / 8][block_size]: bit i of byte (j, t) is
// set if dimension 8 j + i of token t is not negative. Then a scale per token: byte u is the float with the bits
// (u << 19) + (120 << 23). The mass of a query head is the sum over tokens of 2^(scale * signed sum of q), with q
// rounded to about 1 / 127 of the largest four of its dimensions; its log2 is known to about 0.15. Blocks are ranked by
// their share of the mass of all candidates, as the mean over the query heads of the group.
// DOTS: `query` is one weight vector of head_dim numbers per KV head; digests are one or several such vectors, and the
// score is the largest dot product. DOTS4: the same with 4-bit integers, the lower half of a byte first.
enum { SCOUT_MINMAX = 0, SCOUT_SIGN = 1, SCOUT_DOTS = 2, SCOUT_DOTS4 = 3 };

// Status codes other than 0 (success).
enum { SCOUT_OK = 0, SCOUT_UNSUPPORTED = -1, SCOUT_NO_MEMORY = -2, SCOUT_BAD_BLOCK = -3 };

// Paged keys and values of one layer.
typedef struct {
  const int64_t* pages;  // address of every page, [batch][pages_stride]
  int64_t pages_stride;
  int64_t length;        // tokens per row
  void* tail;            // int8 only: the block being filled, [batch][kv_heads][K, V][block_size][head_dim]
  int32_t batch, kv_heads, head_dim, block_size;
  int32_t dtype;         // of the pages
  int32_t plain_dtype;   // of the tail and of unpacked tokens; equals dtype unless that is int8
} scout_store;

// Attention of one or several queries per row over listed blocks, or over all.
// All queries of a row see the same tokens; blocks hold those before `end`.
typedef struct {
  scout_store store;
  const void* query;         // [batch][query_heads][queries][head_dim], head_dim contiguous
  int64_t query_row, query_head, query_token;  // strides in numbers
  const int32_t* blocks;     // [batch][kv_heads][blocks_stride], a partly filled block last; NULL for all blocks
  const int32_t* counts;     // [batch][kv_heads] used entries of each list; NULL: `count` in all
  int64_t blocks_stride;
  const uint8_t* padding_mask;  // [batch][padding_mask_stride] one byte per token, 0 for padding; NULL: no padding
  int64_t padding_mask_stride;
  void* out;                 // [batch][query_heads][queries][head_dim] contiguous
  float* lse;                // [batch][query_heads][queries], natural log; may be NULL
  uint64_t* done;            // of a job: set to `number` when it has ended, also after an error; may be NULL
  uint64_t number;
  int64_t attended;          // result: tokens attended, over all rows and KV heads
  int32_t count;
  int32_t query_heads, query_dtype, out_dtype;
  int32_t status;            // result
  float scale, softcap;      // softcap 0: none
  int32_t queries;           // per row and head; 0 is 1
  int64_t end;               // attend only tokens before it; 0: all of the store
} scout_attend_args;

// Attention of one layer, described once and submitted once per decode step.
typedef struct {
  scout_attend_args attend;  // number: of the last job submitted; every submission adds 1
  const uint64_t* flag;      // a job starts when this word reaches its number
  const int32_t* chosen;     // [batch][kv_heads] to be added up in `chosen_blocks`; may be NULL
  int64_t* trouble;          // set to the status, which is negative, if a job fails; may be NULL
  int64_t ticket;            // result: of the last job submitted
  int64_t counted;           // 0: the next job is left out of the sums
  // Sums over jobs that have ended, written atomically before `done`.
  int64_t tokens, listed_blocks, chosen_blocks;
} scout_step_job;

// The top-k blocks of every row and KV head by score, in ascending order, followed by the newest ones.
typedef struct {
  const void* query;         // as above
  int64_t query_row, query_head;
  const void* codes;         // digests, [batch][kv_heads][...][code], blocks contiguous
  int64_t codes_row, codes_head, codes_block;  // strides in numbers
  const uint8_t* padding_mask;  // as above
  int64_t padding_mask_stride;
  const int32_t* want;       // [batch] blocks to choose; NULL: `count` in all rows
  int32_t* blocks;           // result [batch][kv_heads][blocks_stride]
  int32_t* counts;           // result [batch][kv_heads]
  int64_t blocks_stride;
  float* scores;             // result [batch][kv_heads][candidates], SIGN: log2 of masses [batch][query_heads]
                             // [candidates]; may be NULL
  int32_t batch, kv_heads, query_heads, head_dim, block_size;
  int32_t query_dtype, code_dtype, code;  // code: numbers per digest, bytes where these are smaller
  int32_t candidates;        // candidate blocks
  int32_t newest;            // blocks after the candidates, always listed
  int32_t count, sinks;
  int32_t scorer;            // with code_dtype: any but I8, I8, any, I8
  int32_t least;             // blocks to choose in any case, sinks included, if mass is given
  float mass;                // SIGN: choose no more blocks than hold this share of the mass; 0: choose all `count`
  const float* recent;       // SIGN: log2 of the mass of the newest blocks [batch][query_heads]; may be NULL
  // SIGN, without mass: only the best `fine` blocks by the first `coarse_dim` dimensions are scored by all. 0: all are.
  int32_t coarse_dim, fine;
} scout_select_args;

// Writes new tokens into allocated pages (and, for int8, the tail).
typedef struct {
  scout_store store;         // length: tokens before this call
  const void *keys, *values; // [batch][kv_heads][tokens][head_dim] of plain_dtype, head_dim contiguous
  int64_t key_strides[3], value_strides[3];  // batch, head, token, in numbers
  int64_t tokens;
} scout_append_args;

// Copies blocks of a store to unpacked keys and values.
typedef struct {
  scout_store store;
  const int64_t* blocks;     // [batch][kv_heads][count]
  int64_t count;
  void *keys, *values;       // [batch][kv_heads][count][block_size][head_dim] of plain_dtype
} scout_gather_args;

// Channel-wise bounds of whole blocks: maximum, then minimum, over tokens that are not padding.
typedef struct {
  scout_store store;
  const uint8_t* padding_mask;
  int64_t padding_mask_stride;
  void* codes;               // [batch][kv_heads][...][2 * head_dim] of plain_dtype, from block 0; written first to last
  int64_t codes_row, codes_head;
  int64_t first, last;
} scout_minmax_args;

SCOUT_EXPORT int scout_abi(void);
// Bytes of one head's tile. int8: keys [head_dim / 2][block][2], values [block / 4][head_dim][4], then bf16 scales of
// the keys [head_dim] and of the values [block], padded to a multiple of 64.
SCOUT_EXPORT int64_t scout_tile_bytes(int dtype, int block_size, int head_dim);

// Instruction sets that this machine supports, best last; `scout_use_isa` sets one.
SCOUT_EXPORT int scout_isa_count(void);
SCOUT_EXPORT const char* scout_isa_name(int index);
SCOUT_EXPORT int scout_use_isa(int index);
SCOUT_EXPORT int scout_current_isa(void);

// Parallel regions run on the OpenMP team that `gomp_parallel` starts (torch's own); NULL: on the calling thread only.
SCOUT_EXPORT void scout_set_team(void* gomp_parallel);

SCOUT_EXPORT int scout_attend(scout_attend_args* args, int threads);
SCOUT_EXPORT int scout_select(scout_select_args* args, int threads);
SCOUT_EXPORT int scout_append(const scout_append_args* args, int threads);
SCOUT_EXPORT int scout_gather(const scout_gather_args* args, int threads);
SCOUT_EXPORT int scout_minmax(const scout_minmax_args* args, int threads);

// Reads only, as a baseline for benchmarks: all tiles that `args` would attend, or a span of memory.
SCOUT_EXPORT int64_t scout_read_tiles(const scout_attend_args* args, int threads);
SCOUT_EXPORT int64_t scout_read_span(const void* start, int64_t bytes, int threads);

#ifdef __cplusplus
}
#endif
