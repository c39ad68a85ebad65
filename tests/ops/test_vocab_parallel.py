"""`vocab_parallel_logps` in two processes, judged against float64 as a head that lies in one."""

from __future__ import annotations

import itertools

import _processes
import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

import fastpo
from fastpo import reference
from fastpo.ops.rows import registry
from fastpo.ops.walks.checks import OUTPUTS
from fastpo.testing import HeadInputs, assert_as_good_as_eager, make_head

VOCAB, CUT = 1003, 400  # the second process has the words from CUT on
BACKENDS = [b for b in registry.BACKENDS if registry.unavailable(b, torch.device("cpu")) is None]
# name -> (is the head trained, budget in rows of each process's probabilities)
MODES = {"score": (False, 0), "frozen": (False, 0), "keep": (True, 99), "lean": (True, 0)}
MODES["mixed"] = (True, 7)
OPTIONS = {"plain": {}, "all": {"softcap": 30.0, "temperature": 1.6, "logit_scale": -0.8}}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
CASES = [
    (backend, mode, options, dtype)
    for backend, mode, options, dtype in itertools.product(BACKENDS, MODES, OPTIONS, DTYPES)
    # bf16 is wrong in Triton's interpreter itself
    if dtype == "float32" or (backend in ("cpu", "torch") and options == "plain")
]
TOKENS = (5, 0, 9)  # own tokens of the processes, turn by turn
DIFFERENTIABLE = ("logps", "entropy", "lse")
# mode -> what the loss is of: of log-probabilities alone a frozen head's forward makes d hidden.
LOSSES = {"frozen": ("logps",)}


def problem(dtype: torch.dtype = torch.float64, tokens: int = 23) -> HeadInputs:
    inputs = make_head(tokens, VOCAB, 32, bias=True, ignored=0.3)
    inputs.labels[:6] = torch.tensor([0, CUT - 1, CUT, VOCAB - 1, -100, CUT])
    return inputs.like(dtype)


def loss_of(stats: fastpo.TokenStats, rows=slice(None), names=DIFFERENTIABLE) -> torch.Tensor:
    g = torch.Generator().manual_seed(1)
    factors = {name: torch.randn(23, generator=g)[rows] for name in names}
    return sum((getattr(stats, name) * f.to(stats.logps)).sum() for name, f in factors.items())


def part(x: torch.Tensor, rank: int) -> torch.Tensor:
    return x.detach()[slice(CUT) if rank == 0 else slice(CUT, None)].requires_grad_(x.requires_grad)


def call(inputs: HeadInputs, rank: int, mode: str, **options):
    """Statistics and gradients of one process."""
    trained, rows = MODES[mode]
    hidden = inputs.hidden.requires_grad_(mode != "score")
    weight, bias = (part(x, rank).requires_grad_(trained) for x in (inputs.weight, inputs.bias))
    stats = fastpo.vocab_parallel_logps(
        hidden,
        weight,
        inputs.labels,
        first=(0, CUT)[rank],
        vocab=VOCAB,
        bias=bias,
        outputs=OUTPUTS,
        budget=rows * len(weight) * hidden.element_size(),
        **options,
    )
    leaves = {"dhidden": hidden, "dweight": weight, "dbias": bias}
    leaves = {name: x for name, x in leaves.items() if x.requires_grad}
    found = ()
    if leaves:
        loss = loss_of(stats, names=LOSSES.get(mode, DIFFERENTIABLE))
        found = torch.autograd.grad(loss, list(leaves.values()))
    return values(stats), dict(zip(leaves, found, strict=True))


def values(stats: fastpo.TokenStats) -> dict[str, torch.Tensor]:
    return {name: x.detach() for name, x in stats._asdict().items()}


def all_cases(rank: int, folder) -> None:
    dist.init_process_group("gloo")
    found = {}
    for case in CASES:
        backend, mode, options, dtype = case
        found[case] = call(problem(DTYPES[dtype]), rank, mode, backend=backend, **OPTIONS[options])
    torch.save(found, folder / f"{rank}.pt")


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cases")
    _processes.run(all_cases, folder)
    return _processes.loaded(folder)


def own_way(inputs: HeadInputs, mode: str, **options):
    stats = reference.linear_logps(
        inputs.hidden, inputs.weight, inputs.labels, bias=inputs.bias, **options
    )
    leaves = inputs.leaves()
    loss = loss_of(stats, names=LOSSES.get(mode, DIFFERENTIABLE))
    grads = torch.autograd.grad(loss, list(leaves.values()))
    return values(stats), dict(zip(leaves, grads, strict=True))


@pytest.mark.parametrize("case", CASES, ids="-".join)
def test_as_a_head_in_one_process(case, found):
    (first, first_grads), (second, second_grads) = (each[case] for each in found)
    _, mode, options, dtype = case
    truth, truth_grads = own_way(problem(), mode, **OPTIONS[options])
    eager, eager_grads = own_way(problem(DTYPES[dtype]), mode, **OPTIONS[options])
    for name, value in first.items():
        assert torch.equal(value, second[name]), f"{name}: expected the same bits"
        if name == "is_top1":
            assert dtype != "float32" or torch.equal(value, truth[name])
        else:
            assert_as_good_as_eager(name, value, eager[name], truth[name])
    wanted = {"score": set(), "frozen": {"dhidden"}}.get(mode, {"dhidden", "dweight", "dbias"})
    assert set(first_grads) == set(second_grads) == wanted
    for name, value in first_grads.items():
        if name == "dhidden":
            assert torch.equal(value, second_grads[name])
        else:
            value = torch.cat((value, second_grads[name]))
        assert_as_good_as_eager(name, value, eager_grads[name], truth_grads[name])


def own_tokens(rank: int, folder) -> None:
    dist.init_process_group("gloo")
    mesh = dist.device_mesh.init_device_mesh("cpu", (_processes.PROCESSES,))
    found = []
    for turn in range(len(TOKENS)):
        inputs, counts = problem(torch.float32), [TOKENS[turn], TOKENS[turn - 1]]
        rows = slice(counts[0]) if rank == 0 else slice(counts[0], sum(counts))
        # Who has no token may have made its hidden states of nothing.
        hidden = inputs.hidden[rows].detach().requires_grad_(counts[rank] > 0)
        weight, bias = (
            distribute_tensor(x.detach(), mesh, [Shard(0)]).requires_grad_()
            for x in (inputs.weight, inputs.bias)
        )
        own = {"own_tokens": True, "outputs": OUTPUTS}
        frozen = fastpo.vocab_parallel_logps(
            hidden, weight.detach(), inputs.labels[rows], bias=bias.detach(), **own
        )
        loss_of(frozen, rows).backward()
        dhidden, hidden.grad = hidden.grad, None
        stats = fastpo.vocab_parallel_logps(hidden, weight, inputs.labels[rows], bias=bias, **own)
        loss_of(stats, rows).backward()
        assert isinstance(weight.grad, DTensor) and weight.grad.placements == weight.placements
        if counts[rank]:
            torch.testing.assert_close(dhidden, hidden.grad, rtol=1e-4, atol=1e-5)
        mine = hidden.grad if counts[rank] else hidden
        grads = mine, weight.grad.full_tensor(), bias.grad.full_tensor()
        found.append((values(stats), *grads))
    torch.save(found, folder / f"{rank}.pt")


def test_own_tokens_of_a_sharded_head(tmp_path):
    """Each loss is its process's own; d weight is the mean, d hidden is not."""
    _processes.run(own_tokens, tmp_path)
    results = _processes.loaded(tmp_path)
    for turn, (first, second) in enumerate(zip(*results, strict=True)):
        rows = slice(TOKENS[turn] + TOKENS[turn - 1])

        def whole(dtype: torch.dtype, rows: slice = rows):
            inputs = problem(dtype)
            stats = reference.linear_logps(
                inputs.hidden[rows], inputs.weight, inputs.labels[rows], bias=inputs.bias
            )
            leaves = inputs.hidden, inputs.weight, inputs.bias
            dhidden, *head = torch.autograd.grad(loss_of(stats, rows), leaves)
            return values(stats), dhidden[rows], *(x / _processes.PROCESSES for x in head)

        truth, eager = whole(torch.float64), whole(torch.float32)
        for name in OUTPUTS:
            value = torch.cat((first[0][name], second[0][name]))
            if name == "is_top1":
                assert torch.equal(value, truth[0][name])
            else:
                assert_as_good_as_eager(name, value, eager[0][name], truth[0][name])
        dhidden = torch.cat((first[1], second[1]))
        assert_as_good_as_eager("dhidden", dhidden, eager[1], truth[1])
        for i in (2, 3):
            assert torch.equal(first[i], second[i])
            assert_as_good_as_eager("head", first[i], eager[i], truth[i])


def extremes(rank: int, folder) -> None:
    dist.init_process_group("gloo")
    found = {}
    inputs = problem(torch.float32)
    inputs.hidden.data[0] = float("nan")
    inputs.bias.data[CUT:] = float("-inf")
    found["half"] = values(
        fastpo.vocab_parallel_logps(
            inputs.hidden.detach(), part(inputs.weight.detach(), rank), inputs.labels,
            first=(0, CUT)[rank], vocab=VOCAB, bias=part(inputs.bias.detach(), rank),
            outputs=OUTPUTS,
        )
    )  # fmt: skip
    empty = fastpo.vocab_parallel_logps(
        inputs.hidden[:0], part(inputs.weight, rank), inputs.labels[:0],
        first=(0, CUT)[rank], vocab=VOCAB,
    )  # fmt: skip
    assert empty.logps.shape == (0,)
    for second in (CUT - 1, CUT + 1):  # two have a word, nobody has it
        words = inputs.weight[:CUT] if rank == 0 else inputs.weight[second:]
        got = rf"first: expected shards .* \[0, 1003\), got words \[0, 400\), \[{second}, 1003\)"
        with pytest.raises(ValueError, match=got):
            fastpo.vocab_parallel_logps(
                inputs.hidden, words, inputs.labels, first=(0, second)[rank], vocab=VOCAB
            )
    labels = inputs.labels.clone()
    labels[0] = VOCAB - 1  # no word of what some are told, which is not the label's fault
    told = {  # one would raise of all of these alone, and the other wait for it
        r"first: .* \[0, 1000\), got words \[0, 400\), \[400, 1003\)": (1000, 1000),
        r"first: .* \[0, 1003\), got words \[0, 400\), \[900, 1503\)": (VOCAB, VOCAB),
        "vocab: expected the same in all processes, got 1003, 1009": (VOCAB, 1009),
        "vocab: expected the same in all processes, got 0, 1003": (0, VOCAB),
    }
    for got, vocab in told.items():
        words, first = part(inputs.weight, rank), (0, 900 if "900" in got else CUT)[rank]
        with pytest.raises(ValueError, match=got):
            fastpo.vocab_parallel_logps(
                inputs.hidden, words, labels, first=first, vocab=vocab[rank]
            )
    wrong = inputs.labels.clone()
    wrong[3] = VOCAB
    with pytest.raises(ValueError, match=r"labels: expected values in \[0, 1003\)"):
        fastpo.vocab_parallel_logps(
            inputs.hidden, part(inputs.weight, rank), wrong, first=(0, CUT)[rank], vocab=VOCAB
        )
    torch.save(found, folder / f"{rank}.pt")


def test_words_masked_out_nan_rows_and_wrong_shards(tmp_path):
    _processes.run(extremes, tmp_path)
    first, second = _processes.loaded(tmp_path)
    inputs = problem()
    inputs.bias.data[CUT:] = float("-inf")
    truth = values(
        reference.linear_logps(inputs.hidden, inputs.weight, inputs.labels, bias=inputs.bias)
    )
    for name in ("logps", "entropy", "lse", "log_sum_sq_probs"):
        value = first["half"][name]
        assert torch.equal(value.nan_to_num(7.0), second["half"][name].nan_to_num(7.0))
        assert value[0].isnan()
        torch.testing.assert_close(value[1:].double(), truth[name][1:], rtol=1e-5, atol=1e-5)
    assert first["half"]["logps"][2] == float("-inf")  # its label is among those masked out


def test_without_processes():
    inputs = problem(torch.float32)
    with pytest.raises(RuntimeError, match="expected an initialised process group, got none"):
        fastpo.vocab_parallel_logps(
            inputs.hidden, inputs.weight, inputs.labels, first=0, vocab=VOCAB
        )


WRONG = {
    "nothing said": ({}, "first: expected an integer, got None"),
    "first": ({"first": 1, "vocab": VOCAB}, r"got words \[1, 1004\)"),
    "below": ({"first": -1, "vocab": VOCAB + 9}, r"got words \[-1, 1002\)"),
    "hidden": (
        {"first": 0, "vocab": VOCAB, "hidden": (4, 31)},
        r"weight: expected shape \(V, 31\)",
    ),
    "outputs": ({"first": 0, "vocab": VOCAB, "outputs": ("loss",)}, "outputs: expected a tuple"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_arguments(case, mesh):
    inputs = problem(torch.float32)
    given, message = dict(WRONG[case][0]), WRONG[case][1]
    hidden = torch.randn(given.pop("hidden")) if "hidden" in given else inputs.hidden
    labels = inputs.labels[: len(hidden)]
    with pytest.raises(ValueError, match=message):
        fastpo.vocab_parallel_logps(hidden, inputs.weight, labels, **given)


def test_a_mesh_is_no_group(mesh):
    inputs = problem(torch.float32)
    given = {"first": 0, "vocab": VOCAB, "group": mesh}
    with pytest.raises(ValueError, match="group: expected a ProcessGroup or None, got DeviceMesh"):
        fastpo.vocab_parallel_logps(inputs.hidden, inputs.weight, inputs.labels, **given)


def test_wrong_dtensors(mesh):
    inputs = problem(torch.float32)
    given = inputs.hidden, distribute_tensor(inputs.weight.detach(), mesh, [Shard(0)])
    call = fastpo.vocab_parallel_logps
    with pytest.raises(ValueError, match="first: expected None beside a DTensor, got 0"):
        call(*given, inputs.labels, first=0)
    with pytest.raises(ValueError, match=r"bias: expected a DTensor in \(Shard\(dim=0\),\), got a"):
        call(*given, inputs.labels, bias=inputs.bias)
    more = distribute_tensor(torch.zeros(VOCAB + 1), mesh, [Shard(0)])
    with pytest.raises(ValueError, match=r"bias: expected 1003 words on .* as in weight, got 1004"):
        call(*given, inputs.labels, bias=more)
    wrong = distribute_tensor(inputs.weight.detach(), mesh, [Replicate()])
    with pytest.raises(ValueError, match=r"weight: expected a DTensor in .*, got \(Replicate\(\),"):
        call(inputs.hidden, wrong, inputs.labels)
    bias = distribute_tensor(inputs.bias.detach(), mesh, [Shard(0)])
    with pytest.raises(ValueError, match="bias: expected a plain tensor beside a plain weight"):
        call(inputs.hidden, inputs.weight, inputs.labels, first=0, vocab=VOCAB, bias=bias)
    with pytest.raises(ValueError, match=r"weight: expected shape \(words, H\), got \(\)"):
        call(inputs.hidden, inputs.weight[0, 0], inputs.labels, first=0, vocab=VOCAB)
    with pytest.raises(ValueError, match="hidden: expected a whole tensor, got DTensor"):
        call(distribute_tensor(inputs.hidden.detach(), mesh, [Shard(0)]), *given[1:], inputs.labels)


def test_own_tokens_are_counted_outside_a_compiled_graph(mesh):
    inputs = problem(torch.float32)
    given = {"first": 0, "vocab": VOCAB, "own_tokens": True}

    def logps() -> torch.Tensor:
        operands = inputs.hidden, inputs.weight, inputs.labels
        return fastpo.vocab_parallel_logps(*operands, **given).logps

    assert torch.equal(torch.compile(logps, backend="eager")(), logps())
