"""Which key is due next. A heap with one live entry a key; owns no clock."""

from __future__ import annotations

import heapq
from typing import Generic, TypeVar

Key = TypeVar("Key")

STALE_MIN = 64
"""Entries that were replaced and may lie in the heap before it is swept."""


class Timers(Generic[Key]):
    """At most one due time a key; ``set`` replaces it. All times are what the caller's clock says, in seconds."""

    def __init__(self) -> None:
        self._due: dict[Key, tuple[float, int]] = {}
        self._heap: list[tuple[float, int, Key]] = []
        self._count = 0

    def set(self, key: Key, when: float) -> None:
        """``key`` is due at ``when``, and no longer at another time."""
        current = self._due.get(key)
        if current is not None and current[0] == when:
            return
        self._count += 1
        self._due[key] = (when, self._count)
        heapq.heappush(self._heap, (when, self._count, key))
        if len(self._heap) > STALE_MIN + 2 * len(self._due):
            self._sweep()

    def _sweep(self) -> None:
        """Drop what was replaced: a deadline that moves with every slice would otherwise fill the heap until it is reached."""
        self._heap = [entry for entry in self._heap if self._due.get(entry[2]) == entry[:2]]
        heapq.heapify(self._heap)

    def clear(self, key: Key) -> None:
        """``key`` is due no more."""
        self._due.pop(key, None)

    def next_due(self) -> float | None:
        """The earliest due time, or None."""
        while self._heap:
            when, count, key = self._heap[0]
            if self._due.get(key) == (when, count):
                return when
            heapq.heappop(self._heap)
        return None

    def pop_due(self, now: float) -> list[Key]:
        """The keys that are due, earliest first; each is cleared."""
        keys: list[Key] = []
        while (when := self.next_due()) is not None and when <= now:
            key = heapq.heappop(self._heap)[2]
            del self._due[key]
            keys.append(key)
        return keys
