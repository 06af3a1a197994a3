"""The control plane of a simulated world: what becomes of a message on its way. Knows no room.

Every message is encoded, and decoded again by whom it reaches. One thread.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from embedwire.protocol.messages import Message, RoomMessage, encode
from embedwire.testing.sim_timeline import NEVER, Timeline


@dataclass(slots=True, kw_only=True)
class Weather:
    """Chances from 0 to 1, and times in seconds. Different delays are what puts messages out of order."""

    loss: float = 0.0
    doubling: float = 0.0
    lateness: float = 0.0
    delay_s: tuple[float, float] = (0.001, 0.001)
    late_s: tuple[float, float] = (20.0, 400.0)


@dataclass(frozen=True, slots=True)
class Envelope:
    """One message that was sent."""

    sent_at: float
    origin: str
    destination: str
    message: Message

    def __str__(self) -> str:
        line = f"{self.origin} > {self.destination} {type(self.message).__name__}"
        return f"{line} {self.message.key}" if isinstance(self.message, RoomMessage) else line


Rule: TypeAlias = Callable[[Envelope], Sequence[float] | None]
"""Delays in seconds after which a message arrives, once each; none: it is lost. None: as the weather has it."""


def lose(kind: type[Message], *, times: int = 1) -> Rule:
    """A rule: the first ``times`` messages of this kind are lost."""
    left = [times]

    def rule(envelope: Envelope) -> Sequence[float] | None:
        if not isinstance(envelope.message, kind) or not left[0]:
            return None
        left[0] -= 1
        return ()

    return rule


def delay(kind: type[Message], *delays_s: float) -> Rule:
    """A rule: every message of this kind arrives after each of these delays."""
    return lambda envelope: delays_s if isinstance(envelope.message, kind) else None


class Link:
    """Everybody's way to everybody."""

    def __init__(self, timeline: Timeline, weather: Weather) -> None:
        self.weather = weather
        self.rules: list[Rule] = []
        self.sent: list[Envelope] = []
        self._timeline = timeline
        self._cut_until: dict[tuple[str, str], float] = {}

    def send(
        self, origin: str, destination: str, message: Message, *, deliver: Callable[[bytes], object]
    ) -> None:
        """Send a message; ``deliver`` is called with its bytes as often as it arrives."""
        envelope = Envelope(self._timeline.now, origin, destination, message)
        self.sent.append(envelope)
        frame = encode(message)
        delays = next((d for rule in self.rules if (d := rule(envelope)) is not None), None)
        if delays is None:
            delays = self._by_weather(origin, destination)
        self._timeline.note(f"{envelope} {len(frame)} {[round(d, 6) for d in delays]}")
        for delay_s in delays:
            self._timeline.after(delay_s, lambda: deliver(frame))

    def _by_weather(self, origin: str, destination: str) -> list[float]:
        weather, timeline = self.weather, self._timeline
        if timeline.now < self.cut_until(origin, destination) or timeline.chance(weather.loss):
            return []
        copies = 2 if timeline.chance(weather.doubling) else 1
        return [
            timeline.between(weather.late_s if timeline.chance(weather.lateness) else weather.delay_s)
            for _ in range(copies)
        ]

    def cut(self, one: str, other: str, *, for_s: float = NEVER) -> None:
        """Nothing passes between the two for a while."""
        self._cut_until[min(one, other), max(one, other)] = self._timeline.now + for_s

    def cut_until(self, one: str, other: str) -> float:
        """When the cut between the two ends; in the past when there is none."""
        return self._cut_until.get((min(one, other), max(one, other)), -NEVER)

    def heal(self) -> None:
        """Fine weather, no cuts, no rules."""
        self.weather = Weather()
        self.rules.clear()
        self._cut_until.clear()

    def count(self) -> Counter[str]:
        """How many messages of each kind were sent."""
        return Counter(type(envelope.message).__name__ for envelope in self.sent)
