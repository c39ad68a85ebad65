"""Row kernels over raw addresses, as in csrc/include/fastpo; 0 is an absent tensor.

Strides count elements. dtypes: 0 float32, 1 bfloat16, 2 float16. isa: a place in cpu_isas.
The tensors must outlive the call, on CUDA until the stream has run it.
"""

# Instruction sets that were compiled in and that this processor has: scalar first, the best last.
cpu_isas: tuple[str, ...]
product_dtypes: tuple[int, ...]  # of operands that products of AVX-512 multiply here
has_cuda: bool
has_cutlass: bool

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
        inverse: int,
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
        inverse: int,
        factor: float,
        entropy_grad: bool,
        out: int,
        out_dtype: int,
        out_stride: int,
    ) -> None: ...

class PairSide:
    def __init__(
        self,
        *,
        tile: int,
        tile_stride: int,
        bias: int,
        inner: float,
        cap: float,
        inverse: int,
        factor: float,
        out: int,
        out_dtype: int,
        out_stride: int,
    ) -> None: ...

class PairTile:
    def __init__(
        self, *, student: PairSide, teacher: PairSide, n: int, v: int, first: int
    ) -> None: ...

class PairRule:
    def __init__(self, *, kind: int, parameter: float) -> None:
        """kind: its place in KINDS of ops/rows/pair/backend.py."""

class PairSoftmaxes:
    def __init__(
        self, *, tile: PairTile, state: int, state_stride: int, over: int, entropy: bool
    ) -> None:
        """over: 0 student, 1 teacher, -1 neither."""

class PairValues:
    def __init__(
        self,
        *,
        tile: PairTile,
        rule: PairRule,
        constants: int,
        constants_stride: int,
        sums: int,
        sums_stride: int,
    ) -> None: ...

class PairGradients:
    def __init__(
        self,
        *,
        tile: PairTile,
        rule: PairRule,
        constants: int,
        constants_stride: int,
        factors: int,
        factors_stride: int,
    ) -> None: ...

class WordProducts:
    def __init__(
        self,
        *,
        hidden: int,
        hidden_stride: int,
        weight: int,
        weight_dtype: int,
        weight_stride: int,
        ids: int,
        n: int,
        v: int,
        h: int,
        out: int,
    ) -> None: ...

class Product:
    def __init__(
        self,
        *,
        dtype: int,
        a: int,
        a_row: int,
        a_column: int,
        b: int,
        b_row: int,
        b_column: int,
        n: int,
        v: int,
        h: int,
        out: int,
        out_stride: int,
        add: bool,
    ) -> None: ...

class WordSums:
    def __init__(
        self,
        *,
        coefficients: int,
        index: int,
        offsets: int,
        rows: int,
        rows_dtype: int,
        rows_stride: int,
        n: int,
        v: int,
        out: int,
        out_dtype: int,
        out_stride: int,
    ) -> None: ...

def rows_forward_cpu(tile: ForwardTile, threads: int, isa: int) -> None:
    """Raises RuntimeError when `isa` is no place in cpu_isas."""

def rows_backward_cpu(tile: BackwardTile, threads: int, isa: int) -> None: ...
def pair_softmaxes_cpu(tile: PairSoftmaxes, threads: int, isa: int) -> None: ...
def pair_values_cpu(tile: PairValues, threads: int, isa: int) -> None: ...
def pair_gradients_cpu(tile: PairGradients, threads: int, isa: int) -> None: ...
def word_products_cpu(tile: WordProducts, threads: int, isa: int) -> None: ...
def product_cpu(work: Product, threads: int) -> None:
    """Only of `product_dtypes`."""

def word_sums_cpu(tile: WordSums, threads: int, isa: int) -> None: ...
def rows_forward_cuda(tile: ForwardTile, device: int, stream: int) -> None:
    """Only with `has_cuda`. Asynchronous on the stream; RuntimeError when the launch fails."""

def rows_backward_cuda(tile: BackwardTile, device: int, stream: int) -> None: ...

class AnchoredTile:
    """Of csrc/include/fastpo/anchored.h; only with `has_cutlass`."""

    def __init__(
        self,
        *,
        x: int,
        x_stride: int,
        words: int,
        words_stride: int,
        n: int,
        v: int,
        h: int,
        columns: int,
        base: int,
        bias: int,
        slope: float,
        sums: int,
        partial: int,
        e: int,
        e_stride: int,
        pingpong: bool,
        swizzle: int,
        words_first: bool,
    ) -> None: ...

def anchored_cuda(tile: AnchoredTile, device: int, multiprocessors: int, stream: int) -> None:
    """Only with `has_cutlass`. Asynchronous; RuntimeError when the launch fails."""
