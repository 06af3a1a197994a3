"""Rooms over ranks and lanes: when they begin, and how they end."""

from __future__ import annotations

from functools import partial

import pytest

from embedwire.errors import OverloadedError
from embedwire.limits import AUX_WORDS, SLOTS_MAX, Limits
from embedwire.protocol.actions import Permit, Revoke, Send
from embedwire.protocol.agreement import WIDTH, pack
from embedwire.protocol.messages import Abort, Cause, Init, RoomKey
from embedwire.protocol.states import Poll
from embedwire.protocol.topology import ALONE, RankGroup
from embedwire.testing.sim_ranks import Ranks

TWO = RankGroup.on_one_host(2, delivery="replicate")
SHARED = RankGroup.on_one_host(2)


def key(room: int, lane: int = 0) -> RoomKey:
    return RoomKey(room, 0, lane)


def ready(ranks: Ranks, *rooms: int, total: int = 200) -> None:
    """Rooms that every rank has opened and heard of."""
    for room in rooms:
        for rank in range(ranks.group.size):
            ranks.open(room, rank)
            for lane in ranks.lanes_of(rank, room):
                ranks.announce(rank, lane, total)


def land_all(ranks: Ranks, room: int) -> None:
    """Everything arrives everywhere."""
    for rank in range(ranks.group.size):
        while lanes := [
            k for k in ranks.lanes_of(rank, room) if ranks.cores[rank].lanes.transfers[k].open_rounds
        ]:
            for lane in lanes:
                ranks.land(rank, lane)


def causes(ranks: Ranks) -> list[list[tuple[int, Cause]]]:
    """How rooms ended, rank by rank, in order."""
    return [[(room, cause) for room, cause, _ in ends] for ends in ranks.ends]


# ---------------------------------------------------------------------- memory for assemblies


@pytest.mark.failure_mode("ranks-admit-different-rooms")
def test_first_come_first_served() -> None:
    """A small room does not overtake a large one that waits for memory."""
    ranks = Ranks(ALONE, memory=[1000])
    ready(ranks, 1, total=400)
    ready(ranks, 2, total=700)
    ready(ranks, 3, total=100)
    core = ranks.cores[0]
    assert [room.key.room for room in core.for_assembly] == [2, 3]
    land_all(ranks, 1)
    ranks.release(0, 1)
    assert not core.for_assembly
    assert ranks.budgets[0].used_bytes == 800
    land_all(ranks, 2)
    land_all(ranks, 3)
    assert causes(ranks) == [[(1, Cause.DONE), (2, Cause.DONE), (3, Cause.DONE)]]


def test_a_room_that_fails_in_the_queue_lets_the_next_one_in() -> None:
    """Nobody waits for a room that is over."""
    ranks = Ranks(ALONE, memory=[1000])
    ready(ranks, 1, 2, total=600)
    ready(ranks, 3, total=300)
    ranks.abort(0, 2)
    assert ranks.budgets[0].used_bytes == 900
    assert causes(ranks) == [[(2, Cause.ABORTED)]]


@pytest.mark.failure_mode("request-never-fits")
def test_what_can_never_fit_says_both_numbers() -> None:
    """The detail holds the need and the limit; the other rank gets the same cause."""
    ranks = Ranks(TWO, memory=[1000, 500])
    ready(ranks, 1, total=600)
    ranks.turns()
    assert causes(ranks) == [[(1, Cause.NEVER_FITS)]] * 2
    assert ranks.ends[1][0][2] == "600 tokens need 600 bytes of assembly; there are 500 in all"
    assert ranks.ends[0][0][2] == "on another rank"


@pytest.mark.failure_mode("ranks-admit-different-rooms")
def test_all_ranks_admit_the_same_room() -> None:
    """Rank 1 still reads room 1: room 2 begins on neither rank until both have the memory."""
    ranks = Ranks(TWO, memory=[1000, 1000])
    ready(ranks, 1, 2, total=600)
    ranks.turns()
    land_all(ranks, 1)
    ranks.turns()
    ranks.release(0, 1)
    assert ranks.turns() == 1
    assert [budget.used_bytes for budget in ranks.budgets] == [0, 600]
    ranks.release(1, 1)
    assert ranks.turns() == 1
    assert [core.rooms[key(2)].is_admitted for core in ranks.cores] == [True, True]
    assert [budget.used_bytes for budget in ranks.budgets] == [600, 600]


@pytest.mark.failure_mode("ranks-admit-different-rooms")
def test_memory_that_comes_back_within_a_turn_is_told_in_the_next() -> None:
    """Memory released between the report and its result is reported in the next step."""
    ranks = Ranks(TWO, memory=[1000, 1000])
    ready(ranks, 1, total=600)
    ranks.turns()
    land_all(ranks, 1)
    ranks.turns()
    ready(ranks, 2, total=600)
    ranks.say(0)
    ranks.say(1)
    for rank in (0, 1):
        ranks.release(rank, 1)
        ranks.conclude(rank)
    ranks.turns()
    assert [core.rooms[key(2)].is_admitted for core in ranks.cores] == [True, True]


def test_nobody_wants_a_turn_for_memory_that_no_room_waits_for() -> None:
    """An idle group makes no turn."""
    ranks = Ranks(TWO)
    ready(ranks, 1)
    ranks.turns()
    land_all(ranks, 1)
    ranks.turns()
    ranks.release(0, 1)
    ranks.release(1, 1)
    assert ranks.turns() == 0


# ---------------------------------------------------------------------- lanes


@pytest.mark.failure_mode("part-taken-for-whole-room")
def test_two_lanes_one_fails() -> None:
    """The room fails once, its other part ends too, and the blocks of that part come back."""
    ranks = Ranks(ALONE, senders=2)
    ready(ranks, 1, total=600)
    ranks.end(0, key(1, 1), Cause.ENCODER_FAILED)
    assert causes(ranks) == [[(1, Cause.ENCODER_FAILED)]]
    assert ranks.pools[0].blocks_free == 4
    assert ranks.budgets[0].used_bytes == 0
    assert not ranks.cores[0].admission.for_blocks


@pytest.mark.failure_mode("part-taken-for-whole-room")
def test_no_grant_for_a_lane_whose_room_is_over() -> None:
    """The blocks of the failed part are not granted to the other part, which ends with it."""
    ranks = Ranks(ALONE, senders=2, blocks=1)
    ready(ranks, 1, total=600)
    second = ranks.cores[0].lanes.transfers[key(1, 1)]
    assert not second.round_sizes
    ranks.abort(0, 1)
    assert not second.round_sizes
    assert ranks.pools[0].blocks_free == 1


@pytest.mark.failure_mode("part-taken-for-whole-room")
def test_the_end_of_a_room_is_not_overtaken_by_its_grant() -> None:
    """One part ends and its block goes to the other part, which ends with it: the permission is revoked after it was given, and the
    sender gets the grant before the end."""
    ranks = Ranks(ALONE, senders=2, blocks=1)
    ready(ranks, 1, total=600)
    ranks.end(0, key(1, 0), Cause.ENCODER_FAILED)
    orders = ranks.orders[0]
    permit = next(i for i, a in enumerate(orders) if isinstance(a, Permit) and a.key == key(1, 1))
    revoke = next(i for i, a in enumerate(orders) if isinstance(a, Revoke) and a.key == key(1, 1))
    assert permit < revoke
    told = [type(a.message) for a in orders if isinstance(a, Send) and a.address == "encoder/1"]
    assert told[-2:] == [Init, Abort]
    assert ranks.pools[0].blocks_free == 1


@pytest.mark.failure_mode("part-taken-for-whole-room")
def test_a_room_waits_for_all_its_lanes() -> None:
    """One sender is ready; the other has announced only."""
    ranks = Ranks(ALONE, senders=2)
    ranks.open(1, 0)
    ranks.announce(0, key(1, 0), 600)
    ranks.announce(0, key(1, 1), 600, ready=False)
    assert ranks.budgets[0].used_bytes == 0
    ranks.announce(0, key(1, 1), 600)
    assert ranks.budgets[0].used_bytes == 600


@pytest.mark.failure_mode("rank-fails-alone")
def test_a_room_that_fails_while_it_is_admitted() -> None:
    """Its sender fails on rank 1 after that rank reported ready: no memory is reserved there, and all ranks end the room."""
    ranks = Ranks(TWO)
    ready(ranks, 1)
    ranks.say(0)
    ranks.say(1)
    ranks.end(1, key(1, 1), Cause.ENCODER_FAILED)
    ranks.conclude(0)
    ranks.conclude(1)
    assert [budget.used_bytes for budget in ranks.budgets] == [200, 0]
    ranks.turns()
    assert causes(ranks) == [[(1, Cause.ENCODER_FAILED)]] * 2
    assert [budget.used_bytes for budget in ranks.budgets] == [0, 0]


@pytest.mark.failure_mode("part-taken-for-whole-room")
def test_two_lanes_become_whole() -> None:
    """One complete part is not enough."""
    ranks = Ranks(ALONE, senders=2)
    ready(ranks, 1, total=300)
    ranks.land(0, key(1, 0))
    assert causes(ranks) == [[]]
    ranks.land(0, key(1, 1))
    assert causes(ranks) == [[(1, Cause.DONE)]]
    (finished,) = ranks.finished[0]
    assert finished.report.total_tokens == finished.report.lane_tokens == 300
    assert finished.report.rounds == (150, 150)


@pytest.mark.failure_mode("part-taken-for-whole-room")
@pytest.mark.parametrize("other", [{"content_hash": b"x"}, {"aux": (600, 1, *[0] * (AUX_WORDS - 2))}])
def test_senders_that_announce_different_contents(other: dict[str, object]) -> None:
    """Parts that are announced with different contents end the room."""
    ranks = Ranks(ALONE, senders=2)
    ranks.open(1, 0)
    ranks.announce(0, key(1, 0), 600)
    ranks.announce(0, key(1, 1), 600, **other)
    assert causes(ranks) == [[(1, Cause.VIOLATION)]]


@pytest.mark.failure_mode("ranks-see-different-totals")
def test_ranks_that_are_announced_different_totals() -> None:
    """A rank with a smaller announced total than the agreed one ends the room, on all ranks."""
    ranks = Ranks(TWO)
    for rank, total in ((0, 300), (1, 200)):
        ranks.open(1, rank)
        ranks.announce(rank, key(1, rank), total)
    ranks.turns()
    assert causes(ranks) == [[(1, Cause.VIOLATION)]] * 2


@pytest.mark.failure_mode("part-taken-for-whole-room")
def test_a_lane_is_no_news_before_the_room_is() -> None:
    """Four parts per rank become ready and complete one by one; the ranks agree three times: opened, ready, complete."""
    ranks = Ranks(TWO, senders=8, blocks=8)
    turns = 0
    for rank in (0, 1):
        ranks.open(1, rank)
    turns += ranks.turns()
    for step in (
        partial(ranks.announce, total=800, ready=False),
        partial(ranks.announce, total=800),
        ranks.land,
    ):
        lanes = [ranks.lanes_of(rank, 1) for rank in (0, 1)]
        for i in range(4):
            turns += ranks.turns() if i < 3 else 0
            for rank in (0, 1):
                step(rank, lanes[rank][i])
        turns += ranks.turns()
    assert turns == 3
    assert causes(ranks) == [[(1, Cause.DONE)]] * 2


# ---------------------------------------------------------------------- turns


@pytest.mark.failure_mode("ranks-see-different-totals")
def test_an_announcement_within_a_turn() -> None:
    """All ranks reported no total, and the announcement arrives before the result: no contradiction."""
    ranks = Ranks(TWO)
    for rank in (0, 1):
        ranks.open(1, rank)
    ranks.say(0)
    ranks.say(1)
    for rank in (0, 1):
        ranks.announce(rank, key(1, rank), 300)
        ranks.conclude(rank)
    assert [core.rooms[key(1)].total_tokens for core in ranks.cores] == [300, 300]
    ranks.turns()
    land_all(ranks, 1)
    ranks.turns()
    assert causes(ranks) == [[(1, Cause.DONE)]] * 2


@pytest.mark.failure_mode("ranks-see-different-totals")
def test_one_rank_knows_the_total() -> None:
    """(2000, 0) and (0, 0): both ranks get 2000, and wait."""
    ranks = Ranks(TWO)
    for rank in (0, 1):
        ranks.open(1, rank)
    ranks.announce(0, key(1, 0), 2000)
    ranks.turns()
    assert [core.rooms[key(1)].total_tokens for core in ranks.cores] == [2000, 2000]
    assert not any(core.rooms[key(1)].is_queued for core in ranks.cores)
    assert ranks.turns() == 0


@pytest.mark.failure_mode("ranks-see-different-totals")
def test_a_dummy_rank_goes_along() -> None:
    """It receives and reserves nothing, gets the total, and ends the room in the same step."""
    ranks = Ranks(SHARED, memory=[1000, 1])
    ready(ranks, 1, total=300)
    ranks.turns()
    dummy = ranks.cores[1].rooms[key(1)]
    assert (dummy.is_dummy, dummy.total_tokens, ranks.budgets[1].used_bytes) == (True, 300, 0)
    land_all(ranks, 1)
    ranks.turns()
    assert causes(ranks) == [[(1, Cause.DONE)]] * 2
    assert ranks.cores[0].turn == ranks.cores[1].turn


@pytest.mark.failure_mode("abort-not-propagated")
def test_an_end_that_comes_after_success_was_said() -> None:
    """The client disconnects between report and result: a success that all ranks reported stands, else the room is aborted."""
    for is_whole in (True, False):
        ranks = Ranks(TWO)
        ready(ranks, 1)
        ranks.turns()
        ranks.land(0, key(1, 0))
        if is_whole:
            ranks.land(1, key(1, 1))
        ranks.say(0)
        ranks.say(1)
        ranks.abort(0, 1)
        assert causes(ranks) == [[], []]
        ranks.conclude(0)
        ranks.conclude(1)
        ranks.turns()
        assert causes(ranks) == [[(1, Cause.DONE if is_whole else Cause.ABORTED)]] * 2


@pytest.mark.failure_mode("rank-fails-alone")
def test_two_ranks_fail_in_different_ways() -> None:
    """Both ranks give the same cause, and neither ends the room before it is agreed."""
    ranks = Ranks(TWO, senders=2)
    ready(ranks, 1, 2)
    ranks.turns()
    ranks.end(0, key(1, 0), Cause.ENCODER_FAILED)
    ranks.end(1, key(1, 3), Cause.WIRE_FAILED)
    ranks.end(1, key(2, 3), Cause.CORRUPT)
    assert causes(ranks) == [[], []]
    ranks.turns()
    assert causes(ranks) == [[(1, Cause.ENCODER_FAILED), (2, Cause.CORRUPT)]] * 2
    assert [budget.used_bytes for budget in ranks.budgets] == [0, 0]
    assert [pool.blocks_free for pool in ranks.pools] == [4, 4]


@pytest.mark.failure_mode("one-rank-cannot-allocate")
def test_a_rank_that_is_full_can_not_refuse_what_rank_0_has_opened() -> None:
    """One room too many is refused by rank 0; on another rank it fails, on all alike."""
    ranks = Ranks(TWO, limits=Limits(rooms_max=1))
    ready(ranks, 1)
    with pytest.raises(OverloadedError):
        ranks.open(2, 0)
    assert list(ranks.cores[0].rooms) == [key(1)]
    ranks.turns()
    land_all(ranks, 1)
    ranks.turns()
    ranks.end(0, key(1), Cause.DONE)  # rank 0's lane is over, rank 1's waits for a last word
    ranks.open(2, 0)
    ranks.open(2, 1)
    ranks.turns()
    assert causes(ranks) == [[(1, Cause.DONE), (2, Cause.OVERLOADED)]] * 2


@pytest.mark.failure_mode("rank-lost")
def test_a_lost_group_ends_every_room() -> None:
    """Every room ends, also one about to succeed, and all memory comes back."""
    ranks = Ranks(TWO)
    ready(ranks, 1, 2)
    ranks.turns()
    ranks.land(0, key(1, 0))
    ranks.say(0)
    ranks.do(0, ranks.cores[0].on_group_ended(Cause.RANK_LOST, "rank 1 is gone", now=0.0))
    assert ranks.ends[0] == [(1, Cause.RANK_LOST, "rank 1 is gone"), (2, Cause.RANK_LOST, "rank 1 is gone")]
    assert not ranks.cores[0].rooms
    assert not ranks.cores[0].for_assembly
    assert not ranks.cores[0].wants_turn()
    assert ranks.budgets[0].used_bytes == 0
    assert ranks.pools[0].blocks_free == 4


@pytest.mark.failure_mode("ranks-admit-different-rooms")
@pytest.mark.parametrize("rooms", [1, 10, 1000])
def test_the_width_of_a_turn_is_constant(rooms: int) -> None:
    """One room or a thousand: the collective has the same width, each step has at most as many rooms as slots, and every room is
    included in time."""
    ranks = Ranks(TWO, memory=[10**6, 10**6])
    ready(ranks, *range(1, rooms + 1), total=1)
    facts = [core.facts() for core in ranks.cores]
    assert [len(pack(one)) for one in facts] == [WIDTH, WIDTH]
    assert [len(one.rooms) for one in facts] == [min(rooms, SLOTS_MAX)] * 2
    assert {room.poll for one in facts for room in one.rooms} == {Poll.WAITING_FOR_INPUT}
    for core in ranks.cores:
        core.on_agreed(facts[0], now=0.0)
    assert ranks.turns() == -(-rooms // SLOTS_MAX) - 1
    assert all(room.is_admitted for core in ranks.cores for room in core.rooms.values())
