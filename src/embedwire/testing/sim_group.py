"""Groups of ranks in a simulated world: what passes between the ranks, and the steps in which they agree. One thread.

A ``Group`` is N receivers, each with a process, a pool and memory of its own. Rank 0 begins a step when any rank has news; its message
names the rooms that rank 0 has opened since the last step, so every rank has the same rooms in the same order before it contributes its
facts. When all have, the elementwise minimum goes back to each. What passes between ranks takes a random time and is never lost; a rank
that gets nothing for ``agreement_timeout_s`` takes the group for lost, which ends it on every rank that still runs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from embedwire.errors import OverloadedError, UsageError
from embedwire.group.agreement import Facts, agree, pack, unpack
from embedwire.group.coordinator import GroupCoordinator
from embedwire.protocol.actions import Failed, Finished
from embedwire.protocol.coordinator import Coordinator
from embedwire.protocol.messages import Cause, RoomKey
from embedwire.protocol.topology import RankGroup
from embedwire.testing.sim_memory import TOKEN_BYTES
from embedwire.testing.sim_receiver import ReceiverNode
from embedwire.testing.sim_sender import SenderNode
from embedwire.testing.sim_timeline import Call, Process, Timeline
from embedwire.testing.sim_wire import InvariantBroken

Opened = tuple[RoomKey, tuple[str, ...]]
End = tuple[int, RoomKey, Cause, int]
"""The step in which a room ended, the room, how, and its tokens where it is whole."""


@dataclass(frozen=True, slots=True)
class EncoderGroup:
    """The ranks of one encoder. Each offers the lanes of a room that begin there."""

    address: str
    nodes: list[SenderNode]


@dataclass(slots=True)
class Step:
    """One step, from rank 0's message on. ``contributed``: the facts of each rank that has contributed them."""

    opened: tuple[Opened, ...]
    contributed: dict[int, Facts]


@dataclass(slots=True)
class Progress:
    """One rank's part in the steps. ``events`` counts what it has sent and received; ``is_waiting``: for an answer, or for a step;
    ``next_step``: one that began while this rank was in the one before."""

    events: int = 0
    is_waiting: bool = False
    is_in_step: bool = False
    next_step: Step | None = None


class RankNode(ReceiverNode):
    """A receiver that is one rank of a group."""

    coordinator: GroupCoordinator

    def _coordinator(self) -> Coordinator:
        self.coordinator = GroupCoordinator(
            self.budget, token_bytes=TOKEN_BYTES, is_dummy=self.group.is_dummy(self.rank)
        )
        return self.coordinator

    def open_as_leader(self, key: RoomKey, addresses: Sequence[str]) -> None:
        """Open a room that rank 0 has opened. What is wrong with it fails the room."""
        try:
            self.open(key, addresses)
        except (OverloadedError, UsageError) as error:
            self.opened.add(key)
            self.do(self.core.open_failed(key, str(error), now=self.timeline.now))


class Group:
    """The ranks of one language server."""

    def __init__(
        self,
        address: str,
        ranks: RankGroup,
        *,
        timeline: Timeline,
        agreement_timeout_s: float,
        step_s: tuple[float, float],
    ) -> None:
        self.address = address
        self.ranks = ranks
        self.nodes: list[RankNode] = []
        self.agreement_timeout_s = agreement_timeout_s
        self.step_s = step_s
        self.steps: list[Step] = []
        self.agreed: list[Facts] = []
        self._timeline = timeline
        self.start()

    def start(self) -> None:
        """All ranks begin a new life together."""
        self.is_lost = False
        self.ends: list[End] = []
        self._ended: dict[int, int] = dict.fromkeys(range(self.ranks.size), 0)
        self._progress = [Progress() for _ in range(self.ranks.size)]
        self._opened: list[Opened] = []
        self._step: Step | None = None
        self._is_wanted = False

    @property
    def collectives(self) -> int:
        """Steps to which every rank has contributed."""
        return len(self.agreed)

    @property
    def process(self) -> Process:
        """That of rank 0, which clients send requests to."""
        return self.nodes[0].process

    @property
    def readers(self) -> list[ReceiverNode]:
        """Those that receive from the wire."""
        return [self.nodes[rank] for rank in self.ranks.readers]

    @property
    def is_at_rest(self) -> bool:
        """No step runs, and no rank needs one."""
        return self.is_lost or (
            self._step is None and not self._opened and not any(n.coordinator.has_news() for n in self.nodes)
        )

    # ------------------------------------------------------------------ what clients request, on rank 0

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

    # ------------------------------------------------------------------ steps

    def look(self) -> None:
        """A rank with news requests a step from rank 0. Called after every event of the world."""
        for rank, progress in enumerate(self._progress):
            process = self.nodes[rank].process
            is_able = not (process.is_dead or process.is_frozen or self.is_lost)
            if is_able and not progress.is_waiting and self.nodes[rank].coordinator.has_news():
                self._wait(rank)
                self._later(0, partial(self._on_request, self.nodes[rank].coordinator.last_step()))

    def _later(self, rank: int, call: Call) -> None:
        """Something reaches the present life of a rank after a while."""
        process = self.nodes[rank].process
        self._timeline.after(self._timeline.between(self.step_s), lambda: process.run(call))

    def _wait(self, rank: int) -> None:
        progress, process = self._progress[rank], self.nodes[rank].process
        progress.is_waiting = True
        events = progress.events

        def look() -> None:
            if self._progress[rank] is progress and progress.is_waiting and progress.events == events:
                self.lose(f"rank {rank} has waited {self.agreement_timeout_s:g} s for the others")

        self._timeline.after(self.agreement_timeout_s, lambda: process.run(look))

    def _advance(self, rank: int) -> None:
        progress = self._progress[rank]
        progress.events += 1
        progress.is_waiting = False

    def _on_request(self, last_step: int) -> None:
        """A rank that has contributed up to ``last_step`` has news. The step that runs may cover them, or another one."""
        if last_step < self.nodes[0].coordinator.last_step():
            return
        if self._step is None:
            self._begin()
        else:
            self._is_wanted = True

    def _begin(self) -> None:
        if self.is_lost:
            return
        self._is_wanted = False
        opened, self._opened = tuple(self._opened), []
        step = self._step = Step(opened, {})
        self.steps.append(step)
        self._timeline.note(f"{self.address} step {len(self.steps)}: {[key for key, _ in opened]}")
        self._contribute(0, step)
        for rank in range(1, self.ranks.size):
            self._later(rank, partial(self._on_begin, rank, step))

    def _on_begin(self, rank: int, step: Step) -> None:
        """The message of a step has come; a rank that is still in the step before keeps it until then."""
        if self._progress[rank].is_in_step:
            self._progress[rank].next_step = step
            return
        for key, addresses in step.opened:
            self.nodes[rank].open_as_leader(key, addresses)
        self._contribute(rank, step)

    def _contribute(self, rank: int, step: Step) -> None:
        if self.is_lost:
            return
        step.contributed[rank] = self.nodes[rank].coordinator.facts()
        self._advance(rank)
        self._progress[rank].is_in_step = True
        self._wait(rank)
        if len(step.contributed) == self.ranks.size:
            agreed = unpack(agree([pack(facts) for facts in step.contributed.values()]))
            self.agreed.append(agreed)
            for each in range(self.ranks.size):
                self._later(each, partial(self._apply, each, agreed))

    def _apply(self, rank: int, agreed: Facts) -> None:
        if self.is_lost:
            return
        progress, node = self._progress[rank], self.nodes[rank]
        self._advance(rank)
        progress.is_in_step = False
        decisions = node.coordinator.on_agreed(agreed)
        node.do(node.core.on_decided(decisions, now=self._timeline.now))
        if rank == 0:
            self._step = None
            if self._is_wanted:
                self._begin()
        if progress.next_step is not None:
            step, progress.next_step = progress.next_step, None
            self._on_begin(rank, step)

    def lose(self, detail: str) -> None:
        """The group is lost: it ends on every rank that runs."""
        if self.is_lost:
            return
        self.is_lost = True
        self._timeline.note(f"{self.address} is lost: {detail}")
        for rank, node in enumerate(self.nodes):
            if not node.process.is_dead:
                self._later(rank, self._ending(node, detail))

    def _ending(self, node: ReceiverNode, detail: str) -> Callable[[], None]:
        return lambda: node.do(node.core.end_all(Cause.RANK_LOST, detail, now=self._timeline.now))

    # ------------------------------------------------------------------ ends

    def on_end(self, node: ReceiverNode, key: RoomKey, end: Finished | Failed) -> None:
        """A room has ended on a rank: there, as on all others, in the same step and order, in the same way."""
        if self.is_lost:
            return  # a rank without the last agreement ends otherwise
        cause, tokens = (end.cause, 0) if isinstance(end, Failed) else (Cause.DONE, end.report.total_tokens)
        news = (self.nodes[node.rank].coordinator.last_step(), key, cause, tokens)
        count = self._ended[node.rank]
        self._ended[node.rank] += 1
        if count == len(self.ends):
            self.ends.append(news)
        elif self.ends[count] != news:
            raise InvariantBroken(f"{node.address} ends {news}, another rank {self.ends[count]}")
