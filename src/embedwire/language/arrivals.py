"""Prompts that have come to a rank other than 0, by their names, until they have been read.

Owns the table; rank 0 decides what is read. Rooms are entered on the receiver's thread, and asked for on the model's.
"""

from __future__ import annotations

import threading
from concurrent.futures import Future
from functools import partial

from embedwire.endpoint import Received, Reception
from embedwire.errors import UsageError
from embedwire.language.assembly import assemble
from embedwire.language.interface import AssembledPrompt

Key = tuple[int, int]
"""Room and attempt."""


class Arrivals:
    """The rooms of one rank. It holds as many as its receiver has open, or has memory for. ``timeout_s`` bounds the wait for one that
    rank 0 has whole."""

    def __init__(self, *, timeout_s: float) -> None:
        self._timeout_s = timeout_s
        self._lock = threading.Lock()
        self._receptions: dict[Key, Reception] = {}

    def __len__(self) -> int:
        return len(self._receptions)

    def enter(self, reception: Reception) -> None:
        """A room that rank 0 has opened. One that fails is forgotten."""
        key = (reception.key.room, reception.key.attempt)
        with self._lock:
            self._receptions[key] = reception
        reception.add_done_callback(partial(self._on_ended, key))

    def _on_ended(self, key: Key, ended: Future[Received]) -> None:
        if ended.exception() is not None:
            with self._lock:
                self._receptions.pop(key, None)

    def prompt_of(self, key: Key) -> AssembledPrompt:
        """Wait until the room is here, too. Raises UsageError for one that is not known, and what its reception raises."""
        with self._lock:
            reception = self._receptions.get(key)
        if reception is None:
            raise UsageError(f"room {key[0]}, attempt {key[1]} is not known here")
        return assemble(reception.result(self._timeout_s))

    def forget(self, key: Key) -> None:
        """It has been read, or nobody will read it. Harmless for one that is not known."""
        with self._lock:
            reception = self._receptions.pop(key, None)
        if reception is not None:
            reception.add_done_callback(_release)


def _release(ended: Future[Received]) -> None:
    if ended.exception() is None:
        ended.result().release()
