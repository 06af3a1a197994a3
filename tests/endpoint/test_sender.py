"""What a sender's owner may ask for, and what is refused before it changes anything."""

from __future__ import annotations

from typing import Any

import pytest

from embedwire.endpoint import SenderEndpoint
from embedwire.errors import ConfigurationError, NeverFitsError, TransportError, UsageError
from embedwire.limits import ROOM_MAX
from embedwire.memory.layout import item
from embedwire.protocol import messages
from embedwire.testing.payload import payload

pytestmark = pytest.mark.timeout(60)


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"total_tokens": 0}, "total_tokens is 0"),
        ({"total_tokens": 2**31}, "total_tokens is 2147483648"),
        ({"room": -1}, "room -1"),
        ({"room": ROOM_MAX + 1}, "room 9223372036854775808"),
        ({"attempt": -1}, "attempt -1"),
        ({"attempt": 2**31}, "attempt 2147483648"),
        ({"aux": [0] * 16}, "aux has to be 16 int32"),
        ({"aux": [2**31]}, "aux has to be 16 int32"),
        ({"content_hash": b"x" * 65}, "65 bytes"),
    ],
)
def test_an_offer_out_of_range(stage: Any, wrong: dict[str, Any], words: str) -> None:
    """It would be no message; the sender's other rooms must not pay for it."""
    sender = stage.sender()
    with pytest.raises(UsageError, match=words):
        sender.offer(**{"room": 1, "total_tokens": 10, **wrong})
    assert sender.stats().memory_reserved_bytes == 0


def test_a_room_is_offered_once(stage: Any) -> None:
    """Another attempt is another room; the same one is refused, also after its end."""
    sender, receiver = stage.sender(), stage.receiver()
    stage.move(sender, receiver, 1, 100)
    with pytest.raises(UsageError, match="room 1 attempt 0 was offered before"):
        sender.offer(1, total_tokens=100)
    offer = stage.offer(sender, 1, 100, attempt=1)
    with pytest.raises(UsageError, match="room 1 attempt 1 was offered before"):
        sender.offer(1, total_tokens=100, attempt=1)
    stage.check(receiver.open(1, sender.address, attempt=1), 100)
    assert offer.result(30).total_tokens == 100


def test_arrays_that_do_not_match(stage: Any) -> None:
    """They are refused where they are handed over; the offer can still be filled."""
    sender = stage.sender()
    offer = sender.offer(1, total_tokens=10)
    right = stage.layout.empty(10)
    wrong = [
        stage.layout.empty(9),
        {name: array for name, array in right.items() if name != "fill_ids"},
        right | {"fill_ids": right["fill_ids"].astype("int64")},
        right | {"mrope_positions": stage.layout.empty(20)["mrope_positions"][::2]},
        item(8).empty(10),
    ]
    for arrays in wrong:
        with pytest.raises(UsageError):
            offer.fill(arrays)
    offer.fill(right)
    assert stage.receiver().open(1, sender.address).result(30).report.total_tokens == 10


def test_an_offer_is_filled_once(stage: Any, brake: Any) -> None:
    """A second source would be written over the first one, in the same blocks."""
    sender, receiver = stage.sender(), stage.receiver()
    held = brake()
    offer = stage.offer(sender, 1, 100)
    reception = receiver.open(1, sender.address)
    held.wait_reached()
    with pytest.raises(UsageError, match="filled before"):
        offer.fill(stage.layout.empty(100))
    held.release()
    stage.check(reception, 100)
    assert sender.stats().rounds_total == 1


def test_an_offer_is_a_future(stage: Any) -> None:
    """Callbacks run at its end, on the driver's thread; ``cancel`` is ``abort``."""
    sender = stage.sender()
    offer = stage.offer(sender, 1, 100)
    ended: list[Any] = []
    offer.add_done_callback(ended.append)
    assert offer.cancel()
    assert stage.failure_of(offer).cause == "aborted"
    sender.stats()
    assert ended == [offer]
    assert not offer.cancel()


@pytest.mark.failure_mode("exception-ends-thread")
def test_a_callback_that_raises_harms_nobody(stage: Any) -> None:
    """An exception in a callback of the caller is logged; the thread goes on."""
    sender, receiver = stage.sender(), stage.receiver()
    offer = stage.offer(sender, 1, 100)
    offer.add_done_callback(lambda _: 1 // 0)
    reception = receiver.open(1, sender.address)
    reception.add_done_callback(lambda _: 1 // 0)
    stage.check(reception, 100).release()
    stage.move(sender, receiver, 2, 100)


@pytest.mark.failure_mode("exception-ends-thread")
def test_an_order_that_fails_takes_no_other_along(stage: Any, monkeypatch: Any) -> None:
    """The end of a room could not be sent; its memory is freed and its future resolved all the same."""
    real, failures = SenderEndpoint._say, [RuntimeError("injected")]

    def say(self: Any, peer: int, message: messages.Message) -> None:
        if isinstance(message, messages.Ended) and failures:
            raise failures.pop()
        real(self, peer, message)

    monkeypatch.setattr(SenderEndpoint, "_say", say)
    sender, receiver = stage.sender(), stage.receiver()
    offer = sender.offer(1, total_tokens=100)
    reception = receiver.open(1, sender.address)
    stage.until(lambda: sender.stats().rooms.get("announced") == 1)
    offer.abort()
    assert stage.failure_of(offer).cause == "aborted"
    assert stage.failure_of(reception).cause == "aborted"  # it asked again
    assert not failures


def test_a_port_that_is_taken(stage: Any, holdings: Any) -> None:
    """An error of ours that names the address, and nothing is left behind."""
    sender = stage.sender()
    port = int(sender.address.rpartition(":")[2])
    before = holdings()
    with pytest.raises(TransportError, match=str(port)):
        SenderEndpoint(stage.layout, port=port)
    assert holdings() == before


def test_a_layout_is_shown_before_a_thread_starts(stage: Any, holdings: Any) -> None:
    """What is wrong with the settings is said at once, and nothing is left behind."""
    before = holdings()
    with pytest.raises(ConfigurationError, match="limit_bytes is 0"):
        SenderEndpoint(stage.layout, memory_bytes=0)
    assert holdings() == before


@pytest.mark.failure_mode("refusal-not-sent")
def test_who_waits_for_a_room_that_never_fits_hears_it_at_once(stage: Any) -> None:
    """A refusal takes one round trip, also for a receiver that had opened the room first."""
    sender, receiver = stage.sender(memory_bytes=10), stage.receiver()
    reception = receiver.open(1, sender.address)
    stage.until(lambda: sender.stats().sessions == 1)
    with pytest.raises(NeverFitsError):
        sender.offer(1, total_tokens=1000)
    assert stage.failure_of(reception).cause == "never_fits"


def test_a_number_in_use_is_nobody_elses(stage: Any) -> None:
    """However large the room that is offered under it by mistake: the one that has it comes through."""
    sender, receiver = stage.sender(memory_bytes=1000 * stage.layout.token_bytes), stage.receiver()
    offer = sender.offer(1, total_tokens=500)
    with pytest.raises(UsageError, match="offered before"):
        sender.offer(1, total_tokens=5000)
    offer.fill(payload(stage.layout, 500, room=1))
    stage.check(receiver.open(1, sender.address), 500)
