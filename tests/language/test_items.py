"""Items shared by requests, over real endpoints: who waits for whom, who fails with whom, and where the memory is afterwards."""

from __future__ import annotations

import errno
import gc
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

from embedwire.encode.items import ItemShelf
from embedwire.endpoint import ReceiverEndpoint
from embedwire.language.items import ItemDesk, ItemFailure, ItemKey, Verdict
from embedwire.limits import Limits
from embedwire.memory.layout import item
from embedwire.memory.shared import attach
from embedwire.protocol.messages import Cause

pytestmark = pytest.mark.timeout(60)

LAYOUT = item(16, dtype="float32")
"""64 bytes a row."""
PATIENCE_S = 20.0
READY, PENDING, FAILED = Verdict.READY, Verdict.PENDING, Verdict.FAILED


@dataclass
class Desk:
    """A desk of 40 rows over a pool of 16, a shelf, and a clock that stands still."""

    shelf: ItemShelf
    receiver: ReceiverEndpoint
    now: float = 0.0

    def __post_init__(self) -> None:
        self.desk = ItemDesk(self.receiver, memory_bytes=40 * 64, deadline_s=30.0, clock=lambda: self.now)
        self.waiters: set[str] = set()

    def put(self, name: bytes, tokens: int, value: int) -> ItemKey:
        self.shelf.put(name, {"embeddings": np.full((tokens, 16), value, np.float32)})
        return ItemKey(name, tokens)

    def expect(self, name: bytes, tokens: int) -> ItemKey:
        assert self.shelf.expect(name)
        return ItemKey(name, tokens)

    def ask(self, waiter: str, *keys: ItemKey, address: str = "") -> Verdict:
        self.waiters.add(waiter)
        return self.desk.ask(waiter, dict.fromkeys(keys, address or self.shelf.address))

    def until(self, verdict: Verdict, waiter: str, *keys: ItemKey) -> None:
        self.wait(lambda: self.ask(waiter, *keys) is verdict)

    def wait(self, condition: Callable[[], bool]) -> None:
        deadline = time.monotonic() + PATIENCE_S
        while not condition():
            assert time.monotonic() < deadline, {w: self.desk.failure_of(w) for w in self.waiters}
            os.sched_yield()

    def value(self, key: ItemKey) -> float:
        handle = self.desk.handle(key)
        assert handle is not None
        array = attach(handle, LAYOUT)[0]["embeddings"]
        assert array.shape == (key.tokens, 16)
        assert (array == array[0, 0]).all()
        return float(array[0, 0])

    @property
    def rooms(self) -> int:
        return sum(self.receiver.stats().rooms.values())


@pytest.fixture
def desk() -> Iterator[Desk]:
    """At the end every block is free, and so is all memory for a request that needs all of it, and none besides."""
    with (
        ItemShelf(LAYOUT) as shelf,
        ReceiverEndpoint(
            LAYOUT, num_blocks=2, block_size=8, limits=Limits(open_wait_s=PATIENCE_S)
        ) as receiver,
    ):
        made = Desk(shelf, receiver)
        yield made
        for waiter in made.waiters:
            made.desk.forget(waiter)
        made.wait(lambda: made.rooms == 0)
        everything = made.put(b"all memory there is", 40, 1)
        made.until(READY, "the last", everything)
        assert made.ask("one more", made.put(b"more", 1, 2)) is PENDING
        assert made.desk.used_bytes == 40 * 64
        for waiter in ("one more", "the last"):
            made.desk.forget(waiter)
        made.wait(lambda: made.rooms == 0)
        assert receiver.stats().blocks_free == 2
    made.desk.close()


def test_all_items_of_a_request_are_asked_for_in_one_go(desk: Desk, monkeypatch: Any) -> None:
    """Whoever asks wakes the endpoint's thread once, however many they are, and does not wait for it."""
    keys = [desk.put(bytes([number]), 5, number) for number in range(1, 5)]
    here, hops = threading.get_ident(), list[str]()

    def counted(name: str) -> Callable[[Any], Any]:
        inner = getattr(desk.receiver.loop, name)
        return lambda task: (hops.append(name) if threading.get_ident() == here else None, inner(task))[1]

    with monkeypatch.context() as patched:
        for name in ("call", "post"):
            patched.setattr(desk.receiver.loop, name, counted(name))
        desk.ask("r", *keys)
    assert hops == ["post"]
    desk.until(READY, "r", *keys)
    desk.desk.forget("r")


def test_a_receiver_that_is_closed_fails_the_request() -> None:
    with ItemShelf(LAYOUT) as shelf:
        receiver = ReceiverEndpoint(LAYOUT, num_blocks=2, block_size=8)
        made = Desk(shelf, receiver)
        receiver.close()
        made.until(FAILED, "r", ItemKey(b"a", 5))
        made.desk.forget("r")
        assert made.desk.used_bytes == 0
        made.desk.close()


def test_a_request_gets_all_its_items(desk: Desk) -> None:
    """Longer than the pool, and mapped by whoever has the handle; the next request finds them here, in no room."""
    a, b = desk.put(b"a", 25, 1), desk.put(b"b", 10, 2)
    desk.until(READY, "r1", a, b)
    assert (desk.value(a), desk.value(b)) == (1, 2)
    rooms = desk.receiver.stats().ended
    assert desk.ask("r2", b, a) is READY
    assert desk.receiver.stats().ended == rooms
    assert sum(desk.desk.report(a).rounds) == 25
    assert len(desk.desk.report(a).rounds) > 1


def test_two_requests_share_a_room(desk: Desk) -> None:
    """The abort of one does not end the other; that of the last ends the room."""
    key = desk.expect(b"a", 20)
    assert [desk.ask(w, key) for w in ("r1", "r2", "r3")] == [PENDING] * 3
    assert desk.rooms == 1
    desk.desk.forget("r1")
    desk.put(b"a", 20, 5)
    desk.until(READY, "r2", key)
    assert desk.value(key) == 5
    other = desk.expect(b"b", 20)
    desk.ask("r4", other)
    desk.desk.forget("r4")
    desk.wait(lambda: desk.rooms == 0)
    desk.put(b"b", 20, 6)
    desk.until(READY, "r5", other)
    assert desk.value(other) == 6


def test_a_request_that_ends_when_its_item_has_just_come(desk: Desk) -> None:
    """Nobody has looked since: its memory comes back all the same."""
    key = desk.put(b"a", 20, 5)
    desk.ask("r1", key)
    desk.wait(lambda: desk.desk.handle(key) is not None)
    desk.desk.forget("r1")
    assert desk.desk.used_bytes == 20 * 64
    assert desk.ask("r2", key) is READY
    assert desk.value(key) == 5
    other = desk.put(b"b", 20, 6)
    desk.ask("r3", other)
    desk.wait(lambda: desk.desk.handle(other) is not None)
    desk.desk.forget("r2")
    desk.desk.forget("r3")
    desk.until(READY, "r4", desk.put(b"c", 40, 7))


def test_a_request_that_ends_before_its_room_is_opened(desk: Desk) -> None:
    """The endpoint's thread is busy meanwhile. Then it opens none, and who asks for the item after that has it."""
    key, gate = desk.put(b"a", 20, 5), threading.Event()
    desk.receiver.loop.post(lambda: (gate.wait(PATIENCE_S), None)[1])
    desk.ask("r1", key)
    desk.desk.forget("r1")
    assert desk.desk.used_bytes == 20 * 64
    gate.set()
    desk.wait(lambda: desk.desk.used_bytes == 0)
    assert not desk.receiver.stats().ended
    desk.until(READY, "r2", key)
    assert desk.value(key) == 5


def test_an_item_is_fetched_before_a_request_wants_it(desk: Desk) -> None:
    """As the sender comes to keep it. The request finds it here; two that are as early share its room."""
    first = desk.put(b"first", 1, 4)
    desk.receiver.subscribe(
        desk.shelf.address, lambda address, name, tokens: desk.desk.prefetch(ItemKey(name, tokens), address)
    )
    desk.until(READY, "r0", first)  # the session is open, and with it the subscription
    desk.desk.forget("r0")
    key = desk.put(b"a", 20, 5)
    desk.wait(lambda: desk.desk.handle(key) is not None)
    assert desk.ask("r", key) is READY
    assert desk.value(key) == 5
    late = desk.expect(b"b", 10)
    desk.desk.prefetch(late, desk.shelf.address)
    assert [desk.ask("r1", late), desk.ask("r2", late)] == [PENDING] * 2
    desk.wait(lambda: desk.rooms == 1)  # that of the first may take a moment longer
    desk.put(b"b", 10, 6)
    desk.until(READY, "r1", late)
    assert desk.ask("r2", late) is READY
    assert desk.receiver.stats().ended == {"done": 3}


def test_what_is_fetched_ahead_takes_nobodys_memory(desk: Desk) -> None:
    """It comes after all who wait, goes first, and its end, if it does not come, is nobody's."""
    a, b, c = desk.put(b"a", 20, 1), desk.put(b"b", 20, 2), desk.put(b"c", 15, 3)
    desk.until(READY, "r1", a)
    desk.desk.prefetch(b, desk.shelf.address)
    desk.wait(lambda: desk.desk.handle(b) is not None)
    desk.desk.prefetch(ItemKey(b"huge", 41), desk.shelf.address)
    desk.until(READY, "r2", c)  # in the place of b
    assert desk.desk.handle(b) is None
    desk.ask("r3", b)
    desk.desk.prefetch(desk.put(b"d", 1, 4), desk.shelf.address)
    assert desk.desk.used_bytes == 35 * 64  # there would be room for d, but r3 waits for more
    desk.desk.forget("r1")
    desk.until(READY, "r3", b)
    desk.desk.forget("r2")
    before, failures = desk.desk.used_bytes, desk.receiver.stats().ended.get("unknown_item", 0)
    desk.desk.prefetch(ItemKey(b"unknown", 2), desk.shelf.address)
    desk.wait(lambda: desk.receiver.stats().ended.get("unknown_item", 0) > failures)
    desk.wait(lambda: desk.desk.used_bytes == before)
    assert [desk.desk.failure_of(waiter) for waiter in desk.waiters] == [None] * 3


def test_waiting_ends_with_the_first_request_that_is_ready_or_has_failed(desk: Desk) -> None:
    """Whichever of them that is, and with the time where none is."""
    a, b = desk.expect(b"a", 10), desk.expect(b"b", 10)
    assert [desk.ask("r1", a), desk.ask("r2", b)] == [PENDING] * 2
    desk.desk.wait(timeout_s=0.01)
    assert [desk.ask("r1", a), desk.ask("r2", b)] == [PENDING] * 2
    desk.put(b"b", 10, 7)
    desk.desk.wait(timeout_s=PATIENCE_S)
    assert [desk.ask("r1", a), desk.ask("r2", b)] == [PENDING, READY]
    desk.shelf.give_up(b"a", "no")
    desk.desk.wait(timeout_s=PATIENCE_S)
    assert desk.ask("r1", a) is FAILED
    desk.desk.wait(timeout_s=10_000)  # nobody is waiting


def test_memory_is_given_whole_and_in_order(desk: Desk) -> None:
    """Two requests that each need most of it: the second holds nothing until the first is over, nor does a small third overtake it."""
    a, b, c, d = (desk.put(name, 15, n) for n, name in enumerate((b"a", b"b", b"c", b"d")))
    small = desk.put(b"e", 2, 9)
    desk.until(READY, "r1", a, b)
    assert desk.ask("r2", c, d) is PENDING
    assert desk.ask("r3", small) is PENDING
    assert desk.desk.used_bytes == 30 * 64
    desk.desk.let_go("r1", a)
    assert desk.ask("r2", c, d) is PENDING
    desk.desk.let_go("r1", b)
    desk.until(READY, "r2", c, d)
    desk.until(READY, "r3", small)
    assert (desk.value(c), desk.value(d), desk.value(small)) == (2, 3, 9)
    assert desk.desk.handle(a) is None


def test_a_request_that_wants_more_later(desk: Desk) -> None:
    """One that was preempted needs items again that it had let go: it waits for all of them anew, holding none. So two of them can not
    wait for each other."""
    a, b, c, d = (desk.put(name, 20, n) for n, name in enumerate((b"a", b"b", b"c", b"d")))
    desk.until(READY, "r1", a, b)
    desk.desk.let_go("r1", a)
    desk.until(READY, "r2", c)
    assert desk.desk.handle(a) is None
    assert desk.ask("r1", a, b) is PENDING
    assert desk.ask("r2", c, d) is PENDING
    desk.until(READY, "r1", a, b)
    assert desk.ask("r2", c, d) is PENDING
    desk.desk.forget("r1")
    desk.until(READY, "r2", c, d)


@pytest.mark.failure_mode("request-never-fits")
def test_what_never_fits_is_refused_at_once(desk: Desk) -> None:
    """The error holds both numbers; other requests go on."""
    a = desk.put(b"a", 40, 1)
    assert desk.ask("big", a, ItemKey(b"b", 1)) is FAILED
    failure = desk.desk.failure_of("big")
    assert failure is not None
    assert (failure.cause, failure.detail[:22]) == (Cause.NEVER_FITS, "its items take 2624 by")
    desk.until(READY, "r", a)


def memory_of_items() -> set[int]:
    """What this process holds, by inode, since a mapping keeps a descriptor of its own."""
    found = set()
    for fd in os.listdir("/proc/self/fd"):
        with suppress(OSError):
            if "embedwire-assembly" in os.readlink(f"/proc/self/fd/{fd}"):
                found.add(os.stat(f"/proc/self/fd/{fd}").st_ino)
    return found


@pytest.fixture
def most(monkeypatch: Any) -> list[int]:
    """How many items the process may hold, in place of the system's own limit on descriptors, which other threads need too."""
    gc.collect()
    limit, create, others = [1000], os.memfd_create, memory_of_items()

    def limited(*args: Any) -> int:
        if len(memory_of_items() - others) >= limit[0]:
            raise OSError(errno.EMFILE, "Too many open files")
        return create(*args)

    monkeypatch.setattr(os, "memfd_create", limited)
    return limit


def test_memory_that_the_system_does_not_give_fails_the_request_alone(desk: Desk, most: list[int]) -> None:
    a, b, c = desk.put(b"a", 5, 1), desk.put(b"b", 10, 2), desk.put(b"c", 20, 3)
    desk.until(READY, "r1", a)
    most[0] = 2
    assert desk.ask("r2", b, c) is FAILED
    failure = desk.desk.failure_of("r2")
    assert failure is not None
    assert (failure.cause, failure.key) == (Cause.OVERLOADED, c)
    assert "Too many open files" in failure.detail
    assert desk.desk.used_bytes == 5 * 64
    most[0] = 1
    desk.desk.prefetch(c, desk.shelf.address)  # is not fetched, and does no harm
    assert desk.desk.used_bytes == 5 * 64
    most[0] = 2
    desk.until(READY, "r3", b)
    assert desk.desk.used_bytes == 15 * 64
    most[0] = 1000
    desk.desk.forget("r2")
    desk.until(READY, "r2", b, c)


def test_a_descriptor_that_is_missing_is_that_of_an_idle_item(desk: Desk, most: list[int]) -> None:
    """Small items run out of descriptors long before they run out of bytes."""
    keys = [desk.put(bytes([number]), 2, number) for number in range(1, 6)]
    most[0] = 3
    for key in keys:
        desk.until(READY, "r", key)
        desk.desk.forget("r")
    assert [desk.desk.handle(key) is not None for key in keys] == [False, False, True, True, True]


def test_wrong_rows_fail_only_who_expects_them(desk: Desk) -> None:
    """A content hash that somebody reused: the one whose prompt has another number of places fails."""
    right = desk.put(b"a", 10, 1)
    wrong = ItemKey(b"a", 12)
    desk.ask("wrong", wrong)
    desk.until(READY, "right", right)
    desk.until(FAILED, "wrong", wrong)
    failure = desk.desk.failure_of("wrong")
    assert failure is not None
    assert failure.detail == "the item has 10 rows, and the prompt a place for 12"
    assert desk.ask("right", right) is READY


def test_a_failure_reaches_all_who_wait_and_nobody_else(desk: Desk) -> None:
    """With the cause from the other side; asked for again, the item is fetched again."""
    lost, other = desk.expect(b"a", 10), desk.put(b"b", 10, 2)
    assert desk.ask("r1", lost, other) is PENDING
    assert desk.ask("r2", lost) is PENDING
    desk.until(READY, "r3", other)
    desk.until(READY, "r0", desk.put(b"c", 1, 3))  # asked for after it, over the same connection
    desk.shelf.give_up(b"a", "the tower fell")
    desk.until(FAILED, "r1", lost, other)
    desk.until(FAILED, "r2", lost)
    assert desk.desk.failure_of("r2") == ItemFailure(
        Cause.ENCODER_FAILED, "the tower fell", lost, desk.shelf.address
    )
    assert desk.ask("r3", other) is READY
    desk.put(b"a", 10, 7)
    desk.until(READY, "r4", lost)
    assert desk.value(lost) == 7


def test_deadline(desk: Desk) -> None:
    """Also for one that only waits for memory. What is here when it is looked at counts, however late that is."""
    never, here = desk.expect(b"a", 30), desk.put(b"b", 10, 2)
    assert desk.ask("r1", never) is PENDING
    assert desk.ask("r2", desk.put(b"c", 20, 3)) is PENDING
    desk.desk.forget("r2")
    desk.until(READY, "r3", here)
    assert desk.ask("r4", desk.put(b"d", 20, 4)) is PENDING
    desk.now = 31.0
    assert desk.ask("r3", here) is READY
    assert desk.ask("r1", never) is FAILED
    assert desk.ask("r4", ItemKey(b"d", 20)) is FAILED
    details = [failure.detail for w in ("r1", "r4") if (failure := desk.desk.failure_of(w))]
    assert details == [
        "its items were not here within 30 s",
        "there was no memory for its items, which were not here within 30 s",
    ]


def test_an_address_that_is_none(desk: Desk) -> None:
    """It fails the request that brought it."""
    assert desk.ask("r1", ItemKey(b"a", 3), address="carrier pigeon") is not READY
    desk.wait(lambda: desk.ask("r1", ItemKey(b"a", 3)) is FAILED)
    failure = desk.desk.failure_of("r1")
    assert failure is not None
    assert "carrier pigeon" in failure.detail


def test_a_pin_keeps_an_item_here(desk: Desk) -> None:
    """For whoever still reads it when the request is long over."""
    a = desk.put(b"a", 30, 1)
    assert desk.desk.pin("step 1", a) is None
    desk.until(READY, "r1", a)
    assert desk.desk.pin("step 1", a) == desk.desk.handle(a)
    desk.desk.forget("r1")
    b = desk.put(b"b", 30, 2)
    assert desk.ask("r2", b) is PENDING
    assert desk.value(a) == 1
    desk.desk.forget("step 1")
    desk.until(READY, "r2", b)
    assert desk.value(b) == 2
