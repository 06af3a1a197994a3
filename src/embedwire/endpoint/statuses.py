"""Statuses that a sender delays: over a wire with marks the receiver has most often read the same progress from the wire by then.

Each message takes processor time from the threads that copy. Owns the delayed statuses, one a room. Driver's thread.
"""

from __future__ import annotations

from typing import NamedTuple

from embedwire.protocol.actions import Peer
from embedwire.protocol.messages import RoomKey, Status

HOLD_S = 0.002
"""A status waits for this long, for a newer one or the room's end."""
HOLD_WATCHED_S = 0.02
"""So long where slice follows slice, and the receiver looks for the next."""


class _Held(NamedTuple):
    due: float
    peer: Peer
    status: Status


class HeldStatuses:
    """The newest status of each room that nobody has been told of."""

    def __init__(self) -> None:
        self._held: dict[RoomKey, _Held] = {}

    def hold(self, peer: Peer, status: Status, *, is_watched: bool, now: float) -> None:
        """Keep it instead of the room's last one, and no longer than that was to be kept."""
        due = now + (HOLD_WATCHED_S if is_watched else HOLD_S)
        last = self._held.get(status.key)
        self._held[status.key] = _Held(due if last is None else min(last.due, due), peer, status)

    def drop(self, peer: Peer, key: RoomKey) -> None:
        """The room has ended for this receiver."""
        if key in self._held and self._held[key].peer == peer:
            del self._held[key]

    @property
    def next_due(self) -> float | None:
        """When :meth:`take_due` has something."""
        return min((held.due for held in self._held.values()), default=None)

    def take_due(self, now: float) -> list[tuple[Peer, Status]]:
        """Those that were held long enough, for each receiver that is to hear. Each is taken once."""
        due = [held for held in self._held.values() if held.due <= now]
        for held in due:
            del self._held[held.status.key]
        return [(held.peer, held.status) for held in due]
