// Backward of one row: d loss / d products from raw products or from kept exponentials.
#pragma once

#include <cmath>
#include <cstdint>
#include <type_traits>

#include "row.h"
#include "vectors/scalar.h"

namespace {

using fastpo::BackwardTile;
using fastpo::DType;

// The row's coefficients with dz/dx folded in: dx = exp(l)·(common - entropy·l).
struct RowGrads {
  float shift, log_mass;
  double common, entropy;
  float label;
};

inline RowGrads row_grads(const BackwardTile& t, int64_t row) {
  const auto field = [&](int k) { return t.grads[k * t.grads_stride + row]; };
  const double factor = t.map.tempered(t.factor, row);
  return {field(fastpo::kShift), field(fastpo::kLogMass), field(fastpo::kCommon) * factor,
          t.entropy_grad ? field(fastpo::kEntropy) * factor : 0.0, field(fastpo::kLabel)};
}

// log p of an exponential of 1 in `kept`.
inline double kept_shift(const BackwardTile& t, const RowGrads& g, int64_t row) {
  return static_cast<double>(t.anchors[row]) - g.shift - g.log_mass;
}

// From raw products.
template <class S, bool kCap>
struct FromProducts {
  using Float = typename S::Float;
  Logits<S, kCap> logits;
  Float shift, log_mass, common, entropy;

  FromProducts(const BackwardTile& t, const RowGrads& g, int64_t row)
      : logits(t.map.of_row(row), t.bias, t.first,
               static_cast<const float*>(t.source) + row * t.source_stride),
        shift(S::set(g.shift)),
        log_mass(S::set(g.log_mass)),
        common(S::set(static_cast<float>(g.common))),
        entropy(S::set(static_cast<float>(g.entropy))) {}

  template <class Store>
  void columns(int64_t begin, int64_t end, Store&& store) const {
    for_blocks<S>(begin, end, [&](int64_t from, int64_t to) {
      const LogitBlock<S, kCap> block(logits, from, to);
      sweep<S>(from, to, [&](int64_t column, auto lanes) {
        const auto value = block.at(column, lanes);
        const Float log_ratio = S::sub(S::sub(value.z, shift), log_mass);
        const Float log_p = S::max(S::set(fastpo::kLogFloor), log_ratio);
        const Float dz = S::mul(exp<S>(log_p), S::fnma(entropy, log_p, common));
        store(column, lanes, kCap ? S::mul(dz, value.slope) : dz);
      });
    });
  }
};

// From kept exponentials when neither entropy nor a soft-cap asks for the logarithm.
template <class S, class Kept>
struct FromKept {
  const Kept* kept;
  typename S::Float scale;

  FromKept(const BackwardTile& t, const RowGrads& g, int64_t row)
      : kept(static_cast<const Kept*>(t.source) + row * t.source_stride),
        scale(S::set(static_cast<float>(::exp(kept_shift(t, g, row)) * g.common))) {}

  template <class Store>
  void columns(int64_t begin, int64_t end, Store&& store) const {
    sweep<S>(begin, end, [&](int64_t column, auto lanes) {
      store(column, lanes, S::mul(lanes.load(kept + column), scale));
    });
  }
};

// float16 is stored around 2^14: brought back, its logarithms are small where p is large.
template <class Kept>
constexpr float kUnit = std::is_same_v<Kept, Float16> ? 0x1p-14f : 1.0f;

template <class S, class Kept>
struct FromKeptLog {
  using Float = typename S::Float;
  const Kept* kept;
  Float log_scale, scale, anchor, common, entropy;
  float cap;

  FromKeptLog(const BackwardTile& t, const RowGrads& g, int64_t row)
      : kept(static_cast<const Kept*>(t.source) + row * t.source_stride),
        common(S::set(static_cast<float>(g.common))),
        entropy(S::set(static_cast<float>(g.entropy))),
        cap(t.map.of_row(row).cap) {
    const double log_unit = ::log(static_cast<double>(kUnit<Kept>));
    const double log_p = kept_shift(t, g, row) - log_unit;
    log_scale = S::set(static_cast<float>(log_p));
    scale = S::set(static_cast<float>(::exp(log_p)));
    anchor = S::set(static_cast<float>(t.anchors[row] - log_unit));
  }

  template <class Store>
  void columns(int64_t begin, int64_t end, Store&& store) const {
    sweep<S>(begin, end, [&](int64_t column, auto lanes) {
      const Float e = S::mul(lanes.load(kept + column), S::set(kUnit<Kept>));
      const Float log_e = log<S>(e);
      const Float log_p = S::max(S::set(fastpo::kLogFloor), S::add(log_e, log_scale));
      const Float dz = S::mul(S::mul(e, scale), S::fnma(entropy, log_p, common));
      store(column, lanes, cap > 0 ? S::mul(dz, slope(log_e)) : dz);
    });
  }

  // 1 - (z/cap)², without cancellation where the cap saturates. An exponential that underflowed has
  // z = -inf here and p = 0.
  Float slope(Float log_e) const {
    const Float z = S::max(S::set(-cap), S::add(log_e, anchor));
    const Float unit = S::set(1.0f / cap);  // its square is out of range sooner
    return S::mul(S::mul(S::sub(S::set(cap), z), unit), S::mul(S::add(S::set(cap), z), unit));
  }
};

template <class S, class Map, class Out>
[[gnu::flatten]] void backward_row(const BackwardTile& t, int64_t row) {
  Out* out = static_cast<Out*>(t.out) + row * t.out_stride;
  const Split split = split_at(t.labels[row], t.first, t.v);
  const RowGrads grads = row_grads(t, row);
  const Map map(t, grads, row);
  const auto store = [&](int64_t column, auto lanes, typename S::Float x) {
    lanes.store(out + column, x);
  };
  map.columns(0, split.before, store);
  map.columns(split.after, t.v, store);
  if (split.has_label()) Scalar::store(out + split.before, grads.label);
}

using BackwardRow = void (*)(const BackwardTile&, int64_t);

template <class S, class Map>
inline BackwardRow backward_row_for(const BackwardTile& t) {
  switch (t.out_dtype) {
    case DType::kBFloat16:
      return backward_row<S, Map, BFloat16>;
    case DType::kFloat16:
      return backward_row<S, Map, Float16>;
    default:
      return backward_row<S, Map, float>;
  }
}

template <class S, class Kept>
inline BackwardRow backward_kept(const BackwardTile& t) {
  if (t.entropy_grad || t.map.cap > 0) return backward_row_for<S, FromKeptLog<S, Kept>>(t);
  return backward_row_for<S, FromKept<S, Kept>>(t);
}

template <class S>
inline BackwardRow choose_backward(const BackwardTile& t) {
  if (t.anchors == nullptr) {
    if (t.map.cap > 0) return backward_row_for<S, FromProducts<S, true>>(t);
    return backward_row_for<S, FromProducts<S, false>>(t);
  }
  switch (t.source_dtype) {
    case DType::kBFloat16:
      return backward_kept<S, BFloat16>(t);
    case DType::kFloat16:
      return backward_kept<S, Float16>(t);
    default:
      return backward_kept<S, float>(t);
  }
}

}  // namespace
