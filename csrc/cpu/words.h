// One row of products with a few words, and one sum of a few rows.
#pragma once

#include <cstdint>

#include "fastpo/words.h"
#include "row.h"
#include "vectors/half.h"

namespace {

using fastpo::DType;
using fastpo::WordProducts;
using fastpo::WordSums;

// Packs that are added up side by side: a chain of one would wait for every addition.
constexpr int kChains = 8;

template <class S, class T>
inline float dot(const float* x, const T* y, int64_t h) {
  typename S::Float sums[kChains];
  for (auto& sum : sums) sum = S::set(0.0f);
  constexpr int64_t kStep = kChains * S::kWidth;
  int64_t column = 0;
  for (; column + kStep <= h; column += kStep) {
    for (int i = 0; i < kChains; ++i) {
      const int64_t c = column + i * S::kWidth;
      sums[i] = S::fma(S::load(x + c), S::load(y + c), sums[i]);
    }
  }
  int next = 0;
  sweep<S>(column, h, [&](int64_t c, auto lanes) {
    auto& sum = sums[next++];
    sum = S::fma(lanes.load(x + c), lanes.load(y + c), sum);
  });
  double total = 0;
  for (const auto& sum : sums) total += S::sum_of(sum);
  return static_cast<float>(total);
}

template <class S, class T>
[[gnu::flatten]] void word_products_row(const WordProducts& t, int64_t row) {
  const float* x = t.hidden + row * t.hidden_stride;
  for (int64_t j = row * t.v; j < (row + 1) * t.v; ++j) {
    const T* words = static_cast<const T*>(t.weight);
    t.out[j] = t.ids[j] < 0 ? 0.0f : dot<S>(x, words + t.ids[j] * t.weight_stride, t.h);
  }
}

// Columns [column, column + kChains packs) of a sum stay in registers while rows pass by.
template <class S, class T, class Out, class Lanes>
inline void sum_columns(const WordSums& t, int64_t row, int64_t column, int packs, Lanes lanes) {
  typename S::Float sums[kChains];
  for (auto& sum : sums) sum = S::set(0.0f);
  for (int64_t j = t.offsets[row]; j < t.offsets[row + 1]; ++j) {
    if (t.index[j] < 0) continue;
    const T* x = static_cast<const T*>(t.rows) + t.index[j] * t.rows_stride + column;
    const auto scale = S::set(t.coefficients[j]);
    for (int i = 0; i < packs; ++i) {
      sums[i] = S::fma(scale, lanes.load(x + i * S::kWidth), sums[i]);
    }
  }
  Out* out = static_cast<Out*>(t.out) + row * t.out_stride + column;
  for (int i = 0; i < packs; ++i) lanes.store(out + i * S::kWidth, sums[i]);
}

template <class S, class T, class Out>
[[gnu::flatten]] void word_sums_row(const WordSums& t, int64_t row) {
  constexpr int64_t kStep = kChains * S::kWidth;
  int64_t column = 0;
  for (; column + kStep <= t.v; column += kStep) {
    sum_columns<S, T, Out>(t, row, column, kChains, Whole<S>{});
  }
  sweep<S>(column, t.v,
           [&](int64_t c, auto lanes) { sum_columns<S, T, Out>(t, row, c, 1, lanes); });
}

using WordProductsRow = void (*)(const WordProducts&, int64_t);
using WordSumsRow = void (*)(const WordSums&, int64_t);

template <class S>
inline WordProductsRow choose_word_products(const WordProducts& t) {
  switch (t.weight_dtype) {
    case DType::kBFloat16:
      return word_products_row<S, BFloat16>;
    case DType::kFloat16:
      return word_products_row<S, Float16>;
    default:
      return word_products_row<S, float>;
  }
}

template <class S, class T>
inline WordSumsRow word_sums_row_for(const WordSums& t) {
  switch (t.out_dtype) {
    case DType::kBFloat16:
      return word_sums_row<S, T, BFloat16>;
    case DType::kFloat16:
      return word_sums_row<S, T, Float16>;
    default:
      return word_sums_row<S, T, float>;
  }
}

template <class S>
inline WordSumsRow choose_word_sums(const WordSums& t) {
  switch (t.rows_dtype) {
    case DType::kBFloat16:
      return word_sums_row_for<S, BFloat16>(t);
    case DType::kFloat16:
      return word_sums_row_for<S, Float16>(t);
    default:
      return word_sums_row_for<S, float>(t);
  }
}

}  // namespace
