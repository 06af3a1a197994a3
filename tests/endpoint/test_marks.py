"""Progress that the receiver sees by itself: statuses become needless, and nothing depends on the marks."""

from __future__ import annotations

from typing import Any

import pytest

from embedwire.endpoint import SenderEndpoint, statuses, watch, writer
from embedwire.limits import Limits
from embedwire.protocol.messages import Status
from embedwire.transports.shm import ShmInbound

pytestmark = [pytest.mark.timeout(60), pytest.mark.wires("shm")]

TOKENS = 2000
PATIENT = Limits(retry_s=1.0, peer_silence_s=20.0, open_wait_s=30.0)
"""Asks again so seldom that what is lost stays lost for a while."""


@pytest.fixture
def mute(monkeypatch: pytest.MonkeyPatch) -> list[Status]:
    """No status leaves a sender. Returns those that would have."""
    kept: list[Status] = []
    real = SenderEndpoint._say

    def say(self: SenderEndpoint, peer: Any, message: Any) -> None:
        if isinstance(message, Status):
            kept.append(message)
        else:
            real(self, peer, message)

    monkeypatch.setattr(SenderEndpoint, "_say", say)
    return kept


@pytest.mark.parametrize("window", [1, 2, 4])
def test_rooms_arrive_without_any_status(stage: Any, mute: list[Status], window: int) -> None:
    """Every round is seen, drained and given back by what its marks show alone, every byte right."""
    receiver = stage.receiver(num_blocks=4, limits=Limits(window_rounds=window))
    sender = stage.sender()
    for room in range(5):
        received = stage.move(sender, receiver, room, TOKENS)
        assert len(received.report.rounds) >= 4
    assert sender.stats().ended == {"done": 5}


def test_rooms_arrive_when_marks_do_not(stage: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Overwritten marks: the statuses, held back for a moment, say the same. Nothing is lost or done twice."""
    monkeypatch.setattr(ShmInbound, "mark", lambda inbound, ticket: 0)
    receiver, sender = stage.receiver(num_blocks=4, limits=PATIENT), stage.sender()
    stage.move(sender, receiver, 1, TOKENS)
    assert receiver.stats().bytes_total == TOKENS * stage.layout.token_bytes


def test_a_mark_that_lies_delivers_nothing(stage: Any, monkeypatch: pytest.MonkeyPatch, brake: Any) -> None:
    """More than has landed, and more than was granted: the sums of the whole room find it, and it ends as corrupt."""
    stop = brake()
    monkeypatch.setattr(ShmInbound, "mark", lambda inbound, ticket: 2**31 - 1)
    sender, receiver = stage.sender(), stage.receiver()
    offer = stage.offer(sender, 1, TOKENS)
    reception = receiver.open(1, sender.address)
    stop.wait_reached()
    assert stage.failure_of(reception).cause == "corrupt"
    stop.release()
    assert stage.failure_of(offer).cause == "corrupt"


def test_statuses_that_became_old_are_never_sent(
    stage: Any, said: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are held back for a moment, and the receiver has seen by then what they tell."""
    for module, name in (
        (statuses, "HOLD_S"),
        (statuses, "HOLD_WATCHED_S"),
        (watch, "WATCH_S"),
    ):
        monkeypatch.setattr(module, name, 1e6)
    receiver, sender = stage.receiver(num_blocks=2), stage.sender()
    stage.move(sender, receiver, 1, 40 * 128)
    assert receiver.stats().rounds_total == 40
    assert not said.count("status")


@pytest.mark.parametrize(("asleep_after_s", "told"), [(1e9, 1), (-1.0, 9)])
def test_a_slice_is_told_when_the_receiver_may_be_asleep(
    stage: Any, monkeypatch: pytest.MonkeyPatch, asleep_after_s: float, told: int
) -> None:
    """The first one, and each that comes long after the one before: of a round of ten slices one, or all but the last."""
    monkeypatch.setattr(writer, "ASLEEP_AFTER_S", asleep_after_s)
    monkeypatch.setattr(writer, "SLICE_BYTES", 200 * stage.layout.token_bytes)
    landed: list[int] = []
    real = SenderEndpoint._landed

    def tell(self: SenderEndpoint, write: Any, tokens: int) -> None:
        landed.append(tokens)
        real(self, write, tokens)

    monkeypatch.setattr(SenderEndpoint, "_landed", tell)
    stage.move(stage.sender(), stage.receiver(num_blocks=16), 1, TOKENS)
    assert landed == [200 * number for number in range(1, told + 1)]
