"""What TRL's trainers do to a model before they train it, a plan does as well."""

from __future__ import annotations

import dataclasses

import pytest

pytest.importorskip("trl", minversion="1.16")
pytest.importorskip("peft")

import torch
from _plans import SHALLOW, module_of
from transformers import GPT2Config

import fastpo
from fastpo.planning.live import Live
from fastpo.planning.models import build, whole_at_once
from fastpo.planning.names import KBIT, TRAINERS
from fastpo.planning.quantised import Packed
from fastpo.planning.setting import Lora, Setting

GPT2 = GPT2Config(vocab_size=300, n_embd=32, n_layer=1, n_head=2)


@pytest.mark.parametrize("trainer", TRAINERS)
def test_dropout_is_where_the_trainer_leaves_it(trainer):
    name = "Distillation" if trainer == "distillation" else trainer.upper()
    config = getattr(module_of(trainer), f"{name}Config")
    disabled = {x.name: x.default for x in dataclasses.fields(config)}.get("disable_dropout", False)
    with torch.device("meta"):
        policy = build(Setting("gpt2", trainer=trainer), GPT2).policy
    rates = {x.p for x in policy.modules() if isinstance(x, torch.nn.Dropout)}
    assert rates == ({0} if disabled else {0.1})


def _peak(rate, layers=0.0, **options):
    rates = {"attn_pdrop": rate, "resid_pdrop": layers, "embd_pdrop": layers}
    config = GPT2Config(**GPT2.to_dict() | rates)
    plan = fastpo.plan_step(config, context=256, search=False, **options)
    return plan.heads["fastpo"].estimate.peak


@pytest.mark.parametrize("attention", ["flash", "sdpa"])
def test_a_kernel_of_a_gpu_keeps_no_dropout(attention):
    options = {"trainer": "sft", "attention": attention}
    assert _peak(0.1, **options) == _peak(0.0, **options)


def test_a_cpu_keeps_probabilities_that_are_dropped():
    def on_cpu(rate):
        return _peak(rate, trainer="sft", batch=4, device="cpu")

    assert on_cpu(0.1) - on_cpu(0.0) > 4 * 2 * 256**2 * 2  # rows, heads, bfloat16


@pytest.mark.parametrize("rates", [(0.1, 0.0), (0.0, 0.1)])
def test_what_is_dropped_is_not_shared(rates):
    """As `shared_prompts` has it."""
    common = {"trainer": "grpo", "prompt": 0.75, "device": "cpu"}
    unshared = pytest.approx(_peak(*rates, **common), rel=0.01)  # words are not counted
    assert _peak(*rates, prompt_rows=8, **common) == unshared
    assert _peak(0.0, prompt_rows=8, **common) < 0.9 * _peak(0.0, **common)


def test_notes_say_what_is_not_shared():
    def note(trainer):
        options = {"trainer": trainer, "shared_prompts": "4:1", "context": 32, "search": False}
        (found,) = (x for x in fastpo.plan_step(GPT2, **options).notes if "once" in x)
        return found

    assert note("rloo").endswith("but for the policy: its dropout is drawn for every row")
    assert note("dpo").endswith("fastpo.patch(shared_prompts=True)")  # which disables it


@pytest.mark.parametrize(("bits", "dtype"), [(False, torch.float32), (True, torch.bfloat16)])
def test_an_adapter_of_four_bits_is_bfloat16(bits, dtype):
    """PEFT makes it in float32, and with it a float32 copy of each layer's input."""
    setting = Setting("llama", lora=Lora(8), load_in_4bit=bits)
    with torch.device("meta"):
        policy = build(setting, SHALLOW).policy
    assert {x.dtype for x in policy.parameters() if x.requires_grad} == {dtype}


def test_four_bits_of_layers_with_turned_weights():
    """GPT-2's: transformers has bitsandbytes' linear layers in their place."""
    setting = Setting("gpt2", lora=Lora(8), load_in_4bit=True)
    with torch.device("meta"):
        policy = build(setting, GPT2).policy
    packed = [x.numel() for x in policy.parameters() if x.dtype == torch.uint8]
    sizes = (32, 3 * 32), (32, 32), (32, 4 * 32), (4 * 32, 32)  # inputs and outputs
    assert packed == [inputs * outputs // 2 for inputs, outputs in sizes]
    adapter = [tuple(x.shape) for x in policy.parameters() if x.requires_grad]
    assert adapter == [x for inputs, outputs in sizes for x in ((8, inputs), (outputs, 8))]


@pytest.mark.parametrize("trainer", KBIT)
def test_what_peft_prepares_for_four_bits_is_float32_beside_them(trainer):
    setting = Setting("llama", trainer=trainer, lora=Lora(8), load_in_4bit=True)
    with torch.device("meta"):
        policy = build(setting, SHALLOW).policy
    assert {x.dtype for x in policy.parameters()} == {torch.float32, torch.uint8}


@pytest.mark.parametrize("trainer", KBIT)
def test_autocast_has_embeddings_beside_four_bits_in_sixteen(trainer):
    """And the head; norms and adapter stay in float32."""
    options = {"trainer": trainer, "dtype": "bf16-mixed", "lora": Lora(8), "load_in_4bit": True}
    with torch.device("meta"):
        policy = build(Setting("llama", **options), SHALLOW).policy
    found = {name.split(".")[-2]: x.dtype for name, x in policy.named_parameters()}
    halves = {name for name, dtype in found.items() if dtype == torch.bfloat16}
    assert halves == {"embed_tokens", "lm_head"}
    assert {*found.values()} == {torch.float32, torch.bfloat16, torch.uint8}


@pytest.mark.parametrize(("dtype", "size"), [(torch.bfloat16, 2), (torch.float32, 4)])
def test_a_product_of_four_bits_is_of_the_dtype_the_weight_had(dtype, size):
    """As bitsandbytes has it, whatever autocast says; what comes out is of the input's dtype."""
    packed = Packed(torch.nn.Linear(64, 96, dtype=dtype))
    x = torch.ones(8, 64, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16), Live() as live:
        out = packed(x)
    copied = 0 if dtype == x.dtype else 8 * 64
    assert out.dtype == x.dtype
    assert live.peak == size * (copied + 64 * 96 + 8 * 96)


def test_shards_gather_bytes_of_four_bits_as_they_are():
    """Beside them a number is gathered in bfloat16; the embeddings, the head, the layer twice, and
    gradients of its adapter."""
    setting = Setting("llama", dtype="bf16-mixed", lora=Lora(8), load_in_4bit=True)
    with torch.device("meta"):
        policy = build(setting, SHALLOW).policy
    (layer,) = policy.get_base_model().model.layers
    packed = sum(x.numel() for x in layer.parameters() if x.dtype == torch.uint8)
    inside = sum(2 * x.numel() for x in layer.parameters() if x.dtype != torch.uint8)
    trained = sum(2 * x.numel() for x in layer.parameters() if x.requires_grad)
    whole = sum(2 * x.numel() for x in policy.parameters() if x.dtype != torch.uint8)
    assert whole_at_once(setting, policy) == whole + inside + 2 * packed + trained
