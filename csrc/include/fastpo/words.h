// Products of rows with a few words of their own, and sums of rows; see fastpo/ops/rows/words.
//
// Pointers, strides and n == 0 are as in rows.h.
#pragma once

#include <cstdint>

#include "fastpo/rows.h"

namespace fastpo {

// out[i, j] = <hidden[i], weight[ids[i, j]]>, 0 where the id is negative.
struct WordProducts {
  const float* hidden;  // [n, h]
  int64_t hidden_stride;
  const void* weight;  // [words, h]
  DType weight_dtype;
  int64_t weight_stride;
  const int64_t* ids;  // [n, v]
  int64_t n, v, h;
  float* out;  // [n, v]
};

// out[i] = Σ_j coefficients[j]·rows[index[j]] for j in [offsets[i], offsets[i + 1]); a negative
// index is left out. Summed in float32, rounded once.
struct WordSums {
  const float* coefficients;
  const int64_t* index;
  const int64_t* offsets;  // [n + 1]
  const void* rows;        // [any, v]
  DType rows_dtype;
  int64_t rows_stride;
  int64_t n, v;
  void* out;  // [n, v]
  DType out_dtype;
  int64_t out_stride;
};

// As rows_forward_host.
void word_products_host(const WordProducts& work, int threads, int isa);
void word_sums_host(const WordSums& work, int threads, int isa);

}  // namespace fastpo
