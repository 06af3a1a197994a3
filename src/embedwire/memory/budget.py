"""A limit in bytes that is never passed. Owns who reserved how much; knows neither what for nor who waits.

Reserving is all or nothing and happens before anything is allocated. Not thread-safe: one thread, or its
owner's lock.
"""

from __future__ import annotations

from collections.abc import Hashable

from embedwire.errors import ConfigurationError, UsageError


class Budget:
    """Reservations in bytes, each under a key. ``used_bytes`` is at most ``limit_bytes`` at any time."""

    def __init__(self, limit_bytes: int) -> None:
        if limit_bytes < 1:
            raise ConfigurationError(f"limit_bytes is {limit_bytes}; it has to be at least 1")
        self.limit_bytes = limit_bytes
        self.used_bytes = 0
        self.peak_bytes = 0
        self._reserved: dict[Hashable, int] = {}

    def can_ever(self, nbytes: int) -> bool:
        """Whether ``nbytes`` fit when nothing else is reserved. What can not is refused at once."""
        return nbytes <= self.limit_bytes

    def try_reserve(self, key: Hashable, nbytes: int) -> bool:
        """Reserve ``nbytes`` (at least 0) under ``key``, or say False and change nothing.

        Raises UsageError for a key that holds a reservation, and for a negative number.
        """
        if nbytes < 0:
            raise UsageError(f"{key!r} can not reserve {nbytes} bytes")
        if key in self._reserved:
            raise UsageError(f"{key!r} has reserved {self._reserved[key]} bytes already")
        if self.used_bytes + nbytes > self.limit_bytes:
            return False
        self._reserved[key] = nbytes
        self.used_bytes += nbytes
        self.peak_bytes = max(self.peak_bytes, self.used_bytes)
        return True

    def release(self, key: Hashable) -> bool:
        """Give a reservation back. False when there is none (any more), which is harmless."""
        if key not in self._reserved:
            return False
        self.used_bytes -= self._reserved.pop(key)
        return True
