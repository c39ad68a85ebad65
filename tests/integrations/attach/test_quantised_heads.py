"""Heads that bitsandbytes or torchao quantised: what they multiply by, made tile by tile.

`make quantised` has both; without them these tests are skipped.
"""

from __future__ import annotations

from importlib import import_module
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("transformers")
pytest.importorskip("datasets")

import _tiny as tiny
import torch
from _probes import Widest
from _quantised import (
    EXACT,
    KINDS,
    H,
    V,
    adapted,
    eight_bit,
    four_bit,
    linear,
    model,
    of_torchao,
    own_words,
)
from _tiny import one_thread  # noqa: F401
from torch import Tensor, nn

import fastpo
from fastpo.integrations.adapter import operands, unsupported
from fastpo.integrations.lazy import cell
from fastpo.integrations.lazy.head import lazy_head
from fastpo.ops.tiles.tiled import Tiled, tiled
from fastpo.ops.walks import forward as driver


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", EXACT)
def test_the_words_are_the_layer_s_own(name, dtype):
    head = KINDS[name](linear(dtype=dtype))
    weight = tiled(fastpo.tile_source(head.weight, dtype)).whole()
    words, own = tiled(fastpo.tile_source(head, dtype)), own_words(head, dtype)
    assert torch.equal(words.whole(), own)
    for a, b in ((0, 5), (7, 30), (2047, 2049), (V - 1, V)):
        assert torch.equal(words[a:b], own[a:b])
    assert torch.equal(weight, own)


@pytest.mark.parametrize("name", ["nf4", "fp4"])
def test_blocks_may_reach_into_the_next_word(name):
    pytest.importorskip("bitsandbytes")
    torch.manual_seed(4)
    rows = nn.Linear(40, 77, bias=False)
    functional = import_module("bitsandbytes.functional")
    packed, state = functional.quantize_4bit(rows.weight.data, quant_type=name)
    stored = import_module("bitsandbytes.nn").Params4bit(packed, quant_state=state)
    words = tiled(fastpo.tile_source(stored, torch.float32))
    whole = functional.dequantize_4bit(packed, state)
    assert torch.equal(words.whole(), whole)
    for a, b in ((0, 1), (1, 4), (38, 41), (76, 77), (9, 9)):
        assert torch.equal(words[a:b], whole[a:b])


def step(net: Any, inputs: Any) -> dict[str, Tensor]:
    net.zero_grad()
    found = net(**inputs).loss
    found.backward()
    grads = {n: p.grad.clone() for n, p in net.named_parameters() if p.grad is not None}
    return {"loss": found.detach(), **grads}


def assert_close(ours: Any, own: Any) -> None:
    torch.testing.assert_close(ours, own, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("name", KINDS)
def test_attach(name, bias):
    net, inputs = model(name, bias), tiny.batch()
    own = step(net, inputs)
    with fastpo.attach(net, outputs=("logps", "entropy")):
        ours = step(net, inputs)
    assert_close(ours, own)
    assert ("lm_head.bias" in ours) == bias


@pytest.mark.parametrize("compute", [torch.bfloat16, torch.float16])
def test_the_dtype_of_the_products_is_the_layer_s(compute):
    net, inputs = model("nf4"), tiny.batch()
    net.lm_head = four_bit(linear(words=net.config.vocab_size), compute_dtype=compute)
    seen = []
    with fastpo.attach(net), watched(seen):
        net(**inputs)
    hidden, weight = seen[0]
    assert hidden.dtype == weight.dtype == compute
    assert torch.equal(weight.whole(), own_words(net.lm_head, compute))
    logits = net(**inputs).logits
    with fastpo.lazy_logits(net):
        promised = net(**inputs).logits
        assert promised.dtype == logits.dtype == torch.float32
        torch.testing.assert_close(promised + 0, logits, rtol=1e-2, atol=1e-2)


class watched:
    """Operands of the primitive, noted down."""

    def __init__(self, seen: list[Any]) -> None:
        self.seen, self.forward = seen, driver.forward

    def __enter__(self) -> None:
        def noted(hidden: Any, weight: Any, *rest: Any) -> Any:
            self.seen.append((hidden, weight))
            return self.forward(hidden, weight, *rest)

        driver.forward = noted

    def __exit__(self, *_: Any) -> None:
        driver.forward = self.forward


class Memory(Widest):
    def counts(self, x: Tensor) -> bool:
        return not isinstance(x, Tiled) and x.is_floating_point()


@pytest.mark.parametrize("name", KINDS)
def test_no_whole_head_and_no_logits(name):
    net, inputs = model(name, words=V), tiny.batch()
    net.model.embed_tokens.requires_grad_(False)  # a gradient as large as the head
    net(**inputs).loss.backward()
    with Memory() as own:
        net(**inputs).loss.backward()
    with fastpo.attach(net), Memory() as ours:
        net(**inputs).loss.backward()
    assert own.elements >= V * H > ours.elements >= 2048 * H


@pytest.mark.parametrize("name", ["nf4", "int8", "torchao_int8", "torchao_float8"])
def test_lora_beside_it(name):
    net, inputs = adapted(name), tiny.batch()
    head = net.get_base_model().get_output_embeddings()
    assert unsupported(head) is None
    own = step(net, inputs)
    assert any("lm_head.lora_B" in key for key in own)
    with fastpo.attach(net):
        assert_close(step(net, inputs), own)
        net.disable_adapter_layers()
        assert operands(head, torch.randn(2, H))[1] is None


def not_quantised() -> Any:
    return eight_bit(linear(words=320), has_fp16_weights=True)


def with_activations() -> Any:
    return of_torchao(linear(words=320), "Int8DynamicActivationInt8WeightConfig")


def packed() -> Any:
    """As a forward in evaluation leaves it where the CPU multiplies bfloat16."""
    head = KINDS["nf4"](linear(words=320))
    head.weight.quant_state.packing_format_for_cpu = True
    return head


NOT_SERVED = {
    not_quantised: "expected one in int8 with its scales, got torch.float32",
    with_activations: "expected it alone quantised, got a Int8Tensor with act_quant_kwargs",
    packed: "expected blocks of words, got one packed for inference on CPUs",
}


@pytest.mark.usefixtures("afresh")
@pytest.mark.parametrize("made", NOT_SERVED)
def test_what_is_not_served_says_so(made, caplog):
    net, inputs = model("int8"), tiny.batch()
    net.lm_head = made()
    with pytest.raises(RuntimeError, match=NOT_SERVED[made]):
        fastpo.attach(net)
    with lazy_head("This model", net), torch.no_grad():
        assert made is packed or type(net(inputs["input_ids"]).logits) is Tensor
    assert f"This model keeps its full logits: weight: {NOT_SERVED[made]}" in caplog.text


def test_what_has_no_words_yet_and_dora():
    dora = adapted("nf4", use_dora=True).get_base_model().get_output_embeddings()
    assert unsupported(dora) == "DoRA on a quantised layer"
    bnb = import_module("bitsandbytes.nn")
    with pytest.raises(RuntimeError, match="in 4 bits, got one that no device has quantised"):
        fastpo.tile_source(bnb.Linear4bit(H, V))


def reading(net: Any, batch: Any) -> Tensor:
    """Log-probabilities, entropy and a few logits, of a loop that knows nothing of fastpo."""
    given = {k: v for k, v in batch.items() if k != "labels"}
    logits, labels = net(**given).logits[:, :-1], batch["labels"][:, 1:].clamp(min=0)
    each = logits.log_softmax(-1).gather(-1, labels[..., None]).squeeze(-1)
    few = logits.gather(-1, labels[..., None] // 2).mean() + logits.mean()
    best = logits.argmax(-1).double().mean() + logits.detach().topk(3, -1).values.mean()
    return each.sum() + few + net(**batch).loss + best * 1e-3


@pytest.mark.usefixtures("afresh")
@pytest.mark.parametrize("name", ["nf4", "int8", "torchao_float8"])
def test_lazy_logits(name, monkeypatch):
    net, inputs = model(name), tiny.batch()
    runs = []
    for lazily in (False, True):
        net.zero_grad()
        handle = fastpo.lazy_logits(net) if lazily else SimpleNamespace(detach=lambda: None)
        found = reading(net, inputs)
        found.backward()
        handle.detach()
        grads = [p.grad.clone() for p in net.parameters() if p.grad is not None]
        runs.append((found.detach(), grads))
    assert not cell.told  # nothing asked for logits
    assert_close(*reversed(runs))


@pytest.mark.usefixtures("afresh")
def test_real_logits_are_the_model_s():
    net, inputs = adapted("nf4"), tiny.batch()
    own = net(**inputs).logits
    with fastpo.lazy_logits(net):
        logits = net(**inputs).logits
        assert_close(logits.sigmoid(), own.sigmoid())
        assert torch.equal(logits.argmax(-1), own.argmax(-1))
        torch.testing.assert_close(
            torch.cat([logits, logits], 1).logsumexp(-1)[:, :12], own.logsumexp(-1)
        )
