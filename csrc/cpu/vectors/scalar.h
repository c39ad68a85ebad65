// One float at a time: any processor, and what the vector wrappers must agree with.
//
// A wrapper is a struct of static functions over `Float`, a pack of kWidth floats. min and max
// return their SECOND operand when that is NaN, so max(bound, x) keeps NaN. When the first one is,
// x86 returns the second all the same and ARM returns NaN: nothing may depend on it.
#pragma once

#include <cstdint>
#include <cstring>

#include "half.h"

namespace {

struct Scalar {
  static constexpr int kWidth = 1;
  using Float = float;
  using Mask = bool;

  static Float set(float x) { return x; }
  static Float add(Float a, Float b) { return a + b; }
  static Float sub(Float a, Float b) { return a - b; }
  static Float mul(Float a, Float b) { return a * b; }
  static Float div(Float a, Float b) { return a / b; }
  static Float fma(Float a, Float b, Float c) { return a * b + c; }
  static Float fnma(Float a, Float b, Float c) { return c - a * b; }
  static Float max(Float a, Float b) { return a > b ? a : b; }
  static Float min(Float a, Float b) { return a < b ? a : b; }
  static Float abs(Float x) { return from_bits(bits(x) & 0x7fffffffu); }
  static Float copy_sign(Float size, Float sign) {
    return from_bits(bits(size) | (bits(sign) & 0x80000000u));
  }

  static Mask none() { return false; }
  static Mask either(Mask a, Mask b) { return a | b; }
  static Mask is_nan(Float x) { return x != x; }
  static Mask less(Float a, Float b) { return a < b; }
  static Mask equal(Float a, Float b) { return a == b; }
  static bool any(Mask m) { return m; }
  static Float select(Mask m, Float yes, Float no) { return m ? yes : no; }

  // x·2^n for an integer n in [-151, 128], rounded once. NaN stays NaN.
  static Float scale(Float x, Float n) {
    const int32_t k = n == n ? static_cast<int32_t>(n) : 0;
    const int32_t half = k >> 1;
    return x * power(half) * power(k - half);
  }
  // The same where the result is normal.
  static Float scale_normal(Float x, Float n) {
    return x * power(n == n ? static_cast<int32_t>(n) : 0);
  }
  static Float power(int32_t k) { return from_bits(static_cast<uint32_t>(k + 127) << 23); }

  // x = mantissa·2^exponent with mantissa in [0.5, 1), for normal positive x.
  static Float mantissa(Float x) { return from_bits((bits(x) & 0x007fffffu) | 0x3f000000u); }
  static Float exponent(Float x) {
    return static_cast<float>(static_cast<int32_t>(bits(x) >> 23) - 126);
  }

  static Float load(const float* p) { return *p; }
  static Float load(const BFloat16* p) { return to_float(*p); }
  static Float load(const Float16* p) { return to_float(*p); }
  static void store(float* p, Float x) { *p = x; }
  static void store(BFloat16* p, Float x) { *p = to_bfloat16(x); }
  static void store(Float16* p, Float x) { *p = to_float16(x); }

  // A single lane has no partial packs.
  static Mask first(int64_t) { return true; }
  template <class T>
  static Float load_first(const T* p, int64_t) {
    return load(p);
  }
  template <class T>
  static void store_first(T* p, Float x, int64_t) {
    store(p, x);
  }

  static float lane(Float x) { return x; }
  static float max_of(Float x) { return x; }
  static double sum_of(Float x) { return x; }
};

}  // namespace
