"""A temperature of each token's own: as if every token had been scored by itself."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from _draws import assert_draws
from _pair_problem import make_factors
from _pair_problem import make_problem as make_pair
from _primitives import BACKENDS
from _row_problem import Problem, fold, make_problem

import fastpo
from fastpo import reference
from fastpo.ops.rows import backend as R
from fastpo.ops.rows import registry
from fastpo.ops.rows.pair import backend as P
from fastpo.testing import make_head

# Powers of two: multiplied in one order or another, they round alike.
INVERSE = torch.tensor([0.5, 1.0, 4.0, 2.0], dtype=torch.float64)
MAPS = {"scaled": R.LogitMap(logit_scale=-1.3), "softcap": R.LogitMap(softcap=5.0)}
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
TOKENS = 40


def of_row(problem: Problem, row: int) -> Problem:
    """That row alone, its temperature the map's."""
    own = replace(problem.logit_map, inverse=None, temperature=1 / INVERSE[row].item())
    tiles = [tile[row : row + 1] for tile in problem.tiles]
    return Problem(tiles, problem.labels[row : row + 1], problem.bias, own)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("logit_map", MAPS)
@pytest.mark.parametrize("kept", DTYPES)
def test_row_kernels_know_the_temperature_of_each_row(backend, logit_map, kept):
    kernels = registry.kernels(backend)
    problem = make_problem(4, 64, replace(MAPS[logit_map], inverse=INVERSE), seed=1)
    together = fold(kernels, problem, kept=kept, fold_cap=True)
    for row in range(4):
        alone = fold(kernels, of_row(problem, row), kept=kept, fold_cap=True)
        assert torch.equal(together.state[:, row], alone.state[:, 0])
        for name in ("kept", "anchors"):
            for all_rows, one in zip(getattr(together, name), getattr(alone, name), strict=True):
                assert torch.equal(all_rows[row], one[0]), name


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("logit_map", MAPS)
@pytest.mark.parametrize("entropy", [False, True])
@pytest.mark.parametrize("source", ["products", "kept"])
def test_their_gradients_do_too(backend, logit_map, entropy, source):
    kernels = registry.kernels(backend)
    problem = make_problem(4, 64, replace(MAPS[logit_map], inverse=INVERSE), tiles=1, seed=2)
    folded = fold(kernels, problem, kept=torch.float32)
    mass = folded.state[R.OTHERS] + 1
    numbers = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
    grads = torch.cat((torch.stack((folded.state[R.MAX], mass.log())), numbers))

    def turned(own: Problem, rows: slice) -> torch.Tensor:
        out = torch.empty_like(own.tiles[0])
        kept = source == "kept"
        kernels.backward(
            folded.kept[0][rows] if kept else own.tiles[0].clone(),
            folded.anchors[0][rows] if kept else None,
            0,
            own.labels,
            own.bias,
            grads[:, rows],
            own.logit_map,
            entropy,
            out,
        )
        return out

    together = turned(problem, slice(0, 4))
    for row in range(4):
        alone = turned(of_row(problem, row), slice(row, row + 1))
        assert torch.equal(together[row], alone[0])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("logit_map", MAPS)
def test_pair_kernels_know_the_temperatures_of_each_head(backend, logit_map):
    kernels = registry.pair_kernels(backend)
    inverses = INVERSE, INVERSE.flip(0)
    own = tuple(replace(MAPS[logit_map], inverse=x) for x in inverses)
    problem, rule = make_pair(4, 64, own, tiles=1, seed=3), P.Rule.of("jsd", 0.3, 0.5)
    constants, factors = torch.zeros(P.CONSTANTS, 4), make_factors(4)

    def run(sides, rows):
        n = len(sides[0].tile)
        state = torch.tensor(P.INITIAL_STATE).unsqueeze(1).repeat(1, n)
        sums = torch.zeros(P.SUMS, n, dtype=torch.float64)
        outs = torch.empty_like(sides[0].tile), torch.empty_like(sides[1].tile)
        kernels.softmaxes(sides, 0, state, 0, True)
        kernels.values(sides, 0, constants[:, rows], rule, sums)
        kernels.gradients(sides, 0, constants[:, rows], factors[:, rows], rule, outs)
        return *state, *sums, *outs

    together = run(problem.sides(0, "cpu"), slice(0, 4))
    for row in range(4):
        alone = tuple(
            P.Side(
                side.tile[row : row + 1],
                side.bias,
                replace(side.logit_map, inverse=None, temperature=1 / inverse[row].item()),
            )
            for side, inverse in zip(problem.sides(0, "cpu"), inverses, strict=True)
        )
        for all_rows, one in zip(together, run(alone, slice(row, row + 1)), strict=True):
            assert torch.equal(all_rows[row], one[0])


def temperatures(shape: tuple[int, ...], seed: int) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) * 2 + 0.3


@pytest.mark.parametrize("backend", [b for b in BACKENDS if b not in ("anchored", "cutlass")])
@pytest.mark.parametrize("mode", ["keep", "lean", "frozen"])
@pytest.mark.parametrize("softcap", [None, 6.0])
def test_logps_and_gradients_match_the_twin(backend, mode, softcap):
    names = ("logps", "entropy", "lse", "mean_logits", "is_top1")

    def run(problem, dtype, seed, fused):
        x = problem.like(dtype)
        if mode == "frozen":
            x.weight.requires_grad_(False), x.bias.requires_grad_(False)
        options = {"bias": x.bias, "temperature": temperatures((TOKENS,), seed).to(dtype)}
        options |= {"softcap": softcap, "logit_scale": 0.8}
        if fused:
            options |= {"backend": backend, "outputs": names}
            options |= {"budget": 0 if mode == "lean" else None}
        score = fastpo.linear_logps if fused else reference.linear_logps
        stats = score(x.hidden, x.weight, x.labels, **options)
        g = torch.linspace(-1, 2, TOKENS, dtype=dtype)
        loss = stats.logps * g
        if mode != "frozen":  # of log-probabilities alone the forward makes d hidden
            loss = loss + stats.entropy * g.flip(0) + stats.lse
        loss.sum().backward()
        found = {name: getattr(stats, name) for name in names}
        return found | {name: leaf.grad for name, leaf in x.leaves().items()}

    def draw(seed):
        problem = make_head(TOKENS, 67, 16, bias=True, ignored=0.2, seed=seed)
        return (
            run(problem, torch.float32, seed, fused=True),
            run(problem, torch.float32, seed, fused=False),
            run(problem, torch.float64, seed, fused=False),
        )

    assert_draws(draw(seed) for seed in range(3 if backend == "triton" else 4))


@pytest.mark.parametrize("kind", P.KINDS)
def test_a_divergence_has_them_on_either_side(kind):
    own, theirs = temperatures((3, 5), 1), temperatures((5,), 2)

    def run(dtype, fused):
        student, teacher = (make_head(15, 40, 8, seed=i).like(dtype) for i in range(2))
        found = (fastpo if fused else reference).linear_divergence(
            student.hidden.view(3, 5, 8),
            student.weight,
            teacher.hidden.view(3, 5, 8),
            teacher.weight,
            kind=kind,
            temperature=own.to(dtype),
            teacher_temperature=theirs.expand(3, 5).to(dtype),
            **({"teacher_grad": True} if fused else {}),
        )
        found.divergence.sum().backward()
        grads = {"student": student.hidden.grad, "teacher": teacher.hidden.grad}
        return {"divergence": found.divergence, "dweight": student.weight.grad, **grads}

    assert_draws([(run(torch.float32, True), run(torch.float32, False), run(torch.float64, False))])


def test_one_number_is_the_same_as_a_tensor_of_it():
    x = make_head(9, 30, 8, bias=True, ignored=0.2).like(torch.float32)
    plain = fastpo.linear_logps(x.hidden, x.weight, x.labels, bias=x.bias, temperature=0.5)
    for shape in ((), (1,), (9,)):
        tempered = torch.full(shape, 0.5)
        own = fastpo.linear_logps(x.hidden, x.weight, x.labels, bias=x.bias, temperature=tempered)
        assert torch.equal(plain.logps, own.logps)


def test_every_token_of_several_heads_keeps_its_own():
    x = make_head(9, 30, 8)
    weight, heads = torch.stack((x.weight, x.weight * 0.5)), torch.arange(9) % 2
    own = temperatures((9,), 3)
    found = fastpo.multi_head_logps(x.hidden, weight, x.labels, heads, temperature=own).logps
    for i in range(9):
        row = slice(i, i + 1)
        alone = fastpo.linear_logps(
            x.hidden[row], weight[i % 2], x.labels[row], temperature=own[row]
        )
        assert torch.equal(found[row], alone.logps)


def test_what_stands_at_ignored_tokens_is_not_read():
    x = make_head(6, 30, 8, ignored=0.4, seed=1)
    own = temperatures((6,), 4)
    wrong = own.masked_fill(x.labels == -100, float("nan"))
    scores = [
        fastpo.linear_logps(x.hidden, x.weight, x.labels, temperature=t).logps for t in (own, wrong)
    ]
    assert torch.equal(*scores) and (x.labels == -100).any()


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (torch.tensor([1.0, 0.0, 1.0]), r"finite numbers > 0, got 0\.0 at token \(1,\)"),
        (torch.tensor([1.0, 1.0, -2.0]), r"finite numbers > 0, got -2\.0 at token \(2,\)"),
        (torch.tensor(float("inf")), r"finite numbers > 0, got inf at token \(0,\)"),
        (torch.ones(2), r"a shape that broadcasts to \(3,\), got \(2,\)"),
        (torch.ones(1, 3), r"a shape that broadcasts to \(3,\), got \(1, 3\)"),
        (
            torch.ones(3, dtype=torch.int64),
            "floating-point numbers without gradient, got torch.int64",
        ),
        (
            torch.ones(3, requires_grad=True),
            "floating-point numbers without gradient, got one with",
        ),
        (torch.ones(3, device="meta"), "device cpu, got meta"),
    ],
)
def test_bad_temperatures_are_refused_by_name(bad, message):
    x = make_head(3, 20, 4)
    with pytest.raises(ValueError, match=f"^temperature: expected {message}"):
        fastpo.linear_logps(x.hidden, x.weight, x.labels, temperature=bad)
    with pytest.raises(ValueError, match=f"^teacher_temperature: expected {message}"):
        fastpo.linear_divergence(
            x.hidden, x.weight, x.hidden, x.weight, kind="tvd", teacher_temperature=bad
        )


def test_the_operator_takes_them():
    x = make_head(6, 50, 8).like(torch.float32)
    arguments = (
        x.hidden, x.weight, None, x.labels, temperatures((6,), 5), 1.0, None, 1.0, -100, "logps",
        torch.float32, "torch", True, True, None, True,
    )  # fmt: skip
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(torch.ops.fastpo.linear_logps.default, arguments, test_utils=checks)


def test_one_graph_holds_them():
    x = make_head(6, 50, 8).like(torch.float32)
    own = temperatures((6,), 6)

    def loss(hidden, weight, own):
        logps = fastpo.linear_logps(hidden * 2, weight, x.labels, temperature=own).logps
        found = fastpo.linear_divergence(
            hidden, weight, hidden * 0.5, weight, kind="reverse_kl", teacher_temperature=own
        )
        return (logps - found.divergence).sum()

    given = x.hidden, x.weight, own
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*given), loss(*given))
    wrong = own.masked_fill(torch.arange(6) == 2, -1.0)
    assert compiled(x.hidden, x.weight, wrong).isnan()
