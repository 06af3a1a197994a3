"""The sender's side of one connection: frames out, answers in. Owns one socket that never blocks.

Called by the thread that runs the write, or that closes the session while no write runs.
"""

from __future__ import annotations

import socket
import struct
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from itertools import islice

from embedwire.errors import ProtocolViolation, TransportError
from embedwire.transports.sockets import connect, encode_hello, receive
from embedwire.transports.tcp import frames

FRAMES_AHEAD = 2
"""Begin no further slice while this many frames of the stream are without an answer."""
_BUFFERS_PER_CALL = 256
_RESET_ON_CLOSE = struct.pack("ii", 1, 0)


class Stream:
    """A greeted connection. Frames are answered in the order in which they were sent."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self.has_ended = False
        """The receiver has closed its end, so nothing more of this stream can land."""
        self._out: deque[memoryview] = deque()
        self._awaited: deque[tuple[int, int, int]] = (
            deque()
        )  # ticket, frame, the slice it completes (0: none)
        self._answers = bytearray()
        self._is_finishing = False

    @property
    def awaited(self) -> int:
        """Frames without an answer."""
        return len(self._awaited)

    @property
    def can_begin(self) -> bool:
        return not (self.has_ended or self._out or len(self._awaited) >= FRAMES_AHEAD)

    @property
    def is_settled(self) -> bool:
        """All that this stream sent is answered, or never will be: nothing of it can land later. One that was
        told to finish is settled only when the receiver has closed its end too."""
        return self.has_ended or not (self._awaited or self._is_finishing)

    @property
    def wants_to_send(self) -> bool:
        return bool(self._out)

    def begin(
        self, ticket: int, number: int, *, batches: Sequence[list[frames.Run]], slice_number: int
    ) -> None:
        """Queue the frames of one slice, the first of them numbered ``number``."""
        for at, runs in enumerate(batches, 1):
            self._out.extend(frames.encode_frame(ticket, number + at - 1, runs))
            self._awaited.append((ticket, number + at - 1, slice_number if at == len(batches) else 0))

    def send(self) -> bool:
        """Hand the kernel what it takes now. True: it took something."""
        moved = False
        while self._out:
            try:
                nbytes = self.sock.sendmsg(list(islice(self._out, _BUFFERS_PER_CALL)))
            except (BlockingIOError, InterruptedError):
                break
            frames.advance(self._out, nbytes)
            moved = True
        return moved

    def receive(self) -> Iterator[tuple[int, bool]]:
        """The answers that have come, as (slice that the frame completes or 0, whether it landed). Sets
        ``has_ended``.

        Raises OSError when the connection broke, ProtocolViolation for an answer to nothing.
        """
        try:
            data = self.sock.recv(4096)
        except (BlockingIOError, InterruptedError):
            return
        if not data:
            self.has_ended = True
            self._out.clear()
        self._answers += data
        while len(self._answers) >= frames.ACK_BYTES:
            ticket, number, has_landed = frames.decode_ack(bytes(self._answers[: frames.ACK_BYTES]))
            del self._answers[: frames.ACK_BYTES]
            if not self._awaited or self._awaited[0][:2] != (ticket, number):
                raise ProtocolViolation(
                    f"an answer names frame {number} of ticket {ticket}, which is not the next"
                )
            yield self._awaited.popleft()[2], has_landed

    def is_fresh(self) -> bool:
        """Usable for a next write: nothing is under way, and nothing has come from the other end, not even
        its end."""
        if self.has_ended or self._awaited or self._out:
            return False
        try:
            self.sock.recv(1, socket.MSG_PEEK)
        except BlockingIOError:
            return True
        except OSError:
            pass
        return False

    def finish(self) -> None:
        """Send nothing more. The receiver answers by closing its end, after it has read what was under
        way."""
        self._out.clear()
        self._is_finishing = True
        with suppress(OSError):  # broken already, as the next receive will say
            self.sock.shutdown(socket.SHUT_WR)

    def close(self) -> None:
        """Close the socket; what the kernel has not sent by now is discarded instead of being sent later."""
        if not self.has_ended:
            self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET_ON_CLOSE)
        self.sock.close()


def open_stream(
    target: frames.Descriptor, sender_token: int, *, deadline_s: float, is_closing: Callable[[], bool]
) -> Stream:
    """Connect and greet until ``deadline_s`` of the monotonic clock, or until ``is_closing``. Raises TransportError."""
    hello = encode_hello(frames.HELLO, target.nonce, sender_token)
    sock = connect(target.host, target.port, hello, deadline_s=deadline_s)
    try:
        welcome = receive(sock, len(frames.WELCOME), deadline_s=deadline_s, is_closing=is_closing)
        if welcome != frames.WELCOME:
            raise ProtocolViolation("it is not the region that was described")
        sock.setblocking(False)
    except (OSError, EOFError, ProtocolViolation) as error:
        sock.close()
        raise TransportError(f"no welcome from {target.host}:{target.port}: {error}") from error
    return Stream(sock)
