// AVX-512 lane by lane, for a processor without it: what Intel's reference says each intrinsic of
// csrc/cpu/vectors/avx512.h does. Included before that file, whose own code stays as it is.
#pragma once

#include <immintrin.h>

#include <cmath>
#include <cstdint>
#include <cstring>

namespace {
namespace emulated {

template <class To, class From>
To bits(From x) {
  static_assert(sizeof(To) == sizeof(From), "a cast changes no size");
  To y;
  std::memcpy(&y, &x, sizeof(To));
  return y;
}

struct Lanes {
  union {
    float f[16];
    int32_t i[16];
    uint32_t u[16];
  };
};

inline Lanes lanes(__m512 x) { return bits<Lanes>(x); }
inline Lanes lanes(__m512i x) { return bits<Lanes>(x); }

template <class To, class Make>
To each(Make make) {
  Lanes y;
  for (int k = 0; k < 16; ++k) make(y, k);
  return bits<To>(y);
}

template <class Op>
__m512 floats(Op op) {
  return each<__m512>([&](Lanes& y, int k) { y.f[k] = op(k); });
}

template <class Op>
__m512i words(Op op) {
  return each<__m512i>([&](Lanes& y, int k) { y.u[k] = op(k); });
}

template <class Op>
__m512 logical(__m512 a, __m512 b, Op op) {
  const Lanes x = lanes(a), z = lanes(b);
  return each<__m512>([&](Lanes& y, int k) { y.u[k] = op(x.u[k], z.u[k]); });
}

struct Halves {
  uint16_t h[16];
};

inline __m512 set1_ps(float x) {
  return floats([&](int) { return x; });
}
inline __m512i set1_epi32(int x) {
  return words([&](int) { return static_cast<uint32_t>(x); });
}
inline __m512 castsi512_ps(__m512i x) { return bits<__m512>(x); }
inline __m512i castps_si512(__m512 x) { return bits<__m512i>(x); }

inline __m512 add_ps(__m512 a, __m512 b) {
  const Lanes x = lanes(a), y = lanes(b);
  return floats([&](int k) { return x.f[k] + y.f[k]; });
}
inline __m512 sub_ps(__m512 a, __m512 b) {
  const Lanes x = lanes(a), y = lanes(b);
  return floats([&](int k) { return x.f[k] - y.f[k]; });
}
inline __m512 mul_ps(__m512 a, __m512 b) {
  const Lanes x = lanes(a), y = lanes(b);
  return floats([&](int k) { return x.f[k] * y.f[k]; });
}
inline __m512 div_ps(__m512 a, __m512 b) {
  const Lanes x = lanes(a), y = lanes(b);
  return floats([&](int k) { return x.f[k] / y.f[k]; });
}
inline __m512 fmadd_ps(__m512 a, __m512 b, __m512 c) {
  const Lanes x = lanes(a), y = lanes(b), z = lanes(c);
  return floats([&](int k) { return std::fmaf(x.f[k], y.f[k], z.f[k]); });
}
inline __m512 fnmadd_ps(__m512 a, __m512 b, __m512 c) {
  const Lanes x = lanes(a), y = lanes(b), z = lanes(c);
  return floats([&](int k) { return std::fmaf(-x.f[k], y.f[k], z.f[k]); });
}
// Of a NaN and a number, and of two zeros, the second operand.
inline __m512 max_ps(__m512 a, __m512 b) {
  const Lanes x = lanes(a), y = lanes(b);
  return floats([&](int k) { return x.f[k] > y.f[k] ? x.f[k] : y.f[k]; });
}
inline __m512 min_ps(__m512 a, __m512 b) {
  const Lanes x = lanes(a), y = lanes(b);
  return floats([&](int k) { return x.f[k] < y.f[k] ? x.f[k] : y.f[k]; });
}
inline __m512 and_ps(__m512 a, __m512 b) {
  return logical(a, b, [](uint32_t x, uint32_t y) { return x & y; });
}
inline __m512 andnot_ps(__m512 a, __m512 b) {
  return logical(a, b, [](uint32_t x, uint32_t y) { return ~x & y; });
}
inline __m512 or_ps(__m512 a, __m512 b) {
  return logical(a, b, [](uint32_t x, uint32_t y) { return x | y; });
}
// a·2^floor(b); infinite powers included.
inline __m512 scalef_ps(__m512 a, __m512 b) {
  const Lanes x = lanes(a), y = lanes(b);
  return floats([&](int k) {
    if (std::isnan(y.f[k])) return y.f[k];
    if (std::isinf(y.f[k])) return y.f[k] > 0 ? x.f[k] * y.f[k] : std::copysign(0.0f, x.f[k]);
    const float n = std::fmin(std::fmax(std::floor(y.f[k]), -1000.0f), 1000.0f);
    return std::ldexp(x.f[k], static_cast<int>(n));
  });
}

template <int kind>
__mmask16 cmp_ps_mask(__m512 a, __m512 b) {
  static_assert(
      kind == _CMP_UNORD_Q || kind == _CMP_ORD_Q || kind == _CMP_LT_OQ || kind == _CMP_EQ_OQ,
      "the comparisons that are used");
  const Lanes x = lanes(a), y = lanes(b);
  unsigned mask = 0;
  for (int k = 0; k < 16; ++k) {
    const bool unordered = std::isnan(x.f[k]) || std::isnan(y.f[k]);
    const bool holds = kind == _CMP_UNORD_Q ? unordered
                       : kind == _CMP_ORD_Q ? !unordered
                       : kind == _CMP_LT_OQ ? x.f[k] < y.f[k]
                                            : x.f[k] == y.f[k];
    mask |= static_cast<unsigned>(holds) << k;
  }
  return static_cast<__mmask16>(mask);
}
inline __m512 mask_blend_ps(__mmask16 m, __m512 clear, __m512 set) {
  const Lanes x = lanes(clear), y = lanes(set);
  return floats([&](int k) { return m >> k & 1 ? y.f[k] : x.f[k]; });
}

inline __m512i and_si512(__m512i a, __m512i b) {
  const Lanes x = lanes(a), y = lanes(b);
  return words([&](int k) { return x.u[k] & y.u[k]; });
}
inline __m512i add_epi32(__m512i a, __m512i b) {
  const Lanes x = lanes(a), y = lanes(b);
  return words([&](int k) { return x.u[k] + y.u[k]; });
}
inline __m512i mask_add_epi32(__m512i source, __mmask16 m, __m512i a, __m512i b) {
  const Lanes s = lanes(source), x = lanes(a), y = lanes(b);
  return words([&](int k) { return m >> k & 1 ? x.u[k] + y.u[k] : s.u[k]; });
}
inline __m512i sub_epi32(__m512i a, __m512i b) {
  const Lanes x = lanes(a), y = lanes(b);
  return words([&](int k) { return x.u[k] - y.u[k]; });
}
inline __m512i srli_epi32(__m512i a, int n) {
  const Lanes x = lanes(a);
  return words([&](int k) { return x.u[k] >> n; });
}
inline __m512i slli_epi32(__m512i a, int n) {
  const Lanes x = lanes(a);
  return words([&](int k) { return x.u[k] << n; });
}
inline __m512 cvtepi32_ps(__m512i a) {
  const Lanes x = lanes(a);
  return floats([&](int k) { return static_cast<float>(x.i[k]); });
}
inline __m512i cvtepu16_epi32(__m256i a) {
  const Halves x = bits<Halves>(a);
  return words([&](int k) { return uint32_t{x.h[k]}; });
}
inline __m256i cvtepi32_epi16(__m512i a) {
  const Lanes x = lanes(a);
  Halves y;
  for (int k = 0; k < 16; ++k) y.h[k] = static_cast<uint16_t>(x.u[k]);
  return bits<__m256i>(y);
}
inline __m512 cvtph_ps(__m256i a) {
  const Halves x = bits<Halves>(a);
  return floats([&](int k) { return _cvtsh_ss(x.h[k]); });
}
template <int rounding>
__m256i cvtps_ph(__m512 a) {
  static_assert(rounding == _MM_FROUND_TO_NEAREST_INT, "the rounding that is used");
  const Lanes x = lanes(a);
  Halves y;
  for (int k = 0; k < 16; ++k) y.h[k] = _cvtss_sh(x.f[k], rounding);
  return bits<__m256i>(y);
}

// Lanes that a mask leaves out are not touched: there the row may end with the page.
inline __m512 loadu_ps(const void* p) {
  Lanes x;
  std::memcpy(&x, p, sizeof x);
  return bits<__m512>(x);
}
inline __m512 maskz_loadu_ps(__mmask16 m, const float* p) {
  return floats([&](int k) { return m >> k & 1 ? p[k] : 0.0f; });
}
inline void storeu_ps(void* p, __m512 x) { std::memcpy(p, &x, sizeof x); }
inline void mask_storeu_ps(float* p, __mmask16 m, __m512 a) {
  const Lanes x = lanes(a);
  for (int k = 0; k < 16; ++k)
    if (m >> k & 1) p[k] = x.f[k];
}
template <class Half>
__m256i maskz_loadu_epi16(__mmask16 m, const Half* p) {
  static_assert(sizeof(Half) == 2, "16 bits a lane");
  Halves x = {};
  for (int k = 0; k < 16; ++k)
    if (m >> k & 1) std::memcpy(&x.h[k], p + k, 2);
  return bits<__m256i>(x);
}
template <class Half>
void mask_storeu_epi16(Half* p, __mmask16 m, __m256i a) {
  const Halves x = bits<Halves>(a);
  for (int k = 0; k < 16; ++k)
    if (m >> k & 1) std::memcpy(p + k, &x.h[k], 2);
}

struct Doubles {
  double d[8];
};
inline float cvtss_f32(__m512 x) { return lanes(x).f[0]; }
inline float reduce_max_ps(__m512 x) {
  Lanes y = lanes(x);
  for (int half = 8; half > 0; half /= 2)
    for (int k = 0; k < half; ++k) y.f[k] = y.f[k] > y.f[k + half] ? y.f[k] : y.f[k + half];
  return y.f[0];
}
inline __m256 castps512_ps256(__m512 x) { return _mm256_loadu_ps(lanes(x).f); }
template <int half>
__m256 extractf32x8_ps(__m512 x) {
  return _mm256_loadu_ps(lanes(x).f + 8 * half);
}
inline Doubles cvtps_pd(__m256 x) {
  float f[8];
  _mm256_storeu_ps(f, x);
  Doubles y;
  for (int k = 0; k < 8; ++k) y.d[k] = f[k];
  return y;
}
inline Doubles add_pd(Doubles a, Doubles b) {
  for (int k = 0; k < 8; ++k) a.d[k] += b.d[k];
  return a;
}
inline double reduce_add_pd(Doubles x) {
  for (int half = 4; half > 0; half /= 2)
    for (int k = 0; k < half; ++k) x.d[k] += x.d[k + half];
  return x.d[0];
}

}  // namespace emulated
}  // namespace

#define __m512d emulated::Doubles
#define _mm512_set1_ps emulated::set1_ps
#define _mm512_set1_epi32 emulated::set1_epi32
#define _mm512_castsi512_ps emulated::castsi512_ps
#define _mm512_castps_si512 emulated::castps_si512
#define _mm512_add_ps emulated::add_ps
#define _mm512_sub_ps emulated::sub_ps
#define _mm512_mul_ps emulated::mul_ps
#define _mm512_div_ps emulated::div_ps
#define _mm512_fmadd_ps emulated::fmadd_ps
#define _mm512_fnmadd_ps emulated::fnmadd_ps
#define _mm512_max_ps emulated::max_ps
#define _mm512_min_ps emulated::min_ps
#define _mm512_and_ps emulated::and_ps
#define _mm512_andnot_ps emulated::andnot_ps
#define _mm512_or_ps emulated::or_ps
#define _mm512_scalef_ps emulated::scalef_ps
#undef _mm512_cmp_ps_mask
#define _mm512_cmp_ps_mask(a, b, kind) emulated::cmp_ps_mask<kind>(a, b)
#define _mm512_mask_blend_ps emulated::mask_blend_ps
#define _mm512_and_si512 emulated::and_si512
#define _mm512_add_epi32 emulated::add_epi32
#define _mm512_mask_add_epi32 emulated::mask_add_epi32
#define _mm512_sub_epi32 emulated::sub_epi32
#define _mm512_srli_epi32 emulated::srli_epi32
#define _mm512_slli_epi32 emulated::slli_epi32
#define _mm512_cvtepi32_ps emulated::cvtepi32_ps
#define _mm512_cvtepu16_epi32 emulated::cvtepu16_epi32
#define _mm512_cvtepi32_epi16 emulated::cvtepi32_epi16
#define _mm512_cvtph_ps emulated::cvtph_ps
#undef _mm512_cvtps_ph
#define _mm512_cvtps_ph(x, rounding) emulated::cvtps_ph<rounding>(x)
#define _mm512_loadu_ps emulated::loadu_ps
#define _mm512_maskz_loadu_ps emulated::maskz_loadu_ps
#define _mm512_storeu_ps emulated::storeu_ps
#define _mm512_mask_storeu_ps emulated::mask_storeu_ps
#define _mm256_maskz_loadu_epi16 emulated::maskz_loadu_epi16
#define _mm256_mask_storeu_epi16 emulated::mask_storeu_epi16
#define _mm512_cvtss_f32 emulated::cvtss_f32
#define _mm512_reduce_max_ps emulated::reduce_max_ps
#define _mm512_castps512_ps256 emulated::castps512_ps256
#undef _mm512_extractf32x8_ps
#define _mm512_extractf32x8_ps(x, half) emulated::extractf32x8_ps<half>(x)
#define _mm512_cvtps_pd emulated::cvtps_pd
#define _mm512_add_pd emulated::add_pd
#define _mm512_reduce_add_pd emulated::reduce_add_pd
