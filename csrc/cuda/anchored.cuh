// The anchored product on CUTLASS 3: TMA loads, warp-group products, persistent 128 x 256 blocks,
// and an epilogue that turns accumulators into exponentials before they leave the registers.
#pragma once

#include <cuda_runtime.h>

#include <cutlass/gemm/device/gemm_universal_adapter.h>
#include <cute/tensor.hpp>
#include <cutlass/epilogue/collective/collective_builder.hpp>
#include <cutlass/epilogue/fusion/sm90_callbacks_tma_warpspecialized.hpp>
#include <cutlass/gemm/collective/collective_builder.hpp>
#include <cutlass/gemm/kernel/gemm_universal.hpp>
#include <stdexcept>
#include <string>

#include "anchored_cell.cuh"
#include "fastpo/anchored.h"

namespace fastpo {

// The kernels with all sums; a file of their own, so that two compilers share the work.
void anchored_stats_cuda(const AnchoredTile& tile, int device, int multiprocessors, void* stream);

}  // namespace fastpo

namespace {

using namespace cute;
namespace fusion = cutlass::epilogue::fusion;

using BlockShape = Shape<Int<fastpo::kAnchoredRows>, Int<fastpo::kAnchoredWords>, _64>;
using Cluster = Shape<_2, _1, _1>;
using Element = cutlass::bfloat16_t;
using RowMajor = cutlass::layout::RowMajor;
constexpr auto kRound = cutlass::FloatRoundStyle::round_to_nearest;

using Slope = fusion::Sm90ScalarBroadcast<float>;
template <class Value>
using PerRow = fusion::Sm90ColBroadcast<0, BlockShape, Value, Value, Stride<_1, _0, _0>>;
using PerWord = fusion::Sm90RowBroadcast<0, BlockShape, float, float, Stride<_0, _1, _0>>;
// Sums go out block by block, in the one order that makes them the same bits in every run. Cells
// past the last row or word are not in them.
using RowSum = fusion::Sm90ColReduction<cutlass::plus, cutlass::plus, cutlass::plus, 0, BlockShape,
                                        float, float, kRound, Stride<_1, _0, _0>, 4, false, false>;

// Reads slope, bias, origin and the label's column, feeds the row sums and returns e. The library's
// own graphs would not do: no node hands on the column of a cell, and all values get one type.
template <class... Sums>
struct AnchoredCells
    : fusion::Sm90VisitorImpl<Slope, PerWord, PerRow<float>, PerRow<int>, Sums...> {
  using Nodes = fusion::Sm90VisitorImpl<Slope, PerWord, PerRow<float>, PerRow<int>, Sums...>;
  using Nodes::Nodes;
  // What the builder shapes its blocks by where nothing is stored.
  using ElementAux = Element;

  template <class NodeCallbacks, class Coordinates>
  struct Callbacks : NodeCallbacks {
    using NodeCallbacks::callbacks_tuple;
    Coordinates coordinates;  // (CPY, CPY_M, CPY_N, EPI_M, EPI_N), from the thread's first cell on
    int first;                // column of that cell

    CUTLASS_DEVICE Callbacks(NodeCallbacks&& nodes, Coordinates const& given, int column)
        : NodeCallbacks(cute::move(nodes)), coordinates(given), first(column) {}

    template <int N>
    CUTLASS_DEVICE cutlass::Array<float, N> visit(cutlass::Array<float, N> const& products,
                                                  int epi_v, int epi_m, int epi_n) {
      const auto node = [&](auto i, auto const&... input) CUTLASS_LAMBDA_FUNC_INLINE {
        return get<decltype(i)::value>(callbacks_tuple)
            .visit(products, epi_v, epi_m, epi_n, input...);
      };
      const auto slope = node(_0{}), bias = node(_1{}), origin = node(_2{});
      const auto label = node(_3{});
      cutlass::Array<float, N> e, moment, square, u, beaten;
      Tensor here = coordinates(_, _, _, epi_m, epi_n);
      CUTLASS_PRAGMA_UNROLL
      for (int i = 0; i < N; ++i) {
        const int column = first + static_cast<int>(get<1>(here(epi_v * N + i)));
        const auto cell =
            fastpo::anchored_cell(products[i], bias[i], origin[i], slope[i], column == label[i]);
        e[i] = cell.e;
        moment[i] = cell.moment;
        square[i] = cell.square;
        u[i] = cell.u;
        beaten[i] = cell.beaten;
      }
      node(_4{}, e);
      if constexpr (sizeof...(Sums) == fastpo::kAnchoredSums) {
        node(_5{}, moment);
        node(_6{}, square);
        node(_7{}, u);
        node(_8{}, beaten);
      }
      return e;
    }
  };

  template <bool kReferenceSrc, class... Args>
  CUTLASS_DEVICE auto get_consumer_store_callbacks(fusion::ConsumerStoreArgs<Args...> const& args) {
    const int columns = static_cast<int>(get<1>(args.problem_shape_mnkl));
    const int first = columns - static_cast<int>(get<1>(args.residue_tCcD));
    auto nodes = Nodes::template get_consumer_store_callbacks<kReferenceSrc>(args);
    return Callbacks<decltype(nodes), decltype(args.tCcD)>(cute::move(nodes), args.tCcD, first);
  }
};

// Stored: Element, or void.
template <class Stored, class... Sums>
struct Product {
  using CollectiveEpilogue = typename cutlass::epilogue::collective::CollectiveBuilder<
      cutlass::arch::Sm90, cutlass::arch::OpClassTensorOp, BlockShape, Cluster,
      cutlass::epilogue::collective::EpilogueTileAuto, float, float, void, RowMajor, 8, Stored,
      RowMajor, 8, cutlass::epilogue::TmaWarpSpecializedCooperative,
      AnchoredCells<Sums...>>::CollectiveOp;
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

template <class Stored, class... Sums>
void launch(const fastpo::AnchoredTile& t, int device, int multiprocessors, cudaStream_t stream) {
  using Gemm = typename Product<Stored, Sums...>::Gemm;
  const auto stride = [](int64_t x) { return make_stride(x, _1{}, int64_t{0}); };
  cutlass::KernelHardwareInfo hardware;
  hardware.device_id = device;
  hardware.sm_count = multiprocessors;
  const int64_t one_sum = ceil_div(t.v, int64_t{fastpo::kAnchoredWords}) *
                          round_up(t.n, int64_t{fastpo::kAnchoredRows});
  int sum = 0;
  typename Gemm::Arguments arguments{
      cutlass::gemm::GemmUniversalMode::kGemm,
      {static_cast<int>(t.n), static_cast<int>(t.v), static_cast<int>(t.h), 1},
      {static_cast<const Element*>(t.x), stride(t.x_stride), static_cast<const Element*>(t.words),
       stride(t.words_stride)},
      {{Slope::Arguments{{t.slope}},
        {t.bias},
        {t.origin},
        {t.columns},
        typename Sums::Arguments{t.partial + one_sum * sum++}...},
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

template <class... Sums>
void launch(const fastpo::AnchoredTile& t, int device, int multiprocessors, void* stream) {
  if (cudaSetDevice(device) != cudaSuccess)
    throw std::runtime_error("anchored_cuda: set device failed");
  const auto on = static_cast<cudaStream_t>(stream);
  if (t.e == nullptr) return launch<void, Sums...>(t, device, multiprocessors, on);
  launch<Element, Sums...>(t, device, multiprocessors, on);
}

}  // namespace
