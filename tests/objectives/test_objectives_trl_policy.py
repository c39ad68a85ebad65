"""Policy gradients against TRL's own code: its loss methods on a stub that hands them our numbers.

Nothing of TRL is transcribed and no model is built. Nash-MD left TRL with 1.14, and TRL has no
"sequence_token" level.
"""

import math
from collections import defaultdict
from functools import partial
from types import SimpleNamespace

import pytest
import torch

from fastpo.objectives import compose, get

GRPO = pytest.importorskip("trl.trainer.grpo_trainer").GRPOTrainer
RLOO = pytest.importorskip("trl.trainer.rloo_trainer").RLOOTrainer
GMPO = pytest.importorskip("trl.experimental.gmpo.gmpo_trainer").GMPOTrainer

N, T, PROCESSES, TOKENS = 5, 7, 2, 60
WINDOW = {"num_tokens": torch.tensor(TOKENS / PROCESSES)}
OWN = {"dr_grpo": {"max_length": 11}, "dapo": WINDOW, "cispo": WINDOW, "vespo": WINDOW}
CLIPPED = ("grpo", "bnpo", "dr_grpo", "dapo", "luspo")
LOSS_TYPES = (*CLIPPED, "cispo", "sapo", "vespo")
ARGS = {
    "delta": None,
    "use_bias_correction_kl": False,
    "sapo_temperature_pos": 1.0,
    "sapo_temperature_neg": 1.05,
    "vespo_k_pos": 2.0,
    "vespo_lambda_pos": 3.0,
    "vespo_k_neg": 3.0,
    "vespo_lambda_neg": 2.0,
}


def quantities(seed: int = 0, spread: float = 1.0):
    """One batch; its first row is scored everywhere, its last nowhere."""
    g = torch.Generator().manual_seed(seed)

    def uniform(scale: float = spread):
        return scale * torch.rand(N, T, generator=g)

    mask = torch.rand(N, T, generator=g) < 0.7
    mask[0], mask[-1] = True, False
    return {
        "token_logps": -uniform().requires_grad_(),
        "mask": mask,
        "advantages": torch.randn(N, generator=g),
        "old_token_logps": -uniform(),
        "ref_token_logps": -uniform(),
        "entropy": uniform(2.0).requires_grad_(),
        "is_weights": 0.5 + uniform(1.0),
    }


def stub(q, **settings) -> SimpleNamespace:
    """What a trainer's loss method reads from itself, on one of two processes, not training."""
    same = lambda x, **_: x  # noqa: E731
    statistics = q["token_logps"], q["entropy"], None
    calls = dict.fromkeys(("gather", "reduce", "pad_across_processes"), same)
    accelerator = SimpleNamespace(num_processes=PROCESSES, **calls)
    defaults = {
        "model": torch.nn.Module().eval(),
        "_metrics": {"eval": defaultdict(list)},
        "_get_per_token_logps_and_entropies": lambda *_, **__: statistics,
        "get_high_entropy_mask": lambda *args: GRPO.get_high_entropy_mask(trainer, *args),
        "get_off_policy_mask": GRPO.get_off_policy_mask,
        "get_gamma_weights": GRPO.get_gamma_weights,
        "top_entropy_quantile": 1.0,
        "off_policy_mask_threshold": None,
        "importance_sampling_level": "token",
        "epsilon_low": 0.2,
        "epsilon_high": 0.2,
        "beta": 0.0,
        "entropy_coef": 0.0,
        "max_completion_length": 11,
        "use_vllm": False,
        "vllm_importance_sampling_correction": True,
        "use_adaptive_entropy": False,
        "aux_loss_enabled": False,
    }
    options = {**ARGS, **{name: settings.pop(name) for name in ARGS if name in settings}}
    trainer = SimpleNamespace(accelerator=accelerator, **{**defaults, **settings})
    trainer.args = SimpleNamespace(**options)
    trainer._entropy_bonus_enabled = trainer.entropy_coef != 0
    return trainer


def theirs(q, method=GRPO._compute_loss, **settings):
    """TRL's batch loss; the reference and vLLM's ratio are read where the settings ask."""
    prompt = torch.ones(N, 1, dtype=torch.long)
    columns = {
        "prompt_ids": prompt,
        "prompt_mask": prompt,
        "completion_ids": q["mask"].long(),
        "completion_mask": q["mask"].long(),
        "advantages": q["advantages"],
        "old_per_token_logps": q.get("old_token_logps"),
        "ref_per_token_logps": q["ref_token_logps"],
        "num_items_in_batch": torch.tensor(TOKENS),
    }
    if settings.get("use_vllm"):
        # TRL's vLLM ratio is 1 where a token is not scored: its logs are zeroed by the mask.
        columns["importance_sampling_ratio"] = torch.where(q["mask"], q["is_weights"], 1)
    return method(stub(q, **settings), None, columns)


def agree(objective, loss, q, *leaves, needs=()):
    """The batch losses, and their gradients in the leaves, are equal."""
    names = {"token_logps", "mask", "advantages", "old_token_logps", *needs}
    ours = objective(**{name: x for name, x in q.items() if name in names}).mean()
    torch.testing.assert_close(ours, loss, rtol=1e-5, atol=1e-6)
    leaves = [q[name] for name in leaves or ("token_logps",)]
    for one, other in zip(*(torch.autograd.grad(x, leaves) for x in (ours, loss)), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


def ours_and_settings(loss_type, *, level="token", **options):
    """The objective of a loss type with TRL's defaults, and its settings over there."""
    own = {**OWN.get(loss_type, {}), **options}
    settings = {"loss_type": loss_type, "importance_sampling_level": level}
    if loss_type != "vespo":
        own["level"] = level
    if loss_type in CLIPPED:
        own |= {"epsilon_low": 0.2, "epsilon_high": 0.2}
    if loss_type == "cispo":
        own["max_ratio"] = settings["epsilon_high"] = 1.3
    names = {"unbiased_kl": "use_bias_correction_kl"}
    settings |= {names.get(name, name): value for name, value in options.items()}
    return get(loss_type, **own), settings


LEVELS = [(key, level) for key in LOSS_TYPES for level in ("token", "sequence")]
LEVELS.remove(("vespo", "sequence"))


@pytest.mark.parametrize(("loss_type", "level"), LEVELS)
@pytest.mark.parametrize("seed", [1, 2])
def test_loss_types(loss_type, level, seed):
    q = quantities(seed)
    objective, settings = ours_and_settings(loss_type, level=level)
    agree(objective, theirs(q, **settings), q)


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_on_policy(loss_type):
    q = quantities(3)
    del q["old_token_logps"]
    objective, settings = ours_and_settings(loss_type)
    agree(objective, theirs(q, **settings), q)


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
@pytest.mark.parametrize("unbiased_kl", [False, True])
def test_kl_and_entropy(loss_type, unbiased_kl):
    q = quantities(4)
    options = {"beta": 0.3, "unbiased_kl": unbiased_kl, "entropy_coef": 0.2}
    objective, settings = ours_and_settings(loss_type, **options)
    needs = ("ref_token_logps", "entropy")
    agree(objective, theirs(q, **settings), q, "token_logps", "entropy", needs=needs)


@pytest.mark.parametrize("loss_type", CLIPPED)
def test_delta(loss_type):
    q = quantities(5, spread=3.0)
    objective, settings = ours_and_settings(loss_type, delta=1.5)
    agree(objective, theirs(q, **settings), q)


WIDTHS = [(key, width) for key in LOSS_TYPES for width in (1, T)]
WIDTHS.remove(("vespo", 1))  # TRL has no sequence modes of vLLM's correction there


@pytest.mark.parametrize(("loss_type", "width"), WIDTHS)
def test_sampler_weights(loss_type, width):
    q = quantities(6)
    q["is_weights"] = q["is_weights"][:, :width]
    objective, settings = ours_and_settings(loss_type)
    agree(objective, theirs(q, use_vllm=True, **settings), q, needs=("is_weights",))


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_masks(loss_type):
    """Off-policy and entropy masks are transforms here."""
    q = quantities(7)
    objective, settings = ours_and_settings(loss_type)
    masked = compose(objective, partial(get("high_entropy_mask"), top=0.4))
    agree(masked, theirs(q, top_entropy_quantile=0.4, **settings), q, needs=("entropy",))
    # Without vLLM TRL's sampler is the old policy.
    kept = compose(objective, partial(get("off_policy_mask"), threshold=0.1))
    q["sampler_token_logps"] = q["old_token_logps"]
    expected = theirs(q, off_policy_mask_threshold=0.1, **settings)
    agree(kept, expected, q, needs=("sampler_token_logps",))


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_masks_beside_sampler_weights(loss_type):
    """A mask is a factor in VESPO, too, where the sampler's weights are in the log-ratio.

    There TRL counts weights of masked tokens as well: 1 here, for a product with 0 keeps none.
    """
    q = quantities(11)
    objective, settings = ours_and_settings(loss_type)
    kept = get("high_entropy_mask", top=0.4)(q["entropy"], q["mask"])["is_weights"]
    q["is_weights"] = torch.where(kept > 0, q["is_weights"], 1)
    loss = theirs(q, use_vllm=True, top_entropy_quantile=0.4, **settings)
    both = {**q, "is_weights": kept * q["is_weights"]}
    agree(objective, loss, both, needs=("is_weights",))


@pytest.mark.parametrize("threshold", [-0.1, 0.0, 0.1])
def test_an_unknown_log_probability_drops_no_row(threshold):
    q = quantities(12)
    logps, mask, advantages = q["token_logps"], q["mask"], -q["advantages"].abs()
    sampler = q["old_token_logps"].masked_fill(torch.arange(N * T).view(N, T) % 3 == 0, math.nan)
    ours = get("off_policy_mask", threshold=threshold)(logps, sampler, mask, advantages)
    expected = GRPO.get_off_policy_mask(advantages[:, None], logps, sampler, mask, threshold)
    assert torch.equal(ours["is_weights"].bool(), expected)


@pytest.mark.parametrize("on_policy", [False, True])
@pytest.mark.parametrize("beta", [0.0, 0.3])
def test_gmpo(on_policy, beta):
    q = quantities(8)
    if on_policy:
        del q["old_token_logps"]
    objective = get("gmpo", epsilon_low=0.3, epsilon_high=0.5, beta=beta)
    settings = {"epsilon_low": 0.3, "epsilon_high": 0.5, "beta": beta}
    agree(objective, theirs(q, GMPO._compute_loss, **settings), q, needs=("ref_token_logps",))


@pytest.mark.parametrize("spread", [0.1, 1.0])
def test_rloo(spread):
    q = quantities(9, spread=spread)
    settings = {"epsilon_low": 0.1, "epsilon_high": 0.3}
    old = (q["old_token_logps"] * q["mask"]).sum(-1)

    def method(trainer, model, columns):
        return RLOO._compute_loss(trainer, model, {**columns, "old_logps": old})

    agree(get("rloo", **settings), theirs(q, method, **settings), q)


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_trl_overflows_and_we_do_not(loss_type):
    """Policy and reference 100 nats apart, as in a model gone wrong: e^100 is inf in float32."""
    q = quantities(10)
    q["token_logps"] = (q["token_logps"].detach() - 100).requires_grad_()
    q["old_token_logps"] = q["token_logps"].detach()
    objective, settings = ours_and_settings(loss_type, beta=0.1)
    assert not theirs(q, **settings).isfinite()
    loss = objective(**{n: x for n, x in q.items() if n not in ("is_weights", "entropy")}).mean()
    (gradient,) = torch.autograd.grad(loss, q["token_logps"])
    assert loss.isfinite() and gradient.isfinite().all()
