"""What is done to lazy logits word by word runs a few rows at a time once it is reduced."""

from __future__ import annotations

import pytest

pytest.importorskip("transformers")

import torch
import torch.nn.functional as F
from _probes import Widest
from _tiny import one_thread  # noqa: F401
from torch import nn
from torch.distributions import Categorical, kl_divergence
from torch.utils.checkpoint import checkpoint

from fastpo.integrations.lazy import blocks, cell
from fastpo.integrations.lazy.logits import LazyLogits, promised
from fastpo.integrations.lazy.promise import Promise
from fastpo.testing import assert_as_good_as_eager, rounding

B, T, H, V = 3, 19, 8, 97
ROWS = 2  # in a block
LABELS = torch.randint(0, V, (B, T), generator=torch.Generator().manual_seed(1))
MASK = torch.rand(B, T, generator=torch.Generator().manual_seed(2)) < 0.6
WEIGHTS = torch.linspace(0.5, 2.0, V)


@pytest.fixture(autouse=True)
def blocks_of_two_rows(monkeypatch):
    monkeypatch.setattr(blocks, "BYTES", {"cpu": 4 * V * ROWS})
    monkeypatch.setattr(cell, "told", set())


def entropy(x):
    logps = x.log_softmax(-1)
    return -(logps.exp() * logps).sum(-1)


def entropy_by_lse(x):
    p = torch.softmax(x, dim=-1)
    return torch.logsumexp(x, dim=-1) - torch.sum(p * x, dim=-1)


def entropy_of_chunks(x):
    parts = x.view(-1, V).split(3)
    return torch.cat([entropy(part) for part in parts])


def collision(x):
    return x.softmax(-1).square().sum(-1).log()


def kl(x, y):
    p, q = x.log_softmax(-1), y.log_softmax(-1)
    return (p.exp() * (p - q)).sum(-1)


def kl_of_some(x, y):
    p, q = x.log_softmax(-1), y.log_softmax(-1)
    return torch.mul(torch.sub(p, q)[MASK], x.softmax(-1)[MASK]).sum(-1)


def kl_div_of_some(x, y):
    """In the other direction, to probabilities, as a distillation has it."""
    each = F.kl_div(x.log_softmax(-1), y.softmax(-1), reduction="none")
    return each.sum(-1)[MASK] + each[MASK].sum(dim=-1)


def from_mixture(x, y, beta=0.3):
    """Of other weights than TRL's GKD has, which a walk knows."""
    p, q = F.log_softmax(x / 0.9, dim=-1), F.log_softmax(y / 0.9, dim=-1)
    b = torch.tensor(beta, dtype=p.dtype)
    mixture = torch.logsumexp(torch.stack([p + torch.log1p(-b), q + torch.log(b)]), dim=0)
    to_p = F.kl_div(mixture, p, reduction="none", log_target=True)
    to_q = F.kl_div(mixture, q, reduction="none", log_target=True)
    return ((1 - b) * to_q + b * to_p)[MASK].sum() / MASK.sum()


def mean_of_two(x, y):
    p, q = x.softmax(-1), y.softmax(-1)
    m = (0.5 * (p + q)).log()
    return 0.5 * F.kl_div(m, p, reduction="batchmean") + 0.5 * F.kl_div(m, q, reduction="sum")


def filled(x, y):
    z = x * 1.5
    z[y < 0] = 0.25
    z.masked_fill_((x > 1).expand(B, -1, V), -3.0)
    return (z.square() * y).sum(-1)


def own_weights(x):
    scale = torch.linspace(0.5, 1.5, T, requires_grad=True)
    return (x * scale[:, None]).log_softmax(-1).square().mean(-1)


def weighed(x, **options):
    return F.cross_entropy(x.view(-1, V), LABELS.view(-1), weight=WEIGHTS.to(x.dtype), **options)


def nll(x, **options):
    return F.nll_loss(
        F.log_softmax(x, -1).view(-1, V), LABELS.view(-1), WEIGHTS.to(x.dtype), **options
    )


def turned(x, of=F.cross_entropy, **options):
    """[B, V, T], as the documentation of PyTorch has it."""
    return of(x.transpose(1, 2), LABELS, **options)


ONE = {
    "entropy": entropy,
    "entropy_by_lse": entropy_by_lse,
    "entropy_of_chunks": entropy_of_chunks,
    "categorical": lambda x: Categorical(logits=x).entropy(),
    "categorical_logps": lambda x: Categorical(logits=x / 0.7).log_prob(LABELS),
    "collision": collision,
    "top": lambda x: x.softmax(-1).max(dim=-1).values,
    "greatest": lambda x: x.amax(-1, keepdim=True) - x.amin(dim=[2], keepdim=True),
    "spread": lambda x: x.std(-1) + x.var(dim=-1, unbiased=False),
    "most": lambda x: (x.softmax(-1) * WEIGHTS).topk(3, -1).values,
    "picked": lambda x: torch.sigmoid(x).gather(-1, LABELS[..., None]).squeeze(-1),
    "taken": lambda x: torch.take_along_dim(x.square(), LABELS[..., None], dim=-1),
    "all_of_it": lambda x: x.exp().mean() + x.square().sum() * 0.01 + x.nansum(),
    "counted": lambda x: (x > x.mean(-1, keepdim=True)).sum(-1).float() * x.logsumexp(-1),
    "clamped": lambda x: x.clamp(min=-1, max=1).mean(-1),
    "rows_masked": lambda x: (x.masked_fill(~MASK[..., None], 0.0)).square().sum(-1),
    "where": lambda x: torch.where(MASK[..., None], x, x * 2).logsumexp(-1),
    "double": lambda x: x.double().log_softmax(-1).square().sum(-1).float(),
    "of_some": lambda x: entropy(x)[MASK] + entropy(x[MASK]),
    "some_of_it": lambda x: (x.softmax(-1) * x)[:, 1:].flatten(0, 1).sum(-1),
    "row_weights": own_weights,
    "class_weights": weighed,
    "class_weights_summed": lambda x: weighed(x, reduction="sum", label_smoothing=0.1),
    "class_weights_smoothed": lambda x: weighed(x, label_smoothing=0.2),
    "nll": nll,
    "nll_ignoring": lambda x: nll(x, ignore_index=int(LABELS[0, 0]), reduction="none"),
    "turned": turned,
    "turned_one_by_one": lambda x: turned(x, reduction="none", ignore_index=int(LABELS[0, 0])),
    "turned_weights": lambda x: turned(x, weight=WEIGHTS.to(x.dtype), reduction="sum"),
    "turned_nll": lambda x: turned(x.log_softmax(-1), of=F.nll_loss, reduction="none"),
    "turned_smoothed": lambda x: (
        F.cross_entropy(x.permute(0, 2, 1), LABELS, label_smoothing=0.1)
        + F.cross_entropy((x * WEIGHTS).movedim(-1, 1), LABELS)
    ),
    "row_by_row": lambda x: torch.stack([torch.logsumexp(row, -1) for row in x]),
    "one_text": lambda x: entropy(x[0]),
    "joined": lambda x: entropy(torch.cat([x[1:], x[:1]])),
    "joined_along": lambda x: torch.cat([x[:, 5:], x[:, :3]], dim=1).logsumexp(-1),
    "biased": lambda x: (x + WEIGHTS[None]).log_softmax(-1).square().sum(-1),
    "words_masked": lambda x: x.masked_fill(WEIGHTS.view(1, 1, V) > 1, -9.0).exp().sum(-1),
    "z_loss": lambda x: (x - x.logsumexp(-1, keepdim=True)).square().mean(),
    "checkpointed": lambda x: checkpoint(entropy, x, use_reentrant=False),
}
TWO = {
    "kl": kl,
    "kl_div": lambda x, y: F.kl_div(
        x.log_softmax(-1), y.log_softmax(-1), reduction="batchmean", log_target=True
    ),
    "kl_of_some": kl_of_some,
    "kl_div_of_some": kl_div_of_some,
    "from_mixture": from_mixture,
    "mean_of_two": mean_of_two,
    "distance": lambda x, y: (x - y).abs().sum(-1),
    "kl_divergence": lambda x, y: kl_divergence(
        Categorical(logits=x - 200 * (WEIGHTS > 1.9)), Categorical(logits=y)
    ),
    "filled": filled,
}


def made(lazy, dtype=torch.float32, seeds=(0,), low=torch.float32):
    """Logits of several heads in dtype, of values in `low`, and the leaves."""
    logits, leaves = [], []
    for seed in seeds:
        torch.manual_seed(seed)
        head = nn.Linear(H, V).to(low).to(dtype)
        hidden = (2 * torch.randn(B, T, H)).to(low).to(dtype).requires_grad_()
        logits.append(promised(Promise.of(head, hidden)) if lazy else head(hidden))
        leaves += [hidden, *head.parameters()]
    return logits, leaves


def results(read, lazy, dtype=torch.float32, seeds=(0,), low=torch.float32):
    logits, leaves = made(lazy, dtype, seeds, low)
    found = read(*logits)
    assert not isinstance(found, LazyLogits)
    weights = torch.linspace(0.5, 1.5, found.numel()).view(found.shape)
    grads = torch.autograd.grad((found * weights).sum(), leaves)
    return [found.detach(), *grads]


# These ask log-probabilities or log-sum-exps, too, whose walk has tiles of its own.
WALKED = {"entropy", "entropy_by_lse", "entropy_of_chunks", "of_some", "one_text", "joined"}
WALKED |= {"categorical", "categorical_logps", "counted", "row_by_row", "z_loss", "checkpointed"}
WALKED |= {"joined_along", "kl", "kl_div", "kl_div_of_some", "kl_divergence"}
WALKED |= {"turned", "turned_one_by_one", "turned_smoothed"}
CASES = [(name, read, (0,)) for name, read in ONE.items()]
CASES += [(name, read, (0, 3)) for name, read in TWO.items()]


@pytest.mark.parametrize(("name", "read", "seeds"), CASES, ids=[name for name, *_ in CASES])
def test_values_gradients_and_memory(name, read, seeds):
    with Widest() as widest:
        found = results(read, True, seeds=seeds)
    truth = results(read, False, torch.float64, seeds)
    for ours, eager, exact in zip(found, results(read, False, seeds=seeds), truth, strict=True):
        # Sums over many small blocks.
        slack = rounding(exact, torch.float32)
        assert_as_good_as_eager(name, ours, eager, exact, factor=4, slack=slack)
    assert not cell.told
    if name not in WALKED:
        assert widest.elements <= max(H * V, 2 * B * T * H) < B * T * V // 5


@pytest.mark.parametrize("read", [entropy, entropy_by_lse])
def test_an_entropy_is_a_walk_over_the_words(read, monkeypatch):
    monkeypatch.setattr(blocks, "_Blocks", None)
    test_values_gradients_and_memory("entropy_by_lse", read, (0,))


@pytest.mark.parametrize("name", ["kl", "kl_div", "kl_div_of_some"])
def test_a_kl_is_a_walk_over_the_words(name, monkeypatch):
    monkeypatch.setattr(blocks, "_Blocks", None)
    test_values_gradients_and_memory(name, TWO[name], (0, 3))


def test_one_head_twice_is_joined():
    """Chosen and rejected through one head: one walk over the words."""
    head, x, y = nn.Linear(H, V), *torch.randn(2, B, T, H).requires_grad_().unbind()
    joined = torch.cat([promised(Promise.of(head, h)) for h in (x, y)])
    assert joined._cell.promise.base.weight is head.weight
    expected = head(torch.cat([x, y])).logsumexp(-1)
    torch.testing.assert_close(joined.logsumexp(-1), expected)
    ours, own = (
        torch.autograd.grad(z.sum(), head.weight) for z in (joined.logsumexp(-1), expected)
    )
    torch.testing.assert_close(ours, own)


@pytest.mark.parametrize("read", [collision, lambda x: x.softmax(-1).max(-1).values])
def test_autocast(read):
    """Casts of the forward hold in the backward, which runs outside."""

    def cast(x):
        with torch.autocast("cpu", torch.bfloat16):
            return read(x)

    low = torch.bfloat16
    found, eager = (results(cast, lazy, low, low=low) for lazy in (True, False))
    assert [x.dtype for x in found] == [x.dtype for x in eager]
    torch.testing.assert_close(found, eager, rtol=0.05, atol=0.05)


def test_bfloat16_sums_weight_gradients_in_float32():
    """One rounding, however many blocks there are."""
    low = torch.bfloat16
    for ours, eager, truth in zip(
        *(results(collision, lazy, low, low=low) for lazy in (True, False)),
        results(collision, False, torch.float64, low=low),
        strict=True,
    ):
        assert_as_good_as_eager("it", ours, eager, truth)


def test_logits_scaled_in_place_stay_a_promise():
    """GRPO of TRL 1.0 divides by the temperature so."""
    for read in (entropy, lambda x: x.logsumexp(-1)):
        found = []
        for lazy in (True, False):
            (logits,), leaves = made(lazy)
            part = logits[:, 1:]
            part.div_(0.7).mul_(3)
            out = read(part)
            found.append((out, *torch.autograd.grad(out.sum(), leaves)))
        torch.testing.assert_close(*found, rtol=1e-4, atol=1e-5)
    assert not cell.told


@pytest.mark.parametrize("read", [entropy, lambda x: x.cumsum(-1)[..., -1], turned])
@pytest.mark.parametrize("shape", [(B, 1, 1), (T, 1)])
def test_logits_scaled_in_place_by_rows_stay_lazy(read, shape):
    """A temperature of each text, which may learn; materialised where something asks for it."""
    found = []
    for lazy in (True, False):
        (logits,), leaves = made(lazy)
        by = torch.linspace(0.5, 1.5, sum(shape) - len(shape) + 1).view(shape).requires_grad_()
        scaled = logits.div_(by * 2)
        assert scaled is logits
        logits.mul_(by)
        out = read(logits)
        found.append((out, *torch.autograd.grad(out.sum(), (*leaves, by))))
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-5)
    assert len(cell.told) == (read not in (entropy, turned))


def test_another_view_of_logits_scaled_in_place_is_not_read():
    (logits,), _ = made(True)
    rows = logits.view(-1, V)
    logits.div_(0.7)
    with pytest.raises(RuntimeError, match="expected no change in place through another view"):
        rows.logsumexp(-1)


def test_turned_logits_share_their_memory():
    logits = promised(Promise.of(nn.Linear(H, V), torch.randn(B, T, H)))
    turned = logits.transpose(1, 2)
    logits.div_(0.7)
    with pytest.raises(RuntimeError, match="expected no change in place through another view"):
        F.cross_entropy(turned, LABELS)
    logits.transpose(1, 2).mul_(2.0)
    with pytest.raises(RuntimeError, match="expected no change in place through another view"):
        logits.logsumexp(-1)


def test_turned_logits_are_real_for_anything_else():
    head, hidden = nn.Linear(H, V), torch.randn(B, T, H, requires_grad=True)
    found, expected = (
        x.transpose(1, 2) for x in (promised(Promise.of(head, hidden)), head(hidden))
    )
    assert found.shape == expected.shape
    for read in (lambda x: x.softmax(1).square().sum(1), lambda x: x[0], lambda x: x.sum(-1)):
        torch.testing.assert_close(read(found) + 0, read(expected))
    ours, own = (torch.autograd.grad(x.square().sum(), hidden) for x in (found, expected))
    torch.testing.assert_close(ours, own)


def test_what_was_made_of_logits_stays_when_they_change():
    (logits,), _ = made(True)
    (real,), _ = made(False)
    p, own = logits.log_softmax(-1).exp(), real.log_softmax(-1).exp()
    logits.mul_(3.0)
    real.mul_(3.0)
    torch.testing.assert_close(p.sum(-1), own.sum(-1))
    torch.testing.assert_close(p.cumsum(-1), own.cumsum(-1))
    torch.testing.assert_close(entropy(logits), entropy(real))


def test_what_was_made_of_logits_changes_in_place():
    (logits,), _ = made(True)
    (real,), _ = made(False)
    for x in (logits, real):
        p = x.softmax(-1)
        p.clamp_(min=1e-2)
        x.made = p.log().sum(-1)
    torch.testing.assert_close(logits.made, real.made)


def test_a_hook_sees_the_gradient():
    seen = []
    for lazy in (True, False):
        (logits,), leaves = made(lazy)
        logits.register_hook(lambda grad: seen.append(grad) or 2 * grad)
        torch.autograd.grad(entropy(logits).sum(), leaves)
    torch.testing.assert_close(*seen)


def test_an_expression_is_not_computed_twice():
    (logits,), _ = made(True)
    p = logits.softmax(-1)
    first, second = p.cumsum(-1), p.cumprod(-1)
    assert p._cell.values is not None and first.shape == second.shape
    assert {name for name, _ in cell.told} == {"cumsum", "cumprod"}


def test_where_it_happens_is_said(caplog):
    (logits,), _ = made(True)
    logits.cumsum(-1)
    assert __file__ in caplog.text and "cumsum" in caplog.text


@pytest.mark.parametrize("trained", [None, 0, 1])
def test_sides_without_gradient_are_walked_too(trained, monkeypatch):
    """A frozen teacher beside its student, and what is only logged."""
    monkeypatch.setattr(blocks, "_Blocks", None)

    def read(lazy):
        with torch.no_grad():
            frozen, _ = made(lazy, seeds=(0, 3))
        logits, _ = made(lazy, seeds=(0, 3))
        x, y = (logits[i] if i == trained else frozen[i] for i in range(2))
        return entropy(x) + entropy_by_lse(y) + kl(x, y)

    found = read(True)
    assert found.requires_grad == (trained is not None)
    torch.testing.assert_close(found, read(False))


def test_heads_that_change_before_the_backward_are_an_error():
    (logits,), (_, weight, _) = made(True)
    loss = collision(logits).sum()
    with torch.no_grad():
        weight.mul_(2)
    with pytest.raises(RuntimeError, match="expected to be read before"):
        loss.backward()
