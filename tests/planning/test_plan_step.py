"""`fastpo plan`: what it tells is what a step holds, what it finds fits, what is wrong it names."""

from __future__ import annotations

import copy
import dataclasses
import json
import re
from collections import Counter

import pytest

pytest.importorskip("trl", minversion="1.16")
pytest.importorskip("peft")

import _tiny as tiny
import torch
import transformers
from _plans import LLAMA, SHALLOW, SIZES, THREE, TWO, module_of
from hypothesis import example, given
from hypothesis import strategies as st
from transformers import GPT2Config, Llama4TextConfig, LlamaConfig, MixtralConfig

import fastpo
from fastpo import cli
from fastpo.planning import fits
from fastpo.planning.cards import CARDS, memory_of
from fastpo.planning.estimate import Estimate, Session
from fastpo.planning.fits import Depths
from fastpo.planning.live import Live
from fastpo.planning.measure import measure
from fastpo.planning.models import Fake, fake
from fastpo.planning.names import GENERATIONS, TRAINERS
from fastpo.planning.setting import HEADS, Lora, Setting
from fastpo.planning.steps import batch_of, layout_for

MIB = 2**20


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = tmp_path_factory.mktemp("model")
    TWO.save_pretrained(made)
    tiny.tokenizer().save_pretrained(made)
    return made


def test_what_is_alive_is_counted():
    with Live() as live:
        x = torch.ones(100)
        with live.as_("gone"):
            torch.ones(1000).add_(1).view(10, 100)
        y = x.view(4, 25)[1:]
        with live.as_("kept"):
            z = y * 2
    assert live.bytes["other"] == 400 and live.bytes["kept"] == z.numel() * 4
    assert live.peak == 4400 and live.at_peak == {"other": 400, "gone": 4000}
    assert live.now == 400 + z.numel() * 4
    live.relabel([y], "moved")
    live.shrink(x, 100)
    del x, y
    assert (live.bytes["other"], live.bytes["moved"]) == (0, 0)


def test_experts_of_any_dtype():
    config = MixtralConfig(**SIZES, num_hidden_layers=1, num_local_experts=4)
    found = {}
    for dtype in ("bf16", "fp16", "fp32", "bf16-mixed"):
        setting = Setting("mixtral", dtype=dtype, trainer="sft", context=48)
        found[dtype] = Session(setting, config, "fastpo").phases(setting)
    assert found["fp16"] == found["bf16"] != found["fp32"]
    rows, experts, offsets = torch.ones(8, 16), torch.ones(2, 16, 24), torch.tensor([4, 8])
    cases = ((rows, experts), (experts.mT, rows.T), (rows.T, rows))
    for a, b in cases:
        real = torch._grouped_mm(a, b, offs=offsets.int())
        with Fake() as mode:
            told = torch._grouped_mm(*map(mode.from_tensor, (a, b)), offs=offsets.int())
        assert (told.shape, told.dtype) == (real.shape, real.dtype)


def test_a_model_that_is_its_own_base_model():
    config = Llama4TextConfig(
        **SIZES, num_hidden_layers=1, num_local_experts=2, intermediate_size_mlp=64
    )
    setting = Setting("llama4", context=48, batch=2, prompt_rows=2)
    session = Session(setting, config, "fastpo")
    assert session.phases(setting)["head"].total() > 0
    ids = batch_of(setting, 100).ids
    assert layout_for(session.models.base, ids, "sdpa") is None  # `shared_prompts` leaves it padded


def test_no_more_positions_than_a_table_has():
    setting = Setting("gpt2", trainer="sft", context=32)
    for most, expected in ((40, 40), (150, 128)):
        config = GPT2Config(vocab_size=100, n_embd=16, n_layer=1, n_head=2, n_positions=most)
        found = Depths(setting, config, "fastpo").largest("context", 2**40)
        assert found.setting.context == expected


def test_notes():
    config = LlamaConfig(**SIZES, num_hidden_layers=1, max_position_embeddings=31)
    config.quantization_config = {"quant_method": "gptq", "bits": 4}
    plan = fastpo.plan_step(config, context=32, search=False, trainer="grpo", reference="model")
    assert plan.notes == (
        "GRPO scores a reference with beta > 0 only",
        "32 tokens are more than the model's max_position_embeddings, 31",
        "the model's quantization_config is left out: planned in bf16",
    )
    assert fastpo.plan_step(SHALLOW, context=32, search=False).notes == ()


@pytest.mark.parametrize(
    "state", [torch.no_grad, torch.inference_mode, lambda: torch.device("meta")]
)
def test_what_torch_is_told_outside_changes_nothing(state):
    def peak():
        plan = fastpo.plan_step(SHALLOW, context=32, search=False, trainer="sft")
        return plan.heads["fastpo"].estimate.peak

    with state():
        found = peak()
    assert found == peak()


MEASURED = {
    "full": {},
    "lora": {"lora": Lora(), "context": 200},
    "checkpointed": {"checkpointing": "layers", "trainer": "sft", "batch": 4},
    "adafactor": {"optimizer": "adafactor", "trainer": "kto", "batch": 4},
    "flash": {"attention": "flash", "context": 256},
    "shared": {"prompt_rows": 2, "prompt": 0.8, "context": 512},
    "shared, grouped": {"prompt_rows": 4, "prompt": 0.5, "trainer": "rloo", "batch": 8},
    "4 bits": {"lora": Lora(), "load_in_4bit": True, "context": 400},
    "gkd": {"trainer": "gkd"},
    "distillation": {"trainer": "distillation", "lora": Lora()},
}


@pytest.mark.parametrize("name", MEASURED)
def test_as_a_step_holds(name):
    """Within 15 % of resident memory, or 10 MiB, the noise of a process."""
    if "bits" in name:
        pytest.importorskip("bitsandbytes")
    config, teacher = copy.deepcopy(LLAMA), None
    config.update({"vocab_size": 16_000, "hidden_size": 256, "num_hidden_layers": 3})
    options = {"context": 128, "batch": 2, **MEASURED[name]}
    setting = Setting(name, dtype="fp32", device="cpu", **options)
    if setting.distils:
        teacher = copy.deepcopy(config)
        teacher.update({"hidden_size": 384, "num_hidden_layers": 6})
    told = Depths(setting, config, "fastpo", teacher).estimate().peak
    assert told > 50 * MIB
    held = measure(setting, config, "fastpo", teacher)
    assert told == pytest.approx(held, rel=0.15, abs=10 * MIB)


PASTED = {
    **{name: (name, {}) for name in TRAINERS},
    "precomputed": ("dpo", {"reference": "precomputed"}),
    "a group over batches": ("grpo", {"batch": 6}),
    "groups of seven": ("rloo", {"shared_prompts": "4:1,7", "reference": "none"}),
    "offload": ("kto", {"checkpointing": "offload", "optimizer": "sgd"}),
}


@pytest.mark.filterwarnings("ignore:.gradient_checkpointing.* is deprecated:FutureWarning")
@pytest.mark.parametrize("name", PASTED)
def test_what_to_paste_is_what_the_trainer_takes(name, tmp_path):
    trainer, options = PASTED[name]
    other = {"teacher": SHALLOW} if TRAINERS[trainer][1] == "teacher" else {}
    common = {"dtype": "fp32", "context": 32, "search": False}
    plan = fastpo.plan_step(SHALLOW, trainer=trainer, **common, **options, **other)
    config = getattr(module_of(trainer), str(plan).splitlines()[-1].partition("(")[0])
    made = config(output_dir=str(tmp_path), use_cpu=True, report_to="none", **plan.settings)
    assert made.model_init_kwargs == {"dtype": "float32"}
    if other:
        assert made.teacher_model_init_kwargs == {"dtype": "float32"}
    if trainer in GENERATIONS:
        own = {x.name: x.default for x in dataclasses.fields(config)}["num_generations"]
        assert made.num_generations == (7 if "4:1,7" in options.values() else own)
        assert own == GENERATIONS[trainer]


def _parts(config, **options):
    return Depths(Setting("llama", context=32, **options), config, "fastpo").estimate().parts


def test_parts_are_what_they_are_called():
    parts = _parts(TWO)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(TWO, dtype=torch.bfloat16)
    weights = sum(x.numel() * 2 for x in model.parameters())
    buffers = sum(x.numel() * x.itemsize for x in model.buffers())
    assert parts["weights"] == weights + buffers
    assert parts["optimizer"] >= 2 * weights
    assert parts["device"] > 500 * MIB
    assert _parts(TWO, optimizer="sgd")["optimizer"] == 0  # TRL's has no momentum
    lora = _parts(TWO, lora=Lora(8))
    assert lora["optimizer"] < weights // 2 and lora["reference"] == 0


def test_less_where_less_is_kept():
    def peak(head="fastpo", **options):
        setting = Setting("llama", **{"dtype": "bf16", "context": 256, "batch": 4, **options})
        phases = Session(setting, TWO, head).phases(setting)
        return max(held.total() for held in phases.values())

    def forward(**options):
        setting = Setting("llama", context=512, batch=4, **options)
        return Session(setting, THREE, "fastpo").phases(setting)["forward"].total()

    held = [forward(checkpointing=kind) for kind in ("offload", "layers", "none")]
    assert held == sorted(held) and len({*held}) == 3
    assert held[-1] - forward(attention="flash") >= 8 * 512**2  # a mask for each row
    assert peak(reference="precomputed") < peak()
    assert peak(optimizer="adamw8bit") <= peak()
    assert peak(prompt_rows=2, prompt=0.8) < peak(prompt=0.8)
    unshared = peak(prompt_rows=2, prompt=0.02)  # it would save too little
    assert unshared == pytest.approx(peak(prompt=0.02), rel=1e-3)
    assert peak("trl", prompt_rows=2) == peak("trl")
    for trainer in ("cpo", "orpo"):
        assert peak(trainer=trainer) < peak("trl", trainer=trainer)


def test_four_bits():
    """Half a byte a number, a byte for 64, four for 256 of those, two tables; the head stays, and
    the adapter has two bytes instead of four."""
    common = {"lora": "r=8", "dtype": "bf16", "context": 32, "search": False}
    plain = fastpo.plan_step(SHALLOW, **common)
    packed = fastpo.plan_step(SHALLOW, load_in_4bit=True, **common)
    assert "on 4 bits" in str(packed) and "bnb_4bit_quant_type='nf4'" in str(packed)
    assert "bnb_4bit_compute_dtype='bfloat16'" in str(packed)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(SHALLOW)
    shapes = [x.weight.shape for x in model.model.modules() if isinstance(x, torch.nn.Linear)]
    cells = [shape.numel() for shape in shapes]
    saved = sum(2 * n - (n // 2 + n // 64 + 4 * (-(-n // 64 // 256) + 273)) for n in cells)
    saved += sum(2 * 8 * sum(shape) for shape in shapes)
    parts = [plan.heads["fastpo"].estimate.parts["weights"] for plan in (plain, packed)]
    assert parts[0] - parts[1] == saved


@pytest.mark.parametrize("lora", [None, Lora(8)])
def test_what_shards_have_whole_at_once(lora):
    """Beside their part of everything: head and embeddings, two layers, gradients of those."""
    config = copy.deepcopy(LLAMA)
    config.num_hidden_layers = 3
    one = _parts(config, lora=lora)
    shards = {"devices": 4, "strategy": "fsdp2", "lora": lora}
    found = _parts(config, **shards)
    assert found["weights"] == -(-one["weights"] // 4)
    model = Session(Setting("llama", **shards), config, "fastpo").models.policy
    layers = next(m for m in model.modules() if isinstance(m, torch.nn.ModuleList))

    def size(module, trained=False):
        counted = (p for p in module.parameters() if p.requires_grad or not trained)
        return sum(p.numel() * p.itemsize for p in counted)

    expected = size(model) - size(layers) + 2 * size(layers[1])
    expected += size(model, True) - size(layers, True) + size(layers[1], True)
    assert found["device"] - one["device"] == expected


def test_parts_add_up_where_one_would_be_less_than_nothing():
    """One run's peak has the head's tensors, the next one's a layer's: their total still grows."""
    phases = {"backward": Counter({"weights": 100, "activations": -20, "temporaries": 50})}
    setting = Setting("llama", device="cpu")
    found = Estimate.of("fastpo", setting, phases, trained=0, gathered=0)
    assert found.peak == 130 and min(found.parts.values()) == 0


def test_shards_have_a_peak_of_their_own():
    """On one device the optimizer's phase is the largest; of its bytes each of four has a part."""
    kept = Counter({"weights": 400, "optimizer": 800})
    phases = {
        "head": kept + Counter({"activations": 300}),
        "optimizer": kept + Counter({"gradients": 400}),
    }
    for options, expected in (({}, 1600), ({"devices": 4, "strategy": "fsdp2"}, 300 + 300 + 7)):
        setting = Setting("llama", device="cpu", **options)
        assert Estimate.of("fastpo", setting, phases, trained=400, gathered=7).peak == expected


def test_head_and_layers_have_peaks_of_their_own():
    for trainer in ("dpo", "orpo", "gkd"):
        setting = Setting("llama", trainer=trainer, context=64)
        for head in HEADS:
            found = Session(setting, TWO, head).phases(setting)
            order = [x for x in found if "reference" not in x]
            assert order[:4] == ["forward", "head", "backward", "layers' backward"]
            assert order[4:] == ["embeddings' backward", "optimizer"]


def test_tied_weights_are_one():
    with torch.device("meta"):
        config = LlamaConfig(**SIZES, num_hidden_layers=1, tie_word_embeddings=True)
        model = transformers.AutoModelForCausalLM.from_config(config)
    fake(model, "cpu")
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert {x.device.type for x in (*model.parameters(), *model.buffers())} == {"cpu"}


@given(
    fixed=st.integers(0, 10**6), linear=st.integers(1, 10**4), bend=st.integers(0, 50),
    limit=st.integers(0, 10**7), start=st.integers(1, 4096),
)  # fmt: skip
@example(fixed=0, linear=10, bend=0, limit=100, start=1)  # to the byte
def test_the_largest_that_fits(fixed, linear, bend, limit, start):
    asked = []

    def peak(count):
        asked.append(count)
        return fixed + linear * count + bend * count**2

    most = 4096
    found = fits._search(peak, limit, start, most)
    assert len(asked) < 40
    assert 0 <= found <= most and (found == 0 or peak(found) <= limit)
    beyond = max(found + 1, int(found * 1.02) + 1)
    assert beyond > most or peak(beyond) > limit


def test_more_memory_fits_more():
    sizes = {}
    for head in HEADS:
        setting = Setting("llama", dtype="bf16", context=64, trainer="orpo")
        depths = Depths(setting, TWO, head)
        for what in ("context", "batch"):
            for memory in (590 * MIB, 650 * MIB):
                found = depths.largest(what, memory)
                assert found.peak <= memory
                sizes[head, what, memory] = getattr(found.setting, what)
            assert sizes[head, what, 650 * MIB] > sizes[head, what, 590 * MIB]
            assert sizes[head, what, memory] >= sizes["trl", what, memory]
        assert depths.largest("batch", 100 * MIB) is None


@pytest.mark.parametrize(("what", "size"), [("context", 40), ("context", 100), ("batch", 3)])
def test_what_is_given_and_fits_is_no_more_than_the_most(what, size, monkeypatch):
    monkeypatch.setattr(fits, "_MOST", {"context": 2**20, "batch": 2})
    setting = Setting("llama", trainer="sft", **{"context": 64, what: size})
    depths = Depths(setting, SHALLOW, "fastpo")
    memory = 2**40 if what == "batch" else depths.estimate().peak
    assert getattr(depths.largest(what, memory).setting, what) == size


def test_the_command(folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(fits, "_MOST", {"context": 128, "batch": 2})
    names = ("prompt", "chosen", "rejected")
    rows = [{name: row[name] for name in names} for row in tiny.preferences()]
    data = tmp_path / "pairs.jsonl"
    data.write_text("\n".join(map(json.dumps, rows)))
    picture, report = tmp_path / "plan.png", tmp_path / "plan.json"
    given = ["--model", str(folder), "--gpu", "620MiB", "--data", str(data)]
    given += ["--plot", str(picture), "--json", str(report), "--gradient-checkpointing"]
    assert cli.main(["plan", *given]) == 0
    said = capsys.readouterr().out
    assert "longest context that fits" in said and "fits into 0.6 GiB with fastpo" in said
    assert re.search(r"largest batch that fits( +2 or more){2}\n", said)  # the search ends there
    assert "DPOConfig(max_length=" in said and "gradient_checkpointing=True" in said
    assert picture.read_bytes().startswith(b"\x89PNG")
    found = json.loads(report.read_text())
    assert found["fits"] is True and found["lengths"]["rows"] == 2 * len(rows)
    assert found["setting"]["context"] == found["lengths"]["context"]
    assert sum(found["heads"]["fastpo"]["parts"].values()) == found["heads"]["fastpo"]["bytes"]
    assert cli.main(["plan", "--model", str(folder), "--gpu", "8MiB", "--no-search"]) == 1
    assert "does not fit into" in capsys.readouterr().out


def test_a_ratio_says_how_prompts_are():
    def planned(given, **options):
        return fastpo.plan_step(SHALLOW, context=32, search=False, shared_prompts=given, **options)

    shallow = planned("3:1")
    assert (shallow.setting.prompt, shallow.setting.prompt_rows) == (0.75, 2)
    assert "prompts of 2 rows" in str(shallow) and "shared_prompts=True" in str(shallow)
    grouped = planned("", trainer="grpo", prompt=0.25, batch=2).setting
    assert (grouped.prompt, grouped.prompt_rows) == (0.25, 8)
    alone = planned("1:1,4", trainer="rloo").setting
    assert (alone.batch, alone.prompt_rows) == (4, 4)  # a whole group
    assert planned("", trainer="rloo").setting.prompt_rows == 2
    told = planned("1:1,8", trainer="sft", batch=8).setting  # a trainer of single rows
    assert (told.prompt, told.prompt_rows) == (0.5, 8)


def test_cards():
    assert memory_of("H100") == int(CARDS["h100"] * 2**30) and memory_of("RTX 4090") > 23 * 2**30
    assert memory_of("80GiB") == memory_of("80g") == 80 * 2**30
    assert memory_of("1.5 TiB") == int(1.5 * 2**40) and memory_of("rtx-4090") == memory_of("4090")


@pytest.mark.parametrize("checkpointing", ["layers", "offload"])
def test_nobody_is_warned(checkpointing, recwarn):
    fastpo.plan_step(SHALLOW, lora="r=8", checkpointing=checkpointing, context=32)
    fastpo.plan_step(SHALLOW, trainer="gkd", context=32)
    assert not [str(x.message) for x in recwarn]
