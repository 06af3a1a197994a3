"""An assembly that several processes of one host read: one copy of a room for all ranks there.

The owner creates it and drains into it; others attach by the handle, once the room is whole. It is anonymous memory (``memfd``), so nothing
is left behind when a process dies, and its pages are never used for another room: who still reads does so safely, whatever the owner has
released. It begins with a page that holds the aux row. Any thread, one at a time.
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


class SharedAssembly:
    """The owner's end of it. ``handle`` is for the others."""

    def __init__(self, layout: Layout, tokens: int, *, aux: Sequence[int]) -> None:
        """Raises TransportError when there is no memory for it. ``aux`` is for those who heard no announcement."""
        nbytes = mmap.PAGESIZE + _offsets(layout, tokens)[-1]
        try:
            self._fd = os.memfd_create("embedwire-assembly", os.MFD_CLOEXEC)
            os.truncate(self._fd, nbytes)
            memory = mmap.mmap(self._fd, nbytes)
        except OSError as error:
            raise TransportError(f"no shared assembly of {nbytes} bytes: {error}") from error
        memory[:AUX_BYTES] = pack_aux(aux)
        self._arrays: Mapping[str, np.ndarray] = _views(layout, tokens, memory)
        self.handle = Handle(os.getpid(), self._fd, tokens, layout.fingerprint)

    def give_away(self) -> Mapping[str, np.ndarray]:
        """The arrays (tokens, *field.shape) by field name, once; this object no longer holds them, and others can still attach."""
        arrays, self._arrays = self._arrays, {}
        return arrays

    def close(self) -> None:
        """Nobody attaches any more. Memory goes with the last array over it, on either side. Idempotent."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


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
