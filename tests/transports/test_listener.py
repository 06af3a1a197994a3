"""The session listener against peers that misbehave: by itself, and as the port of each kind of region. Every test ends by showing that
others are served."""

from __future__ import annotations

import resource
import socket
import struct
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any, ClassVar

import msgspec
import pytest

from embedwire.errors import ConfigurationError, ProtocolViolation, TransportError
from embedwire.testing.wires import PATIENCE_S, eventually, held
from embedwire.transports.listener import Connection, SessionListener
from embedwire.transports.onesided import OneSidedInbound, greeting
from embedwire.transports.onesided.engine import EngineError, ReceivingEngine
from embedwire.transports.region import ListeningInbound
from embedwire.transports.sockets import HELLO_BYTES, decode_hello, encode_hello
from embedwire.transports.tcp import TcpInbound, frames

LIMITS: dict[str, Any] = {"sessions_max": 3, "waiting_max": 4, "greeting_s": 1.0}


class NoEngine(ReceivingEngine):
    def address(self) -> bytes:
        return b"here"

    def close(self) -> None:
        pass


class OneSided(OneSidedInbound):
    name: ClassVar[str] = "test"

    def _make_engine(self, address: int, nbytes: int, *, host: str) -> ReceivingEngine:
        return NoEngine()


class Port:
    """A port under test, raw connections to it, and the beginning of the answer to a greeting. ``breaks`` is called as a session begins."""

    def __init__(self, use: str, **limits: Any) -> None:
        limits = LIMITS | limits
        self.sockets: list[socket.socket] = []
        self.breaks: Callable[[], None] = lambda: None
        if use == "listener":
            self.answer, self.magic = b"hello", b"TEST"
            self.owner: Any = SessionListener(
                "127.0.0.1", name="test", magic=self.magic, on_session=self._begin_session, **limits
            )
            self.number, self.nonce = self.owner.port, self.owner.nonce
        else:
            base, format_, self.answer = {
                "tcp": (TcpInbound, frames.Descriptor, frames.WELCOME),
                "onesided": (OneSided, greeting.Descriptor, b"EWp1"),
            }[use]
            self.owner, self.magic = self._region(base, limits), base.magic  # type: ignore[type-abstract]
            target: Any = msgspec.msgpack.decode(self.owner.descriptor(), type=format_)
            self.number, self.nonce = target.port, target.nonce

    def _begin_session(self, session: Connection) -> Callable[[], None]:
        self.breaks()
        session.sock.send(self.answer)

        def serve() -> None:
            if not session.sock.recv(100):
                raise EOFError

        return serve

    def _region(self, base: type[ListeningInbound], limits: dict[str, Any]) -> ListeningInbound:
        port = self

        class Limited(base):  # type: ignore[valid-type]
            def _begin_session(self, session: Connection) -> Any:
                port.breaks()
                return super()._begin_session(session)

        for name, value in limits.items():
            setattr(Limited, name, value)
        made: ListeningInbound = Limited(host="127.0.0.1")
        made.allocate(4096).release()
        return made

    def connect(self) -> socket.socket:
        sock = socket.create_connection(("127.0.0.1", self.number), timeout=PATIENCE_S)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.sockets.append(sock)
        return sock

    def hello(self, sender_token: int = 7) -> bytes:
        return encode_hello(self.magic, self.nonce, sender_token)

    def session(self, sender_token: int = 7) -> socket.socket:
        sock = self.connect()
        sock.sendall(self.hello(sender_token))
        assert sock.recv(len(self.answer), socket.MSG_WAITALL) == self.answer
        return sock

    def serves(self) -> bool:
        """Whether a well-behaved sender has a session, until it ends."""
        sock = self.session(sender_token=99)
        had_session = not self.owner.is_gone(99)
        sock.shutdown(socket.SHUT_WR)
        while sock.recv(100):
            pass
        return had_session and bool(self.owner.is_gone(99))

    def close(self) -> None:
        self.owner.close()
        for sock in self.sockets:
            sock.close()


USES = ("listener", "tcp", "onesided")


@pytest.fixture(params=USES)
def port(request: pytest.FixtureRequest) -> Iterator[Port]:
    made = Port(request.param)
    yield made
    made.close()


def is_dropped(sock: socket.socket) -> bool:
    """Whether the receiver closes the connection, having sent nothing more."""
    try:
        return sock.recv(1) == b""
    except ConnectionResetError:
        return True


def send_in_single_bytes(sock: socket.socket, data: bytes) -> None:
    try:
        for at in range(len(data)):
            sock.sendall(data[at : at + 1])
    except (BrokenPipeError, ConnectionResetError):
        pass  # dropped already


BAD_GREETINGS: dict[str, Callable[[Port], bytes]] = {
    "http": lambda port: b"GET / HTTP/1.1\r\nHost: x\r\n\r\n".ljust(64),
    "zeros": lambda port: bytes(64),
    "ones": lambda port: b"\xff" * 64,
    "nonce": lambda port: encode_hello(port.magic, bytes(16), 7),
    "version": lambda port: encode_hello(b"EWx9", port.nonce, 7),
    "token 0": lambda port: port.hello(0),
    "token too large": lambda port: port.hello(2**62 + 1),
    "largest token": lambda port: port.hello(2**64 - 1),
}


@pytest.mark.failure_mode("malformed-message")
@pytest.mark.invariant("validation")
@pytest.mark.parametrize("name", BAD_GREETINGS)
def test_a_bad_greeting_costs_its_connection(port: Port, name: str) -> None:
    """Garbage instead of a greeting, at once and byte by byte."""
    at_once, slowly = port.connect(), port.connect()
    at_once.sendall(BAD_GREETINGS[name](port))
    send_in_single_bytes(slowly, BAD_GREETINGS[name](port))
    assert is_dropped(at_once)
    assert is_dropped(slowly)
    assert port.owner.is_gone(7)
    assert port.serves()


def test_a_greeting_byte_by_byte(port: Port) -> None:
    sock = port.connect()
    send_in_single_bytes(sock, port.hello())
    assert sock.recv(len(port.answer), socket.MSG_WAITALL) == port.answer
    assert not port.owner.is_gone(7)


@pytest.mark.failure_mode("malformed-message")
@pytest.mark.invariant("deadlines")
def test_an_incomplete_greeting_is_dropped_in_time(port: Port) -> None:
    """Half-open connections, one of them with half a greeting, are closed."""
    silent, half = port.connect(), port.connect()
    half.sendall(port.hello()[:-1])
    assert is_dropped(silent)
    assert is_dropped(half)
    assert port.owner.is_gone(7)
    assert port.serves()


@pytest.mark.failure_mode("malformed-message")
@pytest.mark.parametrize("end", ["shut", "reset"])
def test_a_connection_that_ends_within_its_greeting(port: Port, end: str) -> None:
    for length in range(HELLO_BYTES):
        sock = port.connect()
        sock.sendall(port.hello()[:length])
        if end == "reset":
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        sock.close()
    assert port.owner.is_gone(7)
    assert port.serves()


@pytest.mark.parametrize("use", USES)
def test_idle_connections_do_not_exclude_a_sender(use: str) -> None:
    """A flood of them: the one that has waited longest goes, and no session does."""
    port = Port(use, greeting_s=PATIENCE_S)
    session = port.session()
    idle = [port.connect() for _ in range(3 * LIMITS["waiting_max"])]
    assert all(is_dropped(sock) for sock in idle[: -LIMITS["waiting_max"]])
    assert port.serves()
    assert not port.owner.is_gone(7)
    session.close()
    port.close()


def test_sessions_are_bounded(port: Port) -> None:
    """Only a sender with the nonce has a session, up to the limit."""
    sessions = [port.session() for _ in range(LIMITS["sessions_max"])]
    beyond = port.connect()
    send_in_single_bytes(beyond, port.hello(8))
    assert is_dropped(beyond)
    assert port.owner.is_gone(8)
    assert not port.owner.is_gone(7)
    sessions[0].shutdown(socket.SHUT_WR)
    while sessions[0].recv(100):
        pass
    assert port.serves()


@pytest.mark.failure_mode("exception-ends-thread")
def test_a_fault_of_our_own_costs_one_connection(port: Port) -> None:
    """An exception in the thread ends one connection, not the thread."""

    def breaks() -> None:
        raise ZeroDivisionError

    port.breaks = breaks
    sock = port.connect()
    sock.sendall(port.hello())
    assert is_dropped(sock)
    assert port.owner.is_gone(7)
    port.breaks = lambda: None
    assert port.serves()


@pytest.mark.parametrize("error", [EngineError("no memory"), ZeroDivisionError()], ids=["library", "ours"])
def test_an_engine_that_cannot_be_made_costs_one_session(
    error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    port = Port("onesided")
    with monkeypatch.context() as patch:
        patch.setattr(OneSided, "_make_engine", fail)
        sock = port.connect()
        sock.sendall(port.hello())
        assert is_dropped(sock)
        assert port.owner.is_gone(7)
    assert port.serves()
    port.close()


@pytest.mark.failure_mode("exception-ends-thread")
def test_out_of_descriptors_is_survived(port: Port, caplog: pytest.LogCaptureFixture) -> None:
    """A connection that cannot be accepted now is accepted when descriptors are free again."""
    sock = socket.socket()
    sock.settimeout(PATIENCE_S)
    port.sockets.append(sock)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, hard))
    try:
        sock.connect(("127.0.0.1", port.number))
        eventually(lambda: "EMFILE" in caplog.text)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    sock.sendall(port.hello())
    assert sock.recv(len(port.answer), socket.MSG_WAITALL) == port.answer
    assert port.serves()


@pytest.mark.parametrize("use", USES)
def test_close_gives_everything_back(use: str) -> None:
    """Sessions, connections that wait, and a thread: all end, and peers read the end of the stream."""
    Port(use).close()  # what the process makes once is there
    before = held()
    port = Port(use)
    peers = [port.session(), port.session(8), port.connect(), port.connect()]
    port.owner.close()
    for sock in peers:
        with sock, suppress(ConnectionResetError):  # one that was not accepted yet is reset
            while sock.recv(100):
                pass
    assert port.owner.is_gone(7)
    del port, peers, sock
    assert held() == before


def test_a_vanished_host_is_detected() -> None:
    """After a minute, and not after the two hours of the system's default: its blocks would stay in quarantine for so long."""
    seen: list[list[int]] = []

    def begin(session: Connection) -> Callable[[], None]:
        options = (socket.TCP_KEEPIDLE, socket.TCP_KEEPINTVL, socket.TCP_KEEPCNT)
        seen.append([session.sock.getsockopt(socket.IPPROTO_TCP, option) for option in options])
        raise EOFError

    listener = SessionListener("127.0.0.1", name="test", magic=b"TEST", on_session=begin, sessions_max=1)
    with socket.create_connection(("127.0.0.1", listener.port), timeout=PATIENCE_S) as sock:
        sock.sendall(encode_hello(b"TEST", listener.nonce, 1))
        assert is_dropped(sock)
    assert seen == [[30, 10, 3]]
    listener.close()


def test_a_greeting_round_trip() -> None:
    data = encode_hello(b"TEST", bytes(range(16)), 2**62)
    assert decode_hello(data, magic=b"TEST") == (bytes(range(16)), 2**62)
    with pytest.raises(ProtocolViolation, match="began with b'TEST'"):
        decode_hello(data, magic=b"OTHR")


@pytest.mark.parametrize("host", ["", "0.0.0.0", "::", "*"])
def test_a_wildcard_is_not_an_address_for_senders(host: str) -> None:
    for kind in (TcpInbound, OneSided):
        with pytest.raises(ConfigurationError, match="not an address"):
            kind(host=host)


def test_a_host_that_is_not_here() -> None:
    for kind in (TcpInbound, OneSided):
        with pytest.raises(TransportError, match="cannot listen"):
            kind(host="192.0.2.1").allocate(10)
