"""Every order of events of two ranks: what each lane receives, what each rank contributes and concludes, and a fault at any moment.

States that were seen are not explored again, so the search ends by itself; the numbers of states are asserted, that nobody shrinks it."""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from dataclasses import dataclass, field

import pytest

from embedwire.group.coordinator import GroupCoordinator
from embedwire.protocol.messages import Cause, RoomKey
from embedwire.protocol.receiver_core import ReceiverCore
from embedwire.protocol.topology import RankGroup
from embedwire.testing.sim_ranks import Ranks

Event = tuple[object, ...]


@dataclass
class State:
    """Where everything stands. ``opened``: the rooms that rank 0's step message names; ``is_begun``: it is on its way to rank 1."""

    ranks: Ranks
    rooms: int
    faults: frozenset[str]
    tokens: int
    opened: list[int] = field(default_factory=list)
    is_begun: bool = False
    trail: tuple[Event, ...] = ()

    def key(self, room: int, rank: int) -> RoomKey:
        return RoomKey(room, 0, rank)

    # ------------------------------------------------------------------ what may happen next

    def events(self) -> Iterator[Event]:
        """All that may happen now."""
        ranks = self.ranks
        for room in range(1, self.rooms + 1):
            if not self._knows(0, room):
                yield "open", room
                break
        is_idle = not (self.is_begun or ranks.contributed or 0 in ranks.agreed)
        if is_idle and ranks.has_news:
            yield ("start",)
        if self.is_begun and 1 not in ranks.agreed:
            yield ("contribute",)
        for rank in ranks.agreed:
            yield "conclude", rank
        for rank, core in enumerate(ranks.cores):
            for key, lane in core.lanes.transfers.items():
                if lane.is_live and not lane.is_ready:
                    yield "announce", rank, key.room
                if lane.is_live and lane.open_rounds:
                    yield "land", rank, key.room
        for rank, finished in enumerate(ranks.finished):
            for end in finished:
                if end.reservation in ranks.budgets[rank]._reserved:
                    yield "release", rank, end.key.room
        for fault in sorted(self.faults):
            if fault == "abort" and RoomKey(1) in ranks.cores[0].rooms:
                yield (fault,)
            if fault == "fail" and ranks.lanes_of(1, 1):
                yield (fault,)

    def _knows(self, rank: int, room: int) -> bool:
        core = self.ranks.cores[rank]
        return RoomKey(room) in core.rooms or any(end[0] == room for end in self.ranks.ends[rank])

    def happen(self, event: Event) -> None:
        """It happens, and whatever has to hold holds."""
        ranks = self.ranks
        match event:
            case ("open", int(room)):
                ranks.open(room, 0)
            case ("start",):
                self.is_begun = True
                self.opened = [
                    room for room in range(1, self.rooms + 1) if RoomKey(room) in ranks.cores[0].rooms
                ]
                ranks.contribute(0)
            case ("contribute",):
                self.is_begun = False
                for room in self.opened:
                    if not self._knows(1, room):
                        ranks.open(room, 1)
                ranks.contribute(1)
            case ("conclude", int(rank)):
                ranks.conclude(rank)
            case ("announce", int(rank), int(room)):
                ranks.announce(rank, self.key(room, rank), self.tokens)
            case ("land", int(rank), int(room)):
                ranks.land(rank, self.key(room, rank))
            case ("release", int(rank), int(room)):
                ranks.release(rank, room)
            case ("abort",):
                self.faults -= {"abort"}
                ranks.abort(0, 1)
            case ("fail",):
                self.faults -= {"fail"}
                ranks.end(1, self.key(1, 1), Cause.ENCODER_FAILED)
        self.trail += (event,)
        self.check()

    # ------------------------------------------------------------------ what has to hold

    def check(self) -> None:
        """Ranks end rooms in one order and in one way, and hold no block while they wait."""
        one, two = ([(room, cause) for room, cause, _ in ends] for ends in self.ranks.ends)
        assert all(a == b for a, b in zip(one, two, strict=False)), self.trail
        for pool in self.ranks.pools:
            pool.check()
        for core in self.ranks.cores:
            assert not any(lane.open_rounds for lane in core.admission.for_blocks), self.trail

    def check_rest(self) -> None:
        """Nothing more can happen: every room has ended on both ranks, and nothing is kept."""
        ranks = self.ranks
        ends = [{room: cause for room, cause, _ in ends} for ends in ranks.ends]
        assert ends[0] == ends[1], self.trail
        assert sorted(ends[0]) == list(range(1, self.rooms + 1)), self.trail
        assert all(pool.blocks_free == pool.blocks_total for pool in ranks.pools), self.trail
        assert all(budget.used_bytes == 0 for budget in ranks.budgets), self.trail
        assert not any(core.rooms or core.coordinator.queue for core in ranks.cores), self.trail

    def digest(self) -> tuple[object, ...]:
        """Equal for states with the same future."""
        ranks = self.ranks
        return (
            tuple(_core(core, ranks.coordinators[rank]) for rank, core in enumerate(ranks.cores)),
            tuple(tuple((room, cause) for room, cause, _ in ends) for ends in ranks.ends),
            tuple(frozenset(budget._reserved) for budget in ranks.budgets),
            tuple((rank, facts.free_bytes, facts.rooms) for rank, facts in sorted(ranks.contributed.items())),
            tuple((rank, facts.free_bytes, facts.rooms) for rank, facts in sorted(ranks.agreed.items())),
            tuple(self.opened) if self.is_begun else (),
            self.is_begun,
            self.faults,
        )


def _core(core: ReceiverCore, coordinator: GroupCoordinator) -> tuple[object, ...]:
    rooms = tuple((room.key, room.facts(), room.has_begun, room.failure) for room in core.rooms.values())
    agreed = tuple((key, room.facts, room.known, room.is_queued) for key, room in coordinator._rooms.items())
    lanes = tuple(
        (k, lane.state, lane.is_ready, lane.granted_tokens) for k, lane in core.lanes.transfers.items()
    )
    queues = (
        tuple(coordinator.queue),
        tuple(lane.key for lane in core.admission.for_blocks),
    )
    in_step = tuple(key for key, _ in coordinator._in_step)
    return rooms, agreed, lanes, queues, coordinator.has_news(), in_step


def explore(first: State, *, states_max: int) -> tuple[int, set[tuple[Cause, ...]]]:
    """Depth first, from every state every event. Returns how many states there are, and how the rooms end in those where nothing is left
    to happen."""
    seen = {first.digest()}
    todo = [pickle.dumps(first)]
    ends: set[tuple[Cause, ...]] = set()
    while todo:
        frozen = todo.pop()
        state: State = pickle.loads(frozen)
        events = list(state.events())
        if not events:
            state.check_rest()
            ends.add(tuple(cause for _, cause, _ in sorted(state.ranks.ends[0])))
        for event in events:
            following: State = pickle.loads(frozen)
            following.happen(event)
            digest = following.digest()
            if digest not in seen:
                seen.add(digest)
                todo.append(pickle.dumps(following))
        assert len(seen) <= states_max, f"more than {states_max} states"
    return len(seen), ends


def world(*, rooms: int, blocks: int, memory: int, faults: set[str], tokens: int) -> State:
    group = RankGroup.on_one_host(2, delivery="replicate")
    return State(Ranks(group, blocks=blocks, memory=[memory, memory]), rooms, frozenset(faults), tokens)


@pytest.mark.failure_mode(
    "ranks-see-different-totals",
    "fastest-rank-decides",
    "one-rank-cannot-allocate",
    "rank-fails-alone",
    "abort-not-propagated",
)
@pytest.mark.parametrize("blocks", [1, 2])
@pytest.mark.parametrize("faults", [set(), {"abort"}, {"fail"}, {"abort", "fail"}], ids=sorted)
def test_one_room(blocks: int, faults: set[str]) -> None:
    """One room of two blocks; a client leaves rank 0 and a sender fails on rank 1, in every order of events."""
    first = world(rooms=1, blocks=blocks, memory=256, faults=faults, tokens=256)
    states, ends = explore(first, states_max=2000)
    assert states > 75
    assert (Cause.DONE,) in ends
    assert ((Cause.ABORTED,) in ends) == ("abort" in faults)
    assert ((Cause.ENCODER_FAILED,) in ends) == ("fail" in faults)


@pytest.mark.failure_mode("one-rank-cannot-allocate", "ranks-admit-different-rooms")
@pytest.mark.parametrize("memory", [128, 256])
def test_two_rooms(memory: int) -> None:
    """Two rooms, a pool of one block, memory for one assembly or for both."""
    states, ends = explore(world(rooms=2, blocks=1, memory=memory, faults=set(), tokens=128), states_max=5000)
    assert states > 2000
    assert ends == {(Cause.DONE, Cause.DONE)}
