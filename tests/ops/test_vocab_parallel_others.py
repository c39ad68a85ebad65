"""Divergences, best words and mixtures of heads in two processes, as of whole heads."""

from __future__ import annotations

import inspect
import itertools

import _processes
import pytest
import torch
import torch.distributed as dist
from _primitives import BACKENDS as ALL
from _sharded_pair import CUT, DTYPES, KINDS, LEAVES, MAPS, MASK, TOKENS, VOCAB, sides
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

import fastpo
from fastpo import planner, reference
from fastpo.ops.walks.checks import OUTPUTS
from fastpo.testing import assert_as_good_as_eager

FAST = ("cpu", "torch")  # Triton's interpreter is slow, and multiplies float32 only
BACKENDS = [b for b in ALL if b in (*FAST, "triton")]
CASES = [
    (backend, kind, options, dtype)
    for backend, kind, options, dtype in itertools.product(BACKENDS, KINDS, MAPS, DTYPES)
    if backend in FAST
    or (kind in ("reverse_kl", "jsd") and (options, dtype) == ("mapped", "float32"))
]
LIST_OPTIONS = {"temperature": 0.8, "softcap": 6.0, "logit_scale": 1.4}
# name -> (k, which may be more than the second process has, budget in tokens or None, frozen)
LISTS = {"keep": (5, 99, False), "some": (5, 7, False), "frozen": (5, None, True)}
LISTS["many"] = (VOCAB - CUT + 4, 0, False)
LISTED = [
    (backend, name, dtype)
    for backend, name, dtype in itertools.product(BACKENDS, LISTS, DTYPES)
    if backend == "torch" or (name, dtype) == ("some", "float32")
]
MIXED = [
    (backend, dtype)
    for backend, dtype in itertools.product(BACKENDS, DTYPES)
    if backend in FAST or dtype == "float32"
]


def part(x: torch.Tensor, rank: int) -> torch.Tensor:
    return x.detach()[slice(CUT) if rank == 0 else slice(CUT, None)].requires_grad_()


def here(tensors: list[torch.Tensor], rank: int) -> list[torch.Tensor]:
    """Hidden states as they are, this process's words of the heads."""
    return [x if i % 3 == 0 else part(x, rank) for i, x in enumerate(tensors)]


def place(rank: int) -> dict[str, int]:
    return {"first": (0, CUT)[rank], "vocab": VOCAB}


def diverge(function, tensors, kind: str, mapped: str, **options):
    """Divergence, entropy and the gradients of all tensors."""
    h, w, b, th, tw, tb = tensors
    given = {**KINDS[kind], **MAPS[mapped], **options}
    found = function(h, w, th, tw, kind=kind, bias=b, teacher_bias=tb, **given)
    divergence = torch.where(MASK, found.divergence, 0)
    factors = torch.linspace(-1, 1, TOKENS, dtype=divergence.dtype)
    grads = torch.autograd.grad((divergence * factors).sum(), tensors)
    return [divergence.detach(), torch.where(MASK, found.entropy, 0).detach()], grads


def divergences(rank: int) -> dict:
    found = {}
    for case in CASES:
        backend, kind, mapped, dtype = case
        found[case] = diverge(
            fastpo.vocab_parallel_divergence,
            here(sides(DTYPES[dtype]), rank),
            kind,
            mapped,
            **place(rank),
            mask=MASK,
            teacher_grad=True,
            outputs=("divergence", "entropy"),
            budget=8 * 7 * (CUT, VOCAB - CUT)[rank],  # 7 tokens of each
            backend=backend,
        )
    return found


def head(dtype: torch.dtype) -> list[torch.Tensor]:
    """Three words, two of them the second process's, have the same logit in every row."""
    hidden, weight, bias = (x.detach() for x in sides(torch.float32)[:3])
    alike = [3, CUT + 1, CUT + 2]
    weight[alike], bias[alike] = 0.0, 4.0
    return [x.to(dtype).requires_grad_() for x in (hidden, weight, bias)]


def exclude() -> torch.Tensor:
    return torch.tensor([3, CUT + 1, -1]).repeat(TOKENS)[:TOKENS]


def gradients(values: torch.Tensor, lse: torch.Tensor, leaves: list[torch.Tensor]):
    rows = torch.linspace(-1, 2, TOKENS, dtype=lse.dtype)
    loss = (values * rows.unsqueeze(1)).sum() + (lse * rows.flip(0)).sum()
    return torch.autograd.grad(loss, leaves)


def lists(rank: int) -> dict:
    found = {}
    for case in LISTED:
        backend, name, dtype = case
        k, rows, frozen = LISTS[name]
        hidden, weight, bias = here(head(DTYPES[dtype]), rank)
        weight, bias = (x.requires_grad_(not frozen) for x in (weight, bias))
        topk = fastpo.vocab_parallel_topk(
            hidden,
            weight,
            k,
            **place(rank),
            exclude=exclude(),
            mask=MASK,
            bias=bias,
            budget=rows and rows * len(weight) * weight.itemsize,
            backend=backend,
            **LIST_OPTIONS,
        )
        leaves = [x for x in (hidden, weight, bias) if x.requires_grad]
        found[case] = [x.detach() for x in topk], gradients(topk.values, topk.lse, leaves)
    return found


@pytest.mark.parametrize("case", LISTED, ids="-".join)
def test_best_words_as_of_a_head_in_one_process(case, found):
    (topk, grads), (others, other_grads) = (each["lists"][case] for each in found)
    _, name, dtype = case
    k, _, frozen = LISTS[name]
    assert all(torch.equal(*pair) for pair in zip(topk, others, strict=True))
    values, ids, lse = topk

    def own_way(dtype: torch.dtype):
        leaves = hidden, weight, bias = head(dtype)
        given = {"exclude": exclude(), "mask": MASK, "bias": bias, **LIST_OPTIONS}
        best = reference.linear_topk(hidden, weight, VOCAB, **given)
        at_words = torch.zeros_like(best.values).scatter(-1, best.ids, best.values).gather(-1, ids)
        at_words = at_words * MASK.unsqueeze(-1)
        return best.ids[:, :k], at_words, best.lse, gradients(at_words, best.lse, leaves)

    eager, truth = own_way(DTYPES[dtype]), own_way(torch.float64)
    assert dtype != "float32" or torch.equal(ids, truth[0])
    assert_as_good_as_eager("values", values, eager[1], truth[1])
    assert_as_good_as_eager("lse", lse, eager[2], truth[2])
    assert torch.equal(grads[0], other_grads[0])
    assert len(grads) == (1 if frozen else 3)
    whole = [grads[0], *(torch.cat(pair) for pair in zip(grads[1:], other_grads[1:], strict=True))]
    for leaf, *results in zip(LEAVES, whole, eager[3], truth[3], strict=False):
        assert_as_good_as_eager(leaf, *results)


def mix(function, tensors: list[torch.Tensor], dtype: torch.dtype, **given):
    """Statistics of a mixture and the gradients of all tensors."""
    labels = torch.arange(TOKENS) * 16
    labels[:5] = torch.tensor([CUT - 1, CUT, VOCAB - 1, -100, 0])
    coefficients = torch.stack((torch.linspace(0.2, 0.8, TOKENS), torch.full((TOKENS,), 0.4)), 1)
    hiddens, weights, biases = tensors[::3], tensors[1::3], tensors[2::3]
    given |= {"biases": biases, "temperature": 0.7, "softcaps": (9.0, None)}
    stats = function(hiddens, weights, coefficients.to(dtype), labels, **given)
    rows = torch.linspace(-1, 2, TOKENS, dtype=stats.logps.dtype)
    loss = (stats.logps * rows + stats.entropy * rows.flip(0) + 0.3 * stats.lse).sum()
    return [x.detach() for x in stats], torch.autograd.grad(loss, tensors)


def mixtures(rank: int) -> dict:
    call, found = fastpo.vocab_parallel_mixed_logps, {}
    for backend, dtype in MIXED:
        tensors = here(sides(DTYPES[dtype]), rank)
        given = {**place(rank), "outputs": OUTPUTS, "backend": backend}
        found[backend, dtype] = mix(call, tensors, torch.float32, **given)
    return found


@pytest.mark.parametrize("case", MIXED, ids="-".join)
def test_a_mixture_as_of_heads_in_one_process(case, found):
    (stats, grads), (others, other_grads) = (each["mixtures"][case] for each in found)
    dtypes = DTYPES[case[1]], torch.float64
    eager, truth = (mix(reference.mixed_linear_logps, sides(x), x) for x in dtypes)
    for i, name in enumerate(OUTPUTS):
        assert torch.equal(stats[i], others[i]), f"{name}: expected the same bits"
        if name == "is_top1":
            assert case[1] != "float32" or torch.equal(stats[i], truth[0][i])
        else:
            assert_as_good_as_eager(name, stats[i], eager[0][i], truth[0][i])
    for i, name in enumerate(LEAVES):
        whole = grads[i]
        if name.endswith("hidden"):
            assert torch.equal(whole, other_grads[i]), f"{name}: expected the same bits"
        else:
            whole = torch.cat((whole, other_grads[i]))
        assert_as_good_as_eager(name, whole, eager[1][i], truth[1][i])


def everything(rank: int, folder) -> None:
    """In one start of the processes, which takes longer than all they do."""
    dist.init_process_group("gloo")
    planner.tile_shape = lambda tokens, vocab, kind: planner.Tiles(5, 64)
    of_dtensors(rank)
    of_wrong_shards(rank)
    found = {"divergences": divergences(rank), "extremes": extremes(rank)}
    found |= {"lists": lists(rank), "mixtures": mixtures(rank)}
    torch.save(found, folder / f"{rank}.pt")


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shards")
    _processes.run(everything, folder)
    return _processes.loaded(folder)


@pytest.mark.parametrize("case", CASES, ids="-".join)
def test_a_divergence_as_of_heads_in_one_process(case, found):
    (values, grads), (others, other_grads) = (each["divergences"][case] for each in found)
    _, kind, mapped, dtype = case
    function = reference.linear_divergence
    eager, eager_grads = diverge(function, sides(DTYPES[dtype]), kind, mapped)
    truth, truth_grads = diverge(function, sides(torch.float64), kind, mapped)
    for i, name in enumerate(("divergence", "entropy")):
        assert torch.equal(values[i], others[i]), f"{name}: expected the same bits"
        # As of whole heads: eager is sometimes lucky, and rounds other cells.
        assert_as_good_as_eager(name, values[i], eager[i], truth[i], factor=4.0)
    for i, name in enumerate(LEAVES):
        whole = grads[i]
        if name.endswith("hidden"):
            assert torch.equal(whole, other_grads[i]), f"{name}: expected the same bits"
        else:
            whole = torch.cat((whole, other_grads[i]))
        assert_as_good_as_eager(name, whole, eager_grads[i], truth_grads[i], factor=4.0)


def extremes(rank: int) -> dict:
    h, w, b, th, tw, tb = (x.detach() for x in here(sides(torch.float32), rank))
    h[0], th[1] = float("nan"), float("nan")
    if rank == 1:
        b[:], tb[:] = float("-inf"), float("-inf")
    call, found = fastpo.vocab_parallel_divergence, {}
    for kind in KINDS:
        given = {"kind": kind, "bias": b, "teacher_bias": tb, "outputs": ("divergence", "entropy")}
        found[kind] = call(h, w, th, tw, **place(rank), **given)._asdict()
    assert call(h[:0], w, th[:0], tw, kind="jsd", **place(rank)).divergence.shape == (0,)
    return found


def of_wrong_shards(rank: int) -> None:
    h, w, _, th, tw, _ = (x.detach() for x in sides(torch.float32))
    labels = torch.full((TOKENS,), CUT)
    for second in (CUT - 1, CUT + 1):  # two have a word, nobody has it
        own, other = (x[:CUT] if rank == 0 else x[second:] for x in (w, tw))
        given = {"first": (0, second)[rank], "vocab": VOCAB}
        got = rf"first: expected shards .* \[0, 211\), got words \[0, 150\), \[{second}, 211\)"
        with pytest.raises(ValueError, match=got):
            fastpo.vocab_parallel_divergence(h, own, th, other, kind="tvd", **given)
        with pytest.raises(ValueError, match=got):
            fastpo.vocab_parallel_topk(h, own, 3, **given)
        with pytest.raises(ValueError, match=got):
            fastpo.vocab_parallel_mixed_logps([h], [own], [1.0], labels, **given)
    words = w[:CUT] if rank == 0 else w[CUT:]
    with pytest.raises(ValueError, match=r"labels: expected values in \[0, 211\)"):
        fastpo.vocab_parallel_mixed_logps([h], [words], [1.0], labels + 61, **place(rank))
    with pytest.raises(ValueError, match=r"k: expected an integer in \[1, 211\], got 212"):
        fastpo.vocab_parallel_topk(h, words, 212, **place(rank))
    with pytest.raises(ValueError, match="exclude: expected values below 211, got 211"):
        fastpo.vocab_parallel_topk(h, words, 3, exclude=exclude() + VOCAB - CUT - 1, **place(rank))


def test_words_masked_out_and_nan_rows(found):
    first, second = (each["extremes"] for each in found)
    h, w, b, th, tw, tb = (x.detach() for x in sides(torch.float64))
    for kind in KINDS:
        # Words that both exclude are none.
        words = {"bias": b[:CUT], "teacher_bias": tb[:CUT]}
        truth = reference.linear_divergence(h, w[:CUT], th, tw[:CUT], kind=kind, **words)
        for name, value in first[kind].items():
            assert torch.equal(value.nan_to_num(7.0), second[kind][name].nan_to_num(7.0))
            broken = [0] if name == "entropy" else [0, 1]
            assert value.isnan().nonzero().flatten().tolist() == broken
            expected = getattr(truth, name)[2:]
            torch.testing.assert_close(value[2:].double(), expected, rtol=1e-4, atol=1e-5)


def of_dtensors(rank: int) -> None:
    mesh = dist.device_mesh.init_device_mesh("cpu", (_processes.PROCESSES,))
    tensors, half = sides(torch.float32), -(-VOCAB // 2)
    options = {"kind": "jsd", "teacher_grad": True}

    def run(tensors: list[torch.Tensor], **given) -> list[torch.Tensor]:
        h, w, b, th, tw, tb = tensors
        call = fastpo.vocab_parallel_divergence
        found = call(h, w, th, tw, bias=b, teacher_bias=tb, **given, **options).divergence
        return [found, *torch.autograd.grad(found.sum(), tensors)]

    words = slice(half) if rank == 0 else slice(half, None)
    plain = [x if i % 3 == 0 else x.detach()[words].requires_grad_() for i, x in enumerate(tensors)]
    expected = run(plain, first=rank * half, vocab=VOCAB)
    sharded = [
        x if i % 3 == 0 else distribute_tensor(x.detach(), mesh, [Shard(0)]).requires_grad_()
        for i, x in enumerate(tensors)
    ]
    for found, wanted, leaf in zip(run(sharded), expected, (tensors[0], *sharded), strict=True):
        assert isinstance(found, DTensor) == isinstance(leaf, DTensor)
        found = found.to_local() if isinstance(found, DTensor) else found
        assert torch.equal(found, wanted)


def test_wrong_shards_of_a_teacher(mesh):
    h, w, _, th, tw, tb = (x.detach() for x in sides(torch.float32))
    call, given = fastpo.vocab_parallel_divergence, {"first": 0, "vocab": VOCAB, "kind": "jsd"}
    own, other, bias = (distribute_tensor(x, mesh, [Shard(0)]) for x in (w, tw, tb))
    with pytest.raises(ValueError, match="first: expected an integer, got None"):
        call(h, w, th, tw, kind="jsd")
    with pytest.raises(ValueError, match="teacher_weight: expected 211 words as in weight, got 9"):
        call(h, w, th, tw[:9], **given)
    with pytest.raises(ValueError, match="teacher_weight: expected a plain tensor beside a plain"):
        call(h, w, th, other, **given)
    with pytest.raises(ValueError, match="teacher_bias: expected a plain tensor beside a plain"):
        call(h, w, th, tw, teacher_bias=bias, **given)
    with pytest.raises(ValueError, match=r"teacher_weight: expected a DTensor in .*, got a plain"):
        call(h, own, th, tw, kind="jsd")
    with pytest.raises(ValueError, match=r"teacher_bias: expected a DTensor in .*, got a plain"):
        call(h, own, th, other, teacher_bias=tb, kind="jsd")
    whole = distribute_tensor(tw, mesh, [Replicate()])
    with pytest.raises(ValueError, match=r"teacher_weight: expected a DTensor .*, got \(Replicate"):
        call(h, own, th, whole, kind="jsd")
    fewer = distribute_tensor(tw[:9], mesh, [Shard(0)])
    with pytest.raises(ValueError, match=r"teacher_weight: expected 211 words on .*, got 9 on"):
        call(h, own, th, fewer, kind="jsd")
    fewer = distribute_tensor(tb[:9], mesh, [Shard(0)])
    with pytest.raises(ValueError, match=r"teacher_bias: expected 211 words on .*, got 9 on"):
        call(h, own, th, other, teacher_bias=fewer, kind="jsd")
    with pytest.raises(ValueError, match="own_tokens: expected True or False, got 1"):
        call(h, w, th, tw, own_tokens=1, **given)
    with pytest.raises(ValueError, match="hidden: expected a whole tensor, got DTensor"):
        call(distribute_tensor(h, mesh, [Shard(0)]), own, th, other, kind="jsd")


def test_wrong_shards_of_a_mixture(mesh):
    h, w, _, th, tw, _ = (x.detach() for x in sides(torch.float32))
    given = [h, th], (0.5, 0.5), torch.zeros(TOKENS, dtype=torch.int64)

    def call(*weights: torch.Tensor, **place):
        hiddens, *rest = given
        return fastpo.vocab_parallel_mixed_logps(hiddens, list(weights), *rest, **place)

    other = distribute_tensor(tw, mesh, [Shard(0)])
    with pytest.raises(ValueError, match="head 1: weight: expected a plain tensor beside a plain"):
        call(w, other, first=0, vocab=VOCAB)
    with pytest.raises(ValueError, match=r"head 1: weight: expected 211 words .*, got 9"):
        call(w, tw[:9], first=0, vocab=VOCAB)
    with pytest.raises(ValueError, match="weights: expected 2 entries, got 1"):
        call(w, first=0, vocab=VOCAB)
    with pytest.raises(ValueError, match=r"first: expected shards that make up \[0, 211\), got"):
        call(w, tw, first=1, vocab=VOCAB)


def test_without_processes():
    h, w, _, th, tw, _ = sides(torch.float32)
    with pytest.raises(RuntimeError, match="expected an initialised process group, got none"):
        fastpo.vocab_parallel_divergence(h, w, th, tw, kind="jsd", first=0, vocab=VOCAB)


TWINS = {
    "linear_logps": "vocab_parallel_logps",
    "linear_divergence": "vocab_parallel_divergence",
    "linear_topk": "vocab_parallel_topk",
    "mixed_linear_logps": "vocab_parallel_mixed_logps",
}


@pytest.mark.parametrize("name", TWINS)
def test_options_are_those_of_a_whole_head(name):
    """What they mean is said there alone."""
    whole, shards = (
        {
            option: (parameter.kind, parameter.default)
            for option, parameter in inspect.signature(getattr(fastpo, function)).parameters.items()
        }
        for function in (name, TWINS[name])
    )
    added = set(shards) - set(whole)
    assert {"first", "vocab", "group"} <= added <= {"first", "vocab", "group", "own_tokens"}
    assert {option: shards.get(option) for option in whole} == whole
