// The rows of two heads, in blocks that stay in the first cache: one simple loop per stage, each
// compiled once per soft-cap, divergence or dtype instead of once per combination.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "fastpo/pair_rows.h"
#include "forward.h"
#include "pair_terms.h"
#include "row.h"

namespace {

using fastpo::Divergence;
using fastpo::PairGradients;
using fastpo::PairRule;
using fastpo::PairSide;
using fastpo::PairSoftmaxes;
using fastpo::PairTile;
using fastpo::PairValues;

// kBlock columns of both heads. Stages run over whole packs: columns behind the row hold z = -inf,
// words that both heads exclude.
template <class S>
struct PairBlock {
  int64_t from, to;
  alignas(64) float z[2][kBlock<S>];
  alignas(64) float log_p[2][kBlock<S>];
  alignas(64) float p[2][kBlock<S>];
  alignas(64) float f[kBlock<S>];
  alignas(64) float df[2][kBlock<S>];  // ∂f/∂log p, then d products

  int64_t size() const { return to - from; }
};

template <class S, class Body>
inline void packs(const PairBlock<S>& block, Body&& body) {
  for (int64_t i = 0; i < block.size(); i += S::kWidth) body(i);
}

template <class S, class Use>
inline auto with_logits(const PairTile& t, int side, int64_t row, Use&& use) {
  const PairSide& head = t.sides[side];
  const float* x = head.tile + row * head.tile_stride;
  const LogitMap map = head.map.of_row(row);
  if (head.map.cap > 0) return use(Logits<S, true>(map, head.bias, t.first, x));
  return use(Logits<S, false>(map, head.bias, t.first, x));
}

template <class S, bool kCap>
[[gnu::flatten, gnu::noinline]] void write_logits(const Logits<S, kCap>& logits,
                                                  PairBlock<S>& block, int side) {
  sweep<S>(block.from, block.to, [&](int64_t column, auto lanes) {
    auto z = logits.argument(column, lanes);
    if constexpr (kCap) z = S::mul(tanh<S>(z), S::set(logits.map.cap));
    S::store(block.z[side] + column - block.from, lanes.fill(z, -INFINITY));
  });
}

// log p and p; returns Σ p.
template <class S>
[[gnu::flatten, gnu::noinline]] double write_softmax(PairBlock<S>& block, int side, float shift,
                                                     float log_mass) {
  auto sum = S::set(0.0f);
  packs<S>(block, [&](int64_t i) {
    const auto log_ratio = S::sub(S::load(block.z[side] + i), S::set(shift));
    const auto log_p = S::max(S::set(fastpo::kExcluded), S::sub(log_ratio, S::set(log_mass)));
    const auto p = exp<S>(log_p);
    S::store(block.log_p[side] + i, log_p);
    S::store(block.p[side] + i, p);
    sum = S::add(sum, p);
  });
  return S::sum_of(sum);
}

struct PairTotals {
  double mass[2] = {0, 0}, cross = 0, moment = 0;
};

// Σ exp(u_over)·(u_over - u_other).
template <class S>
[[gnu::flatten, gnu::noinline]] double cross_of(const PairBlock<S>& block, int over) {
  auto sum = S::set(0.0f);
  packs<S>(block, [&](int64_t i) {
    const auto gap = S::sub(S::load(block.log_p[over] + i), S::load(block.log_p[1 - over] + i));
    sum = S::fma(S::load(block.p[over] + i), gap, sum);
  });
  return S::sum_of(sum);
}

template <class S>
[[gnu::flatten, gnu::noinline]] double moment_of(const PairBlock<S>& block) {
  auto sum = S::set(0.0f);
  packs<S>(block, [&](int64_t i) {
    sum = S::fma(S::load(block.p[0] + i), S::load(block.log_p[0] + i), sum);
  });
  return S::sum_of(sum);
}

// Adds a tile's totals, relative to `maxima`, to the state of its row.
inline void fold_pair(const PairSoftmaxes& t, float* state, const float* maxima,
                      const float* references, const PairTotals& totals) {
  const auto field = [&](int row) -> float& { return state[row * t.state_stride]; };
  double shift[2], mass[2];
  for (int side = 0; side < 2; ++side) {
    const int step = side * fastpo::kPairStep;
    const double gap = static_cast<double>(field(fastpo::kPairMax + step)) - references[side];
    shift[side] = at_least(fastpo::kExcluded, gap);
    mass[side] = field(fastpo::kPairMass + step);
    const double folded = ::exp(shift[side]) * mass[side] + totals.mass[side];
    field(fastpo::kPairMass + step) = static_cast<float>(folded);
    field(fastpo::kPairMax + step) = maxima[side];
  }
  if (t.over >= 0) {
    const int a = t.over;
    const double moved = field(fastpo::kPairCross) + (shift[a] - shift[1 - a]) * mass[a];
    field(fastpo::kPairCross) = static_cast<float>(::exp(shift[a]) * moved + totals.cross);
  }
  if (t.entropy) {
    const double moved = field(fastpo::kPairMoment) + shift[0] * mass[0];
    field(fastpo::kPairMoment) = static_cast<float>(::exp(shift[0]) * moved + totals.moment);
  }
}

template <class S>
void pair_softmaxes_row(const PairSoftmaxes& t, int64_t row) {
  float maxima[2], references[2];
  for (int side = 0; side < 2; ++side) {
    const float before =
        t.state[(fastpo::kPairMax + side * fastpo::kPairStep) * t.state_stride + row];
    const auto highest = [&](const auto& logits) { return peak(logits, 0, t.v); };
    maxima[side] = nan_max(before, with_logits<S>(t, side, row, highest));
    references[side] = maxima[side] < fastpo::kLowest ? fastpo::kLowest : maxima[side];
  }
  PairTotals totals;
  PairBlock<S> block;
  for_blocks<S>(0, t.v, [&](int64_t from, int64_t to) {
    block.from = from, block.to = to;
    for (int side = 0; side < 2; ++side) {
      with_logits<S>(t, side, row, [&](const auto& logits) { write_logits(logits, block, side); });
      totals.mass[side] += write_softmax(block, side, references[side], 0.0f);
    }
    if (t.over >= 0) totals.cross += cross_of(block, t.over);
    if (t.entropy) totals.moment += moment_of(block);
  });
  fold_pair(t, t.state + row, maxima, references, totals);
}

template <class S, class Kind>
[[gnu::flatten, gnu::noinline]] void write_terms_of(const Kind& kind, PairBlock<S>& block) {
  packs<S>(block, [&](int64_t i) {
    const auto term = kind(Cell<S>{S::load(block.log_p[0] + i), S::load(block.log_p[1] + i),
                                   S::load(block.p[0] + i), S::load(block.p[1] + i)});
    S::store(block.f + i, term.f);
    S::store(block.df[0] + i, term.ds);
    S::store(block.df[1] + i, term.dt);
  });
}

template <class S>
inline void write_terms(const PairRule& rule, PairBlock<S>& block) {
  switch (rule.kind) {
    case Divergence::kForwardKl:
      return write_terms_of(ForwardKl<S>(rule.parameter), block);
    case Divergence::kReverseKl:
      return write_terms_of(ReverseKl<S>(rule.parameter), block);
    case Divergence::kJsd:
      return write_terms_of(Jsd<S>(rule.parameter), block);
    case Divergence::kAlpha:
      return write_terms_of(Alpha<S>(rule.parameter), block);
    case Divergence::kTvd:
      return write_terms_of(Tvd<S>(rule.parameter), block);
  }
}

// Everything up to the terms, for `values` and `gradients`.
template <class S, class Work>
inline void fill_pair(const Work& t, int64_t row, PairBlock<S>& block) {
  for (int side = 0; side < 2; ++side) {
    const auto constant = [&](int k) {
      return t.constants[(k + side * fastpo::kPairStep) * t.constants_stride + row];
    };
    with_logits<S>(t, side, row, [&](const auto& logits) { write_logits(logits, block, side); });
    write_softmax(block, side, constant(fastpo::kPairShift), constant(fastpo::kPairLogMass));
  }
  write_terms(t.rule, block);
}

template <class S>
[[gnu::flatten, gnu::noinline]] double sum_of(const PairBlock<S>& block, const float* x) {
  auto sum = S::set(0.0f);
  packs<S>(block, [&](int64_t i) { sum = S::add(sum, S::load(x + i)); });
  return S::sum_of(sum);
}

template <class S>
void pair_values_row(const PairValues& t, int64_t row) {
  double totals[3] = {0, 0, 0};
  PairBlock<S> block;
  for_blocks<S>(0, t.v, [&](int64_t from, int64_t to) {
    block.from = from, block.to = to;
    fill_pair(t, row, block);
    totals[0] += sum_of(block, block.f);
    totals[1] += sum_of(block, block.df[0]);
    totals[2] += sum_of(block, block.df[1]);
  });
  for (int k = 0; k < 3; ++k) t.sums[k * t.sums_stride + row] += totals[k];
}

// d products = (∂f/∂l - p·total)·scale, `scale` with dz/dx but for the soft-cap.
template <class S>
[[gnu::flatten, gnu::noinline]] void turn(PairBlock<S>& block, int side, float total, float scale) {
  float* df = block.df[side];
  packs<S>(block, [&](int64_t i) {
    const auto dz = S::fnma(S::load(block.p[side] + i), S::set(total), S::load(df + i));
    S::store(df + i, S::mul(dz, S::set(scale)));
  });
}

template <class S>
[[gnu::flatten, gnu::noinline]] void cap_slope(PairBlock<S>& block, int side, float cap) {
  float* df = block.df[side];
  packs<S>(block, [&](int64_t i) {
    const auto t = S::div(S::load(block.z[side] + i), S::set(cap));
    S::store(df + i, S::mul(S::load(df + i), S::fnma(t, t, S::set(1.0f))));
  });
}

template <class S, class Out>
[[gnu::flatten, gnu::noinline]] void write_out(const PairBlock<S>& block, const float* x,
                                               Out* out) {
  sweep<S>(block.from, block.to, [&](int64_t column, auto lanes) {
    lanes.store(out + column, S::load(x + column - block.from));
  });
}

inline char* out_row(const PairSide& side, int64_t row) {
  const int64_t size = side.out_dtype == DType::kFloat32 ? 4 : 2;
  return static_cast<char*>(side.out) + row * side.out_stride * size;
}

template <class S>
inline void write_gradient(const PairSide& side, int64_t row, const PairBlock<S>& block,
                           const float* x) {
  void* out = out_row(side, row);
  switch (side.out_dtype) {
    case DType::kBFloat16:
      return write_out(block, x, static_cast<BFloat16*>(out));
    case DType::kFloat16:
      return write_out(block, x, static_cast<Float16*>(out));
    default:
      return write_out(block, x, static_cast<float*>(out));
  }
}

inline void write_zeros(const PairGradients& t, int64_t row) {
  for (const PairSide& side : t.sides) {
    const int64_t size = side.out_dtype == DType::kFloat32 ? 4 : 2;
    if (side.out != nullptr) std::memset(out_row(side, row), 0, t.v * size);
  }
}

template <class S>
void pair_gradients_row(const PairGradients& t, int64_t row) {
  const auto factor = [&](int k) { return t.factors[k * t.factors_stride + row]; };
  const float grad = factor(fastpo::kPairGrad);
  if (grad == 0) return write_zeros(t, row);
  PairBlock<S> block;
  for_blocks<S>(0, t.v, [&](int64_t from, int64_t to) {
    block.from = from, block.to = to;
    fill_pair(t, row, block);
    for (int i = 0; i < 2; ++i) {
      const PairSide& side = t.sides[i];
      if (side.out == nullptr) continue;
      turn(block, i, factor(fastpo::kPairTotal + i), grad * side.map.tempered(side.factor, row));
      if (side.map.cap > 0) cap_slope(block, i, side.map.of_row(row).cap);
      write_gradient(side, row, block, block.df[i]);
    }
  });
}

}  // namespace
