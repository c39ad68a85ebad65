// Four floats in NEON registers, which every 64-bit ARM has; see scalar.h for the rules.
#pragma once

#include <arm_neon.h>

#include <cstdint>
#include <cstring>

#include "half.h"

namespace {

struct Neon {
  static constexpr int kWidth = 4;
  using Float = float32x4_t;
  using Mask = uint32x4_t;

  static Float set(float x) { return vdupq_n_f32(x); }
  static Float add(Float a, Float b) { return vaddq_f32(a, b); }
  static Float sub(Float a, Float b) { return vsubq_f32(a, b); }
  static Float mul(Float a, Float b) { return vmulq_f32(a, b); }
  static Float div(Float a, Float b) { return vdivq_f32(a, b); }
  static Float fma(Float a, Float b, Float c) { return vfmaq_f32(c, a, b); }
  static Float fnma(Float a, Float b, Float c) { return vfmsq_f32(c, a, b); }
  // One instruction each, and NaN when either is.
  static Float max(Float a, Float b) { return vmaxq_f32(a, b); }
  static Float min(Float a, Float b) { return vminq_f32(a, b); }
  static Float abs(Float x) { return vabsq_f32(x); }
  static Float copy_sign(Float size, Float sign) {
    return vbslq_f32(vdupq_n_u32(0x80000000u), sign, size);
  }

  static Mask none() { return vdupq_n_u32(0); }
  static Mask either(Mask a, Mask b) { return vorrq_u32(a, b); }
  static Mask is_nan(Float x) { return vmvnq_u32(vceqq_f32(x, x)); }
  static Mask less(Float a, Float b) { return vcltq_f32(a, b); }
  static Mask equal(Float a, Float b) { return vceqq_f32(a, b); }
  static bool any(Mask m) { return vmaxvq_u32(m) != 0; }
  static Float select(Mask m, Float yes, Float no) { return vbslq_f32(m, yes, no); }

  // Two factors, because 2^-127 and below are no normal floats. Of NaN the integer is 0.
  static Float scale(Float x, Float n) {
    const int32x4_t k = vcvtq_s32_f32(n);
    const int32x4_t half = vshrq_n_s32(k, 1);
    return mul(mul(x, power(half)), power(vsubq_s32(k, half)));
  }
  // The same where the result is normal.
  static Float scale_normal(Float x, Float n) { return mul(x, power(vcvtq_s32_f32(n))); }
  static Float power(int32x4_t k) {
    return vreinterpretq_f32_s32(vshlq_n_s32(vaddq_s32(k, vdupq_n_s32(127)), 23));
  }

  static Float mantissa(Float x) { return vbslq_f32(vdupq_n_u32(0x007fffffu), x, set(0.5f)); }
  static Float exponent(Float x) {
    const int32x4_t k = vreinterpretq_s32_u32(vshrq_n_u32(vreinterpretq_u32_f32(x), 23));
    return vcvtq_f32_s32(vsubq_s32(k, vdupq_n_s32(126)));
  }

  static Float load(const float* p) { return vld1q_f32(p); }
  static Float load(const BFloat16* p) {
    return vreinterpretq_f32_u32(vshlq_n_u32(vmovl_u16(vld1_u16(&p->bits)), 16));
  }
  static Float load(const Float16* p) {
    return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(&p->bits)));
  }

  static void store(float* p, Float x) { vst1q_f32(p, x); }
  static void store(BFloat16* p, Float x) { vst1_u16(&p->bits, round_bfloat16(x)); }
  static void store(Float16* p, Float x) {
    vst1_u16(&p->bits, vreinterpret_u16_f16(vcvt_f16_f32(x)));
  }

  static uint16x4_t round_bfloat16(Float x) {
    const uint32x4_t u = vreinterpretq_u32_f32(x);
    const uint32x4_t odd = vandq_u32(vshrq_n_u32(u, 16), vdupq_n_u32(1));
    const uint32x4_t half = vaddq_u32(odd, vdupq_n_u32(0x7fff));
    // Adding to a NaN with a full mantissa would carry into the sign; arithmetic made it quiet, so
    // its upper half alone is a NaN.
    const uint32x4_t number = vceqq_f32(x, x);
    return vshrn_n_u32(vaddq_u32(u, vandq_u32(half, number)), 16);
  }

  static Mask first(int64_t count) {
    constexpr int32_t kIndex[kWidth] = {0, 1, 2, 3};
    return vcltq_s32(vld1q_s32(kIndex), vdupq_n_s32(static_cast<int32_t>(count)));
  }
  // There are no masked loads: through a buffer, only at the ends of a row.
  template <class T>
  static Float load_first(const T* p, int64_t count) {
    T buffer[kWidth] = {};
    std::memcpy(buffer, p, static_cast<size_t>(count) * sizeof(T));
    return load(buffer);
  }
  template <class T>
  static void store_first(T* p, Float x, int64_t count) {
    T buffer[kWidth];
    store(buffer, x);
    std::memcpy(p, buffer, static_cast<size_t>(count) * sizeof(T));
  }

  static float lane(Float x) { return vgetq_lane_f32(x, 0); }
  static float max_of(Float x) { return vmaxvq_f32(x); }
  static double sum_of(Float x) {
    return vaddvq_f64(vaddq_f64(vcvt_f64_f32(vget_low_f32(x)), vcvt_high_f64_f32(x)));
  }
};

}  // namespace
