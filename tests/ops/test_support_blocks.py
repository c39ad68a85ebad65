"""Tokens with few words in blocks, those with many in chunks: bits of a token, and memory."""

from __future__ import annotations

from typing import Any

import _processes
import pytest
import torch
import torch.distributed as dist
from _primitives import BACKENDS
from _probes import Widest

import fastpo
from fastpo import planner, reference
from fastpo.ops.rows import registry
from fastpo.ops.support import resolve
from fastpo.ops.walks.checks import OUTPUTS
from fastpo.ops.walks.head import Head
from fastpo.testing import HeadInputs, assert_as_good_as_eager, make_head

V, H = 5000, 24
# Few words are up to 156 here: at the edges of blocks and within them; one has no restriction, and
# two have many.
COUNTS = (1, 2, 6, 15, 16, 17, 31, 32, 33, 60, 64, 65, 128, 129, 140, 156, 0, 157, 700)
OWN = [b for b in BACKENDS if b in ("cpu", "torch")]
OPTIONS = {"plain": {}, "all": {"softcap": 6.0, "logit_scale": -0.8, "temperature": 0.7}}
RULES = ({"top_k": 50}, {"top_p": 0.8}, {"top_k": 300, "top_p": 0.6, "min_p": 0.001})


@pytest.fixture(params=[1, 2])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


def ragged(counts: tuple[int, ...], seed: int = 0) -> tuple[HeadInputs, list[list[int]]]:
    """A head, and words of each token, its label among them."""
    g = torch.Generator().manual_seed(seed)
    inputs = make_head(len(counts), V, H, bias=True, seed=seed)
    lists = [torch.randperm(V, generator=g)[:count].tolist() for count in counts]
    for own, label in zip(lists, inputs.labels.tolist(), strict=True):
        own[:1] = [label][: len(own)]
    return inputs, lists


def assert_same_bits(x: HeadInputs, support_of: Any, **options: Any) -> None:
    """All statistics of tokens alone, in twos and in sevens as in the whole batch."""

    def scores(tokens: list[int]) -> torch.Tensor:
        operands = x.hidden[tokens], x.weight, x.labels[tokens]
        own = {"bias": x.bias, "support": support_of(tokens), "outside": "raw", "outputs": OUTPUTS}
        stats = fastpo.linear_logps(*operands, **own, **options)
        return torch.stack([each.float() for each in stats], -1)

    every = list(range(len(x.labels)))
    whole = scores(every)
    for size in (1, 2, 7):
        parts = [scores(every[a : a + size]) for a in range(0, len(every), size)]
        assert torch.equal(torch.cat(parts), whole), size


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("backend", OWN)
def test_a_tokens_bits_do_not_depend_on_the_lists_of_others(backend, options, threads):
    for seed in range(3):
        x, lists = ragged(COUNTS * 2, seed)

        def some(tokens, lists=lists):
            return fastpo.Support.of([lists[i] for i in tokens])

        assert_same_bits(x, some, backend=backend, **OPTIONS[options])


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("backend", OWN)
def test_a_tokens_bits_do_not_depend_on_those_of_others_under_a_rule(backend, rule):
    x, _ = ragged((0,) * 75, seed=4)
    best = (x.hidden @ x.weight.t() + x.bias).argmax(1)
    x = HeadInputs(x.hidden, x.weight, best, x.bias)
    assert_same_bits(x, lambda tokens: fastpo.Support.rule(**rule), backend=backend)


@pytest.mark.parametrize("backend", OWN)
@pytest.mark.parametrize("options", OPTIONS)
def test_many_widths_match_the_twin(backend, options):
    """Blocks stand by width, not in the tokens' order; one token of each is ignored."""
    inputs, lists = ragged((*COUNTS, *reversed(COUNTS)))
    inputs.labels[len(COUNTS) :: 3] = -100
    own = {"support": fastpo.Support.of(lists), **OPTIONS[options]}
    temperature = torch.linspace(0.5, 2, len(lists))
    found = []
    for score, dtype in (
        (fastpo.linear_logps, torch.float32),
        (reference.linear_logps, torch.float32),
        (reference.linear_logps, torch.float64),
    ):
        x = inputs.like(dtype)
        fused = score is fastpo.linear_logps
        more = {"backend": backend, "outputs": OUTPUTS} if fused else {}
        each = own | {"temperature": temperature.to(dtype)}
        stats = score(x.hidden, x.weight, x.labels, bias=x.bias, **each, **more)
        factors = torch.linspace(-1, 2, len(lists), dtype=dtype)
        loss = stats.logps * factors + stats.entropy * factors.flip(0) + stats.lse * 0.3
        grads = torch.autograd.grad(loss.sum(), (x.hidden, x.weight, x.bias))
        found.append([getattr(stats, name).detach() for name in OUTPUTS] + list(grads))
    for name, ours, eager, truth in zip((*OUTPUTS, "dh", "dw", "db"), *found, strict=True):
        if name == "is_top1":
            assert torch.equal(ours, truth)
        else:
            # Summed word by word; the chains of a library's product are shorter.
            factor = 3.0 if name == "dh" else 2.0
            assert_as_good_as_eager(name, ours, eager, truth, factor=factor)


def test_one_long_list_makes_no_others_long():
    """Tokens that had 4 words took memory of 156, and of the time."""
    tokens, long = 1000, 156
    x, lists = ragged((long, *(4,) * (tokens - 1)))
    weight = x.weight[:, :4].contiguous().requires_grad_()
    hidden = x.hidden[:, :4].contiguous().requires_grad_()
    with Widest() as made:
        stats = fastpo.linear_logps(hidden, weight, x.labels, support=fastpo.Support.of(lists))
        stats.logps.sum().backward()
    assert made.elements < tokens * long // 4


def test_words_of_a_rule_are_as_wide_as_their_own_block():
    """The same of a rule, of which one token keeps 150 words and the others a few."""
    z = torch.randn(V, generator=torch.Generator().manual_seed(0)).sort(descending=True).values
    hidden = torch.full((400, 1), 20.0)
    hidden[7] = 1.0
    least = (z[0] - z[149]).neg().exp().item() * 0.999
    labels = torch.zeros(400, dtype=torch.int64)
    rule = fastpo.Support.rule(min_p=least)
    found = fastpo.ops.support.rule.resolve_rule
    seen = []

    def watched(*operands):
        seen.append(found(*operands))
        return seen[0]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fastpo.ops.support.score, "resolve_rule", watched)
        fastpo.linear_logps(hidden, z.unsqueeze(1), labels, support=rule)
    assert [ids.shape for _, ids in seen[0].few] == [(399, 16), (1, 256)]
    assert seen[0].counts[7] == 150


def test_many_words_are_counted_by_chunks(monkeypatch):
    """A sum of the booleans of all tokens was the [N, V] int64 that nothing here shall be."""
    tokens, chunk = 40, 4
    monkeypatch.setattr(resolve, "_CELLS", chunk * V)
    _, lists = ragged((300,) * tokens)
    lists[3] += lists[3]
    with Widest() as made:
        found = resolve.resolve(fastpo.Support.of(lists), V, torch.arange(tokens), 156)
    assert found.many[2].tolist() == [len({*own}) for own in lists]
    assert made.elements <= 2 * chunk * V


@pytest.mark.parametrize(("vocab", "rows"), [(40_000, 52), (100_000, 32)])
@pytest.mark.parametrize("tokens", [1, 20, 100])
def test_a_rule_walks_over_the_head_once_for_many_tokens(tokens, vocab, rows, monkeypatch):
    """Not for each of a few; what exists at once is of so many rows."""
    read, words = [], Head.words

    def counted(self, v0, v1):
        read.append(v1 - v0)
        return words(self, v0, v1)

    monkeypatch.setattr(Head, "words", counted)
    x = make_head(tokens, vocab, 2)
    rule = fastpo.Support.rule(top_k=20)
    with Widest() as made:
        fastpo.linear_logps(x.hidden, x.weight, x.labels, support=rule, outside="drop")
    assert sum(read) == -(-tokens // rows) * vocab
    assert made.elements <= max(2, min(tokens, rows)) * vocab  # 2: the weight


@pytest.mark.parametrize("outside", ["error", "raw", "drop"])
def test_a_word_of_minus_one_is_none_in_every_form(outside):
    x = make_head(5, 300, 4)
    label = x.labels.tolist()
    lists = [[-1, -1], [label[1], -1, 7], [], [-1, label[3], label[3], -1], [-1, *range(300)]]
    ids = torch.full((5, 301), -1)
    for row, own in zip(ids, lists, strict=True):
        row[: len(own)] = torch.tensor(own, dtype=torch.int64)
    plain = [[word for word in own if word >= 0] for own in lists]
    # Of the first token everything may be -1, of all tokens, and nothing.
    for rows in (slice(None), slice(1), slice(2, 3)):
        supports = fastpo.Support.of(lists)[rows], ids[rows], fastpo.Support.of(plain)[rows]
        operands = x.hidden[rows], x.weight, x.labels[rows]
        found = [
            fastpo.linear_logps(*operands, support=each, outside=outside).logps for each in supports
        ]
        assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


def test_ignored_tokens_words_are_not_looked_at():
    x = make_head(3, 300, 4)
    x.labels[1] = -100
    support = fastpo.Support.of([[int(x.labels[0])], [-5, 900, -1], [int(x.labels[2]), 3]])
    found = fastpo.linear_logps(x.hidden, x.weight, x.labels, support=support).logps
    assert found[0] == 0 and found[1] == 0 and found[2] < 0
    x.labels[1] = 7
    with pytest.raises(ValueError, match=r"support: expected word ids .*, got -5 at token 1"):
        fastpo.linear_logps(x.hidden, x.weight, x.labels, support=support)


@pytest.mark.parametrize("backend", OWN)
def test_products_and_sums_of_a_process_without_words(backend):
    kernels, none = registry.word_kernels(backend), torch.full((3, 2), -1)
    products, sums = torch.full((3, 2), 7.0), torch.full((3, 4), 7.0)
    nothing = torch.empty(0, 4)
    kernels.products(torch.ones(3, 4), nothing, none, products)
    offsets = torch.arange(4) * 2
    kernels.sums(torch.ones(6), none.flatten(), offsets, nothing, sums)
    assert (products == 0).all() and (sums == 0).all()


EMPTY = [(backend, bias) for backend in OWN for bias in (False, True)]


def _with_nobody(rank: int, folder) -> None:
    dist.init_process_group("gloo")
    found = {}
    for backend, biased in EMPTY:
        inputs, lists = ragged((4, 1, 40, 9))
        own = slice(None) if rank == 0 else slice(0)
        x = inputs.like(torch.float32)
        leaves = [part.detach()[own].requires_grad_() for part in (x.weight, x.bias)]
        stats = fastpo.vocab_parallel_logps(
            x.hidden,
            leaves[0],
            x.labels,
            first=0 if rank == 0 else V,
            vocab=V,
            bias=leaves[1] if biased else None,
            outputs=OUTPUTS,
            support=fastpo.Support.of(lists),
            backend=backend,
        )
        loss = (stats.logps * torch.arange(1.0, 5.0) + stats.entropy).sum()
        grads = torch.autograd.grad(loss, [x.hidden, *leaves[: 1 + biased]])
        found[backend, biased] = [each.detach() for each in stats], grads
    torch.save(found, folder / f"{rank}.pt")


def test_a_process_without_words(tmp_path):
    """With few words each; where V is small, no more than one is few."""
    assert planner.gathered_words(V, "cpu") >= 40
    _processes.run(_with_nobody, tmp_path)
    whole, nothing = _processes.loaded(tmp_path)
    for backend, biased in EMPTY:
        inputs, lists = ragged((4, 1, 40, 9))
        x = inputs.like(torch.float32)
        stats = fastpo.linear_logps(
            x.hidden,
            x.weight,
            x.labels,
            bias=x.bias if biased else None,
            outputs=OUTPUTS,
            support=fastpo.Support.of(lists),
            backend=backend,
        )
        loss = (stats.logps * torch.arange(1.0, 5.0) + stats.entropy).sum()
        leaves = [x.hidden, x.weight, x.bias]
        expected = torch.autograd.grad(loss, leaves[: 2 + biased])
        (values, grads), (others, other_grads) = whole[backend, biased], nothing[backend, biased]
        for found, other, wanted in zip(values, others, stats, strict=True):
            assert torch.equal(found, other)
            torch.testing.assert_close(found, wanted.detach(), rtol=1e-6, atol=1e-6)
        for found, wanted in zip(grads, expected, strict=True):
            torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)
        assert torch.equal(other_grads[0], grads[0])
        assert all(len(each) == 0 for each in other_grads[1:])
