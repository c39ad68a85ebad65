"""Every function that the documentation calls fused is; it lists all that the code knows."""

from __future__ import annotations

import re
from functools import partial
from pathlib import Path

import pytest

pytest.importorskip("transformers")

import torch
import torch.nn.functional as F
from torch import nn

from fastpo.integrations.lazy import blocks, cell
from fastpo.integrations.lazy.calls import REWRITES, SCALES
from fastpo.integrations.lazy.expressions import ANSWERS
from fastpo.integrations.lazy.functions import FUNCTIONS
from fastpo.integrations.lazy.logits import LazyLogits, promised
from fastpo.integrations.lazy.promise import Promise

PAGE = Path(__file__).parents[3] / "docs" / "lazy-logits.md"
B, T, H, V = 2, 3, 4, 11
IDS = torch.arange(B * T).view(B, T, 1)
MASK = torch.tensor([True, False, True])[:, None]
IN_PLACE = SCALES | REWRITES


def listed():
    text = PAGE.read_text(encoding="utf-8").split("<!-- fused -->")[1].split("<!-- end of")[0]
    return set(re.findall(r"`(\w+)`", text))


def known():
    """Names in the code; an operator counts as the function it is."""
    named = {getattr(func, "__name__", "") for func in (*FUNCTIONS, *ANSWERS)}
    named = {"logsigmoid" if name == "log_sigmoid" else name for name in named}
    named = {name.removeprefix("special_") for name in named}
    return {name for name in named if name and not name.startswith("__")} | IN_PLACE


def test_the_page_lists_what_the_code_knows():
    assert listed() == known()


WITH = {
    "view": (-1, V), "reshape": (B, T, V), "flatten": (0, 1), "chunk": (2,), "split": (1,),
    "unsqueeze": (0,), "squeeze": (0,), "index_select": (1, torch.tensor([0, 2])),
    "to": (torch.float64,), "type_as": (torch.ones((), dtype=torch.float64),), "pow": (2,),
    "add": (1.5,), "sub": (0.5,), "subtract": (0.5,), "rsub": (1.0,), "mul": (MASK * 2.0,),
    "multiply": (MASK * 2.0,), "div": (0.7,), "divide": (0.7,), "true_divide": (0.7,),
    "maximum": (torch.tensor(0.1),), "minimum": (torch.tensor(0.1),), "clamp": (-1, 1),
    "clip": (-1, 1), "clamp_min": (0.0,), "clamp_max": (0.0,), "masked_fill": (~MASK, 0.0),
    "xlogy": (torch.tensor(2.0),), "logaddexp": (torch.ones(V),), "softmax": (-1,),
    "log_softmax": (-1,), "topk": (3,), "gather": (-1, IDS), "take_along_dim": (IDS, -1),
    **dict.fromkeys(("eq", "ne", "lt", "le", "gt", "ge"), (0.0,)),
    **dict.fromkeys(("nansum", "logsumexp", "max", "min", "var", "std", "count_nonzero"), (-1,)),
    **dict.fromkeys(("sum", "mean", "amax", "amin", "argmax", "argmin", "prod"), (-1,)),
    **dict.fromkeys(("any", "all", "var_mean", "std_mean"), (-1,)), "lerp": (torch.ones(V), 0.3),
    "expand": (B, -1, V), "expand_as": (torch.ones(B, T, V),),
    **dict.fromkeys(IN_PLACE, (0.5,)),
}  # fmt: skip
TURNS = {"transpose": (1, 2), "swapaxes": (1, -1), "swapdims": (2, 1)}
TURNS |= {"permute": ((0, 2, 1),), "movedim": (-1, 1), "moveaxis": (1, -1)}
LISTS = {"cat", "concat", "concatenate"}
BOOLEAN = {"logical_and", "logical_or", "bitwise_and", "bitwise_or"}
CALLS = {
    "where": lambda x: torch.where(MASK, x, 0.0),
    "masked_fill_": lambda x: (2 * x).masked_fill_(x > 0, 0.5),
    "bitwise_not": lambda x: torch.bitwise_not(x > 0),
    "entr": lambda x: torch.special.entr(x.softmax(-1)),
    "expit": torch.special.expit,
    "broadcast_tensors": lambda x: torch.broadcast_tensors(x, torch.ones(()))[0],
    "stack": lambda x: torch.stack([x, 2 * x]).logsumexp(0),
    "kl_div": lambda x: F.kl_div(x.log_softmax(-1), x.softmax(-1), reduction="sum"),
    "cross_entropy": lambda x: F.cross_entropy(x.view(-1, V), IDS.view(-1), torch.ones(V)),
    "nll_loss": lambda x: F.nll_loss(x.log_softmax(-1).view(-1, V), IDS.view(-1)),
    **{name: partial(lambda f, x: f([x[:1], x[1:]]), getattr(torch, name)) for name in LISTS},
    **{name: partial(lambda f, x: f(x > 0, x < 1), getattr(torch, name)) for name in BOOLEAN},
}


def call(name, x):
    if name in TURNS:
        return F.cross_entropy(getattr(torch, name)(x, *TURNS[name]), IDS.squeeze(-1))
    if name in CALLS:
        return CALLS[name](x)
    if hasattr(torch.Tensor, name):
        return getattr(x, name)(*WITH.get(name, ()))
    return getattr(F, name, getattr(torch, name, None))(x, *WITH.get(name, ()))


def tensors(found):
    return list(found) if isinstance(found, tuple | list) else [found]


@pytest.mark.parametrize("name", sorted(listed()))
def test_it_is_fused(name, monkeypatch):
    monkeypatch.setattr(blocks, "BYTES", {"cpu": 1, "cuda": 1})
    monkeypatch.setattr(cell, "told", set())
    torch.manual_seed(0)
    head, hidden = nn.Linear(H, V), torch.randn(B, T, H, requires_grad=True)
    found = tensors(call(name, promised(Promise.of(head, hidden))))
    # What is still of all words is read by a sum of them.
    found = [x.sum(-1) if isinstance(x, LazyLogits) else x for x in found]
    assert not cell.told
    expected = tensors(call(name, head(hidden)))
    expected = [
        x.sum(-1) if x.shape[-1:] == (V,) and x.shape != own.shape else x
        for x, own in zip(expected, found, strict=True)
    ]
    low = name in ("half", "bfloat16")  # sums are in float32, of exact logits
    torch.testing.assert_close(
        found, expected, check_dtype=not low, rtol=0.02 if low else 1e-4,
        atol=0.02 if low else 1e-5, equal_nan=True,
    )  # fmt: skip
