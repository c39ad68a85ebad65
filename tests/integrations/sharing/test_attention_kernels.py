"""Kernels of a GPU behind transformers' own functions, each through a slow stand-in of its own."""

from __future__ import annotations

import functools
import inspect

import pytest

pytest.importorskip("transformers")

import _batches
import torch
from _batches import model_of, run
from _tiny import one_thread  # noqa: F401
from test_models import assert_same
from torch.nn.attention import flex_attention
from transformers import masking_utils, modeling_flash_attention_utils
from transformers.integrations import flex_attention as flex_integration
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from fastpo.integrations.sharing import attention, backbone, packed
from fastpo.integrations.sharing.backbone import shared_prompts
from fastpo.layout.tree import layout_of

WINDOW = {"sliding_window": 4}
CASES = {
    "llama": ({}, "sdpa"),
    "mistral": (WINDOW, "sdpa"),
    "gemma3": (WINDOW, "sdpa"),  # windows in some layers
    "gemma2": (WINDOW, "eager"),  # soft-capped
}
FLASH = ("flash_attention_2", "flash_attention_3", "flash_attention_4")


@pytest.fixture(autouse=True)
def registries():
    yield
    attention.restore()


def rows(q, k, v, queries, keys, scale, left, softcap=None):
    """Sequence by sequence, causal to its end; all [tokens, heads, D]."""
    found = []
    for a, b, c, d in zip(queries, queries[1:], keys, keys[1:], strict=False):
        one, other, value = q[a:b], k[c:d], v[c:d]
        groups = one.shape[1] // other.shape[1]
        other, value = (x.repeat_interleave(groups, 1) for x in (other, value))
        scores = torch.einsum("qhd,khd->hqk", one, other) * (scale or q.shape[-1] ** -0.5)
        if softcap:
            scores = softcap * torch.tanh(scores / softcap)
        at = torch.arange(d - c - (b - a), d - c)[:, None]
        key = torch.arange(d - c)
        seen = (key <= at) & (key >= at - left if left >= 0 else True)
        weights = scores.masked_fill(~seen, -torch.inf).softmax(-1)
        found.append(torch.einsum("hqk,khd->qhd", weights, value))
    return torch.cat(found)


@pytest.fixture
def flash(monkeypatch):
    """The calls that transformers makes of a flash kernel."""
    calls = []

    def varlen(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0,
        softmax_scale=None, causal=False, window_size=(-1, -1), softcap=None,
    ):  # fmt: skip
        assert causal and not dropout_p
        assert cu_seqlens_q.dtype == cu_seqlens_k.dtype == torch.int32
        lengths = cu_seqlens_q.diff(), cu_seqlens_k.diff()
        assert (max_seqlen_q, max_seqlen_k) == tuple(int(x.max()) for x in lengths)
        calls.append((q.shape[0], len(lengths[0]), type(max_seqlen_q)))
        sequences = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
        return rows(q, k, v, *sequences, softmax_scale, window_size[0], softcap)

    def padded(q, k, v, **options):
        batch, length = q.shape[:2]
        ends = torch.arange(0, batch * length + 1, length, dtype=torch.int32)
        flat = (x.flatten(0, 1) for x in (q, k, v))
        return varlen(*flat, ends, ends, length, length, **options).unflatten(0, (batch, length))

    module = modeling_flash_attention_utils
    functions = padded, varlen, None, module._pad_input, module._unpad_input
    process = module._lazy_define_process_function(varlen)
    found = functions, (process, None)
    monkeypatch.setattr(module, "lazy_import_flash_attention", lambda *_, **__: found)
    return calls


def under(name, implementation):
    """A model whose implementation is not looked for on this machine."""

    def make():
        changes, own = CASES[name]
        model = model_of(name, own, **changes)()
        model.config._attn_implementation = implementation
        return model

    return make


def expected(name, batch):
    changes, own = CASES[name]
    return run(model_of(name, own, **changes), batch, False)[:3]


@pytest.mark.parametrize("batch", [_batches.right, _batches.left])
@pytest.mark.parametrize("name", CASES)
def test_flash_attention(name, batch, flash):
    *found, handle = run(under(name, FLASH[0]), batch(), True)
    assert_same(found, expected(name, batch()))
    tokens, sequences, kind = flash[-1]
    assert sequences == len(_batches.right()[0]) and kind is int
    assert tokens == handle.tokens.computed


@pytest.mark.parametrize("implementation", FLASH[1:])
def test_newer_flash_attention(implementation, flash):
    *found, handle = run(under("mistral", implementation), _batches.right(), True)
    assert_same(found, expected("mistral", _batches.right()))
    assert handle.tokens.saved > 0.3


def test_flash_attention_of_identical_rows(flash):
    *found, _ = run(under("llama", FLASH[0]), _batches.identical(), True)
    assert_same(found, expected("llama", _batches.identical()))
    assert flash[-1][1] == 4  # of six


@pytest.fixture
def varlen(monkeypatch):
    """Windows that torch's kernel is called with, here in float32."""
    calls = []

    def kernel(q, k, v, cu_q, cu_k, max_q, max_k, *, scale, window_size, enable_gqa):
        assert enable_gqa == (q.shape[1] != k.shape[1]) and window_size[1] == 0
        assert max_q == cu_q.diff().max() and max_k == cu_k.diff().max()
        calls.append(window_size)
        return rows(q, k, v, cu_q.tolist(), cu_k.tolist(), scale, window_size[0])

    monkeypatch.setattr(packed, "_varlen_attn", lambda: kernel)
    monkeypatch.setattr(packed, "_fits_varlen", lambda *_: True)
    return calls


@pytest.mark.parametrize("name", ["llama", "mistral", "gemma3"])
def test_torchs_kernel(name, varlen):
    batch = _batches.both()
    *found, _ = run(under(name, "sdpa"), batch, True)
    assert_same(found, expected(name, batch))
    assert set(varlen) <= {(-1, 0), (3, 0)} and len(varlen) >= 2
    assert ((3, 0) in varlen) == (name != "llama")


def test_torchs_kernel_takes_what_it_is_given():
    kernel = pytest.importorskip("torch.nn.attention.varlen").varlen_attn
    if packed._varlen_attn() is None:
        pytest.skip("no windows or grouped heads in this torch")
    assert packed._varlen_attn() is kernel
    given = inspect.signature(kernel).bind(
        *"qkv",
        *layout_of(_batches.right()[0]).sequences,
        scale=1.0,
        window_size=(-1, 0),
        enable_gqa=True,
    )
    names = ["query", "key", "value", "cu_seq_q", "cu_seq_k", "max_q", "max_k"]
    assert [*given.arguments][:7] == names


def test_torchs_kernel_knows_no_chunks():
    layout = layout_of(_batches.right()[0])
    own = masking_utils.chunked_causal_mask_function(4, torch.zeros(1, dtype=torch.int64))
    window = masking_utils.sliding_window_causal_mask_function(4)
    parts = masking_utils.sliding_window_overlay(4), masking_utils.causal_mask_function
    for rule, size, found in (
        (own, 4, None),
        (window, 4, (3, 0)),
        (window, 5, None),
        (masking_utils.and_masks(*parts), 4, (3, 0)),
        (masking_utils.and_masks(*parts, own), 4, None),
        (masking_utils.causal_mask_function, None, (-1, 0)),
        (masking_utils.bidirectional_mask_function, None, None),
    ):
        assert packed.Sdpa(layout, lambda *_: None, rule=rule, size=size).window == found


@pytest.mark.parametrize("window", [None, 1, 4, 12, 23, 40])
@pytest.mark.parametrize("batch", [_batches.right, _batches.identical, _batches.begins_another])
def test_masks_of_one_line_are_transformers_own(batch, window):
    layout = layout_of(*batch())
    rule = masking_utils.causal_mask_function
    if window is not None:
        rule = masking_utils.sliding_window_causal_mask_function(window)
    given = {"rule": rule, "size": window}
    line = packed.Sdpa(layout, lambda *_: None, skips=False, **given)
    skipping = packed.Sdpa(layout, lambda *_: None, **given)
    for row in layout.rows:
        about = {"q_length": row.owned, "kv_length": row.length, "q_offset": row.shared}
        about |= {"mask_function": rule, "allow_is_causal_skip": False}
        found = line._backwards(row, torch.float32)
        assert torch.equal(found.flip(2) == 0, masking_utils.sdpa_mask(1, **about))
        whole = not row.shared and (window is None or row.length <= window)
        assert (skipping._backwards(row, torch.float32) is None) == whole
    assert found.untyped_storage().nbytes() <= 8 * max(layout.lengths)


@pytest.mark.parametrize("window", [None, 4])
def test_options_by_name_are_those_by_position(window, request):
    """By position they go row by row, with masks as transformers makes them."""
    layout, module, own = layout_of(*_batches.right()), torch.nn.Module(), sdpa_attention_forward
    rule = masking_utils.causal_mask_function
    if window is not None:
        rule = masking_utils.sliding_window_causal_mask_function(window)

    def mask(shared, owned):
        about = {"q_length": owned, "kv_length": shared + owned, "q_offset": shared}
        return masking_utils.sdpa_mask(1, **about, mask_function=rule, local_size=window)

    rows = packed.Sdpa(layout, mask, rule=rule, size=window)
    generator = torch.Generator().manual_seed(0)
    given = [torch.randn(1, 2, layout.size, 8, generator=generator) for _ in range(3)]
    expected = rows.attend(own, module, *given, 0.0, 0.7)[0]
    assert (rows.attend(own, module, *given)[0] - expected).abs().max() > 1e-2
    torch.testing.assert_close(rows.attend(own, module, *given, scaling=0.7)[0], expected)
    request.getfixturevalue("varlen")
    torch.testing.assert_close(rows.attend(own, module, *given, scaling=0.7)[0], expected)


def fake(head=64, value=None, dtype=torch.bfloat16, device="cuda"):
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        sizes = ((1, 4, 8, size) for size in (head, value or head))
        return [torch.empty(*size, dtype=dtype, device=device) for size in sizes]


@pytest.mark.parametrize(
    ("tensors", "options", "fits"),
    [
        ({}, {}, True),
        ({"dtype": torch.float16}, {"scaling": 0.1, "dropout": 0.0, "sliding_window": 4}, True),
        ({"head": 256}, {"is_causal": True}, True),
        ({"head": 257}, {}, False),
        ({"value": 32}, {}, False),
        ({"dtype": torch.float32}, {}, False),
        ({"device": "cpu"}, {}, False),
        ({}, {"dropout": 0.1}, False),
        ({}, {"is_causal": False}, False),
        ({}, {"position_bias": 1}, False),
        ({}, {"softcap": 2.0}, False),
        ({}, {"s_aux": 1}, False),
    ],
)
def test_where_torchs_kernel_runs(tensors, options, fits):
    assert packed._fits_varlen(*fake(**tensors), options) == fits


KINDS = {"flash_attention_2": (False, False), "flex_attention": (False, False)}
KINDS |= {"sdpa": (True, True), "eager": (True, True), "nobody's": (True, True)}


@pytest.mark.parametrize("implementation", KINDS)
def test_what_a_kernel_costs(implementation, monkeypatch):
    """Whether pads and masks cost pairs; looked up through our hooks, too."""
    model = under("llama", implementation)().model
    costs = [backbone.layer_cost(model)]
    if implementation != "nobody's":
        attention.install(implementation)
    costs.append(backbone.layer_cost(model))
    assert {(cost.pads, cost.masks) for cost in costs} == {KINDS[implementation]}


def test_torchs_kernel_skips_what_masks_hide(varlen):
    model, gpu = under("llama", "sdpa")().model, torch.device("cuda")
    found = [backbone.layer_cost(model.to(x), gpu).masks for x in (torch.float32, torch.bfloat16)]
    assert found == [True, False] and backbone.layer_cost(model).masks


@pytest.fixture
def flex(monkeypatch):
    """FlexAttention without its compiler, whose backward a CPU lacks."""
    blocks = []

    def attend(q, k, v, score_mod, block_mask, enable_gqa, scale, **_):
        if enable_gqa:
            k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
        blocks.append(block_mask)
        at, head = torch.arange(q.shape[2]), torch.zeros((), dtype=torch.int64)
        row = torch.arange(len(q))[:, None, None, None]
        seen = block_mask.mask_mod(row, head, at[:, None], at)
        scores = score_mod(q @ k.transpose(2, 3) * scale, row, head, at[:, None], at)
        # Finite: a pad of the padded run sees nothing.
        return scores.masked_fill(~seen, torch.finfo(scores.dtype).min).softmax(-1) @ v

    monkeypatch.setattr(flex_integration, "compile_friendly_flex_attention", attend)

    def eager(**options):
        return flex_attention.create_block_mask(**{**options, "_compile": False})

    monkeypatch.setattr(masking_utils, "create_block_mask", eager)
    return blocks


@pytest.mark.parametrize("batch", [_batches.both, _batches.identical])
@pytest.mark.parametrize("name", CASES)
def test_flex_attention(name, batch, flex):
    *found, handle = run(under(name, "flex_attention"), batch(), True)
    assert_same(found, expected(name, batch()))
    assert flex[-1].shape[-2:] == (handle.tokens.computed, handle.tokens.computed)


@pytest.fixture
def graphs(monkeypatch):
    """What is compiled, by a backend that runs it as it is: generated code would take minutes."""
    seen = []

    def backend(graph, example_inputs):
        seen.append(graph)
        return graph.forward

    wrapped = flex_integration.WrappedFlexAttention
    monkeypatch.setattr(wrapped, "_instance", None)
    monkeypatch.setattr(wrapped, "_is_flex_compiled", False)
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=backend))
    torch.compiler.reset()
    yield seen
    torch.compiler.reset()


def of_shape(rows, width, common):
    generator = torch.Generator().manual_seed(width)
    ids = torch.randint(3, 300, (rows, width), generator=generator)
    ids[1:, :common] = ids[0, :common]
    mask = torch.ones_like(ids)
    mask[1, width - rows :] = 0
    return ids, mask


@torch.no_grad()
def test_torchs_flex_attention_over_20_shapes(graphs):
    """Itself, and compiled for the first few alone: less than a block of tokens, and more."""
    model, padded, counts = under("llama", "flex_attention")(), model_of("llama", "sdpa")(), []
    with shared_prompts(model, always=True) as handle:
        for i in range(20):
            ids, mask = of_shape(2 + i % 3, 20 + 16 * i, 10 + 8 * i)
            given = {"input_ids": ids, "attention_mask": mask}
            found, own = (x.model(**given).last_hidden_state[mask != 0] for x in (model, padded))
            torch.testing.assert_close(found, own, rtol=1e-4, atol=1e-4)
            counts.append(len(graphs))
    assert handle.tokens.saved > 0.1
    assert counts[0] > 0 and counts[6] == counts[-1] <= 10
