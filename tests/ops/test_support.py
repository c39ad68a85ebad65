"""Log-probabilities over supports, judged against float64 as full logits that are masked."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from _draws import assert_draws
from _primitives import BACKENDS
from hypothesis import given, settings
from hypothesis import strategies as st

import fastpo
from fastpo import planner, reference
from fastpo.ops.shards.gathered import HeadOptions
from fastpo.ops.support.score import score_over
from fastpo.ops.walks.checks import OUTPUTS
from fastpo.testing import HeadInputs, assert_as_good_as_eager, make_head

N, V, H = 40, 131, 16
DIFFERENTIABLE = ("logps", "entropy", "lse")
OPTIONS = {
    "plain": {},
    "all": {"softcap": 6.0, "logit_scale": -0.8, "temperature": 0.7},
}
# How many words are few: every token has few, some have, none has.
LIMITS = {"few": V, "both": 8, "many": 0}
FORMS = ("padded", "ragged", "rule")
SOME = [b for b in BACKENDS if b not in ("anchored", "cutlass")]


@pytest.fixture(params=LIMITS)
def limit(request, monkeypatch):
    monkeypatch.setattr(planner, "gathered_words", lambda vocab, device: LIMITS[request.param])
    return request.param


def lists_of(labels: torch.Tensor, seed: int) -> list[list[int]]:
    """Of 1 to 20 words, the label among them; the first rows are the special cases."""
    g = torch.Generator().manual_seed(seed)
    found = []
    for label in labels.clamp_min(0).tolist():
        size = int(torch.randint(1, 20, (1,), generator=g))
        found.append([label, *torch.randint(0, V, (size,), generator=g).tolist()])
    found[0], found[1], found[2] = [], list(range(V)), [int(labels[2].clamp_min(0))]
    return found


def padded(lists: list[list[int]]) -> torch.Tensor:
    ids = torch.full((len(lists), max(map(len, lists)) + 1), -1)
    for row, own in zip(ids, lists, strict=True):
        row[1 : len(own) + 1] = torch.tensor(own, dtype=torch.int64)
    return ids


def support_of(form: str, labels: torch.Tensor, seed: int) -> Any:
    if form == "rule":
        return fastpo.Support.rule(top_k=60, top_p=0.9, min_p=0.01)
    lists = lists_of(labels, seed)
    return padded(lists) if form == "padded" else fastpo.Support.of(lists)


def run(inputs: HeadInputs, dtype: torch.dtype, fused: bool, **options: Any) -> dict[str, Any]:
    x = inputs.like(dtype)
    if not options.pop("trained", True):
        x.weight.requires_grad_(False), x.bias.requires_grad_(False)
    if not fused:
        options.pop("backend", None)
    score = fastpo.linear_logps if fused else reference.linear_logps
    options |= {"outputs": OUTPUTS} if fused else {}
    stats = score(x.hidden, x.weight, x.labels, bias=x.bias, **options)
    factors = [torch.linspace(-1, 2 + i, N, dtype=dtype) for i in range(3)]
    pairs = zip(DIFFERENTIABLE, factors, strict=True)
    sum((getattr(stats, name) * g).sum() for name, g in pairs).backward()
    found = {name: getattr(stats, name).detach() for name in OUTPUTS}
    return found | {name: leaf.grad for name, leaf in x.leaves().items()}


def draws(seeds: range, form: str, **options: Any):
    for seed in seeds:
        inputs = make_head(N, V, H, bias=True, ignored=0.2, seed=seed)
        own = options | {"support": support_of(form, inputs.labels, seed)}
        kinds = ((torch.float32, True), (torch.float32, False), (torch.float64, False))
        yield tuple(run(inputs, dtype, fused, **own) for dtype, fused in kinds)


@pytest.mark.parametrize("backend", SOME)
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("form", FORMS)
def test_values_and_gradients_match_the_twin(form, options, backend, limit):
    outside = "raw" if form == "rule" else "error"
    seeds = range(1 if backend == "triton" else 6)
    assert_draws(draws(seeds, form, backend=backend, outside=outside, **OPTIONS[options]))


@pytest.mark.parametrize("options", OPTIONS)
def test_a_frozen_head_has_the_gradient_of_its_hidden_states(options, limit):
    found = draws(range(3), "ragged", trained=False, backend="cpu", **OPTIONS[options])
    assert_draws(found)


@pytest.mark.parametrize("outside", ["raw", "drop"])
def test_a_label_outside_is_raw_or_dropped(outside, limit):
    def draw(seed):
        inputs = make_head(N, V, H, bias=True, ignored=0.2, seed=seed)
        ids = torch.randint(0, V, (N, 6), generator=torch.Generator().manual_seed(seed))
        ids[::2, 0] = inputs.labels.clamp_min(0)[::2]
        own = {"support": ids, "outside": outside, "backend": "cpu"}
        kinds = ((torch.float32, True), (torch.float32, False), (torch.float64, False))
        return tuple(run(inputs, dtype, fused, **own) for dtype, fused in kinds)

    assert_draws(draw(seed) for seed in range(3))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bits(dtype, limit):
    inputs = make_head(N, V, H, dtype=dtype, bias=True, ignored=0.2)
    own = {"support": support_of("ragged", inputs.labels, 0)}
    ours, eager = (run(inputs, dtype, fused, **own) for fused in (True, False))
    truth = run(inputs, torch.float64, False, **own)
    for name in ("logps", "dhidden", "dweight", "dbias"):
        assert_as_good_as_eager(name, ours[name], eager[name], truth[name])


def test_special_supports(limit):
    """None: no restriction.  The label alone: 0, no gradient.  All words: the plain call."""
    x = make_head(3, V, H, seed=1).like(torch.float32)
    plain = fastpo.linear_logps(x.hidden, x.weight, x.labels)
    lists = [[], [int(x.labels[1])], list(range(V))]
    stats = fastpo.linear_logps(
        x.hidden,
        x.weight,
        x.labels,
        support=fastpo.Support.of(lists),
        outputs=("logps", "entropy"),
    )
    assert stats.logps[0] == plain.logps[0]
    assert stats.logps[1] == 0 and stats.entropy[1] == 0
    torch.testing.assert_close(stats.logps[2], plain.logps[2], atol=2e-6, rtol=0)
    (dhidden,) = torch.autograd.grad(stats.logps[1] + stats.entropy[1], x.hidden)
    assert (dhidden == 0).all()


def test_what_is_named_twice_counts_once(limit):
    x = make_head(5, V, H, seed=2)
    once = torch.cat((x.labels.unsqueeze(1), torch.full((5, 3), -1)), 1)
    once[:, 1] = (x.labels + 7) % V
    twice = torch.cat((once, once.flip(1)), 1)
    scores = [fastpo.linear_logps(x.hidden, x.weight, x.labels, support=s) for s in (once, twice)]
    assert torch.equal(scores[0].logps, scores[1].logps)


@settings(deadline=None, max_examples=25)
@given(data=st.data(), vocab=st.integers(1, 40), tokens=st.integers(0, 6))
def test_ragged_supports(data, vocab, tokens):
    words = st.integers(0, vocab - 1)
    lists = data.draw(st.lists(st.lists(words, max_size=12), min_size=tokens, max_size=tokens))
    labels = torch.tensor([data.draw(words) for _ in range(tokens)], dtype=torch.int64)
    outside = data.draw(st.sampled_from(("raw", "drop")))
    inputs = make_head(tokens, vocab, 5, seed=data.draw(st.integers(0, 5)))
    inputs = HeadInputs(inputs.hidden, inputs.weight, labels)
    options = {"support": fastpo.Support.of(lists), "outside": outside}
    ours = fastpo.linear_logps(inputs.hidden, inputs.weight, labels, **options).logps
    eager, truth = (
        reference.linear_logps(x.hidden, x.weight, labels, **options).logps
        for x in (inputs, inputs.like(torch.float64))
    )
    slack = 2e-6 * max(1.0, truth.abs().max().item() if tokens else 0.0)
    assert_as_good_as_eager("logps", ours, eager, truth, slack=slack)


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        ({"top_k": 2}, [True, True, True, False, False]),  # the second and the third tie
        ({"top_k": 1}, [True, False, False, False, False]),
        ({"top_p": 0.3}, [True, False, False, False, False]),
        ({"top_p": 0.55}, [True, True, True, False, False]),
        ({"min_p": 0.45}, [True, True, True, False, False]),
        ({"top_k": 4, "top_p": 0.999}, [True, True, True, True, False]),
        ({"top_k": 9, "top_p": 0.99}, [True] * 5),
        ({"top_k": -1, "top_p": 1.0, "min_p": 0.0}, [True] * 5),
    ],
)
def test_rules_keep_what_samplers_keep(rule, expected):
    p = torch.tensor([0.4, 0.2, 0.2, 0.15, 0.05])
    hidden, weight = torch.ones(1, 1), p.log().unsqueeze(1)
    labels = torch.zeros(1, dtype=torch.int64)
    stats = fastpo.linear_logps(hidden, weight, labels, support=fastpo.Support.rule(**rule))
    kept = p[torch.tensor(expected)]
    torch.testing.assert_close(stats.logps, (kept[:1] / kept.sum()).log())


def test_a_rule_sees_the_temperature_of_each_token(monkeypatch):
    monkeypatch.setattr(planner, "tile_shape", lambda *_: planner.Tiles(4, 64))
    x = make_head(6, V, H, seed=3)
    own = torch.tensor([0.3, 1.0, 2.0, 0.5, 1.5, 0.7])
    rule = fastpo.Support.rule(top_p=0.7)
    options = {"temperature": own, "support": rule, "outside": "raw"}
    together = fastpo.linear_logps(x.hidden, x.weight, x.labels, **options).logps
    for i in range(6):
        row = slice(i, i + 1)
        options["temperature"] = own[row]
        alone = fastpo.linear_logps(x.hidden[row], x.weight, x.labels[row], **options).logps
        torch.testing.assert_close(together[row], alone, atol=2e-6, rtol=0)


def test_a_tokens_bits_do_not_depend_on_the_others(limit):
    x = make_head(1, V, H, seed=4)
    ids = torch.cat((x.labels.unsqueeze(1), torch.arange(12).unsqueeze(0)), 1)
    values = set()
    for n in (1, 2, 7, 33):
        rows = x.hidden.expand(n, H).contiguous(), x.weight, x.labels.expand(n)
        values |= set(fastpo.linear_logps(*rows, support=ids.expand(n, -1)).logps.tolist())
    assert len(values) == 1


@pytest.mark.parametrize("biased", [True, False])
def test_an_adapted_head(biased, limit):
    """LoRA's columns beside a frozen head, their gradient over the words alone."""
    inputs = make_head(N, V, H, bias=biased, ignored=0.2, seed=5)
    lora = make_head(N, V, 3, seed=6)
    ids = padded(lists_of(inputs.labels, 5))

    def scored(dtype, fused):
        x, low = inputs.like(dtype), lora.like(dtype)
        x.weight.requires_grad_(False)
        if fused:
            own = x.hidden, x.weight, x.bias, x.labels, HeadOptions(ignore_index=-100)
            logps = score_over(ids, "error", *own, adapter=(low.hidden, low.weight)).logps
        else:
            both = torch.cat((x.hidden, low.hidden), 1), torch.cat((x.weight, low.weight), 1)
            logps = reference.linear_logps(*both, x.labels, bias=x.bias, support=ids).logps
        (logps * torch.linspace(-1, 2, N, dtype=dtype)).sum().backward()
        leaves = {"dhidden": x.hidden, "dbias": x.bias, "ddown": low.hidden, "dup": low.weight}
        grads = {name: leaf.grad for name, leaf in leaves.items() if leaf is not None}
        return {"logps": logps.detach(), **grads}

    kinds = ((torch.float32, True), (torch.float32, False), (torch.float64, False))
    assert_draws([tuple(scored(*kind) for kind in kinds)])


class Halves:
    """Words of 16 bits, made a tile at a time."""

    def __init__(self, weight):
        self.stored, self.shape = weight.bfloat16(), tuple(weight.shape)
        self.dtype, self.device = torch.float32, weight.device

    def tile(self, first, end):
        return self.stored[first:end].float()


def test_a_head_that_is_made_by_tiles(limit):
    x = make_head(N, V, H, ignored=0.2, seed=9).like(torch.float32)
    source, ids = Halves(x.weight.detach()), padded(lists_of(x.labels, 9))
    found = []
    for weight in (source, source.stored.float()):
        logps = fastpo.linear_logps(x.hidden, weight, x.labels, support=ids).logps
        found.append((logps.detach(), *torch.autograd.grad(logps.sum(), x.hidden)))
    torch.testing.assert_close(*found, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "arranged", [lambda x: x.t().contiguous().t(), lambda x: torch._neg_view(-x)]
)
def test_words_one_by_one_in_any_layout(arranged, backend, monkeypatch):
    """Kernels know no stride of columns, and memory of a negated view holds the other sign."""
    monkeypatch.setattr(planner, "gathered_words", lambda vocab, device: vocab)
    x = make_head(7, 50, 8)
    ids = torch.stack((x.labels, (x.labels + 7) % 50, torch.full((7,), 3)), 1)

    def gradients(*leaves: torch.Tensor) -> tuple[torch.Tensor, ...]:
        leaves = [leaf.detach().requires_grad_() for leaf in leaves]
        logps = fastpo.linear_logps(*leaves, x.labels, support=ids, backend=backend).logps
        return logps.detach(), *torch.autograd.grad(logps.sum(), leaves)

    expected = gradients(x.hidden, x.weight)
    for leaves in ((arranged(x.hidden), x.weight), (x.hidden, arranged(x.weight))):
        for found, wanted in zip(gradients(*leaves), expected, strict=True):
            assert torch.equal(found, wanted)


@pytest.mark.parametrize("ruled", [False, True])
def test_between_two_compiled_graphs(ruled):
    def loss(hidden, weight, labels, ids):
        words = fastpo.Support.rule(top_k=3) if ruled else ids
        stats = fastpo.linear_logps(hidden * 2, weight, labels, support=words, outside="raw")
        return (stats.logps * 0.5).sum()

    inputs = make_head(16, 300, 8, ignored=0.2)
    ids = torch.arange(16 * 5).view(16, 5)
    results = []
    for function in (loss, torch.compile(loss, backend="aot_eager")):
        x = inputs.like(torch.float32)
        value = function(x.hidden, x.weight, x.labels, ids)
        results.append((value, *torch.autograd.grad(value, (x.hidden, x.weight))))
    for plain, compiled in zip(*results, strict=True):
        torch.testing.assert_close(compiled, plain)
    with pytest.raises(torch._dynamo.exc.Unsupported, match="score_over"):
        torch.compile(loss, fullgraph=True, backend="eager")(x.hidden, x.weight, x.labels, ids)


def test_nobody_is_scored():
    x = make_head(4, V, H, seed=7).like(torch.float32)
    nobody = torch.full_like(x.labels, -100)
    stats = fastpo.linear_logps(x.hidden, x.weight, nobody, support=torch.zeros(4, 2).long())
    assert (stats.logps == 0).all()
    stats.logps.sum().backward()
    assert (x.hidden.grad == 0).all() and (x.weight.grad == 0).all()


def test_bad_hidden_states_are_nan_in_their_rows(limit):
    x = make_head(5, V, H, seed=8)
    x.hidden[1], x.hidden[3] = float("nan"), float("inf")
    ids = torch.stack((x.labels, (x.labels + 1) % V, torch.full_like(x.labels, -1)), 1)
    logps = fastpo.linear_logps(x.hidden, x.weight, x.labels, support=ids).logps
    assert logps.isnan().tolist() == [False, True, False, True, False]


ONES = torch.ones(3, 2, dtype=torch.int64)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"support": [[1]]}, r"support: expected .*, its rule or None, got lists; .*Support.of"),
        ({"support": 1.5}, r"support: expected a tensor of word ids, .* or None, got 1.5"),
        ({"support": ONES[:2]}, r"support: expected shape \(3, k\), got \(2, 2\)"),
        ({"support": ONES.float()}, "support: expected dtype int32 or int64, got torch.float32"),
        ({"support": ONES.to("meta")}, "support: expected device cpu, got meta"),
        (
            {"support": ONES * 20},
            r"support: expected word ids in \[0, 20\) or -1, got 20 at ",
        ),
        ({"support": ONES - 3}, r"support: expected word ids .*, got -2 at token 0"),
        ({"support": fastpo.Support.of([[1], [2]])}, "support: expected words of 3 tokens, got 2"),
        (
            {"support": ONES * 7},
            r"support: expected each label among its token's words, got label 5 at token 1, which",
        ),
        (
            {"support": ONES, "outside": "keep"},
            "outside: expected one of error, raw, drop, got 'k",
        ),
        ({"outside": None}, "outside: expected one of error, raw, drop, got None"),
    ],
)
def test_bad_supports_are_refused_by_name(options, message):
    hidden, weight = torch.ones(3, 4), torch.ones(20, 4)
    labels = torch.tensor([7, 5, 7])
    with pytest.raises(ValueError, match=message):
        fastpo.linear_logps(hidden, weight, labels, **options)


TWO = ONES[0]


@pytest.mark.parametrize(
    ("ids", "offsets", "message"),
    [
        (TWO.float(), [0, 2], "ids: expected one dimension of int32 or int64, got torch.float32"),
        (ONES, [0, 2], r"ids: expected one dimension .*, got torch.int64 of \(3, 2\)"),
        (TWO, [0, 3], r"offsets: expected numbers that rise from 0 to 2, .*, got \[0, 3\]"),
        (TWO, [1, 2], r"offsets: expected numbers that rise from 0 to 2, .*, got \[1, 2\]"),
        (TWO, [0, 2, 1, 2], "offsets: expected numbers that rise from 0 to 2"),
        (TWO, [], "offsets: expected one dimension of int32 or int64, got torch.float32"),
    ],
)
def test_what_is_no_ragged_support_is_said(ids, offsets, message):
    with pytest.raises(ValueError, match=message):
        fastpo.Support(ids, torch.tensor(offsets))


@pytest.mark.parametrize("words", [[True, False], torch.tensor([True]), [1, 1.0], ["a"], [None]])
def test_what_is_no_list_of_words_is_said(words):
    """A mask of booleans would be the words 0 and 1."""
    with pytest.raises(ValueError, match="lists: expected word ids, which are integers, got "):
        fastpo.Support.of([[3], words])


def test_lists_of_numbers_of_other_libraries():
    found = fastpo.Support.of([torch.tensor([3, 5]), None, np.array([7]), [np.int64(2)]])
    assert (found.ids.tolist(), found.counts.tolist()) == ([3, 5, 7, 2], [2, 0, 1, 1])


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        ({"top_k": 1.5}, "top_k: expected an integer >= -1 or None, got 1.5"),
        ({"top_p": 0}, r"top_p: expected a number in \(0, 1\] or None, got 0"),
        ({"min_p": 2}, r"min_p: expected a number in \[0, 1\] or None, got 2"),
    ],
)
def test_what_is_no_rule_is_said(rule, message):
    with pytest.raises(ValueError, match=message):
        fastpo.Support.rule(**rule)
