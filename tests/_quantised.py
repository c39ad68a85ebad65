"""Heads quantised by bitsandbytes or torchao, on tiny models.

`make quantised` has both; a test that asks for one is skipped without it.
"""

from __future__ import annotations

from functools import partial
from importlib import import_module
from typing import Any

import _tiny as tiny
import pytest
import torch
from torch import Tensor, nn

H, V = 64, 2503  # 64: bitsandbytes' kernel for AVX-512 wants rows of whole blocks; V: two tiles


def four_bit(linear: nn.Linear, **options: Any) -> nn.Module:
    bnb = pytest.importorskip("bitsandbytes", reason="needs bitsandbytes (make quantised)")
    made = bnb.nn.Linear4bit(H, linear.out_features, bias=linear.bias is not None, **options)
    made.load_state_dict(linear.state_dict())
    return made.to("cpu")


def eight_bit(linear: nn.Linear, **options: Any) -> nn.Module:
    bnb = pytest.importorskip("bitsandbytes", reason="needs bitsandbytes (make quantised)")
    given = {"has_fp16_weights": False, **options}
    made = bnb.nn.Linear8bitLt(H, linear.out_features, bias=linear.bias is not None, **given)
    made.load_state_dict(linear.state_dict())
    return made.to("cpu")


def of_torchao(linear: nn.Linear, config: str, **options: Any) -> nn.Module:
    pytest.importorskip("torchao", reason="needs torchao (make quantised)")
    ao = import_module("torchao.quantization")
    if "group" in options:
        options = {"granularity": ao.PerGroup(options["group"]), "weight_dtype": torch.int4}
    ao.quantize_(nn.ModuleList([linear]), getattr(ao, config)(**options))
    return linear


KINDS: dict[str, Any] = {
    "nf4": partial(four_bit, quant_type="nf4"),
    "fp4": partial(four_bit, quant_type="fp4", compress_statistics=False),
    "nf4_stored_as_bfloat16": partial(four_bit, quant_type="nf4", quant_storage=torch.bfloat16),
    "int8": eight_bit,
    "torchao_int8": partial(of_torchao, config="Int8WeightOnlyConfig"),
    "torchao_float8": partial(of_torchao, config="Float8WeightOnlyConfig"),
    "torchao_int4": partial(of_torchao, config="IntxWeightOnlyConfig", group=32),
}
EXACT = [name for name in KINDS if name != "torchao_int8"]  # which scales its products instead


def linear(bias: bool = False, words: int = V, dtype: torch.dtype = torch.float32) -> nn.Linear:
    torch.manual_seed(4)
    return nn.Linear(H, words, bias=bias, dtype=dtype)


def own_words(head: nn.Module, dtype: torch.dtype) -> Tensor:
    """What the layer's forward multiplies by, as it shows."""
    eye = torch.eye(H, dtype=dtype, requires_grad=True)
    return head(eye).detach().t()


def model(name: str, bias: bool = False, words: int | None = None, seed: int = 0) -> Any:
    """A tiny Llama whose head is quantised, and everything else trained."""
    changes = {} if words is None else {"vocab_size": words}
    made = tiny.model("llama", seed=seed, hidden_size=H, head_dim=16, **changes)
    made.lm_head = KINDS[name](linear(bias, made.config.vocab_size))
    return made


def adapted(name: str, **settings: Any) -> Any:
    peft = pytest.importorskip("peft")
    given = {"r": 4, "target_modules": ["q_proj", "lm_head"], **settings}
    net = peft.get_peft_model(model(name), peft.LoraConfig(task_type="CAUSAL_LM", **given))
    torch.manual_seed(5)
    for key, parameter in net.named_parameters():
        if "lora_B" in key:
            nn.init.normal_(parameter, std=0.3)
    return net
