// The function table of an instruction set. Every isa_*.cpp fills one; isa.cpp chooses among them at load.
#pragma once

#include <stdint.h>

enum { SCOUT_MAX_HEAD_DIM = 576, SCOUT_MAX_COARSE_DIM = 256, SCOUT_MAX_BLOCK = 256 };
enum { SCOUT_SEVERAL = 9, SCOUT_MANY = 256 };

// Attention of one GQA group over a list of tiles at any addresses; the caller merges the partial results.
struct scout_chunk {
  const uint8_t* const* tiles;   // [count]
  // Padding mask of each tile, one byte per token, or NULL for a tile without padding; NULL: no padding at all.
  const uint8_t* const* padding_mask;
  const uint8_t* after;          // the tile that is probably read next, for prefetch
  int64_t tile_bytes, after_bytes;
  int count, last_tokens;        // tokens in the last tile; the others are full
  int block_size, head_dim, group, dtype;
  float scale, softcap;
  const float* query;            // [group][head_dim]
  const uint16_t* query_bf16;    // the same if the query was given in bf16, otherwise NULL
  float* out;                    // result [group][head_dim]: acc, not divided by `sum`
  float *max, *sum;              // result [group]: e_max, e_sum
};

// The attention mass of every block for up to SCOUT_SIGN_HEADS query heads, from sign codes (see scout_cpu.h).
enum { SCOUT_SIGN_HEADS = 4 };
struct scout_signs {
  const uint8_t* codes;
  int64_t code_bytes;            // from one block to the next
  const int32_t* ids;            // [blocks] which ones; NULL: the first ones
  int64_t blocks;
  int64_t scales;                // from a block to its tokens' scales
  int block_size, rows;          // rows: bytes of signs per token, which may be fewer than there are
  int heads;
  const uint8_t* tables;         // [heads][2 * rows][16]: summand of each sign pattern of four dimensions, 0 to 254
  const int* offsets;            // [heads], to subtract from a token's sum over the tables
  const float* worth;            // [heads], value of one unit of the tables
  const float* reference;        // [heads], subtracted in the exponent
  float* out;                    // result [heads][out_stride]: sum of 2^(scale * (sum - offset) * worth - reference)
  int64_t out_stride;
};

// What blocks are ranked by: log2 of the mean over the heads of each block's share of its head's mass.
enum { SCOUT_BINS = 1024, SCOUT_ROUND = 16 };
struct scout_shares {
  const float* masses;           // [heads][stride], log2
  int64_t stride;
  int heads, count;              // count: a multiple of SCOUT_ROUND
  const float* recent;           // [heads], log2 of a mass that each head has besides; may be NULL
  float* totals;                 // [heads], for use within
  float* out;                    // result [count]
};

enum { SCOUT_I4 = -1 };  // in addition to the types of scout_cpu.h: two numbers per byte, the lower half first

struct scout_isa {
  const char* name;
  bool (*runs)();                // whether this machine supports it
  int width;                     // head_dim and code must be multiples of 2 * width
  void (*attend)(const scout_chunk*);
  // The same for up to SCOUT_MANY queries in place of a group, from about SCOUT_SEVERAL on faster. With bf16 queries
  // and keys weights may be rounded to bf16.
  void (*attend_many)(const scout_chunk*);
  // out[i] = row i of codes . weights, for `rows` rows of `numbers` numbers
  void (*dots)(const uint8_t* codes, int dtype, int64_t rows, int numbers, const float* weights, float* out);
  void (*signs)(const scout_signs*);
  // out: the largest scale * (sum - offset) * worth of each block's tokens, roughly; a token's summands add up to 255 at
  // most, and rows to SCOUT_MAX_COARSE_DIM / 8.
  void (*peaks)(const scout_signs*);
  bool (*signs_fit)(int block_size);
  // Scores of the masses that `signs` gives; returns the largest mass.
  float (*logarithms)(const float* mass, int count, float reference, float* scores);
  void (*shares)(const scout_shares*);
  // The bin of every score, and how many are in each of the SCOUT_BINS, which begin with 0: the first is for -inf, the
  // last for inf, the others are in between in ascending order. Returns how many scores are above -inf. NaN becomes
  // inf, so that a block with NaN keys is attended, not hidden. `count` is a multiple of SCOUT_ROUND.
  int (*into_bins)(float* scores, int count, int32_t* places, int32_t* bins);
  // Sums all bytes, to force reading them; prefetches `next`.
  int64_t (*read)(const uint8_t* start, int64_t bytes, const uint8_t* next);
};


// The table for rows of `numbers` numbers and vectors along `tokens` tokens; NULL if none fits.
const scout_isa* scout_isa_for(int numbers, int tokens);
// The same for sign codes of blocks of `block_size` tokens.
const scout_isa* scout_isa_for_signs(int block_size);
