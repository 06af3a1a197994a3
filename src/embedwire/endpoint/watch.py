"""Which grants may have news in the wire's marks, and for how long to look for it. The driver's thread.

Over a wire with marks a receiver sees what has landed without a message. Looking costs a core, so it looks only where something is
likely to land soon, for a moment, and sleeps between two looks.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field

from embedwire.protocol.actions import Round
from embedwire.protocol.messages import RoomKey
from embedwire.transports.contract import Inbound

WATCH_S = 0.0025
"""How long to look after a grant or a drain; a status reports what comes later."""
NAP_S = 20e-6
"""The sleep between two looks. It is a sleep and no spinning: the writer may run on the same core."""


@dataclass(slots=True)
class _Watched:
    """A lane with permitted rounds, oldest first. What lies before the first of them is drained."""

    inbound: Inbound
    rounds: list[Round] = field(default_factory=list)

    def landed(self) -> int:
        """The contiguous landed prefix of the lane, as the marks show it, in tokens."""
        landed = self.rounds[0].start_token
        for granted in self.rounds:
            if landed < granted.start_token:
                break
            landed = granted.start_token + min(self.inbound.mark(granted.ticket), granted.tokens)
        return landed


class Watch:
    """Lanes with permitted rounds, and those among them that are looked at, each until its time is over."""

    def __init__(self) -> None:
        self._lanes: dict[RoomKey, _Watched] = {}
        self._until: dict[RoomKey, float] = {}

    def __bool__(self) -> bool:
        return bool(self._until)

    def add(self, key: RoomKey, granted: Round, inbound: Inbound | None) -> None:
        """A round of a lane is permitted, over this wire."""
        if inbound is not None and inbound.has_marks:
            self._lanes.setdefault(key, _Watched(inbound)).rounds.append(granted)

    def remove(self, key: RoomKey, ticket: int) -> None:
        """The permission of a round has ended."""
        lane = self._lanes.get(key)
        if lane is not None:
            lane.rounds = [granted for granted in lane.rounds if granted.ticket != ticket]
            if not lane.rounds:
                del self._lanes[key]
                self._until.pop(key, None)

    def begin(self, key: RoomKey) -> None:
        """Something may land soon, if a round of the lane is permitted."""
        if key in self._lanes:
            self._until[key] = time.monotonic() + WATCH_S

    def look(self, now: float) -> list[tuple[RoomKey, int]]:
        """The landed prefix of each lane that is looked at. One whose time is over is among them for the last time: the thread may have
        been away."""
        found = [(key, self._lanes[key].landed()) for key in self._until]
        self._until = {key: until for key, until in self._until.items() if now < until}
        return found

    @staticmethod
    def nap() -> None:
        """Until the next look."""
        time.sleep(NAP_S)
