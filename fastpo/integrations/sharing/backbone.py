"""`shared_prompts`: a model's backbone on one packed row instead of a padded batch.

What stands on the instance is looked up there at call time, so that a deep copy has its own. The
head, the loss, adapters and metrics see hidden states [R, T, H] as ever.
"""

from __future__ import annotations

import functools
import inspect
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ...layout.cost import LayerCost, is_worth
from ...layout.tree import Layout, layout_of
from ...ops.walks.checks import check_flag
from ..seams.calls import standing_in, unhidden
from ..seams.handle import OURS, Handle, attached
from ..seams.saying import say_once
from ..seams.wrappers import bare
from . import attention, noise, probe, refusals
from .look import Look, is_compiled, look
from .packed import Refused, runs_at_once

# Common tokens below it cost a row its causal attention without a mask.
_LEAST = 16
# Fields of a backbone's output with a row for every token.
_PER_TOKEN = ("last_hidden_state", "hidden_states", "router_logits")
# In a probe modes and weights of the model are not those of a call: other threads wait for it.
_probing = threading.RLock()


@dataclass
class Tokens:
    """How many tokens a backbone was given and how many it computed."""

    padded: int = 0
    computed: int = 0

    @property
    def saved(self) -> float:
        return 1 - self.computed / self.padded if self.padded else 0.0


@dataclass(eq=False)
class Packer:
    """Packs the batches of one backbone.

    share: False drops padding only. always: also where the cost model finds nothing to gain.
    """

    share: bool = True
    always: bool = False
    tokens: Tokens = field(default_factory=Tokens)
    # By what the model has been looked at as: why it is left alone, or what it costs.
    known: dict[Any, str | LayerCost] = field(default_factory=dict)
    draws: dict[bytes, bool] = field(default_factory=dict)  # noise, by which layers are in training
    parts: Any = None  # of the model that is known

    def __getstate__(self) -> dict[str, Any]:
        """A copy, perhaps in a process with other attention, looks at its own model."""
        return {**vars(self), "known": {}, "draws": {}, "parts": None}

    def run(self, model: Any, own: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """`own(*args, **kwargs)`, the backbone's forward, on a packed row where that is right."""
        if torch.compiler.is_compiling():
            _say_compiled(type(model).__name__)
            return own(*args, **kwargs)
        kind: Any = type(model)
        names = parameters(kind)
        inputs = dict(zip(names, args, strict=False), **kwargs)
        try:
            if len(args) > len(names):
                raise Refused("inputs by position, whose names its forward does not say")
            seen = look(model)
            layout = self._layout(model, own, inputs, seen)
            if layout is not None:
                output = self._watched(kind.__name__, own, inputs, layout, seen)
                self._count(inputs["input_ids"], layout)
                return output
        except Refused as refused:
            say_once(f"{kind.__name__} keeps its padded batch", str(refused))
        self._count(inputs.get("input_ids"), None)
        return own(*args, **kwargs)

    def _layout(self, model: Any, own: Any, inputs: dict[str, Any], seen: Look) -> Layout | None:
        """Of this batch; None where it is cheaper as it is. Raises Refused."""
        refusals.check_config(model.config, inputs)
        # Before the batch: every process of a sharded model probes it at its first call.
        cost = self._checked(model, own, inputs, seen)
        share = self.share and not self._drops(model, own, inputs, seen)
        refusals.check_call(model, inputs)
        if seen.neftune:
            raise Refused("noise on embeddings (NEFTune)")
        ids, mask = inputs["input_ids"], inputs.get("attention_mask")
        try:
            layout = layout_of(ids, mask, share=share, least=1 if self.always else _LEAST)
        except ValueError as error:
            raise Refused(str(error)) from error
        refusals.check_rotation(model, layout)
        if not self.always and cost.loses(layout):
            layout = min(layout, layout_of(ids, mask, share=False), key=cost.packed)
        return layout if self.always or is_worth(cost, layout) else None

    def _checked(self, model: Any, own: Any, inputs: dict[str, Any], seen: Look) -> LayerCost:
        config, device = model.config.get_text_config(), _device(model, inputs)
        implementation = config._attn_implementation
        causal = getattr(config, "is_causal", True)
        # Layers may mix tokens in one mode alone.
        key = implementation, next(model.parameters()).dtype, device.type, causal, seen.modes
        changed = self.parts not in (None, seen.parts)
        if seen.parts != self.parts:
            self.parts, self.known, self.draws = seen.parts, {}, {}
        if seen.compiled or is_compiled(own):
            raise Refused("layers that are compiled")
        with _probing:
            if key not in self.known:
                self.known[key] = self._probed(model, own, device, changed)
            found = self.known[key]
        if isinstance(found, str):
            raise Refused(found)
        if not attention.stands(implementation):
            raise Refused(f"attention {implementation!r} of somebody else's")
        return found

    def _probed(self, model: Any, own: Any, device: torch.device, changed: bool) -> str | LayerCost:
        try:
            refusals.check_model(model)
            if changed and refusals.sharded(model):
                # Perhaps in this process alone: others would not be there in the probe.
                raise Refused("a hook or layer that came later, in shards")
            attention.install(model.config.get_text_config()._attn_implementation)
            probe.check(self, model, own, device)
            cost = layer_cost(model, device)
        except Refused as refused:
            return str(refused)
        _say_watched(model)
        return cost

    def _drops(self, model: Any, own: Any, inputs: dict[str, Any], seen: Look) -> bool:
        """Is noise drawn? Tokens that are computed once would be dropped together."""
        drops = seen.drops
        if not drops and any(seen.modes):
            with _probing:
                if seen.modes not in self.draws:
                    self.draws[seen.modes] = probe.draws(model, own, _device(model, inputs))
                drops = self.draws[seen.modes]
        if drops:
            say_once(f"{type(model).__name__} shares no prompts", "it draws noise, as dropout does")
        return drops

    def _watched(
        self, name: str, own: Any, inputs: dict[str, Any], layout: Layout, seen: Look
    ) -> Any:
        """The packed forward; whether it draws noise that its probe did not, say of a schedule."""
        shares = any(row.shared for row in layout.rows)
        device = inputs["input_ids"].device
        before = noise.states(device) if shares else []
        output = self.packed(own, inputs, layout)
        if shares and noise.moved(before, device):
            # By another thread, or by a schedule of its own: then it shared its noise this once.
            self.draws.pop(seen.modes, None)
        return output

    def _count(self, ids: Any, layout: Layout | None) -> None:
        if isinstance(ids, Tensor):
            self.tokens.padded += ids.numel()
            self.tokens.computed += ids.numel() if layout is None else layout.size

    def packed(self, own: Callable[..., Any], inputs: dict[str, Any], layout: Layout) -> Any:
        """The same forward on [1, S], its output put back to [R, T]."""
        ids = layout.pack(inputs["input_ids"])
        row = {
            "input_ids": ids,
            "position_ids": layout.positions.unsqueeze(0),
            # Without one transformers would look for sequences in the positions.
            "attention_mask": torch.ones_like(ids),
            "use_cache": False,
        }
        with attention.active(layout):
            output = own(**{**inputs, **row})
        for name, value in list(output.items()):
            if name in _PER_TOKEN:
                output[name] = _put_back(value, layout)
            elif name != "attentions":  # of a probe, which nobody tells what the call is told
                raise Refused(f"an output of its own, {name}")  # of tokens, or a mean over them
        return output


def _device(model: nn.Module, inputs: dict[str, Any]) -> torch.device:
    """Weights that are offloaded are on no device between calls."""
    given = (x.device for x in inputs.values() if isinstance(x, Tensor))
    return next(given, next(model.parameters()).device)


@functools.cache
def parameters(kind: Any) -> tuple[str, ...]:
    """What a forward takes by position; `*args` goes on to that of the class it derives from."""
    for each in kind.__mro__:
        if "forward" in vars(each):
            found = inspect.signature(each.forward).parameters
            if not any(x.kind is x.VAR_POSITIONAL for x in found.values()):
                return tuple(found)[1:]
    return ()


class Sharing(Handle):
    """A model whose backbone packs its batches; `detach()` gives it back."""

    def __init__(self, model: PreTrainedModel, packer: Packer) -> None:
        self.packer = packer
        try:
            refusals.check_head(model)
        except Refused as refused:  # its forward is left to the handle of a head
            self.model, self.active = model, True
            say_once(f"{type(model).__name__} keeps its padded batch", str(refused))
        else:
            super().__init__(model)

    @property
    def tokens(self) -> Tokens:
        return self.packer.tokens

    def run(self, model: PreTrainedModel, args: Any, kwargs: Any) -> Any:
        own = self.below(model)
        return self.packer.run(model, own, args, kwargs) if self.active else own(*args, **kwargs)

    def prepare(self, replica: Any) -> None:
        """Replicas run side by side, as they did before."""
        for name in OURS:
            del vars(replica)[name]
        if self.own is not None:
            replica.forward = self.own


def _put_back(value: Any, layout: Layout) -> Any:
    if isinstance(value, tuple | list):
        return type(value)(_put_back(x, layout) for x in value)
    if value.ndim == 4:  # [streams, 1, S, H], Gemma 3n's
        return torch.stack([layout.put_back(x) for x in value])
    back = layout.put_back(value)
    return back if value.ndim == 3 else back.flatten(0, 1)  # of routers, [R·T, experts]


# While a compiler traces the call.
@torch.compiler.assume_constant_result
def _say_compiled(model: str) -> None:
    say_once(f"{model} keeps its padded batch", "it is compiled")


def _say_watched(model: nn.Module) -> None:
    hook = refusals.watching(model)
    if hook is not None:
        say_once(f"{type(model).__name__} runs on packed rows", f"so does the hook {hook}")


def layer_cost(model: nn.Module, device: torch.device | None = None) -> LayerCost:
    """Of all layers but embeddings, in FLOPs: routed experts as if all were active, and heads that
    are together as wide as hidden states. device: where it runs, if that matters."""
    config: Any = model.config
    config = config.get_text_config()
    tables = {id(p) for m in model.modules() if isinstance(m, nn.Embedding) for p in m.parameters()}
    parameters = (p for p in model.parameters() if id(p) not in tables)
    weights = sum(getattr(p, "ds_numel", p.numel()) for p in parameters)  # ZeRO-3's are empty
    kernel, dtype = config._attn_implementation, next(model.parameters()).dtype
    lengths = attention.takes_lengths(kernel)
    at_once = kernel == "sdpa" and device is not None and runs_at_once(device, dtype)
    try:
        pair = 4.0 * config.hidden_size * config.num_hidden_layers
    except AttributeError as error:
        raise Refused(f"a config without {error.name}") from error
    return LayerCost(2.0 * weights, pair, pads=not lengths, masks=not (lengths or at_once))


def backbone_of(model: nn.Module) -> PreTrainedModel:
    """What computes hidden states in a causal language model, perhaps a wrapped one."""
    inner = bare(model)
    backbone = getattr(inner, "base_model", None)
    if not isinstance(inner, PreTrainedModel) or not isinstance(backbone, PreTrainedModel):
        raise ValueError(f"model: expected a transformers model, got {type(inner).__name__}")
    # The heads of OPT, BART and others stand on the decoder in it, and never call what is around.
    decoder = getattr(backbone, "decoder", None)
    alone = isinstance(decoder, PreTrainedModel) and not hasattr(backbone, "encoder")
    return decoder if alone else backbone  # type: ignore[return-value]


def shared_prompts(model: nn.Module, *, share: bool = True, always: bool = False) -> Sharing:
    """Every distinct token of a batch is computed once, and none of its padding.

    model: a transformers causal language model, its backbone, or one wrapped by PEFT. Rows of
        `input_ids` [R, T] that begin alike, whatever makes them so, share what they have in common.
    share: False drops padding only, as active dropout does by itself.
    always: also where the cost model finds nothing to gain.

    Outputs keep their shapes; hidden states at pads, which nothing reads, are those of another
    token. What cannot be packed runs as before, and a line in the log says why, once. Returns a
    handle: `detach()` gives the model back, as does leaving `with shared_prompts(model):`; its
    `tokens.saved` is the share of tokens that was not computed. Raises ValueError for a model
    that is not transformers', or has a handle already.
    """
    check_flag("share", share)
    check_flag("always", always)
    backbone = backbone_of(model)
    if attached(backbone) and backbone.get_output_embeddings() is None:
        raise ValueError("model: expected one without shared prompts, got one with them")
    return Sharing(backbone, Packer(share, always))


_packers: WeakKeyDictionary[PreTrainedModel, Packer] = WeakKeyDictionary()


def take_tokens(models: Iterable[nn.Module]) -> Tokens:
    """Of all backbones in these models under `packing`, since they were last taken."""
    taken = Tokens()
    for packer in _packers_of(models):
        taken.padded += packer.tokens.padded
        taken.computed += packer.tokens.computed
        packer.tokens = Tokens()
    return taken


@contextmanager
def tokens_apart(models: Iterable[nn.Module]) -> Iterator[None]:
    """Those of a block are none of the count around it."""
    before = {packer: packer.tokens for packer in _packers_of(models)}
    for packer in before:
        packer.tokens = Tokens()
    try:
        yield
    finally:
        for packer, tokens in before.items():
            packer.tokens = tokens


def _packers_of(models: Iterable[nn.Module]) -> list[Packer]:
    found = (_packers.get(x) for model in models for x in model.modules())  # type: ignore[call-overload]
    return [packer for packer in found if packer is not None]


@contextmanager
def packing(model: nn.Module, share: bool) -> Iterator[Packer]:
    """`shared_prompts` for the calls of this thread, for the length of a block."""
    backbone = backbone_of(model)
    packer = _packers.setdefault(backbone, Packer(share))
    packer.share, own = share, unhidden(backbone.forward)

    def forward(*args: Any, **kwargs: Any) -> Any:
        return packer.run(backbone, own, args, kwargs)

    with standing_in(backbone, "forward", forward):
        yield packer
