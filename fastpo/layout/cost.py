"""What a batch costs padded, packed and shared: products of the layers and of attention."""

from __future__ import annotations

from dataclasses import dataclass

from .tree import Layout, Row

# Below it packing is not worth its gathers; above, sharing beside packing.
WORTH = 0.97


@dataclass(frozen=True)
class LayerCost:
    """FLOPs of a layer: for each token, and for each pair of query and key."""

    token: float
    pair: float

    def padded(self, rows: int, width: int, full: bool) -> float:
        """full: no pads, so that attention is causal instead of masked."""
        pairs = rows * width * width
        return rows * width * self.token + (pairs / 2 if full else pairs) * self.pair

    def packed(self, layout: Layout) -> float:
        pairs = sum(map(_pairs, layout.rows))
        return layout.size * self.token + pairs * self.pair

    def loses(self, layout: Layout) -> bool:
        """Would a row that shares little cost less if it shared nothing?"""
        return any(
            (_pairs(row) - row.length**2 / 2) * self.pair > row.shared * self.token
            for row in layout.rows
        )


def _pairs(row: Row) -> float:
    """A row that shares has a mask, which all its pairs go through."""
    return row.owned * row.length if row.shared else row.owned**2 / 2


def is_worth(cost: LayerCost, layout: Layout) -> bool:
    """Does the packed batch cost less than the padded one?"""
    rows, width = layout.shape
    full = sum(run.length for run in layout.places.runs) == rows * width
    return cost.packed(layout) < WORTH * cost.padded(rows, width, full)
