"""Rooms that end early: by either side, in every phase, with the cause on both sides and all memory back."""

from __future__ import annotations

import logging
from typing import Any

import pytest

from embedwire.limits import Limits
from embedwire.memory.layout import Field, Layout, item, multimodal

pytestmark = pytest.mark.timeout(60)

TOKENS = 1000


@pytest.mark.failure_mode("abort-not-propagated")
def test_the_encoder_aborts_before_open(stage: Any) -> None:
    """A receiver that opens a room after its end gets the cause."""
    sender = stage.sender()
    offer = stage.offer(sender, 1, TOKENS)
    offer.abort("no longer wanted")
    assert stage.failure_of(offer).cause == "aborted"
    failure = stage.failure_of(stage.receiver().open(1, sender.address))
    assert (failure.cause, failure.detail) == ("aborted", "no longer wanted")


@pytest.mark.failure_mode("abort-not-propagated", "messages-cross")
def test_the_client_aborts_before_the_offer(stage: Any) -> None:
    """A room that was cancelled while it waited for its offer is not started by a later offer."""
    sender, receiver = stage.sender(), stage.receiver()
    reception = receiver.open(1, sender.address)
    stage.until(lambda: sender.stats().sessions == 1)
    reception.cancel()
    assert stage.failure_of(reception).cause == "aborted"
    stage.move(sender, receiver, 2, TOKENS)


@pytest.mark.failure_mode("abort-not-propagated")
def test_either_side_ends_it_before_fill(stage: Any) -> None:
    """The room is announced and its source is not ready yet."""
    sender, receiver = stage.sender(), stage.receiver()
    offers = [sender.offer(room, total_tokens=TOKENS) for room in range(3)]
    receptions = [receiver.open(room, sender.address) for room in range(3)]
    stage.until(lambda: receiver.stats().rooms.get("waiting") == 3)
    offers[0].abort("the client left")
    offers[1].fail("out of memory")
    receptions[2].cancel("too slow")
    ends = [stage.failure_of(reception) for reception in receptions]
    assert [(e.cause, e.detail) for e in ends] == [
        ("aborted", "the client left"),
        ("encoder_failed", "out of memory"),
        ("aborted", "too slow"),
    ]
    assert [stage.failure_of(offer).args for offer in offers] == [end.args for end in ends]


@pytest.mark.failure_mode("reuse-during-write")
@pytest.mark.invariant("no-early-reuse")
@pytest.mark.parametrize("side", ["sender", "receiver"])
@pytest.mark.parametrize("after_slices", [0, 2])
def test_either_side_ends_it_during_a_write(stage: Any, brake: Any, side: str, after_slices: int) -> None:
    """Blocks are used again only after the write has returned."""
    sender, receiver = stage.sender(), stage.receiver(num_blocks=2)
    held = brake(after_slices=after_slices)
    offer = stage.offer(sender, 1, TOKENS)
    reception = receiver.open(1, sender.address)
    held.wait_reached()
    (offer.abort if side == "sender" else reception.cancel)("enough")
    if side == "receiver":
        failure = stage.failure_of(reception)
        stats = receiver.stats()
        assert failure.detail == "enough"
        assert stats.blocks_quarantined == (0 if stage.wire == "tcp" else 2)  # tcp: fenced by the receiver
        assert not offer.done()  # its write has not returned
    stage.until(lambda: sender.stats().rooms.get("ending") == 1)
    held.release()
    assert stage.failure_of(offer).cause == stage.failure_of(reception).cause == "aborted"
    stage.wait_idle()
    stage.move(sender, receiver, 2, TOKENS)
    assert sender.stats().ended == receiver.stats().ended == {"aborted": 1, "done": 1}


@pytest.mark.failure_mode("status-raised-again", "abort-not-propagated")
def test_ending_it_after_the_end_is_harmless(stage: Any) -> None:
    """The first cause stays."""
    sender, receiver = stage.sender(), stage.receiver()
    offer = stage.offer(sender, 1, TOKENS)
    reception = receiver.open(1, sender.address)
    received = stage.check(reception, TOKENS)
    assert offer.result(30).total_tokens == TOKENS
    reception.cancel()
    offer.abort()
    offer.fail("late")
    offer.fill({name: array.copy() for name, array in received.arrays.items()})
    assert reception.result(0) is received
    assert sender.stats().ended == receiver.stats().ended == {"done": 1}
    assert offer.source is None  # what came late is not kept


@pytest.mark.invariant("deadlines")
def test_nobody_offers_it(stage: Any) -> None:
    """An ``open`` waits for its room until a deadline, and ends with a cause."""
    limits = Limits(retry_s=0.05, open_wait_s=0.2, peer_silence_s=1.0)
    reception = stage.receiver().open(9, stage.sender(limits=limits).address)
    failure = stage.failure_of(reception)
    assert failure.cause == "unknown_room"
    assert "0.2 s" in failure.detail


@pytest.mark.invariant("deadlines")
def test_nobody_opens_it(stage: Any) -> None:
    """An offer waits for its receiver until a deadline, then its memory is freed."""
    limits = Limits(retry_s=0.05, open_wait_s=0.2, peer_silence_s=1.0)
    assert stage.failure_of(stage.offer(stage.sender(limits=limits), 1, TOKENS)).cause == "deadline"


@pytest.mark.invariant("deadlines")
def test_the_source_never_comes(stage: Any) -> None:
    """An announced room whose encoder hangs ends by its deadline, on both sides."""
    limits = Limits(retry_s=0.05, source_wait_s=0.3)
    sender = stage.sender(limits=limits)
    offer = sender.offer(1, total_tokens=TOKENS)
    reception = stage.receiver().open(1, sender.address)
    assert stage.failure_of(offer).cause == stage.failure_of(reception).cause == "deadline"


@pytest.mark.failure_mode("encoder-killed")
@pytest.mark.invariant("deadlines")
def test_nobody_listens(stage: Any) -> None:
    """An address without a sender: ``peer_lost`` within the deadline, and the error names the address."""
    gone = stage.sender()
    gone.close()
    failure = stage.failure_of(stage.receiver(limits=stage.quick).open(1, gone.address))
    assert failure.cause == "peer_lost"
    assert gone.address in failure.detail


@pytest.mark.failure_mode("request-never-fits", "refusal-not-sent")
def test_what_never_fits_takes_one_round_trip(stage: Any, said: list[str]) -> None:
    """Refused on the announcement, before the source is made; both sides get the cause."""
    sender = stage.sender()
    patient = Limits(retry_s=5.0, peer_silence_s=20.0)  # nothing is asked twice
    receiver = stage.receiver(assembly_bytes=1000 * stage.layout.token_bytes, limits=patient)
    stage.move(sender, receiver, 1, 1000).release()
    said.clear()
    offer = sender.offer(2, total_tokens=1001)
    reception = receiver.open(2, sender.address)
    assert stage.failure_of(reception).cause == stage.failure_of(offer).cause == "never_fits"
    assert "there are 32000 in all" in str(stage.failure_of(offer))
    assert [kind for kind in said if kind in ("open", "announce", "abort")] == ["open", "announce", "abort"]
    assert not {"init", "status"} & set(said)


def test_two_receivers_want_one_room(stage: Any) -> None:
    """A room belongs to who opened it first; another receiver is told so, and the first gets it."""
    sender = stage.sender()
    offer = sender.offer(1, total_tokens=TOKENS)
    first = stage.receiver().open(1, sender.address)
    stage.until(lambda: sender.stats().rooms.get("announced") == 1)
    assert stage.failure_of(stage.receiver().open(1, sender.address)).cause == "violation"
    offer.fill(stage.layout.empty(TOKENS))
    assert first.result(30).report.total_tokens == TOKENS


DIFFERENT = [
    pytest.param(multimodal(16), "input_embeddings bfloat16[16]", id="width"),
    pytest.param(multimodal(8, dtype="float16"), "input_embeddings float16[8]", id="dtype"),
    pytest.param(multimodal(8, deepstack_levels=1), "deepstack_embeddings bfloat16[1, 8]", id="deepstack"),
    pytest.param(multimodal(8, mrope=False), "receiver none", id="fewer-fields"),
    pytest.param(item(8), "embeddings bfloat16[8]", id="item"),
    pytest.param(Layout("other", (multimodal(8).fields[0], Field("ids", "int32"))), "ids int32[]", id="name"),
]


@pytest.mark.failure_mode("layouts-differ")
@pytest.mark.invariant("validation")
@pytest.mark.parametrize(("layout", "field"), DIFFERENT)
def test_layouts_that_differ(stage: Any, caplog: Any, layout: Layout, field: str) -> None:
    """Refused at the handshake; both errors name the field, and other receivers of the sender are served."""
    caplog.set_level(logging.WARNING, "embedwire.endpoint.sender")
    sender = stage.sender()
    offer = stage.offer(sender, 1, TOKENS)
    failure = stage.failure_of(stage.receiver(layout).open(1, sender.address))
    assert failure.cause == "handshake"
    assert field in failure.detail
    assert any(field in record.getMessage() for record in caplog.records)
    stage.check(stage.receiver().open(1, sender.address), TOKENS)
    assert offer.result(30).total_tokens == TOKENS
