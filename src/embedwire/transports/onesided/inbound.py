"""The receiving half of a one-sided wire: a region, and the door through which senders get an engine for it.

Owns the memory that ``allocate`` made; all else is the door's. The receiver sees no write, so it can enforce
no ticket. The endpoint's thread.
"""

from __future__ import annotations

import mmap
from abc import abstractmethod
from collections.abc import Sequence
from typing import ClassVar

import msgspec
import numpy as np

from embedwire.errors import ConfigurationError, UsageError
from embedwire.transports.contract import Inbound
from embedwire.transports.onesided import greeting
from embedwire.transports.onesided.door import Door
from embedwire.transports.onesided.engine import ReceivingEngine
from embedwire.transports.pieces import check_sender_token


class OneSidedInbound(Inbound):
    """A region that senders reach through a free port of ``host``. An adapter says how an engine for it is made."""

    is_fenced: ClassVar[bool] = False

    def __init__(self, *, host: str) -> None:
        if host in ("", "*", "0.0.0.0", "::"):
            raise ConfigurationError(f"host {host!r} is no address that a sender could connect to")
        self._host = host
        self._door: Door | None = None
        self._descriptor = b""
        self._closed = False

    @abstractmethod
    def _make_engine(self, address: int, nbytes: int, *, host: str) -> ReceivingEngine:
        """A new engine over that memory. Raises EngineError. On the door's thread."""

    def allocate(self, nbytes: int) -> memoryview:
        """See the contract. Raises TransportError when ``host`` can not be bound here."""
        if nbytes < 1:
            raise UsageError(f"allocate({nbytes}): wants at least one byte")
        region = memoryview(mmap.mmap(-1, nbytes, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | mmap.MAP_POPULATE))
        self.register(region)
        return region

    def register(self, memory: memoryview) -> None:
        """See the contract. Raises TransportError when ``host`` can not be bound here."""
        if self._descriptor or self._closed or memory.readonly:
            raise UsageError("allocate() or register() is called once, before close(), with writable memory")
        self._region = memory.cast("B")
        self._array = np.frombuffer(self._region, np.uint8)
        address, nbytes = self._array.ctypes.data, self._region.nbytes
        self._door = Door(self._host, make_engine=lambda: self._make_engine(address, nbytes, host=self._host))
        self._descriptor = msgspec.msgpack.encode(
            greeting.Descriptor(
                self.name, self._host, self._door.port, self._door.nonce, nbytes, greeting.CPU
            )
        )

    def descriptor(self) -> bytes:
        if not self._descriptor:
            raise UsageError("descriptor() before allocate()")
        return self._descriptor

    def permit(self, ticket: int, spans: Sequence[tuple[int, int]]) -> None:
        """Nothing to do: this half sees no write."""

    def revoke(self, ticket: int) -> bool:
        return False

    def is_gone(self, sender_token: int) -> bool:
        check_sender_token(sender_token)
        return self._closed or self._door is None or self._door.is_gone(sender_token)

    def close(self) -> None:
        """End all sessions. The caller's views stay readable; the memory is freed with the last of them."""
        if self._closed:
            return
        self._closed = True
        if self._door is not None:
            self._door.close()
            del self._array
            self._region.release()
