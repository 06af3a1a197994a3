"""The TCP port of a receiver: accepts connections, reads their greetings, and hands each session to the owner of the port.

Shared by tcp and the one-sided transports; each region has a listener of its own, with a socket and a thread. A connection waits until
its greeting is complete. With the right nonce it becomes a session, which counts until it is released. Both numbers are bounded, and a
bad peer costs its own connection. The listener contains nothing about frames and engines.
"""

from __future__ import annotations

import errno
import hmac
import logging
import os
import secrets
import selectors
import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress

from embedwire.errors import OverloadedError, ProtocolViolation, TransportError
from embedwire.transports.sockets import HELLO_BYTES, NONCE_BYTES, decode_hello, tune

GREETING_S = 5.0
"""A connection whose greeting is not complete within this time is dropped."""
WAITING_MAX = 128
"""Connections whose greeting is not complete. One more drops the one that has waited longest, so idle connections do not exclude a sender
that greets at once."""
_PAUSE_S = 0.2
"""Without accepting, after the process has run out of descriptors."""

_log = logging.getLogger(__name__)


class Connection:
    """One accepted connection. ``sender_token`` is None until its greeting was complete and correct."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self.sender_token: int | None = None
        self.greeting = bytearray()
        self.on_readable: Callable[[], None] | None = None


class SessionListener:
    """Listens from its creation until :meth:`close`, which is called once."""

    def __init__(
        self,
        host: str,
        *,
        name: str,
        magic: bytes,
        sessions_max: int,
        on_session: Callable[[Connection], Callable[[], None] | None],
        greeting_s: float = GREETING_S,
        waiting_max: int = WAITING_MAX,
    ) -> None:
        """Listen on a free port of ``host``. Raises TransportError when ``host`` cannot be bound here.

        ``on_session`` is called on the listener's thread with a greeted connection. It returns the function that this thread calls
        whenever more has come, and that may raise as in :func:`is_served`; or None, and then the owner reads the connection on a thread of
        its own and calls :meth:`release` in the end.
        """
        self._magic = magic
        self._sessions_max = sessions_max
        self._on_session = on_session
        self._greeting_s = greeting_s
        self._waiting_max = waiting_max
        self.nonce = secrets.token_bytes(NONCE_BYTES)
        self._socket = _listen(host)
        self.port: int = self._socket.getsockname()[1]
        self._waiting: dict[Connection, float] = {}  # until when; the first has waited longest
        self._lock = threading.Lock()
        self._sessions: set[Connection] = set()  # changed under the lock
        self._accepts_from_s = 0.0
        self._closing = threading.Event()
        self._selector = selectors.DefaultSelector()
        self._wake = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._selector.register(self._wake, selectors.EVENT_READ)
        self._selector.register(self._socket, selectors.EVENT_READ)
        self._thread = threading.Thread(target=self._run, name=f"embedwire-{name}-{self.port}", daemon=True)
        self._thread.start()

    def is_gone(self, sender_token: int) -> bool:
        """Whether that sender has no session. Any thread."""
        with self._lock:
            return all(session.sender_token != sender_token for session in self._sessions)

    def release(self, session: Connection) -> None:
        """End a session. The socket is closed last: a sender that reads the end of the stream can rely on ``is_gone``. Any thread."""
        with self._lock:
            self._sessions.discard(session)
            session.sock.close()

    def close(self) -> None:
        """End the thread and the connections that it serves. For an owner that reads a session by itself, its stream ends now."""
        self._closing.set()
        os.eventfd_write(self._wake, 1)
        self._thread.join()
        os.close(self._wake)
        with self._lock:
            for session in self._sessions:
                with suppress(OSError):  # the peer has closed already
                    session.sock.shutdown(socket.SHUT_RD)  # sends nothing to the peer

    def _run(self) -> None:
        while not self._closing.is_set():
            for key, _ in self._selector.select(self._patience_s()):
                if key.fileobj is self._socket:
                    self._accept()
                elif key.data is not None and not is_served(key.data, key.data.on_readable):
                    self._drop(key.data)
            self._enforce_limits(time.monotonic())
        for key in tuple(self._selector.get_map().values()):
            if key.data is not None:
                self._drop(key.data)
        self._selector.close()
        self._socket.close()

    def _accept(self) -> None:
        try:
            sock, _ = self._socket.accept()
        except (BlockingIOError, ConnectionAbortedError):
            return
        except OSError as error:  # out of descriptors, most likely; the listening socket stays readable
            _log.warning("! cannot accept a connection: %s", errno.errorcode.get(error.errno or 0, error))
            self._selector.unregister(self._socket)
            self._accepts_from_s = time.monotonic() + _PAUSE_S
            return
        connection = Connection(sock)
        connection.on_readable = lambda: self._read_greeting(connection)
        try:
            sock.setblocking(False)
            tune(sock)
            self._selector.register(sock, selectors.EVENT_READ, connection)
        except OSError:  # it has ended already, or the kernel has no memory for it
            sock.close()
            return
        self._waiting[connection] = time.monotonic() + self._greeting_s

    def _read_greeting(self, connection: Connection) -> None:
        try:
            data = connection.sock.recv(HELLO_BYTES - len(connection.greeting))
        except (BlockingIOError, InterruptedError):
            return
        if not data:
            raise EOFError("end of stream")
        connection.greeting += data
        if len(connection.greeting) == HELLO_BYTES:
            self._begin_session(connection)

    def _begin_session(self, connection: Connection) -> None:
        nonce, sender_token = decode_hello(bytes(connection.greeting), magic=self._magic)
        if not hmac.compare_digest(nonce, self.nonce) or not 1 <= sender_token <= 2**62:
            raise ProtocolViolation("a greeting for another region")
        del self._waiting[connection]
        with self._lock:
            if len(self._sessions) >= self._sessions_max:
                raise OverloadedError(f"{self._sessions_max} sessions are open, which is the limit")
            connection.sender_token = sender_token
            self._sessions.add(connection)
        connection.on_readable = self._on_session(connection)
        if connection.on_readable is None:
            self._selector.unregister(connection.sock)

    def _drop(self, connection: Connection) -> None:
        self._selector.unregister(connection.sock)
        self._waiting.pop(connection, None)
        connection.on_readable = None
        self.release(connection)

    def _patience_s(self) -> float | None:
        """Seconds until something is due."""
        due = [*list(self._waiting.values())[:1], *([self._accepts_from_s] if self._accepts_from_s else [])]
        return max(0.0, min(due) - time.monotonic()) if due else None

    def _enforce_limits(self, now: float) -> None:
        for connection, deadline_s in tuple(self._waiting.items()):
            if now < deadline_s and len(self._waiting) <= self._waiting_max:
                break
            _log.debug(
                "= connection dropped without a greeting, limits %s s, %s",
                self._greeting_s,
                self._waiting_max,
            )
            self._drop(connection)
        if self._accepts_from_s and now >= self._accepts_from_s:
            self._accepts_from_s = 0.0
            self._selector.register(self._socket, selectors.EVENT_READ)


def is_served(connection: Connection, serve: Callable[[], None]) -> bool:
    """Call ``serve`` for a connection. False, after a line in the log, when it raised: EOFError or OSError at the connection's end, another
    error of this package for a bad peer, anything else for a fault of our own, which must not end a thread that serves others."""
    try:
        serve()
    except (EOFError, OSError) as error:
        _log.debug("= connection of sender %s ended: %s", connection.sender_token, error)
    except (OverloadedError, ProtocolViolation, TransportError) as error:
        _log.warning("! connection of sender %s dropped: %s", connection.sender_token, error)
    except Exception:
        _log.exception("! connection of sender %s dropped", connection.sender_token)
    else:
        return True
    return False


def _listen(host: str) -> socket.socket:
    try:
        family = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)[0][0]
        listening = socket.create_server((host, 0), family=family)
    except OSError as error:
        raise TransportError(f"cannot listen on {host}: {error}") from error
    listening.setblocking(False)
    return listening
