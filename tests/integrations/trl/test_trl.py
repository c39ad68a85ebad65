"""`fastpo.patch`: TRL's trainers give the same losses, metrics and parameters, through our head."""

from __future__ import annotations

from contextlib import contextmanager
from types import SimpleNamespace

import pytest

pytest.importorskip("trl", minversion="1.15")  # the first with a fused head
pytest.importorskip("datasets")

import _tiny as tiny
import _trainers
import torch
import trl
import trl.trainer.utils as utils
from _tiny import one_thread  # noqa: F401
from trl.kernels.chunked_logprob import OPTIONAL_OUTPUTS

import fastpo
from fastpo.integrations.trl.head import COMPACT, Compact
from fastpo.ops.walks import forward as driver
from fastpo.testing import HeadInputs

GENERATION = {"num_generations": 2, "max_completion_length": 4}


def rewarded():
    return {"reward_funcs": _trainers.reward}


def lora():
    return {"peft_config": _trainers.lora()}


# name: (TRL's prefix, model, config on top, arguments of the trainer)
TRAINERS = {
    "dpo": ("DPO", "llama", {}, dict),
    "dpo_wpo": ("DPO", "llama", {"use_weighting": True}, dict),
    "dpo_lora": ("DPO", "llama", {}, lora),
    "dpo_softcap": ("DPO", "gemma2", {"loss_type": ["ipo", "sft"]}, dict),
    "dpo_scale_bias": ("DPO", "phi", {}, dict),
    "dpo_moe": ("DPO", "qwen2_moe", {}, dict),
    "dpo_precomputed": ("DPO", "llama", {"precompute_ref_log_probs": True}, dict),
    "kto": ("KTO", "llama_tied", {}, dict),
    "sft": ("SFT", "llama", {}, dict),
    "sft_dft": ("SFT", "cohere", {"loss_type": "dft"}, dict),
    "grpo": (
        "GRPO",
        "llama",
        {**GENERATION, "beta": 0.1, "temperature": 0.8, "entropy_coef": 0.1},
        rewarded,
    ),
    "gmpo": ("GMPO", "llama", GENERATION, rewarded),
    "rloo": ("RLOO", "llama", GENERATION, rewarded),
}


def train(name, folder):
    prefix, model, changes, arguments = TRAINERS[name]
    path, data = _trainers.saved(folder, model), _trainers.DATA[prefix]()
    return _trainers.train(_trainers.build(prefix, folder, path, data, changes, **arguments()))


@pytest.mark.parametrize("name", TRAINERS)
def test_trainers_train_the_same(name, tmp_path, monkeypatch):
    calls = tiny.count_calls(monkeypatch)
    own = train(name, tmp_path)
    assert not calls
    with fastpo.patched():
        ours = train(name, tmp_path)
    assert len(calls) >= 3
    _trainers.assert_same(ours, own)
    # A frozen head must take the mode that recomputes nothing.
    trained = [spec for spec in calls if spec.hidden_grad]
    assert all(spec.head_grad == (name != "dpo_lora") for spec in trained)


def fused(model, inputs, **options):
    """One call of TRL's head."""
    utils.add_fused_lm_head(model, outputs=("log_probs", *OPTIONAL_OUTPUTS), **options)
    return model(**inputs, fused_lm_head=True)


@pytest.mark.parametrize("ignored", ["some", "all"])
@pytest.mark.parametrize("name", ["gemma2", "phi"])
def test_every_output_and_gradient(name, ignored):
    inputs = tiny.batch()
    if ignored == "all":
        inputs["labels"].fill_(-100)

    def run():
        model = tiny.model(name)
        found = fused(model, inputs, temperature=0.7)
        (found.loss + found.entropy.square().mean()).backward()
        return found, {n: p.grad for n, p in model.named_parameters()}

    own, own_grads = run()
    with fastpo.patched():
        ours, grads = run()
    assert list(ours) == list(own)
    for key, value in own.items():
        torch.testing.assert_close(ours[key], value, rtol=1e-5, atol=2e-6)
    torch.testing.assert_close(grads, own_grads, rtol=1e-5, atol=2e-6)


def test_only_valid_positions_reach_the_head(monkeypatch):
    """On a CPU TRL scores all of them."""
    rows = []
    forward = driver.forward
    monkeypatch.setattr(
        driver, "forward", lambda h, *rest: rows.append(len(h)) or forward(h, *rest)
    )
    inputs = tiny.batch()
    with fastpo.patched():
        fused(tiny.model("llama"), inputs)
    assert rows == [int((inputs["labels"][:, 1:] != -100).sum())]


def test_no_logits_exist():
    words, rows, length = 6000, 10, 70
    model = tiny.model("llama", vocab_size=words)
    inputs = {"input_ids": torch.randint(0, words, (rows, length))}
    inputs["labels"] = inputs["input_ids"]
    logits = rows * (length - 1) * words

    def widest():
        with tiny.Widest() as seen:
            fused(model, inputs).loss.backward()
        return seen.elements

    assert widest() >= logits
    with fastpo.patched(budget=0):
        assert widest() <= logits * 2 // 3


def head_inputs(frozen=False):
    torch.manual_seed(0)
    hidden, weight = torch.randn(5, 8), torch.randn(40, 8)
    inputs = HeadInputs(hidden, weight, torch.randint(0, 40, (5,))).like(torch.float32)
    inputs.weight.requires_grad_(not frozen)
    return inputs


def apply(inputs, outputs=("log_probs", "entropy")):
    return utils._ChunkedLogProbFunction.apply(
        inputs.hidden, inputs.weight, None, inputs.labels, 1.0, 32768, None, 1.0, outputs
    )


def test_logged_entropy_of_a_frozen_head_costs_nothing(monkeypatch):
    """A gradient of zeros for it would recompute all logits."""
    inputs = head_inputs(frozen=True)
    with fastpo.patched():
        log_probs, entropy, *rest = apply(inputs)
        assert entropy.requires_grad
        assert rest == [None, None, None]
        monkeypatch.setattr("fastpo.ops.walks.backward.BackwardWalk", None)
        log_probs.sum().backward()
    assert inputs.hidden.grad is not None


def test_nothing_is_kept_without_gradient(monkeypatch):
    calls = tiny.count_calls(monkeypatch)
    with fastpo.patched(), torch.no_grad():
        assert not apply(head_inputs())[0].requires_grad
    assert [(spec.hidden_grad, spec.head_grad) for spec in calls] == [(False, False)]


def test_options_reach_the_primitive(monkeypatch):
    calls = tiny.count_calls(monkeypatch)
    with fastpo.patched(budget=123, backend="torch"):
        apply(head_inputs())
    assert [(spec.budget, spec.backend) for spec in calls] == [(123, "torch")]


def test_unknown_output_is_loud():
    with (
        fastpo.patched(),
        pytest.raises(RuntimeError, match=r"outputs: .*got \('top5',\); .* 1.15"),
    ):
        apply(head_inputs(), ("top5",))


@contextmanager
def gathered_by_hand(weight, full):
    """What ZeRO-3 does: outside this block the parameter is empty."""
    before, weight.data = weight.data, full
    try:
        yield
    finally:
        weight.data = before


@pytest.mark.parametrize("frozen", [True, False])
def test_sharded_head(frozen, monkeypatch):
    """The backward gathers again; a simulation, DeepSpeed needs a GPU."""
    expected, inputs = head_inputs(frozen), head_inputs(frozen)
    full, entered = inputs.weight.data, []

    def gather(weight, bias):
        entered.append(weight.numel())
        return gathered_by_hand(weight, full)

    monkeypatch.setattr(utils, "maybe_gather_lm_head_ctx", lambda *params: gather(*params))
    results = []
    with fastpo.patched():
        results.append(apply(expected)[0])
        entered.clear()
        inputs.weight.data = torch.empty(0)
        with gather(inputs.weight, None):
            results.append(apply(inputs)[0])
    assert inputs.weight.numel() == 0
    assert torch.equal(results[1], results[0])
    grads = [
        torch.autograd.grad(result.square().sum(), (x.hidden, x.weight)[: 2 - frozen])
        for result, x in zip(results, (expected, inputs), strict=True)
    ]
    assert entered.count(0) == 2
    assert all(torch.equal(ours, own) for ours, own in zip(*grads, strict=True))


def test_other_devices_are_compacted_as_trl_does():
    answers = {"cpu": True, "cuda": True, "neuron": False}
    compact = Compact(lambda device: device.type == "cuda")
    assert {kind: compact(SimpleNamespace(type=kind)) for kind in answers} == answers


def test_another_trl_fails_by_name_and_stays_as_it_was(monkeypatch):
    class Older:
        @staticmethod
        def forward(ctx, hidden, weight, bias, targets, temperature, chunk_size, softcap, scale):
            """TRL 1.13's."""

    monkeypatch.setattr(utils, "_ChunkedLogProbFunction", Older)
    own = COMPACT.current()
    message = (
        r"trl\.trainer\.utils\._ChunkedLogProbFunction: expected \(hidden, .*, outputs\), "
        rf"got \(.*, scale\); trl {trl.__version__} is installed, "
        r"fastpo works with trl 1\.15 and 1\.16"
    )
    with pytest.raises(RuntimeError, match=message), fastpo.patched():
        pass
    assert utils._ChunkedLogProbFunction is Older
    assert COMPACT.current() is own
