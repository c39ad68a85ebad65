// One cell of the anchored product, as `_epilogue` of kernels/anchored.py computes it. The host
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

// exp2 of how far u = product + bias is above its row's origin.
__host__ __device__ __forceinline__ float anchored_exponential(float u, float origin, float slope) {
  // The difference first: the product with slope alone would round at the size of the logits.
  return power_of_two((u - origin) * slope);
}

// Columns that a thread's cells of one visit are spread over, at most.
constexpr int kAnchoredVisit = 32;

// Whether one of `width` columns from `left` on is the row's label, or no word.
__host__ __device__ __forceinline__ bool any_special(int left, int width, int label, int columns) {
  return static_cast<unsigned>(label - left) < static_cast<unsigned>(width) ||
         left + width > columns;
}

// Of the label only u is summed, of what is no word nothing.
__host__ __device__ __forceinline__ void mask_special(float& u, float& e, int column, int label,
                                                      int columns) {
  if (column == label || column >= columns) e = 0.0f;
  if (column >= columns) u = 0.0f;
}

// What a cell adds to the sums of its row beside e and u.
struct AnchoredSums {
  float moment;  // e·log2 e
  float square;  // e²
  float beaten;  // whether the word is above the label
};

__host__ __device__ __forceinline__ AnchoredSums anchored_sums(float u, float e, float origin,
                                                               float slope) {
  // The floor keeps 0·(-inf) out.
  const float d = fmaxf((u - origin) * slope, kLogFloor * kLog2E);
  return {e * d, e * e, e > 1.0f ? 1.0f : 0.0f};
}

}  // namespace fastpo
