"""All rooms of one receiver: which lanes make up a room, and how it goes on when something becomes of them.

When a room begins and how it ends is the decision of a ``Coordinator``: at once where the receiver is alone, with the other ranks where
it is one rank of a group. Between two decisions the lanes go their own way, round by round, with blocks of this rank's pool.

Called by one driver thread (``endpoint.receiver``) or by the simulation. Every public method returns the actions that follow; the driver
carries them out in order, and a Drain before it gives the core the next event.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from embedwire.errors import UsageError
from embedwire.limits import AUX_TOTAL_TOKENS, DEFAULT_LIMITS, Limits
from embedwire.protocol.actions import (
    Address,
    Assemble,
    Failed,
    Finished,
    LaneAnnounced,
    LaneEvent,
    LaneFailed,
    LaneWhole,
    ReceiverAction,
    RoomReport,
)
from embedwire.protocol.admission import Admission, Blocks, Memory
from embedwire.protocol.coordinator import (
    Begin,
    Coordinator,
    Decision,
    Fail,
    Finish,
    LocalCoordinator,
    RoomFacts,
)
from embedwire.protocol.handshake import Offered
from embedwire.protocol.messages import Announce, Cause, RoomKey, ToReceiver, cut
from embedwire.protocol.receiver import ReceiverTransfer
from embedwire.protocol.receiver_lanes import LaneAction, ReceiverLanes
from embedwire.protocol.states import Poll
from embedwire.protocol.topology import ALONE, Lane, RankGroup


@dataclass(eq=False, slots=True)
class Room:
    """One room on this rank. ``lanes`` are those that end here: none on a dummy rank. ``failure`` is set once this rank's part has failed;
    in a group the room then ends when all ranks agree. Memory is reserved under the number ``reservation``, since a key may recur."""

    key: RoomKey
    reservation: int
    lanes: dict[RoomKey, ReceiverTransfer] = field(default_factory=dict)
    whole: set[RoomKey] = field(default_factory=set)
    total_tokens: int = 0
    has_begun: bool = False
    failure: tuple[Cause, str] | None = None

    def facts(self) -> RoomFacts:
        """What this rank has of it."""
        if self.failure is not None:
            return RoomFacts(Poll.FAILED, self.total_tokens, 0, *self.failure)
        if len(self.whole) == len(self.lanes):
            poll = Poll.SUCCESS
        elif self.has_begun:
            poll = Poll.TRANSFERRING
        elif all(lane.is_ready for lane in self.lanes.values()):
            poll = Poll.WAITING_FOR_INPUT
        else:
            poll = Poll.BOOTSTRAPPING
        drained = sum(lane.drained_tokens for lane in self.lanes.values())
        return RoomFacts(poll, self.total_tokens, min(drained, self.total_tokens))

    def report(self) -> RoomReport:
        """How it arrived, once all its lanes are whole."""
        lanes = list(self.lanes.values())
        if not lanes or lanes[0].announced is None:
            return RoomReport(self.total_tokens)
        return RoomReport(
            total_tokens=self.total_tokens,
            aux=lanes[0].announced.aux,
            content_hash=lanes[0].announced.content_hash,
            rounds=tuple(tokens for lane in lanes for tokens in lane.round_sizes),
            lane_tokens=sum(lane.total_tokens for lane in lanes),
            wire=lanes[0].wire,
            source_ms=lanes[0].announced.source_ms,
            ready_at=max(lane.ready_at for lane in lanes),
            granted_at=min(lane.granted_at for lane in lanes),
        )


@dataclass(frozen=True, slots=True)
class ReceiverSnapshot:
    """``lanes`` counts lanes by state; ``for_assembly`` and ``for_blocks`` are the lengths of the two queues."""

    lanes: Mapping[str, int]
    for_assembly: int
    for_blocks: int
    sessions: int


class ReceiverCore:
    """The receiving side of the protocol, for any number of rooms and senders, on rank ``rank`` of ``group``. A group needs its own
    ``coordinator``."""

    def __init__(
        self,
        *,
        incarnation: int,
        offered: Offered,
        blocks: Blocks,
        memory: Memory,
        token_bytes: int,
        default_allocate_tokens: int,
        limits: Limits = DEFAULT_LIMITS,
        group: RankGroup = ALONE,
        rank: int = 0,
        coordinator: Coordinator | None = None,
    ) -> None:
        self.incarnation = incarnation
        self.memory = memory
        self.token_bytes = token_bytes
        self.group = group
        self.rank = rank
        self.rooms: dict[RoomKey, Room] = {}
        self.lanes = ReceiverLanes(
            incarnation=incarnation,
            offered=offered,
            blocks=blocks,
            default_allocate_tokens=default_allocate_tokens,
            limits=limits,
        )
        self.coordinator = coordinator or LocalCoordinator(memory, token_bytes=token_bytes)
        self._reservations = 0

    @property
    def admission(self) -> Admission:
        """Who gets blocks."""
        return self.lanes.admission

    # ------------------------------------------------------------------ what the owner of the assembly says

    def open(
        self, key: RoomKey, addresses: Sequence[Address] | Address, *, item: bytes = b"", now: float
    ) -> list[ReceiverAction]:
        """Request a room from its senders: the address of each encoder rank, in order of ranks. With ``item`` a room of that content hash,
        under a key of our own choice.

        In a group, called on every rank, in the same order. Raises UsageError for a known key, OverloadedError over ``rooms_max``."""
        if isinstance(addresses, Address):
            addresses = (addresses,)
        self.check_open(key, senders=len(addresses))
        room = self._new_room(key)
        actions: list[LaneAction] = []
        for lane_key, lane in self.lanes_of(key, senders=len(addresses)).items():
            actions += self.lanes.open(lane_key, addresses[lane.sender], lane=lane, item=item, now=now)
            room.lanes[lane_key] = self.lanes.transfers[lane_key]
        return self._follow([*actions, *self._report(room, now)], now)

    def subscribe(self, address: Address, *, now: float) -> list[ReceiverAction]:
        """Hear of the items that the sender at ``address`` will keep from now on."""
        return self._follow(self.lanes.subscribe(address, now=now), now)

    def open_failed(self, key: RoomKey, detail: str, *, now: float) -> list[ReceiverAction]:
        """This rank cannot open a room that rank 0 has opened, and that it cannot refuse: the room fails, on all ranks."""
        return self._follow(self._fail(self._new_room(key), Cause.OVERLOADED, detail, now), now)

    def _new_room(self, key: RoomKey) -> Room:
        self._reservations += 1
        room = self.rooms[key] = Room(key, self._reservations)
        return room

    def check_open(self, key: RoomKey, *, senders: int) -> None:
        """Raise what :meth:`open` would."""
        if key in self.rooms:
            raise UsageError(f"room {key.room} attempt {key.attempt} is open already")
        self.lanes.check_open(list(self.lanes_of(key, senders=senders)))

    def lanes_of(self, key: RoomKey, *, senders: int) -> dict[RoomKey, Lane]:
        """The lanes of a room that end at this rank."""
        return {
            key._replace(lane=lane.number): lane for lane in self.group.lanes_to(self.rank, senders=senders)
        }

    def abort(self, key: RoomKey, cause: Cause, detail: str, *, now: float) -> list[ReceiverAction]:
        """End a room from this side. Harmless when it is over."""
        room = self.rooms.get(key)
        if room is None:
            return []
        return self._follow(self._fail(room, cause, detail, now), now)

    def on_assembly_released(self, reservation: int, *, now: float) -> list[ReceiverAction]:
        """The assembly of a finished room is no longer needed. Idempotent."""
        if not self.memory.release(reservation):
            return []
        return self._follow(self._carry_out(self.coordinator.on_memory_released(), now), now)

    # ------------------------------------------------------------------ decisions

    def on_decided(self, decisions: Sequence[Decision], *, now: float) -> list[ReceiverAction]:
        """The coordinator has decided on rooms after an event of its own."""
        return self._follow(self._carry_out(decisions, now), now)

    def end_all(self, cause: Cause, detail: str, *, now: float) -> list[ReceiverAction]:
        """End every room, here and now: the receiver is shutting down, or its group is lost."""
        self.coordinator.close()
        ended: list[LaneAction] = []
        for room in list(self.rooms.values()):
            ended += self._end(room, cause, detail, now)
        return self._follow(ended, now)

    def _report(self, room: Room, now: float) -> list[LaneAction]:
        return self._carry_out(self.coordinator.report(room.key, room.facts()), now)

    def _carry_out(self, decisions: Sequence[Decision], now: float) -> list[LaneAction]:
        actions: list[LaneAction] = []
        for decision in decisions:
            room = self.rooms[decision.key]
            match decision:
                case Begin(_, total_tokens):
                    actions += self._begin(room, total_tokens, now)
                case Finish():
                    actions.append(Finished(room.key, room.report(), room.reservation))
                    del self.rooms[room.key]
                case Fail(_, cause, detail):
                    actions += self._end(room, cause, detail, now)
                    actions += self._carry_out(self.coordinator.on_memory_released(), now)
        return actions

    def _begin(self, room: Room, total_tokens: int, now: float) -> list[LaneAction]:
        room.has_begun = True
        room.total_tokens = total_tokens
        if not room.lanes:
            return []
        is_reserved = self.memory.try_reserve(room.reservation, total_tokens * self.token_bytes)
        assert is_reserved, "a room begins when there is memory for it"
        actions: list[LaneAction] = [Assemble(room.key, total_tokens, room.report().aux)]
        for key in room.lanes:
            actions += self.lanes.admit(key, now=now)
        return actions

    def _end(self, room: Room, cause: Cause, detail: str, now: float) -> list[LaneAction]:
        """The room ends without its embedding."""
        aborts = self._abort_lanes(room, cause, detail, now)
        self.memory.release(room.reservation)
        del self.rooms[room.key]
        return [Failed(room.key, cause, cut(detail)), *aborts]

    def _fail(self, room: Room, cause: Cause, detail: str, now: float) -> list[LaneAction]:
        """This rank's part of a room fails. The room ends when the coordinator decides so."""
        if room.failure is not None:
            return []
        room.failure = (cause, cut(detail))
        actions = self._report(room, now)
        if room.key in self.rooms:
            actions += self._abort_lanes(room, cause, detail, now)
        return actions

    def _abort_lanes(self, room: Room, cause: Cause, detail: str, now: float) -> list[LaneAction]:
        """Harmless for lanes that are whole or have ended."""
        for lane in room.lanes.values():
            self.admission.leave(lane)  # or it would be granted the blocks of the first that ends
        return [a for key in room.lanes for a in self.lanes.abort(key, cause, detail, now=now)]

    # ------------------------------------------------------------------ what becomes of lanes

    def _follow(self, actions: Sequence[LaneAction], now: float) -> list[ReceiverAction]:
        """Replace the events of lanes by what follows for their rooms, behind the actions that are there: failing one lane may hand its
        freed blocks to another lane of the same room, and that grant must not overtake the end of the room."""
        out: list[ReceiverAction] = []
        todo = deque(actions)
        while todo:
            action = todo.popleft()
            if isinstance(action, LaneEvent):
                room = self.rooms.get(action.key.of_room)
                if room is not None and room.failure is None:
                    todo.extend(self._on_lane(room, action, now))
            else:
                out.append(action)
        return out

    def _on_lane(self, room: Room, event: LaneEvent, now: float) -> list[LaneAction]:
        match event:
            case LaneAnnounced(key):
                announced = room.lanes[key].announced
                assert announced is not None
                problem = self._problem_with(room, announced)
                if problem is not None:
                    return self._fail(room, *problem, now)
                room.total_tokens = announced.aux[AUX_TOTAL_TOKENS]
            case LaneWhole(key):
                room.whole.add(key)
            case LaneFailed(_, cause, detail):
                return self._fail(room, cause, detail, now)
        return self._report(room, now)

    def _problem_with(self, room: Room, announce: Announce) -> tuple[Cause, str] | None:
        """Why a room can not be served, or is not the one that its other senders have announced."""
        for lane in room.lanes.values():
            known = lane.announced
            if known is not None and (known.aux, known.content_hash) != (announce.aux, announce.content_hash):
                return Cause.VIOLATION, "its senders have announced different contents"
        total = announce.aux[AUX_TOTAL_TOKENS]
        need = total * self.token_bytes
        if not self.memory.can_ever(need):
            limit = self.memory.limit_bytes
            return Cause.NEVER_FITS, f"{total} tokens need {need} bytes of assembly; there are {limit} in all"
        return None

    # ------------------------------------------------------------------ what senders, the pool and time say

    def on_message(self, message: ToReceiver, address: Address, *, now: float) -> list[ReceiverAction]:
        """Take one decoded message that came from ``address``. Nothing that a peer sends raises."""
        return self._follow(self.lanes.on_message(message, address, now=now), now)

    def on_violation(self, address: Address, detail: str, *, now: float) -> list[ReceiverAction]:
        """What came from ``address`` was no message: its rooms end."""
        return self._follow(self.lanes.on_violation(address, detail, now=now), now)

    def on_landed(self, key: RoomKey, sent_tokens: int, *, now: float) -> list[ReceiverAction]:
        """What the wire itself shows of a lane's landed prefix, before a status says so. Harmless when it has ended."""
        return self._follow(self.lanes.on_landed(key, sent_tokens, now=now), now)

    def on_drained(
        self,
        key: RoomKey,
        to_token: int,
        *,
        aux: tuple[int, ...] | None,
        digests: tuple[int, ...] | None,
        now: float,
    ) -> list[ReceiverAction]:
        """A Drain was carried out: ``aux`` (a copy) comes with the first of a lane, ``digests`` of all of it with the last.
        Harmless when it has ended."""
        actions = self._follow(self.lanes.on_drained(key, to_token, aux=aux, digests=digests, now=now), now)
        room = self.rooms.get(key.of_room)
        if room is not None and room.failure is None:
            actions += self._follow(self._report(room, now), now)
        return actions

    def suspects(self) -> frozenset[int]:
        """Incarnations that may still write to quarantined blocks: the driver checks whether they are gone."""
        return self.lanes.suspects()

    def on_peer_gone(self, incarnation: int, *, now: float) -> list[ReceiverAction]:
        """Proof that no write of a sender's incarnation can land any more."""
        return self._follow(self.lanes.on_peer_gone(incarnation, now=now), now)

    def snapshot(self) -> ReceiverSnapshot:
        """Counts for statistics."""
        return ReceiverSnapshot(
            lanes=Counter(lane.state.value for lane in self.lanes.transfers.values()),
            for_assembly=len(self.coordinator.queue),
            for_blocks=len(self.admission.for_blocks),
            sessions=len(self.lanes.sessions),
        )

    def next_due(self) -> float | None:
        """When ``on_tick`` has something to do."""
        return self.lanes.next_due()

    def on_tick(self, now: float) -> list[ReceiverAction]:
        """Carry out what is due."""
        return self._follow(self.lanes.on_tick(now), now)

    def close(self, *, now: float) -> list[ReceiverAction]:
        """End every room."""
        return self.end_all(Cause.CLOSED, "the receiver is shutting down", now=now)
