"""``close`` of a sender's region ends a write that is connecting again to a receiver that has stopped."""

from __future__ import annotations

import socket
import threading
from typing import ClassVar

import msgspec
import pytest

from embedwire.testing.wires import PATIENCE_S, piece, write
from embedwire.transports.contract import Outbound, Outcome
from embedwire.transports.onesided import OneSidedOutbound, greeting
from embedwire.transports.onesided.engine import Flight, Run, SendingEngine
from embedwire.transports.sockets import HELLO_BYTES
from embedwire.transports.tcp import TcpOutbound, frames


class Engine(SendingEngine):
    def register(self, address: int, nbytes: int) -> None:
        pass

    def connect(self, address: bytes) -> None:
        pass

    def begin(self, batch: list[Run]) -> Flight:  # type: ignore[override]
        raise AssertionError("nothing is written")

    def close(self) -> None:
        pass


class OneSided(OneSidedOutbound):
    name: ClassVar[str] = "test"

    def _make_engine(self, *, host: str) -> SendingEngine:
        return Engine()


def outbound_to(wire: str, port: int) -> tuple[Outbound, bytes, bytes]:
    """A sending half, the descriptor of a region at that port, and the answer to a greeting."""
    if wire == "tcp":
        target = frames.Descriptor("127.0.0.1", port, bytes(16), 4096)
        return TcpOutbound(host="127.0.0.1", streams=1), msgspec.msgpack.encode(target), frames.WELCOME
    fields = greeting.Descriptor("test", "127.0.0.1", port, bytes(16), 4096, greeting.CPU)
    return OneSided(host="127.0.0.1"), msgspec.msgpack.encode(fields), greeting.encode_welcome(b"here")


@pytest.mark.failure_mode("frozen-peer-holds-blocks")
@pytest.mark.invariant("deadlines")
@pytest.mark.parametrize("wire", ["tcp", "onesided"])
def test_close_ends_a_write_that_waits_for_a_greeting(wire: str) -> None:
    """The receiver accepts the connection and never answers; the write has time enough to wait for that."""
    listener = socket.create_server(("127.0.0.1", 0))
    listener.settimeout(PATIENCE_S)
    outbound, descriptor, welcome = outbound_to(wire, listener.getsockname()[1])
    opened: list[socket.socket] = []

    def accept() -> socket.socket:
        opened.append(listener.accept()[0])
        assert len(opened[-1].recv(HELLO_BYTES, socket.MSG_WAITALL)) == HELLO_BYTES
        return opened[-1]

    first = threading.Thread(target=lambda: accept().sendall(welcome))
    first.start()
    region = outbound.connect(descriptor, sender_token=7, timeout_s=PATIENCE_S)
    first.join()
    opened[0].close()
    outcomes: list[Outcome] = []
    writing = threading.Thread(
        target=lambda: outcomes.append(write(region, 1, [[piece(0, 9, seed=1)]], timeout_s=3 * PATIENCE_S))
    )
    writing.start()
    accept()
    closing = threading.Thread(target=region.close)
    closing.start()
    closing.join(PATIENCE_S)
    is_closed = not closing.is_alive()
    for sock in (*opened, listener):
        sock.close()
    closing.join()
    writing.join()
    outbound.close()
    assert is_closed, "close() waited for a receiver that has stopped"
    assert outcomes == [Outcome.LOST]
