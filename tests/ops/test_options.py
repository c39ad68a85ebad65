"""Options of a wrong type are refused by every primitive that has them, by name, and unread."""

from __future__ import annotations

import inspect
import itertools
from fractions import Fraction

import numpy as np
import pytest
import torch
from _primitives import PRIMITIVES, H, V

import fastpo
from fastpo.ops.shards.gathered import HeadOptions

TENSOR = torch.tensor(1.0)
# Options of numbers, and which of these values are none of theirs.
NOT_A_NUMBER = ("1", True, np.True_, 1j, [1.0], np.ones(1), TENSOR, float("inf"), 10**400)
NOT_WHOLE = ("1GB", True, 1.5, 2**70, TENSOR, (1,))
NUMBERS = {
    "temperature": "a finite number > 0",
    "softcap": "a finite number > 0 or None",
    "logit_scale": "a finite number",
    "beta": r"a number in \[0, 1\]",
    "alpha": "a finite number",
    "teacher_temperature": "a finite number > 0",
    "teacher_softcap": "a finite number > 0 or None",
    "teacher_logit_scale": "a finite number",
}
WHOLE = {
    "budget": "bytes >= 0 or None",
    "ignore_index": "an integer or None",
    "first": "an integer",
    "vocab": "an integer",
}
FLAGS = ("teacher_grad", "tail", "own_tokens", "accumulate")
PER_TOKEN = ("linear_logps", "multi_head_logps", "vocab_parallel_logps")
PER_TOKEN += ("linear_divergence", "vocab_parallel_divergence")
WRONG = {
    **dict.fromkeys(NUMBERS.items(), NOT_A_NUMBER),
    **dict.fromkeys(WHOLE.items(), NOT_WHOLE),
    **{(name, "True or False"): ("yes", 1, None, TENSOR) for name in FLAGS},
    ("outputs", "a tuple of "): [None, "logps", {"logps"}, ("logps", []), TENSOR, ("what",), ()],
    ("kind", "one of forward_kl"): [None, 1, ["jsd"], TENSOR],
    ("backend", ""): [1, ["cpu"], True, TENSOR, np.ones(2)],
}
FUNCTIONS = {name: getattr(fastpo, name) for name in PRIMITIVES if name != "fastpo"}
FUNCTIONS["fastpo"] = HeadOptions
CASES = [
    (name, option, expected)
    for name, (option, expected) in itertools.product(PRIMITIVES, WRONG)
    if option in inspect.signature(FUNCTIONS[name]).parameters
]


@pytest.mark.parametrize(("name", "option", "expected"), CASES)
def test_a_wrong_type_is_a_value_error_by_name(name, option, expected, mesh):
    call = PRIMITIVES[name]
    leaves = call.leaves()
    for value in WRONG[option, expected]:
        if value is TENSOR and "temperature" in option and name in PER_TOKEN:
            continue
        with pytest.raises(ValueError, match=f"^{option}: expected {expected}.*, got "):
            call.outputs(leaves, **{option: value})
    if option in ("temperature", "logit_scale", "beta", "alpha", "vocab"):
        with pytest.raises(ValueError, match=f"^{option}: expected {expected}, got None"):
            call.outputs(leaves, **{option: None})


def test_a_tensor_is_told_why():
    leaves = PRIMITIVES["linear_logps"].leaves()
    with pytest.raises(ValueError, match=r"softcap: .* got a tensor; pass the number itself"):
        fastpo.linear_logps(
            leaves["hidden"], leaves["weight"], leaves["labels"], softcap=TENSOR.to("meta")
        )


@pytest.mark.parametrize("name", ["linear_topk", "linear_topk_divergence", "mixed_linear_logps"])
def test_one_temperature_is_for_all_tokens(name):
    call, each = PRIMITIVES[name], torch.ones(2, 3)
    with pytest.raises(ValueError, match=r"temperature: .* of shape \(2, 3\); here one number is"):
        call.outputs(call.leaves(), temperature=each)


def test_numbers_of_other_libraries_are_numbers():
    call = PRIMITIVES["linear_logps"]
    expected = call.gradients(call.leaves(), temperature=0.5, softcap=4.0, budget=100)
    options = {"temperature": np.float32(0.5), "softcap": Fraction(4), "budget": np.int64(100)}
    found = call.gradients(call.leaves(), ignore_index=np.int64(-100), **options)
    for x, y in zip(found, expected, strict=True):
        assert torch.equal(x, y)


def test_fractions_where_a_sampler_kept_words_and_of_a_list():
    x, options = PRIMITIVES["linear_logps"].leaves(), {"temperature": Fraction(1, 2)}
    operands, labels = (x["hidden"], x["weight"]), x["labels"]
    kept = {"support": labels.clamp_min(0).unsqueeze(-1), "softcap": Fraction(4)}
    found = fastpo.linear_logps(*operands, labels, **kept, **options).logps
    assert found.isfinite().all()
    fastpo.linear_topk(*operands, 2).sample(**options)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"biases": 1.0}, "biases: expected 2 entries"),
        ({"softcaps": (1.0,)}, "softcaps: expected 2 entries"),
        ({"logit_scales": ("x", 1.0)}, "logit_scale: expected a finite number, got 'x'"),
        ({"coefficients": 0.5}, "coefficients: expected a sequence"),
        ({"coefficients": (0.5, "x")}, "coefficients: expected 2 finite numbers, got 'x'"),
        ({"coefficients": (0.5, True)}, "coefficients: expected 2 finite numbers, got True"),
        ({"coefficients": (0.5, TENSOR)}, "coefficients: expected 2 finite numbers, got a tensor"),
        ({"hiddens": 1.0}, "hiddens: expected a sequence"),
        ({"hiddens": torch.zeros(2, 3, H)}, "hiddens: expected a sequence"),
        ({"weights": 1.0}, "weights: expected a sequence"),
        ({"weights": [torch.zeros(V, H), None]}, "head 1: weight: expected a tensor, got None"),
    ],
)
def test_a_mixture_takes_lists(change, message):
    given = {
        "hiddens": [torch.zeros(3, H)] * 2,
        "weights": [torch.zeros(V, H)] * 2,
        "coefficients": (0.5, 0.5),
        "labels": torch.zeros(3, dtype=torch.int64),
    }
    with pytest.raises(ValueError, match=f"^{message}"):
        fastpo.mixed_linear_logps(**given | change)


class Read(dict):
    """Remembers what is asked for."""

    def __init__(self, *given) -> None:
        super().__init__(*given)
        self.names: list[str] = []

    def __getitem__(self, name: str) -> torch.Tensor:
        self.names.append(name)
        return super().__getitem__(name)


@pytest.mark.parametrize("name", [name for name in PRIMITIVES if name != "fastpo"])
def test_tensors_are_tensors(name, mesh):
    call = PRIMITIVES[name]
    read = Read(call.leaves())
    call.outputs(read)
    assert {"hidden"} < set(read.names)
    for argument in read.names:
        for value in ([1.0], np.ones(3)):
            with pytest.raises(ValueError, match=r": expected a tensor, got (\[1|array)"):
                call.outputs(call.leaves() | {argument: value})


@pytest.mark.parametrize("name", PRIMITIVES)
def test_hidden_states_have_a_width(name, mesh):
    call = PRIMITIVES[name]
    leaves = call.leaves()
    for key in ("hidden", "weight", "other_hidden", "other_weight", "weights"):
        leaves[key] = leaves[key].detach()[..., :0]
    with pytest.raises(ValueError, match=r"hidden: expected H >= 1, got shape \(\d, 0\)"):
        call.outputs(leaves)


@pytest.mark.parametrize("k", [True, 1.0, "1", None, TENSOR, 0, V + 1])
def test_k_is_a_whole_number(k):
    with pytest.raises(ValueError, match=r"^k: expected an integer in \[1, 37\], got "):
        fastpo.linear_topk(torch.zeros(3, H), torch.zeros(V, H), k)


@pytest.mark.parametrize("temperature", [None, "1", True, TENSOR, 0])
def test_a_sample_has_a_temperature(temperature):
    topk = fastpo.linear_topk(torch.zeros(3, H), torch.zeros(V, H), 2)
    with pytest.raises(ValueError, match=r"^temperature: expected a finite number > 0, got "):
        topk.sample(temperature=temperature)


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        *(("tokens", value, "an integer >= 0") for value in ("8", True, 1.5, TENSOR, None)),
        *(("vocab", value, "an integer >= 1") for value in ("8", True, 1.5, TENSOR, None)),
        *(("hidden", value, "an integer >= 1") for value in ("8", True, 1.5, TENSOR, None)),
        *(("budget", value, "bytes >= 0 or None") for value in NOT_WHOLE),
        ("train_head", "yes", "True or False"),
        ("train_hidden", 1, "True or False"),
    ],
)
def test_a_plan_has_the_same_rules(name, value, expected):
    with pytest.raises(ValueError, match=f"^{name}: expected {expected}, got "):
        fastpo.plan(**{"tokens": 8, "vocab": 16, "hidden": 4} | {name: value})
