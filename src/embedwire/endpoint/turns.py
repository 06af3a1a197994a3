"""The turns of a group of ranks: when one is held, who takes part, and what everybody then concludes. A thread of its own.

Rank 0 holds a turn when a rank has news: it says which rooms were opened since, every rank opens them and answers that it is there, and all
enter one collective. So an idle group sleeps, a rank that does not answer is found and named before anybody waits in a collective for
it, and no rank can be in another turn than the rest. It knows the protocol's facts, not rooms or memory: those are its member's
(``endpoint.receiver``), whose driver thread it calls.

    rank r → rank 0                                    rank 0 → rank r
    join      I am here                                turn   the next one begins; rooms opened, assemblies to map
    news      I want a turn; my assemblies             end    the group is closed, or lost
    present   I have opened them, and enter
    leave     I close, or have failed; why
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeAlias

import msgspec
import zmq
from msgspec import Struct

from embedwire.endpoint.driver import Driver
from embedwire.errors import ConfigurationError, TransportError
from embedwire.memory.shared import Handle
from embedwire.protocol.agreement import Facts, pack, unpack
from embedwire.protocol.messages import RoomKey
from embedwire.protocol.topology import RankGroup

logger = logging.getLogger(__name__)

DEFAULT_TIMEOUT_S = 10.0
"""A rank that does not take part in a turn for this long is lost, and the group with it."""
JOIN_TIMEOUT_S = 300.0
"""All ranks are there within this of the first turn: they may still be loading a model."""


class Collective(Protocol):
    """What the ranks share beside the turns' messages. Used by one thread; one call a turn."""

    def all_reduce_min(self, words: Sequence[int]) -> list[int]:
        """The elementwise minimum over all ranks of int64 numbers; each rank gets the same. Raises when a rank is gone."""
        ...


@dataclass(frozen=True, slots=True)
class Seat:
    """One rank's place in a group. ``address`` (``ipc://`` or ``tcp://``) is where rank 0 hears the others."""

    group: RankGroup
    rank: int
    address: str
    collective: Collective
    timeout_s: float = DEFAULT_TIMEOUT_S

    def __post_init__(self) -> None:
        if not 0 <= self.rank < self.group.size:
            raise ConfigurationError(f"rank {self.rank} of {self.group.size}; ranks count from 0")


class Opened(Struct, frozen=True, array_like=True):
    """A room that rank 0 was asked for: ``addresses`` of each encoder rank."""

    room: int
    attempt: int
    addresses: tuple[str, ...]

    @property
    def key(self) -> RoomKey:
        return RoomKey(self.room, self.attempt)


class Mapped(Struct, frozen=True, array_like=True):
    """The assembly of a room on the host of ``rank``, for the dummy ranks there."""

    room: int
    attempt: int
    rank: int
    handle: Handle

    @property
    def key(self) -> RoomKey:
        return RoomKey(self.room, self.attempt)


class _Said(Struct, frozen=True, tag_field="type", forbid_unknown_fields=True):
    rank: int


class _Join(_Said, frozen=True, tag="join"):
    pass


class _News(_Said, frozen=True, tag="news"):
    assemblies: tuple[Mapped, ...]


class _Present(_Said, frozen=True, tag="present"):
    turn: int


class _Leave(_Said, frozen=True, tag="leave"):
    detail: str


class _Turn(Struct, frozen=True, tag_field="type", tag="turn"):
    number: int
    opened: tuple[Opened, ...]
    assemblies: tuple[Mapped, ...]


class _End(Struct, frozen=True, tag_field="type", tag="end"):
    detail: str
    is_lost: bool


_FromRank: TypeAlias = _Join | _News | _Present | _Leave
_FromLeader: TypeAlias = _Turn | _End
_decode_rank = msgspec.msgpack.Decoder(_FromRank).decode
_decode_leader = msgspec.msgpack.Decoder(_FromLeader).decode


class Member(Protocol):
    """Who takes part in turns. Called on the turns' thread; each call has been carried out when it returns."""

    @property
    def wants_turn(self) -> bool:
        """Whether there is something that no turn has heard."""
        ...

    def open_here(self) -> tuple[Opened, ...]:
        """On rank 0: open what was asked for since, and say what that is."""
        ...

    def open_as_told(self, opened: Sequence[Opened]) -> None:
        """On the others: open the same, in this order."""
        ...

    def take_assemblies(self) -> tuple[Mapped, ...]:
        """Assemblies made here since the last call, for dummy ranks of this host."""
        ...

    def map_assemblies(self, assemblies: Sequence[Mapped]) -> None:
        """Assemblies that other ranks have made."""
        ...

    def facts(self) -> Facts:
        """What this rank says in the turn that begins."""
        ...

    def conclude(self, agreed: Facts) -> None:
        """What all have said."""
        ...

    def group_ended(self, detail: str, *, is_lost: bool) -> None:
        """There are no more turns: the group was closed, or a rank is lost."""
        ...


class RankLost(Exception):
    """The group can not go on; the message says which rank, as far as that is known."""


class Turns(Driver):
    """One rank's part in the turns of its group."""

    def __init__(self, seat: Seat, member: Member) -> None:
        super().__init__(f"embedwire-turns-{seat.rank}")
        self._seat = seat
        self._member = member
        self._is_leader = seat.rank == 0
        self._others = frozenset(range(1, seat.group.size))
        self._joined: set[int] = set()
        self._join_until = time.monotonic() + JOIN_TIMEOUT_S
        self._wants_turn = False
        self._is_ended = False
        self._relayed: list[Mapped] = []
        self._socket = self._context.socket(zmq.ROUTER if self._is_leader else zmq.DEALER)
        self._connect()
        self._thread.start()
        if not self._is_leader:
            self.post(lambda: self._tell_leader(_Join(seat.rank)))

    def _connect(self) -> None:
        self._socket.setsockopt(zmq.LINGER, 200)
        try:
            if self._is_leader:
                self._socket.setsockopt(zmq.ROUTER_HANDOVER, 1)
                self._socket.bind(self._seat.address)
            else:
                self._socket.setsockopt(zmq.IDENTITY, _identity(self._seat.rank))
                self._socket.connect(self._seat.address)
        except zmq.ZMQError as error:
            self._free()
            raise TransportError(f"turns at {self._seat.address}: {error}") from error
        self._poller.register(self._socket, zmq.POLLIN)

    # ------------------------------------------------------------------ from the member; any thread

    def want(self) -> None:
        """This rank has news: a turn is held soon."""
        self.post(self._want)

    def _want(self) -> None:
        if self._is_ended or not self._member.wants_turn:
            return
        if self._is_leader:
            self._wants_turn = True
        else:
            self._tell_leader(_News(self._seat.rank, self._member.take_assemblies()))

    def _close(self) -> None:
        """Leave the group; for the others that is its end."""
        self.post(lambda: self._end(f"rank {self._seat.rank} is shutting down", is_lost=False))
        self.call(self._stop)
        self._thread.join()

    # ------------------------------------------------------------------ the turns' thread

    def _on_readable(self, socket: zmq.Socket[bytes]) -> None:
        for frames in self._read_all(socket):
            if self._is_ended:
                return
            if self._is_leader:
                self._hear_rank(_decode_rank(frames[-1]))
            else:
                self._hear_leader(_decode_leader(frames[-1]))

    def _on_time(self, now: float) -> None:
        if self._is_leader and self._wants_turn and not self._is_ended:
            if self._joined == self._others:
                self._wants_turn = False
                self._guarded(self._hold)
            elif now >= self._join_until:
                missing = sorted(self._others - self._joined)
                self._end(f"ranks {missing} have not joined within {JOIN_TIMEOUT_S:g} s", is_lost=True)

    def _next_due(self) -> float | None:
        if not self._is_leader or not self._wants_turn or self._is_ended:
            return None
        return time.monotonic() if self._joined == self._others else self._join_until

    def _hear_rank(self, said: _FromRank) -> None:
        match said:
            case _Join(rank):
                if rank in self._joined:
                    self._end(f"rank {rank} was started anew", is_lost=True)
                self._joined.add(rank)
            case _News(_, assemblies):
                self._relayed += assemblies
                self._wants_turn = True
            case _Leave(_, detail):
                self._end(detail, is_lost=True)

    def _hear_leader(self, said: _FromLeader) -> None:
        match said:
            case _Turn(number, opened, assemblies):
                self._guarded(lambda: self._follow(number, opened, assemblies))
            case _End(detail, is_lost):
                self._finish(detail, is_lost=is_lost)

    def _guarded(self, turn: Callable[[], None]) -> None:
        """A turn that fails on one rank fails the group."""
        try:
            turn()
        except RankLost as lost:
            self._end(str(lost), is_lost=True)
        except Exception as error:
            logger.debug("the turn failed", exc_info=True)
            self._end(f"rank {self._seat.rank} lost its group: {type(error).__name__}: {error}", is_lost=True)

    def _hold(self) -> None:
        """Rank 0's turn."""
        member = self._member
        opened = member.open_here()
        relayed, self._relayed = (*member.take_assemblies(), *self._relayed), []
        facts = member.facts()
        turn = msgspec.msgpack.encode(_Turn(facts.turn, opened, relayed))
        for rank in sorted(self._others):
            self._socket.send_multipart([_identity(rank), turn])
        member.map_assemblies(relayed)
        self._await_present(facts.turn)
        member.conclude(unpack(self._seat.collective.all_reduce_min(pack(facts))))

    def _await_present(self, number: int) -> None:
        missing = set(self._others)
        until = time.monotonic() + self._seat.timeout_s
        while missing:
            left_s = until - time.monotonic()
            if left_s <= 0 or not self._socket.poll(math.ceil(left_s * 1000), zmq.POLLIN):
                raise RankLost(
                    f"rank {', '.join(map(str, sorted(missing)))} did not answer within {self._seat.timeout_s:g} s"
                )
            said = _decode_rank(self._socket.recv_multipart()[-1])
            if isinstance(said, _Present) and said.turn == number:
                missing.discard(said.rank)
            else:
                self._hear_rank(said)
                if self._is_ended:
                    raise RankLost("the group has ended")

    def _follow(self, number: int, opened: Sequence[Opened], assemblies: Sequence[Mapped]) -> None:
        """The turn of every other rank."""
        member = self._member
        member.open_as_told(opened)
        member.map_assemblies(assemblies)
        facts = member.facts()
        if facts.turn != number:
            raise RankLost(f"rank {self._seat.rank} is at turn {facts.turn}, rank 0 at {number}")
        self._tell_leader(_Present(self._seat.rank, number))
        member.conclude(unpack(self._seat.collective.all_reduce_min(pack(facts))))

    def _tell_leader(self, said: _FromRank) -> None:
        self._socket.send(msgspec.msgpack.encode(said))

    def _end(self, detail: str, *, is_lost: bool) -> None:
        """Here, and tell the others."""
        if self._is_ended:
            return
        if self._is_leader:
            end = msgspec.msgpack.encode(_End(detail, is_lost))
            for rank in sorted(self._joined):
                self._socket.send_multipart([_identity(rank), end])
        else:
            self._tell_leader(_Leave(self._seat.rank, detail))
        self._finish(detail, is_lost=is_lost)

    def _finish(self, detail: str, *, is_lost: bool) -> None:
        if not self._is_ended:
            self._is_ended = True
            self._member.group_ended(detail, is_lost=is_lost)


def _identity(rank: int) -> bytes:
    return b"rank" + rank.to_bytes(4, "big")
