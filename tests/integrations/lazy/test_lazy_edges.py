"""`LazyLogits` where a trainer, a wrapper or a user's own loss does something unusual."""

from __future__ import annotations

import contextlib
import threading
import weakref

import pytest

pytest.importorskip("transformers")
pytest.importorskip("datasets")

import _tiny as tiny
import torch
import torch.distributed as dist
import torch.nn.functional as F
from _tiny import one_thread  # noqa: F401
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

import fastpo
from fastpo.integrations.lazy import blocks, cell
from fastpo.integrations.lazy.head import lazy_head
from fastpo.integrations.lazy.logits import LazyLogits, promised
from fastpo.integrations.lazy.promise import Promise
from fastpo.ops.shards.gathered import _GatheredHead

B, T, H, V = 3, 7, 16, 211


def pair(capped=False):
    """Lazy logits, the real ones of the same head, and the leaves."""
    torch.manual_seed(0)
    head, hidden = nn.Linear(H, V), torch.randn(B, T, H, requires_grad=True)
    lazy, real = promised(Promise.of(head, hidden)), head(hidden)
    if capped:
        lazy, real = torch.tanh(lazy / 3.0) * 3.0, torch.tanh(real / 3.0) * 3.0
    return lazy, real, [hidden, *head.parameters()]


def logps(logits, labels):
    return logits.log_softmax(-1).gather(-1, labels[..., None]).squeeze(-1)


@pytest.fixture
def group(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/g", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("name", ["llama", "llama_tied", "phi"])
@pytest.mark.parametrize("options", [{"find_unused_parameters": True}, {"static_graph": True}])
def test_ddp_sends_a_forward_s_tensors_through_a_function(name, options, group, monkeypatch):
    """The first is what transformers' Trainer asks for without gradient checkpointing."""
    monkeypatch.setattr(cell, "told", set())
    ids = tiny.batch()["input_ids"]
    grads = []
    for lazy in (False, True):
        model = tiny.model(name)
        ddp = nn.parallel.DistributedDataParallel(model, **options)
        for _ in range(2):  # what the first backward marks wrongly fails in it or in the next
            model.zero_grad()
            with contextlib.ExitStack() as stack:
                if lazy:
                    stack.enter_context(fastpo.patched())
                    stack.enter_context(lazy_head("a test", model))
                logits = ddp(ids, use_cache=False).logits
            assert isinstance(logits, LazyLogits) is lazy
            F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
        grads.append({n: p.grad.clone() for n, p in model.named_parameters()})
    torch.testing.assert_close(grads[1], grads[0], rtol=1e-4, atol=1e-6)
    assert not cell.told


def test_a_row_asked_for_several_words():
    lazy, real, leaves = pair()
    rows, labels = torch.tensor([0, 0, 1]), torch.randint(0, V, (3, T))
    found, expected = logps(lazy[rows], labels), logps(real[rows], labels)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    ours, own = (torch.autograd.grad(x.square().sum(), leaves) for x in (found, expected))
    torch.testing.assert_close(ours, own, rtol=1e-4, atol=1e-4)
    # What is remembered of such a row belongs together.
    torch.testing.assert_close(logps(lazy, labels), logps(real, labels), rtol=1e-5, atol=1e-5)


def test_logits_of_a_pass_without_gradient_are_constants():
    head, hidden = nn.Linear(H, V), torch.randn(B, T, H)
    with torch.no_grad():
        lazy = promised(Promise.of(head, hidden))
    assert not lazy.requires_grad
    assert not logps(lazy, torch.zeros(B, T, dtype=torch.int64)).requires_grad


def test_a_batch_of_padding_has_gradients_of_zeros():
    lazy, _, leaves = pair()
    ignored = torch.full((B * T,), -100)
    loss = F.cross_entropy(lazy.flatten(0, 1), ignored, reduction="sum")
    assert loss == 0
    assert all(not grad.any() for grad in torch.autograd.grad(loss, leaves))


def test_a_model_without_values_has_its_own_logits():
    model, ids = tiny.model("llama"), tiny.batch()["input_ids"]
    with fastpo.lazy_logits(model), FakeTensorMode(allow_non_fake_inputs=True):
        logits = model(torch.ones_like(ids)).logits
        logits.log_softmax(-1)[..., 3].sum().backward()
    assert logits.shape == (*ids.shape, len(model.lm_head.weight))
    assert not isinstance(logits, LazyLogits)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning")
def test_a_trace_is_that_of_the_model():
    model, ids = tiny.model("llama"), tiny.batch()["input_ids"]
    other = ids.flip(0)

    class Logps(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, ids):
            return self.model(ids, use_cache=False).logits.log_softmax(-1)

    expected = Logps()(other)
    with fastpo.lazy_logits(model):
        traced = torch.jit.trace(Logps(), ids, check_trace=False)
    torch.testing.assert_close(traced(other), expected)


def in_place(logits):
    logits.div_(2.0)
    return logits.log_softmax(-1)[..., 3]


def masked_in_place(logits):
    logits[..., 5] = -1e4
    return torch.log_softmax(logits, -1)[..., 3]


OPERATORS = {
    "add": lambda x: 1.0 + x + 1.0,
    "subtract_max": lambda x: x - x.max(-1, keepdim=True).values,
    "power": lambda x: x**2,
    "compare": lambda x: (x > 0).float() + (x == 0).float(),
    "matmul": lambda x: x @ torch.ones(V, 2),
    "in_place": in_place,
    "masked_in_place": masked_in_place,
}


@pytest.mark.parametrize("name", OPERATORS)
def test_operators_of_a_user_s_own_loss(name):
    lazy, real, _ = pair()
    real = real.clone()
    torch.testing.assert_close(OPERATORS[name](lazy), OPERATORS[name](real), rtol=1e-5, atol=1e-5)


def test_a_negated_soft_cap():
    lazy, real, _ = pair(capped=True)
    torch.testing.assert_close((-lazy).logsumexp(-1), (-real).logsumexp(-1))


@pytest.mark.parametrize("read", [lambda x: x.mean(), lambda x: x[:, 1:].mean(-1).square().sum()])
def test_means_of_capped_logits_have_a_gradient(read):
    lazy, real, leaves = pair(capped=True)
    ours, own = (torch.autograd.grad(read(x), leaves) for x in (lazy, real))
    torch.testing.assert_close(ours, own, rtol=1e-4, atol=1e-5)


def test_asking_for_an_attribute_computes_nothing(monkeypatch):
    monkeypatch.setattr(Promise, "materialize", lambda self: pytest.fail("full logits"))
    assert not hasattr(pair()[0], "no_such_attribute")


def test_every_full_computation_is_named(monkeypatch):
    monkeypatch.setattr(cell, "told", set())
    F.mse_loss(pair()[0].flatten(0, 1), torch.ones(B * T, V))
    pair()[0].mean(0)
    assert {name for name, _ in cell.told} == {"mse_loss", "mean"}


def test_label_smoothing_passes_through_the_head_once(monkeypatch):
    calls = tiny.count_calls(monkeypatch)
    lazy, _, _ = pair()
    F.cross_entropy(lazy.flatten(0, 1), torch.ones(B * T).long(), label_smoothing=0.1)
    assert len(calls) == 1


@pytest.mark.parametrize("encoder_decoder", [False, True])
def test_labels_of_decoders_are_not_shifted(encoder_decoder):
    trl_cpo = pytest.importorskip("trl.experimental.cpo.cpo_trainer")
    lazy, real, _ = pair()
    labels = torch.randint(0, V, (B, T)).masked_fill(torch.rand(B, T) < 0.4, -100)

    def read(logits):
        return trl_cpo.CPOTrainer.get_batch_logps(
            logits, labels.clone(), average_log_prob=True, is_encoder_decoder=encoder_decoder
        )

    expected = read(real)
    with fastpo.patched():
        found = read(lazy)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_a_model_in_float64_keeps_its_logits():
    model = tiny.model("llama").double()
    with lazy_head("a test", model):
        assert type(model(tiny.batch()["input_ids"]).logits) is torch.Tensor


def test_argmax_through_lora(monkeypatch):
    peft = pytest.importorskip("peft")
    monkeypatch.setattr(cell, "told", set())
    config = peft.LoraConfig(r=4, target_modules=["lm_head"], init_lora_weights=False)
    model = peft.get_peft_model(tiny.model("llama"), config).eval()
    ids = tiny.batch()["input_ids"]
    expected = model(ids).logits.argmax(-1)
    with lazy_head("a test", model.get_base_model()):
        assert torch.equal(model(ids).logits.argmax(-1), expected)
    assert not cell.told


def test_a_user_s_own_call_of_trl_s_helper(monkeypatch):
    utils = pytest.importorskip("trl.trainer.utils")
    monkeypatch.setattr(cell, "told", set())
    lazy, real, _ = pair()
    labels = torch.randint(0, V, (B, T))
    with fastpo.patched():
        assert utils._supports_trl_loss_kernel(lazy, labels) is False
        found = utils.selective_log_softmax(lazy, labels)
    torch.testing.assert_close(found, logps(real, labels), rtol=1e-5, atol=1e-5)
    assert not cell.told


def test_another_thread_has_logits_of_its_own():
    model, found = tiny.model("llama"), []
    ids = tiny.batch()["input_ids"]
    with lazy_head("a test", model):
        assert isinstance(model(ids).logits, LazyLogits)
        thread = threading.Thread(target=lambda: found.append(model(ids).logits))
        thread.start()
        thread.join()
    assert type(found[0]) is torch.Tensor and found[0].shape[-1] == model.config.vocab_size


def test_ddp_sends_logits_that_the_model_read_itself(group):
    """Its own loss is of the same words; the script's has a gradient all the same."""
    ids, found = tiny.batch()["input_ids"], []
    for lazy in (False, True):
        model = tiny.model("llama")
        ddp = nn.parallel.DistributedDataParallel(model, find_unused_parameters=True)
        with fastpo.lazy_logits(model) if lazy else contextlib.nullcontext():
            logits = ddp(ids, labels=ids, use_cache=False).logits[:, :-1]
            logps(logits, ids[:, 1:]).mean().backward()
        found.append([p.grad for p in model.parameters()])
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-6)


def test_a_backward_runs_through_the_calls_it_is_of(monkeypatch):
    """Gradients of each text, one after the other."""
    lazy, real, leaves = pair()
    labels = torch.zeros(B, T, dtype=torch.int64)
    passes, own = [], _GatheredHead.backward
    monkeypatch.setattr(
        _GatheredHead, "backward", staticmethod(lambda *x: passes.append(1) or own(*x))
    )
    for i in range(B):
        passes.clear()
        found, expected = (
            torch.autograd.grad(
                F.cross_entropy(x[i], labels[i]) + x[i].logsumexp(-1).mean(),
                leaves,
                retain_graph=True,
            )
            for x in (lazy, real)
        )
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
        assert len(passes) == 1


@pytest.mark.parametrize("label", [-1, V])
def test_labels_that_are_no_words(label, monkeypatch):
    """-1 above all, which other libraries ignore."""
    monkeypatch.setattr(blocks, "BYTES", {"cpu": 1})
    labels = torch.zeros(B, T, dtype=torch.int64)
    labels[1, 2] = label
    with pytest.raises(ValueError, match=rf"labels: expected values in \[0, {V}\), got {label} "):
        F.cross_entropy(pair()[0].flatten(0, 1), labels.flatten())
    with pytest.raises(ValueError, match=rf"labels: expected values in \[0, {V}\), got {label} "):
        logps(pair()[0], labels)
    with pytest.raises(ValueError, match=rf"index: expected values in \[0, {V}\), got {label}"):
        pair()[0].gather(-1, labels[..., None])


@pytest.mark.parametrize("block", [1, 1 << 30])
def test_words_are_taken_from_the_end(block, monkeypatch):
    monkeypatch.setattr(blocks, "BYTES", {"cpu": block})
    index = torch.tensor([-1, 3, -V]).expand(B, T, 3)
    for read in (lambda x: x, lambda x: x.log_softmax(-1), lambda x: x.exp()):
        for some in (index[..., :1], index):
            found, expected = (torch.take_along_dim(read(x), some, -1) for x in pair()[:2])
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_an_index_of_32_bits():
    lazy, real, _ = pair()
    index = torch.arange(B * T, dtype=torch.int32).view(B, T, 1)
    for read in (lambda x: x, lambda x: x.log_softmax(-1)):
        torch.testing.assert_close(read(lazy).gather(-1, index), read(real).gather(-1, index))


BY_NAME = {
    "where": lambda x: torch.where(condition=x > 0, input=x, other=x * 0),
    "where a row": lambda x: torch.where(condition=torch.ones(T, 1) > 0, input=x, other=0 * x),
    "searchsorted": lambda x: torch.searchsorted(sorted_sequence=torch.arange(V), input=x).float(),
    "cat": lambda x: torch.cat(tensors=(x, x), dim=1),
    "stack": lambda x: torch.stack(tensors=(x, 2 * x)).sum(dim=0),
}


@pytest.mark.parametrize("block", [1, 1 << 30])
@pytest.mark.parametrize("name", BY_NAME)
def test_arguments_by_name(name, block, monkeypatch):
    monkeypatch.setattr(blocks, "BYTES", {"cpu": block})
    found, expected = (BY_NAME[name](x.detach()).sum(-1) for x in pair()[:2])
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


ONE_ROW = {
    "max": lambda x: x.max(-1).values,
    "topk": lambda x: x.topk(3).values,
    "words": lambda x: x.gather(-1, torch.arange(4)),
    "logps": lambda x: x.log_softmax(-1).gather(-1, torch.arange(4)),
    "capped": lambda x: (x.tanh() * 3).take_along_dim(torch.tensor([-1, 2]), -1),
    "biased": lambda x: (x + torch.arange(V)).logsumexp(-1),
}


@pytest.mark.parametrize("block", [1, 1 << 30])
@pytest.mark.parametrize("name", ONE_ROW)
def test_one_row(name, block, monkeypatch):
    monkeypatch.setattr(blocks, "BYTES", {"cpu": block})
    lazy, real, leaves = pair()
    found, expected = (ONE_ROW[name](x[0, -1]) for x in (lazy, real))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    grads = (torch.autograd.grad(x.sum(), leaves) for x in (found, expected))
    torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-5)


def test_logits_of_before_a_step_are_not_joined():
    head = nn.Linear(H, V)
    before = promised(Promise.of(head, torch.randn(B, T, H)))
    with torch.no_grad():
        head.weight.mul_(2)
    with pytest.raises(RuntimeError, match=r"expected to be read before lm_head\.weight changes"):
        torch.cat([before, promised(Promise.of(head, torch.randn(B, T, H)))])


def test_a_loss_holds_no_weight_of_another_dtype(monkeypatch):
    """As after the backward, until the next step's loss takes its place."""
    monkeypatch.setattr(blocks, "BYTES", {"cpu": 1})
    casts = []
    own = blocks.dense
    monkeypatch.setattr(
        blocks, "dense", lambda x: casts.append(weakref.ref(y := own(x).clone())) or y
    )
    lazy, _, _ = pair()
    loss = lazy.softmax(-1).square().sum()
    assert casts and all(x() is None for x in casts)
    loss.backward()
    assert len(casts) == 2 and all(x() is None for x in casts)


def test_a_parametrization_makes_the_weight_once():
    class Doubled(nn.Module):
        count = 0

        def forward(self, weight):
            self.count += 1
            return 2 * weight

    model, doubled = tiny.model("llama"), Doubled()
    nn.utils.parametrize.register_parametrization(model.lm_head, "weight", doubled)
    ids = tiny.batch()["input_ids"]
    expected = model(ids).logits.logsumexp(-1)
    doubled.count = 0
    with fastpo.lazy_logits(model):
        logits = model(ids).logits
        assert isinstance(logits, LazyLogits) and doubled.count == 1
        torch.testing.assert_close(logits.logsumexp(-1), expected)
