// Scores of sign codes: the part that all instruction sets share.
#pragma once

#include "isa.h"

// Adds to scores[i] the logarithms of block i's mass for all heads of query [heads][dims], at most 16.
void scout_add_sign_scores(const scout_isa* isa, const uint8_t* codes, int64_t code_bytes, int64_t blocks,
                           int block_size, int dims, const float* query, int heads, float* scores);
