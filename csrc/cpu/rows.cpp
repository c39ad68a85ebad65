// Chooses the instruction set and shares rows out among threads.
#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

#include "fastpo/pair_rows.h"
#include "fastpo/rows.h"
#include "fastpo/words.h"
#include "rows_isa.h"

namespace fastpo {
namespace {

// Waking threads costs microseconds: below this many columns in all, one thread is faster.
constexpr int64_t kWorthThreads = 16 * 1024;

#if defined(FASTPO_X86)
// F16C came before both; gcc and clang disagree on whether it can be asked for.
bool has_avx2() {
  __builtin_cpu_init();
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
}
#endif

std::vector<const RowTable*> find_tables() {
  std::vector<const RowTable*> found = {&kRowsScalar};
#if defined(FASTPO_X86)
  if (has_avx2()) found.push_back(&kRowsAvx2);
  if (has_avx512()) found.push_back(&kRowsAvx512);
#elif defined(FASTPO_NEON)
  found.push_back(&kRowsNeon);
#endif
  return found;
}

const std::vector<const RowTable*>& tables() {
  static const auto found = find_tables();
  return found;
}

const RowTable& table(const char* who, int isa) {
  const int best = host_isas() - 1;
  if (isa < 0 || isa > best) {
    throw std::runtime_error(std::string(who) + ": isa: expected 0 to " + std::to_string(best) +
                             " (" + host_isa_name(best) + ") here, got " + std::to_string(isa));
  }
  return *tables()[static_cast<size_t>(isa)];
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

#if defined(FASTPO_X86)
bool has_avx512() {
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}
#endif

int host_isas() { return static_cast<int>(tables().size()); }

const char* host_isa_name(int isa) { return tables()[static_cast<size_t>(isa)]->name; }

void rows_forward_host(const ForwardTile& tile, int threads, int isa) {
  if (tile.n > 0) run(tile, table("rows_forward", isa).forward(tile), threads);
}

void rows_backward_host(const BackwardTile& tile, int threads, int isa) {
  if (tile.n > 0) run(tile, table("rows_backward", isa).backward(tile), threads);
}

void pair_softmaxes_host(const PairSoftmaxes& work, int threads, int isa) {
  if (work.n > 0) run(work, table("pair_softmaxes", isa).pair_softmaxes, threads);
}

void pair_values_host(const PairValues& work, int threads, int isa) {
  if (work.n > 0) run(work, table("pair_values", isa).pair_values, threads);
}

void pair_gradients_host(const PairGradients& work, int threads, int isa) {
  if (work.n > 0) run(work, table("pair_gradients", isa).pair_gradients, threads);
}

void word_products_host(const WordProducts& work, int threads, int isa) {
  if (work.n > 0) run(work, table("word_products", isa).word_products(work), threads);
}

void word_sums_host(const WordSums& work, int threads, int isa) {
  if (work.n > 0) run(work, table("word_sums", isa).word_sums(work), threads);
}

}  // namespace fastpo
