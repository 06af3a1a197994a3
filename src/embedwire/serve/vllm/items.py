"""What encoders have answered about media items: asked once, however many requests want the same one.

Owns the calls under way and a bounded memory of recent answers; it must not know HTTP or how an encoder is chosen. On the
router's event loop.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Awaitable, Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

import anyio
from anyio.abc import TaskGroup
from msgspec import Struct

from embedwire.serve.faults import Fault, FaultError, fault_of
from embedwire.serve.vllm.request import Item


class Offered(Struct, frozen=True):
    """One entry of an encoder's answer: where the rows of an item are to be had."""

    addresses: tuple[str, ...]
    tokens: int
    metadata: dict[str, Any] = {}


@dataclass(frozen=True, slots=True, kw_only=True)
class Encoded:
    """An encoder's answer: entries by identifier, vLLM's hash of the content. One media item has one, as a rule."""

    offered: Mapping[str, Offered]
    encoder: str
    at_s: float
    """When it was asked, by the monotonic clock."""

    @property
    def tokens(self) -> int:
        return sum(entry.tokens for entry in self.offered.values())


Encode = Callable[[Item, Collection[str]], Awaitable[Encoded]]
"""(item, URLs to avoid) → the answer. Raises FaultError."""


@dataclass(slots=True)
class _Flight:
    """A call under way, and how many wait for it. It ends when nobody does. ``avoid``: no answer comes from these encoders."""

    avoid: frozenset[str]
    scope: anyio.CancelScope = field(default_factory=anyio.CancelScope)
    done: anyio.Event = field(default_factory=anyio.Event)
    waiters: int = 0
    encoded: Encoded | None = None
    fault: Fault | None = None


class Items:
    """Answers by item. ``remembered_max`` of them are kept, those longest unused go first; one whose encoder ``is_there`` denies is
    forgotten."""

    def __init__(
        self,
        encode: Encode,
        *,
        background: TaskGroup,
        remembered_max: int,
        is_there: Callable[[str], bool],
    ) -> None:
        self._encode = encode
        self._background = background
        self._remembered_max = remembered_max
        self._is_there = is_there
        self._remembered: OrderedDict[bytes, Encoded] = OrderedDict()
        self._flights: dict[bytes, _Flight] = {}

    async def get(self, item: Item, *, avoid: Collection[str] = ()) -> Encoded:
        """The answer about an item of an encoder outside ``avoid``: a remembered one, one on its way, or a new one. Raises FaultError."""
        known = self._recall(item.key)
        if known is not None and known.encoder not in avoid:
            return known
        flight = self._flights.get(item.key)
        if flight is None or not flight.avoid.issuperset(avoid):
            flight = self._flights[item.key] = _Flight(frozenset(avoid))
            self._background.start_soon(self._fly, item, flight)
        flight.waiters += 1
        try:
            await flight.done.wait()
        finally:
            flight.waiters -= 1
            if not flight.waiters:
                self._end(item.key, flight)
        if flight.fault:
            raise FaultError(flight.fault)
        assert flight.encoded is not None
        return flight.encoded

    def forget(self, identifiers: Collection[str]) -> None:
        """Ask again for these: somebody was sent for them in vain."""
        self._forget_where(lambda known: not known.offered.keys().isdisjoint(identifiers))

    def forget_encoder(self, url: str) -> None:
        """Ask again for all that an encoder had."""
        self._forget_where(lambda known: known.encoder == url)

    def _forget_where(self, is_lost: Callable[[Encoded], bool]) -> None:
        for key in [key for key, known in self._remembered.items() if is_lost(known)]:
            del self._remembered[key]

    def _recall(self, key: bytes) -> Encoded | None:
        known = self._remembered.get(key)
        if known is None:
            return None
        if not self._is_there(known.encoder):
            del self._remembered[key]
            return None
        self._remembered.move_to_end(key)
        return known

    async def _fly(self, item: Item, flight: _Flight) -> None:
        try:
            with flight.scope:
                flight.encoded = await self._encode(item, flight.avoid)
                self._remember(item.key, flight.encoded)
        except Exception as error:
            flight.fault = fault_of(error)
        finally:
            self._end(item.key, flight)
            flight.done.set()

    def _end(self, key: bytes, flight: _Flight) -> None:
        flight.scope.cancel()
        if self._flights.get(key) is flight:
            del self._flights[key]

    def _remember(self, key: bytes, encoded: Encoded) -> None:
        if not self._remembered_max:
            return
        self._remembered[key] = encoded
        self._remembered.move_to_end(key)
        while len(self._remembered) > self._remembered_max:
            self._remembered.popitem(last=False)
