"""What the demo reads: files and rows in TRL's formats, and what it refuses."""

import json

import pytest
from _preference_rows import GOOD, chat, write

from fastpo.demo import data
from fastpo.demo.errors import DemoError

datasets = pytest.importorskip("datasets")
pytest.importorskip("trl")

MALFORMED = {
    "not json": ("{nonsense", "expected one JSON object per line, got '{nonsense'"),
    "not an object": ("[1, 2]", "expected an object with prompt, chosen, rejected, got a list"),
    "key of two lines": ({"a\nb": 1}, "got 'a\\nb': prompt is missing"),
    "number": ("12", "expected an object with prompt, chosen, rejected, got a number"),
    "no prompt": (
        {"chosen": "Yes.", "rejected": "No."},
        "expected a prompt, or chosen and rejected that begin alike, got neither",
    ),
    "no prompt, empty list": (
        {"chosen": [], "rejected": chat("a", "b", "c")["prompt"]},
        "chosen: expected at least one message, got an empty list",
    ),
    "no rejected": ({"prompt": "a", "chosen": "b"}, "got prompt, chosen: rejected is missing"),
    "wrong type": (
        GOOD | {"chosen": 7},
        "chosen: expected a string or a list of messages, got a n",
    ),
    "null": (
        GOOD | {"rejected": None},
        "rejected: expected a string or a list of messages, got nu",
    ),
    "empty answer": (GOOD | {"chosen": "  "}, "chosen: expected text, got an empty string"),
    "empty list": (chat("a", "b", "c") | {"chosen": []}, "chosen: expected at least one message"),
    "empty message": (chat("a", "b", " "), "rejected[0].content: expected text, got an empty"),
    "no role": (
        chat("a", "b", "c") | {"prompt": [{"content": "x"}]},
        "prompt[0].role: expected a s",
    ),
    "no message": (
        chat("a", "b", "c") | {"prompt": ["x"]},
        "prompt[0]: expected a message with ro",
    ),
    "same": (GOOD | {"rejected": GOOD["chosen"]}, "chosen and rejected are the same"),
    "two kinds": (
        GOOD | {"prompt": chat("a", "b", "c")["prompt"]},
        "expected three strings or thr",
    ),
    "other format": (chat("a", "b", "c"), "expected strings as in the first row"),
    "images": (GOOD | {"images": ["x.png"]}, "images: not supported, the demo trains on text only"),
    "calls": (
        chat("a", "b", "c") | {"chosen": [{"role": "assistant", "tool_calls": [{"type": "x"}]}]},
        "chosen[0].tool_calls: not supported, the demo trains on text only",
    ),
    "thoughts alone": (
        {
            "prompt": [{"role": "user", "content": "a", "tool_calls": None}],
            "chosen": [{"role": "assistant", "content": "b", "reasoning_content": "Right."}],
            "rejected": [{"role": "assistant", "content": "b", "reasoning_content": "Wrong."}],
        },
        "chosen[0].reasoning_content: not supported",
    ),
    "surrogate": (
        '{"prompt": "\\ud800", "chosen": "b", "rejected": "c"}',
        "prompt: expected valid",
    ),
}


@pytest.mark.parametrize("name", MALFORMED)
def test_malformed_rows_are_named(name, tmp_path):
    row, message = MALFORMED[name]
    path = tmp_path / "pairs.jsonl"
    line = row if isinstance(row, str) else json.dumps(row)
    path.write_text(f"{json.dumps(GOOD)}\n\n{line}\n")
    with pytest.raises(DemoError) as error:
        data.load_pairs(path, seed=0)
    assert str(error.value).startswith(f"{path}, row 3: ")
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "expected at least 2 rows (one is held out), got 0"),
        (json.dumps(GOOD).encode(), "expected at least 2 rows (one is held out), got 1"),
        (b"\xff\xfe\x00", "expected UTF-8 text, got byte 0"),
        (None, "no such file"),
    ],
)
def test_unusable_files_are_named(content, message, tmp_path):
    path = tmp_path / "pairs.jsonl"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(DemoError, match=r"pairs\.jsonl: ") as error:
        data.load_pairs(path, seed=0)
    assert message in str(error.value)
    with pytest.raises(DemoError, match="expected a file of rows, got a folder"):
        data.load_pairs(tmp_path, seed=0)


def test_rows_are_split_by_seed(tmp_path):
    rows = [GOOD | {"prompt": f"Question {i}?", "margin": i} for i in range(60)]
    path = write(tmp_path / "pairs.jsonl", *rows)
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().replace(b"\n", b"\r\n"))
    pairs = data.load_pairs(path, seed=1)
    assert (len(pairs.train), len(pairs.held_out)) == (52, 8)
    assert {row["prompt"] for row in pairs.rows} == {row["prompt"] for row in rows}
    assert pairs.held_out == data.load_pairs(path, seed=1).held_out
    assert pairs.held_out != data.load_pairs(path, seed=2).held_out
    assert not pairs.conversational
    assert tuple(pairs.train[0]) == data.KEYS


@pytest.mark.parametrize("form", ["a JSON array", "Parquet"])
@pytest.mark.parametrize("prompt", ["explicit", "in both", "in both, as text"])
def test_other_files_and_prompts(form, prompt, tmp_path):
    path, rows = (
        tmp_path / "pairs.parquet",
        [chat(f"Question {i}?", "Yes.", "No.") for i in range(4)],
    )
    if prompt == "in both":
        given = [
            {side: row["prompt"] + row[side] for side in ("chosen", "rejected")} for row in rows
        ]
    elif prompt == "explicit":
        given = rows
    else:
        rows = [
            {"prompt": f"Human: {i}? AI:", "chosen": " Yes.", "rejected": " No."} for i in range(4)
        ]
        given = [{s: row["prompt"] + row[s] for s in ("chosen", "rejected")} for row in rows]
    if form == "Parquet":
        datasets.Dataset.from_list(given).to_parquet(path)
    else:
        path = tmp_path / "pairs.json"
        path.write_text(json.dumps(given, indent=1))
    found = data.load_pairs(path, seed=0).rows
    assert sorted(found, key=str) == sorted(rows, key=str)


def test_a_file_that_is_no_parquet_is_named(tmp_path):
    path = write(tmp_path / "pairs.parquet", GOOD, GOOD)
    with pytest.raises(DemoError, match=r"pairs\.parquet: cannot be read: .*[Pp]arquet"):
        data.load_pairs(path, seed=0)


def test_what_python_has_no_value_for_is_named(tmp_path):
    """In a column that nobody reads, too."""
    from pyarrow import array, parquet, table, timestamp

    path = tmp_path / "pairs.parquet"
    parquet.write_table(table({"prompt": ["why"], "at": array([2**62], timestamp("us"))}), path)
    with pytest.raises(DemoError, match=r"pairs\.parquet: cannot be read: date value out of range"):
        data.load_pairs(path, seed=0)
