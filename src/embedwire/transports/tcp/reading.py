"""The receiver's side of one tcp session: what it waits for next, and where those bytes go.

A frame whose ticket is not open is no violation, since a revocation may cross it: its bytes are read into a
scratch buffer and it is answered REFUSED. All else that the wire format or the ticket does not allow raises,
and the listener, on whose thread every call comes, drops the connection.
"""

from __future__ import annotations

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


class FrameReader:
    """Reads the frames of one session into the region, as far as its tickets allow."""

    def __init__(self, sock: socket.socket, *, region: memoryview, tickets: Tickets) -> None:
        self._sock = sock
        self._region = region
        self._tickets = tickets
        self._into: deque[memoryview] = deque()
        self._writes_under = 0
        """The ticket whose frame is landing now; 0: what arrives does not go into the region."""
        self._ticket = self._number = 0
        self._expect(frames.HEADER_BYTES, FrameReader._on_header)

    def on_readable(self) -> None:
        """Take in what has come. Raises EOFError or OSError at its end, ProtocolViolation for a bad peer."""
        for _ in range(_READS_PER_TURN):
            if not self._receive():
                return

    def _receive(self) -> bool:
        with self._tickets.lock:
            if self._writes_under and not self._tickets.is_open(self._writes_under):
                self._divert()
            try:
                nbytes = self._sock.recvmsg_into(list(islice(self._into, _BUFFERS_PER_CALL)))[0]
            except (BlockingIOError, InterruptedError):
                return False
        if not nbytes:
            raise EOFError("end of stream")
        frames.advance(self._into, nbytes)
        while not self._into:
            self._then(self)
        return True

    def _expect(self, nbytes: int, then: Callable[[FrameReader], None]) -> None:
        self._head = bytearray(nbytes)
        if nbytes:
            self._into.append(memoryview(self._head))
        self._then: Callable[[FrameReader], None] = (
            then  # not bound: a cycle would delay the release of the region
        )

    def _on_header(self) -> None:
        self._ticket, self._number, pieces = frames.decode_header(bytes(self._head))
        self._expect(pieces * frames.PIECE_BYTES, FrameReader._on_table)

    def _on_table(self) -> None:
        table = frames.decode_table(bytes(self._head))
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
        self._then = FrameReader._on_frame

    def _on_frame(self) -> None:
        verdict = frames.LANDED if self._writes_under else frames.REFUSED
        self._writes_under = 0
        self._send(frames.encode_ack(self._ticket, self._number, verdict=verdict))
        self._expect(frames.HEADER_BYTES, FrameReader._on_header)

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
            sent = self._sock.send(data)
        except BlockingIOError:
            sent = 0
        if sent < len(data):
            raise ProtocolViolation("the peer does not read its answers")


_SCRATCH = memoryview(bytearray(256 * 1024))
