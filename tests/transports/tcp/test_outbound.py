"""The sender of the tcp wire against receivers that do not behave: the outcome says what is known, and no
more."""

from __future__ import annotations

import socket
import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import msgspec
import pytest

from embedwire.errors import TransportError
from embedwire.transports.contract import Outcome, Piece, RemoteRegion
from embedwire.transports.sockets import HELLO_BYTES
from embedwire.transports.tcp import TcpInbound, TcpOutbound, frames, writing

NONCE = bytes(range(16))
HEAD_BYTES = frames.HEADER_BYTES + frames.PIECE_BYTES


def read(sock: socket.socket, nbytes: int) -> bytes:
    data = b""
    while len(data) < nbytes and (more := sock.recv(nbytes - len(data))):
        data += more
    return data


@contextmanager
def receiver(
    *behaviours: Callable[[socket.socket], None], welcome: bytes = frames.WELCOME
) -> Iterator[bytes]:
    """A server whose n-th connection gets the n-th behaviour after the greeting. Gives its descriptor."""
    listener = socket.create_server(("127.0.0.1", 0))
    listener.settimeout(20)

    def serve() -> None:
        for behave in behaviours:
            sock, _ = listener.accept()
            with sock:
                sock.settimeout(20)
                read(sock, HELLO_BYTES)
                sock.sendall(welcome)
                behave(sock)

    thread = threading.Thread(target=serve)
    thread.start()
    port = listener.getsockname()[1]
    yield msgspec.msgpack.encode(frames.Descriptor("127.0.0.1", port, NONCE, 4096))
    thread.join(20)
    listener.close()
    assert not thread.is_alive()


def write(
    region: RemoteRegion, *, ticket: int = 3, slices: int = 1, timeout_s: float = 20.0
) -> tuple[Outcome, list[int]]:
    landed: list[int] = []
    outcome = region.write(
        ticket,
        ([Piece(memoryview(b"data"), 4 * number)] for number in range(slices)),
        is_permitted=lambda: True,
        on_landed=landed.append,
        timeout_s=timeout_s,
    )
    return outcome, landed


def answer(*acks: bytes) -> Callable[[socket.socket], None]:
    """Read one frame of four bytes for each answer and send it; then read to the end."""

    def behave(sock: socket.socket) -> None:
        for ack in acks:
            assert len(read(sock, HEAD_BYTES + 4)) == HEAD_BYTES + 4
            sock.sendall(ack)
        stay_silent(sock)

    return behave


def leave(sock: socket.socket) -> None:
    """Read the frame and close in good order."""
    read(sock, HEAD_BYTES + 4)


def reset(sock: socket.socket) -> None:
    read(sock, HEAD_BYTES)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


def stay_silent(sock: socket.socket) -> None:
    try:
        while sock.recv(4096):
            pass
    except ConnectionResetError:
        pass  # the sender gave up, and discarded what was on its way


ACK = frames.encode_ack(3, 0, verdict=frames.LANDED)
ENDINGS = {
    "landed": (answer(ACK), Outcome.LANDED),
    "refused": (answer(frames.encode_ack(3, 0, verdict=frames.REFUSED)), Outcome.LOST),
    "another ticket": (answer(frames.encode_ack(4, 0, verdict=frames.LANDED)), Outcome.UNKNOWN),
    "another frame": (answer(frames.encode_ack(3, 1, verdict=frames.LANDED)), Outcome.UNKNOWN),
    "garbage": (answer(b"\xff" * frames.ACK_BYTES), Outcome.UNKNOWN),
    "answered twice": (answer(ACK + ACK), Outcome.UNKNOWN),
    "end of stream": (leave, Outcome.LOST),
    "reset": (reset, Outcome.UNKNOWN),
    "silence": (stay_silent, Outcome.UNKNOWN),
}


@pytest.mark.failure_mode("abort-not-propagated", "language-server-killed", "write-outcome-unknown")
@pytest.mark.invariant("no-early-reuse")
@pytest.mark.parametrize("name", ENDINGS)
def test_every_ending_has_an_honest_outcome(name: str) -> None:
    """LOST only where the receiver can no longer read the bytes under way."""
    behave, outcome = ENDINGS[name]
    with receiver(behave) as descriptor:
        outbound = TcpOutbound(host="127.0.0.1", streams=1)
        region = outbound.connect(descriptor, sender_token=9, timeout_s=20)
        assert write(region, timeout_s=0.3 if name == "silence" else 20.0)[0] is outcome
        outbound.close()


@pytest.mark.failure_mode("lease-shorter-than-write", "write-outcome-unknown")
@pytest.mark.invariant("no-early-reuse")
def test_close_returns_when_the_receiver_has_read_all_and_closed() -> None:
    """After close() nothing of the session lands, so close() waits for the end from the receiver."""
    has_returned = threading.Event()
    returned_early = []

    def linger(sock: socket.socket) -> None:
        stay_silent(sock)
        returned_early.append(has_returned.wait(writing.CLOSE_WAIT_S / 3))

    with receiver(linger) as descriptor:
        region = TcpOutbound(host="127.0.0.1", streams=1).connect(descriptor, sender_token=9, timeout_s=20)
        region.close()
        has_returned.set()
    assert returned_early == [False]


def test_a_slow_source_is_no_time_out() -> None:
    """The time-out counts from the last progress, and a slice that was handed over late is progress."""
    now, waits = [0.0], []
    honest = writing.Write._wait

    def wait(self: writing.Write, timeout_s: float) -> set[int]:
        waits.append(timeout_s)
        return honest(self, timeout_s)

    with receiver(answer(ACK)) as descriptor, pytest.MonkeyPatch.context() as patch:
        outbound = TcpOutbound(host="127.0.0.1", streams=1)
        region = outbound.connect(descriptor, sender_token=9, timeout_s=20)
        patch.setattr(writing.time, "monotonic", lambda: now[0])
        patch.setattr(writing.Write, "_wait", wait)

        def slices() -> Iterator[list[Piece]]:
            now[0] += 1000.0
            yield [Piece(memoryview(b"data"), 0)]

        outcome = region.write(3, slices(), is_permitted=lambda: True, on_landed=lambda _: None, timeout_s=20)
        assert outcome is Outcome.LANDED
        assert set(waits) == {20.0}
        outbound.close()


def test_progress_stops_at_the_first_refusal() -> None:
    acks = [frames.encode_ack(3, n, verdict=frames.LANDED if n != 2 else frames.REFUSED) for n in range(4)]
    with receiver(answer(*acks)) as descriptor:
        outbound = TcpOutbound(host="127.0.0.1", streams=1)
        region = outbound.connect(descriptor, sender_token=9, timeout_s=20)
        outcome, landed = write(region, slices=4)
        assert outcome is Outcome.LOST
        assert landed[-1] == 2
        outbound.close()


@pytest.mark.failure_mode("restart-on-same-address", "one-failure-shuts-peer-out")
def test_a_broken_session_connects_again_at_its_next_write() -> None:
    """A peer that is back is usable at once."""
    with receiver(reset, answer(ACK)) as descriptor:
        outbound = TcpOutbound(host="127.0.0.1", streams=1)
        region = outbound.connect(descriptor, sender_token=9, timeout_s=20)
        assert write(region) == (Outcome.UNKNOWN, [])
        assert write(region) == (Outcome.LANDED, [1])
        outbound.close()


@pytest.mark.parametrize("welcome", [b"", b"EW", b"HTTP", b"EWw2"])
def test_another_welcome_is_no_session(welcome: bytes) -> None:
    with receiver(lambda _: None, welcome=welcome) as descriptor, pytest.raises(TransportError):
        TcpOutbound(host="127.0.0.1").connect(descriptor, sender_token=9, timeout_s=20)


@pytest.mark.failure_mode("frozen-peer-holds-blocks")
@pytest.mark.invariant("deadlines")
def test_a_receiver_that_never_answers_the_greeting() -> None:
    """A stopped receiver still accepts connections; the time-out ends the attempt."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        descriptor = msgspec.msgpack.encode(frames.Descriptor("127.0.0.1", port, NONCE, 10))
        with pytest.raises(TransportError, match="no welcome"):
            TcpOutbound(host="127.0.0.1").connect(descriptor, sender_token=9, timeout_s=0.1)


@pytest.mark.parametrize("streams", [1, 2, 4])
def test_any_number_of_streams(streams: int) -> None:
    inbound = TcpInbound(host="127.0.0.1")
    memory = inbound.allocate(4 * 1000)
    inbound.permit(3, [(0, 4 * 1000)])
    outbound = TcpOutbound(host="127.0.0.1", streams=streams)
    region = outbound.connect(inbound.descriptor(), sender_token=9, timeout_s=20)
    outcome, landed = write(region, slices=1000)
    assert outcome is Outcome.LANDED
    assert landed == sorted(set(landed))
    assert memory == b"data" * 1000
    outbound.close()
    memory.release()
    inbound.close()
