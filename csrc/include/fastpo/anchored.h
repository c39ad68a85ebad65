// The product whose epilogue is a softmax, see kernels/anchored.py: raw pointers, nothing
// allocated.
#pragma once

#include <cstdint>

namespace fastpo {

// Sums per row go out for every block of so many words. Rows come in blocks, too, two of which read
// their words together.
constexpr int anchored_words(bool pingpong) { return pingpong ? 192 : 256; }
constexpr int kAnchoredRows = 128;
constexpr int kAnchoredCluster = 2;
// Of e, e·log2 e and e² over the others, of u = x·words + bias over all words; the last is no sum,
// but the largest log2 e of the others.
constexpr int kAnchoredSums = 5;

struct AnchoredTile {
  const void* x;  // [n, h] bfloat16
  int64_t x_stride;
  const void* words;  // [v, h] bfloat16
  int64_t words_stride;
  int64_t n, v, h;
  const int* columns;  // [n] of each row's label, outside [0, v) where it is not here; or null
  const float* base;   // [n]
  const float* bias;   // [v] or null
  float slope;         // e = exp2(u·slope - base), 0 in the label's column
  int sums;            // the first one alone, or kAnchoredSums
  float* partial;      // [sums, ⌈v / anchored_words⌉, n rounded up to kAnchoredRows], written
  void* e;             // [n, v] bfloat16, or null: not wanted
  int64_t e_stride;
  bool pingpong;     // one warp group multiplies while the other takes exponentials
  int swizzle;       // so many blocks side by side, 1, 2, 4 or 8, before those behind them
  bool words_first;  // whether behind is along the words
};

// Blocks of rows are rounded up to kAnchoredCluster·swizzle, blocks of words to swizzle: what is
// beyond the end is multiplied, too. Rows of x, words and e start at multiples of 16 bytes.
// Asynchronous on `stream`. Throws std::runtime_error when the device is not sm_90 or the launch
// fails.
void anchored_cuda(const AnchoredTile& tile, int device, int multiprocessors, void* stream);

}  // namespace fastpo
