"""The receiving half of a transport that is reached through a TCP port: a region, its descriptor, and the session listener.

Owns the memory that ``allocate`` made. A transport adds what it does with a session. Called on the endpoint's thread.
"""

from __future__ import annotations

import mmap
from abc import abstractmethod
from collections.abc import Callable
from typing import ClassVar

from embedwire.errors import ConfigurationError, UsageError
from embedwire.transports.contract import Inbound
from embedwire.transports.listener import GREETING_S, WAITING_MAX, Connection, SessionListener
from embedwire.transports.pieces import check_sender_token


class ListeningInbound(Inbound):
    """A region that senders reach at a free port of ``host``, an address of this machine that they can connect to."""

    magic: ClassVar[bytes]
    """Of the transport's greeting."""
    sessions_max: ClassVar[int]
    greeting_s: ClassVar[float] = GREETING_S
    waiting_max: ClassVar[int] = WAITING_MAX

    def __init__(self, *, host: str) -> None:
        if host in ("", "*", "0.0.0.0", "::"):
            raise ConfigurationError(f"host {host!r} is not an address that a sender can connect to")
        self._host = host
        self._listener: SessionListener | None = None
        self._closed = False

    def allocate(self, nbytes: int) -> memoryview:
        """See the contract. Raises TransportError when ``host`` cannot be bound here."""
        if nbytes < 1:
            raise UsageError(f"allocate({nbytes}): at least one byte is required")
        region = memoryview(mmap.mmap(-1, nbytes, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | mmap.MAP_POPULATE))
        self.register(region)
        return region

    def register(self, memory: memoryview) -> None:
        """See the contract. Raises TransportError when ``host`` cannot be bound here."""
        if self._listener or self._closed or memory.readonly:
            raise UsageError("allocate() or register() is called once, before close(), with writable memory")
        self._region = memory.cast("B")
        self._listener = SessionListener(
            self._host,
            name=self.name,
            magic=self.magic,
            sessions_max=self.sessions_max,
            on_session=self._begin_session,
            greeting_s=self.greeting_s,
            waiting_max=self.waiting_max,
        )

    @abstractmethod
    def _begin_session(self, session: Connection) -> Callable[[], None] | None:
        """``on_session`` of the listener."""

    @abstractmethod
    def _describe(self, port: int, nonce: bytes) -> bytes:
        """The descriptor."""

    def descriptor(self) -> bytes:
        if self._listener is None:
            raise UsageError("descriptor() before allocate()")
        return self._describe(self._listener.port, self._listener.nonce)

    def is_gone(self, sender_token: int) -> bool:
        check_sender_token(sender_token)
        return self._listener is None or self._listener.is_gone(sender_token)

    def close(self) -> None:
        """End all sessions. The caller's views stay readable; the memory is freed with the last of them."""
        if self._closed:
            return
        self._closed = True
        if self._listener is not None:
            self._listener.close()
            self._end_sessions()
            self._region.release()

    def _end_sessions(self) -> None:
        """Called once the listener has ended: those that it does not serve end here."""
