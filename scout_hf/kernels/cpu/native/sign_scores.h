// Scores of sign codes: code shared by all instruction sets.
#pragma once

#include "isa.h"

// Codes of blocks, as in scout_signs.
struct scout_coded {
  const uint8_t* codes;
  int64_t code_bytes;
  const int32_t* ids;
  int64_t blocks;
  int block_size;
  int64_t scales;  // from a block to its tokens' scales
};

// The logarithm, base 2, of every block's mass for each head of query [heads][dims], in scores [heads][stride]; at most
// 16 heads.
void scout_sign_scores(const scout_isa* isa, const scout_coded& coded, int dims, const float* query, int heads,
                       float* scores, int64_t stride);
// The largest logit, base 2, of every block's tokens instead, by the first `dims` dimensions of the codes and roughly.
void scout_sign_peaks(const scout_isa* isa, const scout_coded& coded, int dims, const float* query, int heads,
                      float* peaks, int64_t stride);
