"""Bytes that tell rooms apart: both processes compute a room's payload from its number, so none has to be sent to check the other.

Knows neither endpoint nor wire. Any thread.
"""

from __future__ import annotations

import numpy as np

from embedwire.memory.layout import Field, Layout

WORD_BYTES = 8


def layout(token_bytes: int) -> Layout:
    """One field of ``token_bytes`` (a multiple of WORD_BYTES) a token."""
    return Layout("BENCH", (Field("embeddings", "uint8", (token_bytes,)),))


class Payload:
    """A buffer of ``tokens`` times ``token_bytes``, refilled for each room: every word differs from every other room's."""

    def __init__(self, tokens: int, token_bytes: int) -> None:
        self.rows = np.empty((tokens, token_bytes), np.uint8)
        self._words = self.rows.reshape(-1).view(np.uint64)
        self._base = np.arange(len(self._words), dtype=np.uint64)

    def fill(self, room: int) -> np.ndarray:
        """The room's rows, shape (tokens, token_bytes), uint8; valid until the next call."""
        np.add(self._base, np.uint64(room << 32), out=self._words)
        return self.rows

    def equals(self, rows: np.ndarray) -> bool:
        """Whether ``rows`` holds, byte for byte, what was filled in last."""
        return bool(np.array_equal(rows.reshape(-1).view(np.uint64), self._words))
