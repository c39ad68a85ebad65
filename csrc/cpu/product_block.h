// A block of a product in AVX-512: operands are packed, 14 x 32 cells added up in registers.
//
// Each cell is chains over kChain terms, added in order, whatever rows stand beside it. A term is
// one multiplication of float32 numbers, or two of bfloat16, in 32 bits of either operand: T says
// which. As in rows_isa.h, no standard template is instantiated.
#pragma once

#include <immintrin.h>

#include "product_isa.h"

namespace {

using fastpo::kChain;
using fastpo::kPanelColumns;
using fastpo::kPanelRows;
using fastpo::panel_start;
using fastpo::Product;
using fastpo::ProductBlock;

constexpr int64_t kLanes = 16;

__mmask16 first(int64_t count) {
  return static_cast<__mmask16>(count >= kLanes ? 0xffff : count <= 0 ? 0 : (1u << count) - 1u);
}

// Rows become columns: in quarters of four lanes, then the quarters.
void transpose(__m512 (&x)[16]) {
  __m512 y[16];
  for (int i = 0; i < 16; i += 4) {
    const __m512d ab = _mm512_castps_pd(_mm512_unpacklo_ps(x[i], x[i + 1]));
    const __m512d AB = _mm512_castps_pd(_mm512_unpackhi_ps(x[i], x[i + 1]));
    const __m512d cd = _mm512_castps_pd(_mm512_unpacklo_ps(x[i + 2], x[i + 3]));
    const __m512d CD = _mm512_castps_pd(_mm512_unpackhi_ps(x[i + 2], x[i + 3]));
    y[i] = _mm512_castpd_ps(_mm512_unpacklo_pd(ab, cd));
    y[i + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(ab, cd));
    y[i + 2] = _mm512_castpd_ps(_mm512_unpacklo_pd(AB, CD));
    y[i + 3] = _mm512_castpd_ps(_mm512_unpackhi_pd(AB, CD));
  }
  for (int i = 0; i < 4; ++i) {
    const __m512 even = _mm512_shuffle_f32x4(y[i], y[i + 4], 0x88);
    const __m512 odd = _mm512_shuffle_f32x4(y[i], y[i + 4], 0xdd);
    const __m512 EVEN = _mm512_shuffle_f32x4(y[i + 8], y[i + 12], 0x88);
    const __m512 ODD = _mm512_shuffle_f32x4(y[i + 8], y[i + 12], 0xdd);
    x[i] = _mm512_shuffle_f32x4(even, EVEN, 0x88);
    x[i + 4] = _mm512_shuffle_f32x4(odd, ODD, 0x88);
    x[i + 8] = _mm512_shuffle_f32x4(even, EVEN, 0xdd);
    x[i + 12] = _mm512_shuffle_f32x4(odd, ODD, 0xdd);
  }
}

// What the next call will pack, of the next chain, is asked of memory: a processor sees through
// neither 32 rows that are read at once nor one row that is read far from the one before.
void prefetch(const void* p) { _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T0); }

// Vectors of an operand: `count` of them, numbers of one `along` apart, of which `left` are there.
template <class T>
struct Vectors {
  const typename T::Number* from;
  int64_t across, along, count, left;
};

// Terms of up to 16 vectors beside one another, `pitch` from one term to the next, 0 in lanes of no
// vector below `lanes`.
template <class T>
void pack_lanes(const Vectors<T>& x, int64_t terms, float* to, int64_t pitch, int64_t lanes) {
  const __mmask16 read = first(x.count), write = first(lanes);
  if (x.across == 1) {
    for (int64_t k = 0; k < terms; ++k) {
      const int64_t place = k * T::kNumbers;
      prefetch(x.from + (place + kChain * T::kNumbers) * x.along);
      const __m512 term = T::across(x.from + place * x.along, x.along, read, x.left - place);
      _mm512_mask_storeu_ps(to + k * pitch, write, term);
    }
    return;
  }
  for (int64_t k = 0; k < terms; k += kLanes) {
    const int64_t place = k * T::kNumbers;
    __m512 rows[16];
    for (int64_t i = 0; i < 16; ++i) {
      const typename T::Number* own = x.from + i * x.across + place;
      prefetch(own + kChain * T::kNumbers);
      rows[i] = i < x.count ? T::along(own, x.left - place) : _mm512_setzero_ps();
    }
    transpose(rows);
    const int64_t last = terms - k < kLanes ? terms - k : kLanes;
    for (int64_t i = 0; i < last; ++i) _mm512_mask_storeu_ps(to + (k + i) * pitch, write, rows[i]);
  }
}

template <class T>
void pack(const ProductBlock& block, int64_t panel) {
  const Product& work = block.work;
  const int64_t start = panel_start(block, panel), rows = panel_start(block, panel + 1) - start;
  const int64_t place = block.depth * T::kNumbers;
  const auto* from = static_cast<const typename T::Number*>(work.a) +
                     (block.row + start) * work.a_row + place * work.a_column;
  const Vectors<T> vectors = {from, work.a_row, work.a_column, rows, work.h - place};
  pack_lanes(vectors, block.depths, block.packed + start * block.depths, rows, rows);
}

struct Place {
  float* out;
  int64_t stride;
  __mmask16 low, high;  // columns that are there
  bool add;
};

template <class T, int kRowsHere>
void panel_product(const float* a, const float* b, int64_t depths, const Place& place) {
  __m512 sum[kRowsHere][2];
#pragma GCC unroll 14
  for (int i = 0; i < kRowsHere; ++i) sum[i][0] = sum[i][1] = _mm512_setzero_ps();
  for (int64_t k = 0; k < depths; ++k, a += kRowsHere, b += kPanelColumns) {
    const __m512 low = _mm512_load_ps(b), high = _mm512_load_ps(b + kLanes);
#pragma GCC unroll 14
    for (int i = 0; i < kRowsHere; ++i) {
      const __m512 x = _mm512_set1_ps(a[i]);
      sum[i][0] = T::add(x, low, sum[i][0]);
      sum[i][1] = T::add(x, high, sum[i][1]);
    }
  }
#pragma GCC unroll 14
  for (int i = 0; i < kRowsHere; ++i) {
    float* out = place.out + i * place.stride;
    if (place.add) {
      sum[i][0] = _mm512_add_ps(_mm512_maskz_loadu_ps(place.low, out), sum[i][0]);
      sum[i][1] = _mm512_add_ps(_mm512_maskz_loadu_ps(place.high, out + kLanes), sum[i][1]);
    }
    _mm512_mask_storeu_ps(out, place.low, sum[i][0]);
    _mm512_mask_storeu_ps(out + kLanes, place.high, sum[i][1]);
  }
}

using PanelProduct = void (*)(const float*, const float*, int64_t, const Place&);
template <class T>
constexpr PanelProduct kPanelProducts[kPanelRows + 1] = {nullptr,
                                                         panel_product<T, 1>,
                                                         panel_product<T, 2>,
                                                         panel_product<T, 3>,
                                                         panel_product<T, 4>,
                                                         panel_product<T, 5>,
                                                         panel_product<T, 6>,
                                                         panel_product<T, 7>,
                                                         panel_product<T, 8>,
                                                         panel_product<T, 9>,
                                                         panel_product<T, 10>,
                                                         panel_product<T, 11>,
                                                         panel_product<T, 12>,
                                                         panel_product<T, 13>,
                                                         panel_product<T, 14>};

// Terms [depth, depth + depths) of the block's.
template <class T>
void multiply_part(const ProductBlock& block, int64_t column, int64_t begin, int64_t end,
                   int64_t depth, int64_t depths) {
  const Product& work = block.work;
  alignas(64) float b[kChain * kPanelColumns];
  const int64_t place = (block.depth + depth) * T::kNumbers, left = work.v - column;
  const auto* from = static_cast<const typename T::Number*>(work.b) + place * work.b_row;
  for (int64_t half = 0; half < kPanelColumns; half += kLanes) {
    const int64_t count = left - half < kLanes ? (left > half ? left - half : 0) : kLanes;
    const Vectors<T> vectors = {from + (column + half) * work.b_column, work.b_column, work.b_row,
                                count, work.h - place};
    pack_lanes(vectors, depths, b + half, kPanelColumns, kLanes);
  }
  for (int64_t panel = begin; panel < end; ++panel) {
    const int64_t start = panel_start(block, panel), rows = panel_start(block, panel + 1) - start;
    float* out = work.out + (block.row + start) * work.out_stride + column;
    const Place place = {out, work.out_stride, first(left), first(left - kLanes),
                         work.add || block.depth + depth > 0};
    kPanelProducts<T>[rows](block.packed + start* block.depths + depth* rows, b, depths, place);
  }
}

template <class T>
void multiply(const ProductBlock& block, int64_t column, int64_t begin, int64_t end) {
  for (int64_t depth = 0; depth < block.depths; depth += kChain) {
    const int64_t left = block.depths - depth;
    multiply_part<T>(block, column, begin, end, depth, left < kChain ? left : kChain);
  }
}

}  // namespace
