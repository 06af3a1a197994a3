"""The receiver's side of one connection: what it waits for next, and where those bytes go.

A frame whose ticket is not open is no violation, since a revocation may cross it: its bytes are read into a
scratch buffer and it is answered REFUSED. All else that the wire format or the ticket does not allow raises,
and the caller drops the connection. Every call comes from the thread of
:class:`~embedwire.transports.tcp.inbound.TcpInbound`.
"""

from __future__ import annotations

import hmac
import socket
from collections import deque
from collections.abc import Callable
from itertools import islice

from embedwire.errors import ProtocolViolation
from embedwire.transports.tcp import frames
from embedwire.transports.tickets import Tickets

_BUFFERS_PER_CALL = 256
"""Below IOV_MAX, which is 1024 on Linux."""
_READS_PER_TURN = 8
"""So that one busy connection does not starve the others."""


class Connection:
    """One sender's stream. ``sender_token`` is None until its greeting was right."""

    def __init__(self, sock: socket.socket, *, region: memoryview, tickets: Tickets, nonce: bytes) -> None:
        self.sock = sock
        self.sender_token: int | None = None
        self._region = region
        self._tickets = tickets
        self._nonce = nonce
        self._into: deque[memoryview] = deque()
        self._then: Callable[[], None] = lambda: None
        self._writes_under = (
            0  # the ticket whose frame is landing right now; 0: what comes does not go into the region
        )
        self._ticket = self._number = 0
        self._expect(frames.HELLO_BYTES, self._on_hello)

    def on_readable(self) -> None:
        """Take in what has come. Raises EOFError or OSError at its end, ProtocolViolation for a bad peer."""
        for _ in range(_READS_PER_TURN):
            if not self._receive():
                return

    def close(self) -> None:
        """Close the socket and let go of the region."""
        self.sock.close()
        self._into.clear()
        self._then = lambda: (
            None
        )  # it refers back to this object, and the region must not wait for the collector

    def _receive(self) -> bool:
        with self._tickets.lock:
            if self._writes_under and not self._tickets.is_open(self._writes_under):
                self._divert()
            try:
                nbytes = self.sock.recvmsg_into(list(islice(self._into, _BUFFERS_PER_CALL)))[0]
            except (BlockingIOError, InterruptedError):
                return False
        if not nbytes:
            raise EOFError
        frames.advance(self._into, nbytes)
        while not self._into:
            self._then()
        return True

    def _expect(self, nbytes: int, then: Callable[[bytes], None]) -> None:
        buffer = bytearray(nbytes)
        self._into.append(memoryview(buffer))
        self._then = lambda: then(bytes(buffer))

    def _on_hello(self, data: bytes) -> None:
        nonce, sender_token = frames.decode_hello(data)
        if not hmac.compare_digest(nonce, self._nonce) or not 1 <= sender_token <= 2**62:
            raise ProtocolViolation("a greeting for another region")
        self.sender_token = sender_token
        self._send(frames.WELCOME)
        self._expect(frames.HEADER_BYTES, self._on_header)

    def _on_header(self, data: bytes) -> None:
        self._ticket, self._number, pieces = frames.decode_header(data)
        if pieces:
            self._expect(pieces * frames.PIECE_BYTES, self._on_table)
        else:
            self._on_table(b"")

    def _on_table(self, data: bytes) -> None:
        table = frames.decode_table(data)
        with self._tickets.lock:
            is_open = self._tickets.is_open(self._ticket)
            if is_open and not self._tickets.covers(self._ticket, table):
                raise ProtocolViolation(
                    f"ticket {self._ticket} does not cover the pieces of frame {self._number}"
                )
        self._writes_under = self._ticket if is_open else 0
        if is_open:
            self._into.extend(self._region[offset : offset + length] for offset, length in table)
        else:
            self._discard(sum(length for _, length in table))
        self._then = self._on_frame

    def _on_frame(self) -> None:
        verdict = frames.LANDED if self._writes_under else frames.REFUSED
        self._writes_under = 0
        self._send(frames.encode_ack(self._ticket, self._number, verdict=verdict))
        self._expect(frames.HEADER_BYTES, self._on_header)

    def _divert(self) -> None:
        """The ticket was closed while its frame came in: the rest goes nowhere."""
        left = sum(len(view) for view in self._into)
        self._into.clear()
        self._writes_under = 0
        self._discard(left)

    def _discard(self, nbytes: int) -> None:
        self._into.extend(
            _SCRATCH[: min(len(_SCRATCH), nbytes - at)] for at in range(0, nbytes, len(_SCRATCH))
        )

    def _send(self, data: bytes) -> None:
        # A peer that keeps to the protocol has few answers under way, so they always fit into the socket's
        # buffer.
        try:
            sent = self.sock.send(data)
        except BlockingIOError:
            sent = 0
        if sent < len(data):
            raise ProtocolViolation("the peer does not read its answers")


_SCRATCH = memoryview(bytearray(256 * 1024))
