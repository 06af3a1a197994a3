"""The shared part of the one-sided wires, over an engine in memory whose faults are ordered by the test."""

from __future__ import annotations

import ctypes
import select
import socket
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from typing import Any, ClassVar

import msgspec
import numpy as np
import pytest

from embedwire.errors import TransportError, UsageError
from embedwire.testing.wires import PATIENCE_S, eventually, piece, write
from embedwire.transports.contract import Outcome, Piece
from embedwire.transports.onesided import OneSidedInbound, OneSidedOutbound, greeting
from embedwire.transports.onesided.batches import PART_BYTES, PARTS, RUNS_MAX, Registered, Staging, batches
from embedwire.transports.onesided.engine import (
    EngineError,
    Flight,
    ReceivingEngine,
    Run,
    SendingEngine,
    State,
)
from embedwire.transports.onesided.session import Presence
from embedwire.transports.sockets import HELLO_BYTES, encode_hello


class Receiving(ReceivingEngine):
    made: ClassVar[list[Receiving]] = []

    def __init__(self, address: int, *, on_close: Callable[[], None] = lambda: None) -> None:
        self.region, self.on_close, self.is_open = address, on_close, True
        self.made.append(self)

    def address(self) -> bytes:
        return str(self.region).encode()

    def close(self) -> None:
        self.on_close()
        self.is_open = False


class Landed(Flight):
    def __init__(self, state: State) -> None:
        self.state = state

    def poll(self) -> State:
        return self.state


class Sending(SendingEngine):
    """Copies when told to; ``fate`` is what becomes of the next batches."""

    made: ClassVar[list[Sending]] = []
    fate: ClassVar[list[State]] = []
    connects: ClassVar[Callable[[], None]] = staticmethod(lambda: None)

    def __init__(self) -> None:
        self.readable: list[tuple[int, int]] = []
        self.batches: list[list[Run]] = []
        self.is_open = True
        self.made.append(self)

    def register(self, address: int, nbytes: int) -> None:
        self.readable.append((address, nbytes))

    def connect(self, address: bytes) -> None:
        Sending.connects()
        self.base = int(address)

    def begin(self, batch: Sequence[Run]) -> Flight:
        self.batches.append(list(batch))
        state = Sending.fate.pop(0) if Sending.fate else State.LANDED
        for source, offset, nbytes in batch if state is State.LANDED else ():
            assert any(at <= source and source + nbytes <= at + size for at, size in self.readable)
            ctypes.memmove(self.base + offset, source, nbytes)
        return Landed(state)

    def close(self) -> None:
        assert self.is_open
        self.is_open = False


class In(OneSidedInbound):
    """Makes no engine while ``goes_on`` is not set."""

    name: ClassVar[str] = "test"
    greeting_s: ClassVar[float] = 0.5

    def __init__(self, *, host: str) -> None:
        super().__init__(host=host)
        self.goes_on = threading.Event()
        self.goes_on.set()

    def _make_engine(self, address: int, nbytes: int, *, host: str) -> ReceivingEngine:
        assert self.goes_on.wait(PATIENCE_S)
        return Receiving(address)


class Out(OneSidedOutbound):
    name: ClassVar[str] = "test"

    def _make_engine(self, *, host: str) -> SendingEngine:
        return Sending()


def held_until(event: threading.Event) -> Callable[[], None]:
    """What returns once the event is set."""

    def hold() -> None:
        event.wait(PATIENCE_S)

    return hold


@pytest.fixture(autouse=True)
def engines() -> Iterator[None]:
    """All engines of a test are destroyed at its end."""
    Receiving.made.clear()
    Sending.made.clear()
    Sending.fate.clear()
    yield
    Sending.connects = staticmethod(lambda: None)
    made: list[Any] = [*Receiving.made, *Sending.made]
    eventually(lambda: not any(engine.is_open for engine in made))


@pytest.fixture
def inbound() -> Iterator[In]:
    made = In(host="127.0.0.1")
    yield made
    made.close()


@pytest.fixture
def outbound() -> Iterator[Out]:
    made = Out(host="127.0.0.1")
    yield made
    made.close()


def connect(outbound: Out, inbound: In) -> Any:
    return outbound.connect(inbound.descriptor(), sender_token=7, timeout_s=PATIENCE_S)


@pytest.fixture
def frozen_receiver() -> Iterator[Callable[[], tuple[bytes, list[socket.socket]]]]:
    """A receiver that welcomes each sender and then is frozen: its descriptor and its connections."""
    opened: list[socket.socket] = []

    def make() -> tuple[bytes, list[socket.socket]]:
        listener = socket.create_server(("127.0.0.1", 0))
        memory = np.zeros(4096, np.uint8)
        opened.append(listener)
        connections: list[socket.socket] = []

        def serve() -> None:
            while True:
                try:
                    sock, _ = listener.accept()
                except OSError:
                    return
                sock.recv(HELLO_BYTES, socket.MSG_WAITALL)
                sock.sendall(greeting.encode_welcome(str(memory.ctypes.data).encode()))
                connections.append(sock)
                opened.append(sock)

        threading.Thread(target=serve, daemon=True).start()
        port = listener.getsockname()[1]
        fields = greeting.Descriptor("test", "127.0.0.1", port, bytes(16), memory.nbytes, greeting.CPU)
        return msgspec.msgpack.encode(fields), connections

    yield make
    for sock in opened:
        with suppress(OSError):
            sock.shutdown(socket.SHUT_RDWR)
        sock.close()


def greet(inbound: In, sender_token: int = 7) -> socket.socket:
    """A raw connection with a right greeting."""
    target = greeting.decode_descriptor(inbound.descriptor(), wire="test")
    sock = socket.create_connection((target.host, target.port), timeout=PATIENCE_S)
    sock.sendall(encode_hello(greeting.HELLO, target.nonce, sender_token))
    return sock


def welcomed(sock: socket.socket) -> bool:
    """Whether an engine's address has come."""
    nbytes = greeting.decode_welcome(sock.recv(greeting.WELCOME_BYTES, socket.MSG_WAITALL))
    return len(sock.recv(nbytes, socket.MSG_WAITALL)) == nbytes > 0


def test_an_engine_is_destroyed_before_its_sender_is_gone(inbound: In) -> None:
    inbound.allocate(4096).release()
    seen: list[bool] = []
    with greet(inbound) as sock:
        assert welcomed(sock)
        Receiving.made[0].on_close = lambda: seen.append(inbound.is_gone(7))
        assert not inbound.is_gone(7)
        sock.shutdown(socket.SHUT_WR)
        assert sock.recv(1) == b""
        assert inbound.is_gone(7), "the end of stream came before the proof"
    assert seen == [False]


def test_a_slow_engine_delays_no_other_sender(inbound: In) -> None:
    """While engines are being made, or destroyed, other connections are accepted, greeted, dropped in time and ended."""
    inbound.allocate(4096).release()
    with greet(inbound, 9) as early:
        assert welcomed(early)
        ends = threading.Event()
        Receiving.made[0].on_close = held_until(ends)
    inbound.goes_on.clear()
    target = greeting.decode_descriptor(inbound.descriptor(), wire="test")
    senders = [greet(inbound, sender_token) for sender_token in (1, 2, 3)]
    eventually(lambda: not any(inbound.is_gone(sender_token) for sender_token in (1, 2, 3)))
    with socket.create_connection((target.host, target.port), timeout=PATIENCE_S) as silent:
        assert silent.recv(1) == b"", "it has not greeted in time"
    with socket.create_connection((target.host, target.port), timeout=PATIENCE_S) as bad:
        bad.sendall(bytes(HELLO_BYTES))
        assert bad.recv(1) == b""
    assert len(Receiving.made) == 1
    inbound.goes_on.set()
    for sock in senders:
        assert welcomed(sock)
        sock.close()
    eventually(lambda: all(inbound.is_gone(sender_token) for sender_token in (1, 2, 3)))
    assert not inbound.is_gone(9), "its engine is being destroyed"
    ends.set()
    eventually(lambda: inbound.is_gone(9))


def test_close_ends_sessions_at_every_stage(outbound: Out) -> None:
    """With an engine, and while one is made: each engine is destroyed, then each sender sees the end."""
    inbound = In(host="127.0.0.1")
    inbound.allocate(4096).release()
    ready = greet(inbound, 1)
    assert welcomed(ready)
    inbound.goes_on.clear()
    others = [greet(inbound, 2), greet(inbound, 3)]
    eventually(lambda: not inbound.is_gone(2) and not inbound.is_gone(3))
    closing = threading.Thread(target=inbound.close)
    closing.start()
    assert ready.recv(1) == b""
    inbound.goes_on.set()
    closing.join()
    assert not any(engine.is_open for engine in Receiving.made)
    for sock in (ready, *others):
        with suppress(ConnectionResetError):
            while sock.recv(100):
                pass
        sock.close()
    assert all(inbound.is_gone(sender_token) for sender_token in (1, 2, 3))


def test_a_sender_that_says_more_is_dropped(inbound: In) -> None:
    inbound.allocate(4096).release()
    with greet(inbound) as sock:
        assert welcomed(sock)
        sock.sendall(b"x")
        assert sock.recv(1) == b""
    assert not Receiving.made[0].is_open


def test_a_broken_session_is_lost_when_the_receiver_confirms_its_end(inbound: In, outbound: Out) -> None:
    inbound.allocate(4096).release()
    region = connect(outbound, inbound)
    Sending.fate += [State.FAILED]
    assert write(region, 1, [[piece(0, 9, seed=1)]]) is Outcome.LOST
    assert inbound.is_gone(7)
    assert write(region, 1, [[piece(0, 9, seed=1)]]) is Outcome.LANDED
    assert len(Receiving.made) == len(Sending.made) == 2


def test_a_doubt_ends_when_the_receiver_wakes(frozen_receiver: Any, outbound: Out) -> None:
    """UNKNOWN until its end of stream has come; ``close`` says so whenever it is asked."""
    descriptor, connections = frozen_receiver()
    region = outbound.connect(descriptor, sender_token=7, timeout_s=PATIENCE_S)
    Sending.fate += [State.MOVING]
    assert write(region, 1, [[piece(0, 9, seed=1)]], timeout_s=0.05) is Outcome.UNKNOWN
    assert not Sending.made[0].is_open
    assert region.close() is False
    assert region.close() is False
    connections[0].close()
    eventually(region.close)


def test_an_engine_that_hangs_in_connect_is_left_behind(inbound: In, outbound: Out) -> None:
    inbound.allocate(4096).release()
    goes_on = threading.Event()
    Sending.connects = staticmethod(held_until(goes_on))
    with pytest.raises(TransportError, match="in time"):
        outbound.connect(inbound.descriptor(), sender_token=7, timeout_s=0.1)
    goes_on.set()
    eventually(lambda: bool(Sending.made) and not Sending.made[0].is_open)


def test_an_engine_that_can_not_connect(inbound: In, outbound: Out) -> None:
    inbound.allocate(4096).release()

    def refuse() -> None:
        raise EngineError("no way")

    Sending.connects = staticmethod(refuse)
    with pytest.raises(TransportError, match="no way"):
        connect(outbound, inbound)


def test_an_engine_that_cannot_register_is_destroyed(
    inbound: In, outbound: Out, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The fixture ``engines`` shows that no engine is left."""
    inbound.allocate(4096).release()

    def refuse(engine: Sending, address: int, nbytes: int) -> None:
        raise EngineError("no memory to register")

    monkeypatch.setattr(Sending, "register", refuse)
    with pytest.raises(TransportError, match="no memory to register"):
        connect(outbound, inbound)
    assert not Sending.made[0].is_open


def test_the_callers_exception_is_not_lost_with_the_session(inbound: In, outbound: Out) -> None:
    """The engine fails while the write waits for what was begun before the exception."""
    inbound.allocate(4096).release()
    region = connect(outbound, inbound)
    Sending.fate += [State.MOVING]

    def slices() -> Iterator[list[Piece]]:
        yield [piece(0, 9, seed=1)]
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        write(region, 1, slices(), timeout_s=0.05)
    assert not Sending.made[0].is_open, "the session has ended"
    assert write(region, 2, [[piece(0, 9, seed=1)]]) is Outcome.LANDED


def test_a_host_out_of_reach_is_not_proof_that_a_session_has_ended() -> None:
    """The kernel reports the time-out once, and after that the end of the stream, which the receiver never sent."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        sock = socket.create_connection(listener.getsockname())
        peer, _ = listener.accept()
    presence = Presence(sock)
    with suppress(BlockingIOError):  # a peer that reads nothing: with this option the kernel gives up on it
        while True:
            sock.send(bytes(2**16))
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 50)
    poll = select.poll()
    poll.register(sock, select.POLLERR)
    assert poll.poll(PATIENCE_S * 1000)
    assert not presence.has_ended()
    assert not presence.has_ended()
    assert not presence.wait_ended(0.01)
    presence.close()
    peer.close()


def test_registered_memory_is_read_where_it_lies(inbound: In, outbound: Out) -> None:
    memory = inbound.allocate(4096)
    source: Any = np.arange(2000, dtype=np.uint16).view(np.uint8)
    region = connect(outbound, inbound)
    outbound.register(memoryview(source))  # after the session has begun
    view = memoryview(source)

    assert write(region, 1, [[Piece(view[:1000], 5), Piece(view[1000:], 1005)]]) is Outcome.LANDED
    assert Sending.made[0].batches == [[(source.ctypes.data, 5, 4000)]]
    assert write(region, 2, []) is Outcome.LANDED
    assert len(Sending.made[0].readable) == 2, "staging, and this once"
    assert bytes(memory[5:4005]) == source.tobytes()
    memory.release()


def test_staged_pieces_are_joined_and_bounded() -> None:
    staging, registered = Staging(), Registered()
    large = np.zeros(PARTS * PART_BYTES + 1, np.uint8)

    taken: list[int] = []

    def take() -> int:
        taken.append(len(taken) % PARTS)
        return taken[-1]

    made = list(batches([Piece(large.data, 3)], staging, registered, take_part=take))
    assert [len(batch.runs) for batch in made] == [1] * (PARTS + 1)
    assert sum(batch.nbytes for batch in made) == large.nbytes
    neighbours = [piece(offset, 3, seed=offset) for offset in range(0, 300, 3)]
    (joined,) = batches(neighbours, staging, registered, take_part=take)
    assert [run[1:] for run in joined.runs] == [(0, 300)]
    apart = [piece(offset, 3, seed=offset) for offset in range(0, 6 * 5000, 6)]
    assert all(len(batch.runs) <= RUNS_MAX for batch in batches(apart, staging, registered, take_part=take))


def test_memory_that_can_not_be_registered(outbound: Out) -> None:
    for memory in (memoryview(b""), memoryview(bytes(20))[::2]):
        with pytest.raises(UsageError):
            outbound.register(memory)


@pytest.mark.parametrize(("wire", "device"), [("other", "cpu"), ("test", "cuda:0")])
def test_a_region_of_another_kind_is_refused(outbound: Out, wire: str, device: str) -> None:
    fields = greeting.Descriptor(wire, "127.0.0.1", 1, bytes(16), 4096, device)
    with pytest.raises(TransportError, match=r"other|cuda:0"):
        outbound.connect(msgspec.msgpack.encode(fields), sender_token=7, timeout_s=1.0)
