// A product of matrices in float32 whose rows have the same bits wherever they stand.
#pragma once

#include <cstdint>

namespace fastpo {

// out = a·b, or out += a·b, of no empty matrix. Strides count elements; of a and of b one is 1.
struct Product {
  const float* a;  // [n, h]
  int64_t a_row, a_column;
  const float* b;  // [h, v]
  int64_t b_row, b_column;
  int64_t n, v, h;
  float* out;  // [n, v], columns beside one another
  int64_t out_stride;
  bool add;
};

// Whether this build and this processor have it: AVX-512.
bool has_product();

void product_host(const Product& work, int threads);

}  // namespace fastpo
