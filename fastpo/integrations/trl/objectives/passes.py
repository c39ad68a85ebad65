"""One pass of a model over a batch as TRL asks for it, and what fastpo reads off it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ....ops.stats import TokenStats
from ..head import HeadCall, recording

Rows = Mapping[str, Tensor]  # input_ids, attention_mask, completion_mask: [n, T + 1]


class Pass:
    """Called by TRL in place of the model: more rows go in beside TRL's, TRL gets its own back.

    extras: rows of further texts. The first scored call is remembered.
    """

    def __init__(self, model: Any, extras: Sequence[Rows] = ()) -> None:
        self.model, self.extras = model, extras
        self.mask: Tensor  # [R, T] bool, of all rows
        self.stats: TokenStats | None = None
        self.call: HeadCall | None = None

    def __getattr__(self, name: str) -> Any:
        """Of the model: a script's own methods are given this in its place."""
        if name == "model":
            raise AttributeError(name)  # of an instance that is being made
        return getattr(self.model, name)

    def __call__(self, **arguments: Any) -> Any:
        if not arguments.get("fused_lm_head") or self.stats is not None:
            return self.model(**arguments)
        rows, width = arguments["labels"].shape
        joined = _joined(arguments, self.extras)
        with recording() as calls:
            output = self.model(**joined)
        self.mask = joined["labels"][:, 1:] != -100
        self.call = calls[-1] if calls else None
        length = self.mask.shape[1]
        # Prompt-learning PEFT prepends virtual tokens.
        stats = {
            name: values[:, -length:]
            for name, field in _FIELDS.items()
            if (values := getattr(output, field, None)) is not None
        }
        self.stats = TokenStats(**stats)
        if not self.extras:
            return output
        return _own_rows(output, rows, len(self.mask), length + 1 - width)

    @property
    def logps(self) -> Tensor:  # [R, T]
        assert self.stats is not None and self.stats.logps is not None
        return self.stats.logps

    @property
    def head(self) -> HeadCall:
        if self.call is None:
            raise RuntimeError(
                "fastpo.patch: expected in force while training in float32, bfloat16 or float16, "
                "got TRL's own head"
            )
        return self.call

    def spread(self, values: Tensor) -> Tensor:
        """[scored tokens] -> [R, T], 0 where nothing is scored."""
        return values.new_zeros(self.mask.shape).masked_scatter(self.mask, values)


# TokenStats -> TRL's output.
_FIELDS = {
    "logps": "log_probs",
    "entropy": "entropy",
    "log_sum_sq_probs": "log_sum_sq_probs",
}


def _joined(arguments: Mapping[str, Any], extras: Sequence[Rows]) -> dict[str, Any]:
    """The model's arguments with the extra rows under TRL's, padded on the right."""
    if not extras:
        return dict(arguments)
    unknown = {
        name
        for name, value in arguments.items()
        if isinstance(value, Tensor) and name not in ("input_ids", "attention_mask", "labels")
    }
    if unknown:
        got = ", ".join(sorted(unknown))
        raise ValueError(f"third texts: expected text-only batches, got {got}")
    blocks = [arguments] + [
        {
            "input_ids": rows["input_ids"],
            "attention_mask": rows["attention_mask"],
            "labels": rows["input_ids"].masked_fill(rows["completion_mask"] == 0, -100),
        }
        for rows in extras
    ]
    width = max(block["labels"].shape[1] for block in blocks)
    joined = {
        name: torch.cat([F.pad(b[name], (0, width - b[name].shape[1]), value=fill) for b in blocks])
        for name, fill in {"input_ids": 0, "attention_mask": 0, "labels": -100}.items()
    }
    return {**arguments, **joined}


def _own_rows(output: Any, rows: int, all_rows: int, padding: int) -> Any:
    """TRL's part of an output over more rows, as wide as TRL's batch was."""

    def own(value: Any) -> Any:
        whole = isinstance(value, Tensor) and value.dim() == 2 and len(value) == all_rows
        # Virtual tokens of prompt learning stand in front; the padding is behind.
        return value[:rows, : value.shape[1] - padding] if whole else value

    return type(output)(**{name: own(value) for name, value in output.items()})


def token_kl(policy: Pass, reference: Pass) -> Callable[[], Tensor]:
    """[R, T] KL(reference || policy) over the whole vocabulary, nats, gradient to the policy."""

    def compute() -> Tensor:
        from ....ops.linear_divergence import linear_divergence

        own, other = policy.head, reference.head
        (hidden, weight), (teacher, teacher_weight) = own.operands, other.operands
        found = linear_divergence(
            hidden,
            weight,
            teacher,
            teacher_weight,
            kind="forward_kl",
            bias=own.bias,
            teacher_bias=other.bias,
            **_map(own, ""),
            **_map(other, "teacher_"),
            budget=own.options.budget,
            backend=own.options.backend,
        )
        assert found.divergence is not None
        return policy.spread(found.divergence)

    return compute


def _map(call: HeadCall, prefix: str) -> dict[str, Any]:
    options = call.options
    return {
        f"{prefix}temperature": options.temperature,
        f"{prefix}softcap": options.softcap,
        f"{prefix}logit_scale": options.logit_scale,
    }


def mixed(policy: Pass, reference: Pass, mixing: float) -> Callable[[], Tensor]:
    """[R, T] log-probabilities under softmax(m·logits + (1 - m)·reference logits), no gradient."""

    def compute() -> Tensor:
        from ....ops.mixed_linear_logps import mixed_linear_logps

        heads = [call.operands for call in (policy.head, reference.head)]
        with torch.no_grad():
            stats = mixed_linear_logps(
                [hidden for hidden, _ in heads],
                [weight for _, weight in heads],
                (mixing, 1 - mixing),
                policy.head.targets,
                biases=[policy.head.bias, reference.head.bias],
                temperature=policy.head.options.temperature,
                softcaps=[run.head.options.softcap for run in (policy, reference)],
                logit_scales=[run.head.options.logit_scale for run in (policy, reference)],
                backend=policy.head.options.backend,
            )
        assert stats.logps is not None
        return policy.spread(stats.logps)

    return compute


def alternatives(policy: Pass, k: int) -> Callable[[], Tensor]:
    """[R, T] log-probability of another token, drawn from the policy's k best, with gradient."""

    def compute() -> Tensor:
        from ....ops.linear_topk import linear_topk

        call = policy.head
        found = linear_topk(
            *call.operands,
            k,
            exclude=call.targets,
            bias=call.bias,
            **_map(call, ""),
            budget=call.options.budget,
            backend=call.options.backend,
        )
        return policy.spread(found.sample().values)

    return compute
