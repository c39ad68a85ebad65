// Backward: elementwise over a tile; one block per row and kColumns columns.
#include "row.cuh"

namespace {

using fastpo::BackwardTile;

constexpr int64_t kColumns = 2 * kThreads * kPack;

// The row's coefficients with dz/dx folded in: dx = exp(l)·(common - entropy·l).
struct RowGrads {
  float shift, log_mass, common, entropy, label;
};

__device__ inline RowGrads row_grads(const BackwardTile& t, int64_t row) {
  const auto field = [&](int k) { return t.grads[k * t.grads_stride + row]; };
  const float factor = t.map.tempered(t.factor, row);
  return {field(fastpo::kShift), field(fastpo::kLogMass), field(fastpo::kCommon) * factor,
          t.entropy_grad ? field(fastpo::kEntropy) * factor : 0.0f, field(fastpo::kLabel)};
}

// From raw products.
template <bool kCap>
struct FromProducts {
  Logits<kCap> logits;
  RowGrads g;

  __device__ FromProducts(const BackwardTile& t, const RowGrads& grads, int64_t row)
      : logits{t.map.of_row(row), t.bias == nullptr ? nullptr : t.bias + t.first,
               static_cast<const float*>(t.source) + row * t.source_stride},
        g(grads) {}

  __device__ const float* source() const { return logits.x; }

  template <int N>
  __device__ void operator()(int64_t column, float (&dx)[N]) const {
    float slope[N];
    logits(column, dx, slope);
#pragma unroll
    for (int i = 0; i < N; ++i) {
      const float log_p = at_least(fastpo::kLogFloor, (dx[i] - g.shift) - g.log_mass);
      dx[i] = expf(log_p) * (g.common - g.entropy * log_p);
      if constexpr (kCap) dx[i] *= slope[i];
    }
  }
};

// From kept exponentials; the logarithm is needed for the entropy's and the soft-cap's terms only.
template <class Kept, bool kLog>
struct FromKept {
  // float16 is stored around 2^14: brought back, its logarithms are small where p is large.
  static constexpr bool kHalf = std::is_same_v<Kept, __half>;
  static constexpr float kUnit = kHalf ? 0x1p-14f : 1.0f;
  static constexpr double kLogUnit = kHalf ? -9.704060527839234 : 0.0;

  const Kept* kept;
  RowGrads g;
  float anchor, log_scale, scale, cap;

  __device__ FromKept(const BackwardTile& t, const RowGrads& grads, int64_t row)
      : kept(static_cast<const Kept*>(t.source) + row * t.source_stride),
        g(grads),
        anchor(static_cast<float>(t.anchors[row] - kLogUnit)),
        // Three double operations per thread: the anchor and the maximum are large, and cancel.
        log_scale(static_cast<float>(static_cast<double>(t.anchors[row]) - grads.shift -
                                     grads.log_mass - kLogUnit)),
        scale(expf(log_scale)),
        cap(t.map.of_row(row).cap) {}

  __device__ const Kept* source() const { return kept; }

  template <int N>
  __device__ void operator()(int64_t column, float (&dx)[N]) const {
    load(kept + column, dx);
#pragma unroll
    for (int i = 0; i < N; ++i) {
      dx[i] *= kUnit;
      if constexpr (kLog) {
        const float log_e = logf(dx[i]);
        const float log_p = at_least(fastpo::kLogFloor, log_e + log_scale);
        dx[i] *= scale * (g.common - g.entropy * log_p) * slope(log_e);
      } else {
        dx[i] *= scale * g.common;
      }
    }
  }

  // 1 - (z/cap)², without cancellation where the cap saturates. An exponential that underflowed has
  // z = -inf here and p = 0.
  __device__ float slope(float log_e) const {
    if (cap <= 0) return 1.0f;
    const float z = at_least(-cap, log_e + anchor);
    return (cap - z) / cap * ((cap + z) / cap);  // cap * cap is out of range sooner
  }
};

template <class Map, class Out>
__global__ void __launch_bounds__(kThreads) backward_kernel(const BackwardTile t, int64_t chunks) {
  const int64_t row = blockIdx.x / chunks;
  const int64_t begin = blockIdx.x % chunks * kColumns;
  const int64_t end = begin + kColumns < t.v ? begin + kColumns : t.v;
  const RowGrads grads = row_grads(t, row);
  const Map map(t, grads, row);
  Out* out = static_cast<Out*>(t.out) + row * t.out_stride;
  const int64_t label = t.labels[row] < t.first ? -1 : t.labels[row] - t.first;
  const int64_t head = head_of(out + begin);
  const bool packs = is_aligned(map.source() + begin + head);
  for_columns(begin, end, head, packs, [&](int64_t column, auto count) {
    constexpr int N = decltype(count)::value;
    float dx[N];
    map(column, dx);
#pragma unroll
    for (int i = 0; i < N; ++i) {
      if (column + i == label) dx[i] = grads.label;
    }
    store(out + column, dx);
  });
}

template <class Map>
void launch(const BackwardTile& t, unsigned blocks, int64_t chunks, cudaStream_t stream) {
  switch (t.out_dtype) {
    case DType::kBFloat16:
      backward_kernel<Map, __nv_bfloat16><<<blocks, kThreads, 0, stream>>>(t, chunks);
      break;
    case DType::kFloat16:
      backward_kernel<Map, __half><<<blocks, kThreads, 0, stream>>>(t, chunks);
      break;
    default:
      backward_kernel<Map, float><<<blocks, kThreads, 0, stream>>>(t, chunks);
  }
}

template <class Kept>
void launch_kept(const BackwardTile& t, unsigned blocks, int64_t chunks, cudaStream_t stream) {
  if (t.entropy_grad || t.map.cap > 0) {
    launch<FromKept<Kept, true>>(t, blocks, chunks, stream);
  } else {
    launch<FromKept<Kept, false>>(t, blocks, chunks, stream);
  }
}

void launch_any(const BackwardTile& t, unsigned blocks, int64_t chunks, cudaStream_t stream) {
  if (t.anchors == nullptr) {
    if (t.map.cap > 0) return launch<FromProducts<true>>(t, blocks, chunks, stream);
    return launch<FromProducts<false>>(t, blocks, chunks, stream);
  }
  switch (t.source_dtype) {
    case DType::kBFloat16:
      return launch_kept<__nv_bfloat16>(t, blocks, chunks, stream);
    case DType::kFloat16:
      return launch_kept<__half>(t, blocks, chunks, stream);
    default:
      return launch_kept<float>(t, blocks, chunks, stream);
  }
}

}  // namespace

void fastpo::rows_backward_cuda(const BackwardTile& t, int device, void* stream) {
  constexpr const char* kName = "rows_backward_cuda";
  if (t.n == 0) return;
  check(cudaSetDevice(device), kName, "set device failed");
  const int64_t chunks = (t.v + kColumns - 1) / kColumns;
  launch_any(t, checked_blocks(t.n * chunks, kName), chunks, static_cast<cudaStream_t>(stream));
  check(cudaGetLastError(), kName, "launch failed");
}
