"""All rooms of one receiving rank: which lanes make up a room, when it may begin, and how it ends, on every rank of the group alike.

A rank that is alone decides at once. In a group, rooms are opened on every rank in the same order, and what follows is decided in turns
(``agreement``): between two turns each rank's lanes go their own way, round by round, with blocks of its own. Ranks agree on rooms, not
on rounds: a room begins when every rank's senders are ready and every rank has memory for it, it succeeds when every rank has all of it,
and it fails when one rank says so, all in one order everywhere. So no two ranks can wait for each other, and a round costs no collective.

A turn begins with rank 0 saying which rooms it has opened since the last; every other rank opens them before its own ``facts``.

Called by one driver thread (``endpoint.receiver``) or by the simulation. Every public method returns the actions that follow; the driver
carries them out in order, and a Drain before it gives the core the next event.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Protocol

from embedwire.errors import OverloadedError, UsageError
from embedwire.limits import AUX_TOTAL_TOKENS, DEFAULT_LIMITS, SLOTS_MAX, Limits
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
from embedwire.protocol.admission import Admission, Blocks
from embedwire.protocol.agreement import NEUTRAL, NO_LIMIT, Facts, RoomFacts
from embedwire.protocol.handshake import Offered
from embedwire.protocol.messages import Announce, Cause, RoomKey, ToReceiver, cut
from embedwire.protocol.receiver import ReceiverTransfer
from embedwire.protocol.receiver_lanes import LaneAction, ReceiverLanes
from embedwire.protocol.states import Poll
from embedwire.protocol.topology import ALONE, Lane, RankGroup


class Memory(Protocol):
    """The budget that assemblies are reserved from (``memory.budget``), in bytes."""

    @property
    def limit_bytes(self) -> int: ...
    @property
    def used_bytes(self) -> int: ...
    def can_ever(self, nbytes: int) -> bool: ...
    def try_reserve(self, key: Hashable, nbytes: int) -> bool: ...
    def release(self, key: Hashable) -> bool: ...


@dataclass(eq=False, slots=True)
class Room:
    """One room on one rank. ``lanes`` are those that end here: none on a dummy rank. ``landed_tokens`` is what all ranks that receive are
    known to have; ``end`` is set once this rank knows how it ends, which the others may not know yet;
    ``told`` is the poll that they know. Memory is reserved under the number ``reservation``, since a key may recur."""

    key: RoomKey
    reservation: int
    lanes: dict[RoomKey, ReceiverTransfer] = field(default_factory=dict)
    whole: set[RoomKey] = field(default_factory=set)
    total_tokens: int = 0
    landed_tokens: int = 0
    is_queued: bool = False
    is_admitted: bool = False
    is_committed: bool = False
    told: Poll | None = None
    deferred: tuple[Cause, str] | None = None
    end: tuple[Cause, str] | None = None

    @property
    def is_dummy(self) -> bool:
        return not self.lanes

    def facts(self) -> RoomFacts:
        """What this rank knows of it."""
        if self.end is not None and self.end[0] is not Cause.DONE:
            return RoomFacts(Poll.FAILED, self.total_tokens, 0, self.end[0])
        if self.is_dummy:
            return NEUTRAL
        if len(self.whole) == len(self.lanes):
            poll = Poll.SUCCESS
        elif self.is_admitted:
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
    """The receiving side of the protocol, for any number of rooms and senders, on rank ``rank`` of ``group``."""

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
    ) -> None:
        self.incarnation = incarnation
        self.memory = memory
        self.token_bytes = token_bytes
        self.group = group
        self.rank = rank
        self.is_dummy = group.is_dummy(rank)
        self.rooms: dict[RoomKey, Room] = {}
        self.lanes = ReceiverLanes(
            incarnation=incarnation,
            offered=offered,
            blocks=blocks,
            default_allocate_tokens=default_allocate_tokens,
            limits=limits,
        )
        self.turn = 0
        self._reservations = 0
        self.for_assembly: deque[Room] = deque()
        self._told: list[Room] = []
        self._told_free_bytes = 0
        self._news: set[RoomKey] = set()

    @property
    def admission(self) -> Admission:
        """Who gets blocks."""
        return self.lanes.admission

    # ------------------------------------------------------------------ what the owner of the assembly says

    def open(
        self, key: RoomKey, addresses: Sequence[Address] | Address, *, item: bytes = b"", now: float
    ) -> list[ReceiverAction]:
        """Ask the senders for a room: the address of each encoder rank, in order of ranks. With ``item`` a room of that content hash,
        under a key of our own choice.

        In a group, called on every rank, in the same order. Raises UsageError for a known key, OverloadedError over ``rooms_max``; but
        what rank 0 has opened the others can not refuse: there such a room fails, and so it does on every rank."""
        if isinstance(addresses, Address):
            addresses = (addresses,)
        try:
            self.check_open(key, senders=len(addresses))
        except (OverloadedError, UsageError) as refusal:
            if self.rank == 0 or key in self.rooms:
                raise
            return self.open_failed(key, str(refusal), now=now)
        room = self._new_room(key)
        actions: list[LaneAction] = []
        for lane_key, lane in self.lanes_of(key, senders=len(addresses)).items():
            actions += self.lanes.open(lane_key, addresses[lane.sender], lane=lane, item=item, now=now)
            room.lanes[lane_key] = self.lanes.transfers[lane_key]
        if self.group.size > 1:
            self._news.add(key)
        return self._follow(actions, now)

    def subscribe(self, address: Address, *, now: float) -> list[ReceiverAction]:
        """Hear of the items that the sender at ``address`` will keep from now on."""
        return self._follow(self.lanes.subscribe(address, now=now), now)

    def open_failed(self, key: RoomKey, detail: str, *, now: float) -> list[ReceiverAction]:
        """This rank can not open a room that the others have: it is in line all the same, and fails on all."""
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
        if not self.memory.release(reservation) or self.group.size > 1:
            return []
        return self._follow(self._admit(self._free_bytes, now), now)

    # ------------------------------------------------------------------ turns

    def has_rooms(self) -> bool:
        """Whether rooms are open that turns will decide on. May be called from any thread."""
        return bool(self.rooms)

    def is_silent(self) -> bool:
        """Whether this rank's facts change no minimum: it is a dummy rank, and no room has failed here."""
        return self.is_dummy and all(room.end is None for room in self.rooms.values())

    def wants_turn(self) -> bool:
        """Whether this rank has something to say: news of a room, or of memory that a room waits for."""
        return bool(self._news) or (
            self.group.size > 1 and bool(self.for_assembly) and self._free_bytes > self._told_free_bytes
        )

    def facts(self) -> Facts:
        """What this rank says in its next turn. Until that is agreed on, what it has said holds."""
        self.turn += 1
        self._told = list(islice(self.rooms.values(), SLOTS_MAX))
        self._told_free_bytes = self._free_bytes
        told = []
        for room in self._told:
            self._news.discard(room.key)
            if len(self.rooms) > SLOTS_MAX:
                self.rooms[room.key] = self.rooms.pop(
                    room.key
                )  # to the end: next time it is the others' turn
            facts = room.facts()
            room.is_committed = facts.poll is Poll.SUCCESS
            room.told = facts.poll
            told.append(facts)
        return Facts(self.turn, self._told_free_bytes, tuple(told))

    def on_agreed(self, agreed: Facts, *, now: float) -> list[ReceiverAction]:
        """Conclude from what all ranks said; the same on every rank."""
        actions: list[LaneAction] = []
        for room, facts in zip(self._told, agreed.rooms, strict=True):
            room.is_committed = False
            actions += self._apply(room, facts, now)
            if room.deferred is not None:
                actions += self._fail(room, *room.deferred, now)
        actions += self._admit(agreed.free_bytes, now)
        return self._follow(actions, now)

    def on_group_ended(self, cause: Cause, detail: str, *, now: float) -> list[ReceiverAction]:
        """The group is no more: every room ends."""
        return self._end_all(cause, detail, now)

    @property
    def _free_bytes(self) -> int:
        return NO_LIMIT if self.is_dummy else self.memory.limit_bytes - self.memory.used_bytes

    def _apply(self, room: Room, facts: RoomFacts, now: float) -> list[LaneAction]:
        """One room, by what is agreed of it."""
        if facts.poll is Poll.FAILED:
            cause = facts.cause or Cause.RANK_LOST
            is_ours = room.end is not None and room.end[0] is cause
            return self._end(room, cause, room.end[1] if room.end and is_ours else "on another rank", now)
        actions: list[LaneAction] = []
        if facts.total_tokens:  # else no rank had seen it, and this one may have meanwhile
            if room.total_tokens not in (0, facts.total_tokens):
                actions += self._fail(room, Cause.VIOLATION, "ranks were announced different totals", now)
            room.total_tokens = facts.total_tokens
        room.landed_tokens = min(facts.landed_tokens, room.total_tokens)
        if facts.poll is Poll.SUCCESS and room.end is None:
            room.end = (Cause.DONE, "")
            actions.append(Finished(room.key, room.report(), room.reservation))
            self._forget(room)
        elif facts.poll >= Poll.WAITING_FOR_INPUT and not room.is_queued:
            room.is_queued = True
            self.for_assembly.append(room)
        return actions

    def _admit(self, free_bytes: int, now: float) -> list[LaneAction]:
        """First come, first served: rooms whose whole assembly fits into what every rank has free."""
        actions: list[LaneAction] = []
        while self.for_assembly:
            room = self.for_assembly[0]
            need = room.total_tokens * self.token_bytes
            if need > free_bytes:
                break
            self.for_assembly.popleft()
            free_bytes -= need
            room.is_admitted = True
            room.told = Poll.TRANSFERRING
            if room.is_dummy or room.end is not None:
                continue  # one that has failed here meanwhile fails everywhere in the next turn
            is_reserved = self.memory.try_reserve(room.reservation, need)
            assert is_reserved, "agreed free memory is there"
            actions.append(Assemble(room.key, room.total_tokens, room.report().aux))
            for key in room.lanes:
                actions += self.lanes.admit(key, now=now)
        return actions

    def _forget(self, room: Room) -> None:
        del self.rooms[room.key]
        self._news.discard(room.key)
        if room in self.for_assembly:
            self.for_assembly.remove(room)

    def _fail(self, room: Room, cause: Cause, detail: str, now: float) -> list[LaneAction]:
        """This rank's part of a room ends without its embedding, and with it the room, as soon as all ranks know."""
        if room.end is not None:
            return []
        if room.is_committed:  # all may have succeeded already; the turn that runs will tell
            room.deferred = room.deferred or (cause, detail)
            return []
        if self.group.size == 1:
            return self._end(room, cause, detail, now) + self._admit(self._free_bytes, now)
        room.end = (cause, cut(detail))
        self._news.add(room.key)
        return self._abort_lanes(room, now)

    def _abort_lanes(self, room: Room, now: float) -> list[LaneAction]:
        assert room.end is not None
        for lane in room.lanes.values():
            self.admission.leave(lane)  # or it would be granted the blocks of the first that ends
        return [a for key in room.lanes for a in self.lanes.abort(key, *room.end, now=now)]

    def _end(self, room: Room, cause: Cause, detail: str, now: float) -> list[LaneAction]:
        """A room ends without its embedding, on all ranks."""
        is_told = room.end is not None
        room.end = (cause, cut(detail))
        aborts = [] if is_told else self._abort_lanes(room, now)
        self.memory.release(room.reservation)
        self._forget(room)
        return [Failed(room.key, *room.end), *aborts]

    def _end_all(self, cause: Cause, detail: str, now: float) -> list[ReceiverAction]:
        ended = [
            action for room in list(self.rooms.values()) for action in self._end(room, cause, detail, now)
        ]
        return self._follow(ended, now)

    def _settle(self, room: Room, now: float) -> list[LaneAction]:
        """A lane of a room has got on: alone, that decides; else the next turn does, if it is a step of the room."""
        if self.group.size > 1:
            if room.facts().poll is not room.told:
                self._news.add(room.key)
            return []
        return self._apply(room, room.facts(), now) + self._admit(self._free_bytes, now)

    # ------------------------------------------------------------------ what becomes of lanes

    def _follow(self, actions: Sequence[LaneAction], now: float) -> list[ReceiverAction]:
        """Put what becomes of rooms in the place of what has become of lanes: behind what was ordered already, for a blow at one lane
        may have given its blocks to another lane of the same room, whose end is not to be overtaken by its grant."""
        out: list[ReceiverAction] = []
        todo = deque(actions)
        while todo:
            action = todo.popleft()
            if isinstance(action, LaneEvent):
                room = self.rooms.get(action.key.of_room)
                if room is not None and room.end is None:
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
        return self._settle(room, now)

    def _problem_with(self, room: Room, news: Announce) -> tuple[Cause, str] | None:
        """Why a room can not be served, or is not the one that its other senders have announced."""
        for lane in room.lanes.values():
            known = lane.announced
            if known is not None and (known.aux, known.content_hash) != (news.aux, news.content_hash):
                return Cause.VIOLATION, "its senders have announced different contents"
        total = news.aux[AUX_TOTAL_TOKENS]
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
        return self._follow(self.lanes.on_drained(key, to_token, aux=aux, digests=digests, now=now), now)

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
            for_assembly=len(self.for_assembly),
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
        return self._end_all(Cause.CLOSED, "the receiver is shutting down", now)
