// A product of matrices in float32 whose rows have the same bits wherever they stand.
#pragma once

#include <cstdint>

#include "fastpo/rows.h"

namespace fastpo {

// out = a·b, or out += a·b, of no empty matrix. Strides count elements; of a and of b one is 1.
struct Product {
  DType dtype;    // of a and b: float32 or bfloat16
  const void* a;  // [n, h]
  int64_t a_row, a_column;
  const void* b;  // [h, v]
  int64_t b_row, b_column;
  int64_t n, v, h;
  float* out;  // [n, v], columns beside one another
  int64_t out_stride;
  bool add;
};

// Whether this build and this processor have it: AVX-512, and for bfloat16 its instructions.
bool has_product(DType dtype);

void product_host(const Product& work, int threads);

}  // namespace fastpo
