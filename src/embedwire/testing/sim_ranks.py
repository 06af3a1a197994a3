"""Receiving ranks without wires and time: a test makes each event by hand, messages of senders and agreement steps. One thread.

For tests that want every order of events. A drain is carried out at once; a grant is answered when the test says that it has landed.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Any

from embedwire.errors import OverloadedError, UsageError
from embedwire.group.agreement import Facts, agree, pack, unpack
from embedwire.group.coordinator import GroupCoordinator
from embedwire.limits import AUX_WORDS, PROTOCOL_VERSION, Limits
from embedwire.memory.allocator import BlockAllocator
from embedwire.memory.budget import Budget
from embedwire.protocol.actions import Drain, Failed, Finished, ReceiverAction
from embedwire.protocol.coordinator import Coordinator, LocalCoordinator
from embedwire.protocol.handshake import Offered
from embedwire.protocol.messages import Announce, Cause, Ended, RoomKey, Status, Welcome
from embedwire.protocol.receiver_core import ReceiverCore
from embedwire.protocol.states import Poll
from embedwire.protocol.topology import RankGroup

End = tuple[int, Cause, str]
"""The room, how it ended, and the words for people."""


class Ranks:
    """The receiving ranks of one group, each with ``blocks`` blocks of 128 tokens and memory for ``memory[rank]`` tokens of one byte."""

    def __init__(
        self,
        group: RankGroup,
        *,
        senders: int = 1,
        blocks: int = 4,
        memory: Sequence[int] = (),
        limits: Limits | None = None,
    ) -> None:
        self.group = group
        self.addresses = [f"encoder/{sender}" for sender in range(senders)]
        self.pools = [BlockAllocator(blocks, 128) for _ in group.hosts]
        self.budgets = [Budget(tokens) for tokens in memory or [10_000] * group.size]
        self.ends: list[list[End]] = [[] for _ in group.hosts]
        self.finished: list[list[Finished]] = [[] for _ in group.hosts]
        self.orders: list[list[ReceiverAction]] = [[] for _ in group.hosts]
        self.contributed: dict[int, Facts] = {}
        self.agreed: dict[int, Facts] = {}
        self.last_agreed: Facts | None = None
        self.coordinators: dict[int, GroupCoordinator] = {}
        self.cores = [
            ReceiverCore(
                incarnation=100 + rank,
                offered=Offered(("a",), 128, blocks, (("tcp", b""),), frozenset({"tcp"})),
                blocks=self.pools[rank],
                memory=self.budgets[rank],
                token_bytes=1,
                default_allocate_tokens=256,
                limits=limits or Limits(window_rounds=1),
                group=group,
                rank=rank,
                coordinator=self._coordinator(rank),
            )
            for rank in range(group.size)
        ]

    def _coordinator(self, rank: int) -> Coordinator:
        if self.group.size == 1:
            return LocalCoordinator(self.budgets[rank], token_bytes=1)
        self.coordinators[rank] = GroupCoordinator(
            self.budgets[rank], token_bytes=1, is_dummy=self.group.is_dummy(rank)
        )
        return self.coordinators[rank]

    # ------------------------------------------------------------------ what happens on one rank

    def open(self, room: int, rank: int) -> None:
        """A rank opens a room, which no rank but the first can refuse; its senders welcome it."""
        core, key = self.cores[rank], RoomKey(room)
        try:
            self.do(rank, core.open(key, self.addresses, now=0.0))
        except (OverloadedError, UsageError) as error:
            if rank == 0:
                raise
            self.do(rank, core.open_failed(key, str(error), now=0.0))
        for address, session in core.lanes.sessions.items():
            if session.wire is None:
                welcome = Welcome(
                    source=self._life(address),
                    target=core.incarnation,
                    version=PROTOCOL_VERSION,
                    nonce=session.nonce,
                    fields=("a",),
                    wire="tcp",
                )
                self.do(rank, core.on_message(welcome, address, now=0.0))

    def _life(self, address: str) -> int:
        return 1000 + self.addresses.index(address)

    def hear(self, rank: int, key: RoomKey, kind: type[Any], **content: Any) -> None:
        """The sender of a lane says something."""
        core = self.cores[rank]
        room = core.lanes.transfers.get(key)
        if room is None:
            return
        message = kind(source=self._life(room.address), target=core.incarnation, **key._asdict(), **content)
        self.do(rank, core.on_message(message, room.address, now=0.0))

    def announce(self, rank: int, key: RoomKey, total: int, *, ready: bool = True, **other: Any) -> None:
        """A lane of a room of ``total`` tokens is announced."""
        lane = self.cores[rank].lanes.transfers.get(key)
        if lane is not None:
            tokens = len(lane.lane.share(total))
            aux = (total, *[0] * (AUX_WORDS - 1))
            content = {"total_tokens": tokens, "aux": aux, "content_hash": b"", "ready": ready}
            self.hear(rank, key, Announce, **(content | other))

    def land(self, rank: int, key: RoomKey) -> None:
        """Everything that a lane was granted so far lands."""
        lane = self.cores[rank].lanes.transfers.get(key)
        if lane is not None and lane.open_rounds:
            number, sent = len(lane.round_sizes) - 1, lane.granted_tokens
            self.hear(rank, key, Status, poll=Poll.TRANSFERRING, round=number, sent_tokens=sent)

    def ready(self, *rooms: int, total: int = 200) -> None:
        """Rooms are opened and announced on every rank."""
        for room in rooms:
            for rank in range(self.group.size):
                self.open(room, rank)
                for lane in self.lanes_of(rank, room):
                    self.announce(rank, lane, total)

    def land_all(self, room: int) -> None:
        """All of a room lands on every rank."""
        for rank, core in enumerate(self.cores):
            while lanes := [
                key for key in self.lanes_of(rank, room) if core.lanes.transfers[key].open_rounds
            ]:
                for key in lanes:
                    self.land(rank, key)

    def causes(self) -> list[list[tuple[int, Cause]]]:
        """How rooms ended, rank by rank, in order."""
        return [[(room, cause) for room, cause, _ in ends] for ends in self.ends]

    def end(self, rank: int, key: RoomKey, cause: Cause) -> None:
        """The sender ends a lane."""
        self.hear(rank, key, Ended, cause=cause, detail="by its sender")

    def abort(self, rank: int, room: int) -> None:
        """The client of a room has gone."""
        self.do(rank, self.cores[rank].abort(RoomKey(room), Cause.ABORTED, "gone", now=0.0))

    def release(self, rank: int, room: int) -> None:
        """The assembly of a finished room is no longer needed."""
        held = next(one.reservation for one in self.finished[rank] if one.key == RoomKey(room))
        self.do(rank, self.cores[rank].on_assembly_released(held, now=0.0))

    def do(self, rank: int, actions: Sequence[ReceiverAction]) -> None:
        """Carry out the orders that concern rooms and drains; ``orders`` keeps them all."""
        todo = deque(actions)
        core = self.cores[rank]
        while todo:
            action = todo.popleft()
            self.orders[rank].append(action)
            if isinstance(action, Drain):
                drained = core.on_drained(action.key, action.to_token, aux=None, digests=None, now=0.0)
                todo.extend(drained)
            elif isinstance(action, Finished):
                self.ends[rank].append((action.key.room, Cause.DONE, ""))
                self.finished[rank].append(action)
            elif isinstance(action, Failed):
                self.ends[rank].append((action.key.room, action.cause, action.detail))

    # ------------------------------------------------------------------ agreement steps

    def contribute(self, rank: int) -> None:
        """A rank contributes its facts; when all have, they are agreed, and wait for each rank to conclude."""
        self.contributed[rank] = self.coordinators[rank].facts()
        if len(self.contributed) == self.group.size:
            facts = self.last_agreed = unpack(agree(map(pack, self.contributed.values())))
            self.agreed = dict.fromkeys(range(self.group.size), facts)
            self.contributed = {}

    def conclude(self, rank: int) -> None:
        """A rank gets what is agreed."""
        decisions = self.coordinators[rank].on_agreed(self.agreed.pop(rank))
        self.do(rank, self.cores[rank].on_decided(decisions, now=0.0))

    def step(self) -> None:
        """A whole step."""
        for rank in range(self.group.size):
            self.contribute(rank)
        for rank in range(self.group.size):
            self.conclude(rank)

    @property
    def has_news(self) -> bool:
        """Whether any rank needs a step."""
        return any(coordinator.has_news() for coordinator in self.coordinators.values())

    def steps(self) -> int:
        """As many as the ranks need; returns how many that were."""
        count = 0
        while self.has_news:
            self.step()
            count += 1
            assert count < 1000, "the ranks never come to rest"
        return count

    def lanes_of(self, rank: int, room: int) -> list[RoomKey]:
        """The lanes of a room that are alive on a rank."""
        return [
            key for key, lane in self.cores[rank].lanes.transfers.items() if key.room == room and lane.is_live
        ]
