"""Grants that no message tells of: the receiver leaves them in the wire, under the ticket of the room's grant before, and the sender looks.

Between two rounds of a room that both sides are busy with, a message costs four wake-ups, and those who are woken take the processor from
those who copy. Owns what is said after all: a grant whose round has not begun soon. So nothing depends on a note being found.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable
from typing import NamedTuple

from embedwire.endpoint.watch import WATCH_S
from embedwire.protocol.actions import Address
from embedwire.protocol.messages import Grant, RoomKey, encode
from embedwire.transports.contract import Inbound, RemoteRegion

AWAIT_S = 2 * WATCH_S
"""How long a sender looks for a room's next grant after it has written the last one."""
FRESH_S = 0.002
"""A note is left for a room of which the receiver has seen tokens land within this time: the sender has just written it, and looks."""
HOLD_S = 0.002
"""So long does a grant wait for its round to begin before it is said."""


class _Left(NamedTuple):
    due: float
    address: Address
    grant: Grant


class Notes:
    """The receiver's half. The driver's thread."""

    def __init__(self) -> None:
        self._seen: tuple[RoomKey | None, float] = (None, -math.inf)
        self._left: deque[_Left] = deque()

    def saw(self, key: RoomKey, now: float) -> None:
        """The receiver has seen tokens of a room land."""
        self._seen = key, now

    def leave(
        self, grant: Grant, address: Address, inbound: Inbound | None, *, after: int, now: float
    ) -> bool:
        """Leave a grant under the ticket ``after``. False: it has to be said, since nobody may be looking, or this wire has no notes."""
        key, seen_at = self._seen
        is_fresh = key == grant.key and now - seen_at <= FRESH_S
        if not is_fresh or inbound is None or not inbound.set_note(after, encode(grant)):
            return False
        self._left.append(_Left(now + HOLD_S, address, grant))
        return True

    @property
    def next_due(self) -> float | None:
        """When :meth:`take_due` has something."""
        return self._left[0].due if self._left else None

    def take_due(self, now: float) -> list[tuple[Address, Grant]]:
        """Grants that were left long enough ago. Each is taken once."""
        is_due = self._left and self._left[0].due <= now
        return self._take(lambda left: left.due <= now) if is_due else []

    def take(self, key: RoomKey) -> list[tuple[Address, Grant]]:
        """Those of one room, whenever they were left."""
        return self._take(lambda left: left.grant.key == key)

    def _take(self, is_meant: Callable[[_Left], bool]) -> list[tuple[Address, Grant]]:
        taken = [(left.address, left.grant) for left in self._left if is_meant(left)]
        self._left = deque(left for left in self._left if not is_meant(left))
        return taken


class Awaited:
    """The sender's half: the room of a session that has to go on, by the ticket of its newest grant. The writer's thread."""

    def __init__(self) -> None:
        self._ticket: int | None = None
        self._until = -math.inf

    def __bool__(self) -> bool:
        return self._ticket is not None

    def begin(self, ticket: int) -> None:
        """The grant that follows may come soon."""
        self._ticket, self._until = ticket, time.monotonic() + AWAIT_S

    def find(self, region: RemoteRegion | None) -> bytes:
        """The note, if it has come: then, and when it does not come in time, nothing is awaited any longer."""
        note = b"" if region is None or self._ticket is None else region.note(self._ticket)
        if note or time.monotonic() > self._until:
            self._ticket = None
        return note
