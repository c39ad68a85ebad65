// The two row kernels of fastpo/ops/rows/backend.py over raw pointers: no torch, no Python.
//
// A tile is [n, v] with unit column stride and any row stride; state and grads are [fields, n] with
// unit stride along n. Strides count elements. Nothing is allocated; n == 0 returns at once.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define FASTPO_ANYWHERE __host__ __device__
#else
#define FASTPO_ANYWHERE
#endif

namespace fastpo {

enum class DType : int { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2 };

// Rows of `state`; "others" are all words but the label, m the running maximum.
enum StateRow : int { kMax, kOthers, kTarget, kMoment, kSquares, kSum, kBefore };

// Bits of `stats`.
enum StatBit : int { kEntropyStat = 1, kSquaresStat = 2, kMeanStat = 4, kTop1Stat = 8 };

// Rows of `grads`: out = exp(l)·(common - entropy·l)·dz/dx with
// l = max((z - shift) - log_mass, kLogFloor), and `label`, which carries dz/dx, at the label.
enum GradRow : int { kShift, kLogMass, kCommon, kEntropy, kLabel };

// log p is clamped here: exp is 0 long before, and 0·(-inf) stays out of the entropy terms.
constexpr float kLogFloor = -200.0f;

// A row that has only seen -inf has maximum -inf; (-inf) - (-inf) would make it NaN for good.
constexpr float kLowest = -3.402823466e+38f;

// float16 `kept` is anchored at 2^14 times the maximum, see `headroom` there.
constexpr float kHalfHeadroom = 9.704060527839234f;

// u = inner·(x + bias);  z = u, or cap·tanh(u) when cap > 0, times the row's own 1/temperature.
struct LogitMap {
  float inner;
  float cap;
  const double* inverse;  // [n] or null

  FASTPO_ANYWHERE float tempered(float x, int64_t row) const {
    return inverse == nullptr ? x : static_cast<float>(x * inverse[row]);
  }
  // With the row's temperature in its numbers.
  FASTPO_ANYWHERE LogitMap of_row(int64_t row) const {
    if (cap > 0) return {inner, tempered(cap, row), nullptr};
    return {tempered(inner, row), cap, nullptr};
  }
};

struct ForwardTile {
  const float* tile;  // [n, v] raw products
  int64_t tile_stride;
  int64_t n, v;
  int64_t first;          // word of the tile's first column
  const int64_t* labels;  // [n]
  const float* bias;      // [V] or null
  float* state;           // [7, n], updated
  int64_t state_stride;
  LogitMap map;
  int stats;
  void* kept;  // [n, v], may be `tile` when float32; null: not wanted
  DType kept_dtype;
  int64_t kept_stride;
  float* anchors;  // [n], written with `kept`
  bool fold_cap;
};

struct BackwardTile {
  const void* source;  // [n, v]: raw float32 products, or `kept` when anchors is given
  DType source_dtype;
  int64_t source_stride;
  const float* anchors;  // [n] or null
  int64_t n, v;
  int64_t first;
  const int64_t* labels;  // [n]
  const float* bias;      // [V] or null; not read when anchors is given
  const float* grads;     // [5, n]
  int64_t grads_stride;
  LogitMap map;
  float factor;  // dz/dx without the soft-cap
  bool entropy_grad;
  void* out;  // [n, v], may be `source` when the dtypes agree
  DType out_dtype;
  int64_t out_stride;
};

// Instruction sets that were compiled and that this processor has: how many, and the name of each.
// 0 is scalar, the last one the best.
int host_isas();
const char* host_isa_name(int isa);

// Rows are shared out among `threads`. Sums of a tile are carried in double.
// Throws std::runtime_error when `isa` is none of host_isas().
void rows_forward_host(const ForwardTile& tile, int threads, int isa);
void rows_backward_host(const BackwardTile& tile, int threads, int isa);

// The same on a CUDA device: asynchronous on `stream` (a cudaStream_t) of `device`.
// Throw std::runtime_error when the launch fails.
void rows_forward_cuda(const ForwardTile& tile, int device, void* stream);
void rows_backward_cuda(const BackwardTile& tile, int device, void* stream);

}  // namespace fastpo
