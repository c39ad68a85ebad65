// Chooses the instruction set and shares rows out among threads.
#include <cstdint>
#include <stdexcept>
#include <string>

#include "fastpo/pair_rows.h"
#include "fastpo/rows.h"
#include "fastpo/words.h"
#include "rows_isa.h"

namespace fastpo {
namespace {

// Waking threads costs microseconds: below this many columns in all, one thread is faster.
constexpr int64_t kWorthThreads = 16 * 1024;

const RowTable& table(const char* who, Isa isa) {
  if (isa > best_isa()) {
    throw std::runtime_error(std::string(who) + ": isa: expected at most " +
                             std::to_string(static_cast<int>(best_isa())) + " here, got " +
                             std::to_string(static_cast<int>(isa)));
  }
#ifdef FASTPO_X86
  if (isa == Isa::kAvx512) return kRowsAvx512;
  if (isa == Isa::kAvx2) return kRowsAvx2;
#endif
  return kRowsScalar;
}

template <class Tile>
int64_t cells(const Tile& tile) {
  return tile.n * tile.v;
}

int64_t cells(const WordProducts& work) { return work.n * work.v * work.h; }

template <class Tile>
void run(const Tile& tile, Row<Tile> row, int threads) {
  const bool share = threads > 1 && cells(tile) >= kWorthThreads;
#pragma omp parallel for schedule(static) num_threads(threads) if (share)
  for (int64_t i = 0; i < tile.n; ++i) row(tile, i);
}

// Some words are in every row, most in none.
void run(const WordSums& work, Row<WordSums> row, int threads) {
#pragma omp parallel for schedule(dynamic, 32) num_threads(threads) if (threads > 1)
  for (int64_t i = 0; i < work.n; ++i) row(work, i);
}

}  // namespace

Isa best_isa() {
#ifdef FASTPO_X86
  static const Isa best = [] {
    __builtin_cpu_init();
    // F16C came before both; gcc and clang disagree on whether it can be asked for.
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    return avx2 && avx512 ? Isa::kAvx512 : avx2 ? Isa::kAvx2 : Isa::kScalar;
  }();
  return best;
#else
  return Isa::kScalar;
#endif
}

void rows_forward_host(const ForwardTile& tile, int threads, Isa isa) {
  if (tile.n > 0) run(tile, table("rows_forward", isa).forward(tile), threads);
}

void rows_backward_host(const BackwardTile& tile, int threads, Isa isa) {
  if (tile.n > 0) run(tile, table("rows_backward", isa).backward(tile), threads);
}

void pair_softmaxes_host(const PairSoftmaxes& work, int threads, Isa isa) {
  if (work.n > 0) run(work, table("pair_softmaxes", isa).pair_softmaxes, threads);
}

void pair_values_host(const PairValues& work, int threads, Isa isa) {
  if (work.n > 0) run(work, table("pair_values", isa).pair_values, threads);
}

void pair_gradients_host(const PairGradients& work, int threads, Isa isa) {
  if (work.n > 0) run(work, table("pair_gradients", isa).pair_gradients, threads);
}

void word_products_host(const WordProducts& work, int threads, Isa isa) {
  if (work.n > 0) run(work, table("word_products", isa).word_products(work), threads);
}

void word_sums_host(const WordSums& work, int threads, Isa isa) {
  if (work.n > 0) run(work, table("word_sums", isa).word_sums(work), threads);
}

}  // namespace fastpo
