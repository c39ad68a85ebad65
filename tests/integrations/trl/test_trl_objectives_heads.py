"""What objectives read of two heads again, by the book: biases, soft-caps, factors, an adapter."""

from __future__ import annotations

import importlib
from dataclasses import dataclass, replace

import pytest

pytest.importorskip("trl", minversion="1.15")  # the first with a fused head

import torch
from transformers.utils import ModelOutput

from fastpo.integrations.trl.head import HeadCall
from fastpo.integrations.trl.objectives.passes import Pass, alternatives, mixed, token_kl
from fastpo.ops.shards.gathered import HeadOptions

MASK = torch.tensor([[False, True, True, False], [True, True, True, True]])
TOKENS, WORDS, HIDDEN = int(MASK.sum()), 24, 16


def a_pass(seed, **options):
    """Of a model that has scored these tokens, its head with a bias and 16-bit LoRA."""
    g = torch.Generator().manual_seed(seed)
    hidden, weight = (torch.randn(n, HIDDEN, generator=g) for n in (TOKENS, WORDS))
    adapter = tuple(torch.randn(n, 2, generator=g).bfloat16() for n in (TOKENS, WORDS))
    bias, targets = torch.randn(WORDS, generator=g), torch.arange(TOKENS)
    found = Pass(None)
    options = HeadOptions(**options)
    found.call = HeadCall(hidden.requires_grad_(), weight, adapter, bias, targets, options)
    found.mask = MASK
    return found


def logits(run):
    call, options = run.head, run.head.options
    down, up = (x.double() for x in call.adapter)
    found = call.hidden.double() @ call.weight.double().T + down @ up.T + call.bias
    found = options.logit_scale * found
    return options.softcap * torch.tanh(found / options.softcap)


@pytest.fixture
def policy():
    return a_pass(0, temperature=0.7, softcap=3.0, logit_scale=0.6)


@pytest.fixture
def reference():
    return a_pass(1, temperature=1.3, softcap=2.0, logit_scale=0.4)


def close(found, expected):
    assert not found[~MASK].any()
    torch.testing.assert_close(found[MASK].double(), expected, rtol=1e-5, atol=1e-5)


def test_divergence_of_every_token(policy, reference):
    own, other = logits(policy) / 0.7, logits(reference).detach() / 1.3
    expected = torch.nn.functional.kl_div(
        own.log_softmax(1), other.log_softmax(1), reduction="none", log_target=True
    ).sum(1)
    found = token_kl(policy, reference)()
    close(found, expected)
    hidden = policy.head.hidden
    ours, theirs = (torch.autograd.grad(x.sum(), hidden)[0] for x in (found, expected))
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_a_mixture_of_two_heads(policy, reference):
    mixture = 1.5 * logits(policy) - 0.5 * logits(reference)
    expected = (mixture / 0.7).log_softmax(1).gather(1, policy.head.targets[:, None]).squeeze(1)
    found = mixed(policy, reference, 1.5)()
    close(found, expected)
    assert not found.requires_grad


def test_the_best_other_word(policy):
    own = (logits(policy) / 0.7).log_softmax(1)
    policy.call = replace(policy.call, targets=own.argmax(1))
    expected = own.scatter(1, policy.head.targets[:, None], -torch.inf).amax(1)
    close(alternatives(policy, 1)(), expected)


# What walks, and whether it keeps anything for the backward that a budget were of.
WALKS = {
    "linear_divergence": (token_kl, True),
    "mixed_linear_logps": (lambda policy, reference: mixed(policy, reference, 0.5), False),
    "linear_topk": (lambda policy, _: alternatives(policy, 2), True),
}


@pytest.mark.parametrize("name", WALKS)
def test_options_of_the_patch_are_those_of_every_walk(name, reference, monkeypatch):
    module, given = importlib.import_module(f"fastpo.ops.{name}"), []
    own, (walk, keeps) = getattr(module, name), WALKS[name]
    monkeypatch.setattr(module, name, lambda *args, **kw: given.append(kw) or own(*args, **kw))
    walk(a_pass(0, backend="torch", budget=0), reference)()
    (found,) = given
    assert (found["backend"], found.get("budget")) == ("torch", 0 if keeps else None)


@dataclass
class Output(ModelOutput):
    log_probs: torch.Tensor | None = None
    entropy: torch.Tensor | None = None
    log_sum_sq_probs: torch.Tensor | None = None


def test_virtual_tokens_stand_in_front_and_padding_behind():
    """Two rows of 5 tokens and a third text of 8, behind 3 tokens of prompt learning."""
    given = []

    def model(labels, **more):
        given.append({"labels": labels, **more})
        rows, width = labels.shape
        columns = torch.arange(-3, width - 1, dtype=torch.float32).expand(rows, -1)
        return Output(log_probs=columns, entropy=columns + 10, log_sum_sq_probs=columns + 20)

    def rows(count, width, prompt=1):
        ids = torch.ones(count, width, dtype=torch.int64)
        answer = (torch.arange(width) >= prompt) * ids
        return {"input_ids": ids, "attention_mask": ids, "completion_mask": answer}

    own, text = rows(2, 5), rows(1, 8, 3)
    run = Pass(model, [text])
    labels = own.pop("completion_mask").masked_fill_(torch.arange(5) < 1, -100)
    run(**own, labels=labels)
    assert run.stats is None and given[0]["labels"] is labels, "nobody scores"
    output = run(**own, labels=labels, fused_lm_head=True)
    assert given[1]["attention_mask"].tolist() == [[1] * 5 + [0] * 3] * 2 + [[1] * 8]
    assert (given[1]["labels"] >= 0).tolist() == [[0] + [1] * 4 + [0] * 3] * 2 + [[0] * 3 + [1] * 5]
    assert run.mask.tolist() == [[1] * 4 + [0] * 3] * 2 + [[0] * 2 + [1] * 5]
    assert run.logps.tolist() == [[0.0, 1, 2, 3, 4, 5, 6]] * 3
    assert torch.equal(run.stats.entropy, run.logps + 10)
    assert torch.equal(run.stats.log_sum_sq_probs, run.logps + 20)
    assert output.log_probs.tolist() == [[-3.0, -2, -1, 0, 1, 2, 3]] * 2
    first = run.stats
    run(**own, labels=labels, fused_lm_head=True)
    assert run.stats is first

    with pytest.raises(ValueError, match="third texts: expected text-only batches, got pixel_va"):
        Pass(model, [text])(**own, labels=labels, fused_lm_head=True, pixel_values=labels)
