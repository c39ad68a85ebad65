// fastpo._C: the only file that knows Python. Addresses come as integers; the GIL is released.
#include <pybind11/pybind11.h>

#include <cstdint>
#include <stdexcept>

#include "fastpo/rows.h"

namespace py = pybind11;
using namespace fastpo;

namespace {

template <class T>
T* pointer(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

ForwardTile forward_tile(uintptr_t tile, int64_t tile_stride, int64_t n, int64_t v, int64_t first,
                         uintptr_t labels, uintptr_t bias, uintptr_t state, int64_t state_stride,
                         float inner, float cap, int stats, uintptr_t kept, int kept_dtype,
                         int64_t kept_stride, uintptr_t anchors, bool fold_cap) {
  return {pointer<const float>(tile),
          tile_stride,
          n,
          v,
          first,
          pointer<const int64_t>(labels),
          pointer<const float>(bias),
          pointer<float>(state),
          state_stride,
          {inner, cap},
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
                           float cap, float factor, bool entropy_grad, uintptr_t out, int out_dtype,
                           int64_t out_stride) {
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
          {inner, cap},
          factor,
          entropy_grad,
          pointer<void>(out),
          static_cast<DType>(out_dtype),
          out_stride};
}

void bind_tiles(py::module_& m) {
  using py::arg;
  py::class_<ForwardTile>(m, "ForwardTile")
      .def(py::init(&forward_tile), py::kw_only(), arg("tile"), arg("tile_stride"), arg("n"),
           arg("v"), arg("first"), arg("labels"), arg("bias"), arg("state"), arg("state_stride"),
           arg("inner"), arg("cap"), arg("stats"), arg("kept"), arg("kept_dtype"),
           arg("kept_stride"), arg("anchors"), arg("fold_cap"));
  py::class_<BackwardTile>(m, "BackwardTile")
      .def(py::init(&backward_tile), py::kw_only(), arg("source"), arg("source_dtype"),
           arg("source_stride"), arg("anchors"), arg("n"), arg("v"), arg("first"), arg("labels"),
           arg("bias"), arg("grads"), arg("grads_stride"), arg("inner"), arg("cap"), arg("factor"),
           arg("entropy_grad"), arg("out"), arg("out_dtype"), arg("out_stride"));
}

template <class Tile, void (*kRows)(const Tile&, int, Isa)>
void bind_cpu(py::module_& m, const char* name) {
  m.def(
      name, [](const Tile& tile, int threads, int isa) { kRows(tile, threads, Isa(isa)); },
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

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Row kernels of fastpo over raw addresses; _C.pyi says what each argument is.";
  bind_tiles(m);
  m.def("cpu_isa", [] { return static_cast<int>(best_isa()); });
  bind_cpu<ForwardTile, rows_forward_host>(m, "rows_forward_cpu");
  bind_cpu<BackwardTile, rows_backward_host>(m, "rows_backward_cpu");
#ifdef FASTPO_HAS_CUDA
  m.attr("has_cuda") = true;
  bind_cuda<ForwardTile, rows_forward_cuda>(m, "rows_forward_cuda");
  bind_cuda<BackwardTile, rows_backward_cuda>(m, "rows_backward_cuda");
#else
  m.attr("has_cuda") = false;
#endif
}
