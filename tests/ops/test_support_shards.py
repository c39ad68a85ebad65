"""Supports over a head whose words lie in two processes, judged as one that lies in one."""

from __future__ import annotations

import _processes
import pytest
import torch
import torch.distributed as dist

import fastpo
from fastpo import planner, reference
from fastpo.ops.walks.checks import OUTPUTS
from fastpo.testing import HeadInputs, assert_as_good_as_eager, make_head

TOKENS, VOCAB, CUT = 40, 203, 90
LIMITS = {"few": VOCAB, "both": 8, "many": 0}
OPTIONS = {"plain": {}, "all": {"softcap": 6.0, "logit_scale": -0.8, "temperature": 0.7}}
CASES = [(limit, options) for limit in LIMITS for options in OPTIONS]


def problem(dtype: torch.dtype) -> HeadInputs:
    inputs = make_head(TOKENS, VOCAB, 16, bias=True, ignored=0.2)
    inputs.labels[:3] = torch.tensor([CUT - 1, CUT, VOCAB - 1])
    return inputs.like(dtype)


def support() -> torch.Tensor:
    """Some with words of one process only, one with none, one with all of one's."""
    g = torch.Generator().manual_seed(1)
    ids = torch.randint(-1, VOCAB, (TOKENS, CUT), generator=g)
    ids[:, 12:] = torch.where(torch.arange(TOKENS).unsqueeze(1) % 3 > 0, -1, ids[:, 12:])
    ids[4:8, :12] = ids[4:8, :12].clamp_max(CUT - 1)
    ids[6] = torch.arange(CUT)
    ids[:, 0] = problem(torch.float32).labels.clamp_min(0)
    ids[3] = -1
    return ids


def grads_of(stats: fastpo.TokenStats, leaves: list[torch.Tensor]) -> tuple[torch.Tensor, ...]:
    factors = torch.linspace(-1, 2, TOKENS, dtype=stats.logps.dtype)
    loss = stats.logps * factors + stats.entropy * factors.flip(0) + stats.lse * 0.3
    return torch.autograd.grad(loss.sum(), leaves)


def all_cases(rank: int, folder) -> None:
    dist.init_process_group("gloo")
    found = {}
    for limit, options in CASES:
        planner.gathered_words = lambda vocab, device, n=LIMITS[limit]: n
        x = problem(torch.float32)
        words = slice(CUT) if rank == 0 else slice(CUT, None)
        weight, bias = (part.detach()[words].requires_grad_() for part in (x.weight, x.bias))
        stats = fastpo.vocab_parallel_logps(
            x.hidden,
            weight,
            x.labels,
            first=(0, CUT)[rank],
            vocab=VOCAB,
            bias=bias,
            outputs=OUTPUTS,
            support=support(),
            **OPTIONS[options],
        )
        grads = grads_of(stats, [x.hidden, weight, bias])
        found[limit, options] = [x.detach() for x in stats], grads
    torch.save(found, folder / f"{rank}.pt")


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    folder = tmp_path_factory.mktemp("supports")
    _processes.run(all_cases, folder)
    return _processes.loaded(folder)


@pytest.mark.parametrize("case", CASES, ids="-".join)
def test_as_a_head_in_one_process(case, found):
    (values, grads), (others, other_grads) = (each[case] for each in found)

    def own_way(dtype):
        x = problem(dtype)
        stats = reference.linear_logps(
            x.hidden, x.weight, x.labels, bias=x.bias, support=support(), **OPTIONS[case[1]]
        )
        return [x.detach() for x in stats], grads_of(stats, [x.hidden, x.weight, x.bias])

    (eager, eager_grads), (truth, truth_grads) = own_way(torch.float32), own_way(torch.float64)
    for i, name in enumerate(OUTPUTS):
        assert torch.equal(values[i], others[i]), f"{name}: expected the same bits"
        if name == "is_top1":
            assert torch.equal(values[i], truth[i])
        else:
            assert_as_good_as_eager(name, values[i], eager[i], truth[i])
    assert torch.equal(grads[0], other_grads[0])
    whole = grads[0], *(torch.cat(pair) for pair in zip(grads[1:], other_grads[1:], strict=True))
    for name, *results in zip(("h", "w", "b"), whole, eager_grads, truth_grads, strict=True):
        assert_as_good_as_eager(f"d{name}", *results)


def alone(rank: int) -> None:
    dist.init_process_group("gloo")
    x = make_head(3, 10, 4)
    part = {"first": 5 * rank, "vocab": 10}
    operands = x.hidden, x.weight[5 * rank : 5 * rank + 5], x.labels
    for options, got in (
        ({"support": fastpo.Support.rule(top_k=3)}, "got Rule"),
        ({"support": x.labels.unsqueeze(1), "own_tokens": True}, "got own_tokens=True"),
    ):
        with pytest.raises(ValueError, match=f"support: expected word ids of tokens .*, {got}"):
            fastpo.vocab_parallel_logps(*operands, **part, **options)


def test_what_shards_do_not_serve_is_said():
    _processes.run(alone)
