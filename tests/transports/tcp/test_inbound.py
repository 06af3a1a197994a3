"""The receiver of the tcp wire against peers that do not behave. Every test ends by showing that others are
served."""

from __future__ import annotations

import socket
import struct
from collections.abc import Iterator

import msgspec
import pytest

from embedwire.transports.contract import Outcome, Piece
from embedwire.transports.sockets import encode_hello
from embedwire.transports.tcp import TcpInbound, TcpOutbound, frames

REGION_BYTES = 4096
TICKET, CLOSED_TICKET = 5, 6


class Server:
    """A region of 0xEE bytes whose ticket 5 is open for bytes 1000 to 2000, and raw connections to it."""

    def __init__(self) -> None:
        self.inbound = TcpInbound(host="127.0.0.1")
        self.memory = self.inbound.allocate(REGION_BYTES)
        self.memory[:] = b"\xee" * REGION_BYTES
        self.inbound.permit(TICKET, [(1000, 1000)])
        self.inbound.permit(TICKET + 50, [(0, REGION_BYTES)])
        self.target = msgspec.msgpack.decode(self.inbound.descriptor(), type=frames.Descriptor)
        self.sockets: list[socket.socket] = []

    def connect(self) -> socket.socket:
        sock = socket.create_connection(("127.0.0.1", self.target.port), timeout=20)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.sockets.append(sock)
        return sock

    def greeted(self) -> socket.socket:
        sock = self.connect()
        sock.sendall(encode_hello(frames.HELLO, self.target.nonce, 77))
        assert read(sock, 4) == frames.WELCOME
        return sock

    def is_untouched(self) -> bool:
        return self.memory == b"\xee" * REGION_BYTES

    def serves(self) -> bool:
        """Whether a well-behaved sender gets its bytes in."""
        outbound = TcpOutbound(host="127.0.0.1")
        region = outbound.connect(self.inbound.descriptor(), sender_token=1, timeout_s=20)
        slices = [[Piece(memoryview(b"good"), 0)]]
        outcome = region.write(
            TICKET + 50, slices, is_permitted=lambda: True, on_landed=lambda _: None, timeout_s=20
        )
        outbound.close()
        return outcome is Outcome.LANDED and self.memory[:4] == b"good"

    def close(self) -> None:
        for sock in self.sockets:
            sock.close()
        self.memory.release()
        self.inbound.close()


@pytest.fixture
def server() -> Iterator[Server]:
    server = Server()
    yield server
    server.close()


def read(sock: socket.socket, nbytes: int) -> bytes:
    data = b""
    while len(data) < nbytes and (more := sock.recv(nbytes - len(data))):
        data += more
    return data


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
        pass  # it has seen enough


def frame(
    *table: tuple[int, int], ticket: int = TICKET, magic: bytes = b"EWf1", pieces: int | None = None
) -> bytes:
    """A frame head that announces these (offset, length)."""
    head = struct.pack("<4sQII", magic, ticket, 0, len(table) if pieces is None else pieces)
    return head + b"".join(struct.pack("<QQ", *piece) for piece in table)


BAD_FRAMES = {
    "garbage": b"\x00\xff" * 40,
    "another magic": frame((1000, 4), magic=b"EWf2") + b"evil",
    "four billion pieces": frame(pieces=2**32 - 1),
    "one piece too many": frame(pieces=frames.PIECES_MAX + 1),
    "a gigabyte": frame((1000, 2**30)) + b"evil",
    "a length that wraps": frame((1000, 2**64 - 999)) + b"evil",
    "an offset that wraps": frame((2**64 - 4, 8)) + b"evilevil",
    "a gigabyte in all": frame(*[(1000, 1000)] * 900 + [(0, 2**30)]),
    "an empty piece": frame((1000, 0)) + b"evil",
    "outside the region": frame((REGION_BYTES, 4)) + b"evil",
    "across its end": frame((REGION_BYTES - 2, 4)) + b"evil",
    "outside the ticket": frame((0, 4)) + b"evil",
    "across the ticket's end": frame((1998, 4)) + b"evil",
    "one good piece, one bad": frame((1000, 4), (999, 4)) + b"evilevil",
}


@pytest.mark.failure_mode("malformed-message", "lying-peer")
@pytest.mark.invariant("validation")
@pytest.mark.parametrize("name", BAD_FRAMES)
def test_a_bad_frame_costs_its_connection(server: Server, name: str) -> None:
    """What the format or the ticket does not allow, at once and byte by byte; no byte of it lands."""
    at_once, slowly = server.greeted(), server.greeted()
    at_once.sendall(BAD_FRAMES[name])
    send_in_single_bytes(slowly, BAD_FRAMES[name])
    assert is_dropped(at_once)
    assert is_dropped(slowly)
    assert server.is_untouched()
    assert server.serves()


@pytest.mark.failure_mode("malformed-message")
@pytest.mark.invariant("validation")
def test_a_frame_cut_anywhere(server: Server) -> None:
    """A connection that ends within a frame changes nothing outside the place of the frame."""
    whole = frame((1500, 3), (1100, 4)) + b"abcdefg"
    for end in range(len(whole)):
        sock = server.greeted()
        sock.sendall(whole[:end])
        sock.shutdown(socket.SHUT_WR)
        assert is_dropped(sock)
        assert server.inbound.is_gone(77)
        assert server.memory[:1100] == b"\xee" * 1100
        assert server.memory[1503:] == b"\xee" * (REGION_BYTES - 1503)
    assert server.memory[1500:1503] == b"abc"
    assert server.serves()


def test_a_good_frame_byte_by_byte(server: Server) -> None:
    sock = server.greeted()
    send_in_single_bytes(sock, frame((1500, 3), (1100, 4)) + b"abcdefg")
    assert frames.decode_ack(read(sock, frames.ACK_BYTES)) == (TICKET, 0, True)
    assert (server.memory[1500:1503], server.memory[1100:1104]) == (b"abc", b"defg")


@pytest.mark.failure_mode("reuse-during-write", "abort-not-propagated")
@pytest.mark.invariant("no-early-reuse")
@pytest.mark.parametrize("offset", [1000, 0, 2**40])
def test_a_frame_for_a_closed_ticket_is_answered_and_lands_nowhere(server: Server, offset: int) -> None:
    """A revocation crosses a write: no violation, and the connection stays open."""
    sock = server.greeted()
    data = frame((offset, 700_000), ticket=CLOSED_TICKET) + b"x" * 700_000
    sock.sendall(data)
    assert frames.decode_ack(read(sock, frames.ACK_BYTES)) == (CLOSED_TICKET, 0, False)
    send_in_single_bytes(sock, frame((offset, 70), ticket=CLOSED_TICKET) + b"x" * 70)
    assert frames.decode_ack(read(sock, frames.ACK_BYTES)) == (CLOSED_TICKET, 0, False)
    assert server.is_untouched()
    sock.sendall(frame((1000, 4)) + b"good")
    assert frames.decode_ack(read(sock, frames.ACK_BYTES)) == (TICKET, 0, True)
    assert server.memory[1000:1004] == b"good"


@pytest.mark.failure_mode("frozen-peer-holds-blocks", "lease-shorter-than-write")
@pytest.mark.invariant("no-early-reuse")
def test_revoke_neither_waits_for_a_silent_peer_nor_lets_its_rest_in(server: Server) -> None:
    """A peer stops within a frame; the late rest of the frame lands nowhere."""
    sock = server.greeted()
    sock.sendall(frame((1000, 4), (1990, 10)) + b"late")
    while server.memory[1000:1004] != b"late":
        pass
    assert server.inbound.revoke(TICKET)
    sock.sendall(b"z" * 10)
    assert frames.decode_ack(read(sock, frames.ACK_BYTES)) == (TICKET, 0, False)
    assert server.memory[1990:2000] == b"\xee" * 10
    assert server.serves()


@pytest.mark.failure_mode("exception-ends-thread")
def test_a_peer_that_does_not_read_its_answers_is_dropped(server: Server) -> None:
    """It must not block the thread that serves all other peers."""
    sock = socket.socket()
    server.sockets.append(sock)
    sock.settimeout(20)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    sock.connect(("127.0.0.1", server.target.port))
    sock.sendall(encode_hello(frames.HELLO, server.target.nonce, 77))
    with pytest.raises((BrokenPipeError, ConnectionResetError)):
        sock.sendall(frame(ticket=CLOSED_TICKET) * 2_000_000)
    assert server.serves()
