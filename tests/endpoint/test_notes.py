"""Grants that a sender finds by itself: messages become needless, and nothing depends on the notes."""

from __future__ import annotations

import itertools
import time
from dataclasses import replace
from typing import Any

import pytest

from embedwire.endpoint import notes, statuses, watch
from embedwire.endpoint.notes import Awaited, Notes
from embedwire.limits import Limits
from embedwire.protocol.messages import ResumeTransfer, RoomKey, encode
from embedwire.testing.payload import payload
from embedwire.transports.shm import ShmInbound, ShmRegion

pytestmark = [pytest.mark.timeout(60), pytest.mark.wires("shm")]

ROUNDS = 40
TOKENS = ROUNDS * 128
PATIENT = Limits(retry_s=5.0, peer_silence_s=20.0, open_wait_s=30.0, close_s=20.0)
"""Asks again so seldom that what is lost stays lost."""
ALWAYS_S = 1e6


@pytest.fixture
def patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever left a note, or looks for one, or for what lands, never gives up; so nobody needs a status, and none is said."""
    monkeypatch.setattr(watch, "WATCH_S", ALWAYS_S)
    for name in ("HOLD_S", "HOLD_WATCHED_S"):
        monkeypatch.setattr(statuses, name, ALWAYS_S)
    for name in ("AWAIT_S", "FRESH_S", "HOLD_S"):
        monkeypatch.setattr(notes, name, ALWAYS_S)


@pytest.mark.usefixtures("patience")
@pytest.mark.parametrize("window", [1, 2, 4])
def test_grants_are_found_without_a_message(stage: Any, said: list[str], window: int) -> None:
    """Of the grants of a room those go out as messages that come before its first token."""
    limits = replace(PATIENT, window_rounds=window)
    sender, receiver = stage.sender(), stage.receiver(num_blocks=window, limits=limits)
    for room in range(3):
        assert len(stage.move(sender, receiver, room, TOKENS).report.rounds) == ROUNDS
    assert said.count("init") == 3
    assert said.count("resume_transfer") <= 3 * (window - 1)


@pytest.mark.usefixtures("patience")
def test_no_driver_is_woken_between_two_rounds(stage: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The writer takes the sender's steps by itself: that it has written, and what it has found."""
    sender, receiver = stage.sender(), stage.receiver(num_blocks=1, limits=PATIENT)
    turns, real = itertools.count(), sender._turn
    monkeypatch.setattr(sender, "_turn", lambda: (next(turns), real()))
    stage.move(sender, receiver, 1, TOKENS)
    assert next(turns) < ROUNDS / 2


def test_rooms_arrive_when_nobody_looks(stage: Any, said: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """What was left is said a moment later, once."""
    monkeypatch.setattr(notes, "FRESH_S", ALWAYS_S)
    monkeypatch.setattr(ShmRegion, "note", lambda region, ticket: b"")
    sender, receiver = stage.sender(), stage.receiver(num_blocks=2, limits=PATIENT)
    stage.move(sender, receiver, 1, TOKENS)
    assert said.count("resume_transfer") == ROUNDS - 1


@pytest.mark.usefixtures("patience")
def test_what_was_left_is_said_before_what_follows(stage: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A sender keeps no grant that comes before its predecessor, so one that nobody has found is not overtaken by a message."""
    monkeypatch.setattr(ShmRegion, "note", lambda region, ticket: b"")
    real, calls = Notes.leave, itertools.count()
    monkeypatch.setattr(Notes, "leave", lambda *args, **more: next(calls) % 2 and real(*args, **more))
    sender, receiver = stage.sender(), stage.receiver(num_blocks=2, limits=PATIENT)
    assert len(stage.move(sender, receiver, 1, TOKENS).report.rounds) == ROUNDS


@pytest.mark.usefixtures("patience")
def test_among_several_rooms_grants_are_said(
    stage: Any, said: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Blocks that one gives back are another's next, so nobody looks, and nothing is left where nobody looks."""
    left: list[Any] = []
    real = Notes.leave
    monkeypatch.setattr(Notes, "leave", lambda *args, **more: real(*args, **more) and not left.append(args))
    sender, receiver = stage.sender(), stage.receiver(num_blocks=2, limits=PATIENT)
    first = [sender.offer(room, total_tokens=TOKENS) for room in range(2)]  # the second has no source yet
    first[0].fill(payload(sender.layout, TOKENS, room=0))
    receptions = [receiver.open(room, sender.address) for room in range(2)]
    stage.until(lambda: receiver.stats().rooms.get("waiting", 0) > 0)
    stage.check(receptions[0], TOKENS)
    assert not left
    assert said.count("resume_transfer") == ROUNDS - 1
    first[1].fill(payload(sender.layout, TOKENS, room=1))
    stage.check(receptions[1], TOKENS)
    assert left


def test_a_note_is_left_only_for_what_was_seen_to_land(stage: Any) -> None:
    """Just now, and of that very room: else its sender has stopped to look."""
    receiver = stage.receiver()
    inbound = receiver._landing.wire("shm")
    grant = _grant(source=7, target=8)
    made = Notes()
    assert not made.leave(grant, "tcp://a", inbound, after=1, now=10.0)
    made.saw(RoomKey(2, 0), 10.0)
    assert not made.leave(grant, "tcp://a", inbound, after=1, now=10.0)
    made.saw(grant.key, 10.0)
    assert not made.leave(grant, "tcp://a", inbound, after=1, now=10.1)
    assert not made.leave(grant, "tcp://a", None, after=1, now=10.0)
    assert made.leave(grant, "tcp://a", inbound, after=1, now=10.0)
    assert made.take_due(10.0) == []
    assert made.take_due(10.1) == [("tcp://a", grant)]
    assert made.next_due is None


@pytest.mark.failure_mode("lying-peer")
@pytest.mark.usefixtures("patience")
@pytest.mark.parametrize("kind", ["garbage", "another's"])
def test_a_note_that_lies_is_refused(
    stage: Any, monkeypatch: pytest.MonkeyPatch, said: list[str], kind: str
) -> None:
    """The room is delayed until the receiver repeats its request."""
    lie = b"\xc1" if kind == "garbage" else encode(_grant(source=7, target=8))
    real = ShmInbound.set_note
    monkeypatch.setattr(ShmInbound, "set_note", lambda inbound, ticket, note: real(inbound, ticket, lie))
    limits = Limits(retry_s=0.05)
    sender, receiver = stage.sender(), stage.receiver(num_blocks=2, limits=limits)
    stage.move(sender, receiver, 1, 8 * 128)
    assert sender.stats().frames_refused_total > 0
    assert said.count("resume_transfer") >= 7


@pytest.mark.failure_mode("abort-not-propagated")
@pytest.mark.usefixtures("patience")
def test_a_room_that_ends_while_its_grant_lies_there(
    stage: Any, said: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The room ends on both sides, its blocks are free, and the grant is never sent."""
    monkeypatch.setattr(ShmRegion, "note", lambda region, ticket: b"")
    sender, receiver = stage.sender(), stage.receiver(num_blocks=2, limits=PATIENT)
    offer = stage.offer(sender, 1, TOKENS)
    reception = receiver.open(1, sender.address)
    stage.until(lambda: receiver._notes.next_due is not None)
    reception.cancel()
    assert stage.failure_of(reception).cause == stage.failure_of(offer).cause == "aborted"
    stage.wait_idle()
    assert receiver._notes.next_due is not None
    receiver.call(lambda: receiver._on_time(time.monotonic() + 2 * ALWAYS_S))
    assert receiver._notes.next_due is None
    assert said.count("resume_transfer") <= 1


def test_who_is_awaited_too_long_is_forgotten(stage: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(notes, "AWAIT_S", -1.0)
    awaited = Awaited()
    awaited.begin(5)
    assert awaited
    assert awaited.find(None) == b""
    assert not awaited


def _grant(**more: Any) -> ResumeTransfer:
    return ResumeTransfer(
        room=1,
        attempt=0,
        round=1,
        start_token=128,
        allocated_tokens=128,
        block_indices=(1,),
        ticket=9,
        **more,
    )
