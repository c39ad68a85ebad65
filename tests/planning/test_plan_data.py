"""`fastpo plan --data`: lengths of rows, counted by hand."""

from __future__ import annotations

import json

import pytest

pytest.importorskip("trl", minversion="1.16")
pytest.importorskip("peft")

import _tiny as tiny
import datasets

from fastpo.planning.data import read_lengths


@pytest.fixture(scope="module")
def lengths(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    tiny.tokenizer().save_pretrained(folder)

    def read(rows):
        data = folder / "data.jsonl"
        lines = (json.dumps(row, ensure_ascii=False) for row in rows)
        data.write_text("\r\n".join(lines), encoding="utf-8-sig")
        return read_lengths(data, folder)

    read.folder = folder
    return read


def test_means_pads_and_what_is_shared(lengths):
    """A sign is a token. Eight pairs of 40 and 50 tokens in a batch, with a prompt of 30 in common,
    and a text of 60 in the next one."""
    pairs = [{"prompt": x * 30, "chosen": x + 9 * "<", "rejected": 20 * ">"} for x in "#$%&*+=@"]
    found = lengths([*pairs, {"text": 60 * "^"}])
    assert found.rows == 17 and found.longest == 60
    assert found.prompt == pytest.approx(16 * 30 / 17)
    assert found.answer == pytest.approx((8 * 10 + 8 * 20 + 60) / 17)
    assert found.prompt_share == pytest.approx(480 / 780)
    real = 8 * (40 + 50) + 60
    assert found.padding == pytest.approx(1 - real / (16 * 50 + 60))
    assert found.shared == pytest.approx(8 * 30 / real)


def test_a_context_of_nearly_all_rows(lengths):
    found = lengths([{"text": 5 * "#"}] * 298 + [{"text": 60 * "#"}] * 2)
    assert (found.context, found.longest) == (5, 60)


def test_the_prompt_that_a_pair_has_in_common(lengths):
    """Many sets of pairs have no prompt of their own: TRL takes it from the two answers."""
    found = lengths([{"chosen": 30 * "#" + 10 * "<", "rejected": 30 * "#" + 20 * ">"}] * 2)
    assert (found.rows, found.prompt, found.answer, found.longest) == (4, 30, 15, 50)
    said = [[{"role": "user", "content": "#"}, {"role": "assistant", "content": x}] for x in "<>"]
    pairs = {"chosen": said[0], "rejected": said[1]}
    split = {"prompt": said[0][:1], "chosen": said[0][1:], "rejected": said[1][1:]}
    assert lengths([pairs] * 2) == lengths([split] * 2)
    assert lengths([pairs] * 2).prompt > 0
    own = lengths([{"prompt": "", "chosen": "##<", "rejected": "##>"}] * 2)
    assert (own.prompt, own.answer) == (0, 3)


def test_a_separator_of_lines_inside_a_string(lengths):
    assert lengths([{"text": "#\u2028#\x85"}] * 2).rows == 2


def test_an_array_and_parquet(lengths, tmp_path):
    """As the demo reads them."""
    rows = [{"prompt": "##", "chosen": x * "<", "rejected": ">"} for x in (1, 5)]
    expected, folder = lengths(rows), lengths.folder
    (tmp_path / "rows.json").write_text(json.dumps(rows, indent=1))
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "rows.parquet")
    for name in ("rows.json", "rows.parquet"):
        assert read_lengths(tmp_path / name, folder) == expected
