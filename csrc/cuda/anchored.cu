// The anchored product on CUTLASS 3: TMA loads, warp-group products, persistent 128 x 256 blocks,
// and an epilogue that turns accumulators into exponentials before they leave the registers.
#include <cuda_runtime.h>

#include <cutlass/gemm/device/gemm_universal_adapter.h>
#include <cute/tensor.hpp>
#include <cutlass/epilogue/collective/collective_builder.hpp>
#include <cutlass/epilogue/fusion/sm90_callbacks_tma_warpspecialized.hpp>
#include <cutlass/gemm/collective/collective_builder.hpp>
#include <cutlass/gemm/kernel/gemm_universal.hpp>
#include <stdexcept>
#include <string>

#include "fastpo/anchored.h"

namespace {

using namespace cute;
namespace fusion = cutlass::epilogue::fusion;

__device__ __forceinline__ float power_of_two(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// A node over (accumulator, bias, origin, label's column). It wants to know which column a cell is
// in, which no node of the library hands on.
struct AnchoredExp {
  struct SharedStorage {};
  struct Arguments {
    float slope = 0;
  };
  using Params = Arguments;

  template <class Shape>
  static constexpr Params to_underlying_arguments(Shape const&, Arguments const& given, void*) {
    return given;
  }
  template <class Shape>
  static bool can_implement(Shape const&, Arguments const&) {
    return true;
  }
  template <class Shape>
  static size_t get_workspace_size(Shape const&, Arguments const&) {
    return 0;
  }
  template <class Shape>
  static cutlass::Status initialize_workspace(Shape const&, Arguments const&, void*, cudaStream_t,
                                              cutlass::CudaHostAdapter* = nullptr) {
    return cutlass::Status::kSuccess;
  }

  CUTLASS_HOST_DEVICE AnchoredExp() {}
  CUTLASS_HOST_DEVICE AnchoredExp(Params const& given, SharedStorage const&) : params(given) {}
  Params params;

  CUTLASS_DEVICE bool is_producer_load_needed() const { return false; }
  CUTLASS_DEVICE bool is_C_load_needed() const { return false; }

  template <class... Args>
  CUTLASS_DEVICE auto get_producer_load_callbacks(fusion::ProducerLoadArgs<Args...> const&) {
    return fusion::EmptyProducerLoadCallbacks{};
  }

  template <class Coordinates>
  struct Callbacks : fusion::EmptyConsumerStoreCallbacks {
    Coordinates coordinates;  // (CPY, CPY_M, CPY_N, EPI_M, EPI_N), from the thread's first cell on
    int first;                // column of that cell
    float slope;

    CUTLASS_DEVICE Callbacks(Coordinates const& given, int column, float factor)
        : coordinates(given), first(column), slope(factor) {}

    template <int N>
    CUTLASS_DEVICE cutlass::Array<float, N> visit(cutlass::Array<float, N> const&, int epi_v,
                                                  int epi_m, int epi_n,
                                                  cutlass::Array<float, N> const& products,
                                                  cutlass::Array<float, N> const& bias,
                                                  cutlass::Array<float, N> const& origin,
                                                  cutlass::Array<int, N> const& label) {
      cutlass::Array<float, N> e;
      Tensor here = coordinates(_, _, _, epi_m, epi_n);
      CUTLASS_PRAGMA_UNROLL
      for (int i = 0; i < N; ++i) {
        const int column = first + static_cast<int>(get<1>(here(epi_v * N + i)));
        // The difference first: the product with slope alone would round at the size of the logits.
        const float power = power_of_two(((products[i] + bias[i]) - origin[i]) * slope);
        e[i] = column == label[i] ? 0.0f : power;
      }
      return e;
    }
  };

  template <bool kReferenceSrc, class... Args>
  CUTLASS_DEVICE auto get_consumer_store_callbacks(fusion::ConsumerStoreArgs<Args...> const& args) {
    const int columns = static_cast<int>(get<1>(args.problem_shape_mnkl));
    const int first = columns - static_cast<int>(get<1>(args.residue_tCcD));
    return Callbacks<decltype(args.tCcD)>(args.tCcD, first, params.slope);
  }
};

using BlockShape = Shape<Int<fastpo::kAnchoredRows>, Int<fastpo::kAnchoredWords>, _64>;
using Cluster = Shape<_2, _1, _1>;
using Element = cutlass::bfloat16_t;
using RowMajor = cutlass::layout::RowMajor;
constexpr auto kRound = cutlass::FloatRoundStyle::round_to_nearest;

template <class Value>
using PerRow = fusion::Sm90ColBroadcast<0, BlockShape, Value, Value, Stride<_1, _0, _0>>;
using PerWord = fusion::Sm90RowBroadcast<0, BlockShape, float, float, Stride<_0, _1, _0>>;
using Exponentials =
    fusion::Sm90EVT<AnchoredExp, fusion::Sm90AccFetch, PerWord, PerRow<float>, PerRow<int>>;
// Sums go out block by block, in the one order that makes them the same bits in every run.
using RowSums = fusion::Sm90ColReduction<cutlass::plus, cutlass::plus, cutlass::plus, 0, BlockShape,
                                         float, float, kRound, Stride<_1, _0, _0>, 4, true, false>;
using Tree = fusion::Sm90EVT<RowSums, Exponentials>;
// What the builder shapes its blocks by where nothing is stored.
struct Epilogue : Tree {
  using ElementAux = Element;
  using Tree::Tree;
};

// Stored: Element, or void.
template <class Stored>
struct Product {
  using CollectiveEpilogue = typename cutlass::epilogue::collective::CollectiveBuilder<
      cutlass::arch::Sm90, cutlass::arch::OpClassTensorOp, BlockShape, Cluster,
      cutlass::epilogue::collective::EpilogueTileAuto, float, float, void, RowMajor, 8, Stored,
      RowMajor, 8, cutlass::epilogue::TmaWarpSpecializedCooperative, Epilogue>::CollectiveOp;
  using CollectiveMainloop = typename cutlass::gemm::collective::CollectiveBuilder<
      cutlass::arch::Sm90, cutlass::arch::OpClassTensorOp, Element, RowMajor, 8, Element,
      cutlass::layout::ColumnMajor, 8, float, BlockShape, Cluster,
      cutlass::gemm::collective::StageCountAutoCarveout<static_cast<int>(
          sizeof(typename CollectiveEpilogue::SharedStorage))>,
      cutlass::gemm::KernelTmaWarpSpecializedCooperative>::CollectiveOp;
  using Kernel = cutlass::gemm::kernel::GemmUniversal<Shape<int, int, int, int>, CollectiveMainloop,
                                                      CollectiveEpilogue>;
  using Gemm = cutlass::gemm::device::GemmUniversalAdapter<Kernel>;
};

void check(cutlass::Status status, const char* what) {
  if (status != cutlass::Status::kSuccess) {
    throw std::runtime_error(std::string("anchored_cuda: ") + what + ": " +
                             cutlassGetStatusString(status));
  }
}

template <class Stored>
void launch(const fastpo::AnchoredTile& t, int device, int multiprocessors, cudaStream_t stream) {
  using Gemm = typename Product<Stored>::Gemm;
  const auto stride = [](int64_t x) { return make_stride(x, _1{}, int64_t{0}); };
  cutlass::KernelHardwareInfo hardware;
  hardware.device_id = device;
  hardware.sm_count = multiprocessors;
  typename Gemm::Arguments arguments{
      cutlass::gemm::GemmUniversalMode::kGemm,
      {static_cast<int>(t.n), static_cast<int>(t.v), static_cast<int>(t.h), 1},
      {static_cast<const Element*>(t.x), stride(t.x_stride), static_cast<const Element*>(t.words),
       stride(t.words_stride)},
      {{{{}, {t.bias}, {t.origin}, {t.columns}, {t.slope}}, {t.partial}},
       nullptr,
       stride(0),
       static_cast<Element*>(t.e),
       stride(t.e_stride)},
      hardware};
  Gemm gemm;
  check(gemm.can_implement(arguments), "shape");
  check(gemm.initialize(arguments, nullptr, stream), "initialise");
  check(gemm.run(stream), "launch");
}

}  // namespace

void fastpo::anchored_cuda(const AnchoredTile& t, int device, int multiprocessors, void* stream) {
  if (t.n == 0) return;
  if (cudaSetDevice(device) != cudaSuccess)
    throw std::runtime_error("anchored_cuda: set device failed");
  const auto on = static_cast<cudaStream_t>(stream);
  if (t.e == nullptr) return launch<void>(t, device, multiprocessors, on);
  launch<Element>(t, device, multiprocessors, on);
}
