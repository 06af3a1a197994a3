"""The receiving half of the tcp wire: a listening socket, one thread, and all connections to one region.

The thread owns every socket; the endpoint's thread changes tickets and asks who is connected. One thread
suffices: it does little but ``recv`` straight into the region, which runs without the interpreter lock. A bad
peer costs its own connection.
"""

from __future__ import annotations

import errno
import logging
import mmap
import os
import secrets
import selectors
import threading
import time
from collections.abc import Sequence
from typing import ClassVar

import msgspec

from embedwire.errors import ConfigurationError, ProtocolViolation, UsageError
from embedwire.transports.contract import Inbound
from embedwire.transports.pieces import check_sender_token, check_spans, check_ticket
from embedwire.transports.sockets import accept, listen
from embedwire.transports.tcp import frames
from embedwire.transports.tcp.connection import Connection
from embedwire.transports.tickets import Tickets

GREETING_S = 5.0
"""A connection that has not greeted within this time is dropped."""
CONNECTIONS_MAX = 1024
_PAUSE_S = 0.2

_log = logging.getLogger(__name__)


class TcpInbound(Inbound):
    """A region that senders reach at a free port of ``host``, an address of this machine that they can
    connect to."""

    name: ClassVar[str] = "tcp"
    is_fenced: ClassVar[bool] = True

    def __init__(
        self, *, host: str, greeting_s: float = GREETING_S, connections_max: int = CONNECTIONS_MAX
    ) -> None:
        if host in ("", "*", "0.0.0.0", "::"):
            raise ConfigurationError(f"host {host!r} is no address that a sender could connect to")
        self._host = host
        self._greeting_s = greeting_s
        self._connections_max = connections_max
        self._tickets = Tickets()
        self._connections: set[Connection] = set()  # changed under the tickets' lock
        self._greeting: dict[Connection, float] = {}  # connections without a greeting, and their deadlines
        self._accepts_from_s = 0.0
        self._descriptor = b""
        self._closing = threading.Event()

    def allocate(self, nbytes: int) -> memoryview:
        """See the contract. Raises TransportError when ``host`` can not be bound here."""
        if nbytes < 1:
            raise UsageError(f"allocate({nbytes}): wants at least one byte")
        region = memoryview(mmap.mmap(-1, nbytes, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | mmap.MAP_POPULATE))
        self.register(region)
        return region

    def register(self, memory: memoryview) -> None:
        """See the contract. Raises TransportError when ``host`` can not be bound here."""
        if self._descriptor or self._closing.is_set() or memory.readonly:
            raise UsageError("allocate() or register() is called once, before close(), with writable memory")
        self._listener = listen(self._host)
        self._region = memory.cast("B")
        self._nonce = secrets.token_bytes(frames.NONCE_BYTES)
        port = self._listener.getsockname()[1]
        self._descriptor = msgspec.msgpack.encode(
            frames.Descriptor(self._host, port, self._nonce, memory.nbytes)
        )
        self._wake = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._wake, selectors.EVENT_READ)
        self._selector.register(self._listener, selectors.EVENT_READ)
        self._thread = threading.Thread(target=self._run, name=f"embedwire-tcp-{port}", daemon=True)
        self._thread.start()

    def descriptor(self) -> bytes:
        if not self._descriptor:
            raise UsageError("descriptor() before allocate()")
        return self._descriptor

    def permit(self, ticket: int, spans: Sequence[tuple[int, int]]) -> None:
        if not self._descriptor:
            raise UsageError("permit() before allocate()")
        check_ticket(ticket)
        check_spans(spans, self._region.nbytes)
        self._tickets.permit(ticket, spans)

    def revoke(self, ticket: int) -> bool:
        self._tickets.revoke(ticket)
        return True

    def is_gone(self, sender_token: int) -> bool:
        check_sender_token(sender_token)
        with self._tickets.lock:
            return all(connection.sender_token != sender_token for connection in self._connections)

    def close(self) -> None:
        """End the thread and all connections. The caller's views stay readable; the memory is freed with the
        last."""
        if self._closing.is_set():
            return
        self._closing.set()
        if not self._descriptor:
            return
        os.eventfd_write(self._wake, 1)
        self._thread.join()
        os.close(self._wake)
        self._region.release()

    def _run(self) -> None:
        while not self._closing.is_set():
            for key, _ in self._selector.select(self._patience_s()):
                if key.fileobj is self._listener:
                    self._accept()
                elif key.data is not None:
                    self._serve(key.data)
            self._on_time(time.monotonic())
        for connection in tuple(self._connections):
            self._drop(connection, "the receiver closes")
        self._selector.close()
        self._listener.close()

    def _accept(self) -> None:
        try:
            accepted = accept(self._listener)
        except OSError as error:
            # Out of descriptors, most likely. The listener stays readable, so look away for a moment.
            _log.warning("! can not accept a connection: %s", errno.errorcode.get(error.errno or 0, error))
            self._selector.unregister(self._listener)
            self._accepts_from_s = time.monotonic() + _PAUSE_S
            return
        if accepted is None:
            return
        sock, peer = accepted
        if len(self._connections) >= self._connections_max:
            _log.warning("! %s refused: %d connections are open", peer, self._connections_max)
            sock.close()
            return
        connection = Connection(sock, region=self._region, tickets=self._tickets, nonce=self._nonce)
        with self._tickets.lock:
            self._connections.add(connection)
        self._greeting[connection] = time.monotonic() + self._greeting_s
        self._selector.register(sock, selectors.EVENT_READ, connection)

    def _serve(self, connection: Connection) -> None:
        try:
            connection.on_readable()
        except (EOFError, OSError) as error:
            self._drop(connection, str(error) or "end of stream")
        except ProtocolViolation as error:
            _log.warning("! connection dropped: %s", error)
            self._drop(connection, str(error))
        except Exception as error:
            # A fault of ours must not end the thread that serves all others.
            _log.exception("! connection dropped")
            self._drop(connection, repr(error))
        else:
            if connection.sender_token is not None:
                self._greeting.pop(connection, None)

    def _drop(self, connection: Connection, reason: str) -> None:
        _log.debug("= connection of sender %s ended: %s", connection.sender_token, reason)
        self._selector.unregister(connection.sock)
        self._greeting.pop(connection, None)
        with self._tickets.lock:
            self._connections.discard(connection)
        # Last, so that a sender who sees the end of the stream knows that is_gone() is true.
        connection.close()

    def _patience_s(self) -> float | None:
        """Seconds until something falls due. Greetings fall due in the order in which they were asked for."""
        due = [
            deadline for deadline in (self._accepts_from_s, *list(self._greeting.values())[:1]) if deadline
        ]
        return max(0.0, min(due) - time.monotonic()) if due else None

    def _on_time(self, now: float) -> None:
        for connection, deadline in tuple(self._greeting.items()):
            if now < deadline:
                break
            self._drop(connection, f"no greeting within {self._greeting_s} s")
        if self._accepts_from_s and now >= self._accepts_from_s:
            self._accepts_from_s = 0.0
            self._selector.register(self._listener, selectors.EVENT_READ)
