"""Items by their content hash, over real endpoints: any number of readers, bounded memory, nothing unknown waited for."""

from __future__ import annotations

import logging
import os
import secrets
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest

from embedwire.encode.items import ItemShelf
from embedwire.endpoint import ReceiverEndpoint, Reception
from embedwire.errors import NeverFitsError, OverloadedError, TransferError, UsageError
from embedwire.limits import Limits
from embedwire.memory.layout import item
from embedwire.protocol.messages import Announce

pytestmark = pytest.mark.timeout(60)

LAYOUT = item(16, dtype="float32")
"""64 bytes a row."""
PATIENCE_S = 20.0


def rows(tokens: int, value: int) -> dict[str, np.ndarray]:
    return {"embeddings": np.full((tokens, 16), value, np.float32)}


@pytest.fixture
def reader() -> Iterator[ReceiverEndpoint]:
    """With a pool of 4 blocks of 16 tokens; whole again at the end."""
    with ReceiverEndpoint(LAYOUT, num_blocks=4, block_size=16) as receiver:
        yield receiver
        until(lambda: sum(receiver.stats().rooms.values()) == 0)  # the sender has heard of it a little later
        assert receiver.stats().blocks_free == 4


def fetch(reader: ReceiverEndpoint, shelf: ItemShelf, name: bytes) -> Reception:
    return reader.open(secrets.randbits(62), shelf.address, item=name)


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline
        os.sched_yield()


def asked_for(reader: ReceiverEndpoint, shelf: ItemShelf, name: bytes) -> Reception:
    """Ask for an item that is being made, and wait until the question has come in."""
    round_trip(reader, shelf)
    reception = fetch(reader, shelf, name)
    round_trip(reader, shelf)
    return reception


def round_trip(reader: ReceiverEndpoint, shelf: ItemShelf) -> None:
    """Afterwards the session is open, and what was asked before over the same connection has come in."""
    shelf.put(b"marker", rows(1, 9))
    assert value_of(fetch(reader, shelf, b"marker"), 1) == 9


def value_of(reception: Reception, tokens: int) -> float:
    """Wait for an item; it has to be of one value throughout."""
    array = reception.result(PATIENCE_S).arrays["embeddings"]
    assert array.shape == (tokens, 16)
    assert (array == array[0, 0]).all()
    return float(array[0, 0])


def cause_of(reception: Reception) -> str:
    with pytest.raises(TransferError) as caught:
        reception.result(PATIENCE_S)
    return caught.value.cause


def test_several_readers_fetch_one_item(reader: Any) -> None:
    """Each in a room of its own, in rounds, as often as they like; the source is kept once."""
    with ItemShelf(LAYOUT) as shelf, ReceiverEndpoint(LAYOUT) as other:
        shelf.put(b"a", rows(300, 1))
        shelf.put(b"b", rows(10, 2))
        names = [b"a", b"b", b"a", b"a"]
        fetched = [fetch(r, shelf, name) for r in (reader, other) for name in names]
        assert [value_of(f, {b"a": 300, b"b": 10}[n]) for f, n in zip(fetched, names * 2, strict=True)] == [
            1,
            2,
            1,
            1,
        ] * 2
        assert shelf.stats().memory_reserved_bytes == 310 * 64
        assert fetched[0].result().report.rounds != (300,)


def test_an_item_that_is_here_is_announced_once(caplog: Any) -> None:
    """Each message wakes two threads on its way."""
    patient = Limits(retry_s=5.0, peer_silence_s=20.0)  # nothing is asked twice
    with ItemShelf(LAYOUT) as shelf, ReceiverEndpoint(LAYOUT, limits=patient) as reader:
        shelf.put(b"a", rows(60, 1))
        with caplog.at_level(logging.DEBUG, "embedwire.endpoint.sender"):
            assert value_of(fetch(reader, shelf, b"a"), 60) == 1
        sent = [r.args[1] for r in caplog.records if r.msg.startswith("> ") and isinstance(r.args, tuple)]
        announced = [message for message in sent if isinstance(message, Announce)]
        assert [message.ready for message in announced] == [True]


def test_an_unknown_item_is_refused_at_once(reader: Any) -> None:
    """Nobody waits half a minute for what was never here; an item that is being made is waited for."""
    with ItemShelf(LAYOUT) as shelf:
        assert cause_of(fetch(reader, shelf, b"never")) == "unknown_item"
        assert shelf.expect(b"soon")
        assert not shelf.expect(b"soon")
        early = [fetch(reader, shelf, b"soon") for _ in range(2)]
        shelf.put(b"soon", rows(5, 3))
        assert [value_of(f, 5) for f in early] == [3, 3]
        assert not shelf.expect(b"soon")


def test_who_was_given_up_on_and_asks_again_is_served_once(reader: Any) -> None:
    """The first question waited too long for an item that takes its time, and was still on the list when the same room asked anew: it
    is lent for that room once, and to who stands behind it in line."""
    with ItemShelf(LAYOUT, limits=Limits(retry_s=0.05, open_wait_s=2.0)) as shelf:
        shelf.expect(b"slow")
        assert cause_of(reader.open(5, shelf.address, item=b"slow")) == "unknown_room"
        waiting = [reader.open(room, shelf.address, item=b"slow") for room in (5, 6)]
        round_trip(reader, shelf)
        shelf.put(b"slow", rows(5, 3))
        assert [value_of(reception, 5) for reception in waiting] == [3, 3]


def test_an_item_that_can_not_be_made(reader: Any) -> None:
    """Whoever waits for it hears why; it may be made later all the same."""
    with ItemShelf(LAYOUT, memory_bytes=640) as shelf:
        shelf.expect(b"x")
        waiting = asked_for(reader, shelf, b"x")
        shelf.give_up(b"x", "the tower fell")
        assert cause_of(waiting) == "encoder_failed"
        shelf.expect(b"big")
        waiting = asked_for(reader, shelf, b"big")
        with pytest.raises(NeverFitsError):
            shelf.put(b"big", rows(11, 1))
        assert cause_of(waiting) == "never_fits"
        shelf.expect(b"odd")
        waiting = asked_for(reader, shelf, b"odd")
        with pytest.raises(UsageError):
            shelf.put(b"odd", {"embeddings": np.zeros((3, 8), np.float32)})
        assert cause_of(waiting) == "encoder_failed"
        until(lambda: rooms_of(shelf) == 0)
        shelf.put(b"x", rows(10, 4))
        assert value_of(fetch(reader, shelf, b"x"), 10) == 4


def test_memory_is_bounded_and_what_nobody_fetched_stays_longest(reader: Any) -> None:
    """Of those that were fetched the one used longest ago goes first, before any that nobody has fetched yet."""
    with ItemShelf(LAYOUT, memory_bytes=30 * 64) as shelf:
        for value, name in enumerate((b"fresh", b"old", b"used"), 1):
            shelf.put(name, rows(10, value))
        value_of(fetch(reader, shelf, b"old"), 10)
        value_of(fetch(reader, shelf, b"used"), 10)
        shelf.put(b"next", rows(10, 4))
        assert shelf.stats().memory_reserved_bytes == 30 * 64
        assert cause_of(fetch(reader, shelf, b"old")) == "unknown_item"
        shelf.put(b"last", rows(10, 5))
        assert cause_of(fetch(reader, shelf, b"used")) == "unknown_item"
        assert value_of(fetch(reader, shelf, b"fresh"), 10) == 1


@contextmanager
def lent(shelf: ItemShelf, name: bytes, tokens: int) -> Iterator[None]:
    """Somebody fetches an item as long as the block runs: he has no memory for it until then."""
    with ReceiverEndpoint(LAYOUT, num_blocks=1, block_size=1, assembly_bytes=15 * 64) as slow:
        held = fetch(slow, shelf, name).result(PATIENCE_S)
        until(lambda: rooms_of(shelf) == 0)
        waiting = fetch(slow, shelf, name)
        until(lambda: rooms_of(shelf) == 1)
        yield
        held.release()
        assert value_of(waiting, tokens) == 1
        until(lambda: rooms_of(shelf) == 0)


def rooms_of(shelf: ItemShelf) -> int:
    """How many rooms its items are being fetched in."""
    return sum(shelf.stats().rooms.values())


def test_an_item_that_is_being_fetched_is_not_given_up() -> None:
    """It has no room left for another, and says so, until the reader is done or gone."""
    with ItemShelf(LAYOUT, memory_bytes=10 * 64) as shelf:
        shelf.put(b"a", rows(10, 1))
        with lent(shelf, b"a", 10), pytest.raises(OverloadedError):
            shelf.put(b"b", rows(1, 2))
        shelf.put(b"b", rows(1, 2))
        assert shelf.stats().memory_reserved_bytes == 64


def test_what_does_not_fit_now_takes_nobody_s_place() -> None:
    """Others than those that are being fetched have to go for it, and that would not be enough: they stay."""
    with ItemShelf(LAYOUT, memory_bytes=20 * 64) as shelf:
        shelf.put(b"lent", rows(10, 1))
        shelf.put(b"idle", rows(5, 2))
        with lent(shelf, b"lent", 10):
            with pytest.raises(OverloadedError):
                shelf.put(b"large", rows(11, 3))
            assert not shelf.expect(b"idle")
        shelf.put(b"large", rows(11, 3))
        assert shelf.expect(b"lent")
        assert not shelf.expect(b"idle")
        shelf.put(b"all memory there is", rows(20, 4))
        assert shelf.expect(b"large")
        assert shelf.expect(b"idle")


def test_a_sender_without_items(reader: Any) -> None:
    """It says so at once; an item hash is bounded where it is asked for."""
    from embedwire import SenderEndpoint

    with SenderEndpoint(LAYOUT) as sender:
        assert cause_of(reader.open(3, sender.address, item=b"a")) == "unknown_item"
    with pytest.raises(UsageError, match="65 bytes"):
        reader.open(4, "tcp://127.0.0.1:9", item=b"x" * 65)


def test_what_had_to_make_room_is_made_again() -> None:
    """And so is what was given up; what is here or on its way is not."""
    with ItemShelf(LAYOUT, memory_bytes=64) as shelf:
        shelf.put(b"a", rows(1, 1))
        assert not shelf.expect(b"a")
        shelf.put(b"b", rows(1, 2))
        assert shelf.expect(b"a")
        assert not shelf.expect(b"a")
        shelf.give_up(b"a", "it can not be made")
        shelf.stats()  # behind it on the endpoint's thread
        assert shelf.expect(b"a")
