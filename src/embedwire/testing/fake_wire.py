"""A wire in memory, whose faults are ordered by the test. No thread, clock or socket: all happens in the
call.

A :class:`FakeNetwork` joins any number of receiving and sending halves. A test sets ``network.fate`` to say
what becomes of each slice, and decides with :meth:`FakeNetwork.deliver` when the stray ones arrive after all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import ClassVar

from embedwire.errors import TransportError, UsageError
from embedwire.transports.contract import Inbound, Outbound, Outcome, RemoteRegion, Slice
from embedwire.transports.pieces import check_sender_token, check_slice, check_spans, check_ticket
from embedwire.transports.tickets import Tickets


class Fate(Enum):
    """What becomes of one slice."""

    LAND = "land"
    LATE = "late"
    """It lands after the next slice of the same write, or at the write's end."""
    LOSE = "lose"
    """It never lands, and the write ends as LOST."""
    STRAY = "stray"
    """The write ends as UNKNOWN; the slice lands when the test calls :meth:`FakeNetwork.deliver`."""
    VANISH = "vanish"
    """The write ends as UNKNOWN; the slice never lands."""


@dataclass(frozen=True, slots=True)
class FakeSlice:
    """One slice on its way. ``number`` counts from 1 within its write, ``pieces`` are (offset, copied
    bytes)."""

    session: FakeRegion
    ticket: int
    number: int
    pieces: tuple[tuple[int, bytes], ...]


def always_land(_: FakeSlice) -> Fate:
    return Fate.LAND


@dataclass(slots=True, eq=False)
class FakeNetwork:
    """All regions and sessions of a test.

    ``is_fenced`` True: as on tcp, ``revoke`` is final. False: as on a one-sided wire, the receiver can
    not stop what is under way. ``strays`` are the slices that may still land, ``slices`` counts all that were
    begun.
    """

    is_fenced: bool = True
    fate: Callable[[FakeSlice], Fate] = always_land
    strays: list[FakeSlice] = field(default_factory=list)
    slices: int = 0
    regions: dict[bytes, FakeInbound] = field(default_factory=dict)
    sessions: list[FakeRegion] = field(default_factory=list)

    def inbound(self) -> FakeInbound:
        return FakeInbound(self) if self.is_fenced else OneSidedFakeInbound(self)

    def outbound(self) -> FakeOutbound:
        return FakeOutbound(self)

    def deliver(self, at: int = 0) -> bool:
        """Let stray slice ``at`` arrive. False: its ticket or its region was closed, so nothing landed."""
        arriving = self.strays.pop(at)
        return arriving.session.target.land(arriving)

    def kill(self, sender_token: int) -> None:
        """The sender's process ends: its sessions are closed, and what they had under way is gone."""
        for session in [s for s in self.sessions if s.sender_token == sender_token]:
            session.close()


class FakeInbound(Inbound):
    """A region in this process, whose tickets are enforced."""

    name: ClassVar[str] = "fake"
    is_fenced: ClassVar[bool] = True

    def __init__(self, network: FakeNetwork) -> None:
        self._network = network
        self._memory = memoryview(b"")
        self._descriptor = b""
        self._tickets = Tickets()
        self._is_closed = False

    @property
    def nbytes(self) -> int:
        return self._memory.nbytes

    def allocate(self, nbytes: int) -> memoryview:
        if nbytes < 1:
            raise UsageError(f"allocate({nbytes}): wants at least one byte")
        memory = memoryview(bytearray(nbytes))
        self.register(memory)
        return memory

    def register(self, memory: memoryview) -> None:
        if self._descriptor or self._is_closed:
            raise UsageError("allocate() or register() is called once, before close()")
        self._memory = memory.cast("B")
        self._descriptor = b"fake-%d" % id(self)
        self._network.regions[self._descriptor] = self

    def descriptor(self) -> bytes:
        if not self._descriptor:
            raise UsageError("descriptor() before allocate()")
        return self._descriptor

    def permit(self, ticket: int, spans: Sequence[tuple[int, int]]) -> None:
        check_ticket(ticket)
        check_spans(spans, self.nbytes)
        self._tickets.permit(ticket, spans)

    def revoke(self, ticket: int) -> bool:
        self._tickets.revoke(ticket)
        return self.is_fenced

    def is_gone(self, sender_token: int) -> bool:
        check_sender_token(sender_token)
        return all(s.target is not self or s.sender_token != sender_token for s in self._network.sessions)

    def close(self) -> None:
        self._is_closed = True
        self._network.regions.pop(self._descriptor, None)
        self._memory.release()

    def land(self, arriving: FakeSlice) -> bool:
        """Write a slice into the region, unless it is refused."""
        if not self._accepts(arriving):
            return False
        for offset, data in arriving.pieces:
            self._memory[offset : offset + len(data)] = data
        return True

    def _accepts(self, arriving: FakeSlice) -> bool:
        if self._is_closed or not self.is_fenced:
            return not self._is_closed
        table = [(offset, len(data)) for offset, data in arriving.pieces if data]
        return self._tickets.is_open(arriving.ticket) and self._tickets.covers(arriving.ticket, table)


class OneSidedFakeInbound(FakeInbound):
    """A region whose receiver sees no write and can stop none."""

    is_fenced: ClassVar[bool] = False


class FakeRegion(RemoteRegion):
    """One session."""

    def __init__(self, network: FakeNetwork, target: FakeInbound, sender_token: int) -> None:
        self._network = network
        self.target = target
        self._region_bytes = target.nbytes
        self.sender_token = sender_token

    def write(
        self,
        ticket: int,
        slices: Iterable[Slice],
        *,
        is_permitted: Callable[[], bool],
        on_landed: Callable[[int], None],
        timeout_s: float,
    ) -> Outcome:
        check_ticket(ticket)
        late: list[FakeSlice] = []
        for number, pieces in enumerate(slices, 1):
            check_slice(pieces, self._region_bytes)
            if not is_permitted() or self not in self._network.sessions:
                return Outcome.LOST
            self._network.slices += 1
            copies = tuple((piece.offset, piece.source.tobytes()) for piece in pieces)
            ending = self._meet_fate(FakeSlice(self, ticket, number, copies), late)
            if ending:
                return ending
            if not late:
                on_landed(number)
        return self._land_late(late, on_landed)

    def _meet_fate(self, slice_: FakeSlice, late: list[FakeSlice]) -> Outcome | None:
        """None when the write goes on. ``late`` holds the slices that others overtake."""
        fate = self._network.fate(slice_)
        match fate:
            case Fate.LATE:
                late.append(slice_)
                return None
            case Fate.LAND:
                arriving = [slice_, *late]
                late.clear()
                return None if all(self.target.land(a) for a in arriving) else Outcome.LOST
            case Fate.STRAY:
                self._network.strays += [*late, slice_]
        return Outcome.LOST if fate is Fate.LOSE else Outcome.UNKNOWN

    def _land_late(self, late: list[FakeSlice], on_landed: Callable[[int], None]) -> Outcome:
        if not all(self.target.land(slice_) for slice_ in reversed(late)):
            return Outcome.LOST
        if late:
            on_landed(max(slice_.number for slice_ in late))
        return Outcome.LANDED

    def close(self) -> bool:
        if self in self._network.sessions:
            self._network.sessions.remove(self)
        self._network.strays = [s for s in self._network.strays if s.session is not self]
        return True


class FakeOutbound(Outbound):
    """Reaches every region of its network."""

    name: ClassVar[str] = "fake"

    def __init__(self, network: FakeNetwork) -> None:
        self._network = network
        self._regions: list[FakeRegion] = []

    def connect(self, descriptor: bytes, *, sender_token: int, timeout_s: float) -> FakeRegion:
        check_sender_token(sender_token)
        target = self._network.regions.get(bytes(descriptor))
        if target is None:
            raise TransportError(f"no region is described by {descriptor!r}")
        region = FakeRegion(self._network, target, sender_token)
        self._network.sessions.append(region)
        self._regions.append(region)
        return region

    def close(self) -> None:
        while self._regions:
            self._regions.pop().close()
