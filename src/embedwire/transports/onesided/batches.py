"""Slices become batches that an engine can read: registered memory directly, all else through a staging buffer.

Owns the staging buffer and the list of what was registered. Neighbours that are neighbours on both sides are
joined. Knows no engine and no connection; the thread of the write.
"""

from __future__ import annotations

import mmap
from bisect import bisect_right, insort
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np

from embedwire.errors import UsageError
from embedwire.transports.contract import Slice
from embedwire.transports.onesided.engine import Run

PARTS = 4
PART_BYTES = 2 * 2**20
"""Of the staging buffer: while one part is copied into, the others are on their way."""
BATCH_BYTES_MAX = 16 * 2**20
RUNS_MAX = 1024
"""Of one batch, so that progress shows and a batch stays within what engines take at once."""


@dataclass(slots=True)
class Batch:
    """Runs to hand to an engine at once, and the part of the staging buffer that they read, if any."""

    runs: list[Run] = field(default_factory=list)
    nbytes: int = 0
    part: int | None = None

    def add(self, address: int, offset: int, nbytes: int) -> None:
        self.nbytes += nbytes
        if self.runs:
            before, to, length = self.runs[-1]
            if before + length == address and to + length == offset:
                self.runs[-1] = (before, to, length + nbytes)
                return
        self.runs.append((address, offset, nbytes))

    @property
    def has_room(self) -> bool:
        return len(self.runs) < RUNS_MAX and self.nbytes < BATCH_BYTES_MAX


class Registered:
    """Memory that engines may read where it lies. It stays until the wire is closed."""

    def __init__(self) -> None:
        self._arrays: list[np.ndarray] = []  # keeps the memory
        self._ranges: list[tuple[int, int]] = []

    def add(self, memory: memoryview) -> None:
        """Raises UsageError for memory that is empty or not contiguous."""
        if not memory.c_contiguous or not memory.nbytes:
            raise UsageError("only contiguous memory of at least one byte can be registered")
        array = np.frombuffer(memory.cast("B"), np.uint8)
        self._arrays.append(array)
        insort(self._ranges, (array.ctypes.data, array.ctypes.data + array.nbytes))

    def ranges(self) -> list[tuple[int, int]]:
        """(start, end) of each, by address."""
        return list(self._ranges)

    def holds(self, address: int, nbytes: int) -> bool:
        at = bisect_right(self._ranges, (address, 2**64)) - 1
        return at >= 0 and address + nbytes <= self._ranges[at][1]


class Staging:
    """A ring of parts. Who takes one gives it back when what was read from it has landed."""

    def __init__(self) -> None:
        self._map = mmap.mmap(-1, PARTS * PART_BYTES)
        self._bytes = np.frombuffer(self._map, np.uint8)
        self.address: int = self._bytes.ctypes.data
        self.nbytes = PARTS * PART_BYTES
        self.free = list(range(PARTS))

    def reset(self) -> None:
        """All parts are free: the engine that read them is gone."""
        self.free = list(range(PARTS))

    def copy(self, source: np.ndarray, part: int, at: int) -> int:
        """Copy to byte ``at`` of a part, and return the address there."""
        start = part * PART_BYTES + at
        self._bytes[start : start + len(source)] = source
        return self.address + start


def batches(
    pieces: Slice, staging: Staging, registered: Registered, *, take_part: Callable[[], int]
) -> Iterator[Batch]:
    """Cut a slice, lazily: each batch is handed out before the next part is asked for. None for a slice without bytes."""
    batch, used = Batch(), 0
    for piece in pieces:
        if not piece.source.nbytes:
            continue
        array = np.frombuffer(piece.source.cast("B"), np.uint8)
        is_direct = registered.holds(array.ctypes.data, array.nbytes)
        at = 0
        while at < array.nbytes:
            if not batch.has_room or (not is_direct and used == PART_BYTES):
                yield batch
                batch, used = Batch(), 0
            offset = piece.offset + at
            if is_direct:
                nbytes = min(array.nbytes - at, BATCH_BYTES_MAX - batch.nbytes)
                batch.add(array.ctypes.data + at, offset, nbytes)
            else:
                nbytes = min(array.nbytes - at, BATCH_BYTES_MAX - batch.nbytes, PART_BYTES - used)
                if batch.part is None:
                    batch.part = take_part()
                batch.add(staging.copy(array[at : at + nbytes], batch.part, used), offset, nbytes)
                used += nbytes
            at += nbytes
    if batch.runs:
        yield batch
