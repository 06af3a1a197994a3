"""A receive pool in plain memory, for tests: filled by the pieces that a sender writes, read as a receiver drains it. One thread."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from embedwire.memory.geometry import PoolGeometry
from embedwire.memory.layout import Layout
from embedwire.memory.pool import BlockPool, pack_aux
from embedwire.memory.source import Source


class Region:
    """``num_blocks`` blocks of ``block_size`` tokens of a layout. ``start`` counts from a grant's first token."""

    def __init__(self, layout: Layout, block_size: int, num_blocks: int) -> None:
        self.layout = layout
        self.geometry = PoolGeometry(layout, block_size, num_blocks)
        self.memory = bytearray(self.geometry.region_bytes)
        self.pool = BlockPool(self.geometry, memoryview(self.memory))

    def write(
        self,
        blocks: Sequence[int],
        arrays: Mapping[str, np.ndarray],
        *,
        start: int = 0,
        aux: Sequence[int] | None = None,
    ) -> None:
        """Write all rows of ``arrays`` into a grant from its token ``start`` on, and ``aux`` into its first block."""
        source = Source(self.layout, arrays)
        row = None if aux is None else pack_aux(aux)
        pieces = source.pieces(
            self.geometry, blocks, start_token=-start, token=0, tokens=source.tokens, aux=row
        )
        for piece, offset in pieces:
            self.memory[offset : offset + len(piece)] = piece

    def read(self, blocks: Sequence[int], tokens: int, *, start: int = 0) -> dict[str, np.ndarray]:
        """The tokens [start, start + tokens) of a grant, in fresh arrays."""
        out = self.layout.empty(tokens)
        self.pool.get_rows(blocks, self.layout.rows(out), start=start, tokens=tokens)
        return dict(out)
