"""The data plane of a simulated world: writes that take time, land slice by slice, and may be lost or in doubt. Knows no message.

*fenced* (as tcp): the receiver looks at the ticket of each slice when it arrives; once that is revoked nothing lands. *one-sided*
(as shared memory or RDMA): a slice that was begun lands, whatever has happened meanwhile. One thread.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

from embedwire.protocol.actions import Write
from embedwire.protocol.messages import RoomKey
from embedwire.testing.sim_memory import Memory, aux_of, cells
from embedwire.testing.sim_timeline import Process, Timeline
from embedwire.transports.contract import Outcome

FENCED = "fenced"
ONE_SIDED = "one-sided"
POLL_S = 0.5
"""How often a stalled slice is looked at."""


class InvariantBroken(AssertionError):
    """The world has caught the protocol at a fault."""


@dataclass(slots=True, kw_only=True)
class WireFaults:
    """Chances a slice, from 0 to 1, and times in seconds."""

    slice_tokens: int = 512
    slice_s: tuple[float, float] = (0.001, 0.001)
    lost: float = 0.0
    in_doubt: float = 0.0
    write_timeout_s: float = 20.0
    doubt_lands_after_s: tuple[float, float] = (0.01, 1.5)
    says_landed_too_early: bool = False
    """A broken wire: it reports a slice when it is begun."""


class WriteEvents(Protocol):
    """What a wire reports to the sender that writes."""

    def on_landed(self, write: Write, landed_tokens: int) -> None: ...
    def on_outcome(self, write: Write, outcome: Outcome) -> None: ...


@dataclass(slots=True)
class Target:
    """A receiver's registered memory, and the process that it belongs to. ``holds``: whether the blocks of a room's ticket are still kept
    for it; ``is_cut``: whether the way there is, for a wire that needs one."""

    memory: Memory
    process: Process
    wire: str
    holds: Callable[[RoomKey, int], bool]
    is_cut: Callable[[], bool]


class Wire:
    """One sender's session with one receiver's memory; it writes one round after another. ``totals``: the tokens of each room."""

    def __init__(
        self,
        owner: Process,
        target: Target,
        events: WriteEvents,
        *,
        timeline: Timeline,
        faults: WireFaults,
        totals: Mapping[RoomKey, int],
    ) -> None:
        self._owner = owner
        self._target = target
        self._events = events
        self._timeline = timeline
        self._faults = faults
        self._totals = totals
        self._jobs: deque[Write] = deque()
        self._running: Write | None = None
        self._position = 0
        self._cancelled: set[RoomKey] = set()
        self._is_closed = False

    @property
    def running(self) -> RoomKey | None:
        """The room of the write that is under way."""
        return self._running.key if self._running is not None else None

    # ------------------------------------------------------------------ what the sender orders

    def submit(self, write: Write) -> None:
        """Queue a round. Its outcome is reported in any case, as long as the sender lives."""
        self._jobs.append(write)
        if self._running is None:
            self._owner.run_after(0.0, self._start_next)

    def cancel(self, key: RoomKey) -> None:
        """Begin no further slice of this room."""
        self._cancelled.add(key)

    def close(self) -> None:
        """Nothing lands afterwards."""
        self._is_closed = True

    def on_kill(self) -> None:
        """The sender dies: a part of the slice under way may have landed, and nothing lands afterwards."""
        write = self._running
        if (
            write is not None
            and not self._is_closed
            and self._is_let_in(write)
            and self._timeline.chance(0.5)
        ):
            self._put(write, self._position, (self._position + self._slice_end(write)) // 2)
        self.close()

    # ------------------------------------------------------------------ one round

    def _start_next(self) -> None:
        if self._running is None and self._jobs:
            self._running = self._jobs.popleft()
            self._position = self._running.landed_tokens
            self._step()

    def _step(self) -> None:
        """Begin the next slice of the running write, or end it."""
        write, timeline, faults = self._running, self._timeline, self._faults
        assert write is not None
        if self._is_closed or write.key in self._cancelled:
            self._end(Outcome.LOST)
        elif self._position >= write.round.tokens:
            self._end(Outcome.LANDED)
        elif timeline.chance(faults.lost):
            self._owner.run_after(timeline.between(faults.slice_s), lambda: self._end(Outcome.LOST))
        elif timeline.chance(faults.in_doubt):
            self._fall_into_doubt(write)
        else:
            if faults.says_landed_too_early:
                self._report(write, self._slice_end(write))
            timeline.after(timeline.between(faults.slice_s), lambda: self._arrive(write))

    def _fall_into_doubt(self, write: Write) -> None:
        position, end = self._position, self._slice_end(write)
        timeline, faults = self._timeline, self._faults
        if timeline.chance(0.7):
            delay_s = timeline.between(faults.doubt_lands_after_s)
            timeline.after(delay_s, lambda: self._land_late(write, position, end))
        self._owner.run_after(timeline.between(faults.slice_s), lambda: self._end(Outcome.UNKNOWN))

    def _land_late(self, write: Write, position: int, end: int) -> None:
        if not self._is_closed and self._is_let_in(write):
            self._timeline.note(f"late write {write.key} {write.round.number} {position}..{end}")
            self._put(write, position, end)

    def _arrive(self, write: Write) -> None:
        """The slice that was begun is about to land."""
        target = self._target
        if self._owner.is_dead:
            return
        if self._owner.is_frozen:  # the copy goes on after waking up, and asks nobody
            self._owner.run(lambda: self._land(write))
        elif target.wire == FENCED and (target.process.is_frozen or target.is_cut()):
            self._stall(write, waited_s=0.0)
        else:
            self._land(write)

    def _stall(self, write: Write, *, waited_s: float) -> None:
        """The bytes wait at the receiver's door; after a while the sender gives up, and they may yet come in."""
        target = self._target
        if self._owner.is_dead:
            return
        if self._is_closed or target.process.is_dead:
            self._owner.run(lambda: self._end(Outcome.LOST))
        elif not target.process.is_frozen and not target.is_cut():
            self._owner.run(lambda: self._land(write))
        elif waited_s >= self._faults.write_timeout_s:
            position, end = self._position, self._slice_end(write)
            self._timeline.after(self._faults.write_timeout_s, lambda: self._land_late(write, position, end))
            self._owner.run(lambda: self._end(Outcome.UNKNOWN))
        else:
            self._timeline.after(POLL_S, lambda: self._stall(write, waited_s=waited_s + POLL_S))

    def _land(self, write: Write) -> None:
        if self._is_closed or not self._is_let_in(write):
            self._end(Outcome.LOST)
            return
        end = self._slice_end(write)
        self._put(write, self._position, end)
        self._position = end
        if not self._faults.says_landed_too_early:
            self._report(write, end)
        self._step()

    def _is_let_in(self, write: Write) -> bool:
        target = self._target
        if target.wire != FENCED:
            return True
        return not target.process.is_dead and write.round.ticket in target.memory.permits

    def _slice_end(self, write: Write) -> int:
        return min(self._position + self._faults.slice_tokens, write.round.tokens)

    def _put(self, write: Write, start: int, stop: int) -> None:
        granted = write.round
        if not self._target.process.is_dead and not self._target.holds(write.key, granted.ticket):
            raise InvariantBroken(
                f"a write of {write.key} lands in blocks that are no longer kept for it: {granted}"
            )
        if start < stop:
            first = write.first_row + granted.start_token
            self._target.memory.write(granted, start, cells(write.key, first + start, first + stop))
        if granted.number == 0 and start == 0:
            aux = aux_of(write.key, self._totals[write.key.of_room])
            self._target.memory.aux[granted.block_indices[0]] = aux

    def _report(self, write: Write, landed_tokens: int) -> None:
        self._owner.run(lambda: self._events.on_landed(write, landed_tokens))

    def _end(self, outcome: Outcome) -> None:
        write, self._running = self._running, None
        assert write is not None
        self._timeline.note(
            f"write {write.key} {write.round.number} of {self._owner.incarnation}: {outcome.value}"
        )
        self._owner.run(lambda: self._events.on_outcome(write, outcome))
        self._owner.run_after(0.0, self._start_next)
