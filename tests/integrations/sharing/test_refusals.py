"""What is left as it was, each by its reason: the table of docs/shared-prompts.md, row by row."""

from __future__ import annotations

import inspect
import re
from pathlib import Path
from types import SimpleNamespace

import _tiny as tiny
import pytest

pytest.importorskip("transformers")

import _architectures
import _batches
import torch
import transformers
from _refusals import assert_as_before, fresh, llama, plain  # noqa: F401
from _tiny import one_thread  # noqa: F401
from transformers import DynamicCache, LlamaModel

import fastpo
from fastpo.integrations.sharing import attention, backbone, refusals
from fastpo.integrations.sharing.backbone import shared_prompts
from fastpo.integrations.sharing.packed import Refused


@pytest.mark.parametrize("name", _architectures.REFUSED)
def test_models(name, caplog):
    prefix, changes, why = _architectures.REFUSED[name]

    def call():
        ids, mask = _batches.left()
        return {"input_ids": ids, "attention_mask": mask, "use_cache": False}

    assert_as_before(lambda: _architectures.model(prefix, changes), call, why, caplog)


def test_a_model_without_a_backbone_of_its_own(caplog):
    assert_as_before(headed, plain, "its head is not on a backbone of its own", caplog)


def headed():
    return _architectures.model("Llama4Text", _architectures.MOE | {"intermediate_size_mlp": 48})


@pytest.mark.parametrize("first", [0, 1])
@pytest.mark.parametrize("head", [fastpo.attach, fastpo.lazy_logits])
def test_a_model_without_a_backbone_of_its_own_takes_a_head(head, first):
    model = headed()
    inputs = plain() | {"labels": plain()["input_ids"]}
    expected = model(**inputs).loss
    handles = [(head, shared_prompts)[i](model) for i in (first, 1 - first)]
    output = model(**inputs)
    torch.testing.assert_close(output.loss, expected)
    assert type(output.logits) is not torch.Tensor  # none, or lazy ones
    for handle in handles:
        handle.detach()
    assert "forward" not in vars(model) and type(model(**inputs).logits) is torch.Tensor


def test_queries_scaled_by_their_place(caplog):
    """Of Llama 4's backbone: behind so many tokens that the probe would not tell."""
    changes = {"intermediate_size_mlp": 48, "no_rope_layers": [1, 0], "floor_scale": 32}
    make = lambda: _architectures.model("Llama4Text", _architectures.MOE | changes).model  # noqa: E731
    assert_as_before(make, plain, "scaled by their place in the tensor", caplog)


def cached():
    """A cache that holds what came before."""
    cache = DynamicCache(config=llama().config)
    for layer in range(2):
        cache.update(torch.ones(6, 2, 3, 8), torch.ones(6, 2, 3, 8), layer)
    return cache


def holes(mask):
    return mask.clone().index_fill_(1, torch.tensor([4]), 0)


def emptied(mask):
    return mask.clone().index_fill_(0, torch.tensor([4]), 0)


def embedded():
    call = plain()
    return {
        "inputs_embeds": llama().model.embed_tokens(call.pop("input_ids")).detach(),
        **call,
    }


def ids():
    return _batches.right()[0]


# transformers 5.24 gave it another name.
NAMES = inspect.signature(LlamaModel.forward).parameters
CACHE = "cache" if "cache" in NAMES else "past_key_values"

CALLS = {
    "embeddings": (embedded, "no input_ids of shape (R, T)"),
    "cache": (
        lambda: {"input_ids": ids(), CACHE: cached()},
        f"{CACHE} is given",
    ),
    "use_cache": (lambda: {**plain(), "use_cache": True}, "use_cache is given"),
    "4-D mask": (
        lambda: {"input_ids": ids(), "attention_mask": torch.zeros(6, 1, 24, 24)},
        "an attention_mask of another shape than input_ids",
    ),
    "holes": (
        lambda: {"input_ids": ids(), "attention_mask": holes(plain()["attention_mask"])},
        "one run of tokens in every row, got holes or an empty row",
    ),
    "empty row": (
        lambda: {"input_ids": ids(), "attention_mask": emptied(plain()["attention_mask"])},
        "one run of tokens in every row, got holes or an empty row",
    ),
    "positions": (
        lambda: {**plain(), "position_ids": torch.arange(24).expand(6, 24) + 1},
        "position_ids that are not the columns",
    ),
    "cu_seqlens": (lambda: {**plain(), "cu_seq_lens_q": [0, 24]}, "cu_seq_lens_q is given"),
    "list": (lambda: {**plain(), "offsets": [3] * 6}, "offsets is given"),
    "dict": (lambda: {**plain(), "offsets": {"rows": [3] * 6}}, "offsets is given"),
    "attentions": (lambda: {**plain(), "output_attentions": True}, "output_attentions is given"),
    "tensor": (
        lambda: {**plain(), "token_type_ids": torch.zeros(6, 24)},
        "token_type_ids is given",
    ),
    "tuple": (lambda: {**plain(), "return_dict": False}, "return_dict is given"),
}


@pytest.mark.parametrize("name", CALLS)
def test_calls(name, caplog):
    call, why = CALLS[name]
    assert_as_before(llama, call, why, caplog)


def test_a_number_of_the_batch_is_no_reason():
    """Trainers pass how many tokens count, and models pass it on."""
    labels = _batches.scored(*plain().values())
    given = {**plain(), "labels": labels, "num_items_in_batch": torch.tensor(7)}
    expected = llama()(**given).loss
    model = llama()
    with shared_prompts(model, always=True) as handle:
        torch.testing.assert_close(model(**given).loss, expected)
    assert handle.tokens.saved > 0.3


@pytest.mark.parametrize(("name", "value"), [("output_attentions", True), ("return_dict", False)])
def test_configs(name, value, caplog):
    def make():
        model = tiny.model("llama")
        model.set_attn_implementation("eager")
        setattr(model.config, name, value)
        return model

    assert_as_before(make, plain, f"{name} is set in its config", caplog)


@pytest.mark.parametrize("kind", ["cp_enabled", "sp_enabled"])
def test_rows_in_parts(kind, caplog, monkeypatch):
    state = pytest.importorskip("accelerate.state")
    parallelism = SimpleNamespace(**{"cp_enabled": False, "sp_enabled": False, kind: True})
    monkeypatch.setattr(state, "is_initialized", lambda: True)
    monkeypatch.setattr(
        state, "AcceleratorState", lambda: SimpleNamespace(parallelism_config=parallelism)
    )
    assert_as_before(llama, plain, "rows that are split between processes", caplog)


@pytest.mark.parametrize("at_pads", [None, 0, 1])
def test_positions_that_are_the_columns_are_no_reason(at_pads):
    """Of tokens; pads have what the caller likes."""
    call, columns = plain(), torch.arange(24).expand(6, 24)
    given = [columns, columns[:1]]
    if at_pads is not None:
        given = [columns.masked_fill(call["attention_mask"] == 0, at_pads)]
    model = llama().model
    for positions in given:
        with shared_prompts(model, always=True) as handle:
            model(**call, position_ids=positions)
            assert handle.tokens.saved > 0.3


def test_labels_for_the_head_are_no_reason():
    """Gemma 3 for pictures hands them on to its backbone."""
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1,
              "num_attention_heads": 2, "image_size": 8, "patch_size": 4}  # fmt: skip
    config = transformers.Gemma3Config(
        text_config=tiny._settings(), vision_config=vision, mm_tokens_per_image=1
    )
    torch.manual_seed(0)
    model, call = transformers.Gemma3ForConditionalGeneration(config).eval(), plain()
    call["labels"] = _batches.scored(*call.values())
    expected = model(**call).loss
    with shared_prompts(model, always=True) as handle:
        torch.testing.assert_close(model(**call).loss, expected)
    assert handle.tokens.saved > 0.3


def test_a_head_that_stands_on_a_part_of_the_backbone(caplog):
    """OPT's calls the decoder in it, past what is around."""
    model = _architectures.model(*_architectures.REFUSED["opt"][:2])
    expected = model(**plain()).logits
    with shared_prompts(model, always=True) as handle:
        assert torch.equal(model(**plain()).logits, expected)
    assert handle.tokens.computed == handle.tokens.padded > 0
    assert "OPTDecoder keeps its padded batch: hidden states" in caplog.text


def test_a_config_with_names_of_its_own(caplog):
    def missing(config):
        raise AttributeError("none", name="hidden_size")

    class Own(transformers.LlamaConfig):
        hidden_size = property(missing)

    def make():
        model = llama()
        model.config.__class__ = Own
        return model

    assert_as_before(make, plain, "a config without hidden_size", caplog)


def test_a_forward_that_names_nothing(caplog):
    class Passing(LlamaModel):
        def forward(self, *args, **kwargs):
            return super().forward(*args, **kwargs)

    model = llama().model
    model.__class__ = Passing
    with shared_prompts(model, always=True) as handle:
        model(*plain().values())
        assert handle.tokens.saved > 0.3 and not caplog.records
        with pytest.raises(TypeError):
            model(*[None] * 99)
    assert "inputs by position, whose names its forward does not say" in caplog.text


@pytest.mark.parametrize("name", ["longrope", "dynamic_ntk"])
def test_pads_beyond_the_length_at_which_a_rope_changes(name, caplog):
    """Rows of 14 tokens, padded to 24; it changes at 16."""

    def call():
        inputs = plain()
        inputs["attention_mask"][:, 14:] = 0
        return inputs

    make = lambda: _architectures.model(*_architectures.RIGHT[name])  # noqa: E731
    assert_as_before(make, call, "pads beyond the 16 tokens at which its rope changes", caplog)


@pytest.mark.parametrize(
    ("rope", "most"),
    [
        ({"rope_type": "default"}, 16),
        ({"rope_type": "default"}, None),
        ({"rope_type": "dynamic"}, None),
        ({"rope_type": "dynamic"}, 32),
        ({"rope_type": "longrope", "original_max_position_embeddings": 12}, 99),
    ],
)
def test_pads_that_change_no_rope_are_no_reason(rope, most):
    """Without a length, below it, or where the tokens pass it themselves."""
    check_rotation(rope, most)


@pytest.mark.parametrize(
    ("rope", "most"),
    [
        ({"rope_type": "dynamic"}, 24),
        ({"rope_type": "longrope", "original_max_position_embeddings": 14}, 99),
        ({"full_attention": {"rope_type": "dynamic"}, "sliding_attention": {}}, 16),
    ],
)
def test_pads_at_the_length_itself(rope, most):
    """Of one kind of layers, too."""
    with pytest.raises(Refused, match="pads beyond"):
        check_rotation(rope, most)


def check_rotation(rope, most):
    text = SimpleNamespace(rope_parameters=rope, max_position_embeddings=most)
    model = SimpleNamespace(config=SimpleNamespace(get_text_config=lambda: text))
    refusals.check_rotation(model, SimpleNamespace(columns=14, shape=(6, 24)))


def test_a_compiled_model(caplog):
    expected = llama().model(**plain()).last_hidden_state
    model = llama().model
    with shared_prompts(model, always=True) as handle:
        compiled = torch.compile(model, backend="eager", fullgraph=True)
        for _ in range(2):
            torch.testing.assert_close(compiled(**plain()).last_hidden_state, expected)
        assert handle.tokens.computed == 0
    said = [record for record in caplog.records if "it is compiled" in record.message]
    assert len(said) == 1


def in_place(model):
    model.layers[0].mlp.compile(backend="eager")


def wrapped(model):
    model.layers[0].mlp = torch.compile(model.layers[0].mlp, backend="eager")


def its_forward(model):
    mlp = model.layers[0].mlp
    mlp.forward = torch.compile(mlp.forward, backend="eager")


@pytest.mark.parametrize("compile_one", [in_place, wrapped, its_forward])
def test_compiled_layers(compile_one, caplog):
    assert_as_before(llama, plain, "layers that are compiled", caplog, compile_one)


def test_a_compiled_forward(caplog):
    def make():
        model = llama()
        model.model.forward = torch.compile(model.model.forward, backend="eager")
        return model

    assert_as_before(make, plain, "layers that are compiled", caplog)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_hooks_do_not_keep_others_from_compiling(implementation):
    attention.install(implementation)
    model = llama().model
    model.set_attn_implementation(implementation)
    expected = model(**plain()).last_hidden_state
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(**plain()).last_hidden_state, expected)


@pytest.mark.parametrize(
    ("kind", "why"),
    [
        ("PromptTuning", "no input_ids of shape (R, T)"),
        ("PrefixTuning", "an attention_mask of another shape than input_ids"),
    ],
)
def test_virtual_tokens_of_peft(kind, why, caplog):
    peft = pytest.importorskip("peft")

    def model():
        torch.manual_seed(0)
        config = getattr(peft, f"{kind}Config")(task_type="CAUSAL_LM", num_virtual_tokens=2)
        return peft.get_peft_model(llama(), config).eval()

    expected = model()(**plain()).logits
    shared = model()
    with shared_prompts(shared, always=True) as handle:
        torch.testing.assert_close(shared(**plain()).logits, expected, rtol=0, atol=0)
        assert handle.tokens.saved == 0
    assert why in caplog.text


def test_a_model_is_probed_once(monkeypatch):
    probes, check = [], backbone.probe.check
    monkeypatch.setattr(backbone.probe, "check", lambda *a: probes.append(a) or check(*a))
    for name in ("llama", "opt"):
        right = name == "llama"
        model = llama() if right else _architectures.model(*_architectures.REFUSED[name][:2])
        with shared_prompts(model.model, always=True) as handle:
            for _ in range(3):
                model.model(**plain())
            assert bool(handle.tokens.saved) == right
    assert len(probes) == 2


def test_the_table_of_the_docs_is_whole():
    """Every reason in the source has a row, up to what is filled in."""
    source = Path(backbone.__file__).parent
    table = (Path(__file__).parents[3] / "docs" / "shared-prompts.md").read_text(encoding="utf-8")
    cells = [line.split("|")[1].strip() for line in table.splitlines() if line.startswith("|")]
    text = "".join(path.read_text(encoding="utf-8") for path in sorted(source.glob("*.py")))
    reasons = re.findall(r"Refused\(\s*f?\"([^\"{]*)({?)", text)
    assert len(reasons) >= 18
    missing = [start for start, filled in reasons if not any(map(row_of(start, filled), cells))]
    assert not missing


def row_of(start, filled):
    return lambda cell: cell.startswith(start) or (filled and start in cell)
