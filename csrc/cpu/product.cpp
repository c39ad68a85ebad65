// Shares a product out among threads. No sum is shared: bits depend on neither rows nor threads.
#include "fastpo/product.h"

#include <algorithm>
#include <memory>
#include <stdexcept>

#include "product_isa.h"
#include "rows_isa.h"
#if defined(FASTPO_BF16)
#include <cpuid.h>
#endif

namespace fastpo {
namespace {

constexpr int64_t kWorthThreads = 256 * 1024;  // multiplications

const ProductTable* find_table([[maybe_unused]] DType dtype) {
#if defined(FASTPO_X86)
  if (dtype == DType::kFloat32 && has_avx512()) return &kProductAvx512;
#endif
#if defined(FASTPO_BF16)
  unsigned a = 0, b = 0, c = 0, d = 0;
  const bool known = __get_cpuid_count(7, 1, &a, &b, &c, &d) != 0;
  if (dtype == DType::kBFloat16 && has_avx512() && known && (a & 1u << 5)) return &kProductBf16;
#endif
  return nullptr;
}

const ProductTable* table(DType dtype) {
  static const ProductTable* const found[] = {find_table(DType::kFloat32),
                                              find_table(DType::kBFloat16)};
  if (dtype != DType::kFloat32 && dtype != DType::kBFloat16) return nullptr;
  return found[dtype == DType::kBFloat16];
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

bool has_product(DType dtype) { return table(dtype) != nullptr; }

void product_host(const Product& work, int threads) {
  const ProductTable* const own = table(work.dtype);
  if (own == nullptr) throw std::runtime_error("product: expected a processor that has this dtype");
  const int64_t terms = (work.h + own->numbers - 1) / own->numbers;
  const int64_t rows = std::clamp<int64_t>(work.n, 1, kRows);
  const int64_t span = kPacked / rows / kChain * kChain, depths = std::min(terms, span);
  const std::unique_ptr<float[]> packed(new float[static_cast<size_t>(rows * depths)]);
  for (int64_t row = 0; row < work.n; row += rows) {
    for (int64_t depth = 0; depth < terms; depth += span) {
      const ProductBlock block = {
          work,        row, std::min(rows, work.n - row), depth, std::min(span, terms - depth),
          packed.get()};
      multiply(*own, block, threads);
    }
  }
}

}  // namespace fastpo
