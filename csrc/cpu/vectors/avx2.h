// Eight floats in AVX2 registers with FMA and F16C; see scalar.h for the rules.
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstring>

#include "half.h"

namespace {

struct Avx2 {
  static constexpr int kWidth = 8;
  using Float = __m256;
  using Mask = __m256;

  static Float set(float x) { return _mm256_set1_ps(x); }
  static Float add(Float a, Float b) { return _mm256_add_ps(a, b); }
  static Float sub(Float a, Float b) { return _mm256_sub_ps(a, b); }
  static Float mul(Float a, Float b) { return _mm256_mul_ps(a, b); }
  static Float div(Float a, Float b) { return _mm256_div_ps(a, b); }
  static Float fma(Float a, Float b, Float c) { return _mm256_fmadd_ps(a, b, c); }
  static Float fnma(Float a, Float b, Float c) { return _mm256_fnmadd_ps(a, b, c); }
  static Float max(Float a, Float b) { return _mm256_max_ps(a, b); }
  static Float min(Float a, Float b) { return _mm256_min_ps(a, b); }
  static Float abs(Float x) { return _mm256_andnot_ps(set(-0.0f), x); }
  static Float copy_sign(Float size, Float sign) {
    return _mm256_or_ps(size, _mm256_and_ps(set(-0.0f), sign));
  }

  static Mask none() { return _mm256_setzero_ps(); }
  static Mask either(Mask a, Mask b) { return _mm256_or_ps(a, b); }
  static Mask is_nan(Float x) { return _mm256_cmp_ps(x, x, _CMP_UNORD_Q); }
  static Mask less(Float a, Float b) { return _mm256_cmp_ps(a, b, _CMP_LT_OQ); }
  static Mask equal(Float a, Float b) { return _mm256_cmp_ps(a, b, _CMP_EQ_OQ); }
  static bool any(Mask m) { return _mm256_movemask_ps(m) != 0; }
  static Float select(Mask m, Float yes, Float no) { return _mm256_blendv_ps(no, yes, m); }

  // Two factors, because 2^-127 and below are no normal floats.
  static Float scale(Float x, Float n) {
    const __m256i k = _mm256_cvtps_epi32(n);
    const __m256i half = _mm256_srai_epi32(k, 1);
    return mul(mul(x, power(half)), power(_mm256_sub_epi32(k, half)));
  }
  // The same where the result is normal.
  static Float scale_normal(Float x, Float n) { return mul(x, power(_mm256_cvtps_epi32(n))); }
  static Float power(__m256i k) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(k, _mm256_set1_epi32(127)), 23));
  }

  static Float mantissa(Float x) {
    const Float fraction = _mm256_and_ps(x, _mm256_castsi256_ps(_mm256_set1_epi32(0x007fffff)));
    return _mm256_or_ps(fraction, set(0.5f));
  }
  static Float exponent(Float x) {
    const __m256i k = _mm256_srli_epi32(_mm256_castps_si256(x), 23);
    return _mm256_cvtepi32_ps(_mm256_sub_epi32(k, _mm256_set1_epi32(126)));
  }

  static Float load(const float* p) { return _mm256_loadu_ps(p); }
  static Float load(const BFloat16* p) {
    const __m256i wide = _mm256_cvtepu16_epi32(load_16(p));
    return _mm256_castsi256_ps(_mm256_slli_epi32(wide, 16));
  }
  static Float load(const Float16* p) { return _mm256_cvtph_ps(load_16(p)); }
  static __m128i load_16(const void* p) { return _mm_loadu_si128(static_cast<const __m128i*>(p)); }

  static void store(float* p, Float x) { _mm256_storeu_ps(p, x); }
  static void store(BFloat16* p, Float x) { store_16(p, round_bfloat16(x)); }
  static void store(Float16* p, Float x) {
    store_16(p, _mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT));
  }
  static void store_16(void* p, __m128i x) { _mm_storeu_si128(static_cast<__m128i*>(p), x); }

  static __m128i round_bfloat16(Float x) {
    const __m256i u = _mm256_castps_si256(x);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(u, 16), _mm256_set1_epi32(1));
    const __m256i half = _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff));
    // Adding to a NaN with a full mantissa would carry into the sign; arithmetic made it quiet, so
    // its upper half alone is a NaN.
    const __m256i number = _mm256_castps_si256(_mm256_cmp_ps(x, x, _CMP_ORD_Q));
    const __m256i rounded = _mm256_add_epi32(u, _mm256_and_si256(half, number));
    const __m256i high = _mm256_srli_epi32(rounded, 16);
    return _mm_packus_epi32(_mm256_castsi256_si128(high), _mm256_extracti128_si256(high, 1));
  }

  static Mask first(int64_t count) { return _mm256_castsi256_ps(lanes(count)); }
  static __m256i lanes(int64_t count) {
    const __m256i index = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    return _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int>(count)), index);
  }
  static Float load_first(const float* p, int64_t count) {
    return _mm256_maskload_ps(p, lanes(count));
  }
  static void store_first(float* p, Float x, int64_t count) {
    _mm256_maskstore_ps(p, lanes(count), x);
  }
  // 16-bit lanes have no masked load before AVX-512: through a buffer, only at the ends of a row.
  template <class Half>
  static Float load_first(const Half* p, int64_t count) {
    Half buffer[kWidth] = {};
    std::memcpy(buffer, p, static_cast<size_t>(count) * sizeof(Half));
    return load(buffer);
  }
  template <class Half>
  static void store_first(Half* p, Float x, int64_t count) {
    Half buffer[kWidth];
    store(buffer, x);
    std::memcpy(p, buffer, static_cast<size_t>(count) * sizeof(Half));
  }

  static float lane(Float x) { return _mm256_cvtss_f32(x); }
  static float max_of(Float x) {
    __m128 m = _mm_max_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
    m = _mm_max_ps(m, _mm_movehl_ps(m, m));
    return _mm_cvtss_f32(_mm_max_ss(m, _mm_movehdup_ps(m)));
  }
  static double sum_of(Float x) {
    const __m256d low = _mm256_cvtps_pd(_mm256_castps256_ps128(x));
    const __m256d sum = _mm256_add_pd(low, _mm256_cvtps_pd(_mm256_extractf128_ps(x, 1)));
    const __m128d pair = _mm_add_pd(_mm256_castpd256_pd128(sum), _mm256_extractf128_pd(sum, 1));
    return _mm_cvtsd_f64(_mm_add_sd(pair, _mm_unpackhi_pd(pair, pair)));
  }
};

}  // namespace
