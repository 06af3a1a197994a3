"""Groups of ranks in a simulated world: who tells whom of a room, and the turns in which they agree. One thread.

A ``Group`` is N receivers, each with a process, a pool and memory of its own. Rank 0 starts a turn when any rank has something to say;
the turn message names the rooms that rank 0 has opened since the last one, so every rank knows the same rooms in the same order before
it says its facts. When all have, the elementwise minimum goes back to each. What passes between ranks takes a random time and is never
lost; who hears nothing for ``agreement_timeout_s`` takes the group for lost, which ends it on every rank that still lives.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from embedwire.errors import OverloadedError
from embedwire.protocol.actions import Failed, Finished
from embedwire.protocol.agreement import Facts, agree, pack, unpack
from embedwire.protocol.messages import Cause, RoomKey
from embedwire.protocol.topology import RankGroup
from embedwire.testing.sim_receiver import ReceiverNode
from embedwire.testing.sim_sender import SenderNode
from embedwire.testing.sim_timeline import Call, Process, Timeline
from embedwire.testing.sim_wire import InvariantBroken

Opened = tuple[RoomKey, tuple[str, ...]]
End = tuple[int, RoomKey, Cause, int]
"""The turn in which a room ended, the room, how, and its tokens where it is whole."""


@dataclass(frozen=True, slots=True)
class EncoderGroup:
    """The ranks of one encoder. Each offers the lanes of a room that begin there."""

    address: str
    nodes: list[SenderNode]


@dataclass(slots=True)
class Turn:
    """One turn, from rank 0's message on. ``said``: the facts of each rank that has said them."""

    opened: tuple[Opened, ...]
    said: dict[int, Facts]


@dataclass(slots=True)
class Seat:
    """One rank's place in the turns. ``steps`` counts what it has said and heard; ``is_waiting``: for an answer, or for a turn."""

    steps: int = 0
    is_waiting: bool = False
    is_in_turn: bool = False
    told: Turn | None = None


class Group:
    """The ranks of one language server."""

    def __init__(
        self,
        address: str,
        ranks: RankGroup,
        *,
        timeline: Timeline,
        agreement_timeout_s: float,
        turn_s: tuple[float, float],
    ) -> None:
        self.address = address
        self.ranks = ranks
        self.nodes: list[ReceiverNode] = []
        self.agreement_timeout_s = agreement_timeout_s
        self.turn_s = turn_s
        self.turns: list[Turn] = []
        self.agreed: list[Facts] = []
        self._timeline = timeline
        self.start()

    def start(self) -> None:
        """All ranks begin a new life together."""
        self.is_lost = False
        self.ends: list[End] = []
        self._ended: dict[int, int] = dict.fromkeys(range(self.ranks.size), 0)
        self._seats = [Seat() for _ in range(self.ranks.size)]
        self._opened: list[Opened] = []
        self._turn: Turn | None = None
        self._is_wanted = False

    @property
    def collectives(self) -> int:
        """Turns in which every rank has said its facts."""
        return len(self.agreed)

    @property
    def process(self) -> Process:
        """That of rank 0, whom clients talk to."""
        return self.nodes[0].process

    @property
    def readers(self) -> list[ReceiverNode]:
        """Those that receive from the wire."""
        return [self.nodes[rank] for rank in self.ranks.readers]

    @property
    def is_at_rest(self) -> bool:
        """No turn runs, and nobody wants one."""
        return self.is_lost or (
            self._turn is None and not self._opened and not any(n.core.wants_turn() for n in self.nodes)
        )

    # ------------------------------------------------------------------ what clients say, on rank 0

    def open(self, key: RoomKey, addresses: Sequence[str]) -> None:
        """A request came in. Raises OverloadedError, also when the group is lost."""
        if self.is_lost:
            raise OverloadedError("the group is lost")
        self.nodes[0].open(key, addresses)
        if self.ranks.size > 1:
            self._opened.append((key, tuple(addresses)))

    def abort(self, key: RoomKey) -> None:
        """The client of a room has gone."""
        self.nodes[0].abort(key)

    # ------------------------------------------------------------------ turns

    def look(self) -> None:
        """Whoever has something to say tells rank 0 that it wants a turn. Called after every event of the world."""
        for rank, seat in enumerate(self._seats):
            process = self.nodes[rank].process
            is_able = not (process.is_dead or process.is_frozen or self.is_lost)
            if is_able and not seat.is_waiting and self.nodes[rank].core.wants_turn():
                self._wait(rank)
                self._later(0, partial(self._on_nudge, self.nodes[rank].core.turn))

    def _later(self, rank: int, call: Call) -> None:
        """Something reaches the present life of a rank after a while."""
        process = self.nodes[rank].process
        self._timeline.after(self._timeline.between(self.turn_s), lambda: process.run(call))

    def _wait(self, rank: int) -> None:
        seat, process = self._seats[rank], self.nodes[rank].process
        seat.is_waiting = True
        steps = seat.steps

        def look() -> None:
            if self._seats[rank] is seat and seat.is_waiting and seat.steps == steps:
                self.lose(f"rank {rank} has waited {self.agreement_timeout_s:g} s for the others")

        self._timeline.after(self.agreement_timeout_s, lambda: process.run(look))

    def _step(self, rank: int) -> None:
        seat = self._seats[rank]
        seat.steps += 1
        seat.is_waiting = False

    def _on_nudge(self, said: int) -> None:
        """A rank that has ``said`` its facts in so many turns has news. It can tell them in the turn that runs, or in another one."""
        if said < self.nodes[0].core.turn:
            return
        if self._turn is None:
            self._begin()
        else:
            self._is_wanted = True

    def _begin(self) -> None:
        if self.is_lost:
            return
        self._is_wanted = False
        opened, self._opened = tuple(self._opened), []
        turn = self._turn = Turn(opened, {})
        self.turns.append(turn)
        self._timeline.note(f"{self.address} turn {len(self.turns)}: {[key for key, _ in opened]}")
        self._contribute(0, turn)
        for rank in range(1, self.ranks.size):
            self._later(rank, partial(self._on_turn, rank, turn))

    def _on_turn(self, rank: int, turn: Turn) -> None:
        """The turn message has come; who has not heard the end of the last turn keeps it for then."""
        if self._seats[rank].is_in_turn:
            self._seats[rank].told = turn
            return
        for key, addresses in turn.opened:
            self.nodes[rank].open(key, addresses)
        self._contribute(rank, turn)

    def _contribute(self, rank: int, turn: Turn) -> None:
        if self.is_lost:
            return
        turn.said[rank] = self.nodes[rank].core.facts()
        self._step(rank)
        self._seats[rank].is_in_turn = True
        self._wait(rank)
        if len(turn.said) == self.ranks.size:
            agreed = unpack(agree([pack(facts) for facts in turn.said.values()]))
            self.agreed.append(agreed)
            for each in range(self.ranks.size):
                self._later(each, partial(self._apply, each, agreed))

    def _apply(self, rank: int, agreed: Facts) -> None:
        if self.is_lost:
            return
        seat, node = self._seats[rank], self.nodes[rank]
        self._step(rank)
        seat.is_in_turn = False
        node.do(node.core.on_agreed(agreed, now=self._timeline.now))
        if rank == 0:
            self._turn = None
            if self._is_wanted:
                self._begin()
        if seat.told is not None:
            turn, seat.told = seat.told, None
            self._on_turn(rank, turn)

    def lose(self, detail: str) -> None:
        """The group is lost: every rank that lives hears of it."""
        if self.is_lost:
            return
        self.is_lost = True
        self._timeline.note(f"{self.address} is lost: {detail}")
        for rank, node in enumerate(self.nodes):
            if not node.process.is_dead:
                self._later(rank, self._hear_of_loss(node, detail))

    def _hear_of_loss(self, node: ReceiverNode, detail: str) -> Callable[[], None]:
        return lambda: node.do(node.core.on_group_ended(Cause.RANK_LOST, detail, now=self._timeline.now))

    # ------------------------------------------------------------------ ends

    def on_end(self, node: ReceiverNode, key: RoomKey, end: Finished | Failed) -> None:
        """A room has ended on a rank: there, as on all others, in the same turn and order, in the same way."""
        if self.is_lost:
            return  # who had not heard the last agreement ends otherwise
        if isinstance(end, Failed):
            news = (node.core.turn, key, end.cause, 0)
        else:
            news = (node.core.turn, key, Cause.DONE, end.report.total_tokens)
        count = self._ended[node.rank]
        self._ended[node.rank] += 1
        if count == len(self.ends):
            self.ends.append(news)
        elif self.ends[count] != news:
            raise InvariantBroken(f"{node.address} ends {news}, another rank {self.ends[count]}")
