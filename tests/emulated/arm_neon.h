// NEON on x86-64, for a processor without it: what Arm's reference says each intrinsic of
// csrc/cpu/vectors/neon.h does. That file finds this one as <arm_neon.h> and stays as it is.
//
// Vectors of the compiler do what C++ has operators for, FMA and F16C what it has none for.
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstring>

typedef float float32x2_t __attribute__((vector_size(8)));
typedef float float32x4_t __attribute__((vector_size(16)));
typedef double float64x2_t __attribute__((vector_size(16)));
typedef int32_t int32x4_t __attribute__((vector_size(16)));
typedef uint32_t uint32x4_t __attribute__((vector_size(16)));
typedef uint16_t uint16x4_t __attribute__((vector_size(8)));
struct float16x4_t {
  uint16x4_t bits;
};

namespace {
namespace emulated {

template <class To, class From>
inline To bits(From x) {
  static_assert(sizeof(To) == sizeof(From), "a cast changes no size");
  To y;
  std::memcpy(&y, &x, sizeof y);
  return y;
}

template <class To, class From>
inline To load(const From* p) {
  To x;
  std::memcpy(&x, p, sizeof x);
  return x;
}

// NaN when either is, and +0 above -0: not the rule of x86.
inline float larger(float a, float b) {
  if (a != a || b != b) return a + b;
  if (a == b) return bits<float>(bits<uint32_t>(a) & bits<uint32_t>(b));
  return a > b ? a : b;
}
inline float smaller(float a, float b) { return -larger(-a, -b); }

// Towards zero and saturated; 0 of NaN.
inline int32_t integer(float x) {
  if (x != x) return 0;
  if (x >= 0x1p31f) return INT32_MAX;
  return x < -0x1p31f ? INT32_MIN : static_cast<int32_t>(x);
}

}  // namespace emulated

inline float32x4_t vdupq_n_f32(float x) { return float32x4_t{x, x, x, x}; }
inline int32x4_t vdupq_n_s32(int32_t x) { return int32x4_t{x, x, x, x}; }
inline uint32x4_t vdupq_n_u32(uint32_t x) { return uint32x4_t{x, x, x, x}; }

inline float32x4_t vreinterpretq_f32_s32(int32x4_t x) { return emulated::bits<float32x4_t>(x); }
inline float32x4_t vreinterpretq_f32_u32(uint32x4_t x) { return emulated::bits<float32x4_t>(x); }
inline uint32x4_t vreinterpretq_u32_f32(float32x4_t x) { return emulated::bits<uint32x4_t>(x); }
inline int32x4_t vreinterpretq_s32_u32(uint32x4_t x) { return emulated::bits<int32x4_t>(x); }
inline float16x4_t vreinterpret_f16_u16(uint16x4_t x) { return {x}; }
inline uint16x4_t vreinterpret_u16_f16(float16x4_t x) { return x.bits; }

inline float32x4_t vaddq_f32(float32x4_t a, float32x4_t b) { return a + b; }
inline float32x4_t vsubq_f32(float32x4_t a, float32x4_t b) { return a - b; }
inline float32x4_t vmulq_f32(float32x4_t a, float32x4_t b) { return a * b; }
inline float32x4_t vdivq_f32(float32x4_t a, float32x4_t b) { return a / b; }
// The sum comes first.
inline float32x4_t vfmaq_f32(float32x4_t c, float32x4_t a, float32x4_t b) {
  return _mm_fmadd_ps(a, b, c);
}
inline float32x4_t vfmsq_f32(float32x4_t c, float32x4_t a, float32x4_t b) {
  return _mm_fnmadd_ps(a, b, c);
}
inline float32x4_t vmaxq_f32(float32x4_t a, float32x4_t b) {
  float32x4_t y;
  for (int k = 0; k < 4; ++k) y[k] = emulated::larger(a[k], b[k]);
  return y;
}
inline float32x4_t vminq_f32(float32x4_t a, float32x4_t b) {
  float32x4_t y;
  for (int k = 0; k < 4; ++k) y[k] = emulated::smaller(a[k], b[k]);
  return y;
}
inline float32x4_t vabsq_f32(float32x4_t x) {
  return vreinterpretq_f32_u32(vreinterpretq_u32_f32(x) & 0x7fffffffu);
}

inline uint32x4_t vceqq_f32(float32x4_t a, float32x4_t b) {
  return emulated::bits<uint32x4_t>(a == b);
}
inline uint32x4_t vcltq_f32(float32x4_t a, float32x4_t b) {
  return emulated::bits<uint32x4_t>(a < b);
}
inline uint32x4_t vcltq_s32(int32x4_t a, int32x4_t b) { return emulated::bits<uint32x4_t>(a < b); }
// Bit by bit, whatever the mask was made for.
inline float32x4_t vbslq_f32(uint32x4_t m, float32x4_t set, float32x4_t clear) {
  return vreinterpretq_f32_u32((m & vreinterpretq_u32_f32(set)) |
                               (~m & vreinterpretq_u32_f32(clear)));
}

inline uint32x4_t vandq_u32(uint32x4_t a, uint32x4_t b) { return a & b; }
inline uint32x4_t vorrq_u32(uint32x4_t a, uint32x4_t b) { return a | b; }
inline uint32x4_t vmvnq_u32(uint32x4_t a) { return ~a; }
inline uint32x4_t vaddq_u32(uint32x4_t a, uint32x4_t b) { return a + b; }
inline int32x4_t vaddq_s32(int32x4_t a, int32x4_t b) { return a + b; }
inline int32x4_t vsubq_s32(int32x4_t a, int32x4_t b) { return a - b; }
inline uint32x4_t vshlq_n_u32(uint32x4_t a, int n) { return a << n; }
inline int32x4_t vshlq_n_s32(int32x4_t a, int n) {
  return vreinterpretq_s32_u32(emulated::bits<uint32x4_t>(a) << n);
}
inline uint32x4_t vshrq_n_u32(uint32x4_t a, int n) { return a >> n; }
inline int32x4_t vshrq_n_s32(int32x4_t a, int n) { return a >> n; }
inline uint16x4_t vshrn_n_u32(uint32x4_t a, int n) {
  return __builtin_convertvector(a >> n, uint16x4_t);
}
inline uint32x4_t vmovl_u16(uint16x4_t a) { return __builtin_convertvector(a, uint32x4_t); }
inline float32x4_t vcvtq_f32_s32(int32x4_t a) { return __builtin_convertvector(a, float32x4_t); }
inline int32x4_t vcvtq_s32_f32(float32x4_t x) {
  int32x4_t y;
  for (int k = 0; k < 4; ++k) y[k] = emulated::integer(x[k]);
  return y;
}
inline float32x4_t vcvt_f32_f16(float16x4_t x) {
  return _mm_cvtph_ps(_mm_set_epi64x(0, emulated::bits<int64_t>(x.bits)));
}
inline float16x4_t vcvt_f16_f32(float32x4_t x) {
  const __m128i low = _mm_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT);
  return {emulated::bits<uint16x4_t>(static_cast<int64_t>(_mm_cvtsi128_si64(low)))};
}

inline float32x4_t vld1q_f32(const float* p) { return emulated::load<float32x4_t>(p); }
inline int32x4_t vld1q_s32(const int32_t* p) { return emulated::load<int32x4_t>(p); }
inline uint16x4_t vld1_u16(const uint16_t* p) { return emulated::load<uint16x4_t>(p); }
inline void vst1q_f32(float* p, float32x4_t x) { std::memcpy(p, &x, sizeof x); }
inline void vst1_u16(uint16_t* p, uint16x4_t x) { std::memcpy(p, &x, sizeof x); }

inline float vgetq_lane_f32(float32x4_t x, int lane) { return x[lane]; }
inline float32x2_t vget_low_f32(float32x4_t x) { return float32x2_t{x[0], x[1]}; }
inline float vmaxvq_f32(float32x4_t x) {
  return emulated::larger(emulated::larger(x[0], x[1]), emulated::larger(x[2], x[3]));
}
inline uint32_t vmaxvq_u32(uint32x4_t x) {
  const uint32_t low = x[0] > x[1] ? x[0] : x[1], high = x[2] > x[3] ? x[2] : x[3];
  return low > high ? low : high;
}
inline float64x2_t vcvt_f64_f32(float32x2_t x) { return float64x2_t{x[0], x[1]}; }
inline float64x2_t vcvt_high_f64_f32(float32x4_t x) { return float64x2_t{x[2], x[3]}; }
inline float64x2_t vaddq_f64(float64x2_t a, float64x2_t b) { return a + b; }
inline double vaddvq_f64(float64x2_t x) { return x[0] + x[1]; }

}  // namespace
