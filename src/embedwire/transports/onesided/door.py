"""The receiver's door: it lets senders in, gives each an engine of its own, and destroys that when the sender has gone.

One thread owns the listening socket, all connections and all engines, so an engine is made and destroyed in
one place, one at a time. Other threads ask :meth:`Door.is_gone`. A session is counted from before its engine
exists until after that was destroyed. It knows neither tickets nor what is written.
"""

from __future__ import annotations

import hmac
import logging
import os
import secrets
import selectors
import socket
import threading
import time
from collections.abc import Callable

from embedwire.errors import ProtocolViolation
from embedwire.transports.onesided import greeting
from embedwire.transports.onesided.engine import EngineError, ReceivingEngine
from embedwire.transports.sockets import accept, listen

GREETING_S = 5.0
"""A connection that has not greeted within this time is dropped."""
SESSIONS_MAX = 256
"""Each holds an engine with threads of its own."""
_PAUSE_S = 0.2

logger = logging.getLogger(__name__)


class _Session:
    """One connection. ``sender_token`` is None until its greeting was right."""

    def __init__(self, sock: socket.socket, *, greets_until_s: float) -> None:
        self.sock = sock
        self.greets_until_s = greets_until_s
        self.greeting = bytearray()
        self.sender_token: int | None = None
        self.engine: ReceivingEngine | None = None


class Door:
    """Open from the start; closed once."""

    def __init__(
        self,
        host: str,
        *,
        make_engine: Callable[[], ReceivingEngine],
        greeting_s: float = GREETING_S,
        sessions_max: int = SESSIONS_MAX,
    ) -> None:
        """Raises TransportError when ``host`` can not be bound here."""
        self._make_engine = make_engine
        self._greeting_s = greeting_s
        self._sessions_max = sessions_max
        self.nonce = secrets.token_bytes(greeting.NONCE_BYTES)
        self._listener = listen(host)
        self.port: int = self._listener.getsockname()[1]
        self._lock = threading.Lock()
        self._sessions: set[_Session] = set()  # changed under the lock
        self._accepts_from_s = 0.0
        self._closing = threading.Event()
        self._wake = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._wake, selectors.EVENT_READ)
        self._selector.register(self._listener, selectors.EVENT_READ)
        self._thread = threading.Thread(target=self._run, name=f"embedwire-door-{self.port}", daemon=True)
        self._thread.start()

    def is_gone(self, sender_token: int) -> bool:
        """Whether no engine exists through which that sender could write."""
        with self._lock:
            return all(session.sender_token != sender_token for session in self._sessions)

    def close(self) -> None:
        """End every session, then the thread."""
        self._closing.set()
        os.eventfd_write(self._wake, 1)
        self._thread.join()
        os.close(self._wake)

    def _run(self) -> None:
        while not self._closing.is_set():
            for key, _ in self._selector.select(self._patience_s()):
                if key.fileobj is self._listener:
                    self._accept()
                elif key.data is not None:
                    self._serve(key.data)
            self._on_time(time.monotonic())
        for session in tuple(self._sessions):
            self._drop(session, "the receiver closes")
        self._selector.close()
        self._listener.close()

    def _accept(self) -> None:
        try:
            accepted = accept(self._listener)
        except OSError as error:  # out of descriptors; the listener stays readable, so look away for a moment
            logger.warning("! can not accept a connection: %s", error)
            self._selector.unregister(self._listener)
            self._accepts_from_s = time.monotonic() + _PAUSE_S
            return
        if accepted is None:
            return
        sock, peer = accepted
        if len(self._sessions) >= self._sessions_max:
            logger.warning("! %s refused: %d sessions are open", peer, self._sessions_max)
            sock.close()
            return
        session = _Session(sock, greets_until_s=time.monotonic() + self._greeting_s)
        with self._lock:
            self._sessions.add(session)
        self._selector.register(sock, selectors.EVENT_READ, session)

    def _serve(self, session: _Session) -> None:
        try:
            self._read(session)
        except (EOFError, OSError) as error:
            self._drop(session, str(error) or "end of stream")
        except (ProtocolViolation, EngineError) as error:
            logger.warning("! session dropped: %s", error)
            self._drop(session, str(error))
        except Exception as error:  # a fault of ours must not end the thread that serves all others
            logger.exception("! session dropped")
            self._drop(session, repr(error))

    def _read(self, session: _Session) -> None:
        try:
            data = session.sock.recv(greeting.HELLO_BYTES - len(session.greeting) or 1)
        except (BlockingIOError, InterruptedError):
            return
        if not data:
            raise EOFError
        if session.sender_token is not None:
            raise ProtocolViolation("a sender said more than its greeting")
        session.greeting += data
        if len(session.greeting) == greeting.HELLO_BYTES:
            self._welcome(session)

    def _welcome(self, session: _Session) -> None:
        nonce, sender_token = greeting.decode_hello(bytes(session.greeting))
        if not hmac.compare_digest(nonce, self.nonce) or not 1 <= sender_token <= 2**62:
            raise ProtocolViolation("a greeting for another region")
        with self._lock:
            session.sender_token = sender_token
        session.engine = self._make_engine()
        answer = greeting.encode_welcome(session.engine.address())
        if session.sock.send(answer) < len(answer):  # an empty buffer of a new socket takes it whole
            raise ProtocolViolation("the sender does not read its answer")

    def _drop(self, session: _Session, reason: str) -> None:
        logger.debug("= session of sender %s ended: %s", session.sender_token, reason)
        self._selector.unregister(session.sock)
        if session.engine is not None:
            session.engine.close()
            session.engine = None
        with self._lock:
            self._sessions.discard(session)
        # Last, so that a sender who sees the end of the stream knows that nothing can land, and is_gone() is true.
        session.sock.close()

    def _patience_s(self) -> float | None:
        """Seconds until something falls due."""
        due = [s.greets_until_s for s in self._sessions if s.sender_token is None]
        due += [self._accepts_from_s] if self._accepts_from_s else []
        return max(0.0, min(due) - time.monotonic()) if due else None

    def _on_time(self, now: float) -> None:
        for session in [s for s in self._sessions if s.sender_token is None and s.greets_until_s <= now]:
            self._drop(session, f"no greeting within {self._greeting_s} s")
        if self._accepts_from_s and now >= self._accepts_from_s:
            self._accepts_from_s = 0.0
            self._selector.register(self._listener, selectors.EVENT_READ)
