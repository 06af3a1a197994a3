"""A receiver's part in its group of ranks: rooms that all open together, assemblies that ranks of one host share.

Owns what waits for the next turn. Its methods for the turns (``turns.Member``) are called on the turns' thread and do their work on the
driver's; the others are called there.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from embedwire.endpoint.event_loop import EventLoop
from embedwire.endpoint.reception import Arrays, Reception, Receptions
from embedwire.endpoint.turn_messages import Aside, Left, Mapped, Opened
from embedwire.endpoint.turns import Seat, Turns
from embedwire.errors import EmbedwireError, TransferError, UsageError
from embedwire.memory.layout import Layout
from embedwire.memory.shared import Handle, Segment, SpareSegments, attach
from embedwire.protocol.actions import Finished, ReceiverAction
from embedwire.protocol.agreement import Facts
from embedwire.protocol.messages import Cause, RoomKey
from embedwire.protocol.receiver_core import ReceiverCore

logger = logging.getLogger(__name__)
T = TypeVar("T")

OnRoom = Callable[[Reception], None]
OnLost = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Host:
    """What a member needs of its receiver. The functions are called on the thread of ``loop``."""

    layout: Layout
    loop: EventLoop
    open_now: Callable[[RoomKey, Sequence[str]], None]
    carry_out: Callable[[list[ReceiverAction]], None]
    memory_free_bytes: Callable[[], int]


class GroupMember:
    """One rank's rooms, between its driver and its turns."""

    def __init__(
        self,
        host: Host,
        core: ReceiverCore,
        receptions: Receptions,
        seat: Seat,
        *,
        on_room: OnRoom | None,
        on_lost: OnLost | None,
    ) -> None:
        self._host = host
        self._core = core
        self._receptions = receptions
        self._seat = seat
        self._on_room = on_room
        self._on_lost = on_lost
        self._asked: list[Opened] = []
        self._is_turn_asked = False
        self._ended_as: str | None = None
        self._segments: dict[RoomKey, Segment] = {}
        self._readers: dict[RoomKey, set[int]] = {}
        self._spares = SpareSegments()
        self._unsaid = Aside()
        self._handles: dict[RoomKey, Handle] = {}
        self._is_dummy = seat.group.is_dummy(seat.rank)
        self.turn = 0
        """The last turn that this rank has contributed its facts to."""
        self.turns_total = 0
        self._here = {rank for rank in range(seat.group.size) if seat.group.source_of(rank) == seat.rank}
        self.shares = len(self._here) > 1
        """Whether other ranks read the assemblies made here."""
        self._turns = Turns(seat, self)

    # ------------------------------------------------------------------ for the endpoint; the driver's thread

    def check(self) -> None:
        """Raise UsageError where no room may be asked for, TransferError when the group has ended."""
        if self._seat.rank != 0:
            raise UsageError(f"rooms are opened on rank 0; this is rank {self._seat.rank}")
        if self._ended_as is not None:
            raise TransferError(Cause.RANK_LOST.value, self._ended_as)

    def ask(self, key: RoomKey, addresses: Sequence[str]) -> None:
        """A room is to be opened on every rank."""
        self._asked.append(Opened(key.room, key.attempt, tuple(addresses)))
        self.look()

    def withdraw(self, key: RoomKey) -> bool:
        """Nobody wants it any more; False when it was opened already."""
        before = len(self._asked)
        self._asked = [opened for opened in self._asked if opened.key != key]
        return len(self._asked) < before

    def look(self) -> None:
        """See whether there is something that no turn has heard."""
        if self._is_turn_asked or self._ended_as is not None:
            return
        if self._core.wants_turn() or self._asked:
            self._is_turn_asked = True  # until the next turn, which may come for another reason
            self._turns.want()

    def assemble(self, key: RoomKey, aux: tuple[int, ...], total_tokens: int) -> Arrays:
        """An assembly that other ranks of this host will read, too."""
        if key in self._segments:
            raise UsageError("another rank still reads this room from the last time that it was received")
        layout = self._host.layout
        segment = self._spares.take(layout, total_tokens, spare_bytes=self._host.memory_free_bytes())
        self._segments[key] = segment
        arrays, handle = segment.assemble(layout, total_tokens, aux=aux)
        self._unsaid += Aside(made=(Mapped(key.room, key.attempt, self._seat.rank, handle),))
        return arrays

    def finish(self, finished: Finished) -> bool:
        """A room is whole on every rank. True: this rank is a dummy rank, and the room is delivered from another rank's assembly."""
        key = finished.key
        if key in self._segments:
            self._readers[key] = set(self._here)
        if self._is_dummy:
            try:
                arrays, aux = attach(self._handles.pop(key), self._host.layout)
            except EmbedwireError as error:  # the others have it: this rank cannot go on with them
                self._receptions.give_up(key, Cause.RANK_LOST, str(error))
                raise
            self._receptions.deliver(finished, arrays=arrays, aux=aux)
        return self._is_dummy

    def left(self, key: RoomKey) -> None:
        """There is no array of a room here any more. Those who share its memory hear so in the next turn, whatever that is for."""
        if self.shares or self._is_dummy:
            self._unsaid += Aside(left=(Left(key.room, key.attempt, self._seat.rank),))

    def _has_left(self, key: RoomKey, rank: int) -> None:
        """The last reader leaves memory that may be another room's."""
        readers = self._readers.get(key, set())
        readers.discard(rank)
        if key in self._readers and not readers:
            del self._readers[key]
            self._spares.keep(self._segments.pop(key))

    def fail(self, key: RoomKey) -> None:
        """A room has ended without its embedding."""
        if key in self._segments and key not in self._readers:
            self._segments.pop(key).close()
        self._handles.pop(key, None)

    def close(self) -> None:
        """Leave the group. Not on the driver's thread."""
        self._turns.close()

    # ------------------------------------------------------------------ for the turns; their thread

    def open_here(self) -> tuple[Opened, ...]:
        return self._on_driver(self._open_asked)

    def open_as_told(self, opened: Sequence[Opened]) -> None:
        self._on_driver(lambda: self._open_told(opened))

    @property
    def has_rooms(self) -> bool:
        """Whether rooms are open that turns will decide on."""
        return self._core.has_rooms()

    def aside(self) -> Aside:
        return self._on_driver(self._aside)

    def silence(self) -> Facts | None:
        return self._on_driver(lambda: self._facts() if self._core.is_silent() else None)

    def facts(self) -> Facts:
        return self._on_driver(self._facts)

    def conclude(self, agreed: Facts, aside: Aside) -> None:
        self._on_driver(lambda: self._conclude(agreed, aside))

    def group_ended(self, detail: str, *, is_lost: bool) -> None:
        self._host.loop.post(lambda: self._end(detail, is_lost=is_lost))

    def _on_driver(self, task: Callable[[], T]) -> T:
        return self._host.loop.call(task)

    # ------------------------------------------------------------------ turns, on the driver's thread

    def _open_asked(self) -> tuple[Opened, ...]:
        asked, self._asked = tuple(self._asked), []
        for opened in asked:
            self._host.open_now(opened.key, opened.addresses)
        return asked

    def _open_told(self, opened: Sequence[Opened]) -> None:
        for one in opened:
            reception = self._receptions.expect(one.key)
            self._host.open_now(one.key, one.addresses)
            if self._on_room is not None:
                self._on_room(reception)

    def _aside(self) -> Aside:
        unsaid, self._unsaid = self._unsaid, Aside()
        return unsaid

    def _facts(self) -> Facts:
        self._is_turn_asked = False
        facts = self._core.facts()
        self.turn = facts.turn
        return facts

    def _conclude(self, agreed: Facts, aside: Aside) -> None:
        self.turns_total += 1
        for left in aside.left:
            if left.rank in self._here:
                self._has_left(left.key, left.rank)
        source = self._seat.group.source_of(self._seat.rank)
        for mapped in aside.made:
            if mapped.rank == source != self._seat.rank:
                self._handles[mapped.key] = mapped.handle
        self._host.carry_out(self._core.on_agreed(agreed, now=time.monotonic()))

    def _end(self, detail: str, *, is_lost: bool) -> None:
        if self._ended_as is not None:
            return
        self._ended_as = detail
        cause = Cause.RANK_LOST if is_lost else Cause.CLOSED
        for opened in self._asked:
            self._receptions.give_up(opened.key, cause, detail)
        self._asked = []
        self._host.carry_out(self._core.on_group_ended(cause, detail, now=time.monotonic()))
        self._spares.close()
        while self._segments:
            self._segments.popitem()[1].close()
        self._readers.clear()
        if is_lost and self._on_lost is not None:
            self._on_lost(detail)
