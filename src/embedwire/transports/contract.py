"""The contract of a wire: batch writes from a sender's memory into named memory of a receiver.

A wire knows neither rooms nor tokens. What it knows is a *region* (the receiver's registered memory), a
*ticket* (a number that stands for one permission to write into some spans of that region) and *slices* (lists
of pieces to write). It is used by ``embedwire.endpoint`` only: the receiving half from one thread,
``RemoteRegion.write`` from one thread a region.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import ClassVar

from embedwire.errors import UsageError


class Outcome(Enum):
    """What is known of a write once it has returned."""

    LANDED = "landed"
    """The receiver can read every byte (not merely: the call to send returned)."""
    LOST = "lost"
    """What was not reported by ``on_landed`` is not whole, and no byte of it can land any more."""
    UNKNOWN = "unknown"
    """It may have landed, or may still land later. The memory may not be used again without proof."""


@dataclass(frozen=True, slots=True)
class Piece:
    """``source`` (C-contiguous bytes, owned by the caller until the write returned) goes to byte ``offset``
    of the region."""

    source: memoryview
    offset: int


Slice = Sequence[Piece]

MARK_MAX = 2**31 - 1


class Inbound(ABC):
    """The receiving half of a wire: memory that others write into.

    Life: created → ``allocate`` or ``register`` once → ``permit`` / ``revoke`` any number of times →
    ``close``.
    """

    name: ClassVar[str]
    is_fenced: ClassVar[bool]
    """Whether ``revoke`` can enforce the end of a permission by itself."""
    has_marks: ClassVar[bool] = False
    """Whether :meth:`mark` can show anything."""

    @abstractmethod
    def allocate(self, nbytes: int) -> memoryview:
        """The region: registered, zeroed, page-aligned memory of ``nbytes``, with its pages already touched.
        Called once."""

    def register(self, memory: memoryview) -> None:
        """Use memory that another wire allocated, instead of ``allocate``: one pool, reached over several
        wires. The owner keeps it until this half is closed. Raises UsageError where a wire can only use
        memory of its own."""
        raise UsageError(f"wire {self.name!r} can only use memory that it allocated itself")

    @abstractmethod
    def descriptor(self) -> bytes:
        """What a sender needs to reach the region; opaque, at most 4 KiB. Legal after ``allocate``."""

    @abstractmethod
    def permit(self, ticket: int, spans: Sequence[tuple[int, int]]) -> None:
        """Let writes under ``ticket`` (never used before, in 1 .. 2**63-1) touch these (offset, length) spans
        of the region. One that is not fenced, whose receiver sees no write, may ignore it, and is not always told."""

    @abstractmethod
    def revoke(self, ticket: int) -> bool:
        """End a permission; idempotent. True: from now on no byte can land under it. False: this wire can not
        enforce that, so the memory stays in quarantine until the sender confirmed or :meth:`is_gone` says
        so."""

    def mark(self, ticket: int) -> int:
        """The latest number that a sender left under ``ticket`` with :meth:`RemoteRegion.set_mark`: found by
        looking, no message tells of it. 0 when there is none, it was overwritten by another ticket's, or the
        wire has no marks, so nobody may wait for one. Tickets have to differ in their lower 32 bits."""
        return 0

    @abstractmethod
    def is_gone(self, sender_token: int) -> bool:
        """Proof that no write of the sender which called ``Outbound.connect(…, sender_token=…)`` can land any
        more: its session is closed or its process has ended. False where there is no such proof, e.g. when it
        is only frozen, and for a sender that never connected True."""

    @abstractmethod
    def close(self) -> None:
        """Unregister and free; ends its threads and sockets. Idempotent."""


class RemoteRegion(ABC):
    """A receiver's region as a sender sees it: one session of one wire."""

    has_marks: ClassVar[bool] = False
    """Whether the receiver sees what :meth:`set_mark` leaves."""

    @abstractmethod
    def write(
        self,
        ticket: int,
        slices: Iterable[Slice],
        *,
        is_permitted: Callable[[], bool],
        on_landed: Callable[[int], None],
        timeout_s: float,
    ) -> Outcome:
        """Write slices in order and return when the outcome of all is known and their memory is no longer
        read.

        Pieces of one write do not overlap. ``slices`` is consumed lazily, at most a few ahead.
        ``is_permitted`` is asked before each slice; once it says False nothing more is begun and the write
        ends as LOST (or UNKNOWN). ``on_landed(n)`` is called on this thread, in order, with the number of
        slices of this write known to have landed so far. Returns within about ``timeout_s`` seconds of the
        last progress. Raises nothing for what a peer does (that is an Outcome); UsageError for a piece
        outside the region. An exception out of ``slices`` or a callback propagates, after the write has been
        ended.
        """

    def set_mark(self, ticket: int, mark: int) -> None:
        """Leave a number in 1 .. MARK_MAX where the receiver finds it under ``ticket``. Who finds it can read
        every byte that had landed before this call. On the thread of :meth:`write`, in its callbacks too;
        does nothing once the session has ended. Called only where ``has_marks`` is True."""
        raise UsageError("this wire has no marks")

    @abstractmethod
    def close(self) -> bool:
        """End the session, within about a second. True: no write of it can land any more. False: this is not known yet, since the
        receiver does not answer; asked again, it says what is known by then. May be called from another thread and then ends a
        running write."""


class Outbound(ABC):
    """The sending half of a wire."""

    name: ClassVar[str]

    def register(self, memory: memoryview) -> None:  # noqa: B027
        """Memory that pieces will come from, so that a wire may read it where it lies. The owner keeps it, and where it is, until
        this half is closed. A wire that reads any memory as fast does nothing. On the thread that connects, or before."""

    @abstractmethod
    def connect(self, descriptor: bytes, *, sender_token: int, timeout_s: float) -> RemoteRegion:
        """Reach a region. ``sender_token`` (in 1 .. 2**62) names this sender's incarnation to the receiver.
        Raises TransportError when it can not be reached from here (for shm: another host), or the descriptor
        is malformed."""

    @abstractmethod
    def close(self) -> None:
        """Close every region that it connected. Idempotent."""
