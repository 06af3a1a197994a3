"""What a receiver's owner may ask for, where an embedding lies, and how long its memory is reserved."""

from __future__ import annotations

import gc
import threading
from typing import Any

import numpy as np
import pytest

from embedwire.endpoint import ReceiverEndpoint
from embedwire.errors import ConfigurationError, TransportError, UsageError
from embedwire.limits import ROOM_MAX
from embedwire.memory.pool import BlockPool
from embedwire.memory.source import Source
from embedwire.protocol import receiver_lanes
from embedwire.protocol.messages import Message

pytestmark = pytest.mark.timeout(60)

TOKENS = 1000


def reserved(receiver: ReceiverEndpoint) -> int:
    return receiver.stats().memory_reserved_bytes


def test_memory_is_released_once(stage: Any) -> None:
    """Reserved until ``release``, however often that is called; the arrays stay readable."""
    receiver = stage.receiver()
    received = stage.move(stage.sender(), receiver, 1, TOKENS)
    gc.collect()
    assert reserved(receiver) == TOKENS * stage.layout.token_bytes
    received.release()
    received.release()
    assert reserved(receiver) == 0
    assert received.arrays["fill_ids"].shape == (TOKENS,)


def test_memory_is_released_with_its_last_reader(stage: Any) -> None:
    """Nobody has to call ``release``: but a view of one field keeps the whole reserved."""
    receiver = stage.receiver()
    received = stage.move(stage.sender(), receiver, 1, TOKENS)
    view = received.arrays["input_embeddings"][10:20].view(np.uint16)
    del received
    gc.collect()
    assert reserved(receiver) == TOKENS * stage.layout.token_bytes
    del view
    gc.collect()
    assert reserved(receiver) == 0


@pytest.mark.failure_mode("assemblies-block-each-other")
def test_released_memory_admits_the_next(stage: Any) -> None:
    """A room that waits for assembly memory continues when a finished one is released."""
    sender = stage.sender()
    receiver = stage.receiver(assembly_bytes=TOKENS * stage.layout.token_bytes)
    first = stage.move(sender, receiver, 1, TOKENS)
    stage.offer(sender, 2, TOKENS)
    second = receiver.open(2, sender.address)
    stage.until(lambda: receiver.stats().waiting["assembly"] == 1)
    assert receiver.stats().blocks_free == receiver.stats().blocks_total
    first.release()
    stage.check(second, TOKENS)


def test_who_waits_hears_before_the_sender(stage: Any, monkeypatch: Any) -> None:
    """An embedding that is here waits for no message about it."""
    heard: list[str] = []
    say = ReceiverEndpoint._say

    def spy(self: ReceiverEndpoint, address: str, message: Message) -> None:
        heard.append(type(message).__name__)
        say(self, address, message)

    monkeypatch.setattr(ReceiverEndpoint, "_say", spy)
    sender, receiver = stage.sender(), stage.receiver()
    stage.offer(sender, 1, TOKENS)
    reception = receiver.open(1, sender.address)
    reception.add_done_callback(lambda _: heard.append("the one who waits"))
    stage.check(reception, TOKENS)
    stage.until(lambda: sender.stats().ended)
    assert heard.index("the one who waits") < heard.index("Done")


@pytest.mark.parametrize(
    ("room", "attempt", "address"),
    [
        (-1, 0, None),
        (ROOM_MAX + 1, 0, None),
        (1, -1, None),
        (1, 2**31, None),
        (1, 0, "nowhere"),
        (1, 0, "tcp://"),
        (1, 0, "tcp://127.0.0.1"),
    ],
)
def test_what_can_not_be_opened(stage: Any, room: int, attempt: int, address: str | None) -> None:
    """Refused at once, with nothing kept."""
    receiver = stage.receiver()
    with pytest.raises(UsageError):
        receiver.open(room, address or stage.sender().address, attempt=attempt)
    assert receiver.stats().sessions == len(receiver._sockets) == 0


def test_a_room_is_open_once(stage: Any) -> None:
    """The same room and attempt may be opened again when it is over."""
    sender, receiver = stage.sender(), stage.receiver()
    reception = receiver.open(1, sender.address)
    with pytest.raises(UsageError, match="room 1 attempt 0 is open already"):
        receiver.open(1, sender.address)
    stage.offer(sender, 1, TOKENS)
    stage.check(reception, TOKENS).release()


@pytest.mark.parametrize("is_released", [False, True])
def test_a_number_that_comes_again(stage: Any, is_released: bool) -> None:
    """From an encoder that was started anew, and numbers its rooms from the beginning, while the first room's arrays are still there. Each
    room's memory is its own."""
    receiver = stage.receiver()
    first = stage.move(stage.sender(), receiver, 1, TOKENS)
    if is_released:
        first.release()
    stage.until(
        lambda: not sum(receiver.stats().rooms.values())
    )  # the sender has confirmed the end of the first
    second = stage.move(stage.sender(), receiver, 1, TOKENS)
    need = TOKENS * stage.layout.token_bytes
    assert reserved(receiver) == (need if is_released else 2 * need)
    del first
    gc.collect()
    assert reserved(receiver) == need
    second.release()
    assert reserved(receiver) == 0


def test_a_lane_that_was_done_long_before_the_other(stage: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its session has ended by the time that the room is whole."""
    monkeypatch.setattr(receiver_lanes, "IDLE_S", 0.1)
    senders = [stage.sender(rank=rank, ranks=2) for rank in range(2)]
    offers = [stage.offer(sender, 1, TOKENS) for sender in senders]
    stage.until(lambda: offers[1].source)
    late, go_on, real = offers[1].source, threading.Event(), Source.pieces

    def pieces(source: Source, *args: Any, **more: Any) -> Any:
        assert source is not late or go_on.wait(20)
        return real(source, *args, **more)

    monkeypatch.setattr(Source, "pieces", pieces)
    receiver = stage.receiver()
    reception = receiver.open(1, [sender.address for sender in senders])
    stage.until(lambda: offers[0].done() and receiver.stats().sessions == 1)
    go_on.set()
    assert stage.check(reception, TOKENS).report.transport == stage.wire


@pytest.mark.failure_mode("exception-ends-thread")
def test_an_assembly_that_can_not_be_made(stage: Any, stamped: Any) -> None:
    """An allocator of the caller raises: its room ends with a cause on both sides, others go on."""

    def fails(total: int) -> dict[str, np.ndarray]:
        raise MemoryError(f"no place for {total}")

    def frozen(total: int) -> dict[str, np.ndarray]:
        arrays = stage.layout.empty(total)
        arrays["fill_ids"].flags.writeable = False
        return arrays

    sender, receiver = stage.sender(), stage.receiver()
    makers = [fails, frozen, lambda total: stage.layout.empty(total - 1), lambda total: {}]
    for room, make in enumerate(makers):
        offer = stage.offer(sender, room, TOKENS)
        reception = receiver.open(room, sender.address, make_assembly=make)
        assert stage.failure_of(reception).cause == stage.failure_of(offer).cause == "overloaded"
    assert "no place for 1000" in stage.failure_of(receiver.open(0, sender.address)).detail
    stage.move(sender, receiver, 99, TOKENS)


def test_many_assemblies_that_can_not_be_made(stage: Any) -> None:
    """Rooms in line for memory, each of which makes way for the next as it fails: all end, and the next one is received."""
    rooms, tokens = 400, 4
    sender, receiver = stage.sender(), stage.receiver(assembly_bytes=tokens * stage.layout.token_bytes)
    first = stage.move(sender, receiver, 1, tokens)

    def fail(_: int) -> Any:
        raise MemoryError("injected")

    receptions = []
    for room in range(2, 2 + rooms):
        stage.offer(sender, room, tokens)
        receptions.append(receiver.open(room, sender.address, make_assembly=fail))
    stage.until(lambda: receiver.stats().waiting["assembly"] == rooms)
    first.release()
    assert {stage.failure_of(reception).cause for reception in receptions} == {"overloaded"}
    stage.move(sender, receiver, 2 + rooms, tokens)


@pytest.mark.failure_mode("exception-ends-thread")
def test_a_drain_that_fails(stage: Any, monkeypatch: Any) -> None:
    """The room ends at once on both sides; the thread and other rooms go on."""
    real, failures = BlockPool.get_rows, [RuntimeError("injected")]

    def get_rows(*args: Any, **more: Any) -> None:
        if failures:
            raise failures.pop()
        real(*args, **more)

    monkeypatch.setattr(BlockPool, "get_rows", get_rows)
    sender, receiver = stage.sender(), stage.receiver(num_blocks=2)
    offer = stage.offer(sender, 1, TOKENS)
    failure = stage.failure_of(receiver.open(1, sender.address))
    assert (failure.cause, failure.detail) == ("wire_failed", "not drained: RuntimeError: injected")
    assert stage.failure_of(offer).cause == "wire_failed"
    stage.move(sender, receiver, 2, TOKENS)


def test_a_reception_is_a_future(stage: Any) -> None:
    """Callbacks run at its end, on the driver's thread; ``cancel`` says whether it came in time."""
    sender, receiver = stage.sender(), stage.receiver()
    ended: list[Any] = []
    reception = receiver.open(1, sender.address)
    reception.add_done_callback(ended.append)
    with pytest.raises(TimeoutError):
        reception.result(0)
    assert reception.cancel()
    assert stage.failure_of(reception).cause == "aborted"
    receiver.stats()
    assert ended == [reception]
    assert not reception.cancel()


@pytest.mark.failure_mode("request-never-fits")
@pytest.mark.parametrize(
    ("wrong", "kind"),
    [
        ({"num_blocks": 0}, ConfigurationError),
        ({"block_size": 0}, ConfigurationError),
        ({"default_allocate_tokens": 0}, ConfigurationError),
        ({"assembly_bytes": 0}, ConfigurationError),
        ({"transports": ("shm", "none such")}, ConfigurationError),
        ({"transports": ("shm", "tcp"), "host": "192.0.2.1"}, TransportError),
    ],
)
def test_settings_that_can_not_be(stage: Any, holdings: Any, wrong: dict[str, Any], kind: type) -> None:
    """Zero blocks and other impossible settings raise at once and leave nothing behind."""
    before = holdings()
    with pytest.raises(kind):
        ReceiverEndpoint(stage.layout, **wrong)
    assert holdings() == before


def test_one_sender_under_two_names(stage: Any) -> None:
    """An encoder calls itself by its number, and a setting by its name. Rooms under both are received at once, and who subscribes under
    the one goes on hearing of items while rooms are asked for under the other."""
    sender, receiver = stage.sender(), stage.receiver()
    names = [sender.address, sender.address.replace("127.0.0.1", "localhost")]
    heard: list[tuple[str, bytes, int]] = []
    receiver.subscribe(names[1], lambda *kept: heard.append(kept))
    for room in range(1, 9):
        stage.offer(sender, room, TOKENS)
    for received in [receiver.open(room, names[room % 2]) for room in range(1, 9)]:
        stage.check(received, TOKENS)
    sender.tell_kept(b"a", tokens=3)
    stage.until(lambda: heard == [(names[1], b"a", 3)])
    assert sender.stats().sessions == 1
