"""Rooms on their way in, as whoever opened them holds them, and what they become."""

from __future__ import annotations

import logging
import time
import weakref
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import partial

import numpy as np

from embedwire.endpoint.room_log import ended_as, log_end, progress_of
from embedwire.endpoint.stats import ReceiveReport
from embedwire.errors import TransferError, UsageError
from embedwire.memory.checksum import FieldDigests
from embedwire.memory.layout import Layout, Rows
from embedwire.protocol.actions import Address, Drain, Finished, RoomReport
from embedwire.protocol.messages import Cause, RoomKey

logger = logging.getLogger(__name__)

Arrays = Mapping[str, np.ndarray]
MakeAssembly = Callable[[int], Arrays]
"""Called with total_tokens, on the driver's thread: one C-contiguous array (total_tokens, *field.shape) a field."""
OnCancel = Callable[[RoomKey, str], None]


@dataclass(frozen=True, repr=False)
class Received:
    """A whole embedding. ``arrays``: field name to array (total_tokens, *field.shape); ``aux``: sixteen int32, the first is the total.

    The memory stays reserved until :meth:`release`, or until nobody holds the arrays any more.
    """

    room: int
    attempt: int
    arrays: Arrays
    aux: tuple[int, ...]
    report: ReceiveReport
    _release: Callable[[], None] = field(compare=False)

    def __repr__(self) -> str:
        report = self.report
        progress = progress_of(report.total_tokens, report.total_tokens, len(report.rounds))
        return f"<Received room={self.room} attempt={self.attempt} {progress} transport={report.transport}>"

    def release(self) -> None:
        """Say that the arrays are no longer needed. Idempotent."""
        self._release()


class Reception(Future[Received]):
    """One room on its way in: a future of the whole embedding, or of a TransferError with the cause. Any thread; the endpoint does the
    work.

    Callbacks run on the driver's thread, where they must not block.
    """

    def __init__(
        self, layout: Layout, key: RoomKey, make_assembly: MakeAssembly, *, on_cancel: OnCancel
    ) -> None:
        super().__init__()
        self.set_running_or_notify_cancel()
        self.key = key
        self.layout = layout
        self._on_cancel = on_cancel
        self.make_assembly = make_assembly
        self.opened_at = time.monotonic()
        self.addresses: tuple[Address, ...] = ()
        self.total_tokens = 0
        self.landed_tokens = 0
        self.rounds = 0
        self.arrays: Arrays = {}
        self.rows: tuple[Rows, ...] = ()  # the same as bytes, checked
        self.sums: defaultdict[RoomKey, FieldDigests] = defaultdict(partial(FieldDigests, layout))

    @property
    def progress(self) -> str:
        """Of what comes to this rank over the wire."""
        return progress_of(self.landed_tokens, self.total_tokens, self.rounds)

    def __repr__(self) -> str:
        state = "receiving" if self.total_tokens else "opening"
        if self.done():
            state = ended_as(self.exception())
        where = ",".join(self.addresses)
        return f"<Reception room={self.key.room} attempt={self.key.attempt} {state} {self.progress} from={where}>"

    def cancel(self, detail: str = "the client no longer wants it") -> bool:
        """End the room on both sides, with cause ``aborted``; False when it has ended already."""
        if self.done():
            return False
        self._on_cancel(self.key, detail)
        return True


class Receptions:
    """Those of one endpoint, by room, until they end. Owns the count of how they did. The driver's thread, but for ``bool``.

    ``readers`` are the ranks of the group that receive from the wire. ``on_cancel``, ``on_released`` and ``on_left`` are called on any
    thread: for a room that is cancelled, one whose arrays are no longer needed, and one whose arrays are collected. The last two name the
    room's reservation, since its key may recur.
    """

    def __init__(
        self,
        layout: Layout,
        *,
        readers: int,
        on_cancel: OnCancel,
        on_released: Callable[[int], None],
        on_left: Callable[[RoomKey, int], None],
    ) -> None:
        self._layout = layout
        self._readers = readers
        self._on_cancel = on_cancel
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
        make_assembly = make_assembly or self._layout.empty
        reception = self._open[key] = Reception(self._layout, key, make_assembly, on_cancel=self._on_cancel)
        return reception

    def assemble(self, key: RoomKey, total_tokens: int, *, make_assembly: MakeAssembly | None) -> None:
        """Make the arrays that a room lands in, as told or as its owner wants them. Raises UsageError where they do not fit."""
        reception = self._open[key]
        reception.total_tokens = total_tokens
        reception.arrays = (make_assembly or reception.make_assembly)(total_tokens)
        reception.rows = self._layout.rows(reception.arrays)
        if len(reception.rows[0]) != total_tokens:
            raise UsageError(f"an assembly of {len(reception.rows[0])} rows for {total_tokens} tokens")
        if not all(array.flags.writeable for array in reception.arrays.values()):
            raise UsageError("an assembly that can not be written to")

    def drained(self, drain: Drain) -> None:
        """Tokens of a room are in its assembly."""
        reception = self._open[drain.key.of_room]
        reception.landed_tokens += drain.to_token - drain.from_token
        reception.rounds += drain.to_token == drain.round.end_token

    def deliver(
        self, finished: Finished, *, arrays: Arrays | None = None, aux: tuple[int, ...] | None = None
    ) -> None:
        """A room is where it is read: where it landed, or in ``arrays``, with ``aux``, that another rank has filled."""
        key, reservation = finished.key, finished.reservation
        report = _report(finished.report, readers=self._readers, token_bytes=self._layout.token_bytes)
        reception = self._open.pop(key)
        if arrays is None or aux is None:
            arrays, aux = reception.arrays, finished.report.aux
        release = partial(self._on_released, reservation)
        received = Received(key.room, key.attempt, arrays, aux, report, release)
        _when_gone(arrays, partial(self._on_left, key, reservation))
        self.ended[Cause.DONE.value] += 1
        reception.total_tokens = report.total_tokens
        reception.arrays, reception.rows = {}, ()
        self._log(reception, Cause.DONE, "")
        reception.set_result(received)

    def give_up(self, key: RoomKey, cause: Cause, detail: str) -> None:
        """A room ends without its embedding."""
        self.ended[cause.value] += 1
        reception = self._open.pop(key)
        self._log(reception, cause, detail)
        reception.set_exception(TransferError(cause.value, detail))

    @staticmethod
    def _log(reception: Reception, cause: Cause, detail: str) -> None:
        progress, began_at = reception.progress, reception.opened_at
        log_end(logger, reception.key, cause, detail, progress=progress, began_at=began_at)


def _report(room: RoomReport, *, readers: int, token_bytes: int) -> ReceiveReport:
    if not room.lane_tokens:
        return ReceiveReport(total_tokens=room.total_tokens, readers=readers)
    return ReceiveReport(
        total_tokens=room.total_tokens,
        rounds=room.rounds,
        bytes=room.lane_tokens * token_bytes,
        transport=room.wire,
        source_ms=room.source_ms,
        wait_ms=(room.granted_at - room.ready_at) * 1000,
        transfer_ms=(time.monotonic() - room.granted_at) * 1000,
        content_hash=room.content_hash,
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
