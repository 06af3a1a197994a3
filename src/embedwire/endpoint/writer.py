"""One thread a receiver: it reaches the receiver's memory, then writes rounds into it, one after another.

So a receiver that is slow or frozen holds up nobody else. It owns the wire's session; what it learns it posts to the driver.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from queue import SimpleQueue
from typing import Protocol

import numpy as np

from embedwire.errors import TransportError
from embedwire.limits import SLICE_BYTES, Limits
from embedwire.memory.checksum import FieldDigests
from embedwire.memory.geometry import PoolGeometry
from embedwire.memory.source import Source
from embedwire.protocol.actions import Peer, Write
from embedwire.protocol.messages import Hello
from embedwire.transports.contract import Outbound, Outcome, Piece, RemoteRegion, Slice

logger = logging.getLogger(__name__)


class WriterEvents(Protocol):
    """What a writer reports, on its own thread."""

    def attached(self, peer: Peer, wire: str) -> None: ...
    def attach_failed(self, peer: Peer, detail: str) -> None: ...
    def landed(self, write: Write, landed_tokens: int) -> None: ...
    def written(self, write: Write, outcome: Outcome, digests: tuple[int, ...]) -> None: ...
    def doubt_ended(self, write: Write) -> None: ...


@dataclass(slots=True)
class WriteJob:
    """One round to write. ``is_permitted`` turns False when the room has ended meanwhile."""

    write: Write
    source: Source
    arrays: Mapping[str, np.ndarray]
    aux: bytes
    is_permitted: Callable[[], bool]
    geometry: PoolGeometry
    digests: FieldDigests = field(init=False)
    slice_ends: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.digests = FieldDigests(self.geometry.layout)

    def slices(self) -> Iterator[Slice]:
        """Pieces of about SLICE_BYTES, summed up as they are handed out; what has landed before is only summed up."""
        granted = self.write.round
        step = max(1, SLICE_BYTES // self.geometry.layout.token_bytes)
        position = 0
        while position < granted.tokens:
            landed = self.write.landed_tokens
            end = min(position + step, granted.tokens if position >= landed else landed)
            token = granted.start_token + position
            rows = slice(token, token + end - position)
            self.digests.update({name: array[rows] for name, array in self.arrays.items()})
            if position >= landed:
                is_first = granted.number == 0 and position == 0
                pieces = self.source.pieces(
                    self.geometry,
                    granted.block_indices,
                    start_token=granted.start_token,
                    token=token,
                    tokens=end - position,
                    aux=self.aux if is_first else None,
                )
                self.slice_ends.append(end)
                yield [Piece(memory, offset) for memory, offset in pieces]
            position = end


class SessionWriter:
    """The thread. ``close`` ends a running write too, and is the only call from another thread besides ``submit``."""

    def __init__(
        self,
        peer: Peer,
        hello: Hello,
        outbounds: Mapping[str, Outbound],
        *,
        incarnation: int,
        events: WriterEvents,
        limits: Limits,
    ) -> None:
        self._peer = peer
        self._outbounds = outbounds
        self._incarnation = incarnation
        self._events = events
        self._limits = limits
        self._jobs: SimpleQueue[WriteJob | None] = SimpleQueue()
        self._lock = threading.Lock()
        self._region: RemoteRegion | None = None
        self._wires = hello.wires
        self._closer: threading.Thread | None = None
        self._is_closed = False
        self._thread = threading.Thread(target=self._run, name=f"embedwire-writer-{peer:x}", daemon=True)
        self._thread.start()

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
            self._events.attached(self._peer, self._wires[0][0])
        while (
            job := self._jobs.get()
        ) is not None:  # which `close` puts behind the last job, and it comes in any case
            if is_usable:
                is_usable = self._carry_out(job)
            else:
                self._events.written(job.write, Outcome.LOST, ())

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
            self._events.attach_failed(self._peer, "; ".join(failures))
        return False

    def _keep(self, region: RemoteRegion) -> bool:
        with self._lock:
            if not self._is_closed:
                self._region = region
                return True
        region.close()
        return False

    def _renew(self, write: Write) -> bool:
        """After a write of unknown outcome: its session is closed, so that nothing of it can land any more, and another one begun."""
        with self._lock:
            region, self._region = self._region, None
        if region is not None:
            region.close()
        self._events.doubt_ended(write)
        return self._attach()

    def _carry_out(self, job: WriteJob) -> bool:
        """Write a round and report it. False: the receiver is out of reach."""
        assert self._region is not None

        def on_landed(slices: int) -> None:
            landed = job.slice_ends[slices - 1]
            if landed < job.write.round.tokens:  # of the last one, `written` tells
                self._events.landed(job.write, landed)

        try:
            outcome = self._region.write(
                job.write.round.ticket,
                job.slices(),
                is_permitted=job.is_permitted,
                on_landed=on_landed,
                timeout_s=self._limits.write_timeout_s,
            )
        except Exception:
            logger.exception("a write failed in a way that is our own fault")
            outcome = Outcome.UNKNOWN
        self._events.written(job.write, outcome, job.digests.digest())
        return outcome is not Outcome.UNKNOWN or self._renew(job.write)
