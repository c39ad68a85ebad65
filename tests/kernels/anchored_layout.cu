// For test_cuda_build.py, on the host: of each kernel its sizes, and of each thread its cells in
// the order of its visits, as the products lie in its registers and as the epilogue takes them to
// lie.
#include <cstdio>

#include "anchored.cuh"

namespace {

template <class Schedule, int kWords, class Stored, class... Sums>
void print(const char* name) {
  using Block = BlockOf<kWords>;
  using Kernel = typename Product<Schedule, Block, Stored, Sums...>::Kernel;
  using Epilogue = typename Kernel::CollectiveEpilogue;
  const auto mma = typename Kernel::TiledMma{};
  const auto atom = make_tiled_copy_C_atom(typename Epilogue::CopyAtomC{}, mma);
  const auto copy = make_tiled_copy_S(Copy_Atom<typename Epilogue::CopyOpR2S, Element>{}, atom);
  const auto block = make_identity_tensor(take<0, 2>(Block{}));
  const auto part = typename Epilogue::EpilogueTile{};
  std::printf("=%s,%d,%d,%d,%d\n", name, int(Kernel::SharedStorageSize), int(size<0>(Block{})),
              int(size<1>(Block{})), int(size(mma)));
  for (int thread = 0; thread < int(size(mma)); ++thread) {
    const auto slice = copy.get_slice(thread);
    Tensor held = slice.retile_S(mma.get_slice(thread).partition_C(block));
    Tensor taken = slice.partition_S(flat_divide(block, part));
    // Of one instruction's products, which the library cuts along the words.
    const int rows = size<0>(Block{}) / size<1>(held), words = size<1>(Block{}) / size<2>(held);
    for (int n = 0; n < size<4>(taken); ++n) {
      for (int m = 0; m < size<3>(taken); ++m) {
        const int left = n * int(size<1>(part));
        Tensor here = taken(_, _, _, m, n);
        Tensor there = held(_, m * int(size<0>(part)) / rows, left / words);
        const int first = left % words / int(size<1>(part)) * int(size(here));
        for (int i = 0; i < int(size(here)); ++i) {
          const auto is = there(first + i), as = here(i);
          std::printf("%d %d %d %d %d %d\n", thread, n * 2 + m, int(get<0>(is)), int(get<1>(is)),
                      int(get<0>(as)), int(get<1>(as)));
        }
      }
    }
  }
}

template <class Schedule, int kWords>
void print_sum(const char* name, const char* stored) {
  using Sum = RowSum<BlockOf<kWords>>;
  print<Schedule, kWords, void, Sum>(name);
  print<Schedule, kWords, Element, Sum>(stored);
}

template <class Schedule, int kWords>
void print_sums(const char* name, const char* stored) {
  using Sum = RowSum<BlockOf<kWords>>;
  using Most = RowLargest<BlockOf<kWords>>;
  print<Schedule, kWords, void, Sum, Sum, Sum, Sum, Most>(name);
  print<Schedule, kWords, Element, Sum, Sum, Sum, Sum, Most>(stored);
}

}  // namespace

int main() {
  constexpr int kWide = fastpo::anchored_words(false), kNarrow = fastpo::anchored_words(true);
  print_sum<Cooperative, kWide>("cooperative", "cooperative stored");
  print_sum<PingPong, kNarrow>("pingpong", "pingpong stored");
  print_sums<Cooperative, kWide>("cooperative stats", "cooperative stats stored");
  print_sums<PingPong, kNarrow>("pingpong stats", "pingpong stats stored");
}
