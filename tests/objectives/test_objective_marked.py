"""Labels, scores and groups that nobody may wait for, as on a GPU: what is wrong becomes NaN."""

import math
from functools import partial

import pytest
import torch
from _objective_truth import make_inputs

from fastpo.objectives import _math, available, get
from fastpo.objectives._quantities import DIFFERENTIABLE
from fastpo.objectives._registry import entry_of, quantities_of

GROUPS = torch.tensor([0, 0, 1, 1, 1])
TAKES = {key: quantities_of(get(key)) for key in available()}
LABELS = [k for k, q in TAKES.items() if "labels" in q and "groups" not in q]
COMPARED = [k for k, q in TAKES.items() if {"scores", "groups"} <= q.keys()]
GROUPED = [k for k, q in TAKES.items() if "groups" in q]


def problem(key):
    objective = get(key)
    q = make_inputs(objective, seed=1, N=5, B=5) | {"labels": torch.tensor([1, 0, 1, 0, 1])}
    q = {n: x for n, x in (q | {"groups": GROUPS}).items() if n in TAKES[key]}
    if key == "maxmin_rm":  # one reward for each head
        q |= {n: x[:, None] * torch.tensor([1.0, -2.0]) for n, x in q.items() if n != "groups"}
    q = {n: x.requires_grad_() if n in DIFFERENTIABLE else x for n, x in q.items()}
    return partial(objective, num_groups=2) if "groups" in q else objective, q


@pytest.fixture
def called(monkeypatch):
    """Calls an objective as a device would be: no value is read."""
    monkeypatch.setattr(_math, "can_be_read", lambda x: False)
    return lambda function, q: function(**q)


def gradients(rows, q):
    rows = rows["advantages"] if isinstance(rows, dict) else rows
    leaves = [x for x in q.values() if x.requires_grad]
    return rows, torch.autograd.grad(rows.sum(), leaves, allow_unused=True) if leaves else ()


@pytest.mark.parametrize("key", [*LABELS, *GROUPED])
def test_what_is_right_stays_as_it_is(key, called):
    function, q = problem(key)
    torch.testing.assert_close(called(function, q), function(**q), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("key", LABELS)
def test_a_label_that_is_none(key, called):
    function, q = problem(key)
    for wrong in (-1, 2):
        q["labels"] = torch.tensor([1, 0, wrong, 0, 1])
        rows, into = gradients(called(function, q), q)
        assert rows.isnan().tolist() == [False, False, True, False, False]
        assert any(g is not None and g[2].isnan().all() for g in into)
    q["labels"] = torch.tensor([1, 0, math.nan, 0, 1])
    assert called(function, q).isnan().tolist() == [False, False, True, False, False]


@pytest.mark.parametrize("key", [k for k in GROUPED if "labels" in TAKES[k]])
def test_a_label_that_is_none_in_a_group(key, called):
    function, q = problem(key)
    q["labels"] = torch.tensor([1, -1, 1, 0, 1])
    assert called(function, q).isnan().all()


@pytest.mark.parametrize("key", COMPARED)
def test_a_score_that_is_not_known(key, called):
    function, q = problem(key)
    q["scores"] = q["scores"].detach().index_fill(0, torch.tensor(3), math.nan)
    rows, into = gradients(called(function, q), q)
    if entry_of(get(key)).family == "transforms":  # there it is no reward, and counts in no mean
        assert rows.isfinite().all()
        assert rows[3] == 0
        return
    assert rows.isnan().all()
    assert all(g.isnan().any() for g in into)


@pytest.mark.parametrize("key", GROUPED)
@pytest.mark.parametrize("groups", [[0, 1, 0, 1, 1], [1, 1, 0, 0, 0]])
def test_groups_that_do_not_rise(key, groups, called):
    function, q = problem(key)
    rows, _ = gradients(called(function, q | {"groups": torch.tensor(groups)}), q)
    assert rows.isnan().all()


def test_a_candidate_that_is_none(called):
    q = {"label_logits": torch.randn(3, 4), "label_ids": torch.tensor([3, 4, -1])}
    rows = called(get("restricted_ce"), q)
    assert rows.isnan().tolist() == [False, True, True]


@pytest.mark.parametrize(
    ("key", "name", "given"),
    [
        ("kto", "labels", [1, 0, -1, 0, 1]),
        ("knowpat", "scores", [1.0, math.nan, 1.0, 0.0, 2.0]),
        ("infonca", "groups", [0, 1, 0, 1, 1]),
    ],
)
def test_in_a_compiled_function(key, name, given):
    """Of any number of groups, too."""
    torch.compiler.reset()
    whole = torch.compile(get(key), backend="eager", fullgraph=True, dynamic=True)
    _, q = problem(key)
    for count in (2, 3) if "groups" in q else (None,):
        options = {} if count is None else {"num_groups": count}
        torch.testing.assert_close(whole(**q, **options), get(key)(**q, **options))
        assert whole(**q | {name: torch.tensor(given)}, **options).isnan().any()


def test_candidates_in_a_compiled_function():
    torch.compiler.reset()
    whole = torch.compile(get("restricted_ce"), backend="eager", fullgraph=True, dynamic=True)
    for words in (4, 5):
        rows = whole(torch.randn(2, words), torch.tensor([words, words - 1]))
        assert rows.isnan().tolist() == [True, False]
