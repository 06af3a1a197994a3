"""The sending half of the tcp wire: sessions, each a few connections to one region.

A session that broke in a write connects again at its next write. Closing one is a handshake too: both ends
have closed when ``close`` returns, unless the receiver is stopped, and then nothing but its own ``revoke``
can fence it.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterable
from typing import ClassVar

from embedwire.errors import ConfigurationError, ProtocolViolation, TransportError
from embedwire.transports.contract import Outbound, Outcome, RemoteRegion, Slice
from embedwire.transports.pieces import check_sender_token, check_ticket
from embedwire.transports.tcp import frames
from embedwire.transports.tcp.stream import Stream, open_stream
from embedwire.transports.tcp.writing import CLOSE_WAIT_S, Write

STREAMS = 2


class TcpRegion(RemoteRegion):
    """One session: ``streams`` connections under one sender token."""

    def __init__(
        self,
        target: frames.Descriptor,
        *,
        sender_token: int,
        streams: int,
        timeout_s: float,
        on_close: Callable[[TcpRegion], None],
    ) -> None:
        self._target = target
        self._sender_token = sender_token
        self._streams_wanted = streams
        self._on_close = on_close
        self._streams: list[Stream] = []
        self._busy = threading.Lock()  # held by a write, and by the end of close()
        self._closing = threading.Lock()  # taken once, by the first close()
        self._connect(timeout_s)
        self._wake_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)

    def write(
        self,
        ticket: int,
        slices: Iterable[Slice],
        *,
        is_permitted: Callable[[], bool],
        on_landed: Callable[[int], None],
        timeout_s: float,
    ) -> Outcome:
        """See the contract. LOST also when no connection could be had, and UNKNOWN when one broke on the
        way."""
        check_ticket(ticket)
        with self._busy:
            if self._closing.locked() or not self._is_connected(timeout_s):
                return Outcome.LOST
            write = Write(
                self._streams,
                slices,
                ticket=ticket,
                region_bytes=self._target.nbytes,
                is_permitted=is_permitted,
                on_landed=on_landed,
                wake_fd=self._wake_fd,
            )
            try:
                return write.run(timeout_s)
            finally:
                if not all(stream.is_fresh() for stream in self._streams):
                    self._drop()

    def close(self) -> bool:
        """See the contract. True in any case: what a stopped receiver still has in its sockets is fenced by its own ``revoke``, before
        it can use the memory again."""
        if not self._closing.acquire(blocking=False):
            with self._busy:
                return True
        os.eventfd_write(self._wake_fd, 1)
        with self._busy:
            self._part()
            self._drop()
            os.close(self._wake_fd)
        self._on_close(self)
        return True

    def _is_connected(self, timeout_s: float) -> bool:
        if self._streams and all(stream.is_fresh() for stream in self._streams):
            return True
        self._drop()
        try:
            self._connect(timeout_s)
        except TransportError:
            return False
        return True

    def _connect(self, timeout_s: float) -> None:
        deadline_s = time.monotonic() + timeout_s
        try:
            for _ in range(self._streams_wanted):
                stream = open_stream(
                    self._target,
                    self._sender_token,
                    deadline_s=deadline_s,
                    is_closing=self._closing.locked,
                )
                self._streams.append(stream)
        except BaseException:
            self._drop()
            raise

    def _part(self) -> None:
        """Tell the receiver that this is the end, and see it close its own, within CLOSE_WAIT_S."""
        deadline_s = time.monotonic() + CLOSE_WAIT_S
        for stream in self._streams:
            stream.finish()
        for stream in self._streams:
            try:
                while not stream.has_ended:
                    stream.sock.settimeout(max(0.001, deadline_s - time.monotonic()))
                    for _ in stream.receive():
                        pass
            except (OSError, ProtocolViolation):
                continue  # broken, or stopped; the reset that follows is all that is left to do

    def _drop(self) -> None:
        while self._streams:
            self._streams.pop().close()


class TcpOutbound(Outbound):
    """Connects to regions on any host, each with ``streams`` connections. ``host`` is not needed to send."""

    name: ClassVar[str] = "tcp"

    def __init__(self, *, host: str, streams: int = STREAMS) -> None:
        if streams < 1:
            raise ConfigurationError(f"a session needs at least one stream, not {streams}")
        self._streams = streams
        self._regions: set[TcpRegion] = set()

    def connect(self, descriptor: bytes, *, sender_token: int, timeout_s: float) -> TcpRegion:
        check_sender_token(sender_token)
        region = TcpRegion(
            frames.decode_descriptor(descriptor),
            sender_token=sender_token,
            streams=self._streams,
            timeout_s=timeout_s,
            on_close=self._regions.discard,
        )
        self._regions.add(region)
        return region

    def close(self) -> None:
        for region in tuple(self._regions):
            region.close()
