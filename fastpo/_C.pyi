"""Row kernels over raw addresses (csrc/include/fastpo/rows.h); 0 is an absent tensor.

Strides count elements. dtypes: 0 float32, 1 bfloat16, 2 float16. isa: 0 scalar, 1 AVX2, 2 AVX-512.
The tensors must outlive the call, on CUDA until the stream has run it.
"""

has_cuda: bool

class ForwardTile:
    def __init__(
        self,
        *,
        tile: int,
        tile_stride: int,
        n: int,
        v: int,
        first: int,
        labels: int,
        bias: int,
        state: int,
        state_stride: int,
        inner: float,
        cap: float,
        stats: int,
        kept: int,
        kept_dtype: int,
        kept_stride: int,
        anchors: int,
        fold_cap: bool,
    ) -> None: ...

class BackwardTile:
    def __init__(
        self,
        *,
        source: int,
        source_dtype: int,
        source_stride: int,
        anchors: int,
        n: int,
        v: int,
        first: int,
        labels: int,
        bias: int,
        grads: int,
        grads_stride: int,
        inner: float,
        cap: float,
        factor: float,
        entropy_grad: bool,
        out: int,
        out_dtype: int,
        out_stride: int,
    ) -> None: ...

def cpu_isa() -> int:
    """The best instruction set that is compiled in and that this processor has."""

def rows_forward_cpu(tile: ForwardTile, threads: int, isa: int) -> None:
    """Raises RuntimeError when the processor lacks `isa`."""

def rows_backward_cpu(tile: BackwardTile, threads: int, isa: int) -> None: ...
def rows_forward_cuda(tile: ForwardTile, device: int, stream: int) -> None:
    """Only with `has_cuda`. Asynchronous on the stream; RuntimeError when the launch fails."""

def rows_backward_cuda(tile: BackwardTile, device: int, stream: int) -> None: ...
