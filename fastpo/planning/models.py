"""The policy and what is scored beside it, from a config alone."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface
from transformers.modeling_utils import AttentionInterface

from ..integrations.checkpointing import enable
from .given import foreign
from .names import DROPOUT, KBIT
from .quantised import quantise
from .setting import Lora, Setting

# With "flash" in the name transformers would look for a kernel.
_UNMASKED = "fastpo_unmasked"
WEIGHTS = {"bf16": torch.bfloat16, "fp16": torch.float16}  # else float32


@dataclass
class Models:
    """policy: perhaps wrapped by PEFT. copied: a frozen model of its own, a teacher, or None."""

    policy: Any
    copied: PreTrainedModel | None
    setting: Setting

    @property
    def base(self) -> Any:
        """The policy without PEFT's wrapper."""
        return self.policy if self.setting.lora is None else self.policy.get_base_model()

    @contextmanager
    def other(self) -> Iterator[Any]:
        """What is scored beside the policy; None if nothing is."""
        kind = self.setting.other
        if kind in ("none", "precomputed"):
            yield None
            return
        off = self.policy.disable_adapter() if kind == "adapter-off" else nullcontext()
        with off, torch.no_grad():
            yield self.base if self.copied is None else self.copied


def build(setting: Setting, config: Any, teacher: Any = None) -> Models:
    """On the device that torch makes tensors on."""
    policy = made(setting, config)
    if setting.trainer not in DROPOUT:
        _without_dropout(policy)
    if setting.load_in_4bit:
        quantise(policy)
        if setting.trainer in KBIT:
            _cast(policy.parameters(), torch.float32)
    if setting.checkpointing != "none":
        _checkpoint(policy, offload=setting.checkpointing == "offload")
    copied = None
    if setting.other == "model":
        copied = made(setting, config if teacher is None else teacher).requires_grad_(False).eval()
    if setting.lora is not None:
        policy = adapted(policy, setting.lora)
        if setting.load_in_4bit and setting.trainer not in KBIT:
            _cast((x for x in policy.parameters() if x.requires_grad), torch.bfloat16)
        elif setting.load_in_4bit and setting.dtype == "bf16-mixed":
            _embed_in_bf16(policy, setting.trainer)
    return Models(policy.train(), copied, setting)


def _cast(parameters: Iterable[Tensor], dtype: torch.dtype) -> None:
    for parameter in parameters:
        if parameter.is_floating_point():
            parameter.data = parameter.data.to(dtype)


def _embed_in_bf16(policy: Any, trainer: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # TRL's notice that its experiments may change
        own = import_module(f"trl.experimental.{trainer}.{trainer}_trainer")
    own.peft_module_casting_to_bf16(policy)


def _without_dropout(model: nn.Module) -> None:
    """As `disable_dropout` of TRL's configs has it: what a config says of attention stays."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0


def made(setting: Setting, config: Any, name: str = "model") -> Any:
    config = copy.deepcopy(config)
    config.use_cache = False
    options: dict[str, Any] = {"dtype": WEIGHTS.get(setting.dtype, torch.float32)}
    if setting.attention == "flash":
        options["attn_implementation"] = _flash()
    with foreign(f"{name}: expected a causal language model"):
        return _auto(config).from_config(config, trust_remote_code=False, **options)


def _auto(config: Any) -> Any:
    """With towers for pictures where transformers has no model of text alone."""
    text, seeing = AutoModelForCausalLM, AutoModelForImageTextToText
    alone = type(config) in text._model_mapping or getattr(config, "is_encoder_decoder", False)
    return seeing if type(config) in seeing._model_mapping and not alone else text


def towers(config: Any) -> bool:
    """Has it parts that no text reaches? They are weights here, and trained if the rest is."""
    return config.get_text_config() is not config


def size_of(setting: Setting, config: Any) -> int:
    """Bytes of its weights and buffers."""
    with torch.device("meta"):
        return bytes_of(made(setting, config))


def bytes_of(model: nn.Module) -> int:
    return sum(x.numel() * x.itemsize for x in (*model.parameters(), *model.buffers()))


def backbone(model: Any) -> Any:
    """What gives hidden states. Llama 4 and the text of Mllama are their own `base_model`."""
    return model.model if model.base_model is model else model.base_model


def positions(model: Any) -> int | None:
    """How many the model has a table for; None where it computes them."""
    most = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if most is None:
        return None
    for name, x in model.named_parameters():
        # OPT and BART have two rows more. Others' tables are those of pictures and sounds.
        if ("position" in name or "wpe" in name) and x.dim() == 2 and most <= len(x) <= most + 2:
            return int(most)
    return None


def _mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int = 0,
    kv_offset: int = 0,
    attention_mask: Any = None,
    **_: Any,
) -> None:
    """None: causal."""


def _attend(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **kwargs: Any
) -> Any:
    kwargs["dropout"] = 0.0  # as `Undropped`
    return sdpa_attention_forward(module, query, key, value, None, **kwargs)


class Undropped(TorchFunctionMode):
    """Attention as a GPU's kernels have it: they draw dropout anew in the backward and keep nothing
    of it. A CPU keeps probabilities."""

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any | None = None
    ) -> Any:
        given = kwargs or {}
        if func is F.scaled_dot_product_attention and "dropout_p" in given:
            given = given | {"dropout_p": 0.0}
        return func(*args, **given)


def draws(model: nn.Module) -> bool:
    """Does it drop anything, in the mode it is in? Attention has its rate as a number."""
    for module in model.modules():
        rates = (x for name, x in vars(module).items() if "dropout" in name and type(x) is float)
        own = module.p if isinstance(module, nn.Dropout) else 0.0
        if module.training and max([own, *rates]) > 0:
            return True
    return False


def _flash() -> str:
    """Attention as a flash kernel has it: causal, without a mask, keys and values once for their
    groups. What it keeps for the backward is what FlashAttention keeps: queries, keys, values, the
    result and a number for each query and head.
    """
    AttentionMaskInterface.register(_UNMASKED, _mask)
    AttentionInterface.register(_UNMASKED, _attend)
    return _UNMASKED


def whole_at_once(setting: Setting, model: nn.Module) -> int:
    """Bytes of which no device has a part only, with FSDP2 and ZeRO-3: what is in no layer, the
    layer at work and the next one, and gradients of all that is at work."""

    def size(module: nn.Module, trained: bool = False) -> int:
        counted = (p for p in module.parameters() if p.requires_grad or not trained)
        return sum(p.numel() * width(p) for p in counted)

    def width(parameter: Tensor) -> int:
        # A byte of 4 bits is gathered as it is.
        return min(2, parameter.itemsize) if setting.dtype == "bf16-mixed" else parameter.itemsize

    stack = max((m for m in model.modules() if isinstance(m, nn.ModuleList)), key=size)
    layer = max(stack, key=size)
    weights = size(model) - size(stack) + 2 * size(layer)
    return weights + size(model, True) - size(stack, True) + size(layer, True)


class Fake(FakeTensorMode):
    """Takes any dtype for products by groups, as torch's kernels do; its meta kernel only bf16."""

    def __init__(self) -> None:
        super().__init__(allow_non_fake_inputs=True)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any | None = None
    ) -> Any:
        if str(func) == "aten._grouped_mm.default" and args[0].dtype != torch.bfloat16:
            return _grouped(*args)
        return super().__torch_dispatch__(func, types, args, kwargs or {})


def _grouped(a: Tensor, b: Tensor, offsets: Tensor, *_: Any) -> Tensor:
    """Groups are parts of the rows, of the columns, or of what is summed."""
    groups = offsets.shape if a.dim() == b.dim() else ()
    return a.new_empty(*groups, a.shape[-2], b.shape[-1])


def fake(model: nn.Module, device: str) -> None:
    """What was built on "meta", on a device. PyTorch's own `to_empty` cannot swap fake tensors."""
    made: dict[int, Any] = {}
    for module in model.modules():
        for held in (module._parameters, module._buffers):
            for name, x in held.items():
                if x is None:
                    continue
                if id(x) not in made:
                    empty = torch.empty_like(x, device=device)
                    trained = x.requires_grad
                    is_parameter = isinstance(x, nn.Parameter)
                    made[id(x)] = nn.Parameter(empty, trained) if is_parameter else empty
                held[name] = made[id(x)]


def adapted(model: PreTrainedModel, lora: Lora) -> Any:
    from peft import LoraConfig, get_peft_model
    from peft.tuners.tuners_utils import BaseTunerLayer

    targets: Any = list(lora.targets)
    targets = "all-linear" if targets == ["all-linear"] else targets
    try:
        config = LoraConfig(r=lora.rank, target_modules=targets, task_type="CAUSAL_LM")
        with warnings.catch_warnings():  # PEFT asks transformers' models by a name of before 5.23
            warnings.filterwarnings("ignore", ".*is_gradient_checkpointing", FutureWarning)
            made = get_peft_model(model, config)
    except ValueError as error:
        raise ValueError(f"lora: {str(error).splitlines()[0]}") from error
    if isinstance(made.get_output_embeddings(), BaseTunerLayer):
        raise ValueError(
            "lora: expected targets below the head, as TRL's own head needs, got the head too"
        )
    return made


def _checkpoint(model: PreTrainedModel, offload: bool) -> None:
    enable(model)
    if offload:
        model._set_gradient_checkpointing(enable=True, gradient_checkpointing_func=_offloaded)


def _offloaded(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """As `offload=True` of transformers, to a host that is the device "meta" here."""
    with saved_tensors_hooks(lambda x: x.to("meta"), partial(torch.empty_like, device="cpu")):
        return checkpoint(function, *args, use_reentrant=False, **kwargs)


def optimizer_of(setting: Setting, parameters: list[nn.Parameter]) -> Any:
    if setting.optimizer == "adamw":
        return torch.optim.AdamW(parameters, fused=True)
    if setting.optimizer == "sgd":
        return torch.optim.SGD(parameters)
    if setting.optimizer == "adafactor":
        from transformers.optimization import Adafactor

        return Adafactor(parameters, scale_parameter=False, relative_step=False, lr=1e-5)
    return AdamW8bit(parameters, {})


class AdamW8bit(torch.optim.Optimizer):
    """The state of bitsandbytes' AdamW8bit: two bytes a number, and a scale for 256 of them.

    Tensors of fewer than 4,096 numbers keep float32.
    """

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for parameter in self.param_groups[0]["params"]:
            state = self.state[parameter]
            if parameter.grad is None or state:
                continue
            for name in ("state1", "state2"):
                state[name] = self._of(parameter)

    @staticmethod
    def _of(parameter: Tensor) -> tuple[Tensor, ...]:
        if parameter.numel() < 4096:
            return (torch.zeros_like(parameter, dtype=torch.float32),)
        scales = parameter.new_zeros(-(-parameter.numel() // 256), dtype=torch.float32)
        return torch.zeros_like(parameter, dtype=torch.uint8), scales
