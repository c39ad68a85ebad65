"""What the product on CUTLASS is asked for; see _cutlass.py."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from _cutlass import stand_in

pytest.importorskip("triton")

from fastpo.kernels.anchored import SUMS, Exponentials

from fastpo import planner
from fastpo.ops.rows import anchored_cutlass as cutlass
from fastpo.ops.walks import anchored as walk

N, V, H = 300, 2000, 64
SCHEDULES = {
    "ping-pong": cutlass.Schedule(pingpong=True, swizzle=8, words_first=False),
    "cooperative": cutlass.Schedule(pingpong=False, swizzle=1, words_first=True),
}


@pytest.fixture
def launched(monkeypatch) -> list[SimpleNamespace]:
    return stand_in(monkeypatch, torch.bfloat16)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("stats", [0, 15])
@pytest.mark.parametrize("biased", [False, True])
def test_sums_are_of_the_same_words_whether_e_is_stored_or_not(
    launched, monkeypatch, schedule, stats, biased
):
    monkeypatch.setattr(cutlass, "schedule", lambda: SCHEDULES[schedule])
    g = torch.Generator().manual_seed(0)
    x = torch.randn(N, H, generator=g).bfloat16()
    words = (torch.randn(V, H, generator=g) / 8).bfloat16()
    labels = torch.randint(0, V, (N,), generator=g)
    bias = torch.randn(V, generator=g) if biased else None
    rows = walk.Operands(x, words, labels, bias, 1.25)
    z = x.float() @ words.float().t() + (0 if bias is None else bias)
    labels[:50] = z[:50].argmax(1)
    labels[3], labels[4] = -100, V - 1
    origin = z.gather(1, labels.clamp_min(0).unsqueeze(1)).squeeze(1)
    head = SimpleNamespace(device=torch.device("cpu"), spec=SimpleNamespace(backend="cutlass"))
    width, stored = planner.GRANULE, 257  # of a block of E, and its rows among 400
    cells = torch.full((-(-V // width) * 400 * width,), 9, dtype=torch.bfloat16)
    e = Exponentials(cells, 400, width, 32, stored)
    base = origin * (1.25 * walk.LOG2_E)
    alone = walk.product(head, rows, base, None, stats)
    beside = walk.product(head, rows, base, e, stats)
    assert torch.equal(alone, beside)  # cuts, hence bits
    assert len(alone) == (SUMS.value if stats else 1)
    expected = ((z - origin.unsqueeze(1)).double() * 1.25).exp()
    expected = expected.masked_fill(torch.arange(V) == labels.unsqueeze(1), 0)
    torch.testing.assert_close(alone[0].sum(0).double(), expected.sum(1), rtol=1e-5, atol=0)
    parts = cells.view(-1, 400, width)
    found = torch.cat(list(parts), 1)
    assert (found[:32] == 9).all() and (found[32 + stored :] == 9).all()
    close = {"rtol": 2**-8, "atol": 0.0}
    torch.testing.assert_close(found[32 : 32 + stored, :V].double(), expected[:stored], **close)
    if stats:
        assert torch.equal(alone[4].amax(0) > 0, (expected > 1).any(1))
    assert {work.pingpong for work in launched} == {schedule == "ping-pong"}


def test_a_granule_is_of_whole_blocks():
    assert all(planner.GRANULE % cutlass.block_words(pingpong) == 0 for pingpong in (False, True))


@pytest.mark.parametrize(
    ("n", "v", "swizzle"),
    [
        (8192, 151_936, 8),  # 64 x 792 blocks
        (8192, 128_256, 4),  # 64 x 668
        (4096, 128_256, 4),
        (896, 151_936, 4),  # 7 rows of blocks are 8, of which eight pairs would be 16
        (1, 151_936, 1),
        (300, 50_257, 2),
    ],
)
def test_blocks_side_by_side_add_few_beyond_the_end(n, v, swizzle):
    assert cutlass.swizzled(n, v, 192, 8) == swizzle
    assert cutlass.swizzled(n, v, 192, 1) == 1


@pytest.mark.parametrize("swizzle", [1, 2, 4, 8])
def test_all_blocks_are_there(swizzle):
    rows, columns = cutlass.padded_blocks(N, V, 192, swizzle)
    assert rows >= -(-N // 128) and rows % (2 * swizzle) == 0
    assert columns >= -(-V // 192) and columns % swizzle == 0
