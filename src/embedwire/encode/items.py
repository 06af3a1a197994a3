"""What an encoder has made, kept by its content hash: any number of receivers may fetch an item, each in a room of its own.

Owns the items and their memory; it must not know what made them, nor who asks. It is a cache bounded in bytes: an item stays while
somebody fetches it, then until others need its room, those that nobody has fetched yet last. All state but their names belongs to
the endpoint's driver thread; the methods may be called from any other.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from functools import partial
from types import TracebackType

import numpy as np

from embedwire.endpoint.offer import Filling, Offer
from embedwire.endpoint.sender import SenderEndpoint
from embedwire.endpoint.stats import SenderStats
from embedwire.errors import NeverFitsError, OverloadedError, TransferError, UsageError
from embedwire.limits import CONTENT_HASH_BYTES_MAX, DEFAULT_LIMITS, DEFAULT_SOURCE_BYTES, Limits
from embedwire.memory.budget import Budget
from embedwire.memory.layout import Layout
from embedwire.protocol.messages import Cause, RoomKey

assert CONTENT_HASH_BYTES_MAX >= 32


@dataclass(slots=True)
class _Kept:
    filling: Filling
    nbytes: int
    was_fetched: bool = False
    lent: set[Offer] = field(default_factory=set)


class ItemShelf:
    """Items of one layout, for anyone who asks at ``address`` for them. A context manager."""

    def __init__(
        self,
        layout: Layout,
        *,
        memory_bytes: int = DEFAULT_SOURCE_BYTES,
        host: str = "127.0.0.1",
        port: int = 0,
        transports: Sequence[str] | None = None,
        limits: Limits = DEFAULT_LIMITS,
    ) -> None:
        self.layout = layout
        self._budget = Budget(memory_bytes)
        self._kept: dict[bytes, _Kept] = {}
        self._named: set[bytes] = set()  # kept, or being made; any thread may look, and add
        self._coming: dict[bytes, list[RoomKey]] = {}
        # What nobody fetches now, in order of last use: the items that were fetched before, and those that never were.
        self._fetched: dict[bytes, None] = {}
        self._unfetched: dict[bytes, None] = {}
        self._lent_bytes = 0  # of those that somebody fetches now
        self._endpoint = SenderEndpoint(
            layout, host=host, port=port, transports=transports, limits=limits, on_wanted=self._on_wanted
        )

    @property
    def address(self) -> str:
        """Where items are asked for."""
        return self._endpoint.address

    def expect(self, item: bytes) -> bool:
        """An item of this hash is being made: who asks for it waits until it is :meth:`put` or given :meth:`up`. False when it is here
        already, or being made. Waits for no thread."""

        def expect() -> None:
            if item not in self._kept:
                self._coming.setdefault(item, [])

        if item in self._named:
            return False
        self._named.add(item)
        self._endpoint.loop.post(expect)
        return True

    def put(self, item: bytes, arrays: Mapping[str, np.ndarray]) -> None:
        """Keep an item: field name to a C-contiguous array (T, *field.shape), which nobody may change any more. Summed up here, on the
        caller's thread. Harmless for one that is here already.

        Raises UsageError when the arrays do not match the layout, NeverFitsError and OverloadedError when there is no memory for them;
        whoever waits for the item hears the same.
        """
        try:
            filling = Filling.of(self.layout, arrays)
            self._endpoint.loop.call(lambda: self._put(item, filling))
        except (NeverFitsError, OverloadedError) as error:
            self._give_up(
                item, Cause.NEVER_FITS if isinstance(error, NeverFitsError) else Cause.OVERLOADED, str(error)
            )
            raise
        except Exception as error:
            self.give_up(item, str(error))
            raise

    def give_up(self, item: bytes, detail: str) -> None:
        """It can not be made: whoever waits for it hears ``encoder_failed``."""
        self._give_up(item, Cause.ENCODER_FAILED, detail)

    def stats(self) -> SenderStats:
        """A snapshot of the sending side; the memory is that of the items."""
        rooms = self._endpoint.stats()
        return replace(
            rooms,
            memory_reserved_bytes=self._budget.used_bytes,
            memory_limit_bytes=self._budget.limit_bytes,
        )

    def close(self) -> None:
        """End all rooms and free all items. Idempotent."""
        self._endpoint.close()

    def __enter__(self) -> ItemShelf:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # ------------------------------------------------------------------ the driver's thread

    def _put(self, item: bytes, filling: Filling) -> None:
        if item not in self._kept:
            need = filling.source.tokens * self.layout.token_bytes
            self._make_room(item, need)
            self._kept[item] = _Kept(filling, need)
            self._named.add(item)
            self._rest(item)
            self._endpoint.tell_kept(item, tokens=filling.source.tokens)
        for key in self._coming.pop(item, ()):
            self._lend(key, item)

    def _make_room(self, item: bytes, need: int) -> None:
        if not self._budget.can_ever(need):
            raise NeverFitsError(f"an item of {need} bytes; there are {self._budget.limit_bytes} for all")
        if need > self._budget.limit_bytes - self._lent_bytes:
            raise OverloadedError(f"{need} bytes for an item are not free now: others are being fetched")
        while not self._budget.try_reserve(item, need):
            idle = self._fetched or self._unfetched
            oldest = next(iter(idle))
            del idle[oldest], self._kept[oldest]
            self._named.discard(oldest)
            self._budget.release(oldest)

    def _rest(self, item: bytes) -> None:
        """Nobody fetches it now; it was the last to be used."""
        (self._fetched if self._kept[item].was_fetched else self._unfetched)[item] = None

    def _give_up(self, item: bytes, cause: Cause, detail: str) -> None:
        def give_up() -> None:
            for key in self._coming.pop(item, ()):
                self._endpoint.refuse(key, cause, detail)
            if item not in self._kept:
                self._named.discard(item)

        self._endpoint.loop.post(give_up)

    def _on_wanted(self, key: RoomKey, item: bytes) -> None:
        if item in self._kept:
            self._lend(key, item)
        elif item in self._coming:
            self._coming[item].append(key)
        else:
            self._endpoint.refuse(
                key, Cause.UNKNOWN_ITEM, f"item {item.hex()} is not (or no longer) kept here"
            )

    def _lend(self, key: RoomKey, item: bytes) -> None:
        kept = self._kept[item]
        try:
            offer = self._endpoint.lend(key, kept.filling, content_hash=item)
        except OverloadedError as error:
            self._endpoint.refuse(key, Cause.OVERLOADED, str(error))
            return
        except UsageError:
            return  # this room was given up on once, and stood in line twice
        for idle in (self._fetched, self._unfetched):
            idle.pop(item, None)
        self._lent_bytes += 0 if kept.lent else kept.nbytes
        kept.lent.add(offer)
        offer.add_done_callback(partial(self._on_end, item))

    def _on_end(self, item: bytes, offer: Future[object]) -> None:
        """On the driver's thread, as every end of an offer. What is lent stays kept."""
        kept = self._kept[item]
        kept.lent.discard(offer)
        kept.was_fetched = kept.was_fetched or not isinstance(offer.exception(), TransferError)
        if not kept.lent:
            self._lent_bytes -= kept.nbytes
            self._rest(item)
