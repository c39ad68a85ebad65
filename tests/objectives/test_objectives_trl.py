"""Against TRL's own code: its loss methods run on a stub that hands them our log-probabilities.

Nothing of TRL is transcribed and no model is built. Where TRL's formula overflows, the value and
gradient of ours are shown to be finite beside its NaN.
"""

from collections import defaultdict
from functools import partial
from types import SimpleNamespace

import pytest
import torch

from fastpo import quantities
from fastpo.objectives import compose, get

pytest.importorskip("trl", minversion="1.15")  # before, loss methods build logits
dpo_trainer = pytest.importorskip("trl.trainer.dpo_trainer")
kto_trainer = pytest.importorskip("trl.trainer.kto_trainer")

B, T = 5, 7
at = partial(get, beta=0.1)
DPO = {
    "sigmoid": at("dpo"),
    "hinge": at("hinge"),
    "ipo": at("ipo_norm"),
    "exo_pair": at("exo_pair", label_smoothing=0.2),
    "nca_pair": at("nca_pair"),
    "robust": at("robust_dpo", label_smoothing=0.2),
    "bco_pair": at("bco_pair"),
    "sppo_hard": at("sppo_hard"),
    "aot": at("aot", label_smoothing=0.2),
    "aot_unpaired": at("aot_unpaired", label_smoothing=0.2),
    "apo_zero": at("apo_zero"),
    "apo_down": at("apo_down"),
    "discopop": at("discopop", tau=0.3),
    "sft": get("sft"),
    "sigmoid_norm": at("dpo_norm"),
}
DIFFERENCE = ["sigmoid", "hinge", "ipo", "exo_pair", "robust", "discopop", "sft", "sigmoid_norm"]


def statistics(seed: int = 0, rows: int = 2 * B, spread: float = 1.0):
    """(policy, reference) token statistics [rows, T] and their mask, as TRL's fused head gives."""
    g = torch.Generator().manual_seed(seed)
    mask = torch.rand(rows, T, generator=g) < 0.7
    mask[0], mask[:, 0] = True, True

    def one() -> SimpleNamespace:
        logps = -spread * torch.rand(rows, T, generator=g) * mask
        squares = -torch.rand(rows, T, generator=g)
        return SimpleNamespace(logps=logps, log_sum_sq_probs=squares, entropy=None)

    return one(), one(), mask


def stub(**settings) -> SimpleNamespace:
    """What a trainer's loss method reads from itself, on one process and without a model."""
    same = lambda x: x  # noqa: E731
    accelerator = SimpleNamespace(device="cpu", gather=same, gather_for_metrics=same)
    model = torch.nn.Module().eval()
    model.is_gradient_checkpointing = False
    defaults = {
        "aux_loss_enabled": False,
        "precompute_ref_logps": False,
        "_metrics": {"eval": defaultdict(list)},
        "_total_train_tokens": 0,
        "args": SimpleNamespace(gradient_checkpointing_kwargs=None, discopop_tau=0.3),
    }
    return SimpleNamespace(accelerator=accelerator, model=model, **{**defaults, **settings})


def head(stats, mask):
    """A model whose fused head returns these statistics."""
    output = SimpleNamespace(
        log_probs=torch.where(mask, stats.logps, 0),
        log_sum_sq_probs=stats.log_sum_sq_probs,
        entropy=torch.zeros(mask.shape),
        mean_logits=torch.zeros(mask.shape),
        is_top1=mask,
    )
    return lambda **_: output


def batch(mask):
    """input_ids with one prompt token in front; TRL shifts the mask by one."""
    completion = torch.cat([torch.zeros(len(mask), 1, dtype=torch.bool), mask], 1).long()
    ids = torch.zeros_like(completion)
    return {"input_ids": ids, "attention_mask": ids + 1, "completion_mask": completion}


def trl_dpo(policy, reference, mask, loss_type, **settings):
    options = {
        "loss_types": [loss_type],
        "loss_weights": [1.0],
        "beta": 0.1,
        "label_smoothing": 0.2,
        "ld_alpha": None,
        "f_divergence_type": "reverse_kl",
        "f_alpha_divergence_coef": 0.5,
        "use_weighting": False,
        "ref_model": head(reference, mask),
        **settings,
    }
    trainer = stub(**options)
    method = dpo_trainer.DPOTrainer._compute_loss
    return method(trainer, head(policy, mask), batch(mask), False)


def value_and_gradient(loss, leaf):
    return loss.detach(), torch.autograd.grad(loss, leaf, retain_graph=True)[0]


def agree(ours, theirs, leaf):
    """The batch losses and their gradients in every token's log-probability are equal."""
    got, expected = value_and_gradient(ours, leaf), value_and_gradient(theirs, leaf)
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


def agree_on_dpo(objective, loss_type, policy, reference, mask, **settings):
    leaf = policy.logps.requires_grad_()
    rows = quantities.padded(policy, mask, ref=reference).rows(objective)
    agree(rows.mean(), trl_dpo(policy, reference, mask, loss_type, **settings), leaf)


@pytest.mark.parametrize("loss_type", DPO)
@pytest.mark.parametrize("spread", [0.3, 5.0])
def test_dpo_loss_types(loss_type, spread):
    agree_on_dpo(DPO[loss_type], loss_type, *statistics(1, spread=spread))


@pytest.mark.parametrize("loss_type", DIFFERENCE)
@pytest.mark.parametrize(
    ("name", "transform"),
    [
        ("forward_kl", partial(get("f_divergence"), divergence="forward_kl")),
        ("js_divergence", partial(get("f_divergence"), divergence="js")),
        ("alpha_divergence", partial(get("f_divergence"), divergence="alpha", alpha=0.7)),
    ],
)
def test_f_divergences(loss_type, name, transform):
    settings = {"f_divergence_type": name, "f_alpha_divergence_coef": 1 - 0.7}
    agree_on_dpo(compose(DPO[loss_type], transform), loss_type, *statistics(2), **settings)


@pytest.mark.parametrize("loss_type", sorted(DPO.keys() - {"sft", "ipo", "sigmoid_norm"}))
def test_ld_dpo(loss_type):
    transform = get("ld_logps", ld_alpha=0.3)
    agree_on_dpo(compose(DPO[loss_type], transform), loss_type, *statistics(3), ld_alpha=0.3)


# TRL 1.16 multiplies in place, which breaks its own hinge (relu's output) and sft (an expand).
@pytest.mark.parametrize("loss_type", sorted(DPO.keys() - {"aot", "aot_unpaired", "hinge", "sft"}))
def test_wpo(loss_type):
    objective = compose(DPO[loss_type], "wpo_weights")
    agree_on_dpo(objective, loss_type, *statistics(4), use_weighting=True)


def test_sum_of_losses():
    """MPO: a weighted sum of means."""
    policy, reference, mask = statistics(5)
    leaf = policy.logps.requires_grad_()
    weights = {"sigmoid": 0.8, "bco_pair": 0.2, "sft": 1.0}
    q = quantities.padded(policy, mask, ref=reference)
    ours = sum(weight * q.rows(DPO[name]).mean() for name, weight in weights.items())
    settings = {"loss_types": list(weights), "loss_weights": list(weights.values())}
    agree(ours, trl_dpo(policy, reference, mask, "", **settings), leaf)


@pytest.mark.parametrize(
    ("loss_type", "key"), [("kto", "kto"), ("apo_zero_unpaired", "kto_apo_zero")]
)
@pytest.mark.parametrize("good", [0, 2, B])
def test_kto(loss_type, key, good):
    policy, reference, mask = statistics(6, rows=B)
    leaf = policy.logps.requires_grad_()
    labels, kl = torch.arange(B) < good, torch.tensor([0.4, -0.1, 0.3])
    weights = {"desirable_weight": 0.7, "undesirable_weight": 1.3}
    method = kto_trainer.KTOTrainer._compute_loss
    trainer = stub(
        beta=0.1,
        loss_type=loss_type,
        calculate_KL=loss_type == "kto",
        precompute_ref_logps=True,
        _compute_kl_logps=lambda model, batch: kl if loss_type == "kto" else None,
        **weights,
    )
    columns = {
        "label": labels,
        "ref_logps": (reference.logps * mask).sum(-1),
        "ref_KL_logps": 0 * kl,
    }
    theirs = method(trainer, head(policy, mask), {**batch(mask), **columns}, False)
    q = quantities.padded(policy, mask, sides=quantities.SINGLES, ref=reference)
    rows = (q | {"labels": labels, "kl_logratios": kl}).rows(at(key, **weights))
    agree(rows.mean(), theirs, leaf)


@pytest.mark.parametrize("loss_type", ["sigmoid", "hinge", "ipo", "simpo"])
def test_cpo(loss_type):
    cpo_trainer = pytest.importorskip("trl.experimental.cpo.cpo_trainer")
    policy, _, mask = statistics(7)
    leaf = policy.logps.requires_grad_()
    free = {"reference_free": True}
    objective = {
        "sigmoid": at("cpo", cpo_alpha=0.0, label_smoothing=0.1),
        "hinge": compose(at("hinge"), **free),
        "ipo": compose(at("ipo_norm"), **free),
        "simpo": at("simpo", gamma=0.5, label_smoothing=0.1),
    }[loss_type]
    smoothing = {"label_smoothing": 0.1, "simpo_gamma": 0.5, "alpha": 0.0}
    trainer = stub(loss_type=loss_type, beta=0.1, **smoothing)
    q = quantities.padded(policy, mask)
    c, r = q["chosen_logps"], q["rejected_logps"]
    if loss_type in ("ipo", "simpo"):
        c, r = c / q["chosen_lengths"], r / q["rejected_lengths"].clamp(min=1)
    theirs = cpo_trainer.CPOTrainer.cpo_loss(trainer, c, r)[0]
    agree(q.rows(objective).mean(), theirs.mean(), leaf)


def test_orpo():
    orpo_trainer = pytest.importorskip("trl.experimental.orpo.orpo_trainer")
    policy, _, mask = statistics(8)
    leaf = policy.logps.requires_grad_()
    q = quantities.padded(policy, mask)
    c = q["chosen_logps"] / q["chosen_lengths"]
    r = q["rejected_logps"] / q["rejected_lengths"]
    ratio = orpo_trainer.ORPOTrainer.odds_ratio_loss(stub(beta=0.1), c, r)[0]
    agree(q.rows(at("orpo")).mean(), -c.mean() - ratio.mean(), leaf)


def overflow(**columns):
    """One pair of one token each, with the given log-probabilities under policy and reference."""
    names = ("chosen", "rejected", "ref_chosen", "ref_rejected")
    c, r, c0, r0 = (torch.tensor([[columns.get(name, -1.0)]]) for name in names)

    def stats(*sides):
        return SimpleNamespace(logps=torch.cat(sides), log_sum_sq_probs=None, entropy=None)

    return stats(c, r), stats(c0, r0), torch.ones(2, 1, dtype=torch.bool)


def finite(loss, leaf) -> bool:
    return all(bool(x.isfinite().all()) for x in value_and_gradient(loss, leaf))


@pytest.mark.parametrize(
    ("objective", "loss_type", "columns", "settings"),
    [
        (
            compose(at("dpo"), partial(get("f_divergence"), divergence="forward_kl")),
            "sigmoid",
            {"chosen": -100.0, "rejected": -100.0},
            {"f_divergence_type": "forward_kl"},
        ),
        (get("discopop", beta=1.0, tau=0.3), "discopop", {"chosen": -120.0}, {"beta": 1.0}),
    ],
)
def test_trl_overflows_and_we_do_not(objective, loss_type, columns, settings):
    policy, reference, mask = overflow(**columns)
    leaf = policy.logps.requires_grad_()
    options = {"ref_model": head(reference, mask), **settings}
    assert not finite(trl_dpo(policy, reference, mask, loss_type, **options), leaf)
    assert finite(quantities.padded(policy, mask, ref=reference).rows(objective).mean(), leaf)


def test_trl_sft_on_nothing():
    policy, reference, mask = overflow()
    mask[0] = False
    leaf = policy.logps.requires_grad_()
    assert not finite(trl_dpo(policy, reference, mask, "sft"), leaf)
    ours = quantities.padded(policy, mask).rows(get("sft")).mean()
    assert [x.abs().sum().item() for x in value_and_gradient(ours, leaf)] == [0.0, 0.0]


def test_trl_orpo_at_certainty():
    orpo_trainer = pytest.importorskip("trl.experimental.orpo.orpo_trainer")
    c, r = torch.zeros(1, requires_grad=True), torch.tensor([-1.0])
    ratio = orpo_trainer.ORPOTrainer.odds_ratio_loss(stub(beta=0.1), c, r)[0]
    assert not finite(ratio.mean(), c)
    one = torch.ones(1, dtype=torch.int64)
    assert finite(get("orpo")(c, r, one, one).mean(), c)


def test_trl_average_of_an_empty_completion():
    """CPO and SimPO divide by the length; theirs is 0/0."""
    cpo_trainer = pytest.importorskip("trl.experimental.cpo.cpo_trainer")
    logits, labels = torch.zeros(1, 3, 4), torch.full((1, 3), -100)
    average = cpo_trainer.CPOTrainer.get_batch_logps(logits, labels, average_log_prob=True)
    assert average.isnan().all()
    c, r = torch.zeros(1, requires_grad=True), torch.tensor([-1.0])
    lengths = torch.zeros(1, dtype=torch.int64)
    assert finite(get("simpo")(c, r, lengths, lengths + 1).mean(), c)
