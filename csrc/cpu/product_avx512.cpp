// A block of a product in AVX-512: operands are packed, 14 x 32 cells added up in registers.
//
// Each cell is chains of fused multiply-adds over kChain terms, added in order, whatever rows stand
// beside it. As in rows_isa.h, no standard template is instantiated.
#include <immintrin.h>

#include "product_isa.h"

namespace fastpo {
namespace {

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
void prefetch(const float* p) { _mm_prefetch(reinterpret_cast<const char*>(p), _MM_HINT_T0); }

// Up to 16 vectors of `depths` numbers, `across` apart: their numbers beside one another, `pitch`
// from one to the next, 0 in lanes of no vector below `lanes`.
void pack_lanes(const float* from, int64_t across, int64_t along, int64_t count, int64_t depths,
                float* to, int64_t pitch, int64_t lanes) {
  const __mmask16 read = first(count), write = first(lanes);
  if (across == 1) {
    for (int64_t k = 0; k < depths; ++k) {
      prefetch(from + (k + kChain) * along);
      _mm512_mask_storeu_ps(to + k * pitch, write, _mm512_maskz_loadu_ps(read, from + k * along));
    }
    return;
  }
  for (int64_t k = 0; k < depths; k += kLanes) {
    const __mmask16 mask = first(depths - k);
    __m512 x[16];
    for (int64_t i = 0; i < 16; ++i) {
      const float* own = from + i * across + k;
      prefetch(own + kChain);
      x[i] = i < count ? _mm512_maskz_loadu_ps(mask, own) : _mm512_setzero_ps();
    }
    transpose(x);
    const int64_t last = depths - k < kLanes ? depths - k : kLanes;
    for (int64_t i = 0; i < last; ++i) _mm512_mask_storeu_ps(to + (k + i) * pitch, write, x[i]);
  }
}

void pack(const ProductBlock& block, int64_t panel) {
  const Product& work = block.work;
  const int64_t start = panel_start(block, panel), rows = panel_start(block, panel + 1) - start;
  pack_lanes(work.a + (block.row + start) * work.a_row + block.depth * work.a_column, work.a_row,
             work.a_column, rows, block.depths, block.packed + start * block.depths, rows, rows);
}

struct Place {
  float* out;
  int64_t stride;
  __mmask16 low, high;  // columns that are there
  bool add;
};

template <int kRowsHere>
void panel_product(const float* a, const float* b, int64_t depths, const Place& place) {
  __m512 sum[kRowsHere][2];
#pragma GCC unroll 14
  for (int i = 0; i < kRowsHere; ++i) sum[i][0] = sum[i][1] = _mm512_setzero_ps();
  for (int64_t k = 0; k < depths; ++k, a += kRowsHere, b += kPanelColumns) {
    const __m512 low = _mm512_load_ps(b), high = _mm512_load_ps(b + kLanes);
#pragma GCC unroll 14
    for (int i = 0; i < kRowsHere; ++i) {
      const __m512 x = _mm512_set1_ps(a[i]);
      sum[i][0] = _mm512_fmadd_ps(x, low, sum[i][0]);
      sum[i][1] = _mm512_fmadd_ps(x, high, sum[i][1]);
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
constexpr PanelProduct kPanelProducts[kPanelRows + 1] = {
    nullptr,           panel_product<1>,  panel_product<2>,  panel_product<3>,  panel_product<4>,
    panel_product<5>,  panel_product<6>,  panel_product<7>,  panel_product<8>,  panel_product<9>,
    panel_product<10>, panel_product<11>, panel_product<12>, panel_product<13>, panel_product<14>};

// Terms [depth, depth + depths) of the block's.
void multiply_part(const ProductBlock& block, int64_t column, int64_t begin, int64_t end,
                   int64_t depth, int64_t depths) {
  const Product& work = block.work;
  alignas(64) float b[kChain * kPanelColumns];
  const float* from = work.b + (block.depth + depth) * work.b_row + column * work.b_column;
  const int64_t left = work.v - column;
  for (int64_t half = 0; half < kPanelColumns; half += kLanes) {
    const int64_t count = left - half < kLanes ? (left > half ? left - half : 0) : kLanes;
    pack_lanes(from + half * work.b_column, work.b_column, work.b_row, count, depths, b + half,
               kPanelColumns, kLanes);
  }
  for (int64_t panel = begin; panel < end; ++panel) {
    const int64_t start = panel_start(block, panel), rows = panel_start(block, panel + 1) - start;
    float* out = work.out + (block.row + start) * work.out_stride + column;
    const Place place = {out, work.out_stride, first(left), first(left - kLanes),
                         work.add || block.depth + depth > 0};
    kPanelProducts[rows](block.packed + start * block.depths + depth * rows, b, depths, place);
  }
}

void multiply(const ProductBlock& block, int64_t column, int64_t begin, int64_t end) {
  for (int64_t depth = 0; depth < block.depths; depth += kChain) {
    const int64_t left = block.depths - depth;
    multiply_part(block, column, begin, end, depth, left < kChain ? left : kChain);
  }
}

}  // namespace

extern const ProductTable kProductAvx512 = {pack, multiply};

}  // namespace fastpo
