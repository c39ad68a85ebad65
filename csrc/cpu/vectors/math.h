// exp, tanh and log on a vector wrapper S. NaN in, NaN out.
//
// Largest errors found against float64: exp 1.0 ulp, subnormal results included; tanh 1.2 ulp;
// x·log x 1.5 ulp. exp and log: polynomials of Cephes (S. Moshier).
#pragma once

#include <cmath>

namespace {

template <class S>
struct Reduced {
  typename S::Float n;        // x = n·ln 2 + r with |r| <= ln 2 / 2
  typename S::Float expm1_r;  // exp(r) - 1
};

template <class S>
inline Reduced<S> reduce(typename S::Float x) {
  const auto magic = S::set(0x1.8p23f);  // adding it rounds to an integer
  const auto n = S::sub(S::fma(x, S::set(1.44269504088896341f), magic), magic);
  auto r = S::fnma(n, S::set(0.693359375f), x);
  r = S::fnma(n, S::set(-2.12194440e-4f), r);
  auto p = S::set(1.9875691500e-4f);
  p = S::fma(p, r, S::set(1.3981999507e-3f));
  p = S::fma(p, r, S::set(8.3334519073e-3f));
  p = S::fma(p, r, S::set(4.1665795894e-2f));
  p = S::fma(p, r, S::set(1.6666665459e-1f));
  p = S::fma(p, r, S::set(5.0000001201e-1f));
  return {n, S::fma(p, S::mul(r, r), r)};
}

template <class S>
inline typename S::Float exp(typename S::Float x) {
  // Beyond these the result is 0 or infinity; within them n fits S::scale.
  x = S::min(S::set(89.0f), S::max(S::set(-104.5f), x));
  const Reduced<S> y = reduce<S>(x);
  return S::scale(S::add(y.expm1_r, S::set(1.0f)), y.n);
}

// Odd polynomial up to 1 (least squares, reweighted towards the largest relative error: 5e-9),
// 1 - 2·e/(1 + e) with e = exp(-2 |x|) beyond.
template <class S>
inline typename S::Float tanh(typename S::Float x) {
  const auto size = S::abs(x);
  const auto x2 = S::mul(x, x);
  auto p = S::set(-3.58451827e-4f);
  p = S::fma(p, x2, S::set(2.30136397e-3f));
  p = S::fma(p, x2, S::set(-7.94610567e-3f));
  p = S::fma(p, x2, S::set(2.14866567e-2f));
  p = S::fma(p, x2, S::set(-5.38798012e-2f));
  p = S::fma(p, x2, S::set(1.33323446e-1f));
  p = S::fma(p, x2, S::set(-3.33332956e-1f));
  p = S::fma(S::mul(p, x2), size, size);
  const auto y = reduce<S>(S::max(S::set(-40.0f), S::mul(S::set(-2.0f), size)));
  const auto one = S::set(1.0f);
  // e and 1 + e from a power of two, rounded once each.
  const auto power = S::scale_normal(one, y.n);
  const auto e = S::fma(power, y.expm1_r, power);
  const auto sum = S::fma(power, y.expm1_r, S::add(power, one));
  const auto far = S::fnma(S::set(2.0f), S::div(e, sum), one);
  return S::copy_sign(S::select(S::less(size, S::set(1.0f)), p, far), x);
}

// log of x >= 0.
template <class S>
inline typename S::Float log(typename S::Float x) {
  const auto subnormal = S::less(x, S::set(0x1p-126f));
  const auto y = S::select(subnormal, S::mul(x, S::set(0x1p32f)), x);
  auto n = S::sub(S::exponent(y), S::select(subnormal, S::set(32.0f), S::set(0.0f)));
  auto m = S::mantissa(y);
  const auto low = S::less(m, S::set(0.707106781f));
  n = S::sub(n, S::select(low, S::set(1.0f), S::set(0.0f)));
  const auto r = S::sub(S::select(low, S::add(m, m), m), S::set(1.0f));
  auto p = S::set(7.0376836292e-2f);
  p = S::fma(p, r, S::set(-1.1514610310e-1f));
  p = S::fma(p, r, S::set(1.1676998740e-1f));
  p = S::fma(p, r, S::set(-1.2420140846e-1f));
  p = S::fma(p, r, S::set(1.4249322787e-1f));
  p = S::fma(p, r, S::set(-1.6668057665e-1f));
  p = S::fma(p, r, S::set(2.0000714765e-1f));
  p = S::fma(p, r, S::set(-2.4999993993e-1f));
  p = S::fma(p, r, S::set(3.3333331174e-1f));
  const auto r2 = S::mul(r, r);
  p = S::fma(n, S::set(-2.12194440e-4f), S::mul(p, S::mul(r, r2)));
  p = S::add(r, S::fnma(S::set(0.5f), r2, p));
  p = S::fma(n, S::set(0.693359375f), p);
  p = S::select(S::equal(x, S::set(0.0f)), S::set(-INFINITY), p);
  return S::select(S::less(x, S::set(INFINITY)), p, x);  // infinity and NaN stay
}

}  // namespace
