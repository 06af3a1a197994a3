"""Which bytes of a region may be written now. Owns the open tickets and the lock under which every byte
lands.

Changed by the endpoint's thread, asked by the receiver's thread of the wire. Whoever writes into the region
holds ``lock`` from the question to the last byte; that is what makes :meth:`Tickets.revoke` final when it
returns.
"""

from __future__ import annotations

import threading
from bisect import bisect_right
from collections.abc import Sequence

from embedwire.errors import UsageError


class Tickets:
    """Open tickets and their spans, kept sorted with neighbours joined."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self._spans: dict[int, tuple[list[int], list[int]]] = {}  # ticket: starts, ends

    def permit(self, ticket: int, spans: Sequence[tuple[int, int]]) -> None:
        """Open ``ticket`` for these (offset, length). UsageError when it is open already."""
        starts: list[int] = []
        ends: list[int] = []
        for offset, length in sorted(spans):
            if ends and offset <= ends[-1]:
                ends[-1] = max(ends[-1], offset + length)
            else:
                starts.append(offset)
                ends.append(offset + length)
        with self.lock:
            if ticket in self._spans:
                raise UsageError(f"ticket {ticket} is open already")
            self._spans[ticket] = (starts, ends)

    def revoke(self, ticket: int) -> None:
        """Close ``ticket``. Waits for the one receive call that may be running, never for a peer."""
        with self.lock:
            self._spans.pop(ticket, None)

    def is_open(self, ticket: int) -> bool:
        return ticket in self._spans

    def covers(self, ticket: int, table: Sequence[tuple[int, int]]) -> bool:
        """Whether all these (offset, length) lie within the spans of the open ``ticket``."""
        starts, ends = self._spans[ticket]
        for offset, length in table:
            at = bisect_right(starts, offset) - 1
            if at < 0 or offset + length > ends[at]:
                return False
        return True
