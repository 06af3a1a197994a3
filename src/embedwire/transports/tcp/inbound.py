"""The receiving half of the tcp transport: its sessions are read on the listener's thread, straight into the region.

One thread suffices for all of them: it does little but ``recv``, which runs without the interpreter lock. The endpoint's thread changes
tickets and calls ``is_gone``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import ClassVar

import msgspec

from embedwire.errors import UsageError
from embedwire.transports.listener import Connection
from embedwire.transports.pieces import check_spans, check_ticket
from embedwire.transports.region import ListeningInbound
from embedwire.transports.tcp import frames
from embedwire.transports.tcp.reading import FrameReader
from embedwire.transports.tickets import Tickets


class TcpInbound(ListeningInbound):
    name: ClassVar[str] = "tcp"
    is_fenced: ClassVar[bool] = True
    magic: ClassVar[bytes] = frames.HELLO
    sessions_max: ClassVar[int] = 1024

    def __init__(self, *, host: str) -> None:
        super().__init__(host=host)
        self._tickets = Tickets()

    def permit(self, ticket: int, spans: Sequence[tuple[int, int]]) -> None:
        if self._listener is None:
            raise UsageError("permit() before allocate()")
        check_ticket(ticket)
        check_spans(spans, self._region.nbytes)
        self._tickets.permit(ticket, spans)

    def revoke(self, ticket: int) -> bool:
        self._tickets.revoke(ticket)
        return True

    def _describe(self, port: int, nonce: bytes) -> bytes:
        return msgspec.msgpack.encode(frames.Descriptor(self._host, port, nonce, self._region.nbytes))

    def _begin_session(self, session: Connection) -> Callable[[], None]:
        reader = FrameReader(session.sock, region=self._region, tickets=self._tickets)
        session.sock.send(frames.WELCOME)  # the empty buffer of a new socket takes it whole
        return reader.on_readable
