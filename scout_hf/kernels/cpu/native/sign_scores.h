// Scores of sign codes: code shared by all instruction sets.
#pragma once

#include "isa.h"

// Adds to scores[i] the logarithm of block i's mass for each head of query [heads][dims]; at most 16 heads.
void scout_add_sign_scores(const scout_isa* isa, const uint8_t* codes, int64_t code_bytes, int64_t blocks,
                           int block_size, int dims, const float* query, int heads, float* scores);
