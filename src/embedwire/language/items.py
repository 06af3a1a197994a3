"""Items on their way in, and here until the model has read them: shared by all requests that wait for them.

Owns who waits for what, in which order memory is given out, and when an item may make room for another; it must not know what a request
is, nor where the model reads. Any thread may call it. What ends is taken in on the endpoint's thread, which therefore never waits for
anybody who holds the desk's lock and waits for it: nothing is done under the lock but bookkeeping.

A request is admitted whole: it gets memory for all its items at once, first come first served, and holds none before. So no two requests
can each hold what the other needs, and any amount of memory that holds the largest request serves all of them.
"""

from __future__ import annotations

import logging
import math
import secrets
import threading
import time
from collections import deque
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from enum import Enum
from functools import partial
from typing import NamedTuple

from embedwire.endpoint.receiver import ReceiverEndpoint
from embedwire.endpoint.reception import Arrays, Received, Reception
from embedwire.endpoint.stats import ReceiveReport
from embedwire.errors import EmbedwireError, TransferError, TransportError, UsageError
from embedwire.limits import AUX_WORDS, ROOM_MAX
from embedwire.memory.budget import Budget
from embedwire.memory.shared import Handle, Segment, SpareSegments
from embedwire.protocol.messages import Cause

logger = logging.getLogger(__name__)


class ItemKey(NamedTuple):
    """What is fetched: a content hash of at most 64 bytes, and how many rows there have to be under it."""

    content_hash: bytes
    tokens: int


class Verdict(Enum):
    """What a request hears when it asks."""

    READY = "ready"
    PENDING = "pending"
    FAILED = "failed"


@dataclass(frozen=True, slots=True)
class ItemFailure:
    """Why a request does not get its items."""

    cause: Cause
    detail: str
    key: ItemKey | None = None
    address: str = ""


@dataclass(slots=True, eq=False)
class _Item:
    key: ItemKey
    address: str
    segment: Segment
    nbytes: int
    waiters: set[str] = field(default_factory=set)
    handle: Handle | None = None
    reception: Reception | None = None
    received: Received | None = None
    problem: str = ""

    @property
    def is_ready(self) -> bool:
        return self.received is not None


@dataclass(slots=True)
class _Waiter:
    wanted: dict[ItemKey, str]
    until: float
    is_admitted: bool = False


class ItemDesk:
    """Fetches items through ``receiver`` into memory that other processes of this host can map, of ``memory_bytes`` at most.

    ``deadline_s`` is how long a request waits for all of its items. Closing the receiver is its owner's business, before :meth:`close`.
    """

    def __init__(
        self,
        receiver: ReceiverEndpoint,
        *,
        memory_bytes: int,
        deadline_s: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._receiver = receiver
        self._layout = receiver.layout
        self._budget = Budget(memory_bytes)
        self._deadline_s = deadline_s
        self._clock = clock
        self._changed = threading.Condition()  # its lock is the desk's; notified when an item has ended
        self._spares = SpareSegments()
        self._items: dict[ItemKey, _Item] = {}
        self._idle: dict[ItemKey, _Item] = {}  # those of which nobody has use, in order of last use
        self._idle_bytes = 0
        self._waiters: dict[str, _Waiter] = {}
        self._line: deque[str] = deque()
        self._failed: dict[str, ItemFailure] = {}
        self._next_due = math.inf  # no waiter is late before

    # ------------------------------------------------------------------ requests

    def ask(self, waiter: str, wanted: Mapping[ItemKey, str]) -> Verdict:
        """Where the items of a request are: key to the control address of a sender that keeps it. The first question is the order; the
        answer is FAILED until :meth:`forget`."""
        with self._changed:
            if waiter not in self._waiters and waiter not in self._failed:
                self._enter(waiter, wanted)
            elif waiter in self._waiters and not self._waiters[waiter].wanted.keys() >= wanted.keys():
                self._leave(waiter)  # it holds nothing while it waits for more
                self._enter(waiter, wanted)
            self._go_on()
            if waiter in self._failed:
                return Verdict.FAILED
            return Verdict.READY if self._are_here(self._waiters[waiter], wanted) else Verdict.PENDING

    def wait(self, *, timeout_s: float) -> None:
        """Until one of the requests that are pending is ready or has failed, ``timeout_s`` at most; not at all when none is. For a caller
        that has nothing else to do."""
        with self._changed:
            pending = {n: e for n, e in self._waiters.items() if not self._are_here(e, e.wanted)}
            self._changed.wait_for(
                lambda: not pending or any(self._is_settled(name, entry) for name, entry in pending.items()),
                timeout_s,
            )

    def _is_settled(self, waiter: str, entry: _Waiter) -> bool:
        return waiter in self._failed or self._are_here(entry, entry.wanted)

    def _are_here(self, entry: _Waiter, keys: Collection[ItemKey]) -> bool:
        return entry.is_admitted and all(self._items[key].is_ready for key in keys)

    def prefetch(self, key: ItemKey, address: str) -> None:
        """Fetch an item that no request has asked for yet, if there is memory for it that nobody has use of or waits for."""
        with self._changed:
            if key not in self._items and not self._line and self._make_room(self._bytes(key), keeping=()):
                with suppress(TransportError):  # nobody waits for it
                    self._open_all([self._add(key, address, keeping=())])

    def refuse(self, waiter: str, failure: ItemFailure) -> None:
        """A request can not be served, for a reason that its owner knows."""
        with self._changed:
            self._leave(waiter)
            self._failed[waiter] = failure

    def failure_of(self, waiter: str) -> ItemFailure | None:
        """Why a request failed."""
        with self._changed:
            return self._failed.get(waiter)

    def let_go(self, waiter: str, key: ItemKey) -> None:
        """The request has no more use for one of its items. Harmless when it has none."""
        with self._changed:
            entry = self._waiters.get(waiter)
            if entry is not None and entry.wanted.pop(key, None) is not None and entry.is_admitted:
                self._unpin(waiter, key)
            self._go_on()

    def forget(self, waiter: str) -> None:
        """The request is over. What only it was waiting for is no longer fetched."""
        with self._changed:
            self._failed.pop(waiter, None)
            self._leave(waiter)
            self._go_on()

    def handle(self, key: ItemKey) -> Handle | None:
        """Where an item that is here lies, for :func:`embedwire.memory.shared.attach`."""
        with self._changed:
            item = self._items.get(key)
            return item.handle if item is not None and item.is_ready else None

    def report(self, key: ItemKey) -> ReceiveReport:
        """How an item came that is here."""
        with self._changed:
            received = self._items[key].received
            assert received is not None
            return received.report

    def pin(self, waiter: str, key: ItemKey) -> Handle | None:
        """Where an item lies, for :func:`embedwire.memory.shared.attach` by somebody who did not ask for it, and who keeps it here until
        :meth:`forget`. None when it is not here."""
        with self._changed:
            item = self._items.get(key)
            if item is None or not item.is_ready:
                return None
            entry = self._waiters.setdefault(waiter, _Waiter({}, until=math.inf, is_admitted=True))
            entry.wanted[key] = item.address
            self._occupy(waiter, item)
            return item.handle

    @property
    def used_bytes(self) -> int:
        """What all items take now."""
        return self._budget.used_bytes

    def close(self) -> None:
        """Free all memory, once the receiver is closed."""
        with self._changed:
            for item in self._items.values():
                item.segment.close()
            self._items.clear()
            self._idle.clear()
            self._spares.close()

    # ------------------------------------------------------------------ the line

    def _enter(self, waiter: str, wanted: Mapping[ItemKey, str]) -> None:
        need = sum(map(self._bytes, wanted))
        if not self._budget.can_ever(need):
            limit = self._budget.limit_bytes
            detail = f"its items take {need} bytes; there are {limit} for those of all requests"
            self._failed[waiter] = ItemFailure(Cause.NEVER_FITS, detail)
            return
        until = self._clock() + self._deadline_s
        self._waiters[waiter] = _Waiter(dict(wanted), until=until)
        self._next_due = min(self._next_due, until)
        self._line.append(waiter)

    def _leave(self, waiter: str) -> None:
        entry = self._waiters.pop(waiter, None)
        if entry is None:
            return
        if not entry.is_admitted:
            self._line.remove(waiter)
        for key in entry.wanted if entry.is_admitted else ():
            self._unpin(waiter, key)

    def _go_on(self) -> None:
        """Give up what is late, admit whom there is memory for."""
        self._expire()
        while self._line and self._admit(self._line[0]):
            pass

    def _expire(self) -> None:
        now = self._clock()
        if now < self._next_due:
            return
        for waiter, entry in list(self._waiters.items()):
            if now < entry.until:
                continue
            late = next(
                (key for key in entry.wanted if not entry.is_admitted or not self._items[key].is_ready), None
            )
            if late is None:
                entry.until = math.inf  # readiness counts before the deadline: it may have been asked late
                continue
            waits = "its items were" if entry.is_admitted else "there was no memory for its items, which were"
            detail = f"{waits} not here within {self._deadline_s:g} s"
            self.refuse(waiter, ItemFailure(Cause.DEADLINE, detail, late, entry.wanted[late]))
        self._next_due = min((entry.until for entry in self._waiters.values()), default=math.inf)

    def _admit(self, waiter: str) -> bool:
        """Whether the first in line stands there no longer."""
        entry = self._waiters[waiter]
        missing = [key for key in entry.wanted if key not in self._items]
        if not self._make_room(sum(map(self._bytes, missing)), keeping=entry.wanted):
            return False
        added: list[_Item] = []
        for key in missing:
            try:
                added.append(self._add(key, entry.wanted[key], keeping=entry.wanted))
            except TransportError as error:
                for item in added:
                    del self._items[item.key]
                    self._free(item)
                self.refuse(waiter, ItemFailure(Cause.OVERLOADED, str(error), key, entry.wanted[key]))
                return True
        self._line.popleft()
        entry.is_admitted = True
        for key in entry.wanted:
            self._occupy(waiter, self._items[key])
        self._open_all(added)
        return True

    def _make_room(self, need: int, *, keeping: Collection[ItemKey]) -> bool:
        kept = [item for key in keeping if (item := self._idle.get(key)) is not None]
        if need > self._free_bytes + self._idle_bytes - sum(item.nbytes for item in kept):
            return False
        while need > self._free_bytes:
            self._drop(next(item for item in self._idle.values() if item.key not in keeping))
        return True

    @property
    def _free_bytes(self) -> int:
        return self._budget.limit_bytes - self._budget.used_bytes

    # ------------------------------------------------------------------ items

    def _bytes(self, key: ItemKey) -> int:
        return key.tokens * self._layout.token_bytes

    def _add(self, key: ItemKey, address: str, *, keeping: Collection[ItemKey]) -> _Item:
        """There is room for it. Raises TransportError when the system has none, or no descriptor, also in place of an idle item."""
        nbytes = self._bytes(key)
        segment: Segment | None = None
        while segment is None:
            try:
                spare_bytes = max(0, self._free_bytes - nbytes)
                segment = self._spares.take(self._layout, key.tokens, spare_bytes=spare_bytes)
            except TransportError:
                idle = next((item for item in self._idle.values() if item.key not in keeping), None)
                if idle is None:
                    raise
                self._drop(idle)
        item = self._items[key] = _Item(key, address, segment, nbytes)
        is_reserved = self._budget.try_reserve(item, nbytes)
        assert is_reserved, "room was made for it"
        return item

    def _open_all(self, items: Sequence[_Item]) -> None:
        """Open a room for each, without waiting for the endpoint's thread."""

        def open_all() -> None:
            for item in items:
                self._open(item)

        if items and not self._receiver.loop.post(open_all):
            for item in items:
                item.problem = "the receiver is closed"
                self._on_end(item)

    def _open(self, item: _Item) -> None:
        """On the endpoint's thread."""
        with self._changed:
            if self._items.get(item.key) is not item:
                item.problem = "no request waits for it any more"
                self._take_in(item)
                return
            try:
                item.reception = self._receiver.open(
                    1 + secrets.randbelow(ROOM_MAX),
                    item.address,
                    item=item.key.content_hash,
                    make_assembly=partial(self._assemble, item),
                )
            except EmbedwireError as error:
                item.problem = str(error)
                self._take_in(item)
            else:
                item.reception.add_done_callback(lambda _: self._take_in(item))

    def _assemble(self, item: _Item, tokens: int) -> Arrays:
        """On the endpoint's thread."""
        if tokens != item.key.tokens:
            item.problem = f"the item has {tokens} rows, and the prompt a place for {item.key.tokens}"
            raise UsageError(item.problem)
        arrays, item.handle = item.segment.assemble(
            self._layout, tokens, aux=(tokens, *[0] * (AUX_WORDS - 1))
        )
        return arrays

    def _take_in(self, item: _Item) -> None:
        """On the endpoint's thread: it has ended."""
        with self._changed:
            self._on_end(item)
            self._go_on()
            self._changed.notify_all()

    def _on_end(self, item: _Item) -> None:
        failure = self._failure(item)
        if failure is None:
            assert item.reception is not None
            item.received = item.reception.result()
            logger.debug(
                "item %s is available: %d tokens from %s",
                item.key.content_hash.hex(),
                item.key.tokens,
                item.address,
            )
        else:
            for waiter in list(item.waiters):
                self.refuse(waiter, failure)
        is_known = self._items.get(item.key) is item
        if is_known and failure is not None:
            del self._items[item.key]
        elif is_known:
            self._rest(item)
        if failure is not None or not is_known:
            self._free(item)

    @staticmethod
    def _failure(item: _Item) -> ItemFailure | None:
        error = item.reception.exception() if item.reception is not None else None
        if item.problem:
            return ItemFailure(Cause.VIOLATION, item.problem, item.key, item.address)
        if isinstance(error, TransferError):
            return ItemFailure(Cause(error.cause), error.detail, item.key, item.address)
        return None

    def _unpin(self, waiter: str, key: ItemKey) -> None:
        item = self._items[key]
        item.waiters.discard(waiter)
        if not item.waiters and not item.is_ready:
            del self._items[key]  # its memory stays reserved until nothing writes to it any more
            if item.reception is not None:
                item.reception.cancel("no request waits for it any more")
        self._rest(item)

    def _occupy(self, waiter: str, item: _Item) -> None:
        """It has one more user, and is the last to be used."""
        item.waiters.add(waiter)
        if self._idle.pop(item.key, None) is not None:
            self._idle_bytes -= item.nbytes

    def _rest(self, item: _Item) -> None:
        """If it is here and has no user now, it may make room for others."""
        if item.is_ready and not item.waiters and item.key not in self._idle:
            self._idle[item.key] = item
            self._idle_bytes += item.nbytes

    def _drop(self, item: _Item) -> None:
        """It is idle."""
        del self._items[item.key], self._idle[item.key]
        self._idle_bytes -= item.nbytes
        self._free(item)

    def _free(self, item: _Item) -> None:
        if item.received is not None:
            item.received.release()
        self._spares.keep(item.segment)
        self._budget.release(item)
