"""What a batch costs padded, packed and shared: products of the layers and of attention."""

from __future__ import annotations

from dataclasses import dataclass

from .tree import Layout, Row

# Below it packing is not worth its gathers; above, sharing beside packing.
WORTH = 0.97


@dataclass(frozen=True)
class LayerCost:
    """FLOPs of a layer: for each token, and for each pair of query and key.

    pads, masks: whether attention goes through the pairs that pads hide in the padded batch, and
    that causality hides in a row that shares. Kernels that take lengths of rows do not.
    """

    token: float
    pair: float
    pads: bool = True
    masks: bool = True

    def padded(self, layout: Layout) -> float:
        rows, width = layout.shape
        full = sum(layout.real) == rows * width  # then attention is causal instead of masked
        hides = self.pads and not full
        pairs = rows * width**2 if hides else sum(length**2 for length in layout.real) / 2
        return rows * width * self.token + pairs * self.pair

    def packed(self, layout: Layout) -> float:
        pairs = sum(map(self._pairs, layout.rows))
        return layout.size * self.token + pairs * self.pair

    def loses(self, layout: Layout) -> bool:
        """Would a row that shares little cost less if it shared nothing?"""
        return any(
            (self._pairs(row) - row.length**2 / 2) * self.pair > row.shared * self.token
            for row in layout.rows
        )

    def _pairs(self, row: Row) -> float:
        if row.shared and self.masks:
            return row.owned * row.length
        return row.owned * (row.shared + row.owned / 2)


def is_worth(cost: LayerCost, layout: Layout) -> bool:
    """Does the packed batch cost less than the padded one?"""
    return cost.packed(layout) < WORTH * cost.padded(layout)
