"""The prefix tree of a batch against a trie built token by token."""

from __future__ import annotations

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from fastpo.layout.cost import LayerCost, is_worth
from fastpo.layout.gather import Run
from fastpo.layout.tree import layout_of

ROWS = st.lists(
    st.tuples(st.sampled_from([0, 0, 2]), st.lists(st.integers(0, 1), min_size=1, max_size=7)),
    min_size=1,
    max_size=12,
)
# A branch off a branch, then one that leaves before it: drawn ones seldom are.
FORKS = [(0, [0, 0, 0, 0]), (0, [0, 0, 1, 1]), (0, [0, 1, 0, 1])]


def padded(rows):
    """ids and mask of rows (first column, tokens); pads hold what is nowhere else."""
    width = max(column + len(tokens) for column, tokens in rows)
    ids, mask = torch.full((len(rows), width), 9), torch.zeros(len(rows), width, dtype=torch.int64)
    for r, (column, tokens) in enumerate(rows):
        ids[r, column : column + len(tokens)] = torch.tensor(tokens)
        mask[r, column : column + len(tokens)] = 1
    return ids, mask


def trie(rows):
    """Every distinct prefix of a row from its column on is a token."""
    return {(column, *tokens[: i + 1]) for column, tokens in rows for i in range(len(tokens))}


def begins_another(row, rows, least):
    """With tokens enough to share: all of it is the other's."""
    return len(row) > least and any(row == other[: len(row)] != other for other in rows)


@given(ROWS)
def test_every_distinct_token_once(rows):
    ids, mask = padded(rows)
    layout = layout_of(ids, mask, least=1)
    assert layout.size == len(trie(rows)) == sum(layout.owned) and min(layout.owned) > 0


@given(ROWS, st.booleans(), st.sampled_from([1, 3]))
@example(FORKS, True, 1)
def test_rows_spell_their_tokens(rows, share, least):
    ids, mask = padded(rows)
    layout = layout_of(ids, mask, share=share, least=least)
    packed, positions = layout.pack(ids)[0], layout.positions
    expected = {(column, *tokens) for column, tokens in rows}
    found, end = set(), 0
    keys = layout.keys.index.split(layout.lengths)
    for row, whole in zip(layout.rows, keys, strict=True):
        path = torch.cat([torch.arange(r.source, r.source + r.length) for r in row.path])
        assert torch.equal(whole, path)
        assert len(path) == row.length and path[row.shared :].tolist() == list(
            range(end, end + row.owned)
        )
        assert positions[path].diff().eq(1).all()
        found.add((int(positions[path[0]]), *packed[path].tolist()))
        end += row.owned
    covered = {row for row in expected if share and begins_another(row, expected, least)}
    assert found == expected - covered
    if not share:
        assert layout.size == mask.sum() and not any(row.shared for row in layout.rows)
    assert all(row.shared == 0 or row.shared >= least for row in layout.rows)


@given(ROWS, st.booleans())
@example(FORKS, True)
def test_the_tree_says_who_sees_whom(rows, share):
    """A token of a row sees those before it on the row's path, and no others."""
    ids, mask = padded(rows)
    layout = layout_of(ids, mask, share=share, least=1)
    segment, end, depth = layout.tree
    expected = torch.zeros(layout.size, layout.size, dtype=torch.bool)
    for row in layout.rows:
        path = torch.cat([torch.arange(r.source, r.source + r.length) for r in row.path])
        for at in range(row.shared, row.length):
            expected[path[at], path[: at + 1]] = True
    inside = (segment <= segment[:, None]) & (segment[:, None] < end)
    assert torch.equal(inside & (depth <= depth[:, None]), expected)


@given(ROWS)
def test_sequences_of_variable_length(rows):
    layout = layout_of(*padded(rows), least=1)
    queries, keys, longest_queries, longest_keys = layout.sequences
    assert queries.dtype == keys.dtype == torch.int32
    assert queries.diff().tolist() == layout.owned and queries[0] == keys[0] == 0
    assert keys.diff().tolist() == layout.lengths and min(layout.owned) > 0
    assert (longest_queries, longest_keys) == (max(layout.owned), max(layout.lengths))
    assert layout.columns == max(column + len(tokens) for column, tokens in rows)
    ids, mask = padded(rows)
    wide = torch.nn.functional.pad(ids, (0, 3)), torch.nn.functional.pad(mask, (0, 3))
    assert layout_of(*wide, least=1).columns == layout.columns


@given(ROWS)
def test_back_where_they_were(rows):
    ids, mask = padded(rows)
    layout = layout_of(ids, mask, least=1)
    back = layout.put_back(layout.pack(ids).unsqueeze(-1).double())
    assert back.shape == (*ids.shape, 1)
    assert torch.equal(back[..., 0][mask != 0], ids[mask != 0].double())


@given(ROWS)
def test_the_longest_of_what_begins_alike_comes_first(rows):
    """It alone needs no mask; what branches off it is no longer."""
    layout = layout_of(*padded(rows), least=1)
    for row in layout.rows:
        trunk = next(r for r in layout.rows if r.path[0].source == row.path[0].source)
        assert not trunk.shared and trunk.length >= row.length


def test_a_long_row_beside_short_ones_needs_no_mask():
    """Whatever sorts first: 8,000 tokens, and seven rows of 100 with 60 in common."""
    for last in (0, 5):
        ids = torch.full((8, 8000), 3)
        ids[:, 60] = torch.tensor([last, 1, 2, 4, 6, 7, 8, 9])
        mask = torch.ones_like(ids)
        mask[1:, 100:] = 0
        rows = layout_of(ids, mask).rows
        assert (rows[0].shared, rows[0].owned) == (0, 8000)
        assert [(row.shared, row.owned) for row in rows[1:]] == [(60, 40)] * 7


def test_a_prompt_and_a_thousand_completions():
    torch.manual_seed(0)
    ids = torch.cat((torch.arange(40).expand(1000, 40), torch.randint(0, 90, (1000, 20))), 1)
    layout = layout_of(ids)
    assert layout.rows[0].owned == 60 and layout.size < 40 + 1000 * 20
    assert layout.keys.index.shape == (sum(layout.lengths),)


def test_a_batch_is_read_once(monkeypatch):
    """A GPU waits for every copy to the host."""
    copies, cpu = [], torch.Tensor.cpu
    monkeypatch.setattr(torch.Tensor, "cpu", lambda x: copies.append(x) or cpu(x))
    layout_of(*padded([(0, [1, 2]), (1, [2])]))
    assert len(copies) == 1


@pytest.mark.parametrize(
    ("ids", "mask", "message"),
    [
        (torch.zeros(3, dtype=torch.int64), None, r"ids: expected shape \(R, T\) with tokens"),
        (torch.zeros(2, 0, dtype=torch.int64), None, r"ids: expected shape \(R, T\) with tokens"),
        (torch.zeros(1, 3).long(), torch.ones(1, 2), r"mask: expected shape \(1, 3\), got"),
        (torch.zeros(1, 3).long(), torch.tensor([[1, 0, 1]]), "mask: expected one run of tokens"),
        (torch.zeros(2, 2).long(), torch.tensor([[1, 1], [0, 0]]), "holes or an empty row"),
    ],
)
def test_errors(ids, mask, message):
    with pytest.raises(ValueError, match=message):
        layout_of(ids, mask)


def test_a_short_beginning_in_common_may_lose():
    """Its tokens against the mask that a row of 100 needs then."""
    ids = torch.arange(200).view(2, 100)
    ids[:, :20] = 3
    layout = layout_of(ids)
    assert layout.rows[1].shared == 20 and not LayerCost(token=200.0, pair=1.0).loses(layout)
    assert LayerCost(token=100.0, pair=1.0).loses(layout)  # 80 · 100 - 100² / 2 = 3000 pairs
    assert not LayerCost(token=100.0, pair=1.0).loses(layout_of(ids, share=False))


def test_what_packing_is_worth():
    """Half of the tokens: yes. One of a hundred: no."""
    cost = LayerCost(token=100.0, pair=0.01)
    prompt, half = torch.arange(30).expand(2, 30), torch.tensor([[50] * 5, [51] * 5])
    assert is_worth(cost, layout_of(torch.cat((prompt, half), 1)))
    apart = torch.stack((torch.arange(100), torch.arange(100) + 1))
    mask = torch.ones_like(apart)
    mask[1, 99] = 0
    assert not is_worth(cost, layout_of(apart, mask))


def test_kernels_that_take_lengths_skip_what_masks_hide():
    """Of long rows that are half prompt, where attention is nearly all."""
    prompt = torch.arange(512).expand(2, 512)
    layout = layout_of(torch.cat((prompt, 1000 + torch.arange(1024).view(2, 512)), 1))
    masked, kernel = (LayerCost(token=1.0, pair=1.0, masks=x) for x in (True, False))
    assert layout.rows[1].shared == 512 and layout.real == (1024, 1024)
    assert not is_worth(masked, layout) and is_worth(kernel, layout)
    assert not kernel.loses(layout)
    assert kernel.packed(layout) == 1536 + 1024**2 / 2 + 512 * (512 + 256)


def test_pads_cost_pairs_where_attention_is_masked():
    ids, mask = torch.arange(12).view(2, 6), torch.ones(2, 6)
    full, (masked, kernel) = layout_of(ids), (LayerCost(1.0, 1.0, pads=x) for x in (True, False))
    assert masked.padded(full) == kernel.padded(full) == 12 + 36
    mask[1, 4:] = 0
    padded = layout_of(ids, mask)
    assert padded.real == (6, 4)
    assert masked.padded(padded) == 12 + 72 and kernel.padded(padded) == 12 + 18 + 8


def test_a_full_batch_is_one_run():
    """Over the ends of its rows, which is no reason for more columns than there are."""
    layout = layout_of(torch.arange(6).view(2, 3), share=False)
    assert layout.places.runs == (Run(0, 0, 6),) and layout.columns == 3


def test_one_token_in_all_rows():
    """Its place is the only one, which looks like a batch of one."""
    layout = layout_of(torch.full((2, 1), 5))
    assert layout.put_back(torch.zeros(1, 4)).shape == (2, 1, 4)


@pytest.mark.parametrize("share", [True, False])
def test_ids_below_zero_are_tokens(share):
    """Placeholders of soft prompts and pictures: -1 was taken for a pad."""
    ids = torch.tensor([[-1, -1, 5, -1], [-1, -1, 6, -1]])
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0]])
    assert layout_of(ids, share=share).real == (4, 4)
    layout = layout_of(ids, mask, share=share)
    assert layout.real == (4, 3) and layout.size == (5 if share else 7)


@pytest.mark.parametrize("next_token", [6, -6])
def test_a_row_that_another_goes_on_from_below_zero(next_token):
    """Sorted behind that one it had no place, and every token of it was the first of the batch."""
    ids = torch.tensor([[3, 3, 3], [-1, 5, 0], [-1, 5, next_token]])
    mask = torch.tensor([[1, 1, 1], [1, 1, 0], [1, 1, 1]])
    layout = layout_of(ids, mask)
    found = layout.put_back(layout.pack(ids).squeeze(0))
    assert layout.size == 6 and torch.equal(found * mask, ids * mask)


def test_another_default_device():
    """A script on a GPU may have one; batches are read on the host all the same."""
    ids, mask = padded([(0, [0, 1, 0, 1]), (0, [0, 1, 1]), (2, [1, 1])])
    expected = layout_of(ids, mask)
    with torch.device("meta"):
        found = layout_of(ids, mask)
        tensors = (found.tokens, found.places.index, *found.sequences[:2], *found.tree)
    wanted = (expected.tokens, expected.places.index, *expected.sequences[:2], *expected.tree)
    assert found.rows == expected.rows and all(map(torch.equal, tensors, wanted))
