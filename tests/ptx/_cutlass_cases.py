"""The anchored product on CUTLASS, its PTX run on the machine here, in all its variants.

    python tests/ptx/_cutlass_cases.py EXTENSION

A line of JSON for each: errors relative to the largest of what plain PyTorch computes, and a digest
of the bits of one row's Σe, where the case has it.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from types import SimpleNamespace

import torch
from _gpu import Emulated, emulate

N, V, H = 200, 392, 72  # no multiples of a block's
ROW = 131  # whose bits are compared


@dataclass(frozen=True)
class Case:
    pingpong: bool
    sums: int = 1
    stored: bool = False
    bias: bool = False
    swizzle: int = 1
    words_first: bool = False
    multiprocessors: int = 2
    eager: bool = False
    seed: int | None = None
    rows: tuple[int, int] = (0, N)
    labels: bool = True


def cases() -> Iterator[Case]:
    for pingpong in (True, False):
        for sums, stored, bias in itertools.product((1, 5), (False, True), (False, True)):
            yield Case(pingpong, sums, stored, bias)
        for swizzle, words_first in ((2, False), (8, True)):
            yield Case(pingpong, swizzle=swizzle, words_first=words_first, multiprocessors=8)
        yield Case(pingpong, multiprocessors=3)  # blocks come in pairs
        yield Case(pingpong, 5, stored=True, seed=0)
        yield Case(pingpong, 5, stored=True, eager=True, seed=1)
        yield Case(pingpong, rows=(77, 99))
        yield Case(pingpong, stored=True, labels=False)
        yield Case(pingpong, 5, stored=True, rows=(ROW, ROW + 1))


def drawn() -> SimpleNamespace:
    torch.manual_seed(0)
    found = SimpleNamespace(x=torch.randn(N, H).bfloat16(), bias=torch.randn(V))
    found.words = (torch.randn(V, H) / H**0.5).bfloat16()
    found.columns = torch.randint(0, V, (N,), dtype=torch.int32)
    found.columns[:2], found.base = torch.tensor([-1, V]), torch.randn(N)
    return found


def work(case: Case, x: SimpleNamespace) -> tuple[SimpleNamespace, torch.Tensor, torch.Tensor]:
    """Arguments, the sums and exponentials they name, which nobody has written yet."""
    a, b = case.rows
    width, rounded = (192 if case.pingpong else 256), -(-(b - a) // 128) * 128
    partial = torch.full((case.sums, -(-V // width), rounded), torch.nan)
    e = torch.full((b - a, V), torch.nan, dtype=torch.bfloat16)
    arguments = SimpleNamespace(
        x=x.x[a:].data_ptr(), x_stride=H, words=x.words.data_ptr(), words_stride=H, n=b - a, v=V,
        h=H, columns=x.columns[a:].data_ptr() if case.labels else 0, base=x.base[a:].data_ptr(),
        slope=1.25, bias=x.bias.data_ptr() if case.bias else 0, sums=case.sums,
        partial=partial.data_ptr(), e=e.data_ptr() if case.stored else 0, e_stride=V,
        pingpong=case.pingpong, swizzle=case.swizzle, words_first=case.words_first,
    )  # fmt: skip
    return arguments, partial[:, :, : b - a], e


def run(case: Case, gpu: Emulated, x: SimpleNamespace) -> dict:
    from _cutlass import product

    from fastpo import _C

    assert gpu.runtime is not None
    gpu.manner.eager, gpu.manner.seed = case.eager, case.seed
    given, partial, e = work(case, x)
    try:
        _C.anchored_cuda(_C.AnchoredTile(**vars(given)), 0, case.multiprocessors, 0)
    except RuntimeError as error:
        raise gpu.runtime.error or error from error
    reference, wanted, exponentials = work(case, x)
    product(reference, torch.bfloat16)
    pairs = list(zip(partial, wanted, strict=True))
    if case.stored:
        pairs.append((e.float(), exponentials.float()))
    errors = [float((a - b).abs().max() / b.abs().max()) for a, b in pairs]
    digest = ""
    if case.labels and ROW in range(*case.rows):
        bits = partial[0, :, ROW - case.rows[0]].numpy().tobytes()
        digest = hashlib.sha256(bits).hexdigest()
    return {**asdict(case), "errors": errors, "digest": digest}


def main() -> None:
    with tempfile.TemporaryDirectory() as cache:
        gpu, x = emulate(Path(cache), extension=Path(sys.argv[1])), drawn()
        sys.path.insert(0, str(Path(__file__).parents[1] / "ops"))
        for case in cases():
            print(json.dumps(run(case, gpu, x)), flush=True)


if __name__ == "__main__":
    main()
