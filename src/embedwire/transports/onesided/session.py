"""One session of a sender: its connection to the receiver, and its engine. Both end together.

The connection shows that the sender is there, and its end of stream from the other side that the receiver has
destroyed the session's engine. Called by one thread at a time.
"""

from __future__ import annotations

import errno
import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress

from embedwire.errors import ProtocolViolation, TransportError
from embedwire.transports.onesided import greeting
from embedwire.transports.onesided.engine import EngineError, SendingEngine
from embedwire.transports.sockets import LOOK_S, connect, encode_hello, left_s, receive

CLOSE_WAIT_S = 0.5
"""How long an ending session waits for the receiver's word that nothing can land any more."""


class Presence:
    """The connection. Once it was finished it tells whether the receiver has ended its part too."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._has_ended = self._is_lost = False
        sock.setblocking(False)

    def has_ended(self) -> bool:
        """Whether the receiver has destroyed the session's engine, or its process has ended."""
        if not self._has_ended and not self._is_lost:
            try:
                self._has_ended = not self._sock.recv(1)
            except (ConnectionResetError, BrokenPipeError):
                self._has_ended = True
            except OSError as error:
                # A host out of reach is no proof, now or later: the kernel reports it once, and then an end of stream that nobody sent.
                self._is_lost = error.errno not in (None, errno.EAGAIN, errno.EINTR)
        return self._has_ended

    def is_over(self) -> bool:
        """Whether the connection is of no more use, proof or not."""
        return self.has_ended() or self._is_lost

    def finish(self) -> None:
        """Say goodbye."""
        with suppress(OSError):  # the other end has gone, as has_ended() will say
            self._sock.shutdown(socket.SHUT_WR)

    def wait_ended(self, timeout_s: float) -> bool:
        """Wait for the answer to a goodbye."""
        with suppress(OSError):
            self._sock.settimeout(timeout_s)
            self.has_ended()
        with suppress(OSError):
            self._sock.setblocking(False)
        return self._has_ended

    def close(self) -> None:
        self._sock.close()


class Session:
    """Open from the start; ended once. ``engine`` reaches the region."""

    def __init__(
        self,
        target: greeting.Descriptor,
        *,
        sender_token: int,
        make_engine: Callable[[], SendingEngine],
        timeout_s: float,
        is_closing: Callable[[], bool] = lambda: False,
    ) -> None:
        """Raises TransportError when that is not possible within ``timeout_s``, or before ``is_closing``."""
        deadline_s = time.monotonic() + timeout_s
        sock, address = _greet(target, sender_token, deadline_s, is_closing)
        try:
            self.engine = _reach(make_engine, address, deadline_s, is_closing)
        except BaseException:
            sock.close()
            raise
        self.presence = Presence(sock)

    def end(self) -> bool:
        """Destroy the engine, and say so. True: the receiver has destroyed its own, so nothing can land any more."""
        self.engine.close()
        self.presence.finish()
        return self.presence.wait_ended(CLOSE_WAIT_S)


def _greet(
    target: greeting.Descriptor, sender_token: int, deadline_s: float, is_closing: Callable[[], bool]
) -> tuple[socket.socket, bytes]:
    """A greeted connection, and the address of the engine behind it."""
    hello = encode_hello(greeting.HELLO, target.nonce, sender_token)
    sock = connect(target.host, target.port, hello, deadline_s=deadline_s)
    try:
        head = receive(sock, greeting.WELCOME_BYTES, deadline_s=deadline_s, is_closing=is_closing)
        nbytes = greeting.decode_welcome(head)
        return sock, receive(sock, nbytes, deadline_s=deadline_s, is_closing=is_closing)
    except (OSError, EOFError, ProtocolViolation) as error:
        sock.close()
        raise TransportError(f"no welcome from {target.host}:{target.port}: {error}") from error


def _reach(
    make_engine: Callable[[], SendingEngine],
    address: bytes,
    deadline_s: float,
    is_closing: Callable[[], bool],
) -> SendingEngine:
    """An engine that has reached ``address``. The library may block in there for long, when the receiver has just stopped, so it
    does so on a thread that can be left behind; that one then cleans up by itself."""
    made: list[SendingEngine] = []
    failures: list[Exception] = []
    lock, done, is_left = threading.Lock(), threading.Event(), threading.Event()

    def reach() -> None:
        engine = None
        try:
            engine = make_engine()
            engine.connect(address)
            with lock:
                if not is_left.is_set():
                    made.append(engine)
        except Exception as error:
            failures.append(error)
        try:
            if engine is not None and not made:
                engine.close()
        finally:
            done.set()

    thread = threading.Thread(target=reach, name="embedwire-reach", daemon=True)
    thread.start()
    while not done.wait(min(LOOK_S, left_s(deadline_s))):
        if not is_closing() and time.monotonic() < deadline_s:
            continue
        with lock:
            if not made:
                is_left.set()
                raise TransportError("the engine has not reached the receiver in time")
    thread.join()
    if made:
        return made[0]
    if isinstance(failures[0], EngineError):
        raise TransportError(str(failures[0])) from failures[0]
    raise failures[0]
