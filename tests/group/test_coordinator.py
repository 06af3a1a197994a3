"""Rooms of a group, rank by rank: what is agreed, when they begin, and how they end."""

from __future__ import annotations

from functools import partial

import pytest

from embedwire.errors import OverloadedError
from embedwire.group.agreement import WIDTH, pack
from embedwire.limits import SLOTS_MAX, Limits
from embedwire.protocol.messages import Cause, RoomKey
from embedwire.protocol.states import Poll
from embedwire.protocol.topology import RankGroup
from embedwire.testing.sim_ranks import Ranks

TWO = RankGroup.on_one_host(2, delivery="replicate")
SHARED = RankGroup.on_one_host(2)


def key(room: int, lane: int = 0) -> RoomKey:
    return RoomKey(room, 0, lane)


@pytest.mark.failure_mode("request-never-fits")
def test_what_can_never_fit_says_both_numbers() -> None:
    """The detail holds the need and the limit; the other rank gets the same cause."""
    ranks = Ranks(TWO, memory=[1000, 500])
    ranks.ready(1, total=600)
    ranks.steps()
    assert ranks.causes() == [[(1, Cause.NEVER_FITS)]] * 2
    assert ranks.ends[1][0][2] == "600 tokens need 600 bytes of assembly; there are 500 in all"
    assert ranks.ends[0][0][2] == "on another rank"


@pytest.mark.failure_mode("ranks-admit-different-rooms")
def test_all_ranks_admit_the_same_room() -> None:
    """Rank 1 still reads room 1: room 2 begins on neither rank until both have the memory."""
    ranks = Ranks(TWO, memory=[1000, 1000])
    ranks.ready(1, 2, total=600)
    ranks.steps()
    ranks.land_all(1)
    ranks.steps()
    ranks.release(0, 1)
    assert ranks.steps() == 1
    assert [budget.used_bytes for budget in ranks.budgets] == [0, 600]
    ranks.release(1, 1)
    assert ranks.steps() == 1
    assert [core.rooms[key(2)].has_begun for core in ranks.cores] == [True, True]
    assert [budget.used_bytes for budget in ranks.budgets] == [600, 600]


@pytest.mark.failure_mode("ranks-admit-different-rooms")
def test_memory_that_comes_back_within_a_step_counts_in_the_next() -> None:
    """Memory released between the report and its result is reported in the next step."""
    ranks = Ranks(TWO, memory=[1000, 1000])
    ranks.ready(1, total=600)
    ranks.steps()
    ranks.land_all(1)
    ranks.steps()
    ranks.ready(2, total=600)
    ranks.contribute(0)
    ranks.contribute(1)
    for rank in (0, 1):
        ranks.release(rank, 1)
        ranks.conclude(rank)
    ranks.steps()
    assert [core.rooms[key(2)].has_begun for core in ranks.cores] == [True, True]


def test_no_step_for_memory_that_no_room_waits_for() -> None:
    """An idle group makes no step."""
    ranks = Ranks(TWO)
    ranks.ready(1)
    ranks.steps()
    ranks.land_all(1)
    ranks.steps()
    ranks.release(0, 1)
    ranks.release(1, 1)
    assert ranks.steps() == 0


@pytest.mark.failure_mode("rank-fails-alone")
def test_a_room_that_fails_while_it_is_admitted() -> None:
    """Its sender fails on rank 1 after that rank reported ready: no memory is reserved there, and all ranks end the room."""
    ranks = Ranks(TWO)
    ranks.ready(1)
    ranks.contribute(0)
    ranks.contribute(1)
    ranks.end(1, key(1, 1), Cause.ENCODER_FAILED)
    ranks.conclude(0)
    ranks.conclude(1)
    assert [budget.used_bytes for budget in ranks.budgets] == [200, 0]
    ranks.steps()
    assert ranks.causes() == [[(1, Cause.ENCODER_FAILED)]] * 2
    assert [budget.used_bytes for budget in ranks.budgets] == [0, 0]


@pytest.mark.failure_mode("ranks-see-different-totals")
def test_ranks_that_are_announced_different_totals() -> None:
    """A rank with a smaller announced total than the agreed one ends the room, on all ranks."""
    ranks = Ranks(TWO)
    for rank, total in ((0, 300), (1, 200)):
        ranks.open(1, rank)
        ranks.announce(rank, key(1, rank), total)
    ranks.steps()
    assert ranks.causes() == [[(1, Cause.VIOLATION)]] * 2


@pytest.mark.failure_mode("part-taken-for-whole-room")
def test_a_lane_is_no_news_before_the_room_is() -> None:
    """Four parts per rank become ready and complete one by one; the ranks agree three times: opened, ready, complete."""
    ranks = Ranks(TWO, senders=8, blocks=8)
    steps = 0
    for rank in (0, 1):
        ranks.open(1, rank)
    steps += ranks.steps()
    for step in (
        partial(ranks.announce, total=800, ready=False),
        partial(ranks.announce, total=800),
        ranks.land,
    ):
        lanes = [ranks.lanes_of(rank, 1) for rank in (0, 1)]
        for i in range(4):
            steps += ranks.steps() if i < 3 else 0
            for rank in (0, 1):
                step(rank, lanes[rank][i])
        steps += ranks.steps()
    assert steps == 3
    assert ranks.causes() == [[(1, Cause.DONE)]] * 2


@pytest.mark.failure_mode("ranks-see-different-totals")
def test_an_announcement_within_a_step() -> None:
    """All ranks reported no total, and the announcement arrives before the result: no contradiction."""
    ranks = Ranks(TWO)
    for rank in (0, 1):
        ranks.open(1, rank)
    ranks.contribute(0)
    ranks.contribute(1)
    for rank in (0, 1):
        ranks.announce(rank, key(1, rank), 300)
        ranks.conclude(rank)
    assert [core.rooms[key(1)].total_tokens for core in ranks.cores] == [300, 300]
    ranks.steps()
    ranks.land_all(1)
    ranks.steps()
    assert ranks.causes() == [[(1, Cause.DONE)]] * 2


@pytest.mark.failure_mode("ranks-see-different-totals")
def test_one_rank_knows_the_total() -> None:
    """(2000, 0) and (0, 0): the ranks agree on 2000, and wait."""
    ranks = Ranks(TWO)
    for rank in (0, 1):
        ranks.open(1, rank)
    ranks.announce(0, key(1, 0), 2000)
    ranks.steps()
    assert ranks.last_agreed is not None
    assert [agreed.total_tokens for agreed in ranks.last_agreed.rooms] == [2000]
    assert not any(coordinator.queue for coordinator in ranks.coordinators.values())
    assert ranks.steps() == 0


@pytest.mark.failure_mode("ranks-see-different-totals")
def test_a_dummy_rank_goes_along() -> None:
    """It receives and reserves nothing, gets the total, and ends the room in the same step."""
    ranks = Ranks(SHARED, memory=[1000, 1])
    ranks.ready(1, total=300)
    ranks.steps()
    dummy = ranks.cores[1].rooms[key(1)]
    assert (not dummy.lanes, dummy.total_tokens, ranks.budgets[1].used_bytes) == (True, 300, 0)
    ranks.land_all(1)
    ranks.steps()
    assert ranks.causes() == [[(1, Cause.DONE)]] * 2
    assert ranks.coordinators[0].last_step() == ranks.coordinators[1].last_step()


@pytest.mark.failure_mode("abort-not-propagated")
def test_an_end_that_comes_after_success_was_said() -> None:
    """The client disconnects between report and result: a success that all ranks reported stands, else the room is aborted."""
    for is_whole in (True, False):
        ranks = Ranks(TWO)
        ranks.ready(1)
        ranks.steps()
        ranks.land(0, key(1, 0))
        if is_whole:
            ranks.land(1, key(1, 1))
        ranks.contribute(0)
        ranks.contribute(1)
        ranks.abort(0, 1)
        assert ranks.causes() == [[], []]
        ranks.conclude(0)
        ranks.conclude(1)
        ranks.steps()
        assert ranks.causes() == [[(1, Cause.DONE if is_whole else Cause.ABORTED)]] * 2


@pytest.mark.failure_mode("rank-fails-alone")
def test_two_ranks_fail_in_different_ways() -> None:
    """Both ranks give the same cause, and neither ends the room before it is agreed."""
    ranks = Ranks(TWO, senders=2)
    ranks.ready(1, 2)
    ranks.steps()
    ranks.end(0, key(1, 0), Cause.ENCODER_FAILED)
    ranks.end(1, key(1, 3), Cause.WIRE_FAILED)
    ranks.end(1, key(2, 3), Cause.CORRUPT)
    assert ranks.causes() == [[], []]
    ranks.steps()
    assert ranks.causes() == [[(1, Cause.ENCODER_FAILED), (2, Cause.CORRUPT)]] * 2
    assert [budget.used_bytes for budget in ranks.budgets] == [0, 0]
    assert [pool.blocks_free for pool in ranks.pools] == [4, 4]


@pytest.mark.failure_mode("one-rank-cannot-allocate")
def test_a_rank_that_is_full_can_not_refuse_what_rank_0_has_opened() -> None:
    """One room too many is refused by rank 0; on another rank it fails, on all alike."""
    ranks = Ranks(TWO, limits=Limits(rooms_max=1))
    ranks.ready(1)
    with pytest.raises(OverloadedError):
        ranks.open(2, 0)
    assert list(ranks.cores[0].rooms) == [key(1)]
    ranks.steps()
    ranks.land_all(1)
    ranks.steps()
    ranks.end(0, key(1), Cause.DONE)  # rank 0's lane is over, rank 1's waits for a last word
    ranks.open(2, 0)
    ranks.open(2, 1)
    ranks.steps()
    assert ranks.causes() == [[(1, Cause.DONE), (2, Cause.OVERLOADED)]] * 2


@pytest.mark.failure_mode("rank-lost")
def test_a_lost_group_ends_every_room() -> None:
    """Every room ends, also one about to succeed, and all memory comes back."""
    ranks = Ranks(TWO)
    ranks.ready(1, 2)
    ranks.steps()
    ranks.land(0, key(1, 0))
    ranks.contribute(0)
    ranks.do(0, ranks.cores[0].end_all(Cause.RANK_LOST, "rank 1 is gone", now=0.0))
    assert ranks.ends[0] == [(1, Cause.RANK_LOST, "rank 1 is gone"), (2, Cause.RANK_LOST, "rank 1 is gone")]
    assert not ranks.cores[0].rooms
    assert not ranks.coordinators[0].queue
    assert not ranks.coordinators[0].has_news()
    assert ranks.budgets[0].used_bytes == 0
    assert ranks.pools[0].blocks_free == 4


@pytest.mark.failure_mode("ranks-admit-different-rooms")
@pytest.mark.parametrize("rooms", [1, 10, 1000])
def test_the_width_of_a_step_is_constant(rooms: int) -> None:
    """One room or a thousand: the collective has the same width, each step has at most as many rooms as slots, and every room is
    included in time."""
    ranks = Ranks(TWO, memory=[10**6, 10**6])
    ranks.ready(*range(1, rooms + 1), total=1)
    facts = [coordinator.facts() for coordinator in ranks.coordinators.values()]
    assert [len(pack(one)) for one in facts] == [WIDTH, WIDTH]
    assert [len(one.rooms) for one in facts] == [min(rooms, SLOTS_MAX)] * 2
    assert {room.poll for one in facts for room in one.rooms} == {Poll.WAITING_FOR_INPUT}
    for rank, coordinator in ranks.coordinators.items():
        ranks.do(rank, ranks.cores[rank].on_decided(coordinator.on_agreed(facts[0]), now=0.0))
    assert ranks.steps() == -(-rooms // SLOTS_MAX) - 1
    assert all(room.has_begun for core in ranks.cores for room in core.rooms.values())
