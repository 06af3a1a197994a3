"""Rooms on their way in, as whoever opened them holds them, and what they become."""

from __future__ import annotations

import time
import weakref
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from embedwire.endpoint.stats import ReceiveReport
from embedwire.errors import TransferError, UsageError
from embedwire.memory.checksum import FieldDigests
from embedwire.memory.layout import Rows
from embedwire.protocol.messages import Cause, RoomKey
from embedwire.protocol.receiver_core import ReceiverCore, Room

if TYPE_CHECKING:
    from embedwire.endpoint.receiver import ReceiverEndpoint

Arrays = Mapping[str, np.ndarray]
MakeAssembly = Callable[[int], Arrays]
"""Called with total_tokens, on the driver's thread: one C-contiguous array (total_tokens, *field.shape) a field."""


@dataclass(frozen=True)
class Received:
    """A whole embedding. ``arrays``: field name to array (total_tokens, *field.shape); ``aux``: sixteen int32, the first is the total.

    The memory stays reserved until :meth:`release`, or until nobody holds the arrays any more.
    """

    room: int
    attempt: int
    arrays: Arrays = field(repr=False)
    aux: tuple[int, ...]
    report: ReceiveReport
    _release: Callable[[], None] = field(repr=False, compare=False)

    def release(self) -> None:
        """Say that the arrays are no longer needed. Idempotent."""
        self._release()


class Reception(Future[Received]):
    """One room on its way in: a future of the whole embedding, or of a TransferError with the cause. Any thread; the endpoint does the
    work.

    Callbacks run on the driver's thread, where they must not block.
    """

    def __init__(self, endpoint: ReceiverEndpoint, key: RoomKey, make_assembly: MakeAssembly) -> None:
        super().__init__()
        self.set_running_or_notify_cancel()
        self.key = key
        self._endpoint = endpoint
        self.make_assembly = make_assembly
        self.arrays: Arrays = {}
        self.rows: tuple[Rows, ...] = ()  # the same as bytes, checked
        self.sums: defaultdict[RoomKey, FieldDigests] = defaultdict(partial(FieldDigests, endpoint.layout))

    def cancel(self, detail: str = "the client no longer wants it") -> bool:
        """End the room on both sides, with cause ``aborted``; False when it has ended already."""
        if self.done():
            return False
        self._endpoint._cancel(self.key, detail)
        return True


class Receptions:
    """Those of one endpoint, by room, until they end. Owns the count of how they did. The driver's thread, but for ``bool``.

    ``on_released`` and ``on_left`` are called on any thread: for a room whose arrays nobody needs, and for one whose arrays are gone.
    """

    def __init__(
        self,
        endpoint: ReceiverEndpoint,
        core: ReceiverCore,
        *,
        on_released: Callable[[Room], None],
        on_left: Callable[[Room], None],
    ) -> None:
        self._endpoint = endpoint
        self._core = core
        self._on_released = on_released
        self._on_left = on_left
        self._open: dict[RoomKey, Reception] = {}
        self.ended: Counter[str] = Counter()
        """By cause, since the start."""

    def __bool__(self) -> bool:
        return bool(self._open)

    def __contains__(self, key: RoomKey) -> bool:
        return key in self._open

    def __getitem__(self, key: RoomKey) -> Reception:
        return self._open[key]

    def expect(self, key: RoomKey, make_assembly: MakeAssembly | None = None) -> Reception:
        """That of a room that is about to be opened."""
        make_assembly = make_assembly or self._endpoint.layout.empty
        reception = self._open[key] = Reception(self._endpoint, key, make_assembly)
        return reception

    def assemble(self, key: RoomKey, total_tokens: int, *, make_assembly: MakeAssembly | None) -> None:
        """Make the arrays that a room lands in, as told or as its owner wants them. Raises UsageError where they do not fit."""
        reception = self._open[key]
        reception.arrays = (make_assembly or reception.make_assembly)(total_tokens)
        reception.rows = self._endpoint.layout.rows(reception.arrays)
        if len(reception.rows[0]) != total_tokens:
            raise UsageError(f"an assembly of {len(reception.rows[0])} rows for {total_tokens} tokens")
        if not all(array.flags.writeable for array in reception.arrays.values()):
            raise UsageError("an assembly that can not be written to")

    def deliver(
        self, room: Room, *, arrays: Arrays | None = None, aux: tuple[int, ...] | None = None
    ) -> None:
        """A room is where it is read: where it landed, or in ``arrays``, with ``aux``, that another rank has filled."""
        key = room.key
        report = _report(
            room, readers=len(self._core.group.readers), token_bytes=self._endpoint.layout.token_bytes
        )
        reception = self._open.pop(key)
        if arrays is None or aux is None:
            announced = next(iter(room.lanes.values())).announced
            assert announced is not None
            arrays, aux = reception.arrays, announced.aux
        received = Received(key.room, key.attempt, arrays, aux, report, partial(self._on_released, room))
        _when_gone(arrays, partial(self._on_left, room))
        self.ended[Cause.DONE.value] += 1
        reception.arrays, reception.rows = {}, ()
        reception.set_result(received)

    def give_up(self, key: RoomKey, cause: Cause, detail: str) -> None:
        """A room ends without its embedding."""
        self.ended[cause.value] += 1
        self._open.pop(key).set_exception(TransferError(cause.value, detail))


def _report(room: Room, *, readers: int, token_bytes: int) -> ReceiveReport:
    lanes, now = list(room.lanes.values()), time.monotonic()
    if not lanes:
        return ReceiveReport(total_tokens=room.total_tokens, readers=readers)
    announced = lanes[0].announced
    assert announced is not None
    granted_at = min(lane.granted_at for lane in lanes)
    return ReceiveReport(
        total_tokens=room.total_tokens,
        rounds=tuple(tokens for lane in lanes for tokens in lane.round_sizes),
        bytes=sum(lane.total_tokens for lane in lanes) * token_bytes,
        transport=lanes[0].wire,
        source_ms=announced.source_ms,
        wait_ms=(granted_at - max(lane.ready_at for lane in lanes)) * 1000,
        transfer_ms=(now - granted_at) * 1000,
        content_hash=announced.content_hash,
        readers=readers,
    )


def _when_gone(arrays: Arrays, then: Callable[[], None]) -> None:
    """Call ``then`` when the last of the arrays is collected."""
    left = [len(arrays)]

    def one_less() -> None:
        left[0] -= 1
        if not left[0]:
            then()

    for array in arrays.values():
        weakref.finalize(array, one_less).atexit = False
