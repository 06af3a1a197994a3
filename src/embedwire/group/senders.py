"""The senders of one encoder's ranks, which offer the same rooms, each to send its part.

Rank 0 decides what is offered, and what nobody wants any more; its ``LeadingSender`` tells the others, whose ``FollowingSender`` does the
same. Otherwise rooms end on each rank by themselves, since a receiver that loses one part gives up the others. Any thread; a following
sender brings one of its own.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from functools import partial
from typing import Any

import msgspec
import numpy as np
import zmq

from embedwire.endpoint.event_loop import EventLoop
from embedwire.endpoint.offer import Offer
from embedwire.endpoint.sender import SenderEndpoint
from embedwire.errors import EmbedwireError, OverloadedError, TransferError
from embedwire.protocol.messages import Cause

logger = logging.getLogger(__name__)

Key = tuple[int, int]
"""Room and attempt."""


class _Offered(msgspec.Struct, frozen=True, array_like=True, tag=True):
    room: int
    attempt: int
    total_tokens: int
    aux: tuple[int, ...]
    content_hash: bytes
    readers: int

    @property
    def key(self) -> Key:
        return self.room, self.attempt


class _Failed(msgspec.Struct, frozen=True, array_like=True, tag=True):
    room: int
    attempt: int
    cause: Cause
    detail: str


_decode = msgspec.msgpack.Decoder(_Offered | _Failed).decode


class LeadingSender:
    """Rank 0's. ``addresses`` are the control addresses of all ranks in order, ``others`` where the following senders listen."""

    def __init__(self, endpoint: SenderEndpoint, *, addresses: Sequence[str], others: Sequence[str]) -> None:
        self.addresses = tuple(addresses)
        self._endpoint = endpoint
        self._lock = threading.Lock()
        self._context = zmq.Context()
        self._sockets = [self._context.socket(zmq.PUSH) for _ in others]
        for socket, address in zip(self._sockets, others, strict=True):
            socket.setsockopt(zmq.SNDHWM, 0)  # the rooms that may be offered at a time are bounded
            socket.setsockopt(zmq.LINGER, 0)
            socket.connect(address)
        self._is_open = True

    def offer(
        self,
        room: int,
        *,
        total_tokens: int,
        attempt: int = 0,
        aux: Sequence[int] = (),
        content_hash: bytes = b"",
        readers: int = 1,
    ) -> Offer:
        """As :meth:`SenderEndpoint.offer`, on all ranks. What it returns is this rank's."""
        offer = self._endpoint.offer(
            room,
            total_tokens=total_tokens,
            attempt=attempt,
            aux=aux,
            content_hash=content_hash,
            readers=readers,
        )
        self._tell(_Offered(room, attempt, total_tokens, tuple(aux), content_hash, readers))
        offer.add_done_callback(partial(self._on_end, room, attempt))
        return offer

    def _on_end(self, room: int, attempt: int, offer: Future[Any]) -> None:
        """There may be no receiver yet to give up the other parts of a room that has failed here. They end with the same cause."""
        if isinstance(error := offer.exception(), TransferError):
            self._tell(_Failed(room, attempt, Cause(error.cause), error.detail))

    def _tell(self, told: _Offered | _Failed) -> None:
        frame = msgspec.msgpack.encode(told)
        with self._lock:
            for socket in self._sockets if self._is_open else ():
                socket.send(frame)

    def __enter__(self) -> LeadingSender:
        return self

    def __exit__(self, *raised: object) -> None:
        with self._lock:
            self._is_open = False
            self._context.destroy(linger=0)


class FollowingSender:
    """Another rank's: offers at ``endpoint`` what it hears of at ``address`` (``ipc://``), in order.

    A room waits for memory that rooms before it still hold here, for ``memory_wait_s`` at most, as it did on rank 0.
    """

    def __init__(self, endpoint: SenderEndpoint, *, address: str, memory_wait_s: float) -> None:
        self._loop = EventLoop(
            "embedwire-offers", on_frames=self._on_frames, on_time=self._on_time, next_due=self._next_due
        )
        self._endpoint = endpoint
        self._memory_wait_s = memory_wait_s
        self._line: deque[tuple[_Offered, float]] = deque()
        self._changed = threading.Condition()
        self._open: dict[Key, Offer] = {}
        # Which nobody has filled; None: not offered here.
        self._offers: OrderedDict[Key, Offer | None] = OrderedDict()
        self._socket = self._loop.socket(zmq.PULL)
        self._socket.setsockopt(zmq.RCVHWM, 0)
        self._socket.bind(address)
        self._loop.register(self._socket)
        self._loop.start()

    def fill(self, key: Key, arrays: Mapping[str, np.ndarray]) -> None:
        """The source of a room is ready; waits until the room is offered here. Harmless for one that is over."""
        with self._changed:
            self._changed.wait_for(lambda: key in self._offers, 2 * self._memory_wait_s)
            offer = self._offers.pop(key, None)
        if offer is not None:
            offer.fill(arrays)

    def close(self) -> None:
        """End the thread. Idempotent."""
        self._loop.close(self._loop.stop)

    def __enter__(self) -> FollowingSender:
        return self

    def __exit__(self, *raised: object) -> None:
        self.close()

    # ------------------------------------------------------------------ the driver's thread

    def _on_frames(self, socket: zmq.Socket[bytes], frames: list[list[bytes]]) -> None:
        until = time.monotonic() + self._memory_wait_s
        for frame in frames:
            told = _decode(frame[-1])
            if isinstance(told, _Offered):
                self._line.append((told, until))
            else:
                self._give_up(told)

    def _give_up(self, failed: _Failed) -> None:
        key = (failed.room, failed.attempt)
        if key in self._open:
            self._open[key].end(failed.cause, failed.detail)
        for place in [place for place in self._line if place[0].key == key]:
            self._line.remove(place)
            self._enter(key, None)

    def _next_due(self) -> float | None:
        return self._line[0][1] if self._line else None

    def _on_time(self, now: float) -> None:
        """After every turn, so also when a room has ended."""
        while self._line:
            offered, until = self._line[0]
            offer: Offer | None = None
            try:
                offer = self._offer(offered)
            except OverloadedError as error:
                if now < until:
                    return
                logger.warning("room %d is not offered here: %s", offered.room, error)
            except EmbedwireError as error:
                logger.warning("room %d is not offered here: %s", offered.room, error)
            self._line.popleft()
            self._enter(offered.key, offer)

    def _enter(self, key: Key, offer: Offer | None) -> None:
        with self._changed:
            self._offers[key] = offer
            if len(self._offers) > self._endpoint.limits.rooms_max:  # over before their turn in the tower
                self._offers.popitem(last=False)
            self._changed.notify_all()

    def _offer(self, offered: _Offered) -> Offer:
        offer = self._endpoint.offer(
            offered.room,
            total_tokens=offered.total_tokens,
            attempt=offered.attempt,
            aux=offered.aux,
            content_hash=offered.content_hash,
            readers=offered.readers,
        )
        self._open[offered.key] = offer
        offer.add_done_callback(lambda _: self._loop.post(lambda: self._forget(offered.key)))
        return offer

    def _forget(self, key: Key) -> None:
        """A room is over. There may be memory for the next one after this turn."""
        self._open.pop(key, None)
