"""Rooms of a receiver that is alone: which lanes make them up, when they begin, and how they end."""

from __future__ import annotations

from typing import Any

import pytest

from embedwire.limits import AUX_WORDS
from embedwire.protocol.actions import Permit, Revoke, Send
from embedwire.protocol.messages import Abort, Cause, Init, RoomKey
from embedwire.protocol.topology import ALONE
from embedwire.testing.sim_ranks import Ranks


def key(room: int, lane: int = 0) -> RoomKey:
    return RoomKey(room, 0, lane)


@pytest.mark.failure_mode("ranks-admit-different-rooms")
def test_first_come_first_served() -> None:
    """A small room does not overtake a large one that waits for memory."""
    ranks = Ranks(ALONE, memory=[1000])
    ranks.ready(1, total=400)
    ranks.ready(2, total=700)
    ranks.ready(3, total=100)
    core = ranks.cores[0]
    assert [waiting.room for waiting in core.coordinator.queue] == [2, 3]
    ranks.land_all(1)
    ranks.release(0, 1)
    assert not core.coordinator.queue
    assert ranks.budgets[0].used_bytes == 800
    ranks.land_all(2)
    ranks.land_all(3)
    assert ranks.causes() == [[(1, Cause.DONE), (2, Cause.DONE), (3, Cause.DONE)]]


def test_a_room_that_fails_in_the_queue_lets_the_next_one_in() -> None:
    """Nobody waits for a room that is over."""
    ranks = Ranks(ALONE, memory=[1000])
    ranks.ready(1, 2, total=600)
    ranks.ready(3, total=300)
    ranks.abort(0, 2)
    assert ranks.budgets[0].used_bytes == 900
    assert ranks.causes() == [[(2, Cause.ABORTED)]]


@pytest.mark.failure_mode("part-taken-for-whole-room")
def test_two_lanes_one_fails() -> None:
    """The room fails once, its other part ends too, and the blocks of that part come back."""
    ranks = Ranks(ALONE, senders=2)
    ranks.ready(1, total=600)
    ranks.end(0, key(1, 1), Cause.ENCODER_FAILED)
    assert ranks.causes() == [[(1, Cause.ENCODER_FAILED)]]
    assert ranks.pools[0].blocks_free == 4
    assert ranks.budgets[0].used_bytes == 0
    assert not ranks.cores[0].admission.for_blocks


@pytest.mark.failure_mode("part-taken-for-whole-room")
def test_no_grant_for_a_lane_whose_room_is_over() -> None:
    """The blocks of the failed part are not granted to the other part, which ends with it."""
    ranks = Ranks(ALONE, senders=2, blocks=1)
    ranks.ready(1, total=600)
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
    ranks.ready(1, total=600)
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


@pytest.mark.failure_mode("part-taken-for-whole-room")
def test_two_lanes_become_whole() -> None:
    """One complete part is not enough."""
    ranks = Ranks(ALONE, senders=2)
    ranks.ready(1, total=300)
    ranks.land(0, key(1, 0))
    assert ranks.causes() == [[]]
    ranks.land(0, key(1, 1))
    assert ranks.causes() == [[(1, Cause.DONE)]]
    (finished,) = ranks.finished[0]
    assert finished.report.total_tokens == finished.report.lane_tokens == 300
    assert finished.report.rounds == (150, 150)


@pytest.mark.failure_mode("part-taken-for-whole-room")
@pytest.mark.parametrize("other", [{"content_hash": b"x"}, {"aux": (600, 1, *[0] * (AUX_WORDS - 2))}])
def test_senders_that_announce_different_contents(other: dict[str, Any]) -> None:
    """Parts that are announced with different contents end the room."""
    ranks = Ranks(ALONE, senders=2)
    ranks.open(1, 0)
    ranks.announce(0, key(1, 0), 600)
    ranks.announce(0, key(1, 1), 600, **other)
    assert ranks.causes() == [[(1, Cause.VIOLATION)]]
