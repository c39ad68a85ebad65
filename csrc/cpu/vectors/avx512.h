// Sixteen floats in AVX-512 registers (F, BW, DQ, VL); see scalar.h for the rules.
#pragma once

#include <immintrin.h>

#include <cstdint>

#include "half.h"

namespace {

struct Avx512 {
  static constexpr int kWidth = 16;
  using Float = __m512;
  using Mask = __mmask16;

  static Float set(float x) { return _mm512_set1_ps(x); }
  static Float add(Float a, Float b) { return _mm512_add_ps(a, b); }
  static Float sub(Float a, Float b) { return _mm512_sub_ps(a, b); }
  static Float mul(Float a, Float b) { return _mm512_mul_ps(a, b); }
  static Float div(Float a, Float b) { return _mm512_div_ps(a, b); }
  static Float fma(Float a, Float b, Float c) { return _mm512_fmadd_ps(a, b, c); }
  static Float fnma(Float a, Float b, Float c) { return _mm512_fnmadd_ps(a, b, c); }
  static Float max(Float a, Float b) { return _mm512_max_ps(a, b); }
  static Float min(Float a, Float b) { return _mm512_min_ps(a, b); }
  static Float abs(Float x) { return _mm512_andnot_ps(set(-0.0f), x); }
  static Float copy_sign(Float size, Float sign) {
    return _mm512_or_ps(size, _mm512_and_ps(set(-0.0f), sign));
  }

  static Mask none() { return 0; }
  static Mask either(Mask a, Mask b) { return static_cast<Mask>(a | b); }
  static Mask is_nan(Float x) { return _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q); }
  static Mask less(Float a, Float b) { return _mm512_cmp_ps_mask(a, b, _CMP_LT_OQ); }
  static Mask equal(Float a, Float b) { return _mm512_cmp_ps_mask(a, b, _CMP_EQ_OQ); }
  static bool any(Mask m) { return m != 0; }
  static Float select(Mask m, Float yes, Float no) { return _mm512_mask_blend_ps(m, no, yes); }

  static Float scale(Float x, Float n) { return _mm512_scalef_ps(x, n); }
  static Float scale_normal(Float x, Float n) { return scale(x, n); }
  static Float mantissa(Float x) {
    const Float fraction = _mm512_and_ps(x, _mm512_castsi512_ps(_mm512_set1_epi32(0x007fffff)));
    return _mm512_or_ps(fraction, set(0.5f));
  }
  static Float exponent(Float x) {
    const __m512i k = _mm512_srli_epi32(_mm512_castps_si512(x), 23);
    return _mm512_cvtepi32_ps(_mm512_sub_epi32(k, _mm512_set1_epi32(126)));
  }

  static Float load(const float* p) { return _mm512_loadu_ps(p); }
  static Float load(const BFloat16* p) { return widen(p, _mm256_loadu_si256(vector(p))); }
  static Float load(const Float16* p) { return widen(p, _mm256_loadu_si256(vector(p))); }
  static Float load_first(const float* p, int64_t count) {
    return _mm512_maskz_loadu_ps(first(count), p);
  }
  template <class Half>
  static Float load_first(const Half* p, int64_t count) {
    return widen(p, _mm256_maskz_loadu_epi16(first(count), p));
  }

  static void store(float* p, Float x) { _mm512_storeu_ps(p, x); }
  static void store(BFloat16* p, Float x) { _mm256_storeu_si256(vector(p), narrow(p, x)); }
  static void store(Float16* p, Float x) { _mm256_storeu_si256(vector(p), narrow(p, x)); }
  static void store_first(float* p, Float x, int64_t count) {
    _mm512_mask_storeu_ps(p, first(count), x);
  }
  template <class Half>
  static void store_first(Half* p, Float x, int64_t count) {
    _mm256_mask_storeu_epi16(p, first(count), narrow(p, x));
  }

  static const __m256i* vector(const void* p) { return static_cast<const __m256i*>(p); }
  static __m256i* vector(void* p) { return static_cast<__m256i*>(p); }

  // The pointer only chooses the format.
  static Float widen(const BFloat16*, __m256i x) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(x), 16));
  }
  static Float widen(const Float16*, __m256i x) { return _mm512_cvtph_ps(x); }
  static __m256i narrow(const Float16*, Float x) {
    return _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT);
  }
  static __m256i narrow(const BFloat16*, Float x) {
    const __m512i u = _mm512_castps_si512(x);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(u, 16), _mm512_set1_epi32(1));
    const __m512i half = _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff));
    // Adding to a NaN with a full mantissa would carry into the sign; arithmetic made it quiet, so
    // its upper half alone is a NaN.
    const __mmask16 number = _mm512_cmp_ps_mask(x, x, _CMP_ORD_Q);
    const __m512i rounded = _mm512_mask_add_epi32(u, number, u, half);
    return _mm512_cvtepi32_epi16(_mm512_srli_epi32(rounded, 16));
  }

  static Mask first(int64_t count) { return static_cast<Mask>((1u << count) - 1u); }

  static float lane(Float x) { return _mm512_cvtss_f32(x); }
  static float max_of(Float x) { return _mm512_reduce_max_ps(x); }
  static double sum_of(Float x) {
    const __m512d low = _mm512_cvtps_pd(_mm512_castps512_ps256(x));
    return _mm512_reduce_add_pd(_mm512_add_pd(low, _mm512_cvtps_pd(_mm512_extractf32x8_ps(x, 1))));
  }
};

}  // namespace
