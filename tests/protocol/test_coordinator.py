"""A receiver that is alone: what follows from each report, at once."""

from __future__ import annotations

import pytest

from embedwire.memory.budget import Budget
from embedwire.protocol.coordinator import Begin, Fail, Finish, LocalCoordinator, RoomFacts
from embedwire.protocol.messages import Cause, RoomKey
from embedwire.protocol.states import Poll

A, B, C = (RoomKey(room) for room in (1, 2, 3))


def ready(total_tokens: int) -> RoomFacts:
    return RoomFacts(Poll.WAITING_FOR_INPUT, total_tokens, 0)


FAILED = RoomFacts(Poll.FAILED, 0, 0, Cause.PEER_LOST, "it is gone")


@pytest.fixture
def budget() -> Budget:
    return Budget(1000)


@pytest.fixture
def coordinator(budget: Budget) -> LocalCoordinator:
    return LocalCoordinator(budget, token_bytes=10)


def test_a_room_from_its_opening_to_its_end(coordinator: LocalCoordinator) -> None:
    """It begins when it is ready, and finishes when it is whole; progress in between decides nothing."""
    assert coordinator.report(A, RoomFacts(Poll.BOOTSTRAPPING, 0, 0)) == []
    assert coordinator.report(A, RoomFacts(Poll.BOOTSTRAPPING, 100, 0)) == []
    assert coordinator.report(A, ready(100)) == [Begin(A, 100)]
    assert coordinator.report(A, RoomFacts(Poll.TRANSFERRING, 100, 50)) == []
    assert coordinator.report(A, RoomFacts(Poll.SUCCESS, 100, 100)) == [Finish(A)]
    assert not coordinator.queue


def test_a_failure_ends_the_room_at_once(coordinator: LocalCoordinator) -> None:
    """With the cause and the detail that were reported."""
    assert coordinator.report(A, FAILED) == [Fail(A, Cause.PEER_LOST, "it is gone")]


def test_rooms_begin_in_order_when_memory_is_released(coordinator: LocalCoordinator, budget: Budget) -> None:
    """A small room does not overtake a large one; both begin as soon as both fit."""
    budget.try_reserve("held", 500)
    assert coordinator.report(A, ready(60)) == []
    assert coordinator.report(B, ready(10)) == []
    assert coordinator.report(B, ready(10)) == [], "reported again, it keeps its place"
    assert list(coordinator.queue) == [A, B]
    budget.release("held")
    assert coordinator.on_memory_released() == [Begin(A, 60), Begin(B, 10)]
    assert coordinator.on_memory_released() == []


def test_a_failed_room_leaves_the_queue(coordinator: LocalCoordinator, budget: Budget) -> None:
    """The next one may begin in its place."""
    budget.try_reserve("held", 500)
    coordinator.report(A, ready(60))
    coordinator.report(B, ready(10))
    coordinator.report(C, ready(60))
    assert coordinator.report(A, FAILED) == [Fail(A, Cause.PEER_LOST, "it is gone")]
    assert coordinator.on_memory_released() == [Begin(B, 10)]
    coordinator.close()
    assert not coordinator.queue
