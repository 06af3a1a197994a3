"""The bytes of a pool: reads tokens out of blocks, which a wire has written. Owns views over a region it was given.

It does not depend on which block is granted to which room (:mod:`embedwire.memory.allocator`) nor on the wire. Calls that touch
different blocks may run on different threads: numpy copies big runs with the GIL released.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence

import numpy as np

from embedwire.errors import ConfigurationError, UsageError
from embedwire.limits import AUX_WORDS, SLICE_BYTES
from embedwire.memory.checksum import FieldDigests
from embedwire.memory.geometry import PoolGeometry
from embedwire.memory.layout import Rows

_AUX = struct.Struct(f"<{AUX_WORDS}i")


def pack_aux(aux: Sequence[int]) -> bytes:
    """The bytes of an aux row: AUX_WORDS little-endian int32. Raises UsageError for anything else."""
    try:
        return _AUX.pack(*aux)
    except struct.error:
        raise UsageError(f"aux has to be {AUX_WORDS} int32, got {list(aux)}") from None


def unpack_aux(row: bytes) -> tuple[int, ...]:
    """The AUX_WORDS int32 of an aux row."""
    return _AUX.unpack(row)


class BlockPool:
    """The blocks of one region.

    ``buffer`` is a writable memoryview of at least ``geometry.region_bytes`` contiguous bytes that its owner
    keeps for as long as the pool lives; drop the pool before that memory is unmapped. ``start`` and
    ``tokens`` count from a grant's first token, whatever its blocks and wherever the cut. All methods raise
    UsageError before a byte is touched: for a range outside the grant, a block outside the pool or named
    twice.
    """

    def __init__(self, geometry: PoolGeometry, buffer: memoryview) -> None:
        if buffer.readonly or not buffer.c_contiguous or buffer.nbytes < geometry.region_bytes:
            raise ConfigurationError(
                f"a pool needs {geometry.region_bytes} contiguous writable bytes, got {buffer.nbytes}"
                f" (readonly={buffer.readonly}, contiguous={buffer.c_contiguous})"
            )
        self.geometry = geometry
        self._buffer = buffer.cast("B")
        region = np.frombuffer(self._buffer, np.uint8)
        self._fields: tuple[Rows, ...] = tuple(
            region[area : area + geometry.slots * nbytes].reshape(geometry.slots, nbytes)
            for area, nbytes in zip(geometry.area_offsets, geometry.token_bytes, strict=False)
        )

    def get_rows(
        self,
        block_indices: Sequence[int],
        out: Sequence[Rows],
        *,
        row: int = 0,
        start: int = 0,
        tokens: int,
        sums: FieldDigests | None = None,
        on_piece: Callable[[], object] = lambda: None,
    ) -> None:
        """Copy the tokens [start, start + tokens) of a grant into ``out``, from ``row`` on: writable rows as :meth:`Layout.rows` returns
        them, one array a field, with room for the tokens. ``sums`` are updated with what was copied. Copies pieces of SLICE_BYTES, and
        calls ``on_piece`` after each."""
        runs = self.geometry.runs(block_indices, start=start, tokens=tokens)
        for index, (field, target) in enumerate(zip(self._fields, out, strict=True)):
            step = max(1, SLICE_BYTES // target.shape[1])
            for token, slot, count in runs:
                for at in range(0, count, step):
                    size = min(step, count - at)
                    piece = target[row + token + at : row + token + at + size]
                    np.copyto(piece, field[slot + at : slot + at + size])
                    if sums is not None:
                        sums.add(index, piece)
                    on_piece()

    def read_aux(self, block_index: int) -> tuple[int, ...]:
        """The AUX_WORDS int32 of a block's aux row: always a copy, so that it outlives the block."""
        return _AUX.unpack_from(self._buffer, self.geometry.aux_offset(block_index))
