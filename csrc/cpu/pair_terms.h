// The divergences cell by cell: f, ∂f/∂s and ∂f/∂t of log-probabilities s and t, with p and q.
//
// What a word that one head or both exclude contributes must be a number: log p is kExcluded there.
#pragma once

#include <cmath>

#include "fastpo/pair_rows.h"
#include "vectors/math.h"

namespace {

template <class S>
struct Cell {
  typename S::Float s, t, p, q;
};

template <class S>
struct Term {
  typename S::Float f, ds, dt;
};

template <class S>
struct ForwardKl {
  explicit ForwardKl(double) {}
  Term<S> operator()(const Cell<S>& c) const {
    const auto f = S::mul(c.q, S::sub(c.t, c.s));
    return {f, S::sub(S::set(0.0f), c.q), S::add(f, c.q)};
  }
};

template <class S>
struct ReverseKl {
  explicit ReverseKl(double) {}
  Term<S> operator()(const Cell<S>& c) const {
    const auto f = S::mul(c.p, S::sub(c.s, c.t));
    return {f, S::add(f, c.p), S::sub(S::set(0.0f), c.p)};
  }
};

template <class S>
struct Jsd {
  typename S::Float student, teacher;  // weights of the mixture

  explicit Jsd(double beta)
      : student(S::set(static_cast<float>(1.0 - beta))),
        teacher(S::set(static_cast<float>(beta))) {}

  Term<S> operator()(const Cell<S>& c) const {
    const auto p = S::mul(student, c.p), q = S::mul(teacher, c.q);
    // Where both underflow, 0·(l - floor) is 0.
    const auto mixture = S::max(S::set(fastpo::kLogFloor), log<S>(S::add(p, q)));
    // What moves the mixture cancels between the two terms.
    const auto ds = S::mul(p, S::sub(c.s, mixture)), dt = S::mul(q, S::sub(c.t, mixture));
    return {S::add(ds, dt), ds, dt};
  }
};

template <class S>
struct Alpha {
  typename S::Float alpha, minus_alpha, rest;

  explicit Alpha(double a)
      : alpha(S::set(static_cast<float>(a))),
        minus_alpha(S::set(static_cast<float>(-a))),
        rest(S::set(static_cast<float>(1.0 - a))) {}

  Term<S> operator()(const Cell<S>& c) const {
    const auto exponent = S::fma(alpha, c.t, S::mul(rest, c.s));
    const auto e = exp<S>(S::min(S::set(fastpo::kLargestExponent), exponent));
    // (p - e)/α and (q - e)/(1 - α), as products: near α = 0 and 1 only rounding would be left of
    // the differences.
    const auto gap = S::mul(S::set(0.5f), S::sub(c.t, c.s));
    const auto ds = S::div(S::mul(S::add(e, c.p), tanh<S>(S::mul(alpha, gap))), minus_alpha);
    const auto dt = S::div(S::mul(S::add(e, c.q), tanh<S>(S::mul(rest, gap))), rest);
    return {S::add(ds, dt), ds, dt};
  }
};

template <class S>
struct Tvd {
  explicit Tvd(double) {}
  Term<S> operator()(const Cell<S>& c) const {
    const auto zero = S::set(0.0f), half = S::set(0.5f);
    const auto gap = S::sub(c.p, c.q);
    auto sign = S::select(S::equal(gap, zero), zero, S::copy_sign(half, gap));
    sign = S::select(S::is_nan(gap), gap, sign);
    return {S::mul(half, S::abs(gap)), S::mul(sign, c.p), S::sub(zero, S::mul(sign, c.q))};
  }
};

}  // namespace
