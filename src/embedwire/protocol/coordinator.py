"""When rooms begin and how they end: the interface that ``receiver_core`` calls, and its implementation for a receiver that is alone.

The core reports each room of this rank, whenever something about it changes; the coordinator returns what follows for the room, or for
others. A receiver that is alone decides at once. The ranks of a group decide together (``embedwire.group``), so there a decision may
follow later. Called by the thread that drives the core.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TypeAlias

from embedwire.protocol.admission import AssemblyQueue, Memory
from embedwire.protocol.messages import Cause, RoomKey
from embedwire.protocol.states import Poll


@dataclass(frozen=True, slots=True)
class RoomFacts:
    """One room on one rank, or on all of them.

    ``poll`` is BOOTSTRAPPING until every sender of the room is ready, WAITING_FOR_INPUT from then on, TRANSFERRING once the room has
    begun, SUCCESS when it is whole, FAILED with ``cause`` and ``detail``. ``total_tokens`` is 0 until it is announced."""

    poll: Poll
    total_tokens: int
    landed_tokens: int
    cause: Cause | None = None
    detail: str = ""


@dataclass(frozen=True, slots=True)
class Begin:
    """Reserve and make the room's assembly, of ``total_tokens`` rows, then queue its lanes for blocks."""

    key: RoomKey
    total_tokens: int


@dataclass(frozen=True, slots=True)
class Finish:
    """The room is whole on every rank."""

    key: RoomKey


@dataclass(frozen=True, slots=True)
class Fail:
    """The room ends without its embedding, on every rank."""

    key: RoomKey
    cause: Cause
    detail: str


Decision: TypeAlias = Begin | Finish | Fail


class Coordinator(ABC):
    """Decides on the rooms of one receiver core. ``queue`` holds the rooms that wait for assembly memory."""

    queue: AssemblyQueue

    @abstractmethod
    def report(self, key: RoomKey, facts: RoomFacts) -> list[Decision]:
        """A room was opened, or something about it has changed on this rank. No call follows for a room that was finished or failed."""

    @abstractmethod
    def on_memory_released(self) -> list[Decision]:
        """A room has failed, or the assembly of a finished room was released: another room may fit now."""

    @abstractmethod
    def close(self) -> None:
        """Forget every room: the core ends them itself."""


class LocalCoordinator(Coordinator):
    """Of a receiver that is alone: what it reports is decided at once. ``memory`` is the budget of assemblies."""

    def __init__(self, memory: Memory, *, token_bytes: int) -> None:
        self._memory = memory
        self.queue = AssemblyQueue(token_bytes)

    def report(self, key: RoomKey, facts: RoomFacts) -> list[Decision]:
        match facts.poll:
            case Poll.FAILED:
                assert facts.cause is not None
                self.queue.leave(key)
                return [Fail(key, facts.cause, facts.detail)]
            case Poll.SUCCESS:
                return [Finish(key)]
            case Poll.WAITING_FOR_INPUT:
                self.queue.join(key, facts.total_tokens)
                return self.on_memory_released()
        return []

    def on_memory_released(self) -> list[Decision]:
        free_bytes = self._memory.limit_bytes - self._memory.used_bytes
        return [Begin(key, tokens) for key, tokens in self.queue.admit(free_bytes)]

    def close(self) -> None:
        self.queue.clear()
