"""`attach`: any Hugging Face causal language model scores its labels without logits.

The model's own forward runs, whatever it does to images, routers or caches. Only its head and its
loss function are stood in for while labels are there: the head hands on a probe of three positions
instead of logits, and the loss function meets the hidden states the head was given. What has become
of the probe tells whether model and hooks treat logits as the config says.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import field, fields, make_dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

from ..ops.shards.gathered import HeadOptions
from ..ops.stats import TokenStats
from ..ops.vocab_parallel_logps import score_sharded
from ..ops.walks.checks import check_flag
from ..ops.walks.derivatives import check_plain
from . import predictions
from .adapter import operands, rounded
from .heads import in_all_shards, linear_head, logit_map, stored_weight, tensor_parallel, words_of
from .seams import hooks
from .seams.calls import standing_in, unhidden
from .seams.handle import Handle, attached
from .seams.seam import Seam
from .seams.wrappers import bare
from .sharing import backbone

LOSS = Seam(
    "transformers.loss.loss_utils",
    "ForCausalLMLoss",
    (
        "logits",
        "labels",
        "vocab_size",
        "num_items_in_batch",
        "ignore_index",
        "shift_labels",
        "kwargs",
    ),
    ("5",),
)


def attach(
    model: nn.Module,
    *,
    temperature: float = 1.0,
    outputs: tuple[str, ...] = ("logps",),
    budget: int | None = None,
    backend: str | None = None,
    accumulate: bool = False,
    shared_prompts: bool = False,
) -> Attached:
    """Called with labels, `model` returns its loss and per-token log-probabilities, and no logits.

    model: a transformers causal language model, or one wrapped by PEFT (before or after) or by
        torch.compile. A head that bitsandbytes or torchao quantised is read a tile of words at a
        time, and frozen.
    temperature: the loss, too, is that of logits / temperature.
    outputs, budget, backend: as in `fastpo.linear_logps`; each output becomes a field of the
        model's result, [B, T - 1], or [B, T] with `shift_labels`; 0 where the label is ignored.
    accumulate: while gradients are accumulated, d weight of the head is added to `weight.grad` as
        it is computed instead of being handed to autograd: no second [V, H], one rounding less.
        Not for a head whose gradient others wait for, as DDP and hooks do.
    shared_prompts: `fastpo.shared_prompts` for this model, with labels or without.

    The loss is the one the model's own forward returns. Without labels the model is what it was,
    also to other threads meanwhile, and so is its state_dict. Returns a handle: `detach()` gives
    the model back, as does leaving `with attach(model):`.

    A forward hook on the head is given three positions of made-up logits. What it, the config or
    the forward does to them is looked at in each call; on a GPU it waits for that after a change
    only, and else answers NaN. After the loss function they are NaN: a loss to which the forward
    adds something made of them is an error, on a GPU NaN. A Trainer that asks for predictions gets
    a ValueError.

    Raises ValueError for a model, RuntimeError for a head, a forward or hooks, that fastpo does not
    know.
    """
    check_flag("shared_prompts", shared_prompts)
    base = bare(model)
    if not isinstance(base, PreTrainedModel):
        raise ValueError(f"model: expected a transformers model, got {type(base).__name__}")
    if attached(base):
        raise ValueError(
            f"model: expected one without a fastpo head, got {type(base).__name__}; "
            "detach() of the handle takes that off"
        )
    _check_loss_function(base, LOSS.read())
    linear_head(base)
    softcap, logit_scale = logit_map(base.config)
    values = temperature, softcap, logit_scale, outputs, budget, backend, accumulate
    options = HeadOptions(*values, name="attach")
    return Attached(base, options, backbone.shared_prompts(base) if shared_prompts else None)


class Attached(Handle):
    """A fastpo head on a model; `detach()` takes it off."""

    def __init__(
        self, model: PreTrainedModel, options: HeadOptions, sharing: backbone.Sharing | None
    ) -> None:
        self.options, self.sharing = options, sharing
        self.known: Any = None  # config and hooks, and the factor and cap that a probe has shown
        self.own_loss = LOSS.read()
        kind: Any = type(model)
        self.parameters = backbone.parameters(kind)
        super().__init__(model)

    def begin(self) -> None:
        predictions.watch(self)

    def detach(self) -> None:
        predictions.unwatch(self)
        if self.sharing is not None:
            self.sharing.detach()
        super().detach()

    def run(self, model: PreTrainedModel, args: Any, kwargs: Any) -> Any:
        own = self.below(model)
        inputs = dict(zip(self.parameters, args, strict=False), **kwargs)
        labels = inputs.get("labels")
        if labels is None:
            labels = inputs.get("shift_labels")
        if labels is None or not self.active:
            return own(*args, **kwargs)
        if len(args) > len(self.parameters):
            raise ValueError(f"inputs: expected by name, got {len(args)} by position")
        predictions.check()
        return _Call(self, model).run(own, {**inputs, "labels": labels})


class _Call:
    """One labelled forward: what the head and the loss function were given."""

    def __init__(self, attached: Attached, model: PreTrainedModel) -> None:
        self.attached, self.model = attached, model
        softcap, logit_scale = logit_map(model.config)
        self.options = replace(attached.options, softcap=softcap, logit_scale=logit_scale)
        self.head = linear_head(model)
        self.own_tokens = not tensor_parallel(self.head)
        self.hidden: Tensor | None = None
        self.lost = False
        self.looked_at: Tensor | None = None  # the logits, once their treatment is known
        self.total: Tensor | None = None  # the loss without what a forward adds to it
        self.stats: TokenStats | None = None

    def run(self, own: Callable[..., Any], inputs: dict[str, Any]) -> ModelOutput:
        try:
            with (
                standing_in(self.head, "forward", self.project),
                standing_in(self.model, "_loss_function", self.loss, "loss_function"),
            ):
                # Only now: other calls, at their ends, take away what stands in.
                _check_loss_function(self.model, self.attached.own_loss)
                output = own(**inputs)
        except Exception as error:
            if self.hidden is None or self.lost:
                raise
            raise self.unknown(f"its forward fails on a probe ({error})") from error
        if self.stats is None:
            raise self.unknown("its forward does not go through get_output_embeddings and loss")
        if not isinstance(output, ModelOutput):
            raise ValueError(f"return_dict: expected True, got a {type(output).__name__}")
        self.check_unread(output.get("loss"))
        return self.result(output)

    def project(self, hidden: Tensor, **options: Any) -> Tensor:
        """In place of the head: remembers its input, answers with the probe."""
        if options:  # PEFT's adapter_names
            raise self.unknown(f"its forward gives the head {', '.join(options)}")
        if self.hidden is not None:
            raise self.unknown("its forward calls the head twice")
        self.hidden = hidden
        # Of the hidden states and under the loss by sums of nothing: FSDP2 gathers weights for the
        # backward when it comes by what their layers gave.
        probe = self.probe()
        return probe + hidden.flatten()[:0].sum().to(probe.device)

    def probe(self) -> Tensor:  # [1, 3, V]
        """Three positions: what is done to the first or last alone shows, too."""
        device = stored_weight(self.head).device
        words = words_of(self.head)
        # Of every size, for whoever cuts large ones off.
        row = 1e4 * torch.linspace(-1, 1, words, dtype=torch.float32, device=device) ** 3
        return row.expand(1, 3, -1)

    @torch.compiler.disable
    def loss(
        self,
        logits: Tensor,  # the probe, as the model changed it
        labels: Tensor,  # [B, T]
        vocab_size: int | None = None,
        num_items_in_batch: Tensor | int | None = None,
        ignore_index: int = -100,
        shift_labels: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """In place of `ForCausalLMLoss`, with its reductions."""
        self.lost = True
        if self.hidden is None:
            raise self.unknown("its loss comes before get_output_embeddings() is called")
        check_plain("attach", (self.hidden, labels))  # vmap would refuse to look at the logits
        if logits is not self.looked_at:
            self.known, self.looked_at = self.check(logits, vocab_size), logits
            # Whoever reads them from here on shall see that they are none; autograd saw no change.
            logits.data.fill_(float("nan"))
        if shift_labels is None:
            targets = nn.functional.pad(labels, (0, 1), value=ignore_index)[..., 1:]
        else:
            targets = shift_labels
        if targets.shape != self.hidden.shape[:-1]:
            raise ValueError(
                f"labels: expected shape {tuple(self.hidden.shape[:-1])}, got {tuple(labels.shape)}"
            )
        rows, stats = self.score(self.hidden, targets, ignore_index)
        stats = TokenStats(*(None if x is None else _where(self.known, x) for x in stats))
        self.stats = _spread(stats, rows, targets.shape, shifted=shift_labels is None)
        assert stats.logps is not None
        total = -stats.logps.sum() + logits.flatten()[:0].sum()
        if num_items_in_batch is None:
            num_items_in_batch = len(rows)
        elif isinstance(num_items_in_batch, Tensor):
            num_items_in_batch = num_items_in_batch.to(total.device)
        self.total = total / num_items_in_batch
        return self.total

    def score(
        self, hidden: Tensor, targets: Tensor, ignore_index: int
    ) -> tuple[Tensor, TokenStats]:
        """Only rows whose label counts reach the head; which ones they are."""
        device = stored_weight(self.head).device  # with a device_map the backbone may end elsewhere
        hidden, labels = hidden.to(device).flatten(0, -2), targets.to(device).flatten()
        rows = (labels != ignore_index).nonzero().squeeze(1)
        hidden, labels = hidden.index_select(0, rows), labels.index_select(0, rows)
        in_all_shards(self.model, self.head)
        weight, adapter = operands(self.head, hidden)
        operand = (rounded(hidden, weight), weight, self.head.bias, labels, self.options, adapter)
        return rows, score_sharded(*operand, own_tokens=self.own_tokens)

    def check(self, logits: Tensor, vocab_size: int | None) -> Tensor:  # one boolean
        """Whether the logits are what the config says, or as the head gave them.

        An error where neither, for which it waits for the device once, and again when something has
        changed; in between statistics are NaN where not.
        """
        probe, stated = self.probe(), (self.options.logit_scale, self.options.softcap)
        if vocab_size not in (None, probe.shape[-1]) or logits.shape != probe.shape:
            raise self.unknown(f"its loss sees logits of shape {(*logits.shape[:-1], vocab_size)}")
        state = (*stated, hooks.numbers(self.head))
        before, shown = self.attached.known or (None, stated)
        known = before == state
        # A model for pictures may leave out what the config of its text says, as Aya Vision does.
        for treatment in dict.fromkeys((shown if known else stated, stated, (1.0, None))):
            same = _treated(probe, logits, *treatment)
            if (known and _waits(same)) or same:
                scale, cap = treatment
                self.options = replace(self.options, logit_scale=scale, softcap=cap)
                self.attached.known = state, treatment
                return same
        self.attached.known = None
        raise self.unknown(
            "its forward, or a hook, changes its logits in another way than "
            f"logit_scale={stated[0]}, softcap={stated[1]}"
        )

    @torch.compiler.disable
    def check_unread(self, loss: Any) -> None:
        """An error where logits went into the loss by another way; on a GPU it is NaN, unread."""
        if not isinstance(loss, Tensor) or _waits(loss) or self.total is None:
            return
        if loss.isnan().any() and not self.total.isnan():
            raise self.unknown("what it adds to its loss is made of its logits, or NaN by itself")

    def result(self, output: ModelOutput) -> ModelOutput:
        values = {f.name: getattr(output, f.name) for f in fields(output)}  # type: ignore[arg-type]
        values["logits"] = None
        assert self.stats is not None
        return _output_class(type(output))(**values, **self.stats._asdict())

    def unknown(self, why: str) -> RuntimeError:
        return RuntimeError(
            f"{type(self.model).__name__}: expected a causal language model whose logits are "
            f"get_output_embeddings() of its hidden states, scaled and soft-capped; {why}"
        )


def _treated(probe: Tensor, logits: Tensor, scale: float, softcap: float | None) -> Tensor:
    """Whether these are the probe scaled and capped, one boolean."""
    expected = probe * scale
    if softcap is not None:
        expected = softcap * torch.tanh(expected / softcap)
    eps = torch.finfo(logits.dtype).eps
    # torch.isclose in half its passes over three rows as long as the vocabulary.
    gaps = (logits.detach().float() - expected).abs_()
    return (gaps <= expected.abs().add_(1).mul_(8 * eps)).all()


def _waits(x: Tensor) -> bool:
    """Does reading it wait for a device?"""
    return x.device.type != "cpu"


def _where(known: Tensor, x: Tensor) -> Tensor:
    """NaN, and so are the gradients, where it is not known what x is."""
    return x * torch.where(known, 1.0, float("nan")) if x.is_floating_point() else x


def _spread(stats: TokenStats, rows: Tensor, shape: torch.Size, shifted: bool) -> TokenStats:
    """Back to [B, T]; the last position of shifted labels has none and goes."""

    def place(x: Tensor | None) -> Tensor | None:
        if x is None:
            return None
        whole = x.new_zeros(shape.numel()).index_copy(0, rows, x).view(shape)
        # A copy: FSDP2 warns of views that a model gives.
        return (whole[..., :-1] if shifted else whole).clone()

    return TokenStats(*map(place, stats))


@functools.cache
def _output_class(own: type[ModelOutput]) -> type[ModelOutput]:
    """The model's own output with a field for each of `TokenStats`."""
    extra = [(name, Tensor | None, field(default=None)) for name in TokenStats._fields]
    space = {"__reduce__": _reduced}
    return make_dataclass(f"{own.__name__}WithLogps", extra, bases=(own,), namespace=space)


def _reduced(output: Any) -> Any:
    """For a pickle, which finds no class by the name of ours."""
    return _rebuilt, (
        type(output).__base__,
        {f.name: getattr(output, f.name) for f in fields(output)},
    )


def _rebuilt(own: type[ModelOutput], values: dict[str, Any]) -> ModelOutput:
    return _output_class(own)(**values)


def _check_loss_function(model: PreTrainedModel, expected: Any) -> None:
    found = unhidden(model.loss_function)
    if found is not expected:
        name = getattr(found, "__name__", type(found).__name__)
        raise RuntimeError(
            f"{type(model).__name__}.loss_function: expected ForCausalLMLoss, got {name}"
        )
