"""Virtual time of a simulated world. Owns the one clock, the one source of chance and the trace; knows no protocol.

Time does not pass: it jumps to the next event. Equal seeds give equal traces, whatever PYTHONHASHSEED says. One thread.
"""

from __future__ import annotations

import hashlib
import heapq
import random
from collections import deque
from collections.abc import Callable

Call = Callable[[], object]
NEVER = float("inf")


class Timeline:
    """Events in the order of their time and, within one time, of their making."""

    def __init__(self, seed: int) -> None:
        self.now = 0.0
        self.rng = random.Random(seed)
        self.last_lines: deque[str] = deque(maxlen=60)
        self._events: list[tuple[float, int, Call]] = []
        self._count = 0
        self._trace = hashlib.blake2b(digest_size=16)

    def after(self, delay_s: float, call: Call) -> None:
        """``call`` happens ``delay_s`` from now."""
        self._count += 1
        heapq.heappush(self._events, (self.now + max(0.0, delay_s), self._count, call))

    def between(self, bounds_s: tuple[float, float]) -> float:
        """A random number of seconds."""
        return self.rng.uniform(*bounds_s)

    def chance(self, probability: float) -> bool:
        """True with that probability. Certainties draw no number."""
        return probability > 0 and self.rng.random() < probability

    @property
    def next_event(self) -> float:
        """When the next event happens; NEVER when there is none."""
        return self._events[0][0] if self._events else NEVER

    def run_next(self) -> None:
        """Jump to the next event and let it happen."""
        self.now, _, call = heapq.heappop(self._events)
        call()

    def note(self, line: str) -> None:
        """A line of the trace."""
        line = f"{self.now:12.6f} {line}"
        self._trace.update(line.encode() + b"\n")
        self.last_lines.append(line)

    @property
    def trace_hash(self) -> str:
        """Equal for equal runs."""
        return self._trace.hexdigest()


class Process:
    """One life of a server. A frozen one gets nothing done; what reaches it meanwhile happens when it wakes up."""

    def __init__(self, incarnation: int, timeline: Timeline) -> None:
        self.incarnation = incarnation
        self.is_dead = False
        self.is_frozen = False
        self._timeline = timeline
        self._backlog: deque[Call] = deque()

    def run(self, call: Call) -> None:
        """Do it now, or on waking up, or never."""
        if self.is_frozen:
            self._backlog.append(call)
        elif not self.is_dead:
            call()

    def run_after(self, delay_s: float, call: Call) -> None:
        """Do it in ``delay_s``, should the process then still live."""
        self._timeline.after(delay_s, lambda: self.run(call))

    def freeze(self) -> None:
        """As SIGSTOP does."""
        self.is_frozen = not self.is_dead

    def wake(self) -> None:
        """As SIGCONT does: everything that is queued happens at once, in order."""
        self.is_frozen = False
        while self._backlog and not self.is_frozen:
            self.run(self._backlog.popleft())

    def kill(self) -> None:
        """As SIGKILL does."""
        self.is_dead, self.is_frozen = True, False
        self._backlog.clear()
