"""Assemblies that several processes of one host read: one copy of a room for all ranks there.

The owner creates one and drains into it; others attach by the handle, once the room is whole. It is anonymous memory (``memfd``), so
nothing is left behind when a process dies. It begins with a page that holds the aux row. The kernel takes several times as long to hand
out its pages as it takes to fill them, so a segment that no process reads any more is kept for another room. Any thread, one at a time.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Mapping, Sequence

import msgspec
import numpy as np

from embedwire.errors import TransportError, UsageError
from embedwire.limits import AUX_BYTES
from embedwire.memory.layout import Layout
from embedwire.memory.pool import pack_aux, unpack_aux

_ALIGN = 64


class Handle(msgspec.Struct, frozen=True, array_like=True):
    """Where an assembly lies: descriptor ``fd`` of process ``pid``, for ``tokens`` tokens of the layout of that fingerprint."""

    pid: int
    fd: int
    tokens: int
    fingerprint: str


class Segment:
    """The owner's end of it: room for assemblies of up to ``nbytes`` bytes, one after the other."""

    def __init__(self, nbytes: int) -> None:
        """Raises TransportError when there is no memory for it."""
        self._fd = -1
        try:
            self._fd = os.memfd_create("embedwire-assembly", os.MFD_CLOEXEC)
            os.truncate(self._fd, nbytes)
            self._memory = mmap.mmap(self._fd, nbytes, mmap.MAP_SHARED | mmap.MAP_POPULATE)
        except OSError as error:
            self.close()
            raise TransportError(f"no shared assembly of {nbytes} bytes: {error}") from error
        self.nbytes = nbytes

    def assemble(
        self, layout: Layout, tokens: int, *, aux: Sequence[int]
    ) -> tuple[Mapping[str, np.ndarray], Handle]:
        """Arrays (tokens, *field.shape) by field name, and how others find them. The ones before must be gone, in every process.
        ``aux`` is for those who heard no announcement."""
        self._memory[:AUX_BYTES] = pack_aux(aux)
        handle = Handle(os.getpid(), self._fd, tokens, layout.fingerprint)
        return _views(layout, tokens, self._memory), handle

    def close(self) -> None:
        """Nobody attaches any more. Memory goes with the last array over it, on either side. Idempotent."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


class SpareSegments:
    """Segments that no process reads. Those kept and those in use, by their tokens, are never more than the bytes that rooms may take."""

    def __init__(self) -> None:
        self._spares: list[Segment] = []

    def take(self, layout: Layout, tokens: int, *, spare_bytes: int) -> Segment:
        """One for so many tokens: a spare one of at most twice its size, else a new one. Of the others ``spare_bytes`` may stay. Raises
        TransportError when the system gives no new one, also in place of the spare ones."""
        nbytes = mmap.PAGESIZE + _offsets(layout, tokens)[-1]
        fitting = [spare for spare in self._spares if nbytes <= spare.nbytes <= 2 * nbytes]
        taken = min(fitting, key=lambda spare: spare.nbytes, default=None)
        if taken is not None:
            self._spares.remove(taken)
        while sum(spare.nbytes for spare in self._spares) > spare_bytes:
            self._spares.pop(0).close()
        if taken is not None:
            return taken
        try:
            return Segment(nbytes)
        except TransportError:
            self.close()
        return Segment(nbytes)

    def keep(self, segment: Segment) -> None:
        """One that no process reads any more."""
        self._spares.append(segment)

    def close(self) -> None:
        """Keep none."""
        while self._spares:
            self._spares.pop().close()


def attach(handle: Handle, layout: Layout) -> tuple[Mapping[str, np.ndarray], tuple[int, ...]]:
    """A whole room as another process of this host has it: its arrays, without a copy, and its aux row.

    Writing to the arrays changes this process's own pages alone. Raises TransportError when the owner is gone or on another host,
    UsageError for another layout.
    """
    if handle.fingerprint != layout.fingerprint:
        raise UsageError(f"an assembly of another layout than {layout.describe()}")
    nbytes = mmap.PAGESIZE + _offsets(layout, handle.tokens)[-1]
    try:
        fd = os.open(f"/proc/{handle.pid}/fd/{handle.fd}", os.O_RDONLY | os.O_CLOEXEC)
        try:
            memory = mmap.mmap(fd, nbytes, access=mmap.ACCESS_COPY)
        finally:
            os.close(fd)
    except (OSError, ValueError) as error:
        raise TransportError(f"the assembly of process {handle.pid} can not be mapped: {error}") from error
    return _views(layout, handle.tokens, memory), unpack_aux(memory[:AUX_BYTES])


def _offsets(layout: Layout, tokens: int) -> list[int]:
    """Where each field begins behind the first page, and where the last one ends."""
    offsets = [0]
    for field in layout:
        end = offsets[-1] + field.token_bytes * tokens
        offsets.append(-(-end // _ALIGN) * _ALIGN)
    return offsets


def _views(layout: Layout, tokens: int, memory: mmap.mmap) -> dict[str, np.ndarray]:
    views = {}
    for field, offset in zip(layout, _offsets(layout, tokens), strict=False):
        shape = (tokens, *field.shape)
        views[field.name] = np.ndarray(shape, field.numpy_dtype, memory, offset=mmap.PAGESIZE + offset)
    return views
