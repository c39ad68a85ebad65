"""A call of any primitive, drawn from few choices and a seed: its tensors, and its slow twin."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

import fastpo
from fastpo import reference
from fastpo.ops.shards.gathered import HeadOptions, score

Named = dict[str, Tensor]
FLOATS = ("float32", "bfloat16", "float16")
LOGIT_MAP = ("temperature", "softcap", "logit_scale")


@dataclass(frozen=True)
class Side:
    """One head. layouts: of hidden states, weight and bias; biased: whether it has a bias."""

    width: int
    dtypes: tuple[str, str, str]
    layouts: tuple[str, str, str]
    biased: bool


@dataclass(frozen=True)
class Call:
    """All of one call but its numbers, which `seed` draws.

    sides: the student and the teacher, or the heads of a mixture; else one.
    size: how long hidden states are.  labels: how they fall; ignored: the share that is left out.
    broken: what stands in some hidden states, if anything.
    """

    name: str
    shape: tuple[int, ...]
    vocab: int
    sides: tuple[Side, ...]
    seed: int
    size: float
    labels: str
    ignored: float
    label_layout: str
    broken: float | None
    trained: tuple[str, ...]
    options: dict[str, Any]
    heads: int = 1  # of multi_head_logps
    listed: int = 1  # words of a list

    @property
    def rows(self) -> int:
        return torch.Size(self.shape).numel()


class Problem:
    """The numbers of a call: `leaves` as they are, in one piece; `fixed` has no gradient."""

    def __init__(self, call: Call) -> None:
        self.call, self.draw = call, torch.Generator().manual_seed(call.seed)
        self.leaves: Named = {}
        for i, side in enumerate(call.sides):
            self._side(side, str(i or ""), (call.heads,) if call.name == "multi_head_logps" else ())
        if call.name == "adapted":
            down, up = self.normal(*call.shape, 2), self.normal(call.vocab, 2)
            # Of numbers that its own dtype has, and the one it is used in.
            dtype = self.leaves["hidden"].dtype
            self.leaves |= {"down": down.to(dtype), "up": up.to(dtype).float()}
        labels, self.ignored = self._labels()
        self.fixed = {"labels": labels, "mask": ~self.ignored, **self._lists()}

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.draw)

    def below(self, end: int, *shape: int) -> Tensor:
        return torch.randint(0, end, shape, generator=self.draw)

    def _side(self, side: Side, suffix: str, heads: tuple[int, ...]) -> None:
        call = self.call
        tensors = {
            "hidden": self.normal(*call.shape, side.width) * call.size,
            "weight": self.normal(*heads, call.vocab, side.width) / side.width**0.5,
        }
        if side.biased:
            tensors["bias"] = self.normal(*heads, call.vocab)
        for (name, x), dtype, layout in zip(
            tensors.items(), side.dtypes, side.layouts, strict=False
        ):
            if layout == "expanded" and x.dim() > 1:
                x = x[:1].expand_as(x)
            self.leaves[name + suffix] = x.to(getattr(torch, dtype))

    def _labels(self) -> tuple[Tensor, Tensor]:
        """And which rows they leave out."""
        call, V = self.call, self.call.vocab
        labels = self.below(V, *call.shape)
        if call.labels != "random":
            labels.fill_({"first": 0, "last": V - 1}[call.labels])
        ignored = torch.rand(call.shape, generator=self.draw) < call.ignored
        by_label = "ignore_index" in call.options
        index = call.options.get("ignore_index")
        if by_label and index is not None:
            labels = labels.masked_fill(ignored, index)
        if by_label:
            ignored = torch.zeros_like(ignored) if index is None else labels == index
        elif not call.options.get("masked", False):
            ignored = torch.zeros_like(ignored)
        return labels, ignored

    def _lists(self) -> Named:
        call, V = self.call, self.call.vocab
        order = torch.rand(*call.shape, V, generator=self.draw).argsort(-1)[..., : call.listed]
        spread = self.normal(*call.shape, V).log_softmax(-1).gather(-1, order)
        return {
            "exclude": self.below(V + 1, *call.shape) - 1,
            "heads": self.below(call.heads, *call.shape),
            "ids": order,
            "listed": spread,
            "coefficients": torch.rand(*call.shape, len(call.sides), generator=self.draw) - 0.2,
            "mixing": torch.rand(len(call.sides), generator=self.draw),
        }

    @cached_property
    def broken(self) -> Tensor:
        """Rows whose hidden states are not numbers."""
        found = torch.zeros(self.call.shape, dtype=torch.bool)
        shared = any(side.layouts[0] == "expanded" for side in self.call.sides)
        if self.call.broken is not None and found.numel() and not shared:
            found.view(-1)[self.call.seed % found.numel()] = True
        return found & ~self.ignored

    def factors(self, outputs: Named, number: int = 0) -> Named:
        """A number of its own for each number of the outputs."""
        g = torch.Generator().manual_seed(self.call.seed + number)
        return {name: torch.randn(x.shape, generator=g) for name, x in outputs.items()}


@dataclass(frozen=True)
class Size:
    """How large the numbers of a call are before they cancel: what is rounded is that large.

    Among a few numbers eager is sometimes lucky; nobody is asked to be luckier. `logits` bounds
    those of all heads, and their terms; height: of the largest result, at least 1.
    """

    problem: Problem
    logits: float
    height: float

    @classmethod
    def of(cls, problem: Problem, truth: Named) -> Size:
        leaves = problem.leaves
        norms = {name: x.double().norm(dim=-1) for name, x in leaves.items() if "bias" not in name}
        norms |= {name: x.double().abs() for name, x in leaves.items() if "bias" in name}
        most = {name: x.max().item() if x.numel() else 0.0 for name, x in norms.items()}
        products = sum(
            most["hidden" + i] * most["weight" + i] + most.get("bias" + i, 0.0)
            for i in (str(i or "") for i in range(len(problem.call.sides)))
        )
        products += most.get("down", 0.0) * most.get("up", 0.0)
        sizes = [x[x.isfinite()].abs() for x in truth.values() if x.is_floating_point()]
        height = max([1.0, *(x.max().item() for x in sizes if x.numel())])
        return cls(problem, products * slope(problem.call), height)

    @property
    def values(self) -> float:
        return 4 * torch.finfo(torch.float32).eps * (1 + self.logits) * self.height

    def gradient(self, name: str, factors: Named, dtype: torch.dtype) -> float:
        """factors: of the loss.  dtype: of the products; probabilities are kept in it."""
        call, leaves = self.problem.call, self.problem.leaves
        rows = sum(
            x.abs().reshape(call.rows, x.numel() // max(call.rows, 1)).sum(1)
            for x in factors.values()
        )
        stem = name.rstrip("12")
        of_rows = stem in ("hidden", "down")
        partner = {"hidden": "weight", "weight": "hidden", "down": "up", "up": "down"}.get(stem)
        size = 1.0 if partner is None else leaves[partner + name[len(stem) :]].double().abs()
        largest = size if partner is None else size.max().item() if size.numel() else 0.0
        total = (rows.max() if of_rows else rows.sum()).item() if call.rows else 0.0
        unit = torch.finfo(torch.float32).eps * (1 + self.logits)
        if "divergence" in call.name:
            unit *= (1 + self.logits) * self.height
        if call.name not in ("linear_divergence", "mixed_linear_logps"):
            unit += torch.finfo(dtype).eps / 2
        if call.name == "linear_topk_divergence":
            unit += torch.finfo(leaves[name].dtype).eps / 2  # it has two gradients to add up
        return total * largest * slope(call) * unit


def slope(call: Call) -> float:
    """Of a logit by its product, at most."""
    of = ("", "teacher_")
    scales = [1.0, *call.options.get("logit_scales", ())]
    scales += [call.options.get(f"{which}logit_scale", 1.0) for which in of]
    return max(map(abs, scales)) / min(call.options.get(f"{x}temperature", 1.0) for x in of)


def laid(x: Tensor, layout: str) -> Tensor:
    """The same numbers elsewhere in memory; what lies between them is NaN."""
    if layout == "expanded" and x.dim() > 1 and len(x):
        return x[:1].clone().expand_as(x)
    if layout == "transposed" and x.dim() > 1:
        return x.transpose(-1, -2).contiguous().transpose(-1, -2)
    if layout == "swapped" and x.dim() > 2:
        return x.transpose(0, 1).contiguous().transpose(0, 1)
    filler = float("nan") if x.is_floating_point() else 77
    if layout == "sliced":
        wide = x.new_empty(*x.shape, 2) if x.dtype == torch.bool else None
        wide = x.new_full((*x.shape, 2), filler) if wide is None else wide
        wide[..., 1] = x
        return wide[..., 1]
    if layout == "offset":
        flat = torch.empty(x.numel() + 3, dtype=x.dtype)
        return flat[3:].view(x.shape).copy_(x)
    # Of 16 bits PyTorch's own copies forget the sign.
    if layout == "negated" and x.dtype == torch.float32:
        return torch._neg_view(-x)
    return x.clone()


LAYOUTS = ("plain", "transposed", "swapped", "sliced", "offset", "expanded", "negated")


def _map(call: Call) -> dict[str, Any]:
    return {name: call.options[name] for name in LOGIT_MAP if name in call.options}


def _per_head(call: Call, leaves: Named, name: str) -> list[Tensor | None]:
    return [leaves.get(name + str(i or "")) for i in range(len(call.sides))]


def _mixture(call: Call, leaves: Named, fixed: Named) -> tuple[Any, ...]:
    m = fixed["coefficients" if call.options["per_token"] else "mixing"]
    return _per_head(call, leaves, "hidden"), _per_head(call, leaves, "weight"), m, fixed["labels"]


def fused(call: Call, leaves: Named, fixed: Named) -> Named:
    """What fastpo makes of it, by name."""
    x, options = {**leaves, **fixed}, dict(call.options)
    head = x["hidden"], x["weight"]
    bias = leaves.get("bias")
    if call.name == "linear_logps":
        found = fastpo.linear_logps(*head, x["labels"], bias=bias, **options)
    elif call.name == "vocab_parallel_logps":
        whole = {"first": 0, "vocab": call.vocab, "bias": bias}
        found = fastpo.vocab_parallel_logps(*head, x["labels"], **whole, **options)
    elif call.name == "multi_head_logps":
        found = fastpo.multi_head_logps(*head, x["labels"], x["heads"], bias=bias, **options)
    elif call.name == "adapted":
        hidden, down = (y.reshape(-1, y.shape[-1]) for y in (x["hidden"], x["down"]))
        rows, adapter = (hidden, x["weight"], bias, x["labels"].flatten()), (down, x["up"])
        found = score(*rows, HeadOptions(**options), adapter=adapter)
        found = type(found)(*(None if y is None else y.view(call.shape) for y in found))
    elif call.name == "mixed_linear_logps":
        options.pop("per_token")
        biases = _per_head(call, leaves, "bias")
        found = fastpo.mixed_linear_logps(*_mixture(call, leaves, fixed), biases=biases, **options)
    elif call.name == "linear_divergence":
        mask = x["mask"] if options.pop("masked") else None
        teacher = x["hidden1"], x["weight1"]
        biases = {"bias": bias, "teacher_bias": leaves.get("bias1")}
        found = fastpo.linear_divergence(*head, *teacher, mask=mask, **biases, **options)
    elif call.name == "linear_topk":
        mask = x["mask"] if options.pop("masked") else None
        exclude = x["exclude"] if options.pop("excluded") else None
        found = fastpo.linear_topk(
            *head, call.listed, exclude=exclude, mask=mask, bias=bias, **options
        )
    else:
        mask = x["mask"] if options.pop("masked") else None
        lists = x["ids"], x["listed"]
        return {
            "divergence": fastpo.linear_topk_divergence(
                *head, *lists, mask=mask, bias=bias, **options
            )
        }
    return {name: y for name, y in found._asdict().items() if y is not None}


def slow(call: Call, leaves: Named, fixed: Named, ids: Tensor | None = None) -> Named:
    """The same by the twins of `fastpo.reference`. ids: the words that `linear_topk` chose."""
    x, options = {**leaves, **fixed}, call.options
    head, bias = (x["hidden"], x["weight"]), leaves.get("bias")
    given = {**_map(call), "bias": bias}
    index = {"ignore_index": options.get("ignore_index")}
    if call.name in ("linear_logps", "vocab_parallel_logps"):
        return reference.linear_logps(*head, x["labels"], **given, **index)._asdict()
    if call.name == "multi_head_logps":
        return reference.multi_head_logps(
            *head, x["labels"], x["heads"], **given, **index
        )._asdict()
    if call.name == "adapted":
        joined = torch.cat((x["hidden"], x["down"]), -1), torch.cat((x["weight"], x["up"]), -1)
        return reference.linear_logps(*joined, x["labels"], **given, **index)._asdict()
    if call.name == "mixed_linear_logps":
        maps = {name: options[name] for name in ("temperature", "softcaps", "logit_scales")}
        biases = _per_head(call, leaves, "bias")
        mixture = _mixture(call, leaves, fixed)
        return reference.mixed_linear_logps(*mixture, biases=biases, **maps, **index)._asdict()
    scored = x["mask"]
    if call.name == "linear_divergence":
        names = ("kind", "beta", "alpha", "teacher_temperature", "teacher_softcap")
        named = {name: options[name] for name in (*names, "teacher_logit_scale")}
        teacher = x["hidden1"], x["weight1"]
        found = reference.linear_divergence(
            *head, *teacher, teacher_bias=leaves.get("bias1"), **given, **named
        )
        return {name: torch.where(scored, y, 0) for name, y in found._asdict().items()}
    z = reference._logits(*head, bias, options["softcap"], options["logit_scale"])
    z = z / options["temperature"]
    log_p = z.log_softmax(-1)
    if call.name == "linear_topk":
        left_out = x["exclude"] if options["excluded"] else torch.full_like(x["labels"], -1)
        words = torch.arange(call.vocab)
        ranked = log_p.detach().masked_fill(words == left_out.unsqueeze(-1), float("-inf"))
        best = ranked.sort(-1, descending=True).values[..., : call.listed]
        values = {"values": log_p.gather(-1, ids), "best": best, "lse": torch.logsumexp(z, -1)}
        return {
            name: torch.where(scored if y.dim() == scored.dim() else scored.unsqueeze(-1), y, 0)
            for name, y in values.items()
        }
    s, t = log_p.gather(-1, x["ids"]), x["listed"].to(z.dtype)
    if options["tail"]:
        # Those that are not listed, 1e-30 of the best that is at least.
        others = log_p.scatter(-1, x["ids"], float("-inf")).logsumexp(-1, keepdim=True)
        others = others.maximum(s.detach().amax(-1, keepdim=True) + math.log(1e-30))
        s, t = torch.cat((s, others), -1), with_rest(t, others.detach())
    else:
        s, t = s.log_softmax(-1), t.log_softmax(-1)
    share = {"forward_kl": 0.0, "reverse_kl": 1.0}.get(options["kind"], options["beta"])
    if share in (0.0, 1.0):
        rows = t.exp() * (t - s) if share == 0 else s.exp() * (s - t)
    else:
        m = (share * t.exp() + (1 - share) * s.exp()).log()
        rows = share * t.exp() * (t - m) + (1 - share) * s.exp() * (s - m)
    return {"divergence": torch.where(scored, rows.sum(-1), 0)}


def with_rest(listed: Tensor, student: Tensor) -> Tensor:
    """And log(1 - Σ q), of a list that holds all the mass the student's or log(1e-6)."""
    total = listed.logsumexp(-1, keepdim=True)
    rest = torch.log(-torch.expm1(total.clamp_max(-1e-6)))
    rest = torch.where(total > -1e-6, rest.minimum(student), rest)
    return torch.cat((listed, rest), -1)
