"""What is remembered of ended rooms, to answer a late message: how each ended, for a bounded number of them."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass

from embedwire.protocol.messages import Cause, RoomKey


@dataclass(slots=True)
class Tombstone:
    """How a room ended. ``is_certain``: no write of it can land any more."""

    cause: Cause
    detail: str
    is_certain: bool


class Tombstones:
    """At most ``limit`` of them; who is not asked for is forgotten first."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._stones: OrderedDict[RoomKey, Tombstone] = OrderedDict()

    def bury(self, key: RoomKey, stone: Tombstone) -> None:
        """Remember how a room ended."""
        self._stones[key] = stone
        while len(self._stones) > self._limit:
            self._stones.popitem(last=False)

    def visit(self, key: RoomKey) -> Tombstone | None:
        """How a room ended, if that is known; whoever is still asked for is remembered longest."""
        if key in self._stones:
            self._stones.move_to_end(key)
        return self._stones.get(key)

    def __contains__(self, key: RoomKey) -> bool:
        return key in self._stones

    def __len__(self) -> int:
        return len(self._stones)

    def __iter__(self) -> Iterator[RoomKey]:
        return iter(self._stones)
