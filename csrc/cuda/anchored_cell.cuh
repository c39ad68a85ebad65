// One cell of the anchored product, as `_cells` of kernels/anchored.py computes it. The host
// compiles it too, so that a machine without a GPU can compare the two.
#pragma once

#include <cmath>

#include "fastpo/rows.h"

namespace fastpo {

constexpr float kLog2E = 1.4426950408889634f;

__host__ __device__ __forceinline__ float power_of_two(float x) {
#ifdef __CUDA_ARCH__
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#else
  return std::exp2(x);
#endif
}

// log2 of a cell's exponential, of u = product + bias. One rounding, at the size of the difference.
__host__ __device__ __forceinline__ float anchored_exponent(float u, float slope, float base) {
  return fmaf(u, slope, -base);
}

// Columns that a thread's cells of one visit are spread over, at most.
constexpr int kAnchoredVisit = 32;

// Whether one of `width` columns from `left` on is the row's label, or no word.
__host__ __device__ __forceinline__ bool any_special(int left, int width, int label, int columns) {
  return static_cast<unsigned>(label - left) < static_cast<unsigned>(width) ||
         left + width > columns;
}

// Of the label only u counts, of what is no word nothing. A word that a bias of -inf removes has
// no mass, and 0·(-inf) would be NaN.
__host__ __device__ __forceinline__ void mask_special(float& u, float& d, float& e, bool is_label,
                                                      bool is_word) {
  d = fmaxf(d, kLogFloor * kLog2E);
  if (is_label || !is_word) {
    d = kLowest;
    e = 0.0f;
  }
  if (!is_word) u = 0.0f;
}

}  // namespace fastpo
