"""One rank's part in the decisions of its group, without threads, sockets or clocks.

Rooms are opened on every rank in the same order. In an agreement step each rank contributes its ``facts``, and every rank derives the
same decisions from what is agreed: a room joins the queue for memory when every rank's senders are ready, it begins when its whole
assembly fits on every rank, it succeeds when every rank has all of it, and it fails when it has failed on one. So no two ranks can wait
for each other, and rounds need no agreement. ``driver`` runs the steps; the simulation does so in virtual time.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import islice

from embedwire.group.agreement import NEUTRAL, NO_LIMIT, Facts
from embedwire.limits import SLOTS_MAX
from embedwire.protocol.admission import AssemblyQueue, Memory
from embedwire.protocol.coordinator import Begin, Coordinator, Decision, Fail, Finish, RoomFacts
from embedwire.protocol.messages import Cause, RoomKey
from embedwire.protocol.states import Poll


@dataclass(slots=True)
class _Room:
    """``facts`` are this rank's as of now; ``known`` is the poll that the other ranks have of it."""

    facts: RoomFacts
    known: Poll | None = None
    is_queued: bool = False


class GroupCoordinator(Coordinator):
    """Of one rank of a group. A dummy rank reserves no memory, and its rooms are whole from the start."""

    def __init__(self, memory: Memory, *, token_bytes: int, is_dummy: bool) -> None:
        self.queue = AssemblyQueue(token_bytes)
        self._step = 0
        self._memory = memory
        self._is_dummy = is_dummy
        self._rooms: dict[RoomKey, _Room] = {}
        self._news: set[RoomKey] = set()
        self._in_step: list[tuple[RoomKey, _Room]] = []
        self._known_free_bytes = 0

    # ------------------------------------------------------------------ for the core

    def report(self, key: RoomKey, facts: RoomFacts) -> list[Decision]:
        if self._is_dummy and facts.poll is not Poll.FAILED:
            facts = NEUTRAL
        self._set(key, self._rooms.setdefault(key, _Room(facts)), facts)
        return []

    def on_memory_released(self) -> list[Decision]:
        return []

    def close(self) -> None:
        self.queue.clear()
        self._rooms.clear()
        self._news.clear()
        self._in_step = []

    def _set(self, key: RoomKey, room: _Room, facts: RoomFacts) -> None:
        if room.facts.poll is not Poll.FAILED:
            room.facts = facts
        if room.facts.poll is not room.known:
            self._news.add(key)

    # ------------------------------------------------------------------ for whoever runs the steps

    def last_step(self) -> int:
        """The last step that this rank has contributed its facts to. May be called from any thread."""
        return self._step

    def has_rooms(self) -> bool:
        """Whether rooms are open. May be called from any thread."""
        return bool(self._rooms)

    def has_news(self) -> bool:
        """Whether this rank needs a step: for a room, or for memory that a room waits for."""
        return bool(self._news) or (bool(self.queue) and self._free_bytes > self._known_free_bytes)

    def is_neutral(self) -> bool:
        """Whether this rank's facts change no minimum: it is a dummy rank, and no room has failed here."""
        return self._is_dummy and all(room.facts is NEUTRAL for room in self._rooms.values())

    def facts(self) -> Facts:
        """What this rank contributes to the next step. A room that fails after it succeeds all the same, if it is whole on every rank."""
        self._step += 1
        self._in_step = list(islice(self._rooms.items(), SLOTS_MAX))
        self._known_free_bytes = self._free_bytes
        if len(self._rooms) > SLOTS_MAX:
            for key, room in self._in_step:  # to the end: the next step is for the others
                del self._rooms[key]
                self._rooms[key] = room
        for key, room in self._in_step:
            self._news.discard(key)
            room.known = room.facts.poll
        return Facts(self._step, self._known_free_bytes, tuple(room.facts for _, room in self._in_step))

    def on_agreed(self, agreed: Facts) -> list[Decision]:
        """The step is over: what follows is the same on every rank, in the same order."""
        decisions: list[Decision] = []
        for (key, room), facts in zip(self._in_step, agreed.rooms, strict=True):
            decisions += self._decide(key, room, facts)
        return decisions + self._admit(agreed.free_bytes)

    @property
    def _free_bytes(self) -> int:
        return NO_LIMIT if self._is_dummy else self._memory.limit_bytes - self._memory.used_bytes

    def _decide(self, key: RoomKey, room: _Room, agreed: RoomFacts) -> list[Decision]:
        if agreed.poll is Poll.FAILED:
            self._forget(key)
            cause = agreed.cause or Cause.RANK_LOST
            return [Fail(key, cause, room.facts.detail if room.facts.cause is cause else "on another rank")]
        if agreed.poll is Poll.SUCCESS:
            assert agreed.landed_tokens >= agreed.total_tokens, "every rank has all of it"
            self._forget(key)
            return [Finish(key)]
        if agreed.total_tokens and room.facts.total_tokens not in (0, agreed.total_tokens):
            detail = (
                f"this rank was announced {room.facts.total_tokens} tokens, another {agreed.total_tokens}"
            )
            self._set(key, room, replace(room.facts, poll=Poll.FAILED, cause=Cause.VIOLATION, detail=detail))
        if agreed.poll >= Poll.WAITING_FOR_INPUT and not room.is_queued:
            room.is_queued = True
            self.queue.join(key, agreed.total_tokens)
        return []

    def _admit(self, free_bytes: int) -> list[Decision]:
        """``free_bytes`` are free on every rank. A room that has failed here only takes its place: it fails everywhere in the next step."""
        decisions: list[Decision] = []
        for key, total_tokens in self.queue.admit(free_bytes):
            room = self._rooms[key]
            room.known = Poll.TRANSFERRING
            if room.facts.poll is Poll.WAITING_FOR_INPUT:
                room.facts = replace(room.facts, poll=Poll.TRANSFERRING)
            if room.facts.poll is not Poll.FAILED:
                decisions.append(Begin(key, total_tokens))
        return decisions

    def _forget(self, key: RoomKey) -> None:
        del self._rooms[key]
        self._news.discard(key)
        self.queue.leave(key)
