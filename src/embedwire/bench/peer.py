"""The sending side of a measurement, as a process of its own: offers rooms, and streams the baseline's bytes.

Driven through a pipe by ``bench.transfer``, which holds the clock; it ends when that pipe does. It must not know what is compared
with what.
"""

from __future__ import annotations

import multiprocessing
import signal
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection

from embedwire.bench.host import UnusableTransport
from embedwire.bench.payload import Payload, layout
from embedwire.endpoint import SenderEndpoint
from embedwire.errors import EmbedwireError, TransportError

HOST = "127.0.0.1"
ANSWER_WAIT_S = 60.0


@dataclass(frozen=True, slots=True)
class Ready:
    """Where the child can be reached: its control address, and the port that streams the baseline's bytes."""

    control_address: str
    stream_port: int


class Peer:
    """The child as its parent sees it."""

    def __init__(self, pipe: Connection, transport: str) -> None:
        """Raises UnusableTransport when the child cannot send over ``transport``."""
        self._pipe = pipe
        ready = self._answer()
        if not isinstance(ready, Ready):
            raise UnusableTransport(transport, ready)
        self.control_address = ready.control_address
        self.stream = socket.create_connection((HOST, ready.stream_port))
        self.stream.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def prepare(self, room: int, *, readers: int) -> None:
        """Fill the source with the room's payload, and offer it to so many ranks; 0 when only the stream is going to be read. Returns when
        that is done."""
        self._pipe.send((room, readers))
        self._answer()

    def _answer(self) -> object:
        try:
            if self._pipe.poll(ANSWER_WAIT_S):
                return self._pipe.recv()
        except (EOFError, OSError):
            pass
        raise TransportError("the sending process of the measurement has ended, or does not answer")


@contextmanager
def peer(*, tokens: int, token_bytes: int, transport: str) -> Iterator[Peer]:
    """A child that sends rooms of this size over one wire, for as long as the block runs."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_run, args=(theirs, tokens, token_bytes, transport), daemon=True)
    process.start()
    theirs.close()
    try:
        child = Peer(ours, transport)
        with child.stream:
            yield child
    finally:
        ours.close()
        process.join(10)
        process.kill()


def _run(pipe: Connection, tokens: int, token_bytes: int, transport: str) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides when it is over
    try:
        endpoint = SenderEndpoint(
            layout(token_bytes), host=HOST, transports=(transport,), memory_bytes=2 * tokens * token_bytes
        )
    except EmbedwireError as error:
        pipe.send(str(error))
        return
    with socket.create_server((HOST, 0)) as listener, endpoint as sender:
        pipe.send(Ready(sender.address, listener.getsockname()[1]))
        stream, _ = listener.accept()
        with stream, suppress(EOFError):
            _serve(pipe, stream, sender, Payload(tokens, token_bytes))


def _serve(pipe: Connection, stream: socket.socket, sender: SenderEndpoint, payload: Payload) -> None:
    stream.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    offer = None
    while True:
        room, readers = pipe.recv()
        if offer is not None:
            offer.result(ANSWER_WAIT_S)  # the source must not change before the room before has ended
            offer = None
        rows = payload.fill(room)
        if readers:
            offer = sender.offer(room, total_tokens=len(rows), readers=readers)
            offer.fill({"embeddings": rows})
            sender.stats()  # behind the fill in the driver's queue: it is done when this returns
        pipe.send(None)
        if not readers and stream.recv(1):
            stream.sendall(rows.data)
