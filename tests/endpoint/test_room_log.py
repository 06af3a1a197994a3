"""What a person who debugs sees of a room: its handles as text, and one log record at its end on each side."""

from __future__ import annotations

import logging
import re
from typing import Any

import pytest

pytestmark = [pytest.mark.timeout(60), pytest.mark.wires("shm")]

TOKENS = 1000


@pytest.fixture
def ends(caplog: pytest.LogCaptureFixture) -> Any:
    """``ends()``: (side, level, message without its milliseconds) of each room's end so far, in order of sides."""
    caplog.set_level(logging.DEBUG, "embedwire.endpoint")

    def found() -> list[tuple[str, str, str]]:
        return sorted(
            (r.name.rpartition(".")[2], r.levelname, re.sub(r" ms=\d+\.\d", "", r.getMessage()))
            for r in caplog.records
            if r.getMessage().startswith("= ")
        )

    return found


def test_a_success_is_logged_once_at_debug_on_each_side(stage: Any, ends: Any) -> None:
    stage.move(stage.sender(), stage.receiver(default_allocate_tokens=512), 7, TOKENS)
    line = "= room 7 attempt 0: cause=done tokens=1000/1000 rounds=2"
    assert ends() == [("offer", "DEBUG", line), ("reception", "DEBUG", line)]


def test_a_failure_is_a_warning_on_each_side(stage: Any, ends: Any) -> None:
    sender, receiver = stage.sender(), stage.receiver()
    offer = sender.offer(7, total_tokens=TOKENS, attempt=2)
    reception = receiver.open(7, sender.address, attempt=2)
    stage.until(lambda: receiver.stats().rooms.get("waiting") == 1)
    offer.fail("out of memory")
    assert stage.failure_of(reception).cause == stage.failure_of(offer).cause == "encoder_failed"
    head = "= room 7 attempt 2: cause=encoder_failed"
    assert ends() == [
        ("offer", "WARNING", f"{head} tokens=0/1000 rounds=0 (out of memory)"),
        ("reception", "WARNING", f"{head} tokens=0/? rounds=0 (out of memory)"),
    ]


def test_a_client_that_disconnects_is_no_warning(stage: Any, ends: Any) -> None:
    sender, receiver = stage.sender(), stage.receiver()
    offer = sender.offer(7, total_tokens=TOKENS)
    reception = receiver.open(7, sender.address)
    stage.until(lambda: receiver.stats().rooms.get("waiting") == 1)
    reception.cancel("the client left")
    stage.failure_of(reception)
    stage.failure_of(offer)
    assert [(side, level) for side, level, _ in ends()] == [("offer", "DEBUG"), ("reception", "DEBUG")]
    assert all("cause=aborted" in line and line.endswith("(the client left)") for *_, line in ends())


def test_how_far_a_failed_room_got(stage: Any, ends: Any, brake: Any) -> None:
    """One round of two has landed when the writer is held up."""
    holder = brake(after_slices=1)
    sender = stage.sender()
    receiver = stage.receiver(default_allocate_tokens=512)
    offer = stage.offer(sender, 7, TOKENS)
    reception = receiver.open(7, sender.address)
    holder.wait_reached()
    stage.until(lambda: receiver.stats().rounds_total == 1)
    assert (
        repr(reception)
        == f"<Reception room=7 attempt=0 receiving tokens=512/1000 rounds=1 from={sender.address}>"
    )
    stage.until(lambda: "rounds=2" in repr(offer))
    assert repr(offer) == f"<Offer room=7 attempt=0 sending tokens=512/1000 rounds=2 at={sender.address}>"
    reception.cancel("injected")
    stage.failure_of(reception)
    line = "= room 7 attempt 0: cause=aborted tokens=512/1000 rounds=1 (injected)"
    assert ends() == [("reception", "DEBUG", line)]
    holder.release()
    stage.failure_of(offer)


def test_handles_show_their_state(stage: Any) -> None:
    sender, receiver = stage.sender(), stage.receiver()
    at = f"at={sender.address}>"
    offer = sender.offer(7, total_tokens=TOKENS)
    assert repr(offer) == f"<Offer room=7 attempt=0 offered tokens=0/1000 rounds=0 {at}"
    reception = receiver.open(7, sender.address)
    assert (
        repr(reception) == f"<Reception room=7 attempt=0 opening tokens=0/? rounds=0 from={sender.address}>"
    )
    offer.fill(sender.layout.empty(TOKENS))
    received = reception.result(20)
    offer.result(20)
    assert repr(offer) == f"<Offer room=7 attempt=0 done tokens=1000/1000 rounds=1 {at}"
    assert (
        repr(reception)
        == f"<Reception room=7 attempt=0 done tokens=1000/1000 rounds=1 from={sender.address}>"
    )
    assert repr(received) == "<Received room=7 attempt=0 tokens=1000/1000 rounds=1 transport=shm>"
    lost = receiver.open(8, sender.address)
    lost.cancel()
    stage.failure_of(lost)
    assert " failed: aborted " in repr(lost)
