"""The end of an endpoint: at any moment, from any thread, with nothing left behind."""

from __future__ import annotations

import threading
from dataclasses import replace
from typing import Any

import pytest

from embedwire.endpoint import ReceiverEndpoint, SenderEndpoint
from embedwire.errors import UsageError

pytestmark = pytest.mark.timeout(60)

TOKENS = 1000


def test_fifty_starts_and_stops(stage: Any, holdings: Any) -> None:
    """No thread, descriptor or shared memory is left, whichever side closes first."""
    before = holdings()
    for number in range(50):
        sender = SenderEndpoint(stage.layout, transports=(stage.wire,))
        receiver = ReceiverEndpoint(stage.layout, num_blocks=4, transports=(stage.wire,))
        stage.move(sender, receiver, number, 600).release()
        first, second = (sender, receiver) if number % 2 else (receiver, sender)
        first.close()
        second.close()
    assert holdings() == before


def test_what_was_received_outlives_the_endpoint(stage: Any) -> None:
    """The arrays are the owner's; letting go of them after the end is harmless."""
    receiver = stage.receiver()
    received = stage.move(stage.sender(), receiver, 1, TOKENS)
    receiver.close()
    assert received.arrays["fill_ids"].nbytes == 4 * TOKENS
    received.release()
    del received


@pytest.mark.invariant("deadlines")
@pytest.mark.parametrize("side", ["sender", "receiver"])
def test_rooms_under_way_end_on_both_sides(stage: Any, holdings: Any, side: str) -> None:
    """Both sides end with cause ``closed`` in every phase, except where nothing was received yet."""
    before = holdings()
    sender, receiver = stage.sender(), stage.receiver(num_blocks=2)
    waiting = receiver.open(1, sender.address)
    announced = sender.offer(2, total_tokens=TOKENS)
    opened = receiver.open(2, sender.address)
    stage.until(lambda: receiver.stats().rooms.get("waiting") == 1)
    (sender if side == "sender" else receiver).close()
    assert stage.failure_of(announced).cause == stage.failure_of(opened).cause == "closed"
    if side == "receiver":
        assert stage.failure_of(waiting).cause == "closed"
    else:
        waiting.cancel()
        assert stage.failure_of(waiting).cause in ("aborted", "peer_lost")
        receiver.close()
    sender.close()
    assert holdings() == before


@pytest.mark.failure_mode("reuse-during-write", "leak-at-shutdown")
@pytest.mark.invariant("no-early-reuse")
@pytest.mark.parametrize("side", ["sender", "receiver"])
def test_it_may_close_during_a_write(stage: Any, holdings: Any, brake: Any, side: str) -> None:
    """The write ends first; its source and its destination are freed afterwards."""
    before = holdings()
    sender, receiver = stage.sender(), stage.receiver(num_blocks=2)
    held = brake(after_slices=1)
    offer = stage.offer(sender, 1, TOKENS)
    reception = receiver.open(1, sender.address)
    held.wait_reached()
    closer = threading.Thread(target=(sender if side == "sender" else receiver).close)
    closer.start()
    if side == "receiver":
        closer.join(30)
        assert stage.failure_of(reception).cause == "closed"
        assert not offer.done()  # the writer is still in the midst of it
    held.release()
    closer.join(30)
    assert not closer.is_alive()
    assert stage.failure_of(offer).cause == stage.failure_of(reception).cause == "closed"
    sender.close()
    receiver.close()
    assert holdings() == before


def test_many_threads_close_at_once(stage: Any) -> None:
    """Idempotent, and each returns only when it is over."""
    for endpoint in (stage.sender(), stage.receiver()):
        failures: list[BaseException] = []
        barrier = threading.Barrier(8)

        def close(endpoint: Any = endpoint, failures: Any = failures, barrier: Any = barrier) -> None:
            try:
                barrier.wait(30)
                endpoint.close()
                assert not endpoint.loop.is_alive
            except BaseException as error:
                failures.append(error)

        threads = [threading.Thread(target=close) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
        assert failures == []
        endpoint.close()


def test_after_the_end_all_is_refused(stage: Any) -> None:
    """An error of ours, at once, and what ends late is harmless."""
    sender, receiver = stage.sender(), stage.receiver()
    offer, reception = sender.offer(1, total_tokens=10), receiver.open(1, sender.address)
    receiver.close()
    sender.close()
    for call in (
        sender.stats,
        receiver.stats,
        lambda: sender.offer(2, total_tokens=10),
        lambda: receiver.open(2, sender.address),
    ):
        with pytest.raises(UsageError, match="is closed"):
            call()
    assert stage.failure_of(offer).cause == stage.failure_of(reception).cause == "closed"
    offer.fill(stage.layout.empty(10))
    offer.abort()
    offer.fail("late")
    reception.cancel()


def test_as_context_managers(stage: Any) -> None:
    """Both close at the end of the block."""
    with SenderEndpoint(stage.layout) as sender, ReceiverEndpoint(stage.layout) as receiver:
        stage.move(sender, receiver, 1, 100)
    assert not sender.loop.is_alive
    assert not receiver.loop.is_alive


def test_a_callback_may_not_close_its_endpoint(stage: Any) -> None:
    """It would wait for itself: told so, and nothing hangs."""
    sender, receiver = stage.sender(), stage.receiver()
    raised: list[BaseException] = []

    def close(_: Any) -> None:
        try:
            receiver.close()
        except UsageError as error:
            raised.append(error)

    reception = receiver.open(1, sender.address)
    reception.add_done_callback(close)
    stage.offer(sender, 1, 100)
    stage.check(reception, 100)
    receiver.stats()
    assert len(raised) == 1


@pytest.mark.parametrize("side", ["sender", "receiver"])
def test_who_tries_again_while_it_closes_is_refused(stage: Any, side: str) -> None:
    """The end of a room may be what makes its owner ask for the next one: nothing is taken up that nobody would end."""
    sender, receiver = stage.sender(limits=stage.quick), stage.receiver(limits=stage.quick)
    refused: list[str] = []
    offer, reception = sender.offer(1, total_tokens=TOKENS), receiver.open(1, sender.address)
    again = {
        "sender": lambda: sender.offer(2, total_tokens=TOKENS),
        "receiver": lambda: receiver.open(2, sender.address),
    }[side]

    def try_again(_: Any) -> None:
        try:
            again()
        except UsageError as error:
            refused.append(str(error))

    room, endpoint = {"sender": (offer, sender), "receiver": (reception, receiver)}[side]
    room.add_done_callback(try_again)
    stage.until(
        lambda: receiver.stats().rooms.get("waiting") == 1
    )  # both know of it, and can tell each other of its end
    endpoint.close()
    assert stage.failure_of(room).cause == "closed"
    assert refused == [f"the {side} is closed"]


def test_who_comes_while_a_sender_closes_gets_no_writer(stage: Any, brake: Any) -> None:
    """Its hello may arrive when the others' writers have been told to end; nobody would tell this one. Here the sender waits for a writer
    that is held up."""
    held = brake()
    sender, receiver = stage.sender(limits=replace(stage.quick, write_timeout_s=20.0)), stage.receiver()
    stage.offer(sender, 1, TOKENS)
    receiver.open(1, sender.address)
    held.wait_reached()
    before = writers()
    closer = threading.Thread(target=sender.close)
    closer.start()
    stage.until(lambda: is_closed(sender))
    late = stage.receiver(limits=stage.quick)
    assert "shutting down" in stage.failure_of(late.open(1, sender.address)).detail
    assert writers() == before != set()
    held.release()
    closer.join(30)
    assert not closer.is_alive()
    stage.until(lambda: not writers() & before)


def is_closed(sender: Any) -> bool:
    try:
        sender.offer(3, total_tokens=1).abort()
    except UsageError as error:
        return "closed" in str(error)
    return False


def writers() -> set[threading.Thread]:
    """Those that write; not those that end one."""
    threads = (t for t in threading.enumerate() if t.name.startswith("embedwire-writer"))
    return {thread for thread in threads if not thread.name.endswith("-close")}
