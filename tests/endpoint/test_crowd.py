"""Many rooms at once through little memory: all finish, all are right, nothing stays held."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any

import pytest

from embedwire.errors import NeverFitsError, OverloadedError
from embedwire.limits import Limits
from embedwire.testing.payload import payload

pytestmark = pytest.mark.timeout(60)


@pytest.mark.failure_mode("pool-held-by-partial-rooms", "burst-of-requests")
@pytest.mark.invariant("no-hold-and-wait")
@pytest.mark.parametrize("rooms", [64, 200])
def test_a_pool_held_by_partials(stage: Any, rooms: int) -> None:
    """Every room needs more blocks than the pool has, and all request them at once."""
    sender, receiver = stage.sender(), stage.receiver(num_blocks=4)
    sizes = {room: 600 + room for room in range(rooms)}
    offers = [stage.offer(sender, room, tokens) for room, tokens in sizes.items()]
    receptions = [receiver.open(room, sender.address) for room in reversed(sizes)]
    for reception, tokens in zip(receptions, reversed(sizes.values()), strict=True):
        stage.check(reception, tokens).release()
    assert [offer.result(30).total_tokens for offer in offers] == list(sizes.values())
    stage.wait_idle()
    assert receiver.stats().ended == sender.stats().ended == {"done": rooms}


@pytest.mark.failure_mode("assemblies-block-each-other")
@pytest.mark.invariant("no-hold-and-wait")
def test_assemblies_under_a_limit(stage: Any) -> None:
    """64 rooms and assembly memory for two: rooms in progress do not block each other."""
    tokens, nbytes = 1500, 1500 * stage.layout.token_bytes
    sender, receiver = stage.sender(), stage.receiver(num_blocks=4, assembly_bytes=2 * nbytes)
    for room in range(64):
        stage.offer(sender, room, tokens)
    receptions = [receiver.open(room, sender.address) for room in range(64)]
    for reception in receptions:
        stage.check(reception, tokens).release()
    assert receiver._budget.peak_bytes == 2 * nbytes


@pytest.mark.failure_mode("deadlock-across-servers")
@pytest.mark.invariant("no-hold-and-wait")
def test_two_encoders_and_two_language_servers_in_a_ring(stage: Any) -> None:
    """Two encoders and two language servers, each with memory for one room, wait for each other in a ring; all four rooms arrive."""
    nbytes = 1500 * stage.layout.token_bytes
    one, two = (stage.sender(memory_bytes=nbytes) for _ in range(2))
    left, right = (stage.receiver(num_blocks=2, assembly_bytes=nbytes) for _ in range(2))
    a, c = (sender.offer(room, total_tokens=1500) for room, sender in ((1, one), (3, two)))
    for room, sender in ((2, two), (4, one)):
        with pytest.raises(OverloadedError):
            stage.offer(sender, room, 1500)
    opened = [(2, two, left), (4, one, right), (1, one, left), (3, two, right)]
    receptions = [receiver.open(room, sender.address) for room, sender, receiver in opened]
    for offer, room in ((a, 1), (c, 3)):
        offer.fill(payload(stage.layout, 1500, room=room))

    def offer_as_soon_as_there_is_memory(room: int, sender: Any) -> bool:
        with suppress(OverloadedError):
            stage.offer(sender, room, 1500)
            return True
        return False

    # Both are whole before another room is offered: one that was announced sooner would have the memory until it is released.
    for first in receptions[2:]:
        stage.check(first, 1500).release()
    for room, sender in ((4, one), (2, two)):
        stage.until(lambda room=room, sender=sender: offer_as_soon_as_there_is_memory(room, sender))
    for reception in receptions[:2]:
        stage.check(reception, 1500).release()


def test_many_threads_offer_and_open(stage: Any) -> None:
    """Both endpoints may be called from any thread, and several receivers share a sender."""
    sender = stage.sender()
    receivers = [stage.receiver(num_blocks=3) for _ in range(3)]
    with ThreadPoolExecutor(6) as threads:
        futures = [
            threads.submit(stage.move, sender, receivers[room % 3], room, 400 + room) for room in range(60)
        ]
        for future in futures:
            future.result(30).release()
    assert sender.stats().ended == {"done": 60}


@pytest.mark.invariant("backpressure")
def test_more_rooms_than_may_be_open(stage: Any) -> None:
    """One room above the limit is refused at once and does not affect the others."""
    limits = Limits(rooms_max=3)
    sender, receiver = stage.sender(limits=limits), stage.receiver(limits=limits)
    waiting = [receiver.open(room, sender.address) for room in range(3)]
    with pytest.raises(OverloadedError, match="at most 3"):
        receiver.open(3, sender.address)
    with pytest.raises(OverloadedError, match="at most 3"):
        receiver.open(3, stage.sender().address)
    assert len(receiver._sockets) == 1
    offers = [sender.offer(room, total_tokens=100) for room in range(3)]
    with pytest.raises(OverloadedError, match="at most 3"):
        sender.offer(3, total_tokens=100)
    for room, offer in enumerate(offers):
        offer.fill(payload(stage.layout, 100, room=room))
    for reception in waiting:
        stage.check(reception, 100)


@pytest.mark.failure_mode("refusal-not-sent", "request-never-fits")
@pytest.mark.invariant("backpressure")
def test_source_memory_is_bounded(stage: Any) -> None:
    """ "Not enough free now" and "never enough" are distinct errors, both raised at once."""
    sender = stage.sender(memory_bytes=1000 * stage.layout.token_bytes)
    offer = stage.offer(sender, 1, 600)
    with pytest.raises(OverloadedError, match="not free now"):
        stage.offer(sender, 2, 401)
    with pytest.raises(NeverFitsError, match="there are 32000"):
        stage.offer(sender, 3, 1001)
    stage.check(stage.receiver().open(1, sender.address), 600)
    assert offer.result(30).bytes == 600 * stage.layout.token_bytes
    assert stage.move(sender, stage.receiver(), 2, 1000).report.total_tokens == 1000
