"""What is done to logits, or to the head, after `fastpo.attach`: honoured, or an error by name."""

from __future__ import annotations

import pytest

pytest.importorskip("transformers")
pytest.importorskip("datasets")

import _tiny as tiny
import torch
import transformers
from _tiny import one_thread  # noqa: F401
from torch import nn
from torch.nn.modules import module as every_module
from torch.nn.utils import parametrizations
from torch.utils.hooks import RemovableHandle

import fastpo
from fastpo.integrations import attach


@pytest.fixture
def removed():
    """Hooks of a test that are not the model's."""
    handles = []
    yield handles.append
    for handle in handles:
        handle.remove()


def only_heads(hook):
    """A hook on all modules that means the head."""

    def global_hook(module, *rest):
        return hook(module, *rest) if getattr(module, "out_features", 0) > 100 else None

    return global_hook


def scaled(module, inputs, logits):
    return logits * 1.1


def later_positions(module, inputs, logits):
    logits = logits.clone()
    logits[:, 1:] *= 1.1
    return logits


def last_position(module, inputs, logits):
    return logits[:, -1:]


def scaled_inputs(module, inputs):
    return (inputs[0] * 1.1,)


def cut_off(module, inputs, output):
    return output.clamp(max=100)


def looking(module, inputs, logits):
    assert logits.shape[-1] == module.out_features


def scaled_gradient(module, grad_input, grad_output):
    return tuple(None if x is None else x * 2 for x in grad_input)


def pre_scaled_gradient(module, grad_output):
    return tuple(x * 2 for x in grad_output)


def setting(**values):
    return lambda model: [setattr(model.config, key, value) for key, value in values.items()]


def spectral_norm(model):
    """In training every reading of the weight moves on what it is estimated with."""
    torch.manual_seed(3)
    parametrizations.spectral_norm(model.train().lm_head)


def weight_norm(model):
    parametrizations.weight_norm(model.lm_head)
    model.lm_head.parametrizations.weight.original0.data *= 1.5


def older_weight_norm(model):
    nn.utils.weight_norm(model.lm_head)
    model.lm_head.weight_g.data *= 1.5


def padded_words(model):
    """The layer still says how many it was made with."""
    head = model.lm_head
    head.weight = nn.Parameter(nn.functional.pad(head.weight.detach(), (0, 0, 0, 5)))
    model.config.vocab_size += 5


def outer_hook(model):
    def doubled(module, inputs, output):
        output.loss = output.loss * 2
        return output

    model.register_forward_hook(doubled)


# name: (model, what is done to it after a first call)
HONOURED = {
    "pre-hook": ("phi", lambda m: m.lm_head.register_forward_pre_hook(scaled_inputs)),
    "hook that looks": ("llama", lambda m: m.lm_head.register_forward_hook(looking)),
    "hook on the model": ("llama", outer_hook),
    "weight norm": ("phi", weight_norm),
    "older weight norm": ("llama", older_weight_norm),
    "spectral norm": ("llama", spectral_norm),
    "another soft-cap": ("gemma2", setting(final_logit_softcapping=1.5)),
    "no soft-cap": ("gemma2", setting(final_logit_softcapping=None)),
    "more words": ("llama_tied", lambda m: m.resize_token_embeddings(340, mean_resizing=False)),
    "padded words": ("llama", padded_words),
}


def steps(model, count=2):
    """Losses and gradients."""
    found = []
    for seed in range(count):
        model.zero_grad()
        loss = model(**tiny.batch(seed=seed)).loss
        loss.backward()
        grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        found.append({"loss": loss.detach(), **grads})
    return found


@pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated")
@pytest.mark.parametrize("first_call", [True, False])
@pytest.mark.parametrize("case", HONOURED)
def test_honoured(case, first_call):
    name, change = HONOURED[case]
    found = []
    for attached in (False, True):
        torch.manual_seed(0)
        model = tiny.model(name)
        if attached:
            fastpo.attach(model)
        if first_call:
            before = model(**tiny.batch()).loss.detach()
        torch.manual_seed(1)
        change(model)
        found.append(steps(model))
        if first_call and case != "hook that looks":
            assert (found[-1][0]["loss"] - before).abs() > 1e-3
    torch.testing.assert_close(*found, rtol=1e-4, atol=2e-6)


# Where a family treats logits under another name, or its hidden states before the head.
FAMILIES = {
    "RecurrentGemma": {
        "logits_soft_cap": 2.0,
        "attention_window_size": 8,
        "num_hidden_layers": 3,  # of them one with attention
    },
    "MiniCPM3": {
        "dim_model_base": 8,
        "q_lora_rank": 8,
        "kv_lora_rank": 8,
        "qk_nope_head_dim": 4,
        "qk_rope_head_dim": 4,
        "v_head_dim": 8,
        "num_key_value_heads": 4,
    },
}


@pytest.mark.parametrize("prefix", FAMILIES)
def test_families(prefix, monkeypatch):
    if not hasattr(transformers, f"{prefix}Config"):
        pytest.skip(f"transformers {transformers.__version__} has none")
    monkeypatch.setitem(tiny.MODELS, prefix, (prefix, FAMILIES[prefix]))
    model = tiny.model(prefix)
    own = steps(model)
    fastpo.attach(model)
    torch.testing.assert_close(steps(model), own, rtol=1e-4, atol=2e-6)


def replaced_forward(model):
    own = model.lm_head.forward
    model.lm_head.forward = lambda hidden: own(hidden) * 1.1


def wider(model):
    model.lm_head = nn.Linear(32, 400)


def own_loss(model):
    model.loss_function = lambda logits, labels, vocab_size: logits.mean()


def backward_hook(model):
    return model.lm_head.register_full_backward_hook(scaled_gradient)


def changed_logit_scale(model):
    model.logit_scale = 0.5


NO_BACKWARD = "lm_head: expected no backward hook, got {}: there are no logits whose gradient"
ANOTHER_WAY = "or a hook, changes its logits in another way than logit_scale={}, softcap={}"
TREATED = ANOTHER_WAY.format(1.0, None)
REFUSED = {
    "hook": ("llama", lambda m: m.lm_head.register_forward_hook(scaled), TREATED),
    "cut off": ("llama", lambda m: m.lm_head.register_forward_hook(cut_off), TREATED),
    "relu": ("llama", lambda m: m.lm_head.register_forward_hook(lambda *x: x[2].relu()), TREATED),
    "positions": ("llama", lambda m: m.lm_head.register_forward_hook(later_positions), TREATED),
    "hook that leaves out": (
        "llama",
        lambda m: m.lm_head.register_forward_hook(last_position),
        r"its loss sees logits of shape \(1, 1, \d+\)",
    ),
    "hook under a cap": (
        "gemma2",
        lambda m: m.lm_head.register_forward_hook(scaled),
        ANOTHER_WAY.format(1.0, 3.0),
    ),
    "global hook": (
        "llama",
        lambda m: every_module.register_module_forward_hook(only_heads(scaled)),
        TREATED,
    ),
    "backward hook": ("llama", backward_hook, NO_BACKWARD.format("scaled_gradient")),
    "backward pre-hook": (
        "llama",
        lambda m: m.lm_head.register_full_backward_pre_hook(pre_scaled_gradient),
        NO_BACKWARD.format("pre_scaled_gradient"),
    ),
    "global backward hook": (
        "llama",
        lambda m: every_module.register_module_full_backward_hook(only_heads(scaled_gradient)),
        NO_BACKWARD.format("only_heads.*"),
    ),
    "factor of the model": ("cohere", changed_logit_scale, ANOTHER_WAY.format(0.4, None)),
    "factor of the config": ("cohere", setting(logit_scale=0.5), ANOTHER_WAY.format(0.5, None)),
    "forward": ("llama", replaced_forward, "got .*Linear with another forward"),
    "more words": ("llama", wider, r"its loss sees logits of shape \(1, 3, 3\d\d\)"),
    "loss function": ("llama", own_loss, "loss_function: expected ForCausalLMLoss, got <lambda>"),
    "float64": (
        "llama",
        lambda m: m.double(),
        r"lm_head\.weight: expected dtype float32, bfloat16 or float16, got torch\.float64",
    ),
}


@pytest.mark.parametrize("first_call", [True, False])
@pytest.mark.parametrize("case", REFUSED)
def test_refused_by_name(case, first_call, removed):
    name, change, message = REFUSED[case]
    model = tiny.model(name)
    fastpo.attach(model)
    if first_call:
        model(**tiny.batch())
    handle = change(model)
    if isinstance(handle, RemovableHandle):
        removed(handle)
    with pytest.raises(RuntimeError, match=message):
        model(**tiny.batch())
    if case not in ("forward", "more words", "float64"):
        assert model(tiny.batch()["input_ids"]).logits.shape[1] in (1, 12)


class Moody:
    """A hook that changes its mind."""

    factor = 1.0

    def __call__(self, module, inputs, logits):
        return logits * self.factor


def test_a_hook_that_changes_its_mind_is_noticed():
    model, hook = tiny.model("llama"), Moody()
    model.lm_head.register_forward_hook(hook)
    fastpo.attach(model)
    loss = model(**tiny.batch()).loss
    hook.factor = 1.1
    with pytest.raises(RuntimeError, match=TREATED):
        model(**tiny.batch())
    hook.factor = 1.0
    assert model(**tiny.batch()).loss == loss


def test_where_looking_waits_for_a_device(monkeypatch):
    """It is waited for after a change; without one statistics and gradients are NaN."""
    waited = []
    monkeypatch.setattr(attach, "_waits", lambda x: waited.append(x) or True)
    model, hook = tiny.model("llama"), Moody()
    model.lm_head.register_forward_hook(hook)
    fastpo.attach(model, outputs=("logps", "lse"))
    for _ in range(2):
        assert model(**tiny.batch()).loss.isfinite()
    assert [x.dtype for x in waited].count(torch.bool) == 1  # the first call has looked and waited
    hook.factor = 1.1
    output = model(**tiny.batch())
    scored = tiny.batch()["labels"][:, 1:] != -100
    for x in (output.logps, output.lse):
        assert torch.equal(x.isnan(), scored)
    output.loss.backward()
    assert all(p.grad.isnan().any() for p in model.parameters())
    second = model.lm_head.register_forward_hook(scaled)
    for _ in range(2):
        with pytest.raises(RuntimeError, match=TREATED):
            model(**tiny.batch())
    second.remove()
    with pytest.raises(RuntimeError, match=TREATED):
        model(**tiny.batch())


def test_float64_is_refused_at_once():
    with pytest.raises(RuntimeError, match=r"lm_head\.weight: expected dtype .*, got torch.fl"):
        fastpo.attach(tiny.model("llama").double())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_another_default_dtype(dtype):
    model = tiny.model("gemma2")
    own = steps(model, 1)
    torch.set_default_dtype(dtype)
    try:
        fastpo.attach(model, outputs=("entropy", "mean_logits"))
        found = steps(model, 1)
    finally:
        torch.set_default_dtype(torch.float32)
    torch.testing.assert_close(found, own, rtol=1e-5, atol=2e-6)


def test_another_default_device():
    model, inputs = tiny.model("llama"), tiny.batch()
    own = steps(model, 1)
    fastpo.attach(model, outputs=("entropy", "mean_logits"))
    with torch.device("meta"):
        loss = model(**inputs).loss
    torch.testing.assert_close(loss.detach(), own[0]["loss"])


def test_second_derivatives_are_refused():
    """They would leave out the head's."""
    model = tiny.model("llama")
    model.set_attn_implementation("eager")
    fastpo.attach(model)
    weights = list(model.parameters())
    grads = torch.autograd.grad(model(**tiny.batch()).loss, weights, create_graph=True)
    norm = sum(grad.square().sum() for grad in grads)
    with pytest.raises(RuntimeError, match="attach: expected first derivatives only"):
        norm.backward()


class _Regularised(transformers.LlamaForCausalLM):
    """A z-loss beside the model's own."""

    def forward(self, *args, labels=None, **kwargs):
        output = super().forward(*args, labels=labels, **kwargs)
        if labels is not None:
            output.loss = output.loss + output.logits.logsumexp(-1).square().mean()
        return output


class _Smoothed(transformers.LlamaForCausalLM):
    """The loss of further labels beside the model's own."""

    def forward(self, *args, labels=None, **kwargs):
        output = super().forward(*args, labels=labels, **kwargs)
        words = self.config.vocab_size
        more = self.loss_function(logits=output.logits, labels=labels % 7, vocab_size=words)
        output.loss = output.loss + more
        return output


def test_logits_that_a_forward_adds_to_its_loss(monkeypatch):
    model = tiny.model("llama")
    model.__class__ = _Regularised
    fastpo.attach(model)
    with pytest.raises(RuntimeError, match="what it adds to its loss is made of its logits"):
        model(**tiny.batch())
    nothing = tiny.batch() | {"labels": torch.full((3, 12), -100)}
    assert model(**nothing).loss.isnan()  # as without fastpo
    monkeypatch.setattr(attach, "_waits", lambda x: True)
    output = model(**tiny.batch())
    assert output.loss.isnan() and output.logps.isfinite().all()


def test_a_loss_of_other_labels_beside_the_model_s():
    model = tiny.model("llama")
    model.__class__ = _Smoothed
    own = steps(model)
    fastpo.attach(model)
    torch.testing.assert_close(steps(model), own, rtol=1e-4, atol=1e-5)
