#include "product_block.h"

namespace {

// Two numbers in 32 bits: one instruction multiplies both and adds them up, in float32.
struct BFloat16Pair {
  using Number = uint16_t;
  static constexpr int64_t kNumbers = 2;

  static __m512 across(const uint16_t* p, int64_t along, __mmask16 read, int64_t left) {
    const __m512i low = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(read, p));
    if (left < 2) return _mm512_castsi512_ps(low);
    const __m512i high = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(read, p + along));
    return _mm512_castsi512_ps(_mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
  }
  static __m512 along(const uint16_t* p, int64_t left) {
    const __mmask32 read = left >= 32 ? 0xffffffffu : (1u << left) - 1u;
    return _mm512_castsi512_ps(_mm512_maskz_loadu_epi16(read, p));
  }
  static __m512 add(__m512 x, __m512 y, __m512 sum) {
    return _mm512_dpbf16_ps(sum, (__m512bh)x, (__m512bh)y);
  }
};

}  // namespace

namespace fastpo {

extern const ProductTable kProductBf16 = {2, pack<BFloat16Pair>, multiply<BFloat16Pair>};

}  // namespace fastpo
