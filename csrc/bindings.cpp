// fastpo._C: the only file that knows Python. Addresses come as integers; the GIL is released.
#include <pybind11/pybind11.h>

#include <cstdint>
#include <stdexcept>

#include "fastpo/anchored.h"
#include "fastpo/openmp.h"
#include "fastpo/pair_rows.h"
#include "fastpo/product.h"
#include "fastpo/rows.h"
#include "fastpo/words.h"

namespace py = pybind11;
using namespace fastpo;

namespace {

template <class T>
T* pointer(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

ForwardTile forward_tile(uintptr_t tile, int64_t tile_stride, int64_t n, int64_t v, int64_t first,
                         uintptr_t labels, uintptr_t bias, uintptr_t state, int64_t state_stride,
                         float inner, float cap, uintptr_t inverse, int stats, uintptr_t kept,
                         int kept_dtype, int64_t kept_stride, uintptr_t anchors, bool fold_cap) {
  return {pointer<const float>(tile),
          tile_stride,
          n,
          v,
          first,
          pointer<const int64_t>(labels),
          pointer<const float>(bias),
          pointer<float>(state),
          state_stride,
          {inner, cap, pointer<const double>(inverse)},
          stats,
          pointer<void>(kept),
          static_cast<DType>(kept_dtype),
          kept_stride,
          pointer<float>(anchors),
          fold_cap};
}

BackwardTile backward_tile(uintptr_t source, int source_dtype, int64_t source_stride,
                           uintptr_t anchors, int64_t n, int64_t v, int64_t first, uintptr_t labels,
                           uintptr_t bias, uintptr_t grads, int64_t grads_stride, float inner,
                           float cap, uintptr_t inverse, float factor, bool entropy_grad,
                           uintptr_t out, int out_dtype, int64_t out_stride) {
  return {pointer<const void>(source),
          static_cast<DType>(source_dtype),
          source_stride,
          pointer<const float>(anchors),
          n,
          v,
          first,
          pointer<const int64_t>(labels),
          pointer<const float>(bias),
          pointer<const float>(grads),
          grads_stride,
          {inner, cap, pointer<const double>(inverse)},
          factor,
          entropy_grad,
          pointer<void>(out),
          static_cast<DType>(out_dtype),
          out_stride};
}

PairSide pair_side(uintptr_t tile, int64_t tile_stride, uintptr_t bias, float inner, float cap,
                   uintptr_t inverse, float factor, uintptr_t out, int out_dtype,
                   int64_t out_stride) {
  return {pointer<const float>(tile),
          tile_stride,
          pointer<const float>(bias),
          {inner, cap, pointer<const double>(inverse)},
          factor,
          pointer<void>(out),
          static_cast<DType>(out_dtype),
          out_stride};
}

PairSoftmaxes pair_softmaxes(const PairTile& tile, uintptr_t state, int64_t state_stride, int over,
                             bool entropy) {
  return {tile, pointer<float>(state), state_stride, over, entropy};
}

PairValues pair_values(const PairTile& tile, const PairRule& rule, uintptr_t constants,
                       int64_t constants_stride, uintptr_t sums, int64_t sums_stride) {
  return {
      tile,       rule, pointer<const float>(constants), constants_stride, pointer<double>(sums),
      sums_stride};
}

PairGradients pair_gradients(const PairTile& tile, const PairRule& rule, uintptr_t constants,
                             int64_t constants_stride, uintptr_t factors, int64_t factors_stride) {
  return {tile,
          rule,
          pointer<const float>(constants),
          constants_stride,
          pointer<const float>(factors),
          factors_stride};
}

WordProducts word_products(uintptr_t hidden, int64_t hidden_stride, uintptr_t weight,
                           int weight_dtype, int64_t weight_stride, uintptr_t ids, int64_t n,
                           int64_t v, int64_t h, uintptr_t out) {
  return {pointer<const float>(hidden),
          hidden_stride,
          pointer<const void>(weight),
          static_cast<DType>(weight_dtype),
          weight_stride,
          pointer<const int64_t>(ids),
          n,
          v,
          h,
          pointer<float>(out)};
}

WordSums word_sums(uintptr_t coefficients, uintptr_t index, uintptr_t offsets, uintptr_t rows,
                   int rows_dtype, int64_t rows_stride, int64_t n, int64_t v, uintptr_t out,
                   int out_dtype, int64_t out_stride) {
  return {pointer<const float>(coefficients),
          pointer<const int64_t>(index),
          pointer<const int64_t>(offsets),
          pointer<const void>(rows),
          static_cast<DType>(rows_dtype),
          rows_stride,
          n,
          v,
          pointer<void>(out),
          static_cast<DType>(out_dtype),
          out_stride};
}

Product product(int dtype, uintptr_t a, int64_t a_row, int64_t a_column, uintptr_t b, int64_t b_row,
                int64_t b_column, int64_t n, int64_t v, int64_t h, uintptr_t out,
                int64_t out_stride, bool add) {
  return {static_cast<DType>(dtype),
          pointer<const void>(a),
          a_row,
          a_column,
          pointer<const void>(b),
          b_row,
          b_column,
          n,
          v,
          h,
          pointer<float>(out),
          out_stride,
          add};
}

void bind_product(py::module_& m) {
  using py::arg;
  py::list dtypes;
  for (DType dtype : {DType::kFloat32, DType::kBFloat16}) {
    if (has_product(dtype)) dtypes.append(static_cast<int>(dtype));
  }
  m.attr("product_dtypes") = py::tuple(dtypes);
  py::class_<Product>(m, "Product")
      .def(py::init(&product), py::kw_only(), arg("dtype"), arg("a"), arg("a_row"), arg("a_column"),
           arg("b"), arg("b_row"), arg("b_column"), arg("n"), arg("v"), arg("h"), arg("out"),
           arg("out_stride"), arg("add"));
  m.def(
      "product_cpu", [](const Product& work, int threads) { product_host(work, threads); },
      arg("work"), arg("threads"), py::call_guard<py::gil_scoped_release>());
}

void bind_words(py::module_& m) {
  using py::arg;
  py::class_<WordProducts>(m, "WordProducts")
      .def(py::init(&word_products), py::kw_only(), arg("hidden"), arg("hidden_stride"),
           arg("weight"), arg("weight_dtype"), arg("weight_stride"), arg("ids"), arg("n"), arg("v"),
           arg("h"), arg("out"));
  py::class_<WordSums>(m, "WordSums")
      .def(py::init(&word_sums), py::kw_only(), arg("coefficients"), arg("index"), arg("offsets"),
           arg("rows"), arg("rows_dtype"), arg("rows_stride"), arg("n"), arg("v"), arg("out"),
           arg("out_dtype"), arg("out_stride"));
}

void bind_tiles(py::module_& m) {
  using py::arg;
  py::class_<ForwardTile>(m, "ForwardTile")
      .def(py::init(&forward_tile), py::kw_only(), arg("tile"), arg("tile_stride"), arg("n"),
           arg("v"), arg("first"), arg("labels"), arg("bias"), arg("state"), arg("state_stride"),
           arg("inner"), arg("cap"), arg("inverse"), arg("stats"), arg("kept"), arg("kept_dtype"),
           arg("kept_stride"), arg("anchors"), arg("fold_cap"));
  py::class_<BackwardTile>(m, "BackwardTile")
      .def(py::init(&backward_tile), py::kw_only(), arg("source"), arg("source_dtype"),
           arg("source_stride"), arg("anchors"), arg("n"), arg("v"), arg("first"), arg("labels"),
           arg("bias"), arg("grads"), arg("grads_stride"), arg("inner"), arg("cap"), arg("inverse"),
           arg("factor"), arg("entropy_grad"), arg("out"), arg("out_dtype"), arg("out_stride"));
}

void bind_pairs(py::module_& m) {
  using py::arg;
  py::class_<PairSide>(m, "PairSide")
      .def(py::init(&pair_side), py::kw_only(), arg("tile"), arg("tile_stride"), arg("bias"),
           arg("inner"), arg("cap"), arg("inverse"), arg("factor"), arg("out"), arg("out_dtype"),
           arg("out_stride"));
  py::class_<PairTile>(m, "PairTile")
      .def(py::init([](const PairSide& student, const PairSide& teacher, int64_t n, int64_t v,
                       int64_t first) { return PairTile{{student, teacher}, n, v, first}; }),
           py::kw_only(), arg("student"), arg("teacher"), arg("n"), arg("v"), arg("first"));
  py::class_<PairRule>(m, "PairRule")
      .def(py::init(
               [](int kind, double parameter) { return PairRule{Divergence(kind), parameter}; }),
           py::kw_only(), arg("kind"), arg("parameter"));
  py::class_<PairSoftmaxes>(m, "PairSoftmaxes")
      .def(py::init(&pair_softmaxes), py::kw_only(), arg("tile"), arg("state"), arg("state_stride"),
           arg("over"), arg("entropy"));
  py::class_<PairValues>(m, "PairValues")
      .def(py::init(&pair_values), py::kw_only(), arg("tile"), arg("rule"), arg("constants"),
           arg("constants_stride"), arg("sums"), arg("sums_stride"));
  py::class_<PairGradients>(m, "PairGradients")
      .def(py::init(&pair_gradients), py::kw_only(), arg("tile"), arg("rule"), arg("constants"),
           arg("constants_stride"), arg("factors"), arg("factors_stride"));
}

py::tuple isa_names() {
  py::tuple names(host_isas());
  for (int isa = 0; isa < host_isas(); ++isa) names[isa] = host_isa_name(isa);
  return names;
}

template <class Tile, void (*kRows)(const Tile&, int, int)>
void bind_cpu(py::module_& m, const char* name) {
  m.def(
      name, [](const Tile& tile, int threads, int isa) { kRows(tile, threads, isa); },
      py::arg("tile"), py::arg("threads"), py::arg("isa"),
      py::call_guard<py::gil_scoped_release>());
}

template <class Tile, void (*kRows)(const Tile&, int, void*)>
void bind_cuda(py::module_& m, const char* name) {
  m.def(
      name,
      [](const Tile& tile, int device, uintptr_t stream) {
        kRows(tile, device, pointer<void>(stream));
      },
      py::arg("tile"), py::arg("device"), py::arg("stream"),
      py::call_guard<py::gil_scoped_release>());
}

#ifdef FASTPO_HAS_CUTLASS
AnchoredTile anchored_tile(uintptr_t x, int64_t x_stride, uintptr_t words, int64_t words_stride,
                           int64_t n, int64_t v, int64_t h, uintptr_t columns, uintptr_t base,
                           uintptr_t bias, float slope, int sums, uintptr_t partial, uintptr_t e,
                           int64_t e_stride, bool pingpong, int swizzle, bool words_first) {
  return {pointer<const void>(x),
          x_stride,
          pointer<const void>(words),
          words_stride,
          n,
          v,
          h,
          pointer<const int>(columns),
          pointer<const float>(base),
          pointer<const float>(bias),
          slope,
          sums,
          pointer<float>(partial),
          pointer<void>(e),
          e_stride,
          pingpong,
          swizzle,
          words_first};
}

void bind_anchored(py::module_& m) {
  using py::arg;
  py::class_<AnchoredTile>(m, "AnchoredTile")
      .def(py::init(&anchored_tile), py::kw_only(), arg("x"), arg("x_stride"), arg("words"),
           arg("words_stride"), arg("n"), arg("v"), arg("h"), arg("columns"), arg("base"),
           arg("bias"), arg("slope"), arg("sums"), arg("partial"), arg("e"), arg("e_stride"),
           arg("pingpong"), arg("swizzle"), arg("words_first"));
  m.def(
      "anchored_cuda",
      [](const AnchoredTile& tile, int device, int multiprocessors, uintptr_t stream) {
        anchored_cuda(tile, device, multiprocessors, pointer<void>(stream));
      },
      arg("tile"), arg("device"), arg("multiprocessors"), arg("stream"),
      py::call_guard<py::gil_scoped_release>());
}
#endif

}  // namespace

PYBIND11_MODULE(_C, m) {
#ifdef FASTPO_ZIG
  find_openmp();  // an ImportError that says so, not a parallel region that ends the process
#endif
  m.doc() = "Row kernels of fastpo over raw addresses; _C.pyi says what each argument is.";
  bind_tiles(m);
  bind_pairs(m);
  bind_words(m);
  bind_product(m);
  m.attr("cpu_isas") = isa_names();
  bind_cpu<ForwardTile, rows_forward_host>(m, "rows_forward_cpu");
  bind_cpu<BackwardTile, rows_backward_host>(m, "rows_backward_cpu");
  bind_cpu<PairSoftmaxes, pair_softmaxes_host>(m, "pair_softmaxes_cpu");
  bind_cpu<PairValues, pair_values_host>(m, "pair_values_cpu");
  bind_cpu<PairGradients, pair_gradients_host>(m, "pair_gradients_cpu");
  bind_cpu<WordProducts, word_products_host>(m, "word_products_cpu");
  bind_cpu<WordSums, word_sums_host>(m, "word_sums_cpu");
#ifdef FASTPO_HAS_CUDA
  m.attr("has_cuda") = true;
  bind_cuda<ForwardTile, rows_forward_cuda>(m, "rows_forward_cuda");
  bind_cuda<BackwardTile, rows_backward_cuda>(m, "rows_backward_cuda");
#else
  m.attr("has_cuda") = false;
#endif
#ifdef FASTPO_HAS_CUTLASS
  m.attr("has_cutlass") = true;
  bind_anchored(m);
#else
  m.attr("has_cutlass") = false;
#endif
}
