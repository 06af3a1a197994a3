"""One thread a receiver: it reaches the receiver's memory, then writes rounds into it, one after another.

So a receiver that is slow or frozen holds up nobody else. It owns the wire's session; what it learns it hands to the endpoint.
"""

from __future__ import annotations

import logging
import math
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from queue import Empty, SimpleQueue

from embedwire.endpoint.watch import WATCH_S
from embedwire.errors import TransportError
from embedwire.limits import SLICE_BYTES, Limits
from embedwire.memory.geometry import PoolGeometry
from embedwire.memory.layout import Layout
from embedwire.memory.source import Source
from embedwire.protocol.actions import Peer, Write
from embedwire.protocol.messages import Hello, RoomKey
from embedwire.transports.contract import Outbound, Outcome, Piece, RemoteRegion, Slice

logger = logging.getLogger(__name__)


REPORTS_A_ROUND = 16
"""Progress within a round is told in at most this many steps: enough for the receiver to drain while the rest is written, and few enough
that telling does not take the processor from those who copy."""
ASLEEP_AFTER_S = WATCH_S / 2
"""Over a wire with marks the receiver sees each slice by itself while it looks. It is told of one that comes so long after the room's last,
since it may have gone to sleep meanwhile."""


@dataclass(frozen=True, slots=True)
class WriterReports:
    """Called by a writer on its own thread."""

    attached: Callable[[SessionWriter, str], None]
    attach_failed: Callable[[SessionWriter, str], None]
    landed: Callable[[Write, int], None]
    written: Callable[[Write, Outcome], None]
    doubt_ended: Callable[[Write], None]


@dataclass(slots=True)
class WriteJob:
    """One round to write. ``is_permitted`` turns False when the room has ended meanwhile."""

    write: Write
    source: Source
    aux: bytes
    is_permitted: Callable[[], bool]
    geometry: PoolGeometry
    slice_ends: list[int] = field(default_factory=list)

    def slices(self) -> Iterator[Slice]:
        """What has not landed yet, in pieces of about SLICE_BYTES, with aux in front of the lane."""
        granted, first_row = self.write.round, self.write.first_row
        step = max(1, SLICE_BYTES // self.geometry.layout.token_bytes)
        for position in range(self.write.landed_tokens, granted.tokens, step):
            end = min(position + step, granted.tokens)
            pieces = self.source.pieces(
                self.geometry,
                granted.block_indices,
                start_token=first_row + granted.start_token,
                token=first_row + granted.start_token + position,
                tokens=end - position,
                aux=self.aux if granted.start_token + position == 0 else None,
            )
            self.slice_ends.append(end)
            yield [Piece(memory, offset) for memory, offset in pieces]


class SessionWriter:
    """The thread. ``submit``, ``close`` and ``abandon`` are for other threads; ``close`` ends a running write too. From then on the thread
    lives until the wire has said that each session of it has ended, or until it is abandoned."""

    def __init__(
        self,
        peer: Peer,
        hello: Hello,
        outbounds: Mapping[str, Outbound],
        *,
        layout: Layout,
        incarnation: int,
        reports: WriterReports,
        limits: Limits,
    ) -> None:
        self.peer = peer
        self.geometry = PoolGeometry(layout, hello.block_size, hello.num_blocks)
        self._outbounds = outbounds
        self._incarnation = incarnation
        self._reports = reports
        self._limits = limits
        self._jobs: SimpleQueue[WriteJob | None] = SimpleQueue()
        self._lock = threading.Lock()
        self._region: RemoteRegion | None = None
        self._wires = hello.wires
        self._doubts: list[
            tuple[RemoteRegion, Write]
        ] = []  # writes that may still land; the writer's thread alone
        self._marked: tuple[RoomKey | None, float] = (None, -math.inf)  # the last one, and when
        self._watched: RoomKey | None = None
        self._ending: list[RemoteRegion] = []  # sessions whose end was asked for; the writer's thread alone
        self._closer: threading.Thread | None = None
        self._is_closed = False
        self._is_abandoned = threading.Event()
        self._thread = threading.Thread(target=self._run, name=f"embedwire-writer-{peer:x}", daemon=True)
        self._thread.start()

    @property
    def has_marks(self) -> bool:
        """Whether the receiver sees what has landed before it is told."""
        region = self._region
        return region is not None and region.has_marks

    def is_watched(self, key: RoomKey) -> bool:
        """Whether the receiver has seen the last slice of a room come soon after the one before it, and so looks for the next."""
        return self._watched == key

    def _remember_mark(self, key: RoomKey) -> None:
        last_key, last_at = self._marked
        self._marked = (key, time.monotonic())
        is_soon = last_key == key and self._marked[1] - last_at <= ASLEEP_AFTER_S
        self._watched = key if is_soon else None

    def submit(self, job: WriteJob) -> None:
        """Queue a round. ``written`` is reported for it in any case."""
        self._jobs.put(job)

    def close(self) -> None:
        """End the session: a running write returns, queued ones are reported as lost. Returns at once; a wire may take a moment
        to end its write, so that is done on a thread of its own."""
        with self._lock:
            self._is_closed = True
            region = self._region
        self._jobs.put(None)
        if region is not None:
            name = f"{self._thread.name}-close"
            self._closer = threading.Thread(target=region.close, name=name, daemon=True)
            self._closer.start()

    def abandon(self) -> None:
        """After ``close``: nobody is left to tell what becomes of its sessions."""
        self._is_abandoned.set()

    def is_alive(self) -> bool:
        """Whether a thread of it still runs."""
        return self._thread.is_alive() or (self._closer is not None and self._closer.is_alive())

    def join(self, timeout_s: float) -> None:
        """Wait until its threads have ended."""
        self._thread.join(timeout_s)
        if self._closer is not None:
            self._closer.join(timeout_s)

    def _run(self) -> None:
        is_usable = self._attach()
        if is_usable:
            self._reports.attached(self, self._wires[0][0])
        while (job := self._next_job()) is not None:
            if is_usable:
                is_usable = self._carry_out(job)
            else:
                self._reports.written(job.write, Outcome.LOST)
        self._part()

    def _part(self) -> None:
        """What may still land is the receiver's loss until it hears that it can not; and what a wire keeps for a session, ours."""
        with self._lock:
            region, self._region = self._region, None
        self._ending += [] if region is None else [region]
        while True:
            self._ending = [region for region in self._ending if not region.close()]
            self._settle_doubts()
            if not (self._ending or self._doubts) or self._is_abandoned.wait(self._limits.retry_s):
                return

    def _next_job(self) -> WriteJob | None:
        """None comes last, from ``close``, and it comes in any case. While the queue is empty, doubts that have ended are reported."""
        while True:
            try:
                return self._jobs.get(timeout=self._limits.retry_s if self._doubts else None)
            except Empty:
                self._settle_doubts()

    def _settle_doubts(self) -> None:
        """Report the writes of which it is known by now that nothing can land."""
        doubts, self._doubts = self._doubts, []
        for region, write in doubts:
            if region.close():
                self._reports.doubt_ended(write)
            else:
                self._doubts.append((region, write))

    def _attach(self) -> bool:
        """Reach the receiver over the first of ``_wires`` that works, and keep to that one from then on."""
        failures = []
        for wire, descriptor in self._wires:
            outbound = self._outbounds.get(wire)
            if outbound is None:
                failures.append(f"{wire}: not offered by the sender")
                continue
            try:
                region = outbound.connect(
                    descriptor, sender_token=self._incarnation, timeout_s=self._limits.peer_silence_s / 2
                )
            except TransportError as error:
                failures.append(f"{wire}: {error}")
                continue
            except Exception as error:
                logger.exception("wire %s failed to connect", wire)
                failures.append(f"{wire}: {type(error).__name__}: {error}")
                continue
            self._wires = ((wire, descriptor),)
            return self._keep(region)
        if not self._is_closed:
            self._reports.attach_failed(self, "; ".join(failures))
        return False

    def _keep(self, region: RemoteRegion) -> bool:
        with self._lock:
            if not self._is_closed:
                self._region = region
                return True
        self._ending.append(region)
        return False

    def _renew(self, write: Write) -> bool:
        """After a write of unknown outcome: its session is closed, and another one begun. The doubt lasts until that is known to have
        been the end of it."""
        with self._lock:
            region, self._region = self._region, None
        if region is None or region.close():
            self._reports.doubt_ended(write)
        else:
            self._doubts.append((region, write))
        return not self._is_closed and self._attach()

    def _carry_out(self, job: WriteJob) -> bool:
        """Write a round and report it. False: the receiver is out of reach."""
        assert self._region is not None
        region, ticket = self._region, job.write.round.ticket
        total, told = job.write.round.tokens, job.write.landed_tokens

        def on_landed(slices: int) -> None:
            nonlocal told
            landed = job.slice_ends[slices - 1]
            if landed == total:  # of the last one, `written` tells
                return
            if region.has_marks:
                region.set_mark(ticket, landed)
                self._remember_mark(job.write.key)
                is_due = not self.is_watched(job.write.key)
                os.sched_yield()  # to threads of messages that were put on this core, however idle the others are
            else:
                is_due = (landed - told) * REPORTS_A_ROUND >= total
            if is_due:
                told = landed
                self._reports.landed(job.write, landed)

        try:
            outcome = region.write(
                ticket,
                job.slices(),
                is_permitted=job.is_permitted,
                on_landed=on_landed,
                timeout_s=self._limits.write_timeout_s,
            )
        except Exception:
            logger.exception("a write failed in a way that is our own fault")
            outcome = Outcome.UNKNOWN
        has_mark = outcome is Outcome.LANDED and region.has_marks
        if has_mark:
            self._remember_mark(job.write.key)
        self._reports.written(job.write, outcome)
        if has_mark:
            # not sooner: what the receiver answers to it must find that our own core knows
            region.set_mark(ticket, total)
        return outcome is not Outcome.UNKNOWN or self._renew(job.write)
