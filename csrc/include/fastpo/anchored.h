// The product whose epilogue is a softmax, see kernels/anchored.py: raw pointers, nothing
// allocated.
#pragma once

#include <cstdint>

namespace fastpo {

// Sums per row go out for every block of so many words; rows come in blocks, too.
constexpr int kAnchoredWords = 256;
constexpr int kAnchoredRows = 128;
// Of e, e·log2 e and e² over the others, of u = x·words + bias over all words, and the number of
// words with e > 1.
constexpr int kAnchoredSums = 5;

struct AnchoredTile {
  const void* x;  // [n, h] bfloat16
  int64_t x_stride;
  const void* words;  // [v, h] bfloat16
  int64_t words_stride;
  int64_t n, v, h;
  const int* columns;   // [n] column of each row's label; outside [0, v) where it is not here
  const float* origin;  // [n]
  const float* bias;    // [v] or null
  float slope;          // e = exp2((u - origin)·slope), 0 in the label's column
  int sums;             // the first one alone, or kAnchoredSums
  float* partial;       // [sums, ⌈v / kAnchoredWords⌉, n rounded up to kAnchoredRows], written
  void* e;              // [n, v] bfloat16, or null: not wanted
  int64_t e_stride;
};

// Rows of x, words and e start at multiples of 16 bytes. Asynchronous on `stream`.
// Throws std::runtime_error when the device is not sm_90 or the launch fails.
void anchored_cuda(const AnchoredTile& tile, int device, int multiprocessors, void* stream);

}  // namespace fastpo
