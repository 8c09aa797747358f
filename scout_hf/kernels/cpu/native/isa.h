// What one instruction set offers. Every isa_*.cpp fills one table; isa.cpp chooses among them at load.
#pragma once

#include <stdint.h>

// Attention of one GQA group over a run of tiles that lie anywhere; merged with other runs by its caller.
struct scout_chunk {
  const uint8_t* const* tiles;   // `count` of them
  // One byte per token for each tile, or NULL for a tile that is whole; NULL: all whole.
  const uint8_t* const* padding_mask;
  const uint8_t* after;          // the tile that is probably read next, to be prefetched
  int64_t tile_bytes, after_bytes;
  int count, last_tokens;        // tokens in the last tile; the others are full
  int block_size, head_dim, group, dtype;
  float scale, softcap;
  const float* query;            // [group][head_dim]
  const uint16_t* query_bf16;    // the same where the query came in bf16, otherwise NULL
  float* out;                    // result [group][head_dim], not divided by `sum`
  float *max, *sum;              // result [group]
};

// The attention mass of every block for up to SCOUT_SIGN_HEADS query heads, by sign codes; scout_cpu.h says what they are.
enum { SCOUT_SIGN_HEADS = 4 };
struct scout_signs {
  const uint8_t* codes;
  int64_t code_bytes;            // of one block
  int64_t blocks;
  int block_size, rows;          // rows: bytes of signs per token
  int heads;
  const uint8_t* tables;         // [heads][2 * rows][16], what each sign pattern of four dimensions adds, 0 to 254
  const int* offsets;            // [heads], to be taken from the sum of all that a token gets from the tables
  const float* worth;            // [heads], of one unit of the tables
  const float* reference;        // [heads], what powers are taken from
  float* out;                    // result [heads][out_stride]: sum of 2^(scale * (sum - offset) * worth - reference)
  int64_t out_stride;
};

enum { SCOUT_I4 = -1 };  // beside the types of scout_cpu.h: two numbers in each byte, the lower half first

struct scout_isa {
  const char* name;
  bool (*runs)();                // on this machine
  int width;                     // head_dim and code must be multiples of 2 * width
  void (*attend)(const scout_chunk*);
  // out[i] = row i of codes . weights, for `rows` rows of `numbers` numbers
  void (*dots)(const uint8_t* codes, int dtype, int64_t rows, int numbers, const float* weights, float* out);
  void (*signs)(const scout_signs*);
  bool (*signs_fit)(int block_size);
  // Adds up all bytes, so that they must be read; prefetches `next` meanwhile.
  int64_t (*read)(const uint8_t* start, int64_t bytes, const uint8_t* next);
};

enum { SCOUT_MAX_HEAD_DIM = 512, SCOUT_MAX_BLOCK = 256 };

// The table to use for rows of `numbers` numbers and vectors along `tokens` tokens, NULL if there is none.
const scout_isa* scout_isa_for(int numbers, int tokens);
// The same for sign codes of blocks of that size.
const scout_isa* scout_isa_for_signs(int block_size);
