"""Shapes of heads, by name: those of models, a long one, small ones, and two walks."""

from __future__ import annotations

from typing import NamedTuple

from .errors import BenchError


class Shape(NamedTuple):
    tokens: int
    vocab: int
    hidden: int

    def __str__(self) -> str:
        return f"N {self.tokens:,}, V {self.vocab:,}, H {self.hidden:,}"


_MOST = 2**24  # words that torch.multinomial draws labels from
# vocab, hidden
HEADS = {
    "Llama-3-8B": (128_256, 4096),
    "Qwen3-8B": (151_936, 4096),
    "Qwen2.5-1.5B": (151_936, 1536),
    "Gemma-2-2B": (256_000, 2304),
}
SETS: dict[str, tuple[Shape, ...]] = {
    "readme": (Shape(1024, 151_936, 896),),
    **{name.lower(): tuple(Shape(n, *head) for n in (4096, 8192)) for name, head in HEADS.items()},
    "h200": tuple(Shape(n, *head) for head in HEADS.values() for n in (4096, 8192)),
    # What a lent GPU is asked, in this order: many tokens first, three hidden sizes.
    "gpu": tuple(
        Shape(n, *head)
        for n in (8192, 4096)
        for head in ((128_256, 4096), (151_936, 896), (128_256, 2048))
    ),
    "long": (Shape(131_072, *HEADS["Llama-3-8B"]),),
    "small": (Shape(256, 32_768, 512), Shape(1024, 32_768, 512), Shape(1024, 49_152, 576)),
    "by-tokens": tuple(Shape(2**k, 32_768, 512) for k in range(6, 13)),
    "by-vocab": tuple(Shape(512, 2**k, 512) for k in range(12, 19)),
    "by-tokens-8b": tuple(Shape(2**k, *HEADS["Llama-3-8B"]) for k in range(9, 16)),
    "by-vocab-8b": tuple(Shape(8192, 2**k, 4096) for k in range(13, 19)),
}


def parse(names: list[str]) -> list[Shape]:
    """Sets by name and shapes as N,V,H; largest first within a head, each once."""
    found: dict[Shape, None] = {}
    for name in names:
        found |= dict.fromkeys(SETS[name] if name in SETS else (_numbers(name),))
    return list(found)


def _numbers(text: str) -> Shape:
    parts = text.split(",")
    if len(parts) != 3 or not all(part.strip().isdecimal() for part in parts):
        raise BenchError(f"--shapes: expected {', '.join(SETS)} or N,V,H, got {text!r}")
    shape = Shape(*map(int, parts))
    if not 1 <= min(shape) <= max(shape) <= _MOST:
        raise BenchError(f"--shapes: expected three numbers of 1 to {_MOST}, got {text!r}")
    return shape
