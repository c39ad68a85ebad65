#include "product_block.h"

namespace {

struct Float32 {
  using Number = float;
  static constexpr int64_t kNumbers = 1;  // of one operand in a term

  static __m512 across(const float* p, int64_t, __mmask16 read, int64_t) {
    return _mm512_maskz_loadu_ps(read, p);
  }
  static __m512 along(const float* p, int64_t left) {
    return _mm512_maskz_loadu_ps(first(left), p);
  }
  static __m512 add(__m512 x, __m512 y, __m512 sum) { return _mm512_fmadd_ps(x, y, sum); }
};

}  // namespace

namespace fastpo {

extern const ProductTable kProductAvx512 = {1, pack<Float32>, multiply<Float32>};

}  // namespace fastpo
