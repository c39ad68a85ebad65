// Forward of one row: the first pass finds the maximum, the second sums and stores exponentials.
#pragma once

#include <cmath>
#include <cstdint>
#include <type_traits>

#include "row.h"

namespace {

using fastpo::DType;
using fastpo::ForwardTile;

template <class S>
struct Peak {
  typename S::Float max = S::set(-INFINITY);
  typename S::Mask nan = S::none();

  void add(typename S::Float u) {
    max = S::max(max, u);
    nan = S::either(nan, S::is_nan(u));
  }
  float value() const { return S::any(nan) ? NAN : S::max_of(max); }
};

// The largest z of [begin, end), -inf when that is empty.
template <class S, bool kCap>
inline float peak(const Logits<S, kCap>& logits, int64_t begin, int64_t end) {
  if (begin >= end) return -INFINITY;
  Peak<S> even, odd;  // two chains hide the latency of max
  const Whole<S> whole;
  int64_t column = begin;
  for (; column + 2 * S::kWidth <= end; column += 2 * S::kWidth) {
    even.add(logits.argument(column, whole));
    odd.add(logits.argument(column + S::kWidth, whole));
  }
  sweep<S>(column, end, [&](int64_t c, auto lanes) {
    even.add(lanes.fill(logits.argument(c, lanes), -INFINITY));
  });
  return logits.value(nan_max(even.value(), odd.value()));
}

struct Totals {
  double others = 0, moment = 0, squares = 0, sum = 0;
};

template <class S>
struct Sums {
  typename S::Float others = S::set(0), moment = S::set(0), squares = S::set(0), sum = S::set(0);

  template <bool kStats>
  void carry(Totals& totals) const {
    totals.others += S::sum_of(others);
    if (!kStats) return;
    totals.moment += S::sum_of(moment);
    totals.squares += S::sum_of(squares);
    totals.sum += S::sum_of(sum);
  }
};

// Where the exponentials of a row go, and relative to what.
template <class Kept>
struct Target {
  Kept* kept;       // of void: nowhere
  float reference;  // finite maximum
  float lift;       // exp(reference - anchor)
  bool fold_cap;

  Kept* at(int64_t column) const {
    if constexpr (std::is_void_v<Kept>)
      return nullptr;
    else
      return kept + column;
  }
};

// `stored`: where the pack's exponentials go, float32 or the dtype of `kept`.
template <class S, bool kCap, bool kStats, class Kept, class Stored, class Lanes>
inline void fold_pack(const ForwardTile& t, const LogitBlock<S, kCap>& logits,
                      const Target<Kept>& target, int64_t column, Lanes lanes, Stored* stored,
                      Sums<S>& sums) {
  const auto value = logits.at(column, lanes);
  const auto gap = S::sub(value.z, S::set(target.reference));
  const auto e = lanes.fill(exp<S>(gap), 0.0f);
  sums.others = S::add(sums.others, e);
  if constexpr (kStats) {
    const auto clamped = S::max(S::set(fastpo::kLogFloor), gap);
    if (t.stats & fastpo::kEntropyStat) sums.moment = S::fma(e, clamped, sums.moment);
    if (t.stats & fastpo::kSquaresStat) sums.squares = S::fma(e, e, sums.squares);
    if (t.stats & fastpo::kMeanStat) sums.sum = S::add(sums.sum, lanes.fill(value.z, 0.0f));
  }
  if constexpr (!std::is_void_v<Kept>) {
    auto kept = e;
    if constexpr (std::is_same_v<Kept, Float16>) kept = S::mul(e, S::set(target.lift));
    if (kCap && target.fold_cap) kept = S::mul(kept, value.slope);
    lanes.store(stored, kept);
  }
}

template <class S, bool kCap, bool kStats, class Kept>
inline void fold_columns(const ForwardTile& t, const Logits<S, kCap>& logits,
                         const Target<Kept>& target, int64_t begin, int64_t end, Totals& totals) {
  for_blocks<S>(begin, end, [&](int64_t from, int64_t to) {
    const LogitBlock<S, kCap> block(logits, from, to);
    Sums<S> sums;
    // Rounding to bfloat16 is long enough to deserve a loop of its own, as tanh does.
    constexpr bool kRound = std::is_same_v<Kept, BFloat16>;
    float buffer[kRound ? kBlock<S> : 1];
    sweep<S>(from, to, [&](int64_t column, auto lanes) {
      if constexpr (kRound) {
        fold_pack<S, kCap, kStats>(t, block, target, column, lanes, buffer + column - from, sums);
      } else {
        fold_pack<S, kCap, kStats>(t, block, target, column, lanes, target.at(column), sums);
      }
    });
    if constexpr (kRound) {
      sweep<S>(from, to, [&](int64_t column, auto lanes) {
        lanes.store(target.at(column), lanes.load(buffer + column - from));
      });
    }
    sums.template carry<kStats>(totals);
  });
}

// Adds a tile's totals, relative to `reference`, to the state of its row.
inline void fold_state(const ForwardTile& t, float* state, float m, float reference,
                       const Totals& totals) {
  const auto field = [&](int row) -> float& { return state[row * t.state_stride]; };
  const double gap = static_cast<double>(field(fastpo::kMax)) - reference;
  const double shrink = ::exp(gap);
  const double others = field(fastpo::kOthers);
  if (t.stats & fastpo::kEntropyStat) {
    const double shifted = field(fastpo::kMoment) + at_least(fastpo::kLogFloor, gap) * others;
    field(fastpo::kMoment) = static_cast<float>(shrink * shifted + totals.moment);
  }
  if (t.stats & fastpo::kSquaresStat) {
    const double before = shrink * shrink * field(fastpo::kSquares);
    field(fastpo::kSquares) = static_cast<float>(before + totals.squares);
  }
  if (t.stats & fastpo::kMeanStat) {
    field(fastpo::kSum) = static_cast<float>(field(fastpo::kSum) + totals.sum);
  }
  field(fastpo::kOthers) = static_cast<float>(shrink * others + totals.others);
  field(fastpo::kMax) = m;
}

// The row's maximum with this tile; writes TARGET and BEFORE.
template <class S, bool kCap>
inline float fold_peaks(const ForwardTile& t, const Logits<S, kCap>& logits, Split split,
                        float* state) {
  const float earlier = peak(logits, 0, split.before);
  const float later = peak(logits, split.after, t.v);
  float m = nan_max(nan_max(earlier, later), state[fastpo::kMax * t.state_stride]);
  if (split.has_label()) {
    const float z = logits.value_at(split.before);
    state[fastpo::kTarget * t.state_stride] = z;
    m = nan_max(m, z);
  }
  if (t.stats & fastpo::kTop1Stat) {
    float& before = state[fastpo::kBefore * t.state_stride];
    before = nan_max(before, earlier);
  }
  return m;
}

template <class Kept>
inline Target<Kept> make_target(const ForwardTile& t, int64_t row, float m) {
  const float reference = m < fastpo::kLowest ? fastpo::kLowest : m;
  Target<Kept> target{nullptr, reference, 1.0f, t.fold_cap};
  if constexpr (!std::is_void_v<Kept>) {
    constexpr bool kHalf = std::is_same_v<Kept, Float16>;
    const float anchor = kHalf ? reference - fastpo::kHalfHeadroom : reference;
    target.kept = static_cast<Kept*>(t.kept) + row * t.kept_stride;
    if (reference < INFINITY) {
      target.lift = static_cast<float>(::exp(static_cast<double>(reference) - anchor));
    }
    t.anchors[row] = anchor;
  }
  return target;
}

template <class S, bool kCap, bool kStats, class Kept>
[[gnu::flatten]] void forward_row(const ForwardTile& t, int64_t row) {
  float* state = t.state + row;
  const Logits<S, kCap> logits(t.map.of_row(row), t.bias, t.first, t.tile + row * t.tile_stride);
  const Split split = split_at(t.labels[row], t.first, t.v);
  const float m = fold_peaks(t, logits, split, state);
  const Target<Kept> target = make_target<Kept>(t, row, m);
  Totals totals;
  if (split.has_label()) totals.sum = state[fastpo::kTarget * t.state_stride];
  fold_columns<S, kCap, kStats>(t, logits, target, 0, split.before, totals);
  fold_columns<S, kCap, kStats>(t, logits, target, split.after, t.v, totals);
  if constexpr (!std::is_void_v<Kept>) {
    if (split.has_label()) target.kept[split.before] = Kept{};
  }
  fold_state(t, state, m, target.reference, totals);
}

using ForwardRow = void (*)(const ForwardTile&, int64_t);

template <class S, bool kCap, bool kStats>
inline ForwardRow forward_row_for(const ForwardTile& t) {
  if (t.kept == nullptr) return forward_row<S, kCap, kStats, void>;
  switch (t.kept_dtype) {
    case DType::kBFloat16:
      return forward_row<S, kCap, kStats, BFloat16>;
    case DType::kFloat16:
      return forward_row<S, kCap, kStats, Float16>;
    default:
      return forward_row<S, kCap, kStats, float>;
  }
}

template <class S>
inline ForwardRow choose_forward(const ForwardTile& t) {
  const bool stats = t.stats & (fastpo::kEntropyStat | fastpo::kSquaresStat | fastpo::kMeanStat);
  if (t.map.cap > 0) {
    return stats ? forward_row_for<S, true, true>(t) : forward_row_for<S, true, false>(t);
  }
  return stats ? forward_row_for<S, false, true>(t) : forward_row_for<S, false, false>(t);
}

}  // namespace
