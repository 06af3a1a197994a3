"""One write through the engine of a session: begins batches, waits for them in order, and counts slices.

It says what the engine said. What that means for the memory, when the engine failed, is for the session's end to find out. Runs on
the thread that called ``write``.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from embedwire.transports.contract import Outcome, Slice
from embedwire.transports.onesided.batches import Batch, Registered, Staging, batches
from embedwire.transports.onesided.engine import EngineError, Flight, State
from embedwire.transports.onesided.session import Session
from embedwire.transports.pieces import check_slice

FLIGHTS_MAX = 4
"""Batches under way at a time."""
SLICES_AHEAD = 8
"""Slices taken and not yet known to have landed, small as they may be."""
_PAUSES_S = (0.0, 0.0, 0.0, 0.0, 0.00005, 0.0001, 0.0002, 0.0005)
"""Between looks at a batch; the last one stays."""


class Broken(Exception):
    """The engine failed, or nothing moved in time, or the session is being closed. What was begun is in doubt."""


@dataclass(slots=True)
class _Begun:
    """A batch under way, or nothing (a slice without bytes), and the slice that is whole with it (0: none)."""

    flight: Flight | None
    part: int | None
    slice_number: int = 0


class Write:
    """State of one write. :meth:`run` is called once."""

    def __init__(
        self,
        session: Session,
        staging: Staging,
        registered: Registered,
        *,
        region_bytes: int,
        on_landed: Callable[[int], None],
        is_closing: threading.Event,
        timeout_s: float,
    ) -> None:
        self._session = session
        self._staging = staging
        self._registered = registered
        self._region_bytes = region_bytes
        self._on_landed = on_landed
        self._is_closing = is_closing
        self._timeout_s = timeout_s
        self._begun: deque[_Begun] = deque()
        self.error: Exception | None = None
        """Raised by the caller's own code."""

    def run(self, slices: Iterable[Slice], *, is_permitted: Callable[[], bool]) -> Outcome:
        """LANDED or LOST, once nothing is under way. Raises Broken otherwise, or what the caller's code raised."""
        outcome = Outcome.LANDED
        try:
            for number, pieces in enumerate(slices, 1):
                check_slice(pieces, self._region_bytes)
                if self.error or not is_permitted():
                    outcome = Outcome.LOST
                    break
                self._begin_slice(number, pieces)
        except Broken:
            raise
        except Exception as error:  # the caller's: raised again when what was begun has ended
            self.error = self.error or error
        while self._begun:
            self._await_oldest()
        if self.error:
            raise self.error
        return outcome

    def _begin_slice(self, number: int, pieces: Slice) -> None:
        if self._is_closing.is_set():  # also where every batch has landed at the first look
            raise Broken("the session is being closed")
        while sum(1 for begun in self._begun if begun.slice_number) >= SLICES_AHEAD:
            self._await_oldest()
        last = None
        for batch in batches(pieces, self._staging, self._registered, take_part=self._take_part):
            last = self._begin(batch)
        if last is None:
            last = _Begun(None, None)
            self._begun.append(last)
        last.slice_number = number
        while self._begun and self._has_landed(self._begun[0]):
            self._retire()

    def _begin(self, batch: Batch) -> _Begun:
        while len(self._begun) >= FLIGHTS_MAX:
            self._await_oldest()
        try:
            begun = _Begun(self._session.engine.begin(batch.runs), batch.part)
        except EngineError as error:
            raise Broken(str(error)) from error
        self._begun.append(begun)
        return begun

    def _take_part(self) -> int:
        while not self._staging.free:
            self._await_oldest()
        return self._staging.free.pop()

    def _has_landed(self, begun: _Begun) -> bool:
        state = begun.flight.poll() if begun.flight else State.LANDED
        if state is State.FAILED:
            raise Broken("a batch has failed")
        return state is State.LANDED

    def _await_oldest(self) -> None:
        deadline_s = time.monotonic() + self._timeout_s
        looks = 0
        while not self._has_landed(self._begun[0]):
            if self._is_closing.is_set() or self._session.presence.has_ended():
                raise Broken("the session has ended")
            if time.monotonic() > deadline_s:
                raise Broken(f"nothing has landed for {self._timeout_s} s")
            time.sleep(_PAUSES_S[min(looks, len(_PAUSES_S) - 1)])
            looks += 1
        self._retire()

    def _retire(self) -> None:
        """The oldest batch has landed."""
        begun = self._begun.popleft()
        if begun.part is not None:
            self._staging.free.append(begun.part)
        if begun.slice_number and not self.error:
            try:
                self._on_landed(begun.slice_number)
            except Exception as error:
                self.error = error
