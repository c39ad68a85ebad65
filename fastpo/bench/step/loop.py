"""DPO steps: a bare loop with eager logits or with fastpo's head, and TRL's DPOTrainer."""

from __future__ import annotations

import math
import os
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel

import fastpo
from fastpo.integrations.checkpointing import argument
from fastpo.testing import assert_as_good_as_eager

from . import architectures
from .architectures import ADAPTED, RANK, Models
from .batches import Batch, Texts, batch

BETA = 0.1
_RATE = 1e-5
_CHECKED = 32  # positions of the two rows whose log-probabilities are judged


@dataclass(frozen=True)
class Job:
    """One variant at one size."""

    variant: str
    model: str
    device: str
    dtype: str
    pairs: int
    length: int
    steps: int
    checkpointing: bool
    threads: int
    texts: Texts
    clock: str  # "wall", or "process": its own time on a CPU

    @property
    def torch_dtype(self) -> torch.dtype:
        kind = getattr(torch, self.dtype)
        assert isinstance(kind, torch.dtype)
        return kind

    def __str__(self) -> str:
        texts = "" if self.texts == Texts() else f", {self.texts}"
        return f"{self.variant}, {self.pairs} × {self.length} tokens{texts}"


# [2·pairs, T - 1] log-probabilities of a model
Score = Callable[[PreTrainedModel, Batch], Tensor]


def eager_tokens(model: PreTrainedModel, of: Batch) -> Tensor:
    """As a trainer without a fused head has them: logits, float32, log-softmax."""
    logits = model(input_ids=of.ids, attention_mask=of.mask).logits[:, :-1].float()
    words = of.labels[:, 1:]
    own = torch.log_softmax(logits, -1).gather(-1, words.clamp_min(0).unsqueeze(-1)).squeeze(-1)
    return own.masked_fill(words < 0, 0)


def fused_tokens(model: PreTrainedModel, of: Batch) -> Tensor:
    """Through `fastpo.attach`."""
    logps = model(input_ids=of.ids, attention_mask=of.mask, labels=of.labels).logps
    assert isinstance(logps, Tensor)
    return logps


@contextmanager
def attached(models: Models, share: bool | None = None) -> Iterator[None]:
    """share: prompts, too; False: packed without padding, but whole."""
    with ExitStack() as stack:
        for model in (models.policy, models.copied):
            if model is not None:
                stack.enter_context(fastpo.attach(model))
                if share is not None:
                    stack.enter_context(fastpo.shared_prompts(model, share=share))
        yield


BARE: dict[str, tuple[Score, Callable[[Models], Any]]] = {
    "eager": (eager_tokens, lambda _: nullcontext()),
    "fastpo": (fused_tokens, attached),
    "fastpo + padding-free": (fused_tokens, partial(attached, share=False)),
    "fastpo + shared prompts": (fused_tokens, partial(attached, share=True)),
}
# Options of `fastpo.patched`, where it is on.
THROUGH_TRL: dict[str, dict[str, bool] | None] = {
    "trl": None,
    "trl + fastpo": {},
    "trl + fastpo + padding-free": {"padding_free": True},
    "trl + fastpo + shared prompts": {"shared_prompts": True},
}
VARIANTS = ("eager", "fastpo", "trl", "trl + fastpo")
SHARING = (*BARE, *THROUGH_TRL)


def is_fused(job: Job) -> bool:
    """Whether a loop without a trainer has fastpo's head."""
    return job.variant in BARE and BARE[job.variant][0] is fused_tokens


def missing(job: Job) -> str | None:
    """The package that a variant needs and that is not there: known before a model is made."""
    if job.variant in BARE:
        return None
    needed = ["trl", "datasets"] + ["peft"] * job.model.endswith("-lora")
    return next((name for name in needed if find_spec(name) is None), None)


class Step(NamedTuple):
    """The loss, and the norm of all gradients."""

    loss: float
    norm: float


@contextmanager
def bare_loop(job: Job, models: Models) -> Iterator[Callable[[int, int], Step]]:
    """A function that takes a whole step of (pairs, length)."""
    score, around = BARE[job.variant]
    trained = [p for p in models.policy.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(trained, lr=_RATE, weight_decay=0.0)
    vocab = models.policy.config.vocab_size

    def step(pairs: int, length: int) -> Step:
        of = batch(job.texts, pairs, length, vocab, job.device)
        with models.as_reference() as reference:
            before = score(reference, of).sum(1)
        ratio = score(models.policy, of).sum(1) - before
        chosen, rejected = ratio.chunk(2)
        loss = -functional.logsigmoid(BETA * (chosen - rejected)).mean()
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(trained, math.inf)  # as transformers' Trainer does
        optimiser.step()
        return Step(loss.item(), norm.item())

    with around(models):
        yield step


@torch.no_grad()
def check(job: Job, models: Models) -> None:
    """AssertionError unless the log-probabilities of the policy keep the project's rule."""
    model = models.policy
    of = batch(Texts(), 1, 2 * _CHECKED, model.config.vocab_size, job.device)
    eager = eager_tokens(model, of)
    hidden = model.get_decoder()(input_ids=of.ids).last_hidden_state[:, :-1]
    head = model.get_output_embeddings()
    assert isinstance(head, nn.Linear)
    log_p = torch.log_softmax(hidden.double() @ head.weight.double().t(), -1)
    words = of.labels[:, 1:]
    truth = log_p.gather(-1, words.clamp_min(0).unsqueeze(-1)).squeeze(-1)
    with attached(models):
        fused = fused_tokens(model, of)
    assert_as_good_as_eager("logps", fused, eager, truth.masked_fill(words < 0, 0))


def models_of(job: Job) -> Models:
    return architectures.build(
        architectures.architecture(job.model),
        job.device,
        job.torch_dtype,
        checkpointing=job.checkpointing,
        adapted=job.variant in BARE,
    )


def trl_steps(job: Job, seconds: list[float], begin: Callable[[], None]) -> list[Step]:
    """A DPOTrainer's steps on the same batch; appends the seconds of each to `seconds`.

    begin: called before the first step, after all that is loaded once.
    """
    from transformers import PrinterCallback

    hush()
    options = THROUGH_TRL[job.variant]
    patched = nullcontext() if options is None else fastpo.patched(**options)
    with tempfile.TemporaryDirectory() as folder, patched:
        trainer = trainer_of(job, models_of(job), folder)
        trainer.add_callback(_clock(job, seconds, begin))
        trainer.remove_callback(PrinterCallback)
        trainer.train()
        logs = [log for log in trainer.state.log_history if "loss" in log]
        return [Step(log["loss"], log["grad_norm"]) for log in logs]


def hush() -> None:
    """A benchmark's own process: what libraries say about their progress is in nobody's way."""
    import datasets
    import transformers

    datasets.disable_progress_bars()
    transformers.logging.set_verbosity_error()
    warnings.simplefilter("ignore", FutureWarning)


def trainer_of(job: Job, models: Models, folder: str) -> Any:
    os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1", TOKENIZERS_PARALLELISM="false")
    from datasets import Dataset
    from trl import DPOTrainer

    from fastpo.demo.data import embedded_pairs
    from fastpo.demo.tokenizer import texts_of, train_tokenizer

    rows = embedded_pairs().train
    vocab = models.policy.config.vocab_size
    of = batch(job.texts, job.pairs, job.length, vocab, "cpu")
    fixed = {"input_ids": of.ids, "attention_mask": of.mask}
    fixed["completion_mask"] = (of.labels >= 0).long()
    extra: dict[str, Any] = {"ref_model": models.copied}
    if models.copied is None:
        from peft import LoraConfig

        extra = {"peft_config": LoraConfig(r=RANK, lora_alpha=RANK, target_modules=[*ADAPTED])}
    return DPOTrainer(
        models.policy,
        args=_config(job, folder),
        train_dataset=Dataset.from_list(rows[:1] * (job.pairs * (job.steps + 1))),
        processing_class=train_tokenizer(texts_of(rows), min(2048, vocab)),
        data_collator=lambda _: dict(fixed),  # the texts only satisfy the trainer
        **extra,
    )


def _config(job: Job, folder: str) -> Any:
    """What the bare loop does, in TRL's words: no schedule, no clipping, no weight decay."""
    from trl import DPOConfig

    return DPOConfig(
        output_dir=folder,
        max_steps=job.steps + 1,
        per_device_train_batch_size=job.pairs,
        learning_rate=_RATE,
        beta=BETA,
        lr_scheduler_type="constant",
        max_grad_norm=0,
        use_cpu=job.device == "cpu",
        bf16=False,  # the weights already are
        **argument(job.checkpointing),
        report_to="none",
        save_strategy="no",
        logging_steps=1,
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )


def _clock(job: Job, seconds: list[float], begin: Callable[[], None]) -> Any:
    from transformers import TrainerCallback

    class Clock(TrainerCallback):
        start = 0.0

        def on_train_begin(self, *_: Any, **__: Any) -> None:
            begin()

        def on_step_begin(self, *_: Any, **__: Any) -> None:
            self.start = now(job)

        def on_step_end(self, *_: Any, **__: Any) -> None:
            seconds.append(now(job) - self.start)

    return Clock()


def now(job: Job) -> float:
    if job.device == "cuda":
        torch.cuda.synchronize()
    return time.process_time() if job.clock == "process" else time.perf_counter()
