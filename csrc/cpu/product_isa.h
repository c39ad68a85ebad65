// What of a product is compiled for its instructions: the loops inside the last level of cache.
#pragma once

#include <cstdint>

#include "fastpo/product.h"

namespace fastpo {

// A chain of so many terms is added up in registers, and chains to one another in order. A panel of
// b, 16 KB of one chain, stays in the first level of cache while rows of a pass by from the second.
constexpr int64_t kChain = 128;
// Rows of a block, and terms of a that are packed for it: 512 KB, all their chains if they fit.
constexpr int64_t kRows = 256, kPacked = 128 * 1024;
// Rows and columns that are added up in registers at once: 28 of 32.
constexpr int64_t kPanelRows = 14, kPanelColumns = 32;

struct ProductBlock {
  const Product& work;
  int64_t row, rows, depth, depths;  // first row and term, and how many
  float* packed;                     // terms of a's rows of this block, panel by panel
};

struct ProductTable {
  int64_t numbers;  // of one operand in a term
  void (*pack)(const ProductBlock& block, int64_t panel);
  // Columns of one panel of b, in rows of panels [begin, end).
  void (*multiply)(const ProductBlock& block, int64_t column, int64_t begin, int64_t end);
};

extern const ProductTable kProductAvx512;
extern const ProductTable kProductBf16;

namespace {

// Not members: the linker merges those, and one compiled for AVX-512 must not serve all.
inline int64_t panels(const ProductBlock& block) {
  return (block.rows + kPanelRows - 1) / kPanelRows;
}

// Panels are as high as one another, or one row higher.
inline int64_t panel_start(const ProductBlock& block, int64_t panel) {
  const int64_t size = block.rows / panels(block), higher = block.rows % panels(block);
  return panel * size + (panel < higher ? panel : higher);
}

}  // namespace
}  // namespace fastpo
