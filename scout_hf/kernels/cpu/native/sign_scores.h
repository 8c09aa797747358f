// Scores of sign codes: code shared by all instruction sets.
#pragma once

#include "isa.h"

// The logarithm, base 2, of every block's mass for each head of query [heads][dims], in scores [heads][stride]; at most
// 16 heads.
void scout_sign_scores(const scout_isa* isa, const uint8_t* codes, int64_t code_bytes, int64_t blocks, int block_size,
                       int dims, const float* query, int heads, float* scores, int64_t stride);
