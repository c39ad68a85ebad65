"""The step a trainer takes: what is scored, by which head, and what becomes of it.

The same code runs on fake tensors, where only bytes are counted, and on real ones.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from importlib import import_module
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import unset_fake_temporarily

from ..integrations.heads import linear_head, logit_map
from ..integrations.sharing import attention
from ..integrations.sharing.backbone import Packer, layer_cost
from ..layout.cost import is_worth
from ..layout.tree import Layout, layout_of
from ..ops.linear_divergence import linear_divergence
from ..ops.linear_logps import linear_logps
from .models import Models, backbone, draws, towers
from .names import LOGITS
from .setting import Setting

_LEAST = 16  # tokens in common, as `shared_prompts` has it
Enter = Callable[[str], AbstractContextManager[Any]]


@dataclass
class Batch:
    """ids, mask: [R, T]. rows: positions of [R·T] that are scored; labels: their words.

    layout: of rows that fastpo's backbone computes once where they are alike.
    """

    ids: Tensor
    mask: Tensor
    rows: Tensor
    labels: Tensor
    layout: Layout | None = None


def batch_of(setting: Setting, vocab: int) -> Batch:
    """Rows of one length; every token of an answer is predicted by the one before it."""
    R, T = setting.rows, setting.context
    ids = torch.randint(min(vocab, 1000), (R, T))
    first = setting.prompt_tokens - 1
    for row in range(R if setting.prompt_rows > 1 else 0):
        ids[row, : first + 1] = ids[row - row % setting.prompt_rows, : first + 1]
    rows = (torch.arange(R).unsqueeze(1) * T + torch.arange(first, T - 1)).flatten()
    return Batch(ids, torch.ones_like(ids), rows, ids[:, first + 1 :].flatten())


def layout_for(model: Any, ids: Tensor, kernel: str) -> Layout | None:
    """What `shared_prompts` would pack the rows into; None where padded they cost less.

    Outside of the mode in which tensors hold nothing: it looks at the words. Rows have one length:
    where sharing loses, packing alone gains nothing. kernel: of attention; "flash" takes lengths of
    rows, whatever the model runs with here.
    """
    if backbone(model) is not model.base_model:
        return None  # which `shared_prompts` leaves padded
    with unset_fake_temporarily():
        mask, cost = torch.ones_like(ids), layer_cost(backbone(model))
        if kernel == "flash":
            cost = replace(cost, pads=False, masks=False)
        layout = layout_of(ids, mask, least=_LEAST)
        return layout if is_worth(cost, layout) else None


def _packed(model: Any, inputs: dict[str, Any], layout: Layout) -> Any:
    """The backbone's output, padded again."""
    attention.install(model.config.get_text_config()._attn_implementation)
    return Packer().packed(backbone(model), inputs, layout)


@dataclass
class Step:
    """enter: marks what is under way: "reference", "forward", "backward", "optimizer".

    mark: what goes on inside of it: the head after the layers, before them in the backward, and
    after them the embeddings. A model of more layers has its peak in another one of these, never in
    the middle of one.
    """

    setting: Setting
    models: Models
    head: str
    optimizer: Any
    enter: Enter
    mark: Callable[[str], None] = lambda name: None

    def run(self, batch: Batch) -> None:
        distils = self.setting.distils
        with self.enter("reference"), self._autocast(), self.models.other() as other:
            unscored = other is None or distils
            known = None if unscored else self._logps(other, batch, self.models.base)
        with self.enter("forward"), self._autocast(), self._embedded():
            loss = self._distilled(batch) if distils else self._loss(batch, known)
        with self.enter("backward"):
            loss.backward()
            self._reach_towers()
        del loss, known
        with self.enter("optimizer"):
            self.optimizer.step()
            self.optimizer.zero_grad()

    def _reach_towers(self) -> None:
        """Gradients as pictures would give them."""
        if towers(self.models.base.config):
            for parameter in self.models.policy.parameters():
                if parameter.requires_grad and parameter.grad is None:
                    parameter.sum().backward()

    def _autocast(self) -> AbstractContextManager[Any]:
        mixed = self.setting.dtype == "bf16-mixed"
        kind = self.models.base.device.type
        return torch.autocast(kind, torch.bfloat16) if mixed else nullcontext()

    def _loss(self, batch: Batch, known: Any) -> Tensor:
        logps = self._logps(self.models.policy, batch, self.models.base)
        ratio = logps if known is None else logps - known
        return -F.logsigmoid(0.1 * ratio.view(self.setting.rows, -1).sum(1)).mean()

    def _logps(self, model: Any, batch: Batch, base: Any) -> Tensor:
        if self.head == "fastpo" or self.setting.trainer not in LOGITS:
            own = model if model is not self.models.policy else base
            score = _fastpo if self.head == "fastpo" else _trl_fused
            hidden = self._between(_scored(own, batch))
            return score(own, hidden, batch.labels, self.setting.budget)
        return _of_logits(self._between(_logits(model, batch)), batch)

    def _between(self, x: Tensor) -> Tensor:
        """What the layers hand to the head."""
        if x.requires_grad:
            self.mark("head")
            x.register_hook(lambda _: self.mark("layers' backward"))
        else:
            self.mark("reference's head")
        return x

    @contextmanager
    def _embedded(self) -> Iterator[None]:
        """Marks where the backward comes to the embeddings, whose gradient is of all words."""

        def marked(module: Any, inputs: Any, x: Tensor) -> None:
            if x.requires_grad:
                x.register_hook(lambda _: self.mark("embeddings' backward"))

        handle = self.models.base.get_input_embeddings().register_forward_hook(marked)
        try:
            yield
        finally:
            handle.remove()

    def _distilled(self, batch: Batch) -> Tensor:
        """The student's pass, then the teacher's, as both trainers have it."""
        whole = self.head == "trl" and self.setting.trainer in LOGITS
        get = _logits if whole else _scored
        student = self._between(get(self.models.policy if whole else self.models.base, batch))
        with self.models.other() as other:
            teacher = get(other, batch)
        beta = _beta(self.setting.trainer)
        if whole:
            return _jsd_of_logits(student, teacher, beta, batch)
        sides = (self.models.base, student), (other, teacher)
        score = _fastpo_divergence if self.head == "fastpo" else _trl_divergence
        return score(*sides, beta, self.setting.budget).mean()


def _scored(model: Any, batch: Batch) -> Tensor:  # [N, H]
    inputs = {"input_ids": batch.ids, "attention_mask": batch.mask}
    if batch.layout is None or draws(model):  # rows of one length: nothing is left
        hidden: Tensor = backbone(model)(**inputs)[0]
    else:
        hidden = _packed(model, inputs, batch.layout)[0]
    return hidden.flatten(0, 1).index_select(0, batch.rows)


def _logits(model: Any, batch: Batch) -> Tensor:  # [R, T, V]
    return _as_accelerate(model(input_ids=batch.ids, attention_mask=batch.mask).logits)


def _fastpo(model: Any, hidden: Tensor, labels: Tensor, budget: int | None) -> Tensor:
    head, softcap, scale = _head_of(model)
    found = linear_logps(
        hidden, head.weight, labels, bias=head.bias, softcap=softcap, logit_scale=scale,
        budget=budget,
    )  # fmt: skip
    assert found.logps is not None
    return found.logps


def _trl_fused(model: Any, hidden: Tensor, labels: Tensor, budget: int | None) -> Tensor:
    from trl.trainer import utils

    head, softcap, scale = _head_of(model)
    width = utils._CHUNKED_LOGPROB_CHUNK_SIZE
    given = hidden, head.weight, head.bias, labels, 1.0, width, softcap, scale
    logps: Tensor = utils._ChunkedLogProbFunction.apply(*given, ())[0]
    return logps


def _as_accelerate(logits: Tensor) -> Tensor:
    """Outputs of a model under autocast leave accelerate as float32."""
    return logits.float() if torch.is_autocast_enabled(logits.device.type) else logits


def _of_logits(logits: Tensor, batch: Batch) -> Tensor:
    """As CPO and ORPO read them: cross-entropy of the chosen half, log-probabilities of all."""
    from trl.trainer.utils import selective_log_softmax

    shifted, words = logits[:, :-1], batch.ids[:, 1:]
    chosen = len(words) // 2
    nll = F.cross_entropy(shifted[:chosen].flatten(0, 1), words[:chosen].flatten())
    logps: Tensor = selective_log_softmax(shifted, words).flatten()
    return logps.index_select(0, _shorter(batch)) + nll


Side = tuple[Any, Tensor]  # a model, and the hidden states of what is scored


def _fastpo_divergence(student: Side, teacher: Side, beta: float, budget: int | None) -> Tensor:
    (head, cap, scale), (other, its_cap, its_scale) = (_head_of(x) for x, _ in (student, teacher))
    found = linear_divergence(
        student[1], head.weight, teacher[1], other.weight, kind="jsd", beta=beta, bias=head.bias,
        teacher_bias=other.bias, softcap=cap, teacher_softcap=its_cap, logit_scale=scale,
        teacher_logit_scale=its_scale, budget=budget,
    )  # fmt: skip
    assert found.divergence is not None
    return found.divergence


def _trl_divergence(student: Side, teacher: Side, beta: float, budget: int | None) -> Tensor:
    try:
        from trl.kernels.chunked_divergence import ChunkedDivergenceFunction
    except ImportError as error:
        raise ValueError("trainer: expected TRL >= 1.16 for distillation, got another") from error
    (head, cap, scale), (other, its_cap, its_scale) = (_head_of(x) for x, _ in (student, teacher))
    sides = student[1], head.weight, head.bias, teacher[1], other.weight, other.bias
    found: Tensor = ChunkedDivergenceFunction.apply(
        *sides, beta, 1.0, scale, cap, its_scale, its_cap
    )[0]
    return found


def _head_of(model: Any) -> tuple[Any, float | None, float]:
    softcap, scale = logit_map(model.config)
    return linear_head(model), softcap, scale


def _beta(trainer: str) -> float:
    """What the trainer's config has unless it is told otherwise."""
    import trl

    config = trl.DistillationConfig if trainer == "distillation" else _gkd().GKDConfig
    return float(config.beta)


def _gkd() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # TRL's notice that its experiments may change
        return import_module("trl.experimental.gkd")


def _jsd_of_logits(student: Tensor, teacher: Tensor, beta: float, batch: Batch) -> Tensor:
    """As GKD reads them; a mask of the scored ones would have a size that no fake tensor knows."""
    sides = student[:, :-1], teacher[:, :-1]
    terms = _gkd().GKDTrainer.generalized_jsd_loss(*sides, beta=beta, reduction="none")
    scored: Tensor = terms.flatten(0, 1).index_select(0, _shorter(batch))
    return scored.sum() / len(batch.rows)


def _shorter(batch: Batch) -> Tensor:
    """`rows` where a row is one position shorter."""
    return batch.rows - batch.rows // batch.ids.shape[1]
