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

// What a cell adds to the sums of its row, in their order.
struct AnchoredCell {
  float e;       // exp2((u - origin)·slope), 0 in the label's column
  float moment;  // e·log2 e
  float square;  // e²
  float u;       // of the label too
  float beaten;  // whether the word is above the label
};

__host__ __device__ __forceinline__ AnchoredCell anchored_cell(float product, float bias,
                                                               float origin, float slope,
                                                               bool is_label) {
  AnchoredCell cell;
  cell.u = product + bias;
  // The difference first: the product with slope alone would round at the size of the logits.
  const float d = (cell.u - origin) * slope;
  cell.e = is_label ? 0.0f : power_of_two(d);
  // The floor keeps 0·(-inf) out.
  cell.moment = cell.e * fmaxf(d, kLogFloor * kLog2E);
  cell.square = cell.e * cell.e;
  cell.beaten = cell.e > 1.0f ? 1.0f : 0.0f;
  return cell;
}

}  // namespace fastpo
