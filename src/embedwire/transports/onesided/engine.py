"""What an adapter wraps a vendor's library into: an engine that receives, one that sends, and writes under way.

Knows no connection and no region beyond its address. A receiving engine is made and destroyed on its session's thread. A sending one is
used by one thread at a time.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from enum import Enum

Run = tuple[int, int, int]
"""(address of the source in this process, offset in the region, bytes)."""


class EngineError(Exception):
    """The library said no. What it was asked for may have happened in part."""


class State(Enum):
    """What is known of a batch."""

    MOVING = "moving"
    LANDED = "landed"
    FAILED = "failed"
    """It will not become whole; parts may land for as long as its engine lives."""


class ReceivingEngine(ABC):
    """One registration of a region, for one sender. Its memory outlives it."""

    @abstractmethod
    def address(self) -> bytes:
        """How the sender's engine finds it, at most 32 KiB."""

    @abstractmethod
    def close(self) -> None:
        """Destroy it. When this returns nothing can land through it any more. Called once."""


class Flight(ABC):
    """A batch under way."""

    @abstractmethod
    def poll(self) -> State:
        """Look, without waiting. After another answer than MOVING it is not asked again."""


class SendingEngine(ABC):
    """One sender towards one receiving engine: ``register`` and ``connect``, then ``begin`` any number of times, then ``close``."""

    @abstractmethod
    def register(self, address: int, nbytes: int) -> None:
        """Let batches read this memory, which stays until ``close``. Raises EngineError."""

    @abstractmethod
    def connect(self, address: bytes) -> None:
        """Reach the engine of that address. May block for as long as the library likes. Raises EngineError."""

    @abstractmethod
    def begin(self, batch: Sequence[Run]) -> Flight:
        """Start to write registered memory. Raises EngineError."""

    @abstractmethod
    def close(self) -> None:
        """Destroy it with all that is under way: afterwards it reads no memory and sends nothing. Called once."""
