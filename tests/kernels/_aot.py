"""Compiles every Triton kernel of the library for GPUs that are not there; prints JSON.

    python tests/kernels/_aot.py [SM ...]

Runs as a program of its own: with TRITON_INTERPRET set, @triton.jit would have made interpreted
functions. The launches are the library's own: a recorder stands in for each kernel while the
adapter runs on CPU tensors, so what is compiled is what a GPU would be asked to run.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Collection, Iterator
from types import ModuleType
from typing import NamedTuple

import torch
import triton
from _sass import disassembled, reduction_layouts, resources
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.tools.tensor_descriptor import TensorDescriptor

from fastpo.kernels import (
    _blocks,
    anchored,
    anchored_again,
    anchored_fold,
    anchored_label,
    anchored_target,
    finish,
    pair_rows,
    rescale,
    row_grads,
    rows,
    words,
)
from fastpo.ops.rows import backend as R
from fastpo.ops.rows import triton as rows_triton
from fastpo.ops.rows.pair import backend as P
from fastpo.ops.rows.pair import triton as pair_triton

ARCHITECTURES = (80, 90)
OTHERS = (86, 89, 100, 120)
EVERY = ARCHITECTURES + OTHERS
FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
TYPES = {FP32: "*fp32", BF16: "*bf16", FP16: "*fp16", torch.int64: "*i64", torch.float64: "*fp64"}
TYPES[torch.uint8] = "*u8"
ROWS = 16
PLAIN, CAPPED = R.LogitMap(0.7), R.LogitMap(0.7, 30.0)
OWN = R.LogitMap(1.0, 30.0, inverse=torch.ones(ROWS, dtype=torch.float64))
ALL = sum(R.STATS.values())
TRL = sum(R.STATS[name] for name in ("entropy", "mean_logits", "is_top1"))  # what its trainers ask

# width, bias, map, statistics, dtype kept, soft-cap folded into it
FORWARD = [
    (8192, False, PLAIN, 0, None, False),
    (8192, False, PLAIN, 0, BF16, False),
    (8192, False, PLAIN, 0, FP16, False),
    (8192, False, PLAIN, ALL, None, False),
    (8192, True, CAPPED, ALL, None, False),
    (8192, True, CAPPED, ALL, BF16, True),
    (8192, True, CAPPED, ALL, FP32, True),
    (8191, True, CAPPED, ALL, None, False),
    (8191, True, CAPPED, ALL, FP16, True),
    (256, False, PLAIN, ALL, BF16, False),
    (8192, False, OWN, ALL, BF16, True),
    (1, True, PLAIN, ALL, FP32, False),
]

# width, bias, map, dtype of the kept exponentials, entropy, dtype written
BACKWARD = [
    (8192, False, PLAIN, None, False, BF16),
    (8192, False, PLAIN, BF16, False, BF16),
    (8192, False, PLAIN, FP16, True, FP16),
    (8192, True, CAPPED, None, True, BF16),
    (8192, False, CAPPED, BF16, True, BF16),
    (8191, True, CAPPED, None, True, FP16),
    (8191, False, CAPPED, FP32, True, FP32),
    (256, False, PLAIN, FP32, False, FP32),
    (8192, False, OWN, None, True, BF16),
    (1, True, CAPPED, None, True, FP32),
]

# rows, words, hidden size, dtype, bias, E stored, statistics
ANCHORED = [
    (512, 128_256, 4096, BF16, False, False, 0),
    (512, 128_256, 4096, BF16, False, False, TRL),
    (512, 128_256, 4096, BF16, False, False, ALL),
    (512, 128_256, 4096, BF16, False, True, 0),
    (512, 128_256, 4096, BF16, False, True, TRL),
    (512, 128_256, 4096, BF16, True, True, ALL),
    (512, 151_936, 896, FP16, False, True, 0),
    (512, 50_257, 4096, BF16, False, False, 0),
    (512, 50_257, 4096, BF16, False, True, ALL),
    (500, 50_257, 4090, BF16, True, True, 0),
    (1, 1, 8, BF16, True, True, ALL),
]

PRODUCTS = ("pointers", "descriptors", "beside", "again")  # whose instructions are counted

RESCALED = (4090, 4096)  # hidden sizes

# width, biases, the student's and the teacher's map, dtypes written
PAIRS = [
    (8192, False, (PLAIN, PLAIN), (BF16, None)),
    (8191, True, (CAPPED, CAPPED), (FP32, FP16)),
    (8192, False, (PLAIN, OWN), (BF16, BF16)),
]


class Launch(NamedTuple):
    name: str
    kernel: triton.JITFunction
    arguments: dict[str, object]
    options: dict[str, object]  # num_warps and the like
    architectures: tuple[int, ...] = ARCHITECTURES


def record(
    name: str,
    kernel: str,
    adapter: Callable[..., None],
    arguments: tuple,
    module: ModuleType = rows,
    **options: object,
) -> Launch:
    """The launch that the adapter makes with these arguments, instead of making it."""
    original, found = getattr(module, kernel), []

    class Recorder:
        def __getitem__(self, grid: object) -> Callable[..., None]:
            return lambda *args, **named: found.append((args, named))

    setattr(module, kernel, Recorder())
    try:
        adapter(*arguments, **options)
    finally:
        setattr(module, kernel, original)
    ((args, named),) = found
    return bound(name, original, args, named)


def bound(name: str, kernel: triton.JITFunction, args: tuple, named: dict[str, object]) -> Launch:
    """A launch with all the kernel's parameters by name, apart from the compiler's options."""
    options = dict(named)
    values = dict(zip(kernel.arg_names, args, strict=False))
    values |= {key: options.pop(key) for key in kernel.arg_names[len(args) :]}
    return Launch(name, kernel, values, options)


def launches() -> Iterator[Launch]:
    n = ROWS
    labels, numbers = torch.zeros(n, dtype=torch.int64), torch.zeros(n)
    for width, biased, logit_map, stats, dtype, fold in FORWARD:
        bias = torch.zeros(width) if biased else None
        kept = None if dtype is None else torch.empty(n, width, dtype=dtype)
        anchors = None if dtype is None else numbers
        state, tile = torch.zeros(R.STATE, n), torch.empty(n, width)
        arguments = (tile, 0, labels, bias, state, logit_map, stats, kept, anchors, fold)
        name = f"forward {width} {_words(biased, logit_map)}stats={stats} kept={_short(dtype)}"
        yield record(name, "rows_fwd_kernel", rows_triton.forward, arguments)
    for width, biased, logit_map, dtype, entropy, dtype_out in BACKWARD:
        bias = torch.zeros(width) if biased else None
        source = torch.empty(n, width, dtype=dtype or FP32)
        anchors = None if dtype is None else numbers
        grads, out = torch.zeros(R.GRADS, n), torch.empty(n, width, dtype=dtype_out)
        arguments = (source, anchors, 0, labels, bias, grads, logit_map, entropy, out)
        name = f"backward {width} {_words(biased, logit_map)}{'entropy ' if entropy else ''}"
        name += f"kept={_short(dtype)} out={_short(dtype_out)}"
        yield record(name, "rows_bwd_kernel", rows_triton.backward, arguments)
    yield from small_launches()
    for case in ANCHORED:
        yield from anchored_launches(*case)
    for case in PAIRS:
        yield from pair_launches(*case)
    for dtype, architectures in ((BF16, EVERY), (FP32, ARCHITECTURES)):
        for found in word_launches(dtype):
            yield found._replace(architectures=architectures)


def small_launches() -> Iterator[Launch]:
    """A few numbers a row: for every GPU."""
    n = ROWS
    numbers = torch.zeros(n)
    given = [(rescale, f"rescale {h}", (torch.empty(n, h), numbers, numbers)) for h in RESCALED]
    for stats, logit_map in ((tuple(R.STATS), OWN), ((), PLAIN)):
        more = numbers if stats else None
        state, ignored = torch.zeros(R.STATE, n), numbers > 0 if stats else None
        saved, name = R.Saved(*(numbers,) * 4, more), _words(False, logit_map)
        upstream = R.Upstream(numbers, more, more)
        given.append((finish, f"finish {name}", (state, stats, ignored)))
        given.append((row_grads, f"row_grads {name}", (saved, upstream, logit_map, ignored)))
    e, own, labels = torch.empty(n, 7168, dtype=BF16), numbers.to(BF16), numbers.long()
    given.append((anchored_label, "anchored_label", (e, own, labels, 0)))
    for module, name, arguments in given:
        kernel = name.split()[0]
        adapter = getattr(rows_triton, kernel, None) or getattr(module, kernel)
        found = record(name, f"{kernel}_kernel", adapter, arguments, module)
        yield found._replace(architectures=EVERY)


def anchored_launches(
    n: int, vocab: int, hidden: int, dtype: torch.dtype, biased: bool, kept: bool, stats: int
) -> Iterator[Launch]:
    x, w = torch.empty(n, hidden, dtype=dtype), torch.empty(vocab, hidden, dtype=dtype)
    bias, numbers = torch.zeros(vocab) if biased else None, torch.zeros(n)
    labels, state, words = torch.zeros(n, dtype=torch.int64), torch.zeros(R.STATE, n), 32_256
    e = anchored.Exponentials(torch.empty(1, dtype=dtype), n, words, 0, n) if kept else None
    rows = (x, w, labels, bias)
    name = f"{n}x{vocab}x{hidden} {_short(dtype)} {'bias ' if biased else ''}"
    name += f"stats={stats} kept={_short(dtype if kept else None)}"
    sums, given = anchored.SUMS.value if stats else 1, {"factor": 1.25, "stats": stats}
    for tma in (False, True):
        if tma and hidden * dtype.itemsize % 16:
            continue  # what a descriptor cannot load, the other kernel does
        prefix, kernel = ("descriptors ", "_tma") if tma else ("pointers ", "")
        blocks = _blocks.gemm_blocks(tma, biased and stats != 0)
        partial = torch.zeros(sums, -(-vocab // blocks.v), n)
        found = record(
            prefix + name, f"anchored_fwd{kernel}_kernel", anchored.anchored_fwd,
            (*rows, numbers, partial, e, blocks, 132), anchored, **given,
        )  # fmt: skip
        found = found._replace(architectures=(90,)) if tma else found
        yield found
        if kept and not stats:  # as tokens are computed again
            bare = {**found.arguments, "labels_ptr": None, "partial_ptr": None}
            yield found._replace(name="beside " + found.name, arguments=bare)
    if not biased:
        return  # what stands beside the product needs least there
    given["largest"] = 2.0**80
    maxima = torch.zeros(-(-vocab // anchored_again.WORDS), n)
    for again in (None, torch.zeros(sums, *maxima.shape)):
        yield record(
            f"again {name} sums={again is not None}", "anchored_again_kernel",
            anchored_again.anchored_again,
            (*rows, numbers, maxima, again, None if again is None else e), anchored_again, **given,
        )  # fmt: skip
        folded = partial if again is None else again
        yield record(
            f"fold {name} again={again is not None}", "anchored_fold_kernel",
            anchored_fold.anchored_fold,
            (folded, None if again is None else maxima, labels, numbers, state, numbers, e),
            anchored_fold, vocab=vocab, **given,
        )  # fmt: skip
    yield record(
        "target " + name, "anchored_target_kernel", anchored_target.anchored_target,
        (*rows, numbers, numbers, numbers), anchored_target, factor=1.25,
    )  # fmt: skip


def pair_launches(
    width: int,
    biased: bool,
    maps: tuple[R.LogitMap, R.LogitMap],
    dtypes: tuple[torch.dtype | None, torch.dtype | None],
) -> Iterator[Launch]:
    n = ROWS
    bias, numbers = torch.zeros(width) if biased else None, torch.zeros(P.STATE, n)
    sides = tuple(P.Side(torch.empty(n, width), bias, logit_map) for logit_map in maps)
    outs = tuple(None if x is None else torch.empty(n, width, dtype=x) for x in dtypes)
    name = f" {width} {_words(biased, maps[0])}teacher {_words(False, maps[1])}"

    def launch(kernel: str, detail: str, *arguments: object) -> Launch:
        adapter = getattr(pair_triton, kernel)
        title = f"pair {kernel}{name}{detail}"
        return record(title, f"pair_{kernel}_kernel", adapter, (sides, 0, *arguments), pair_rows)

    for over, entropy in ((None, False), (0, True), (1, True)):
        yield launch("softmaxes", f"over={over} entropy={entropy}", numbers, over, entropy)
    for kind in P.KINDS:
        rule, sums = P.Rule(kind, 0.3), torch.zeros(P.SUMS, n, dtype=torch.float64)
        if rule.over is None:  # a KL divergence is known after the softmaxes
            yield launch("values", kind, numbers, rule, sums)
        yield launch("gradients", kind, numbers, numbers, rule, outs)


def word_launches(dtype: torch.dtype) -> Iterator[Launch]:
    """Of 20 words in 4,096 columns: their products, and a sum of rows."""
    n, k, h = ROWS, 20, 4096
    hidden, weight = torch.empty(n, h, dtype=dtype), torch.empty(100, h, dtype=dtype)
    ids, numbers = torch.zeros(n, k, dtype=torch.int64), torch.empty(n, k)
    given = hidden, weight, ids, numbers
    name = f"word products {_short(dtype)}"
    yield record(name, "word_products_kernel", words.word_products, given, words)
    given = numbers.flatten(), ids.flatten(), torch.zeros(n + 1, dtype=torch.int64), weight, hidden
    name = f"word sums {_short(dtype)}"
    yield record(name, "word_sums_kernel", words.word_sums, given, words)


def _words(biased: bool, logit_map: R.LogitMap) -> str:
    own = "temperatures " if logit_map.inverse is not None else ""
    return ("bias " if biased else "") + ("softcap " if logit_map.softcap else "") + own


def _short(dtype: torch.dtype | None) -> str:
    return "no" if dtype is None else TYPES[dtype][1:]


def source_of(launch: Launch) -> ASTSource:
    """The specialisation Triton's launcher makes: 1 is a constant, multiples of 16 are known."""
    constexpr = {p.name for p in launch.kernel.params if p.is_constexpr}
    plain = {p.name for p in launch.kernel.params if p.do_not_specialize}
    unaligned = {p.name for p in launch.kernel.params if p.do_not_specialize_on_alignment}
    signature, constants, attributes = {}, {}, {}
    for i, (name, value) in enumerate(launch.arguments.items()):
        one = type(value) is int and value == 1 and name not in plain
        if name in constexpr or value is None or one:
            signature[name], constants[name] = "constexpr", value
            continue
        if isinstance(value, TensorDescriptor):
            shape = ",".join(map(str, value.block_shape))
            signature[name] = f"tensordesc<{_short(value.base.dtype)}[{shape}]>"
            continue
        number = value.data_ptr() if isinstance(value, torch.Tensor) else value
        if isinstance(value, torch.Tensor):
            signature[name] = TYPES[value.dtype]
        else:
            signature[name] = "fp32" if isinstance(value, float) else "i32"
        if isinstance(number, int) and number % 16 == 0 and name not in plain | unaligned:
            attributes[(i,)] = [["tt.divisibility", 16]]
    return ASTSource(launch.kernel, signature, constants, attributes)


def report(asked: Collection[int]) -> Iterator[dict]:
    seen: set[object] = set()
    for launch in launches():
        architectures = launch.architectures
        if "bias" in launch.name and launch.kernel not in seen and architectures == ARCHITECTURES:
            # One launch of each kernel, of those that need most registers, is enough for these.
            seen.add(launch.kernel)
            architectures += OTHERS
        for sm in [x for x in architectures if x in asked]:
            target = GPUTarget("cuda", sm, 32)
            compiled = triton.compile(source_of(launch), target, launch.options)
            products = launch.name.startswith(PRODUCTS)
            yield {
                "name": launch.name,
                "sm": sm,
                "shared": compiled.metadata.shared,
                **resources(disassembled(compiled.asm["cubin"], code=products)),
                "reductions": reduction_layouts(compiled.asm["ttgir"]),
            }


if __name__ == "__main__":
    asked = [int(sm) for sm in sys.argv[1:]] or EVERY
    json.dump(list(report(asked)), sys.stdout)
