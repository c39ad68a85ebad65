// What forward and backward share: the walk over a row around its label, and logits from products.
#pragma once

#include <cmath>
#include <cstdint>

#include "fastpo/rows.h"
#include "vectors/half.h"
#include "vectors/math.h"

namespace {

using fastpo::LogitMap;

// All lanes of a pack.
template <class S>
struct Whole {
  using Float = typename S::Float;
  template <class T>
  Float load(const T* p) const {
    return S::load(p);
  }
  template <class T>
  void store(T* p, Float x) const {
    S::store(p, x);
  }
  Float fill(Float x, float) const { return x; }
};

// The first `count` lanes; memory behind the others is never touched.
template <class S>
struct Partial {
  using Float = typename S::Float;
  int64_t count;
  template <class T>
  Float load(const T* p) const {
    return S::load_first(p, count);
  }
  template <class T>
  void store(T* p, Float x) const {
    S::store_first(p, x, count);
  }
  Float fill(Float x, float other) const { return S::select(S::first(count), x, S::set(other)); }
};

template <class S, class Body>
inline void sweep(int64_t begin, int64_t end, Body&& body) {
  int64_t column = begin;
  for (; column + S::kWidth <= end; column += S::kWidth) body(column, Whole<S>{});
  if (column < end) body(column, Partial<S>{end - column});
}

// The others are the columns [0, before) and [after, v).
struct Split {
  int64_t before, after;
  bool has_label() const { return after > before; }
};

inline Split split_at(int64_t label, int64_t first, int64_t v) {
  if (label < first) return {0, 0};
  const int64_t column = label - first;
  return column < v ? Split{column, column + 1} : Split{v, v};
}

template <class S, bool kCap>
struct Logits {
  using Float = typename S::Float;
  LogitMap map;
  const float* bias;
  const float* x;  // the row's products

  Logits(const LogitMap& logit_map, const float* words, int64_t first, const float* products)
      : map(logit_map), bias(words == nullptr ? nullptr : words + first), x(products) {}

  template <class Lanes>
  Float argument(int64_t column, Lanes lanes) const {
    Float u = lanes.load(x + column);
    if (bias != nullptr) u = S::add(u, lanes.load(bias + column));
    return S::mul(u, S::set(map.inner));
  }

  // z is monotonic in its argument, so a maximum is taken before the soft-cap.
  float value(float u) const {
    return kCap ? S::lane(S::mul(S::set(map.cap), tanh<S>(S::set(u)))) : u;
  }
  float value_at(int64_t column) const { return value(S::lane(argument(column, Partial<S>{1}))); }
};

// Columns that are handled together. A lane then adds kCarry floats before a sum goes to double.
constexpr int64_t kCarry = 32;

template <class S>
constexpr int64_t kBlock = kCarry * S::kWidth;

// Logits of [begin, end), at most kBlock columns. tanh has a loop of its own: chained with exp the
// processor sees too few independent packs (Zen 3: 2.07 ns per element against 1.34).
template <class S, bool kCap>
struct LogitBlock {
  using Float = typename S::Float;
  const Logits<S, kCap>& logits;
  int64_t begin;
  float saturation[kCap ? kBlock<S> : 1];

  LogitBlock(const Logits<S, kCap>& row, int64_t from, int64_t end) : logits(row), begin(from) {
    if constexpr (kCap) {
      sweep<S>(from, end, [&](int64_t column, auto lanes) {
        lanes.store(saturation + column - begin, tanh<S>(logits.argument(column, lanes)));
      });
    }
  }

  struct Value {
    Float z, slope;  // slope of the soft-cap
  };
  template <class Lanes>
  Value at(int64_t column, Lanes lanes) const {
    const Float one = S::set(1.0f);
    if constexpr (!kCap) return {logits.argument(column, lanes), one};
    const Float t = lanes.load(saturation + column - begin);
    return {S::mul(t, S::set(logits.map.cap)), S::fnma(t, t, one)};
  }
};

template <class S, class Body>
inline void for_blocks(int64_t begin, int64_t end, Body&& body) {
  for (int64_t block = begin; block < end; block += kBlock<S>) {
    body(block, block + kBlock<S> < end ? block + kBlock<S> : end);
  }
}

inline float nan_max(float a, float b) { return a > b || a != a ? a : b; }

// x clamped from below; NaN stays NaN.
inline double at_least(double floor, double x) { return x < floor ? floor : x; }

}  // namespace
