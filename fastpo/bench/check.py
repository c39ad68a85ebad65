"""The judge of the head benchmark: float64, with eager PyTorch of the same dtype beside it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from fastpo.testing import HeadInputs, max_error, rounding

from .variants import Result, eager

SAMPLES = 48
_CELLS = 2**27  # one block of float64 logits: 1 GiB


@dataclass(frozen=True)
class Values:
    """Log-probabilities of all tokens, gradients of a sample of rows and of words."""

    logps: Tensor  # [N]
    dhidden: Tensor  # [rows, H]
    dweight: Tensor  # [words, H]


@dataclass(frozen=True)
class Judge:
    rows: Tensor  # [rows] sampled tokens
    words: Tensor  # [words] sampled vocabulary
    truth: Values  # float64
    eager: Values

    def errors(self, result: Result) -> dict[str, float]:
        """Largest errors by name: `logps` per token where there are sums, absent ones left out."""
        sums = self.truth.logps.view(result.logps.numel(), -1)
        found = {"logps": max_error(result.logps, sums.sum(1)) / sums.shape[1]}
        sampled = {"dhidden": self.rows, "dweight": self.words}
        for name, grad in result.grads.items():
            found[name] = max_error(grad[sampled[name]], getattr(self.truth, name))
        return found

    def complaint(self, errors: dict[str, float], dtype: torch.dtype) -> str | None:
        """Why the project's rule is broken: twice eager's own error and half an ulp are allowed."""
        for name, error in errors.items():
            truth, plain = getattr(self.truth, name), getattr(self.eager, name)
            kind = torch.float32 if name == "logps" else dtype
            of_eager = max_error(plain, truth)
            if not error <= 2 * of_eager + rounding(truth, kind):
                return f"{name}: error {error:.2e} against float64, eager has {of_eager:.2e}"
        return None


def judge(x: HeadInputs, upstream: Tensor) -> Judge:
    n, v = len(x.labels), x.weight.shape[0]
    g = torch.Generator().manual_seed(0)
    rows = torch.randint(n, (min(SAMPLES, n),), generator=g)
    rows[-1] = n - 1
    words = torch.randint(v, (SAMPLES,), generator=g)
    words[-1] = v - 1  # the last tile is ragged, as a rule
    labels = x.labels.cpu()
    words[: SAMPLES // 2] = labels[torch.randint(n, (SAMPLES // 2,), generator=g)]
    rows, words = rows.to(x.hidden.device), words.to(x.hidden.device)
    return Judge(rows, words, _truth(x, upstream, rows, words), _eager(x, upstream, rows, words))


def _blocks(x: HeadInputs) -> Iterator[slice]:
    n = len(x.labels)
    step = max(1, min(n, _CELLS // x.weight.shape[0]))
    return (slice(a, min(a + step, n)) for a in range(0, n, step))


@torch.no_grad()
def _truth(x: HeadInputs, upstream: Tensor, rows: Tensor, words: Tensor) -> Values:
    """d logp / d z_v = 1[v = label] - p_v, in float64, over blocks of tokens."""
    weight, g = x.weight.detach().double(), upstream.double()
    logps = g.new_empty(len(x.labels))
    dweight = weight.new_zeros(len(words), weight.shape[1])
    dhidden = weight.new_zeros(len(rows), weight.shape[1])
    for block in _blocks(x):
        hidden, labels = x.hidden[block].detach().double(), x.labels[block]
        log_p = torch.log_softmax(hidden @ weight.t(), -1)
        logps[block] = log_p.gather(1, labels.unsqueeze(1)).squeeze(1)
        dz = (labels.unsqueeze(1) == words).double() - log_p[:, words].exp()
        dweight += (dz * g[block].unsqueeze(1)).t() @ hidden
        for i in ((rows >= block.start) & (rows < block.stop)).nonzero().flatten().tolist():
            row = int(rows[i])
            expected = log_p[row - block.start].exp() @ weight
            dhidden[i] = g[row] * (weight[x.labels[row]] - expected)
    return Values(logps, dhidden, dweight)


def _eager(x: HeadInputs, upstream: Tensor, rows: Tensor, words: Tensor) -> Values:
    """Autograd over blocks of tokens; d weight of the blocks is summed in float32."""
    logps, dhidden = [], []
    weight = x.weight.detach().requires_grad_()
    dweight = torch.zeros_like(weight[words], dtype=torch.float32, requires_grad=False)
    for block in _blocks(x):
        hidden = x.hidden[block].detach().requires_grad_()
        out = eager(HeadInputs(hidden, weight, x.labels[block])).logps
        grads = torch.autograd.grad(out, (hidden, weight), upstream[block].to(out))
        logps.append(out.detach())
        dhidden.append(grads[0])
        dweight += grads[1][words].float()
    return Values(torch.cat(logps), torch.cat(dhidden)[rows], dweight.to(weight.dtype))
