"""What the fuzz tests draw: a call of a primitive, and the way it is made."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from _fuzz_calls import FLOATS, LAYOUTS, Call, Side
from hypothesis import strategies as st

from fastpo.ops.rows.pair.backend import KINDS
from fastpo.ops.walks.checks import OUTPUTS

NAMES = (
    "linear_logps",
    "linear_divergence",
    "linear_topk",
    "linear_topk_divergence",
    "mixed_linear_logps",
    "multi_head_logps",
    "vocab_parallel_logps",
    "adapted",
)
# Words of a multiple of what kernels cut by, one less and one more.
VOCABS = st.integers(1, 40) | st.sampled_from([1, 2, 63, 64, 65, 127, 128, 129, 257])
SHAPES = st.sampled_from(
    [(3,), (5,), (1,), (0,), (), (2, 3), (9,), (12,), (1, 1), (2, 0), (0, 3), (2, 1, 3), (17,)]
)
WIDTHS = st.integers(1, 9) | st.sampled_from([16, 17, 33])
TEMPERATURES = st.sampled_from([1.0, 0.7, 1.6, 8.0, 0.1]) | st.floats(0.2, 5.0)
SOFTCAPS = st.sampled_from([None, None, 5.0, 30.0, 0.5])
SCALES = st.sampled_from([1.0, 1.0, 1.3, -0.8, 0.05, 0.0])
SETS = (("logps",), OUTPUTS, ("lse",), ("entropy",), ("logps", "entropy"), OUTPUTS[2:5])
# Triton's interpreter takes a hundred times as long.
BACKENDS = st.sampled_from([None, *["cpu", "torch"] * 24, "triton"])


@dataclass(frozen=True)
class Way:
    """How a call is made.

    tiles: tokens and words of one.  autocast: a dtype and whether the backward is inside, too.
    route: what stands between the forward and the gradients.
    """

    tiles: tuple[int, int] | None
    mode: str
    autocast: tuple[str, bool] | None
    route: str
    sums: bool


ROUTES = ("once", "twice", "apart", "threads", "identity", "clone", "cpu", "checkpoint", "leaf")
TILES = st.none() | st.tuples(st.sampled_from([1, 2, 5, 64]), st.sampled_from([1, 3, 16, 64]))


@st.composite
def ways(draw: st.DrawFn, call: Call) -> Way:
    # Triton's interpreter is slow, and of one thread.
    interpreted = call.options["backend"] == "triton"
    # PyTorch itself concatenates no tensors of the other 16 bits inside autocast.
    held = {dtype for side in call.sides for dtype in side.dtypes} - {"float32"}
    fitting = [dtype for dtype in FLOATS[1:] if held <= {dtype}]
    autocast = st.none()
    if fitting:
        autocast |= st.tuples(st.sampled_from(fitting), st.booleans())
    return Way(
        tiles=None if interpreted else draw(TILES),
        mode=draw(st.sampled_from(["grad"] * 6 + ["no_grad", "inference"])),
        autocast=draw(autocast),
        route=draw(st.sampled_from([x for x in ROUTES if not (interpreted and x == "threads")])),
        sums=draw(st.booleans()),
    )


@st.composite
def side(draw: st.DrawFn, dtypes: tuple[str, ...], mixed: bool) -> Side:
    first = draw(st.sampled_from(dtypes))
    others = st.tuples(st.just(first), st.sampled_from(dtypes), st.sampled_from(dtypes))
    layouts = st.sampled_from(LAYOUTS)
    return Side(
        draw(WIDTHS),
        draw(st.just((first,) * 3) | others if mixed else st.just((first,) * 3)),
        draw(st.just(("plain",) * 3) | st.tuples(layouts, layouts, layouts)),
        draw(st.booleans()),
    )


def logit_map(of: str = "") -> dict[str, st.SearchStrategy]:
    drawn = {"temperature": TEMPERATURES, "softcap": SOFTCAPS, "logit_scale": SCALES}
    return {of + name: values for name, values in drawn.items()}


def _options(name: str, heads: int) -> dict[str, st.SearchStrategy]:
    per_head = {
        "softcaps": st.tuples(*[SOFTCAPS] * heads),
        "logit_scales": st.tuples(*[SCALES] * heads),
    }
    kinds = KINDS[:3] if name == "linear_topk_divergence" else KINDS
    divergence = {
        "kind": st.sampled_from(kinds),
        "beta": st.sampled_from([0.5, 0.1, 0.9, 0.0, 1.0]),
    }
    statistics = {
        "ignore_index": st.sampled_from([-100, None, 0, -1]),
        "outputs": st.sampled_from(SETS),
    }
    extra: dict[str, dict[str, st.SearchStrategy]] = {
        "linear_divergence": {
            **divergence,
            **logit_map("teacher_"),
            "alpha": st.sampled_from([0.5, 0.3, 1.0, 0.0, 0.9, 0.01, 1e-5, 0.999, 1 - 2e-6]),
            "masked": st.booleans(),
            "teacher_grad": st.booleans(),
            "outputs": st.sampled_from(
                [("divergence",), ("divergence", "entropy"), ("entropy", "divergence")]
            ),
        },
        "linear_topk": {"masked": st.booleans(), "excluded": st.booleans()},
        "linear_topk_divergence": {
            **divergence,
            "masked": st.booleans(),
            "tail": st.booleans(),
        },
        "mixed_linear_logps": {**statistics, **per_head, "per_token": st.booleans()},
        "vocab_parallel_logps": {**statistics, "own_tokens": st.booleans()},
    }
    found = extra.get(name, statistics)
    if name == "mixed_linear_logps":
        return {**found, "temperature": TEMPERATURES}
    return {**logit_map(), **found}


@st.composite
def calls(draw: st.DrawFn, name: str) -> Call:
    heads = draw(st.integers(1, 3)) if name == "mixed_linear_logps" else 1
    options: dict[str, Any] = draw(st.fixed_dictionaries(_options(name, heads)))
    backend = options["backend"] = draw(BACKENDS)
    # bfloat16 is wrong in Triton's interpreter itself.
    dtypes = ("float32", "float16") if backend == "triton" else FLOATS
    if backend == "triton" and "logit_scale" in options:  # its interpreter divides by it
        options["logit_scale"] = options["logit_scale"] or 1.0
    # An adapter's words join the weight in its dtype, as hidden states have it.
    one = side(dtypes, mixed=name != "adapted")
    sides = draw(st.tuples(*[one] * (2 if name == "linear_divergence" else heads)))
    shape, vocab = draw(SHAPES), draw(VOCABS)
    if name != "mixed_linear_logps":
        rows = draw(st.sampled_from([None, 0, 1, 2, 5, 99]))
        item = 8 if name == "linear_divergence" else 4
        options["budget"] = rows and rows * item * vocab + draw(st.integers(0, 3))
    if options.get("excluded") and vocab == 1:
        options["excluded"] = False
    most = vocab - options.get("excluded", False)
    leaves = {"hidden", "weight", "bias"}
    leaves |= {leaf + str(i) for leaf in leaves for i in range(1, len(sides))}
    leaves |= {"down", "up"} if name == "adapted" else set()
    some = st.sets(st.sampled_from(sorted(leaves)), max_size=len(leaves))
    return Call(
        name=name,
        shape=shape,
        vocab=vocab,
        sides=sides,
        seed=draw(st.integers(0, 2**16)),
        size=draw(st.sampled_from([1.0, 1.0, 0.0, 8.0, 100.0])),
        labels=draw(st.sampled_from(["random", "random", "first", "last"])),
        ignored=draw(st.sampled_from([0.0, 0.3, 1.0])),
        label_layout=draw(st.sampled_from(LAYOUTS[:5])),
        broken=draw(st.sampled_from([None] * 5 + [float("nan"), float("inf"), -float("inf")])),
        trained=tuple(sorted(draw(st.just(leaves) | st.just({"hidden"}) | some))),
        options=options,
        heads=draw(st.integers(1, 3)) if name == "multi_head_logps" else 1,
        listed=draw(st.integers(1, min(most, 6)) | st.just(most)),
    )
