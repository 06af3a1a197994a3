"""Which rooms may have news in the wire's marks, and for how long to look for it. The driver's thread.

Over a wire with marks a receiver sees what has landed without a message. Looking costs a core, so it looks only where something is
likely to land soon, for a moment, and sleeps between two looks.
"""

from __future__ import annotations

import time

from embedwire.protocol.messages import RoomKey
from embedwire.protocol.receiver import ReceiverTransfer
from embedwire.transports.contract import Inbound

WATCH_S = 0.0025
"""How long to look after a grant or a drain; a status tells of what comes later."""
NAP_S = 20e-6
"""The sleep between two looks. It is a sleep and no spinning: the writer may have been put on the same core."""


class Watch:
    """Rooms that are looked at, each until its time is over."""

    def __init__(self) -> None:
        self._until: dict[RoomKey, tuple[Inbound, float]] = {}

    def __bool__(self) -> bool:
        return bool(self._until)

    def begin(self, key: RoomKey, inbound: Inbound | None) -> None:
        """Something may land soon, over this wire."""
        if inbound is not None and inbound.has_marks:
            self._until[key] = inbound, time.monotonic() + WATCH_S

    def end(self, key: RoomKey) -> None:
        """The room is over, or holds no grant."""
        self._until.pop(key, None)

    def due(self, now: float) -> list[tuple[RoomKey, Inbound]]:
        """Whom to look at, and over which wire. One whose time is over is among them for the last time: the thread may have been away."""
        found = [(key, inbound) for key, (inbound, _) in self._until.items()]
        self._until = {key: (inbound, until) for key, (inbound, until) in self._until.items() if now < until}
        return found

    @staticmethod
    def landed(room: ReceiverTransfer, inbound: Inbound) -> int:
        """The contiguous landed prefix of a room, as the marks under its open grants show it, in tokens."""
        landed = room.landed_tokens
        for granted in room.open_rounds:
            if landed < granted.start_token:
                break
            landed = max(landed, granted.start_token + min(inbound.mark(granted.ticket), granted.tokens))
        return landed

    @staticmethod
    def nap() -> None:
        """Until the next look."""
        time.sleep(NAP_S)
