// What the device kernels share: packs of columns with 16-byte accesses, and logits from products.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cmath>
#include <cstdint>
#include <limits>
#include <stdexcept>
#include <string>
#include <type_traits>

#include "fastpo/rows.h"

namespace {

using fastpo::DType;
using fastpo::LogitMap;

constexpr int kThreads = 256;
constexpr int kPack = 8;  // columns: 16 bytes of a 16-bit type, twice 16 bytes of float32

template <int N>
struct Count {
  static constexpr int value = N;
};

__device__ inline float to_float(float x) { return x; }
__device__ inline float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ inline float to_float(__half x) { return __half2float(x); }
__device__ inline void convert(float x, float& y) { y = x; }
__device__ inline void convert(float x, __nv_bfloat16& y) { y = __float2bfloat16_rn(x); }
__device__ inline void convert(float x, __half& y) { y = __float2half_rn(x); }

// kPack elements move as one or two 16-byte words; p is then a multiple of 16 bytes.
template <class T>
union Words {
  T element[kPack];
  uint4 word[sizeof(T) * kPack / sizeof(uint4)];
  __device__ Words() {}
};

template <class T, int N>
__device__ inline void load(const T* p, float (&x)[N]) {
  if constexpr (N == 1) {
    x[0] = to_float(*p);
  } else {
    static_assert(N == kPack);
    Words<T> pack;
#pragma unroll
    for (int i = 0; i < static_cast<int>(sizeof(pack.word) / sizeof(uint4)); ++i) {
      pack.word[i] = reinterpret_cast<const uint4*>(p)[i];
    }
#pragma unroll
    for (int i = 0; i < N; ++i) x[i] = to_float(pack.element[i]);
  }
}

template <class T, int N>
__device__ inline void store(T* p, const float (&x)[N]) {
  if constexpr (N == 1) {
    convert(x[0], *p);
  } else {
    static_assert(N == kPack);
    Words<T> pack;
#pragma unroll
    for (int i = 0; i < N; ++i) convert(x[i], pack.element[i]);
#pragma unroll
    for (int i = 0; i < static_cast<int>(sizeof(pack.word) / sizeof(uint4)); ++i) {
      reinterpret_cast<uint4*>(p)[i] = pack.word[i];
    }
  }
}

__device__ inline bool is_aligned(const void* p) {
  return reinterpret_cast<uintptr_t>(p) % sizeof(uint4) == 0;
}

// Columns from p to the next multiple of 16 bytes.
template <class T>
__device__ inline int64_t head_of(const T* p) {
  const auto past = reinterpret_cast<uintptr_t>(p) % sizeof(uint4);
  return past == 0 ? 0 : static_cast<int64_t>((sizeof(uint4) - past) / sizeof(T));
}

// Shares [begin, end) out among the threads of a block: body(column, Count<kPack>) on packs that
// start `head` columns in, body(column, Count<1>) before and behind them. `packs`: both addresses
// of such a column are aligned; otherwise every column goes alone.
template <class Body>
__device__ inline void for_columns(int64_t begin, int64_t end, int64_t head, bool packs,
                                   Body body) {
  const int64_t start = packs && begin + head < end ? begin + head : end;
  const int64_t count = (end - start) / kPack;
  const int64_t stop = start + count * kPack;
  for (int64_t c = begin + threadIdx.x; c < start; c += kThreads) body(c, Count<1>{});
  for (int64_t i = threadIdx.x; i < count; i += kThreads) {
    body(start + i * kPack, Count<kPack>{});
  }
  for (int64_t c = stop + threadIdx.x; c < end; c += kThreads) body(c, Count<1>{});
}

// fmaxf would drop a NaN.
__device__ inline float nan_max(float a, float b) { return a > b || a != a ? a : b; }
__device__ inline float at_least(float floor, float x) { return x < floor ? floor : x; }

template <bool kCap>
struct Logits {
  LogitMap map;
  const float* bias;  // of the tile's first column, or null
  const float* x;     // the row's products

  // z [N], and the slope of the soft-cap.
  template <int N>
  __device__ void operator()(int64_t column, float (&z)[N], float (&slope)[N]) const {
    load(x + column, z);
#pragma unroll
    for (int i = 0; i < N; ++i) {
      // One at a time: the row's alignment is not the bias's, and the bias stays in L1.
      if (bias != nullptr) z[i] += bias[column + i];
      z[i] *= map.inner;
      slope[i] = 1.0f;
      if constexpr (kCap) {
        const float saturation = tanhf(z[i]);
        slope[i] = 1.0f - saturation * saturation;
        z[i] = saturation * map.cap;
      }
    }
  }

  __device__ float at(int64_t column) const {
    float z[1], slope[1];
    (*this)(column, z, slope);
    return z[0];
  }
};

inline void check(cudaError_t status, const char* who, const char* what) {
  if (status != cudaSuccess) {
    throw std::runtime_error(std::string(who) + ": " + what + ": " + cudaGetErrorString(status));
  }
}

inline unsigned checked_blocks(int64_t blocks, const char* who) {
  if (blocks > std::numeric_limits<int>::max()) {
    throw std::runtime_error(std::string(who) + ": expected at most 2^31 - 1 blocks, got " +
                             std::to_string(blocks));
  }
  return static_cast<unsigned>(blocks);
}

}  // namespace
