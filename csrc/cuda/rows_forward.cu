// Forward: one block per row. The tile is read once for the statistics, with a running maximum, and
// once more when exponentials are kept: they need the maximum of the whole row.
#include "row.cuh"

namespace {

using fastpo::ForwardTile;

struct RowSums {
  float m, others, moment, squares, sum, before;
};

__device__ inline RowSums no_columns() { return {-INFINITY, 0.0f, 0.0f, 0.0f, 0.0f, -INFINITY}; }

// Re-expresses the sums relative to a maximum m >= sums.m. Equal infinities leave nothing to do.
template <bool kStats>
__device__ inline void raise(RowSums& sums, float m) {
  if (sums.m == m) return;
  const float gap = sums.m - m;
  const float shrink = expf(gap);
  if constexpr (kStats) {
    const float shifted = at_least(fastpo::kLogFloor, gap) * sums.others;
    sums.moment = shrink * (sums.moment + shifted);
    sums.squares *= shrink * shrink;
  }
  sums.others *= shrink;
  sums.m = m;
}

template <bool kStats>
__device__ inline void merge(RowSums& sums, RowSums other) {
  const float m = nan_max(sums.m, other.m);
  raise<kStats>(sums, m);
  raise<kStats>(other, m);
  sums.others += other.others;
  if constexpr (kStats) {
    sums.moment += other.moment;
    sums.squares += other.squares;
    sums.sum += other.sum;
    sums.before = nan_max(sums.before, other.before);
  }
}

template <bool kStats, int N>
__device__ inline void fold(RowSums& sums, const float (&z)[N], int64_t column, int64_t label) {
  float m = sums.m;
#pragma unroll
  for (int i = 0; i < N; ++i) m = nan_max(m, z[i]);
  raise<kStats>(sums, m);
  const float reference = at_least(fastpo::kLowest, m);
#pragma unroll
  for (int i = 0; i < N; ++i) {
    const float gap = z[i] - reference;
    const float e = column + i == label ? 0.0f : expf(gap);
    sums.others += e;
    if constexpr (kStats) {
      sums.moment += e * at_least(fastpo::kLogFloor, gap);
      sums.squares += e * e;
      sums.sum += z[i];
      if (column + i < label) sums.before = nan_max(sums.before, z[i]);
    }
  }
}

template <bool kStats>
__device__ inline RowSums from_lane(const RowSums& sums, int mask) {
  RowSums other = no_columns();
  const auto exchange = [mask](float x) { return __shfl_xor_sync(0xffffffffu, x, mask); };
  other.m = exchange(sums.m);
  other.others = exchange(sums.others);
  if constexpr (kStats) {
    other.moment = exchange(sums.moment);
    other.squares = exchange(sums.squares);
    other.sum = exchange(sums.sum);
    other.before = exchange(sums.before);
  }
  return other;
}

// The block's sums, the same bits in every thread. Everything read before is read by then.
template <bool kStats>
__device__ inline RowSums block_sums(RowSums sums) {
  constexpr int kWarp = 32;
  __shared__ RowSums warps[kThreads / kWarp];
  for (int mask = kWarp / 2; mask > 0; mask /= 2) {
    merge<kStats>(sums, from_lane<kStats>(sums, mask));
  }
  if (threadIdx.x % kWarp == 0) warps[threadIdx.x / kWarp] = sums;
  __syncthreads();
  sums = warps[0];
  for (int i = 1; i < kThreads / kWarp; ++i) merge<kStats>(sums, warps[i]);
  return sums;
}

template <bool kStats>
__device__ inline RowSums load_state(const ForwardTile& t, int64_t row) {
  const auto field = [&](int k) { return t.state[k * t.state_stride + row]; };
  RowSums sums = no_columns();
  sums.m = field(fastpo::kMax);
  sums.others = field(fastpo::kOthers);
  if constexpr (kStats) {
    sums.moment = field(fastpo::kMoment);
    sums.squares = field(fastpo::kSquares);
    sums.sum = field(fastpo::kSum);
    sums.before = field(fastpo::kBefore);
  }
  return sums;
}

template <bool kStats>
__device__ inline void store_state(const ForwardTile& t, int64_t row, const RowSums& sums) {
  const auto field = [&](int k) -> float& { return t.state[k * t.state_stride + row]; };
  field(fastpo::kMax) = sums.m;
  field(fastpo::kOthers) = sums.others;
  if constexpr (kStats) {
    if (t.stats & fastpo::kEntropyStat) field(fastpo::kMoment) = sums.moment;
    if (t.stats & fastpo::kSquaresStat) field(fastpo::kSquares) = sums.squares;
    if (t.stats & fastpo::kMeanStat) field(fastpo::kSum) = sums.sum;
    if (t.stats & fastpo::kTop1Stat) field(fastpo::kBefore) = sums.before;
  }
}

template <bool kCap, class Kept>
__device__ inline void keep(const ForwardTile& t, const Logits<kCap>& logits, int64_t row,
                            int64_t label, float anchor) {
  Kept* kept = static_cast<Kept*>(t.kept) + row * t.kept_stride;
  const int64_t head = head_of(kept);
  for_columns(0, t.v, head, is_aligned(logits.x + head), [&](int64_t column, auto count) {
    constexpr int N = decltype(count)::value;
    float z[N], slope[N];
    logits(column, z, slope);
#pragma unroll
    for (int i = 0; i < N; ++i) {
      z[i] = column + i == label ? 0.0f : expf(z[i] - anchor);
      if (kCap && t.fold_cap) z[i] *= slope[i];
    }
    store(kept + column, z);
  });
}

template <bool kCap, bool kStats, class Kept>
__global__ void __launch_bounds__(kThreads) forward_kernel(const ForwardTile t) {
  const int64_t row = blockIdx.x;
  const float* bias = t.bias == nullptr ? nullptr : t.bias + t.first;
  const Logits<kCap> logits{t.map.of_row(row), bias, t.tile + row * t.tile_stride};
  const int64_t word = t.labels[row];
  // A label left of the tile is left of every column; the difference of any two words is exact.
  const int64_t label = word < t.first ? -1 : word - t.first;
  const RowSums state = load_state<kStats>(t, row);
  // `kept` may be the tile itself: the label's logit is read before the block's barrier.
  const bool has_label = threadIdx.x == 0 && label >= 0 && label < t.v;
  const float target = has_label ? logits.at(label) : 0.0f;

  RowSums sums = no_columns();
  for_columns(0, t.v, head_of(logits.x), true, [&](int64_t column, auto count) {
    constexpr int N = decltype(count)::value;
    float z[N], slope[N];
    logits(column, z, slope);
    fold<kStats>(sums, z, column, label);
  });
  sums = block_sums<kStats>(sums);
  merge<kStats>(sums, state);
  constexpr float kHeadroom = std::is_same_v<Kept, __half> ? fastpo::kHalfHeadroom : 0.0f;
  const float anchor = at_least(fastpo::kLowest, sums.m) - kHeadroom;
  if (threadIdx.x == 0) {
    store_state<kStats>(t, row, sums);
    if (has_label) t.state[fastpo::kTarget * t.state_stride + row] = target;
    if constexpr (!std::is_void_v<Kept>) t.anchors[row] = anchor;
  }
  if constexpr (!std::is_void_v<Kept>) keep<kCap, Kept>(t, logits, row, label, anchor);
}

template <bool kCap, bool kStats>
void launch(const ForwardTile& t, unsigned blocks, cudaStream_t stream) {
  if (t.kept == nullptr) {
    forward_kernel<kCap, kStats, void><<<blocks, kThreads, 0, stream>>>(t);
  } else if (t.kept_dtype == DType::kBFloat16) {
    forward_kernel<kCap, kStats, __nv_bfloat16><<<blocks, kThreads, 0, stream>>>(t);
  } else if (t.kept_dtype == DType::kFloat16) {
    forward_kernel<kCap, kStats, __half><<<blocks, kThreads, 0, stream>>>(t);
  } else {
    forward_kernel<kCap, kStats, float><<<blocks, kThreads, 0, stream>>>(t);
  }
}

}  // namespace

void fastpo::rows_forward_cuda(const ForwardTile& t, int device, void* stream) {
  constexpr const char* kName = "rows_forward_cuda";
  if (t.n == 0) return;
  check(cudaSetDevice(device), kName, "set device failed");
  const unsigned blocks = checked_blocks(t.n, kName);
  const auto on = static_cast<cudaStream_t>(stream);
  if (t.map.cap > 0) {
    t.stats ? launch<true, true>(t, blocks, on) : launch<true, false>(t, blocks, on);
  } else {
    t.stats ? launch<false, true>(t, blocks, on) : launch<false, false>(t, blocks, on);
  }
  check(cudaGetLastError(), kName, "launch failed");
}
