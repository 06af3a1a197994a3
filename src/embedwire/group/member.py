"""A receiver that is one rank of a group: rooms that open on all ranks, assemblies that the ranks of one host share.

``RankConfig`` is what a user passes to ``ReceiverEndpoint(place=…)``. ``GroupMember`` owns what waits for the next agreement step. Its
methods for the steps (``contract.StepMember``) are called on the thread of the steps and do their work on the receiver's driver thread; the
others are called there.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

from embedwire.endpoint.member import Member, ReceiverParts
from embedwire.endpoint.reception import Arrays, MakeAssembly, Reception
from embedwire.errors import ConfigurationError, EmbedwireError, TransferError, UsageError
from embedwire.group.agreement import Facts
from embedwire.group.contract import Collective
from embedwire.group.coordinator import GroupCoordinator
from embedwire.group.driver import DEFAULT_TIMEOUT_S, AgreementDriver
from embedwire.group.messages import Left, Mapped, Opened, Records
from embedwire.memory.shared import Handle, Segment, SpareSegments, attach
from embedwire.protocol.actions import Address, Assemble, Finished
from embedwire.protocol.messages import Cause, RoomKey
from embedwire.protocol.topology import RankGroup

T = TypeVar("T")

OnRoom = Callable[[Reception], None]
OnLost = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class RankConfig:
    """The place of one rank in a group. ``address`` (``ipc://`` or ``tcp://``) is where rank 0 receives the messages of the others.

    On the other ranks ``on_room`` is called for each room that rank 0 opens, with its reception. When a rank is lost, all rooms end with
    cause ``rank_lost``, and ``on_lost`` is called with the reason. Both are called on the driver's thread and must not block."""

    group: RankGroup
    rank: int
    address: str
    collective: Collective
    timeout_s: float = DEFAULT_TIMEOUT_S
    on_room: OnRoom | None = None
    on_lost: OnLost | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.rank < self.group.size:
            raise ConfigurationError(f"rank {self.rank} of {self.group.size}; ranks count from 0")

    def join(self, receiver: ReceiverParts) -> Member:
        """Make the receiver's member of the group; for a group of one, that of a receiver that is alone."""
        return GroupMember(receiver, self) if self.group.size > 1 else Member(receiver)


class GroupMember(Member):
    """One rank's rooms, between its receiver and the agreement steps."""

    def __init__(self, receiver: ReceiverParts, config: RankConfig) -> None:
        self._receiver = receiver
        self._config = config
        self._rank = config.rank
        self._source = config.group.source_of(config.rank)
        self._is_dummy = self._source != config.rank
        self._here = {rank for rank in range(config.group.size) if config.group.source_of(rank) == self._rank}
        self._shares = len(self._here) > 1
        self.coordinator: GroupCoordinator = GroupCoordinator(
            receiver.budget, token_bytes=receiver.layout.token_bytes, is_dummy=self._is_dummy
        )
        self.steps_total = 0
        self._requested: list[Opened] = []
        self._is_step_requested = False
        self._ended_as: str | None = None
        self._segments: dict[RoomKey, Segment] = {}
        self._readers: dict[RoomKey, set[int]] = {}
        self._spares = SpareSegments()
        self._unsent = Records()
        self._handles: dict[RoomKey, Handle] = {}
        self._driver: AgreementDriver | None = None

    # ------------------------------------------------------------------ for the receiver

    def start(self) -> None:
        config = self._config
        self._driver = AgreementDriver(
            self,
            rank=config.rank,
            size=config.group.size,
            address=config.address,
            collective=config.collective,
            timeout_s=config.timeout_s,
        )

    def check_open(self) -> None:
        """Raises UsageError on another rank than 0, TransferError when the group has ended."""
        if self._rank != 0:
            raise UsageError(f"rooms are opened on rank 0; this is rank {self._rank}")
        if self._ended_as is not None:
            raise TransferError(Cause.RANK_LOST.value, self._ended_as)

    def open(self, key: RoomKey, addresses: Sequence[Address], item: bytes) -> None:
        self._requested.append(Opened(key.room, key.attempt, tuple(addresses)))
        self.on_actions()

    def withdraw(self, key: RoomKey) -> bool:
        before = len(self._requested)
        self._requested = [opened for opened in self._requested if opened.key != key]
        return len(self._requested) < before

    def on_actions(self) -> None:
        """Request a step if there is something that no step has covered."""
        if self._is_step_requested or self._ended_as is not None or self._driver is None:
            return
        if self.coordinator.has_news() or self._requested:
            self._is_step_requested = True  # until the next step, whatever it is for
            self._driver.request_step()

    def assembly_of(self, order: Assemble) -> MakeAssembly | None:
        """In shared memory, where other ranks of this host read it, too."""
        return partial(self._assemble, order) if self._shares else None

    def _assemble(self, order: Assemble, total_tokens: int) -> Arrays:
        key, layout, budget = order.key, self._receiver.layout, self._receiver.budget
        if key in self._segments:
            raise UsageError("another rank still reads this room from the last time that it was received")
        spare_bytes = budget.limit_bytes - budget.used_bytes
        segment = self._spares.take(layout, total_tokens, spare_bytes=spare_bytes)
        self._segments[key] = segment
        arrays, handle = segment.assemble(layout, total_tokens, aux=order.aux)
        self._unsent += Records(made=(Mapped(key.room, key.attempt, self._rank, handle),))
        return arrays

    def finish(self, finished: Finished) -> None:
        """Deliver a room; on a dummy rank from another rank's assembly."""
        key, receptions = finished.key, self._receiver.receptions
        if key in self._segments:
            self._readers[key] = set(self._here)
        if not self._is_dummy:
            receptions.deliver(finished)
            return
        try:
            arrays, aux = attach(self._handles.pop(key), self._receiver.layout)
        except EmbedwireError as error:  # the other ranks have the room: this rank cannot go on with them
            receptions.give_up(key, Cause.RANK_LOST, str(error))
            raise
        receptions.deliver(finished, arrays=arrays, aux=aux)

    def left(self, key: RoomKey) -> None:
        """The ranks that share the memory get the record in the next step, whatever that is for."""
        if self._shares or self._is_dummy:
            self._unsent += Records(left=(Left(key.room, key.attempt, self._rank),))

    def _on_left(self, key: RoomKey, rank: int) -> None:
        """The last reader leaves memory that may be another room's."""
        readers = self._readers.get(key, set())
        readers.discard(rank)
        if key in self._readers and not readers:
            del self._readers[key]
            self._spares.keep(self._segments.pop(key))

    def fail(self, key: RoomKey) -> None:
        if key in self._segments and key not in self._readers:
            self._segments.pop(key).close()
        self._handles.pop(key, None)

    def close(self) -> None:
        if self._driver is not None:
            self._driver.close()

    # ------------------------------------------------------------------ for the steps; their thread

    @property
    def step(self) -> int:
        return self.coordinator.last_step()

    @property
    def has_rooms(self) -> bool:
        return self.coordinator.has_rooms()

    def open_requested(self) -> tuple[Opened, ...]:
        return self._on_driver(self._open_requested)

    def open_as_leader(self, opened: Sequence[Opened]) -> None:
        self._on_driver(lambda: self._open_as_leader(opened))

    def records(self) -> Records:
        return self._on_driver(self._take_records)

    def neutral_facts(self) -> Facts | None:
        return self._on_driver(lambda: self._facts() if self.coordinator.is_neutral() else None)

    def facts(self) -> Facts:
        return self._on_driver(self._facts)

    def conclude(self, agreed: Facts, records: Records) -> None:
        self._on_driver(lambda: self._conclude(agreed, records))

    def group_ended(self, detail: str, *, is_lost: bool) -> None:
        self._receiver.loop.post(lambda: self._end(detail, is_lost=is_lost))

    def _on_driver(self, task: Callable[[], T]) -> T:
        return self._receiver.loop.call(task)

    # ------------------------------------------------------------------ steps, on the driver's thread

    def _open_requested(self) -> tuple[Opened, ...]:
        requested, self._requested = tuple(self._requested), []
        for opened in requested:
            self._receiver.open_now(opened.key, opened.addresses, b"")
        return requested

    def _open_as_leader(self, opened: Sequence[Opened]) -> None:
        for one in opened:
            reception = self._receiver.receptions.expect(one.key)
            self._receiver.open_now(one.key, one.addresses, b"")
            if self._config.on_room is not None:
                self._config.on_room(reception)

    def _take_records(self) -> Records:
        unsent, self._unsent = self._unsent, Records()
        return unsent

    def _facts(self) -> Facts:
        self._is_step_requested = False
        return self.coordinator.facts()

    def _conclude(self, agreed: Facts, records: Records) -> None:
        self.steps_total += 1
        for left in records.left:
            if left.rank in self._here:
                self._on_left(left.key, left.rank)
        for mapped in records.made:
            if self._is_dummy and mapped.rank == self._source:
                self._handles[mapped.key] = mapped.handle
        self._receiver.decide(self.coordinator.on_agreed(agreed))

    def _end(self, detail: str, *, is_lost: bool) -> None:
        if self._ended_as is not None:
            return
        self._ended_as = detail
        cause = Cause.RANK_LOST if is_lost else Cause.CLOSED
        for opened in self._requested:
            self._receiver.receptions.give_up(opened.key, cause, detail)
        self._requested = []
        self._receiver.end_all(cause, detail)
        self._spares.close()
        while self._segments:
            self._segments.popitem()[1].close()
        self._readers.clear()
        if is_lost and self._config.on_lost is not None:
            self._config.on_lost(detail)
