"""The turns of a group of ranks: when one is held, who takes part, and what everybody then concludes. A thread of its own.

Rank 0 holds a turn when a rank has news: it says which rooms were opened since, every rank opens them and answers that it is there, and
only then all enter one collective. So an idle group sleeps, a rank that does not answer is found and named before anybody waits in a
collective for it, and no rank can be in another turn than the rest. The connections tell when a process dies: the others lose rank 0 by
that, and rank 0 holds a turn to see who it was. Turns tell when one stops: while rooms are open there is one at least each *beat*, news
or not, and who hears of none has lost rank 0. (The control sockets have no heartbeat of their own: docs/adr/0019.) Where no other rank
has anything to say, as where rank 0 alone receives, what it says is what all would agree on: it travels with ``go``, and there is no
collective. It knows the protocol's facts, not rooms or memory: those are its member's (``endpoint.member``), which works on the driver's
thread.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import msgspec
import zmq

from embedwire.endpoint.event_loop import EventLoop
from embedwire.endpoint.turn_messages import (
    Aside,
    End,
    FromLeader,
    FromRank,
    Go,
    Join,
    Leave,
    News,
    Opened,
    Present,
    Turn,
    decode_of_leader,
    decode_of_rank,
)
from embedwire.errors import ConfigurationError, TransportError
from embedwire.protocol.agreement import Facts, pack, unpack
from embedwire.protocol.topology import RankGroup

logger = logging.getLogger(__name__)

DEFAULT_TIMEOUT_S = 10.0
"""A rank that does not take part in a turn for this long is lost, and the group with it."""
JOIN_TIMEOUT_S = 300.0
"""All ranks are there within this of the first turn: they may still be loading a model."""
BEATS = 4
"""Turns within the time-out, at least, while rooms are open."""
MISSED_MAX = 6
"""Beats without a word of rank 0 that a rank bears. Rank 0 may be silent for ``BEATS`` of them while another rank does not answer, and
then names that one."""


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


class Member(Protocol):
    """Who takes part in turns. Called on the turns' thread; each call has been carried out when it returns."""

    @property
    def turn(self) -> int:
        """The last turn that this rank has said its facts in."""
        ...

    @property
    def has_rooms(self) -> bool:
        """Whether rooms are open that turns will decide on."""
        ...

    def open_here(self) -> tuple[Opened, ...]:
        """On rank 0: open what was asked for since, and say what that is."""
        ...

    def open_as_told(self, opened: Sequence[Opened]) -> None:
        """On the others: open the same, in this order."""
        ...

    def aside(self) -> Aside:
        """What this rank says in the turn that begins."""
        ...

    def silence(self) -> Facts | None:
        """What this rank says in the collective, if that is nothing: a dummy rank to which nothing has happened."""
        ...

    def facts(self) -> Facts:
        """What it says in the collective else: all that it knows by now of the rooms that are open when the turn begins."""
        ...

    def conclude(self, agreed: Facts, aside: Aside) -> None:
        """What all have said; whatever succeeds now has its assembly among those made in this turn or before."""
        ...

    def group_ended(self, detail: str, *, is_lost: bool) -> None:
        """There are no more turns: the group was closed, or a rank is lost."""
        ...


class RankLost(Exception):
    """The group can not go on; the message says which rank, as far as that is known."""


class Beats:
    """Counts, in ``beat_s`` seconds each, how long it is since rank 0 held a turn. Beats and not seconds: who was stopped itself has missed
    one, however long it was."""

    def __init__(self, beat_s: float) -> None:
        self._beat_s = beat_s
        self.next_due = math.inf
        """When the beat is over."""
        self._missed = 0

    def begin(self, now: float) -> None:
        """There was a turn."""
        self.next_due = now + self._beat_s
        self._missed = 0

    def miss(self, now: float) -> bool:
        """The beat is over without one. True: that was one too many."""
        self.next_due = now + self._beat_s
        self._missed += 1
        return self._missed >= MISSED_MAX


class Turns:
    """One rank's part in the turns of its group."""

    def __init__(self, seat: Seat, member: Member) -> None:
        self._loop = EventLoop(
            f"embedwire-turns-{seat.rank}",
            on_frames=self._on_frames,
            on_time=self._on_time,
            next_due=self._next_due,
        )
        self._seat = seat
        self._member = member
        self._is_leader = seat.rank == 0
        self._others = frozenset(range(1, seat.group.size))
        self._joined: set[int] = set()
        self._join_until = time.monotonic() + JOIN_TIMEOUT_S
        self._wants_turn = False
        self._is_ended = False
        self._is_promised = False
        self._silence: Facts | None = None
        self._beats = Beats(seat.timeout_s / BEATS)
        self._socket = self._loop.socket(zmq.ROUTER if self._is_leader else zmq.DEALER)
        self._disconnected = self._socket.get_monitor_socket(zmq.EVENT_DISCONNECTED)
        self._connect()
        self._loop.start()
        if not self._is_leader:
            self._loop.post(lambda: self._tell_leader(Join(seat.rank)))

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
            self._loop.free()
            raise TransportError(f"turns at {self._seat.address}: {error}") from error
        for socket in (self._socket, self._disconnected):
            self._loop.register(socket)

    # ------------------------------------------------------------------ from the member; any thread

    def want(self) -> None:
        """This rank has news: a turn is held soon."""
        self._loop.post(self._want)

    def _want(self) -> None:
        if self._is_ended:
            return
        if self._is_leader:
            self._wants_turn = True
        else:
            self._tell_leader(News(self._seat.rank, self._member.turn))

    def close(self) -> None:
        """Leave the group; for the others that is its end. Idempotent."""
        self._loop.close(self._shut_down)

    def _shut_down(self) -> None:
        self._loop.call(self._leave)
        self._loop.stop()

    def _leave(self) -> None:
        """After the turn that this rank has promised to be in: the others may be in its collective already."""
        until = time.monotonic() + self._seat.timeout_s
        while self._is_promised and not self._is_ended and (left_s := until - time.monotonic()) > 0:
            if self._socket.poll(math.ceil(left_s * 1000), zmq.POLLIN):
                self._on_frames(self._socket, self._loop.read_all(self._socket))
        self._end(f"rank {self._seat.rank} is shutting down", is_lost=False)

    # ------------------------------------------------------------------ the turns' thread

    def _on_frames(self, socket: zmq.Socket[bytes], frames: list[list[bytes]]) -> None:
        if socket is self._disconnected:
            self._on_disconnected()
            return
        for *_, frame in frames:
            if self._is_ended:
                return
            if self._is_leader:
                self._hear_rank(decode_of_rank(frame))
            else:
                self._hear_leader(decode_of_leader(frame))
                self._beats.begin(time.monotonic())

    def _on_disconnected(self) -> None:
        """A process at the other end is gone."""
        self._on_frames(self._socket, self._loop.read_all(self._socket))  # it may have taken its leave
        if self._is_leader:
            self._wants_turn = True
        else:
            self._end("rank 0 is gone", is_lost=True)

    def _on_time(self, now: float) -> None:
        due = self._next_due()
        if due is None or now < due:
            return
        if not self._is_leader:
            if self._beats.miss(now):
                self._end(f"rank 0 has held no turn for {MISSED_MAX} beats", is_lost=True)
        elif self._joined == self._others:
            self._wants_turn = False
            self._guarded(self._hold)
            self._beats.begin(time.monotonic())
        else:
            missing = sorted(self._others - self._joined)
            self._end(f"ranks {missing} have not joined within {JOIN_TIMEOUT_S:g} s", is_lost=True)

    def _next_due(self) -> float | None:
        if self._is_ended:
            return None
        if self._wants_turn:
            return 0.0 if self._joined == self._others else self._join_until
        return self._beats.next_due if self._is_promised or self._member.has_rooms else None

    def _hear_rank(self, said: FromRank) -> None:
        match said:
            case Join(rank):
                if rank in self._joined:
                    self._end(f"rank {rank} was started anew", is_lost=True)
                self._joined.add(rank)
            case News(_, turn) if turn >= self._member.turn:  # else a turn has heard it meanwhile
                self._wants_turn = True
            case Leave(_, detail):
                self._end(detail, is_lost=True)

    def _hear_leader(self, said: FromLeader) -> None:
        match said:
            case Turn(number, opened):
                self._guarded(lambda: self._prepare(number, opened))
            case Go(aside, words):
                self._guarded(lambda: self._go(aside, words))
            case End(detail, is_lost):
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
        opened = self._member.open_here()
        number = self._member.turn + 1
        self._tell_ranks(Turn(number, opened))
        others, are_silent = self._await_present(number)
        aside = self._member.aside() + others
        if are_silent:
            words = pack(self._member.facts())
            self._tell_ranks(Go(aside, tuple(words)))
            self._member.conclude(unpack(words), aside)
        else:
            self._tell_ranks(Go(aside))
            self._reduce(self._member.facts(), aside)

    def _await_present(self, number: int) -> tuple[Aside, bool]:
        """What the others say beside, and whether none of them has more to say."""
        missing = set(self._others)
        aside, are_silent = Aside(), True
        beats = 0
        while missing:
            if not self._socket.poll(math.ceil(self._seat.timeout_s / BEATS * 1000), zmq.POLLIN):
                beats += 1
                if beats >= BEATS:
                    names = ", ".join(map(str, sorted(missing)))
                    raise RankLost(f"rank {names} did not answer within {self._seat.timeout_s:g} s")
                continue
            said = decode_of_rank(self._socket.recv_multipart()[-1])
            if isinstance(said, Present) and said.turn == number:
                missing.discard(said.rank)
                aside += said.aside
                are_silent &= said.is_silent
            else:
                self._hear_rank(said)
                if self._is_ended:
                    raise RankLost("the group has ended")
        return aside, are_silent

    def _prepare(self, number: int, opened: Sequence[Opened]) -> None:
        """The turn of every other rank, up to its collective."""
        self._member.open_as_told(opened)
        if number != self._member.turn + 1:
            raise RankLost(f"rank {self._seat.rank} is at turn {self._member.turn + 1}, rank 0 at {number}")
        self._is_promised = True
        self._silence = self._member.silence()
        is_silent = self._silence is not None
        self._tell_leader(Present(self._seat.rank, number, self._member.aside(), is_silent))

    def _go(self, aside: Aside, words: Sequence[int]) -> None:
        if not self._is_promised:
            raise RankLost(f"rank {self._seat.rank} was not in the turn that rank 0 began")
        self._is_promised = False
        if words:
            self._member.conclude(unpack(words), aside)
        else:  # facts are taken as late as can be: what has come in since the turn began needs no other one
            self._reduce(self._silence or self._member.facts(), aside)

    def _reduce(self, facts: Facts, aside: Aside) -> None:
        self._member.conclude(unpack(self._seat.collective.all_reduce_min(pack(facts))), aside)

    def _tell_ranks(self, told: FromLeader) -> None:
        frame = msgspec.msgpack.encode(told)
        for rank in sorted(self._joined):
            self._socket.send_multipart([_identity(rank), frame])

    def _tell_leader(self, said: FromRank) -> None:
        self._socket.send(msgspec.msgpack.encode(said))

    def _end(self, detail: str, *, is_lost: bool) -> None:
        """Here, and tell the others."""
        if self._is_ended:
            return
        if self._is_leader:
            self._tell_ranks(End(detail, is_lost))
        else:
            self._tell_leader(Leave(self._seat.rank, detail))
        self._finish(detail, is_lost=is_lost)

    def _finish(self, detail: str, *, is_lost: bool) -> None:
        if not self._is_ended:
            self._is_ended = True
            self._member.group_ended(detail, is_lost=is_lost)


def _identity(rank: int) -> bytes:
    return b"rank" + rank.to_bytes(4, "big")
