"""How one call of the head is cut into tiles, and what it keeps for the backward.

All modes share their tiles, so log-probabilities are the same bits with and without gradient.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from .ops import products
from .ops.rows.registry import check as check_backend
from .ops.walks.checks import DTYPES, check_budget, check_flag, check_integer

Mode = Literal["score", "frozen", "keep", "lean"]


# Cells, 64 bytes of the smaller dtypes. A library multiplies rows that start at odd addresses by
# slower kernels, and a vocabulary may be odd: GPT-2's, or one to which a token was added.
_ROW_START = 32


def row_cells(words: int) -> int:
    """From one row of a tile to the next."""
    return -(-words // _ROW_START) * _ROW_START


@dataclass(frozen=True)
class Tiles:
    """One logits tile is [tokens, vocab] float32."""

    tokens: int
    vocab: int

    @property
    def cells(self) -> int:
        return self.tokens * row_cells(self.vocab)


@dataclass(frozen=True)
class Plan:
    """What `linear_logps` does for one shape; `print` it for a table.

    mode: `score` (no gradient), `frozen` (d hidden inside the forward), `keep` (probabilities of
        all tokens kept for the backward), `lean` (logits of `tokens - kept_tokens` recomputed).
    block_words: what is kept lies in blocks of so many words of all kept tokens; row_words: words
        of one kept token, of which the last may be none.
    shared_bytes: how many of `kept_bytes` cost nothing, because d weight is written there once a
        block of probabilities has been read.
    products: matrix products of 2·tokens·vocab·hidden FLOPs, forward and backward together.
    """

    mode: Mode
    tokens: int
    vocab: int
    hidden: int
    tiles: Tiles
    kept_tokens: int
    block_words: int
    row_words: int
    kept_bytes: int
    shared_bytes: int
    workspace_bytes: int
    products: float
    few_words: int = 0  # of a `support` that are multiplied one by one

    def __str__(self) -> str:
        rows = {
            "mode": self.mode,
            "tokens x vocab x hidden": f"{self.tokens} x {self.vocab} x {self.hidden}",
            "tile": f"{self.tiles.tokens} tokens x {self.tiles.vocab} words",
            "kept tokens": f"{self.kept_tokens} of {self.tokens}",
            "kept for the backward": f"{self.kept_bytes / 2**20:.1f} MiB",
            "of it in d weight's place": f"{self.shared_bytes / 2**20:.1f} MiB",
            "workspace": f"{self.workspace_bytes / 2**20:.1f} MiB",
            "matrix products": f"{self.products:.2f}",
            "support of a token": f"up to {self.few_words} words one by one, more in tiles",
        }
        width = max(map(len, rows))
        return "\n".join(f"{name:<{width}}  {value}" for name, value in rows.items())


def tile_shape(tokens: int, vocab: int, device_type: str) -> Tiles:
    """The only place where tile sizes are chosen. They depend on neither mode nor budget."""
    if device_type == "cpu":
        # One tile is 8 MiB of float32: it stays in a last-level cache between the product that
        # writes it and the row kernel that reads it.
        token_cap, elements, granule = 1024, 2 * 2**20, 64
    else:
        # 256 MiB: d hidden is read and written once per tile of 8,192 words, 733/8192 of a product.
        token_cap, elements, granule = 8192, 64 * 2**20, 256
    width = elements // token_cap // granule * granule
    return Tiles(max(1, min(tokens, token_cap)), max(1, min(vocab, width)))


def gemm_dtype(compute_dtype: torch.dtype, device_type: str, *operands: torch.dtype) -> torch.dtype:
    """float32 wherever 16-bit products cannot be added up into a float32 result.

    On a CPU also where an operand would first be rounded, inside autocast.
    """
    if device_type == "cuda":
        return compute_dtype
    own = compute_dtype in products.own_dtypes() and {*operands} <= {compute_dtype}
    return compute_dtype if own else torch.float32


def default_budget(vocab: int, hidden: int, device: torch.device) -> int:
    """What a float32 d weight buffer costs: at tokens <= 2·hidden all 16-bit probabilities fit.

    Of a GPU a sixteenth, where that is more: for small heads the buffer is nothing, and three
    products instead of four are a quarter of the time.
    """
    return max(4 * vocab * hidden, memory_of(device) // 16)


def gathered_words(vocab: int, device_type: str) -> int:
    """Up to how many words a token's products are taken one by one; above, with the tiles of all.

    One by one each word's row is read from memory for one token, in tiles for a thousand. On a GPU
    a product has 300 multiplications in the time of one number read, on a CPU some 20.
    """
    return max(1, vocab // (32 if device_type == "cpu" else 256))


def memory_of(device: torch.device) -> int:
    """Bytes a GPU has; 0 for a CPU, and for one that is not there."""
    if device.type != "cuda" or not torch.cuda.is_available():
        return 0
    return int(torch.cuda.get_device_properties(device).total_memory)


def kept_cells(vocab: int, block_words: int) -> int:
    """Of one row, in blocks of so many words, each with rows of its own."""
    return vocab // block_words * row_cells(block_words) + row_cells(vocab % block_words)


# Words of exponentials are cut and padded so that blocks of the product, of 192 or 256 words, stay
# whole and rows start at multiples of 512 bytes, whatever the vocabulary: a library's need 16.
GRANULE = 768


def padded(words: int) -> int:
    return -(-words // GRANULE) * GRANULE


def exponential_words(vocab: int) -> int:
    """Of one block of exponentials: near 32,768, all blocks of one width.

    In the backward d hidden is read and written once a block, 733/32768 of a product. In one
    block d weight would have no place among them.
    """
    most = 32_768 // GRANULE * GRANULE
    return padded(-(-vocab // -(-vocab // most)))


def frozen_rows(tokens: int, vocab: int, itemsize: int, device: torch.device) -> int:
    """Tokens whose exponentials over the whole vocabulary exist at once, for a frozen head.

    256 MiB, or a 64th of a GPU's memory; in blocks alike, of whole blocks of the product.
    """
    most = max(256 * 2**20, memory_of(device) // 64) // (padded(vocab) * itemsize)
    count = max(-(-tokens // max(most // 128 * 128, 128)), 1)
    return max(-(-tokens // (count * 128)), 1) * 128


def recomputed_words(tokens: int, block_words: int) -> int:
    """Width of a tile of exponentials of all tokens that were not kept: 2**27 cells."""
    return min(max(2**27 // max(tokens, 1) // GRANULE * GRANULE, GRANULE), block_words)


def make_plan(
    tokens: int,
    vocab: int,
    hidden: int,
    *,
    compute_dtype: torch.dtype,
    device: torch.device,
    hidden_grad: bool,
    head_grad: bool,
    budget: int | None,
    dweight_bytes: int = 0,  # of a d weight that may lie where probabilities were kept
    anchored: bool = False,  # the forward is the one of walks/anchored.py
) -> Plan:
    tiles = tile_shape(tokens, vocab, device.type)
    block_words = exponential_words(vocab) if anchored else tiles.vocab
    blocks = -(-vocab // block_words)
    row_words = blocks * block_words if anchored else kept_cells(vocab, block_words)
    row_bytes = row_words * compute_dtype.itemsize
    budget = default_budget(row_words, hidden, device) if budget is None else budget
    allowed = budget // max(row_bytes, 1)  # of a head in shards a process may have no word
    kept = (tokens if tokens <= allowed else allowed) if head_grad else 0
    kept_bytes = kept * row_bytes
    # What is larger than d weight stays with it until the next step, what is smaller has its memory
    # taken early: not more than a quarter, not less than half.
    shares = dweight_bytes <= 2 * kept_bytes and 4 * kept_bytes <= 5 * dweight_bytes
    shared = min(kept_bytes, dweight_bytes) if shares else 0
    if anchored:
        shared -= -(-shared // blocks)  # d weight stays one block behind what is read
    mode: Mode
    if head_grad:
        mode = "keep" if kept == tokens else "lean"
        products = 2.0 + hidden_grad + (tokens - kept) / max(tokens, 1)
    else:
        mode, products = ("frozen", 2.0) if hidden_grad else ("score", 1.0)
    sizes = (tokens, vocab, hidden)
    space = _workspace(tiles, hidden, compute_dtype, device.type, mode)
    if anchored:
        space = _anchored_workspace(sizes, compute_dtype, device, mode, tokens - kept)
    return Plan(
        *(mode, *sizes, tiles, kept, block_words, row_words, kept_bytes, shared, space, products),
        few_words=gathered_words(vocab, device.type),
    )


def _anchored_workspace(
    sizes: tuple[int, int, int], dtype: torch.dtype, device: torch.device, mode: Mode, again: int
) -> int:
    """Bytes alive beside inputs, outputs, gradients and what is kept; `again`: tokens not kept."""
    tokens, vocab, hidden = sizes
    sums = 4 * min(tokens, 8192) * (-(-vocab // 192))  # of the narrowest blocks
    if mode == "frozen":
        rows = min(frozen_rows(tokens, vocab, dtype.itemsize, device), tokens)
        return sums + rows * (padded(vocab) * dtype.itemsize + 4 * hidden)
    if mode == "score":
        return sums
    tile = again * recomputed_words(again, exponential_words(vocab)) * dtype.itemsize
    return max(sums, tile + tokens * hidden * (4 + dtype.itemsize))


def _workspace(
    tiles: Tiles, hidden: int, compute_dtype: torch.dtype, device_type: str, mode: Mode
) -> int:
    """Bytes alive beside inputs, outputs, gradients and what is kept."""
    gemm = gemm_dtype(compute_dtype, device_type)
    cells = tiles.cells
    total = 4 * cells
    if gemm != compute_dtype:
        total += gemm.itemsize * (tiles.vocab + tiles.tokens) * hidden  # converted copies
    if mode in ("keep", "lean"):
        total += gemm.itemsize * cells
    elif mode == "frozen":
        total += 4 * tiles.tokens * hidden + (0 if gemm == torch.float32 else gemm.itemsize * cells)
    return total


def pair_workspace(
    tokens: int, vocab: int, widths: tuple[int, int], compute_dtype: torch.dtype, device_type: str
) -> int:
    """Bytes alive in the backward of `linear_divergence` for a student that is trained, beside
    inputs, outputs, gradients and what is kept. widths: hidden sizes of student and teacher."""
    tiles, gemm = tile_shape(tokens, vocab, device_type), gemm_dtype(compute_dtype, device_type)
    cells = tiles.cells
    total = 2 * 4 * cells + gemm.itemsize * cells  # products of both, and their derivative
    if gemm != compute_dtype:
        total += gemm.itemsize * (tiles.vocab + tiles.tokens) * sum(widths)  # converted copies
    return total + 4 * (tiles.vocab + tokens) * widths[0]  # sums of d weight and d hidden


def plan(
    tokens: int,
    vocab: int,
    hidden: int,
    *,
    dtype: torch.dtype = torch.bfloat16,
    device: str | torch.device = "cpu",
    train_hidden: bool = True,
    train_head: bool = True,
    budget: int | None = None,
    backend: str | None = None,
) -> Plan:
    """What `linear_logps` would do with `tokens` scored tokens: mode, tiles, bytes, products.

    budget: bytes that may be kept for the backward; None: `4·vocab·hidden`, or a sixteenth of the
        GPU's memory where that is more.
    backend: "anchored" and "cutlass" cut a bfloat16 head on a GPU in their own way.
    Raises ValueError for a negative size or budget, an unsupported dtype, a device that torch does
    not know and a backend that fastpo does not.
    """
    check_integer("tokens", tokens, "an integer >= 0", lambda x: x >= 0)
    for name, value in {"vocab": vocab, "hidden": hidden}.items():
        check_integer(name, value, "an integer >= 1", lambda x: x >= 1)
    for name, flag in {"train_hidden": train_hidden, "train_head": train_head}.items():
        check_flag(name, flag)
    if dtype not in DTYPES:
        raise ValueError(f"dtype: expected float32, bfloat16 or float16, got {dtype}")
    check_budget(budget)
    check_backend(backend)
    place = _device(device)
    return make_plan(
        tokens,
        vocab,
        hidden,
        compute_dtype=dtype,
        device=place,
        hidden_grad=train_hidden,
        head_grad=train_head,
        budget=budget,
        dweight_bytes=vocab * hidden * dtype.itemsize,
        anchored=backend in ("anchored", "cutlass")
        and (place.type, dtype) == ("cuda", torch.bfloat16),
    )


def _device(device: str | torch.device) -> torch.device:
    try:
        return torch.device(device)
    except (RuntimeError, TypeError):
        raise ValueError(f"device: expected cpu, cuda or a torch.device, got {device!r}") from None
