"""One set of tests over the table of objectives, then limits and scars that no row can state."""

import ast
import functools
import importlib
import inspect
import math
import re
from collections import defaultdict
from pathlib import Path

import pytest
import torch
from _objective_truth import ROWS, Row, make_inputs
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._pytree import tree_leaves

from fastpo import objectives
from fastpo.objectives import Interval, OneOf, _quantities
from fastpo.objectives._registry import lookup, quantities_of
from fastpo.testing import assert_as_good_as_eager

for module in sorted(Path(__file__).parent.glob("_objective_truth_*.py")):
    importlib.import_module(module.stem)

KEYS = objectives.available()
assert set(KEYS) == set(ROWS), "an objective and its row in the test table go together"
CATALOGUE = Path(__file__).parents[3] / "shared" / "objectives.md"
CASES = [(key, i) for key in KEYS for i in range(len(ROWS[key].cases))]
MASKED = [key for key in KEYS if any(map(_quantities.is_mask, quantities_of(objectives.get(key))))]
few = settings(max_examples=5, deadline=None)


def problem(key: str, case: int = 0, *, optional: bool = True, **options):
    """(function, row, inputs, hyperparameters) of one case of one row."""
    row, function = ROWS[key], objectives.get(key)
    inputs = make_inputs(function, forms=row.forms, **{**row.sizes, **options})
    kept = {n for n, required in quantities_of(function).items() if required or optional}
    kept |= set(row.always)
    if case:
        kept = (kept | set(row.needs)) - set(row.excludes)
    return function, row, {n: x for n, x in inputs.items() if n in kept}, row.cases[case]


def carriers(row: Row) -> set[str]:
    return _quantities.DIFFERENTIABLE | set(row.gradient_into)


def evaluate(function, row: Row, inputs, hyper, dtype=torch.float64):
    """Rows, and the gradient of a fixed weighting of them in everything that carries one."""
    cast = {n: x.to(dtype) if x.is_floating_point() else x for n, x in inputs.items()}
    leaves = {n: x.clone().requires_grad_() for n, x in cast.items() if n in carriers(row)}
    outputs = tree_leaves(function(**{**cast, **leaves}, **hyper))
    weights = [
        torch.linspace(0.5, 1.5, x.numel(), dtype=x.dtype, device=x.device).view_as(x)
        for x in outputs
    ]
    total = sum((x * w).sum() for x, w in zip(outputs, weights, strict=True))
    if not (leaves and total.requires_grad):
        return outputs, {}
    grads = torch.autograd.grad(total, list(leaves.values()), allow_unused=True)
    return outputs, {n: g for n, g in zip(leaves, grads, strict=True) if g is not None}


def truth_of(function, row: Row, inputs, hyper, dtype=torch.float64):
    """The row's truth in the objective's place: positions become the objective's names."""
    names = dict(
        zip(inspect.signature(row.function).parameters, quantities_of(function), strict=False)
    )

    def call(**named):
        args = {own: named.pop(name) for own, name in names.items() if name in named}
        return row.function(**args, **named)

    return evaluate(call, row, inputs, hyper, dtype)


@pytest.mark.parametrize(("key", "case"), CASES)
@pytest.mark.parametrize("optional", [True, False])
def test_value_and_gradient(key, case, optional):
    function, row, inputs, hyper = problem(key, case, optional=optional)
    ours, dours = evaluate(function, row, inputs, hyper)
    truth, dtruth = truth_of(function, row, inputs, hyper)
    assert [x.shape for x in ours] == [x.shape for x in truth]
    for got, expected in zip(ours, truth, strict=True):
        torch.testing.assert_close(got, expected.to(got.dtype), rtol=1e-9, atol=1e-11)
    for name in dtruth.keys() | dours.keys():
        zero = torch.zeros_like(inputs[name])
        expected, got = dtruth.get(name, zero), dours.get(name, zero)
        torch.testing.assert_close(got, expected, rtol=1e-8, atol=1e-10, msg=name)


@pytest.mark.parametrize("key", KEYS)
def test_precision(key):
    """float32 as good as the naive formula in float32, which may be lucky in one draw."""
    found = defaultdict(list)
    for seed in range(16):
        function, row, inputs, hyper = problem(key, seed=seed)
        truth, dtruth = truth_of(function, row, inputs, hyper)
        eager, deager = truth_of(function, row, inputs, hyper, torch.float32)
        ours, dours = evaluate(function, row, inputs, hyper, torch.float32)
        for i, results in enumerate(zip(ours, eager, truth, strict=True)):
            found[f"row {i}"].append(results)
        for name in dtruth:
            found[f"d{name}"].append((dours[name], deager[name], dtruth[name]))
    for name, draws in found.items():
        each = zip(*draws, strict=True)
        fused, plain, exact = (torch.cat([x.flatten() for x in results]) for results in each)
        assert fused.dtype == torch.float32
        assert_as_good_as_eager(f"{key}: {name}", fused, plain, exact)


@pytest.mark.parametrize("key", KEYS)
def test_half_precision_is_computed_in_float32(key):
    function, _, inputs, hyper = problem(key)
    for half in (torch.bfloat16, torch.float16):
        low = {n: x.to(half) if x.is_floating_point() else x for n, x in inputs.items()}
        wide = {n: x.float() if x.is_floating_point() else x for n, x in low.items()}
        for a, b in zip(*(tree_leaves(function(**q, **hyper)) for q in (low, wide)), strict=True):
            assert a.dtype == torch.float32
            assert torch.equal(a, b)


@pytest.mark.parametrize(("key", "case"), [case for case in CASES if not ROWS[case[0]].detaches])
def test_gradcheck(key, case):
    function, row, inputs, hyper = problem(key, case, seed=3)
    names = [n for n in inputs if n in carriers(row)]
    leaves = [inputs[n].requires_grad_() for n in names]

    def call(*xs):
        out = tree_leaves(function(**{**inputs, **dict(zip(names, xs, strict=True))}, **hyper))
        return tuple(x for x in out if x.requires_grad) or leaves[0].sum()

    if leaves:
        torch.autograd.gradcheck(call, leaves, fast_mode=True)


@pytest.mark.parametrize(("key", "case"), CASES)
@pytest.mark.parametrize("seed", range(4))
def test_extremes_stay_finite(key, case, seed):
    function, row, inputs, hyper = problem(key, case, seed=seed, extreme=True)
    rows, grads = evaluate(function, row, inputs, hyper, torch.float32)
    for name, x in [("rows", x) for x in rows] + list(grads.items()):
        assert x.isfinite().all(), f"{name}: {x} of {inputs}"


@pytest.mark.parametrize("key", MASKED)
def test_unscored_positions_do_not_matter(key):
    function, row, inputs, hyper = problem(key)

    def poisoned(name: str, x: Tensor, value: float) -> Tensor:
        mask = inputs.get(_quantities.mask_of(name))
        if mask is None or not x.is_floating_point() or x.shape != mask.shape:
            return x
        return x.masked_fill(~mask, value)

    clean = {n: poisoned(n, x, 0.0) for n, x in inputs.items()}
    rows, grads = evaluate(function, row, clean, hyper, torch.float32)
    for value in (3e38, -3e38, 500.0):
        dirty = {n: poisoned(n, x, value) for n, x in inputs.items()}
        again, dagain = evaluate(function, row, dirty, hyper, torch.float32)
        assert all(map(torch.equal, rows, again))
        assert all(torch.equal(grads[n], dagain[n]) for n in grads)


def test_the_door_empties_unscored_positions():
    """Entries may exponentiate before they sum: the overflow must be gone by then."""
    mask = torch.tensor([[1, 0, 1]])
    x = torch.tensor([[-1.0, 3e38, -2.0]])
    given = {"token_logps": x, "mask": mask, "segments": torch.tensor([[0, 7, 1]])}
    ready = _quantities.prepare({**given, "advantages": x[:, 0], "old_token_logps": None})
    assert ready["token_logps"].tolist() == [[-1.0, 0.0, -2.0]]
    assert ready["segments"].tolist() == [[0, -1, 1]]
    assert ready["mask"].dtype == torch.bool
    assert ready["advantages"].tolist() == [-1.0]
    assert "old_token_logps" not in ready


@pytest.mark.parametrize("key", KEYS)
def test_gradient_reaches_the_policy_only(key):
    function, row, inputs, hyper = problem(key)
    leaves = {n: x.requires_grad_() for n, x in inputs.items() if x.is_floating_point()}
    total = sum(x.sum() for x in tree_leaves(function(**inputs, **hyper)))
    if total.requires_grad:
        total.backward()
    reached = {n for n, x in leaves.items() if x.grad is not None}
    assert reached <= carriers(row)


@pytest.mark.parametrize("key", [key for key in KEYS if ROWS[key].order != "fixed"])
@given(order=st.permutations(range(6)), seed=st.integers(0, 99))
@few
def test_order_of_the_batch(key, order, seed):
    function, row, inputs, hyper = problem(key, seed=seed)
    permuted = {}
    for name, x in inputs.items():
        dims = _quantities.SHAPES[name][row.forms.get(name, 0)]
        along = next((i for i, dim in enumerate(dims) if dim in ("B", "N", "P")), None)
        permuted[name] = x if along is None else x.index_select(along, torch.tensor(order))
    before, after = (tree_leaves(function(**q, **hyper)) for q in (inputs, permuted))
    for a, b in zip(before, after, strict=True):
        expected = a if row.order == "ranks" else a[torch.tensor(order)]
        torch.testing.assert_close(b, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("key", KEYS)
def test_empty_batch(key):
    sizes = dict.fromkeys(("B", "N", "M", "U", "P"), 0)
    function, row, inputs, hyper = problem(key, **sizes)
    rows, _ = evaluate(function, row, inputs, hyper)
    assert all(x.shape[0] == 0 for x in rows)


@pytest.mark.parametrize("key", KEYS)
def test_no_value_is_read_on_the_host(key):
    """Meta tensors have no values: whoever reads one, raises, in the backward too."""
    function, row, inputs, hyper = problem(key)
    if "groups" in inputs:
        hyper = {**hyper, "num_groups": 3}
    meta = {n: x.to("meta") for n, x in inputs.items()}
    for x in tree_leaves(evaluate(function, row, meta, hyper, torch.float32)):
        assert x.device.type == "meta"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("key", KEYS)
def test_nothing_waits_for_a_gpu(key):
    function, row, inputs, hyper = problem(key)
    cuda = {n: x.cuda() for n, x in inputs.items()}
    hyper = {**hyper, "num_groups": 3} if "groups" in inputs else hyper
    before = evaluate(function, row, cuda, hyper, torch.float32)
    torch.cuda.set_sync_debug_mode("error")
    try:
        rows, grads = evaluate(function, row, cuda, hyper, torch.float32)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(map(torch.equal, tree_leaves([rows, grads]), tree_leaves(before)))


@pytest.mark.parametrize("key", KEYS)
def test_ranges_are_checked(key):
    function, _, inputs, _ = problem(key)
    for name, parameter in lookup(key).parameters.items():
        bad = ["nonsense", object()]
        if isinstance(parameter.range, Interval):
            low, high, bounds = parameter.range.low, parameter.range.high, parameter.range.bounds
            bad += [math.nan, low - 1, high + 1]
            bad += [low] * (bounds[0] == "(") + [high] * (bounds[1] == ")")
        bad = bad if isinstance(parameter.range, OneOf) else bad[parameter.kind is None and 2 :]
        for value in bad:
            message = rf"^{name}: expected .+, got {re.escape(repr(value))}$"
            with pytest.raises(ValueError, match=message):
                objectives.get(key, **{name: value})
            with pytest.raises(ValueError, match=message):
                function(**inputs, **{name: value})


@pytest.mark.parametrize("key", KEYS)
def test_shapes_are_checked(key):
    function, row, inputs, _ = problem(key)
    seen: set[str] = set()
    for name, x in inputs.items():
        dims = _quantities.SHAPES[name][row.forms.get(name, 0)]
        for i, dim in enumerate(dims):
            if dim in seen:
                cut = {**inputs, name: x.narrow(i, 0, x.shape[i] - 1)}
                with pytest.raises(ValueError, match=rf"^{name}: expected shape .+, got \("):
                    function(**cut)
        seen |= set(dims)
        with pytest.raises(ValueError, match=f"^{name}: expected shape"):
            function(**{**inputs, name: x[None, None]})
        with pytest.raises(ValueError, match=f"^{name}: expected a tensor, got float"):
            function(**{**inputs, name: 0.5})
    for name, x in list(inputs.items())[1:]:
        with pytest.raises(ValueError, match=f"^{name}: expected device cpu, got meta$"):
            function(**{**inputs, name: x.to("meta")})


def signature_of(code: str) -> inspect.Signature:
    """The signature written in a code block, without running it."""
    arguments = ast.parse(f"def {code.strip()}: ...").body[0].args
    kind = inspect.Parameter
    pad = [None] * (len(arguments.args) - len(arguments.defaults))
    groups = (
        (kind.POSITIONAL_OR_KEYWORD, arguments.args, pad + arguments.defaults),
        (kind.KEYWORD_ONLY, arguments.kwonlyargs, arguments.kw_defaults),
    )

    def default(node: ast.expr | None):
        return kind.empty if node is None else eval(ast.unparse(node), {"__builtins__": {}})

    return inspect.Signature(
        [
            kind(argument.arg, how, default=default(node))
            for how, names, defaults in groups
            for argument, node in zip(names, defaults, strict=True)
        ]
    )


@functools.cache
def documented() -> dict[str, tuple[inspect.Signature, str, list[str]]]:
    """Key -> (signature, title line, aliases) from the catalogue."""
    found = {}
    sections = re.split(r"^### `(\w+)`\n", CATALOGUE.read_text(), flags=re.M)[1:]
    for key, text in zip(sections[::2], sections[1::2], strict=True):
        title, code, rest = re.match(r"(.*?)\n```python\n(.*?)```(.*)", text, re.S).groups()
        aliases = re.search(r"Alias(?:es)?: ((?:`\w+`(?:, )?)+)", rest)
        names = re.findall(r"`(\w+)`", aliases[1]) if aliases else []
        found[key] = signature_of(code), title, names
    return found


@pytest.mark.skipif(not CATALOGUE.exists(), reason="the catalogue is not beside the repository")
@pytest.mark.parametrize("key", KEYS)
def test_signature_is_the_catalogues(key):
    signature, title, aliases = documented()[key]
    bare = [
        parameter.replace(annotation=inspect.Parameter.empty)
        for parameter in inspect.signature(objectives.get(key)).parameters.values()
    ]
    assert inspect.Signature(bare) == signature
    assert list(lookup(key).aliases) == aliases
    papers = re.findall(r"arXiv:\d+\.\d+", title)
    if papers:  # "the same, ..." names none
        assert re.findall(r"arXiv:\d+\.\d+", lookup(key).paper) == papers


def test_table():
    assert objectives.get("sigmoid") is objectives.get("dpo")
    assert sum(map(len, objectives.families().values())) == len(KEYS)
    with pytest.raises(
        ValueError,
        match=r"^objective: expected one of .*available.*, got 'dppo'; close to it: .*\bdpo\b",
    ):
        objectives.get("dppo")
    with pytest.raises(
        ValueError, match=r"^dpo: expected hyperparameters among beta.*, got betta$"
    ):
        objectives.get("dpo", betta=1.0)
    with pytest.raises(ValueError, match=r"^family: expected one of .*, got 'pear'"):
        objectives.available("pear")
    bound = objectives.get("dpo", beta=0.3)
    assert bound.__name__ == "dpo"
    assert inspect.signature(bound).parameters["beta"].default == 0.3
    assert "beta: a number in (0, inf)" in objectives.get("dpo").__doc__


def test_missing_and_conflicting_quantities():
    a = torch.zeros(2)
    with pytest.raises(TypeError, match="rejected_logratios"):
        objectives.get("dpo")(chosen_logratios=a)
    with pytest.raises(
        ValueError, match=r"^label_smoothing: expected 0 with soft_labels, got 0.1$"
    ):
        objectives.get("dpo")(a, a, soft_labels=a, label_smoothing=0.1)
    with pytest.raises(ValueError, match=r"^old_token_logps, .*mask: expected all three"):
        objectives.get("rloo_advantages")(a, a.long(), beta=0.1)
    x = torch.zeros(1, 2)
    with pytest.raises(ValueError, match=r"^floor: expected at most cap = 1.0, got 2.0$"):
        objectives.get("sampler_is_weights")(x, x, x.bool(), cap=1.0, floor=2.0)


def test_running_means_may_be_tensors():
    a, delta = torch.ones(2), torch.tensor(0.3)
    bco = objectives.get("bco_pair")
    assert torch.equal(bco(a, a, delta=delta), bco(a, a, delta=delta.item()))
    with pytest.raises(ValueError, match=r"^beta: expected a number"):
        bco(a, a, beta=delta)


def test_running_means_are_constants():
    """A mean of this batch's own rewards, too: the gradient is that of a number."""
    x, labels = torch.tensor([1.0, 2.0], requires_grad=True), torch.ones(2)
    mean = (0.1 * x).mean()
    found = [objectives.get("bco")(x, labels, delta=m).sum() for m in (mean, mean.item())]
    assert torch.equal(*(torch.autograd.grad(rows, x)[0] for rows in found))
    tokens, mask = torch.zeros(1, 2, requires_grad=True), torch.ones(1, 2)
    count = mask.sum().requires_grad_()
    objectives.get("dapo", num_tokens=count)(tokens, mask, x[:1]).sum().backward()
    assert count.grad is None
