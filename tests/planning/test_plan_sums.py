"""What a plan adds to the bytes that a step shows, by sums of hand."""

from __future__ import annotations

import copy
from collections import Counter

import pytest

pytest.importorskip("trl", minversion="1.16")
pytest.importorskip("peft")

import torch
import transformers
from _plans import SHALLOW, TWO
from transformers import GPT2Config
from transformers.models.llama.modeling_llama import LlamaMLP

import fastpo
from fastpo.planning import fits
from fastpo.planning.estimate import Estimate, Session
from fastpo.planning.live import Live
from fastpo.planning.plan import StepPlan
from fastpo.planning.setting import Lora, Setting
from fastpo.planning.steps import batch_of, layout_for

MIB = 2**20
LASTING = {"weights": 800, "reference": 80, "gradients": 160, "optimizer": 240}
PASSING = {"activations": 100, "temporaries": 40, "head": 20}


def _parts(**options):
    phases = {"backward": Counter({x: n * MIB for x, n in (LASTING | PASSING).items()})}
    setting = Setting("llama", **options)
    found = Estimate.of("fastpo", setting, phases, trained=400 * MIB, gathered=7 * MIB)
    return {name: size / MIB for name, size in found.parts.items()}


def test_what_a_gpu_adds():
    """The driver's 500 MiB, libraries' 64, and a twentieth of what comes and goes."""
    assert _parts() == LASTING | PASSING | {"device": 500 + 64 + 160 / 20}
    assert _parts(device="cpu") == LASTING | PASSING | {"device": 0}


@pytest.mark.parametrize("strategy", ["fsdp2", "zero3"])
def test_shards_divide_what_lasts(strategy):
    quarters = {name: size / 4 for name, size in LASTING.items()}
    found = _parts(device="cpu", devices=4, strategy=strategy)
    assert found == quarters | PASSING | {"device": 7}


def test_shards_have_nothing_whole_in_the_optimizer():
    setting = Setting("llama", device="cpu", devices=4, strategy="fsdp2")
    kept = Counter({"weights": 400, "optimizer": 800})
    for activations, expected in ((101, 300 + 101 + 7), (93, 400)):
        phases = {
            "backward": kept + Counter({"activations": activations}),
            "optimizer": kept + Counter({"gradients": 400}),
        }
        found = Estimate.of("fastpo", setting, phases, trained=400, gathered=7)
        assert found.peak == expected


def test_buckets_are_gradients_once_more():
    assert _parts(device="cpu", devices=2) == LASTING | PASSING | {"device": 400}


def test_states_of_eight_bits():
    """Two bytes a number and two scales for 256 of them; small tensors have two float32."""
    setting = Setting("llama", trainer="sft", context=32, optimizer="adamw8bit")
    found = Session(setting, TWO, "fastpo").phases(setting)["optimizer"]["optimizer"]
    with torch.device("meta"):
        sizes = [x.numel() for x in transformers.LlamaForCausalLM(TWO).parameters()]
    large = [n for n in sizes if n >= 4096]
    assert found == sum(2 * n + 2 * 4 * -(-n // 256) for n in large) + 8 * (sum(sizes) - sum(large))


def _head(**options):
    setting = Setting("llama", trainer="sft", context=2048, batch=8, **options)
    return {x: n["head"] for x, n in Session(setting, TWO, "fastpo").phases(setting).items()}


def test_what_the_head_takes_is_counted():
    """What `fastpo.plan` tells, beside which the rest is small here."""
    told = fastpo.plan(8 * 1024, 3000, 64, device="cuda")
    found = _head()
    assert told.kept_bytes < told.workspace_bytes
    assert found["head"] == pytest.approx(told.workspace_bytes, rel=0.01)
    expected = told.workspace_bytes + told.kept_bytes
    assert found["backward"] == pytest.approx(expected, rel=0.01)


def test_a_frozen_head_takes_its_own():
    """Its sums for d hidden lie beside the tile, and nothing is kept."""
    told = fastpo.plan(8 * 1024, 3000, 64, device="cuda", train_head=False)
    assert told.workspace_bytes != fastpo.plan(8 * 1024, 3000, 64, device="cuda").workspace_bytes
    assert _head(lora=Lora())["head"] == pytest.approx(told.workspace_bytes, rel=0.01)


@pytest.mark.parametrize("tokens", [34, 60, 72, 96])
def test_a_gradient_in_the_place_of_what_was_kept(tokens):
    """As a real call holds it: of the same size as d weight, smaller, larger, too large."""
    config, words, width = copy.deepcopy(SHALLOW), 100_000, 64
    config.vocab_size = words
    options = {"trainer": "sft", "context": tokens + 1, "prompt": 0.0}
    setting = Setting("llama", dtype="fp32", device="cpu", **options)
    found = Session(setting, config, "fastpo").phases(setting)["backward"]["head"]
    with Live() as live:
        weight = torch.randn(words, width, requires_grad=True)
        hidden = torch.randn(tokens, width, requires_grad=True)
        given = live.now
        logps = fastpo.linear_logps(hidden, weight, torch.arange(tokens)).logps
        live.forget_peak()
        logps.sum().backward()
    assert found == pytest.approx(live.peak - given, rel=0.03)


def test_a_card_lets_the_head_keep_a_sixteenth():
    assert _head(memory=2**30) == _head(budget=2**26) != _head()
    assert _head(memory=2**30, device="cpu") == _head(device="cpu")


@pytest.mark.parametrize("trainer", ["orpo", "gkd"])
def test_logits_leave_accelerate_in_float32(trainer):
    """Under autocast, too: they are no smaller than those of a model in float32."""

    def wide(dtype):
        setting = Setting("llama", trainer=trainer, context=128, dtype=dtype)
        return Session(setting, SHALLOW, "trl").phases(setting)["head"]["activations"]

    assert wide("bf16-mixed") > 0.95 * wide("fp32")


@pytest.mark.parametrize(
    ("context", "prompt", "answer"),
    [(2048, 0.5, 1024), (10, 0.25, 8), (10, 0.0, 9), (2, 0.99, 1), (8, 0.99, 1)],
)
def test_all_of_an_answer_is_scored(context, prompt, answer):
    """Its first token, too, which the last one of the prompt predicts."""
    setting = Setting("llama", trainer="grpo", context=context, prompt=prompt)
    assert StepPlan(setting, {}).settings["max_completion_length"] == answer
    batch = batch_of(setting, 100)
    assert batch.rows.tolist() == [*range(context - answer - 1, context - 1)]
    assert batch.labels.tolist() == batch.ids[0, -answer:].tolist()


def test_rows_of_a_prompt_have_all_of_it_in_common():
    setting = Setting("llama", context=400, prompt=0.5, batch=2, prompt_rows=2)
    first, other = batch_of(setting, 1000).ids[:2]
    assert first[: setting.prompt_tokens].equal(other[: setting.prompt_tokens])
    assert not first.equal(other)


def test_a_kernel_of_masks_shares_less_than_one_of_lengths():
    """Masks of rows this long cost more than 64 tokens of layers this small."""
    model = transformers.LlamaForCausalLM(TWO)
    ids = torch.randint(1000, (4, 1600))
    ids[:, :64] = ids[0, :64]
    assert layout_for(model, ids, "sdpa") is None
    assert any(row.shared for row in layout_for(model, ids[:, :400], "flash").rows)
    assert layout_for(model, ids[:, :400], "sdpa") is None


def _gpt2(positions):
    return GPT2Config(vocab_size=100, n_embd=16, n_layer=1, n_head=2, n_positions=positions)


def test_positions_of_every_model_bound_the_context_alone(monkeypatch):
    monkeypatch.setattr(fits, "_MOST", {"context": 2**20, "batch": 64})
    setting = Setting("gpt2", trainer="gkd", context=32, batch=1)
    depths = fits.Depths(setting, _gpt2(150), "fastpo", _gpt2(40))
    assert depths.largest("context", 2**40).setting.context == 40
    assert depths.largest("batch", 2**40).setting.batch == 64
    fits.check_runs(setting, _gpt2(32), "model")  # all positions that there are


def test_layers_that_do_not_run_back(monkeypatch):
    """Of the model; a teacher has nothing to run back for."""
    own = LlamaMLP.forward

    def fail(_):
        raise RuntimeError("no way back")

    def forward(self, x):
        y = own(self, x)
        if y.requires_grad:
            y.register_hook(fail)
        return y

    monkeypatch.setattr(LlamaMLP, "forward", forward)
    setting = Setting("llama", context=8)
    fits.check_runs(setting, SHALLOW, "teacher")
    with pytest.raises(ValueError, match="model: expected one whose layers run, got RuntimeError"):
        fits.check_runs(setting, SHALLOW, "model")


@pytest.mark.parametrize("size", [32, 128])
def test_a_head_of_another_width(size):
    sizes = {"hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.ElectraConfig(**sizes, embedding_size=size, is_decoder=True)
    with pytest.raises(ValueError, match=f"a head of hidden size 64, .*, got {size}"):
        fits.check_runs(Setting("electra", context=8), config, "model")


@pytest.mark.parametrize(("devices", "steps"), [(1, 4), (2, 2), (4, None), (8, None)])
def test_groups_over_devices(devices, steps):
    """Two rows on each: eight rows of a prompt are four steps of one device, one of four."""
    setting = Setting("llama", trainer="grpo", context=32, batch=2, devices=devices)
    found = StepPlan(setting, {}).settings
    assert (found["num_generations"], found.get("steps_per_generation")) == (8, steps)


def test_one_device_divides_nothing():
    def notes(**options):
        return fastpo.plan_step(SHALLOW, context=32, search=False, **options).notes

    assert notes(strategy="zero3") == ("zero3 has nothing to divide with devices=1, the default",)
    assert notes(strategy="zero3", devices=2) == ()
