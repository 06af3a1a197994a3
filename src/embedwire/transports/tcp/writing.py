"""One write over the streams of a session: hands out slices, counts answers, and says what is known at the
end.

It knows neither how streams are made nor when a session is closed for good. Runs on the thread that called
``write``.
"""

from __future__ import annotations

import select
import time
from collections.abc import Callable, Iterable, Sequence

from embedwire.errors import ProtocolViolation
from embedwire.transports.contract import Outcome, Slice
from embedwire.transports.pieces import check_slice
from embedwire.transports.tcp import frames
from embedwire.transports.tcp.stream import Stream

CLOSE_WAIT_S = 0.5
"""How long an ending session waits for the receiver to have read what was under way."""


class Write:
    """State of one write. :meth:`run` is called once."""

    def __init__(
        self,
        streams: Sequence[Stream],
        slices: Iterable[Slice],
        *,
        ticket: int,
        region_bytes: int,
        is_permitted: Callable[[], bool],
        on_landed: Callable[[int], None],
        wake_fd: int,
    ) -> None:
        self._streams = streams
        self._slices = iter(slices)
        self._ticket = ticket
        self._region_bytes = region_bytes
        self._is_permitted = is_permitted
        self._on_landed = on_landed
        self._wake_fd = wake_fd  # becomes readable when the session is being closed
        self._is_closing = False
        self._begins_no_more = False
        self._is_exhausted = False
        self._error: Exception | None = None  # out of the caller's own code
        self._begun = self._frames = self._landed = 0
        self._landed_early: set[int] = set()

    def run(self, timeout_s: float) -> Outcome:
        """Write, until all is known or nothing has moved for ``timeout_s``."""
        try:
            outcome = self._drive(timeout_s)
        except (OSError, ProtocolViolation):
            outcome = Outcome.UNKNOWN
        if self._error:
            raise self._error
        return outcome

    def _drive(self, timeout_s: float) -> Outcome:
        deadline_s = time.monotonic() + timeout_s
        while True:
            if self._begin_slices():
                deadline_s = time.monotonic() + timeout_s
            if all(stream.is_settled for stream in self._streams):
                is_whole = self._is_exhausted and self._landed == self._begun
                return Outcome.LANDED if is_whole else Outcome.LOST
            ready = self._wait(deadline_s - time.monotonic())
            if not ready:
                return Outcome.UNKNOWN
            if self._wake_fd in ready:
                deadline_s = min(deadline_s, time.monotonic() + CLOSE_WAIT_S)
                self._finish()
            elif self._move(ready) and not self._is_closing:
                deadline_s = time.monotonic() + timeout_s

    def _begin_slices(self) -> bool:
        """Hand slices to streams that have room. True: the caller was asked for one, which may have taken a
        while."""
        has_asked = False
        while not self._begins_no_more:
            stream = min((s for s in self._streams if s.can_begin), key=lambda s: s.awaited, default=None)
            if stream is None:
                break
            has_asked = True
            pieces = self._next_slice()
            if pieces is None:
                break
            batches = list(frames.split(pieces))
            self._begun += 1
            stream.begin(self._ticket, self._frames, batches=batches, slice_number=self._begun)
            self._frames += len(batches)
            stream.send()
        return has_asked

    def _next_slice(self) -> Slice | None:
        try:
            pieces = next(self._slices, None)
            if pieces is not None:
                check_slice(pieces, self._region_bytes)
                if self._is_permitted():
                    return pieces
            self._is_exhausted = pieces is None
        except Exception as error:  # the caller's: raised again when what was begun has ended
            self._error = error
        self._begins_no_more = True
        return None

    def _wait(self, timeout_s: float) -> set[int]:
        """Descriptors that are ready, empty after ``timeout_s``."""
        poll = select.poll()
        if not self._is_closing:
            poll.register(self._wake_fd, select.POLLIN)
        for stream in self._streams:
            if not stream.is_settled:
                poll.register(stream.sock, select.POLLIN | (select.POLLOUT if stream.wants_to_send else 0))
        return {fd for fd, _ in poll.poll(max(0.0, timeout_s * 1000))}

    def _move(self, ready: set[int]) -> bool:
        """Send and receive on the streams whose descriptors are ready. True: something moved."""
        moved = False
        for stream in self._streams:
            if stream.sock.fileno() not in ready:
                continue
            for slice_number, has_landed in stream.receive():
                moved = True
                self._on_answer(slice_number, has_landed=has_landed)
            if stream.has_ended:
                moved = self._begins_no_more = True
            else:
                moved |= stream.send()
        self._report()
        return moved

    def _on_answer(self, slice_number: int, *, has_landed: bool) -> None:
        if not has_landed:
            self._begins_no_more = True
        elif slice_number:
            self._landed_early.add(slice_number)

    def _report(self) -> None:
        before = self._landed
        while self._landed + 1 in self._landed_early:
            self._landed += 1
            self._landed_early.remove(self._landed)
        if self._landed > before and not self._error:
            try:
                self._on_landed(self._landed)
            except Exception as error:
                self._error = error
                self._begins_no_more = True

    def _finish(self) -> None:
        self._is_closing = self._begins_no_more = True
        for stream in self._streams:
            stream.finish()
