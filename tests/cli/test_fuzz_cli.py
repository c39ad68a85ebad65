"""The command line over malformed files: one line that names what is wrong, never a traceback."""

from __future__ import annotations

import contextlib
import copy
import io
import json
from pathlib import Path
from unittest import mock

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastpo import cli
from fastpo.demo import prepare, tokenizer
from fastpo.demo.errors import DemoFailure
from fastpo.ops.rows import fastest

pytest.importorskip("trl")
pytest.importorskip("matplotlib")

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"
REPORTS = sorted(RESULTS.glob("*.json"))
FAR_ENOUGH = "well-formed, so there is something to train on"
PAIR = {"prompt": "Why is the sky blue?", "chosen": "Blue light scatters.", "rejected": "No idea."}
CHAT = {name: [{"role": "user", "content": text}] for name, text in PAIR.items()}

TEXTS = st.text(st.characters(), max_size=12) | st.sampled_from(
    ["", "\ud800", "a\nb", "$\\frac$", "fastpo", "fastpo torch", "length", "1e400", "<|end|>"]
)
NUMBERS = (
    st.integers()
    | st.floats()
    | st.sampled_from([0, -1, 10**30, 1e300, 2**63, float("inf"), float("nan")])
)
SCALARS = st.none() | st.booleans() | NUMBERS | TEXTS
JSON = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3),
    max_leaves=8,
)
HUGE = {"deep list": b"[" * 100_000, "deep object": b'{"a":' * 100_000, "digits": b"1" * 5000}
RAW = (
    st.binary(max_size=64)
    | st.sampled_from([b"", b"\xef\xbb\xbf{}", b"\x00", b"\xff\xfe", b"NaN", b"\n\n"])
    | st.sampled_from(list(HUGE)).map(lambda name: HUGE[name])
)


def written(value) -> bytes:
    return json.dumps(value).encode()


def places(value, here=()):
    """Every path into a JSON value."""
    yield here
    if isinstance(value, dict | list):
        for key in value if isinstance(value, dict) else range(len(value)):
            yield from places(value[key], (*here, key))


@st.composite
def mutated(draw, whole):
    """One to three places of a well-formed value changed, left out, or doubled."""
    whole = copy.deepcopy(whole)
    for _ in range(draw(st.integers(1, 3))):
        place = draw(st.sampled_from(list(places(whole))))
        if not place:
            continue
        *way, last = place
        owner = whole
        for key in way:
            owner = owner[key]
        change = draw(st.sampled_from(["other", "like", "missing", "added"]))
        if change in ("other", "like"):
            alike = {str: TEXTS, int: NUMBERS, float: NUMBERS}.get(type(owner[last]), JSON)
            owner[last] = draw(alike if change == "like" else JSON)
        elif change == "missing":
            del owner[last]
        elif isinstance(owner, dict):
            owner[draw(TEXTS)] = draw(JSON)
        else:
            owner.append(draw(JSON))
    return whole


def trimmed(value):
    """The same with lists of at most three, so that more of what changes is read."""
    if isinstance(value, dict):
        return {key: trimmed(each) for key, each in value.items()}
    return [trimmed(each) for each in value[:3]] if isinstance(value, list) else value


def said(arguments) -> tuple[int, str]:
    """Exit code and what stands on the standard error; the streams are strict as Python's are."""
    out = io.TextIOWrapper(io.BytesIO(), "utf-8", write_through=True)
    err = io.TextIOWrapper(io.BytesIO(), "utf-8", "backslashreplace", write_through=True)
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = cli.main([str(each) for each in arguments])
    return code, err.buffer.getvalue().decode()


def in_one_line(command, code, errors, fine=(0,)):
    if code in fine:
        return
    assert code == 2
    start, _, rest = errors.partition(": error: ")
    assert start == f"fastpo {command}"
    assert rest.count("\n") == 1 and rest.strip(), errors


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("fuzz")


CONTENT = (
    RAW
    | JSON.map(written)
    | st.sampled_from(REPORTS)
    .flatmap(lambda path: mutated(trimmed(json.loads(path.read_text(encoding="utf-8")))))
    .map(written)
)


@given(CONTENT)
def test_bench_plot(folder, content):
    (folder / "report.json").write_bytes(content)
    in_one_line("bench plot", *said(["bench", "plot", folder / "report.json"]))


@given(CONTENT)
def test_bench_readme(folder, content):
    (folder / "report.json").write_bytes(content)
    page = folder / "README.md"
    page.write_text("<!-- bench: report.json -->\n<!-- end of bench -->\n")
    in_one_line("bench readme", *said(["bench", "readme", page]))


@given(RAW | st.text(st.sampled_from("<!-- bench: x end of\n>")).map(str.encode))
def test_bench_readme_of_a_page(folder, content):
    (folder / "PAGE.md").write_bytes(content)
    in_one_line("bench readme", *said(["bench", "readme", folder / "PAGE.md"]))


@given(CONTENT)
def test_bench_choose(folder, content):
    table = folder / "fastest.json"
    table.write_text('{"rows": []}')
    (folder / "report.json").write_bytes(content)
    with mock.patch.object(fastest, "TABLE", table):
        in_one_line("bench choose", *said(["bench", "choose", folder / "report.json"]))


def demo(*arguments):
    """Up to where it would begin to write and train; the tokenizer is smaller."""
    small = mock.patch.object(
        prepare, "train_tokenizer", lambda texts, _: tokenizer.train_tokenizer(texts, 300)
    )
    stop = mock.patch.object(prepare.Stage, "beside", side_effect=DemoFailure(FAR_ENOUGH))
    with small, stop:
        code, errors = said(["demo", *arguments])
    if code == 1:
        assert errors.strip() == f"fastpo demo: error: {FAR_ENOUGH}"
    return code, errors


ROWS = st.lists(
    st.sampled_from([PAIR, CHAT]).flatmap(lambda row: st.just(row) | mutated(row)) | JSON,
    min_size=2,
    max_size=4,
)
LINES = ROWS.map(lambda rows: b"\n".join(map(written, rows)))


@given(RAW | LINES | st.tuples(LINES, RAW).map(b"\n".join), st.booleans())
def test_demo_data(folder, content, truncate):
    (folder / "pairs.jsonl").write_bytes(content)
    options = ["--truncate", "--max-length", 8] if truncate else []
    arguments = ["--data", folder / "pairs.jsonl", "--out", folder / "out", *options]
    in_one_line("demo", *demo(*arguments), fine=(1,))


MODEL = ("config.json", "tokenizer.json", "tokenizer_config.json")


@pytest.fixture(scope="module")
def model():
    """The text of a model's files; what is left out is in the weights."""
    from transformers import LlamaConfig

    made = tokenizer.train_tokenizer(["a few words"], 300)
    return {
        "config.json": LlamaConfig(vocab_size=300, hidden_size=16, num_attention_heads=2).to_dict(),
        "tokenizer.json": json.loads(made.backend_tokenizer.to_str()),
        "tokenizer_config.json": {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "a"}
        | {"chat_template": tokenizer.CHAT_TEMPLATE},
    }


@given(st.data())
def test_demo_model(folder, model, data):
    place = folder / "model"
    place.mkdir(exist_ok=True)
    (place / "model.safetensors").touch()
    changed = data.draw(st.sampled_from([*MODEL, None]))
    for name, content in model.items():
        malformed = RAW | JSON.map(written) | mutated(content).map(written)
        text = data.draw(malformed) if name == changed else written(content)
        (place / name).write_bytes(text)
    row = written(data.draw(st.sampled_from([PAIR, CHAT])))
    (folder / "rows.jsonl").write_bytes(b"\n".join([row] * 3))
    arguments = ["--data", folder / "rows.jsonl", "--out", folder / "out", "--model", place]
    code, errors = demo(*arguments)
    last = errors.rstrip("\n").rpartition("\n")[2]  # transformers may warn before
    in_one_line("demo", code, last + "\n", fine=(1,))
