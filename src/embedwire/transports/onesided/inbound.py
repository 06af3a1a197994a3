"""The receiving half of a one-sided transport: every session has an engine of its own, made and destroyed on a thread of its own.

So an engine that is slow to make or to destroy delays neither the listener nor other sessions. A session counts from before its engine
exists until after that was destroyed. The receiver cannot observe writes, so it cannot enforce a ticket.
"""

from __future__ import annotations

import threading
from abc import abstractmethod
from collections.abc import Sequence
from typing import ClassVar

import msgspec
import numpy as np

from embedwire.errors import ProtocolViolation, TransportError
from embedwire.transports.listener import Connection, is_served
from embedwire.transports.onesided import greeting
from embedwire.transports.onesided.engine import EngineError, ReceivingEngine
from embedwire.transports.region import ListeningInbound


class OneSidedInbound(ListeningInbound):
    """An adapter implements how an engine for the region is made."""

    is_fenced: ClassVar[bool] = False
    magic: ClassVar[bytes] = greeting.HELLO
    sessions_max: ClassVar[int] = 256
    """Each has an engine with threads of its own."""

    def __init__(self, *, host: str) -> None:
        super().__init__(host=host)
        self._threads: list[threading.Thread] = []

    @abstractmethod
    def _make_engine(self, address: int, nbytes: int, *, host: str) -> ReceivingEngine:
        """A new engine over that memory. Raises EngineError. On the session's thread, at the same time as others."""

    def permit(self, ticket: int, spans: Sequence[tuple[int, int]]) -> None:
        """Nothing to do: this half cannot observe writes."""

    def revoke(self, ticket: int) -> bool:
        return False

    def _describe(self, port: int, nonce: bytes) -> bytes:
        return msgspec.msgpack.encode(
            greeting.Descriptor(self.name, self._host, port, nonce, self._region.nbytes, greeting.CPU)
        )

    def _begin_session(self, session: Connection) -> None:
        self._threads = [thread for thread in self._threads if thread.is_alive()]
        name = f"embedwire-{self.name}-session"
        thread = threading.Thread(target=self._run_session, args=(session,), name=name, daemon=True)
        thread.start()
        self._threads.append(thread)

    def _end_sessions(self) -> None:
        for thread in self._threads:
            thread.join()

    def _run_session(self, session: Connection) -> None:
        assert self._listener is not None
        engine: ReceivingEngine | None = None

        def serve() -> None:
            nonlocal engine
            engine = self._new_engine()
            _welcome(session, engine)
            _await_end(session)

        is_served(session, serve)
        if engine is not None:
            engine.close()
        self._listener.release(session)

    def _new_engine(self) -> ReceivingEngine:
        address = np.frombuffer(self._region, np.uint8).ctypes.data
        try:
            return self._make_engine(address, self._region.nbytes, host=self._host)
        except EngineError as error:
            raise TransportError(str(error)) from error


def _welcome(session: Connection, engine: ReceivingEngine) -> None:
    answer = greeting.encode_welcome(engine.address())
    if session.sock.send(answer) < len(answer):  # the empty buffer of a new socket takes it whole
        raise ProtocolViolation("the sender does not read the answer to its greeting")


def _await_end(session: Connection) -> None:
    """Return when the sender or this half has ended the session. Raises ProtocolViolation when the sender sends anything."""
    session.sock.setblocking(True)
    if session.sock.recv(1):
        raise ProtocolViolation("the sender sent more than its greeting")
