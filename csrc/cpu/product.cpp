// Shares a product out among threads. No sum is shared: bits depend on neither rows nor threads.
#include "fastpo/product.h"

#include <algorithm>
#include <memory>
#include <stdexcept>

#include "product_isa.h"

namespace fastpo {
namespace {

constexpr int64_t kWorthThreads = 256 * 1024;  // multiplications

const ProductTable* find_table() {
#if defined(FASTPO_X86)
  __builtin_cpu_init();
  // All that its file is compiled for.
  if (__builtin_cpu_supports("fma") && __builtin_cpu_supports("avx512f") &&
      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl")) {
    return &kProductAvx512;
  }
#endif
  return nullptr;
}

const ProductTable* table() {
  static const ProductTable* const found = find_table();
  return found;
}

void multiply(const ProductTable& own, const ProductBlock& block, int threads) {
  const int64_t rows = panels(block);
  const int64_t columns = (block.work.v + kPanelColumns - 1) / kPanelColumns;
  // Where b has few panels, each is packed for several groups of rows.
  const int64_t groups = std::clamp<int64_t>(4 * threads / columns, 1, rows);
  const bool share = threads > 1 && block.rows * block.depths * block.work.v >= kWorthThreads;
#pragma omp parallel for schedule(static) num_threads(threads) if (share)
  for (int64_t panel = 0; panel < rows; ++panel) own.pack(block, panel);
#pragma omp parallel for schedule(static) num_threads(threads) if (share)
  for (int64_t item = 0; item < columns * groups; ++item) {
    const int64_t group = item % groups;
    own.multiply(block, item / groups * kPanelColumns, group * rows / groups,
                 (group + 1) * rows / groups);
  }
}

}  // namespace

bool has_product() { return table() != nullptr; }

void product_host(const Product& work, int threads) {
  if (!has_product()) throw std::runtime_error("product: expected a processor with AVX-512");
  const int64_t rows = std::clamp<int64_t>(work.n, 1, kRows);
  const int64_t span = kPacked / rows / kChain * kChain, depths = std::min(work.h, span);
  const std::unique_ptr<float[]> packed(new float[static_cast<size_t>(rows * depths)]);
  for (int64_t row = 0; row < work.n; row += rows) {
    for (int64_t depth = 0; depth < work.h; depth += span) {
      const ProductBlock block = {
          work,        row, std::min(rows, work.n - row), depth, std::min(span, work.h - depth),
          packed.get()};
      multiply(*table(), block, threads);
    }
  }
}

}  // namespace fastpo
