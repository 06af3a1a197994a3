"""What a sender keeps to itself for a moment."""

from __future__ import annotations

import pytest

from embedwire.endpoint.statuses import HOLD_S, HOLD_WATCHED_S, HeldStatuses
from embedwire.protocol.messages import RoomKey, Status
from embedwire.protocol.states import Poll

PEER = 8


def status(room: int, sent_tokens: int) -> Status:
    return Status(
        source=7, target=PEER, room=room, attempt=0, poll=Poll.TRANSFERRING, sent_tokens=sent_tokens
    )


def test_the_newest_of_each_room_is_said_once() -> None:
    held = HeldStatuses()
    for room, sent in ((1, 10), (2, 5), (1, 20)):
        held.hold(PEER, status(room, sent), is_watched=False, now=1.0)
    assert held.take_due(1.0) == []
    assert held.next_due == pytest.approx(1.0 + HOLD_S)
    assert held.take_due(1.0 + HOLD_S) == [(PEER, status(1, 20)), (PEER, status(2, 5))]
    assert held.next_due is None
    assert held.take_due(9.0) == []


def test_a_newer_one_puts_nothing_off() -> None:
    """Else a room that is written in small steps would never be told of."""
    held = HeldStatuses()
    for step in range(10):
        held.hold(PEER, status(1, step), is_watched=True, now=1.0 + step * HOLD_WATCHED_S / 10)
    assert held.next_due == pytest.approx(1.0 + HOLD_WATCHED_S)
    held.hold(PEER, status(1, 10), is_watched=False, now=1.0)
    assert held.next_due == pytest.approx(1.0 + HOLD_S)


def test_a_room_that_has_ended_is_told_of_no_more() -> None:
    held = HeldStatuses()
    held.hold(PEER, status(1, 10), is_watched=False, now=1.0)
    held.hold(PEER, status(2, 20), is_watched=False, now=1.0)
    held.drop(PEER, RoomKey(1, 0))
    held.drop(PEER, RoomKey(3, 0))
    assert held.take_due(9.0) == [(PEER, status(2, 20))]


def test_another_receiver_that_is_refused_drops_nothing() -> None:
    """A room that one receiver has opened ends for any other."""
    held = HeldStatuses()
    held.hold(PEER, status(1, 10), is_watched=False, now=1.0)
    held.drop(PEER + 1, RoomKey(1, 0))
    assert held.take_due(9.0) == [(PEER, status(1, 10))]
