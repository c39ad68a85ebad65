// The anchored product on CUTLASS 3: TMA loads, warp-group products, persistent blocks, and an
// epilogue that turns accumulators into exponentials before they leave the registers.
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
#include "anchored_kernels.h"

namespace {

using namespace cute;
namespace fusion = cutlass::epilogue::fusion;

// Both warp groups have half a block: nothing is multiplied while they take its exponentials.
struct Cooperative {
  using Mainloop = cutlass::gemm::KernelTmaWarpSpecializedCooperative;
  using Epilogue = cutlass::epilogue::TmaWarpSpecializedCooperative;
};

// Each has a block of its own, and multiplies while the other takes exponentials: a thread holds as
// many products as a block has words, and beside 192 of them few other numbers.
struct PingPong {
  using Mainloop = cutlass::gemm::KernelTmaWarpSpecializedPingpong;
  using Epilogue = cutlass::epilogue::TmaWarpSpecialized;
};

template <int kWords>
using BlockOf = Shape<Int<fastpo::kAnchoredRows>, Int<kWords>, _64>;
using Cluster = Shape<Int<fastpo::kAnchoredCluster>, _1, _1>;
using Element = cutlass::bfloat16_t;
using RowMajor = cutlass::layout::RowMajor;
constexpr auto kRound = cutlass::FloatRoundStyle::round_to_nearest;

// What a whole launch has in common; the epilogue reads it where it is needed.
struct Common : fusion::Sm90VisitorImpl<> {
  struct Arguments {
    const float* bias;
    float slope;
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

  CUTLASS_HOST_DEVICE Common() {}
  CUTLASS_HOST_DEVICE Common(Params const& given, SharedStorage const&) : params(given) {}
  template <bool kReferenceSrc, class... Args>
  CUTLASS_DEVICE auto get_consumer_store_callbacks(fusion::ConsumerStoreArgs<Args...> const&) {
    return fusion::EmptyConsumerStoreCallbacks{};
  }

  Params params;
};

template <class Block, class Value>
using PerRow = fusion::Sm90ColBroadcast<0, Block, Value, Value, Stride<_1, _0, _0>>;
// Sums go out block by block, in the one order that makes them the same bits in every run. Rows
// past the last have sums, too, which nobody reads.
template <template <class> class Reduce, class Block>
using OfRow = fusion::Sm90ColReduction<Reduce, Reduce, Reduce, 0, Block, float, float, kRound,
                                       Stride<_1, _0, _0>, 4, false, false, false>;
template <class Block>
using RowSum = OfRow<cutlass::plus, Block>;
template <class T>
struct Largest : cutlass::maximum<T> {};
template <class Block>
using RowLargest = OfRow<Largest, Block>;

// Reads bias, slope, each row's base and label, feeds the row sums and returns e. The library's
// own graphs would not do: no node hands on the column of a cell, and all values get one type.
template <class Block, class... Sums>
using CellNodes =
    fusion::Sm90VisitorImpl<Common, PerRow<Block, float>, PerRow<Block, int>, Sums...>;
template <class Block, class... Sums>
struct AnchoredCells : CellNodes<Block, Sums...> {
  using Nodes = CellNodes<Block, Sums...>;
  using Nodes::Nodes;
  // What the builder shapes its blocks by where nothing is stored.
  using ElementAux = Element;

  template <class NodeCallbacks, class Coordinates>
  struct Callbacks : NodeCallbacks {
    using NodeCallbacks::callbacks_tuple;
    Coordinates coordinates;  // (CPY, CPY_M, CPY_N, EPI_M, EPI_N), from the thread's first cell on
    Common::Params const& common;
    int first;    // column of that cell
    int columns;  // of the whole

    CUTLASS_DEVICE Callbacks(NodeCallbacks&& nodes, Coordinates const& given,
                             Common::Params const& of_all, int column, int all)
        : NodeCallbacks(cute::move(nodes)),
          coordinates(given),
          common(of_all),
          first(column),
          columns(all) {}

    template <class Node, int N>
    CUTLASS_DEVICE static void add_up(Node const& node, cutlass::Array<float, N> const& u,
                                      cutlass::Array<float, N> const& d,
                                      cutlass::Array<float, N> const& e) {
      node(_3{}, e);
      if constexpr (sizeof...(Sums) == fastpo::kAnchoredSums) {
        cutlass::Array<float, N> moment, square;
        CUTLASS_PRAGMA_UNROLL
        for (int i = 0; i < N; ++i) {
          moment[i] = e[i] * d[i];
          square[i] = e[i] * e[i];
        }
        node(_4{}, moment);
        node(_5{}, square);
        node(_6{}, u);
        node(_7{}, d);
      }
    }

    template <int N>
    CUTLASS_DEVICE cutlass::Array<float, N> visit(cutlass::Array<float, N> const& products,
                                                  int epi_v, int epi_m, int epi_n) {
      const auto node = [&](auto i, auto const&... input) CUTLASS_LAMBDA_FUNC_INLINE {
        return get<decltype(i)::value>(callbacks_tuple)
            .visit(products, epi_v, epi_m, epi_n, input...);
      };
      const auto base = node(_1{});
      const auto label = node(_2{});
      Tensor here = coordinates(_, _, _, epi_m, epi_n);
      const auto column = [&](int i) CUTLASS_LAMBDA_FUNC_INLINE {
        return first + static_cast<int>(get<1>(here(epi_v * N + i)));
      };
      bool special = common.bias != nullptr;
      CUTLASS_PRAGMA_UNROLL
      for (int i = 0; i < N; ++i) {
        // Cells of one row have one answer: the compiler asks once.
        special |= fastpo::any_special(column(0), fastpo::kAnchoredVisit, label[i], columns);
      }
      cutlass::Array<float, N> e;
      // Each way adds up its own cells: what both hand on would wait in registers, all at once.
      if (!__any_sync(0xffffffff, special)) {
        cutlass::Array<float, N> d;
        CUTLASS_PRAGMA_UNROLL
        for (int i = 0; i < N; ++i) {
          d[i] = fastpo::anchored_exponent(products[i], common.slope, base[i]);
          e[i] = fastpo::power_of_two(d[i]);
        }
        add_up(node, products, d, e);
      } else {
        cutlass::Array<float, N> d, u = products;
        CUTLASS_PRAGMA_UNROLL
        for (int i = 0; i < N; ++i) {
          // Few cells at a time: all their biases' addresses would not fit in registers.
          if (i % 8 == 0) __syncwarp();
          const bool a_word = column(i) < columns;
          if (common.bias != nullptr && a_word) u[i] += common.bias[column(i)];
          d[i] = fastpo::anchored_exponent(u[i], common.slope, base[i]);
          e[i] = fastpo::power_of_two(d[i]);
          fastpo::mask_special(u[i], d[i], e[i], column(i) == label[i], a_word);
        }
        add_up(node, u, d, e);
      }
      return e;
    }
  };

  template <bool kReferenceSrc, class... Args>
  CUTLASS_DEVICE auto get_consumer_store_callbacks(fusion::ConsumerStoreArgs<Args...> const& args) {
    const int columns = static_cast<int>(get<1>(args.problem_shape_mnkl));
    const int first = columns - static_cast<int>(get<1>(args.residue_tCcD));
    auto nodes = Nodes::template get_consumer_store_callbacks<kReferenceSrc>(args);
    return Callbacks<decltype(nodes), decltype(args.tCcD)>(
        cute::move(nodes), args.tCcD, get<0>(Nodes::ops).params, first, columns);
  }
};

// Stored: Element, or void.
template <class Schedule, class Block, class Stored, class... Sums>
struct Product {
  using CollectiveEpilogue = typename cutlass::epilogue::collective::CollectiveBuilder<
      cutlass::arch::Sm90, cutlass::arch::OpClassTensorOp, Block, Cluster,
      cutlass::epilogue::collective::EpilogueTileAuto, float, float, void, RowMajor, 8, Stored,
      RowMajor, 8, typename Schedule::Epilogue, AnchoredCells<Block, Sums...>>::CollectiveOp;
  using CollectiveMainloop = typename cutlass::gemm::collective::CollectiveBuilder<
      cutlass::arch::Sm90, cutlass::arch::OpClassTensorOp, Element, RowMajor, 8, Element,
      cutlass::layout::ColumnMajor, 8, float, Block, Cluster,
      cutlass::gemm::collective::StageCountAutoCarveout<static_cast<int>(
          sizeof(typename CollectiveEpilogue::SharedStorage))>,
      typename Schedule::Mainloop>::CollectiveOp;
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

template <class Schedule, class Block, class Stored, class... Sums>
void launch(const fastpo::AnchoredTile& t, int device, int multiprocessors, cudaStream_t stream) {
  using Gemm = typename Product<Schedule, Block, Stored, Sums...>::Gemm;
  using Order = cutlass::gemm::kernel::detail::RasterOrderOptions;
  const auto stride = [](int64_t x) { return make_stride(x, _1{}, int64_t{0}); };
  cutlass::KernelHardwareInfo hardware;
  hardware.device_id = device;
  // Of an odd number the library would make half a cluster, which cannot be launched.
  hardware.sm_count = round_up(cute::max(multiprocessors - 1, 1), fastpo::kAnchoredCluster);
  const int64_t one_sum =
      ceil_div(t.v, int64_t{size<1>(Block{})}) * round_up(t.n, int64_t{fastpo::kAnchoredRows});
  int sum = 0;
  typename Gemm::Arguments arguments{
      cutlass::gemm::GemmUniversalMode::kGemm,
      {static_cast<int>(t.n), static_cast<int>(t.v), static_cast<int>(t.h), 1},
      {static_cast<const Element*>(t.x), stride(t.x_stride), static_cast<const Element*>(t.words),
       stride(t.words_stride)},
      {{Common::Arguments{t.bias, t.slope},
        {t.base},
        {t.columns, -1},
        typename Sums::Arguments{
            t.partial + one_sum * sum++,
            std::is_same_v<Sums, RowLargest<Block>> ? fastpo::kLowest : 0.0f}...},
       nullptr,
       stride(0),
       static_cast<Element*>(t.e),
       stride(t.e_stride)},
      hardware,
      {t.swizzle, t.words_first ? Order::AlongN : Order::AlongM}};
  Gemm gemm;
  check(gemm.can_implement(arguments), "shape");
  check(gemm.initialize(arguments, nullptr, stream), "initialise");
  check(gemm.run(stream), "launch");
}

template <class Schedule, class Block, class... Sums>
void launch_with(const fastpo::AnchoredTile& t, int device, int multiprocessors, void* stream) {
  if (const cudaError_t status = cudaSetDevice(device); status != cudaSuccess)
    throw std::runtime_error(std::string("anchored_cuda: set device failed: ") +
                             cudaGetErrorString(status));
  const auto on = static_cast<cudaStream_t>(stream);
  if (t.e == nullptr)
    launch<Schedule, Block, void, Sums...>(t, device, multiprocessors, on);
  else
    launch<Schedule, Block, Element, Sums...>(t, device, multiprocessors, on);
}

template <class Schedule, int kWords>
void launch_sum(const fastpo::AnchoredTile& t, int device, int multiprocessors, void* stream) {
  using Block = BlockOf<kWords>;
  launch_with<Schedule, Block, RowSum<Block>>(t, device, multiprocessors, stream);
}

// With all kAnchoredSums.
template <class Schedule, int kWords>
void launch_sums(const fastpo::AnchoredTile& t, int device, int multiprocessors, void* stream) {
  using Block = BlockOf<kWords>;
  using Sum = RowSum<Block>;
  launch_with<Schedule, Block, Sum, Sum, Sum, Sum, RowLargest<Block>>(t, device, multiprocessors,
                                                                      stream);
}

}  // namespace
