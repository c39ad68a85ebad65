"""Runs a step on fake tensors and says what it held when it held the most."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch

from ..integrations.heads import linear_head
from ..planner import default_budget, make_plan, pair_workspace
from .live import Live
from .models import (
    WEIGHTS,
    Fake,
    Models,
    Undropped,
    build,
    fake,
    optimizer_of,
    whole_at_once,
)
from .setting import Setting
from .steps import Batch, Step, batch_of, layout_for

MIB = 2**20
# What no tensor shows, on a GPU: the driver's context and the libraries' workspaces.
CONTEXT, WORKSPACE = 500 * MIB, 64 * MIB
# Blocks the allocator rounds up and cannot use again, of what comes and goes.
FRAGMENTS = 0.05
PARTS = (
    "weights", "reference", "gradients", "optimizer", "activations", "head", "temporaries", "device"
)  # fmt: skip


Phases = dict[str, Counter[str]]  # what each phase of a step held when it held the most


@dataclass(frozen=True)
class Estimate:
    """parts: bytes at the peak of a step, by PARTS; phases: all tensors at the peak of each."""

    head: str
    setting: Setting
    parts: dict[str, int]
    phases: dict[str, int]

    @property
    def peak(self) -> int:
        return sum(self.parts.values())

    @classmethod
    def of(
        cls, head: str, setting: Setting, phases: Phases, trained: int, gathered: int
    ) -> Estimate:
        """trained: bytes of parameters with a gradient; gathered: of what is whole at once."""
        # In shards the largest phase may be another one: what comes and goes is not divided.
        each = (
            # What was gathered has been let go before the optimizer.
            _parts(setting, held, trained, 0 if name == "optimizer" else gathered)
            for name, held in phases.items()
        )
        parts = max(each, key=lambda x: sum(x.values()))
        return cls(head, setting, parts, {name: x.total() for name, x in phases.items()})


class Session:
    """One model and one head: steps of different sizes on the same fake weights."""

    def __init__(self, setting: Setting, config: Any, head: str, teacher: Any = None) -> None:
        self.setting, self.head = setting, head
        self.fake, self.live = Fake(), _HeadLive()
        with torch.device("meta"):
            self.models = build(setting, config, teacher)
        with self.fake, self.live:
            with self.live.as_("weights"):
                fake(self.models.policy, "cpu")
            if self.models.copied is not None:
                with self.live.as_("reference"):
                    fake(self.models.copied, "cpu")
            trained = [p for p in self.models.policy.parameters() if p.requires_grad]
            self.optimizer = optimizer_of(setting, trained)
            for parameter in trained:
                parameter.register_post_accumulate_grad_hook(self._is_gradient)
        self.ran = False
        self.trained = sum(p.numel() * p.itemsize for p in trained)
        self.gathered = whole_at_once(setting, self.models.policy)
        self.vocab, self.hidden = linear_head(self.models.base).weight.shape
        if setting.distils:
            words = len(linear_head(self.models.copied).weight)
            if words != self.vocab:
                raise ValueError(f"teacher: expected {self.vocab} words as the model, got {words}")

    def _is_gradient(self, parameter: Any) -> None:
        self.live.relabel([parameter.grad], "gradients")

    def phases(self, setting: Setting) -> Phases:
        """Of a step of another `context` or `batch`."""
        setting = replace(setting, budget=_budget(setting, self.vocab, self.hidden))
        self._plan_head(setting)
        models = Models(self.models.policy, self.models.copied, setting)
        found: Phases = {}

        under_way = ""

        def mark(name: str) -> None:
            nonlocal under_way
            found[under_way] = self.live.at_peak
            self.live.forget_peak()
            under_way = name

        @contextmanager
        def enter(name: str) -> Iterator[None]:
            label = {"forward": "activations", "optimizer": "optimizer"}.get(name, "temporaries")
            mark(name)
            with self.live.as_(label):
                yield
            mark("")

        step = Step(setting, models, self.head, self.optimizer, enter, mark)
        known = self._shared(setting) if self.shares else None
        for _ in range(1 if self.ran else 2):  # the optimizer has its state from the first on
            with self.fake, self.live, Undropped() if setting.device == "cuda" else nullcontext():
                step.run(known or batch_of(setting, self.vocab))
        self.ran = True
        del found[""]  # between them nothing is made
        return found

    @property
    def shares(self) -> bool:
        return self.head == "fastpo" and self.setting.prompt_rows > 1

    def _shared(self, setting: Setting) -> Batch:
        """With words, by which a layout is found."""
        batch = batch_of(setting, self.vocab)
        return replace(batch, layout=layout_for(self.models.base, batch.ids, setting.attention))

    def _plan_head(self, setting: Setting) -> None:
        dtype = WEIGHTS.get(setting.dtype.removesuffix("-mixed"), torch.float32)
        weight = linear_head(self.models.base).weight
        if setting.distils:
            tokens, teacher = setting.rows * setting.scored, linear_head(self.models.copied).weight
            widths = weight.shape[1], teacher.shape[1]
            space = pair_workspace(tokens, self.vocab, widths, dtype, setting.device)
            self.live.workspace, self.live.shared = space, 0
            return
        shape = setting.rows * setting.scored, *weight.shape
        options: dict[str, Any] = {
            "compute_dtype": dtype,
            "device": torch.device(setting.device),
            "hidden_grad": True,
            "budget": setting.budget,
        }
        trained = weight.requires_grad
        bytes_ = weight.numel() * weight.itemsize * trained
        plan = make_plan(*shape, head_grad=trained, dweight_bytes=bytes_, **options)
        self.live.workspace = plan.workspace_bytes
        self.live.shared = bytes_ if plan.shared_bytes else 0  # what is kept is no smaller then


class _HeadLive(Live):
    """Knows what fastpo's operators take beside the tensors that come out of them."""

    workspace = shared = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any | None = None
    ) -> Any:
        if getattr(func, "namespace", "") != "fastpo":
            return super().__torch_dispatch__(func, types, args, kwargs)
        self.passing("head", self.workspace)
        if "backward" in func.__name__ and self.shared:
            # d weight takes the place of what was kept: that is counted once, as d weight.
            saved = args[6]
            kept = max(saved, key=lambda x: x.untyped_storage().nbytes())
            self.shrink(kept, self.shared)
        with self.as_("head"):
            return super().__torch_dispatch__(func, types, args, kwargs)


def _budget(setting: Setting, vocab: int, hidden: int) -> int:
    if setting.budget is not None:
        return setting.budget
    own = default_budget(vocab, hidden, torch.device("cpu"))
    return max(own, (setting.memory or 0) // 16) if setting.device == "cuda" else own


def _parts(setting: Setting, peak: Counter[str], trained: int, gathered: int) -> dict[str, int]:
    """Of the peak; what lies in shards is divided, what only devices have is added."""
    found = {name: max(peak[name], 0) for name in PARTS}
    found["temporaries"] += max(peak["other"], 0)
    found["temporaries"] += peak.total() - sum(found.values())  # no part is less than nothing
    if setting.devices > 1:
        _divide(setting, found, trained, gathered)
    if setting.device == "cuda":
        moving = found["activations"] + found["temporaries"] + found["head"]
        found["device"] += CONTEXT + WORKSPACE + int(FRAGMENTS * moving)
    return found


def _divide(setting: Setting, found: dict[str, int], trained: int, gathered: int) -> None:
    if setting.strategy == "ddp":
        found["device"] += trained  # buckets that hold gradients a second time
        return
    for name in ("weights", "reference", "gradients", "optimizer"):
        found[name] = -(-found[name] // setting.devices)
    found["device"] += gathered
