"""The bytes of a pool: writes tokens into blocks and reads them out. Owns views over a region it was given.

It must not know which block is granted to whom (:mod:`embedwire.memory.allocator` does) nor who writes, and
why. Calls that touch different blocks may run on different threads: numpy copies big runs with the GIL
released.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping, Sequence

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
    twice, arrays that do not match the layout.
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

    def set_buf(
        self,
        block_indices: Sequence[int],
        arrays: Mapping[str, np.ndarray],
        *,
        start: int = 0,
        aux: Sequence[int] | None = None,
    ) -> None:
        """Write all rows of ``arrays`` from token ``start`` on, and ``aux`` into the grant's first block."""
        rows = self.geometry.layout.rows(arrays)
        runs = self.geometry.runs(block_indices, start=start, tokens=len(rows[0]))
        if aux is not None:
            if not block_indices:
                raise UsageError("aux needs a block to lie in, and the grant has none")
            self.write_aux(block_indices[0], aux)
        for field, source in zip(self._fields, rows, strict=True):
            for token, slot, count in runs:
                np.copyto(field[slot : slot + count], source[token : token + count])

    def get_buf(
        self,
        block_indices: Sequence[int],
        out: Mapping[str, np.ndarray],
        *,
        start: int = 0,
        tokens: int,
    ) -> None:
        """Read [start, start + tokens) into the first ``tokens`` rows of ``out``; others stay as they are."""
        rows = self.geometry.layout.rows(out)
        if tokens > len(rows[0]):
            raise UsageError(f"{tokens} tokens do not fit into arrays of {len(rows[0])} rows")
        for name, array in out.items():
            if not array.flags.writeable:
                raise UsageError(f"field {name}: the array to read into is read-only")
        self.get_rows(block_indices, rows, start=start, tokens=tokens)

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
        """The same for who has checked once: ``out`` are writable rows as :meth:`Layout.rows` gives them, one a field, and the tokens go
        to those from ``row`` on. ``sums`` grow by what has come to lie there. It goes on in pieces of SLICE_BYTES, and calls ``on_piece``
        after each."""
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

    def copy_from(
        self,
        block_indices: Sequence[int],
        source: BlockPool,
        *,
        source_blocks: Sequence[int],
        tokens: int,
        start: int = 0,
        source_start: int = 0,
    ) -> None:
        """Copy tokens (not aux) of another pool of the same layout, whose block size may be any other.

        The tokens [source_start, source_start + tokens) of its grant become [start, start + tokens) of this
        one. Blocks of one memory must not overlap.
        """
        mine, other = self.geometry.layout, source.geometry.layout
        if mine.fields != other.fields:
            raise UsageError(f"the layouts differ: {mine.describe()} against {other.describe()}")
        source_runs = source.geometry.runs(source_blocks, start=source_start, tokens=tokens)
        self.geometry.runs(block_indices, start=start, tokens=tokens)  # all is checked before a byte moves
        for token, source_slot, count in source_runs:
            for piece in self.geometry.runs(block_indices, start=start + token, tokens=count):
                a, b = piece.slot, source_slot + piece.token
                for field, rows in zip(self._fields, source._fields, strict=True):
                    np.copyto(field[a : a + piece.tokens], rows[b : b + piece.tokens])

    def read_aux(self, block_index: int) -> tuple[int, ...]:
        """The AUX_WORDS int32 of a block's aux row: always a copy, so that it outlives the block."""
        return _AUX.unpack_from(self._buffer, self.geometry.aux_offset(block_index))

    def write_aux(self, block_index: int, aux: Sequence[int]) -> None:
        """Set the aux row of a block."""
        row, offset = pack_aux(aux), self.geometry.aux_offset(block_index)
        self._buffer[offset : offset + len(row)] = row
