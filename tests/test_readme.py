"""The README's example, run as it stands there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

import fastpo
from fastpo import reference
from fastpo.bench.readme import rewrite

README = Path(__file__).parent.parent / "README.md"


def test_example_from_hidden_states_to_gradients():
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    example = next(block for block in blocks if "quantities.padded" in block)
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(4, 6, 16, generator=generator, requires_grad=True)
    lm_head = torch.nn.Linear(16, 50, bias=False)
    labels = torch.randint(0, 50, (4, 6), generator=generator)
    labels[:, :2] = -100
    ref_logps = torch.randn(4, 6, generator=generator)
    names = {
        "fastpo": fastpo,
        "hidden": hidden,
        "lm_head": lm_head,
        "labels": labels,
        "ref_stats": fastpo.TokenStats(logps=ref_logps),
    }
    exec(example, names)

    weight = lm_head.weight.detach().double().requires_grad_()
    x = hidden.detach().double().requires_grad_()
    logps = reference.linear_logps(x, weight, labels).logps
    ratios = (logps - ref_logps.masked_fill(labels == -100, 0)).sum(1)
    (-torch.nn.functional.logsigmoid(0.1 * (ratios[:2] - ratios[2:]))).mean().backward()
    torch.testing.assert_close(hidden.grad.double(), x.grad, rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(lm_head.weight.grad.double(), weight.grad, rtol=1e-4, atol=1e-7)


DOCS = sorted(README.parent.joinpath("docs").glob("*.md"))
PAGES = [README, *(page for page in DOCS if "<!-- bench: " in page.read_text(encoding="utf-8"))]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_tables_stand_as_their_reports_give_them(page):
    assert rewrite(page, write=False) == []
