"""A simulated sender: what ``endpoint.sender`` does with threads and sockets, done in virtual time. One thread.

A node is an address; it lives one process after another. ``sim_checks`` looks at nodes, ``simulation`` makes them.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

from embedwire.errors import OverloadedError, ProtocolViolation
from embedwire.limits import Limits
from embedwire.memory.budget import Budget
from embedwire.protocol.actions import (
    Attach,
    CancelWrites,
    Detach,
    Peer,
    Release,
    Reply,
    SenderAction,
    Want,
    Write,
)
from embedwire.protocol.messages import Cause, Ended, Message, RoomKey, decode_for_sender
from embedwire.protocol.sender_core import SenderCore
from embedwire.testing.sim_memory import FIELDS, TOKEN_BYTES, aux_of, cells, digests
from embedwire.testing.sim_timeline import Process, Timeline
from embedwire.testing.sim_wire import InvariantBroken, Target, Wire, WireFaults
from embedwire.transports.contract import Outcome


@dataclass(slots=True)
class SenderSetup:
    """What stays the same over a sender's lives."""

    limits: Limits
    source_bytes: int = 2**40
    queue_max: int = 10_000
    attach_s: float = 0.002
    attach_fails: bool = False
    fields: tuple[str, ...] = FIELDS
    faults: WireFaults = field(default_factory=WireFaults)
    items: dict[bytes, int] = field(default_factory=dict)
    """Content hash: tokens of what is kept under it."""
    proof_s: float = 0.5
    """How long after a write in doubt its session is closed, and the doubt with it."""


@dataclass(frozen=True, slots=True)
class Waiting:
    """A room that waits for the encoder's memory."""

    key: RoomKey
    total_tokens: int
    source_s: float


class SenderNode:
    """An encoder: reserves memory for rooms, offers them, and writes them."""

    def __init__(
        self,
        address: str,
        setup: SenderSetup,
        *,
        timeline: Timeline,
        say: Callable[[str, Peer, Message], None],
        reach: Callable[[str, Peer], Target | None],
        rank: int = 0,
        ranks: int = 1,
    ) -> None:
        self.address = address
        self.rank = rank
        self.ranks = ranks
        self._readers: dict[RoomKey, int] = {}
        self.setup = setup
        self.timeline = timeline
        self._say = say
        self._reach = reach

    def start(self, incarnation: int) -> None:
        """Begin a life."""
        self.has_moved = True
        self.process = Process(incarnation, self.timeline)
        self.core = SenderCore(
            incarnation=incarnation,
            fields=self.setup.fields,
            limits=self.setup.limits,
            rank=self.rank,
            ranks=self.ranks,
        )
        self.budget = Budget(self.setup.source_bytes)
        self.waiting: deque[Waiting] = deque()
        self.totals: dict[RoomKey, int] = {}
        self.wires: dict[Peer, Wire] = {}
        self.writes: list[Write] = []
        self.ends: dict[RoomKey, Release] = {}
        self.offered: set[RoomKey] = set()
        self.gone: set[RoomKey] = set()
        self.wanted: set[RoomKey] = set()

    def kill(self) -> None:
        """End a life."""
        for wire in self.wires.values():
            wire.on_kill()
        self.process.kill()

    @property
    def nodes(self) -> list[SenderNode]:
        """Itself: an encoder of one rank."""
        return [self]

    def expect(self, key: RoomKey, *, readers: int) -> None:
        """How many ranks of the language server will read a room."""
        self._readers[key] = readers

    def shares(self, key: RoomKey) -> dict[RoomKey, range]:
        """The lanes of a requested room that begin here, each with its tokens of the room."""
        return self.core.shares(key, self.totals[key], readers=self._readers.get(key, 1))

    def request(self, key: RoomKey, total_tokens: int, *, source_s: float = 0.0) -> None:
        """A request came in. What can never fit, or what the queue has no place for, is refused at once."""
        if key in self.gone:
            return
        self.totals[key] = total_tokens
        need = total_tokens * TOKEN_BYTES
        if not self.budget.can_ever(need):
            self._fail(key, Cause.NEVER_FITS, f"{need} bytes of source")
        elif len(self.waiting) >= self.setup.queue_max:
            self._fail(key, Cause.OVERLOADED, f"{len(self.waiting)} wait for memory")
        else:
            self.waiting.append(Waiting(key, total_tokens, source_s))
            self._offer_waiting()

    def keep(self, item: bytes, total_tokens: int) -> None:
        """Something was made: receivers that subscribe hear of it."""
        self.setup.items[item] = total_tokens
        self.do(self.core.keep(item, tokens=total_tokens))

    def _give(self, key: RoomKey, item: bytes) -> None:
        """A receiver asks for what is kept under a content hash, in a room of its own choice."""
        if key in self.wanted:
            raise InvariantBroken(f"{self.address} is asked for {key} twice")
        self.wanted.add(key)
        if any(waiting.key == key for waiting in self.waiting):
            return  # it was given up on once, and is in line
        if item in self.setup.items:
            self.request(key, self.setup.items[item])
        else:
            self._fail(key, Cause.UNKNOWN_ITEM, "nothing is kept under this hash")

    def abort(self, key: RoomKey) -> None:
        """The client of a room has gone."""
        self.gone.add(key)
        self.waiting = deque(w for w in self.waiting if w.key != key)
        self._fail(key, Cause.ABORTED, "the client has gone")

    def _fail(self, key: RoomKey, cause: Cause, detail: str) -> None:
        readers = self._readers.get(key, 1)
        self.do(self.core.fail(key, cause, detail, readers=readers, now=self.timeline.now))

    def _offer_waiting(self) -> None:
        while self.waiting:
            first = self.waiting[0]
            if not self.budget.try_reserve(first.key, first.total_tokens * TOKEN_BYTES):
                return
            self.waiting.popleft()
            self._offer(first)

    def _offer(self, waiting: Waiting) -> None:
        key, total = waiting.key, waiting.total_tokens
        try:
            actions = self.core.offer(
                key,
                total_tokens=total,
                aux=aux_of(key, total),
                content_hash=str(tuple(key)).encode(),
                readers=self._readers.get(key, 1),
                now=self.timeline.now,
            )
        except OverloadedError as overload:
            self.budget.release(key)
            self._fail(key, Cause.OVERLOADED, str(overload))
            return
        self.offered.add(key)
        self.do(actions)
        self.process.run_after(waiting.source_s, lambda: self._fill(key))

    def _fill(self, key: RoomKey) -> None:
        sums = {
            lane: digests(cells(key, share.start, share.stop)) for lane, share in self.shares(key).items()
        }
        self.do(self.core.ready(key, source_ms=1.0, digests=sums, now=self.timeline.now))

    # ------------------------------------------------------------------ driving

    def on_frame(self, frame: bytes, *, origin: Peer) -> None:
        """A frame came in from a receiver. What is no message costs that receiver its session."""
        now = self.timeline.now
        try:
            message = decode_for_sender(frame)
        except ProtocolViolation as violation:
            self.do(self.core.on_peer_lost(origin, f"it sent no message: {violation}", now=now))
        else:
            self.do(self.core.on_message(message, now=now))

    def tick(self) -> None:
        """Carry out what is due."""
        self.do(self.core.on_tick(self.timeline.now))

    def do(self, actions: list[SenderAction]) -> None:
        """Carry out orders."""
        self.has_moved = True
        for action in actions:
            match action:
                case Reply(peer, message):
                    if isinstance(message, Ended):
                        self.wanted.discard(message.key)
                    self._say(self.address, peer, message)
                case Attach(peer):
                    self.process.run_after(self.setup.attach_s, partial(self._attach, peer))
                case Detach(peer):
                    self._detach(peer)
                case Write(peer):
                    self.writes.append(action)
                    if peer in self.wires:
                        self.wires[peer].submit(action)
                    else:
                        self.process.run_after(0.0, partial(self.on_outcome, action, Outcome.LOST))
                case CancelWrites(key):
                    for wire in self.wires.values():
                        wire.cancel(key)
                case Want(key, item):
                    self._give(key, item)
                case Release():
                    self._release(action)

    def _attach(self, peer: Peer) -> None:
        target = self._reach(self.address, peer)
        if target is None or self.setup.attach_fails:
            self.do(self.core.on_attach_failed(peer, "out of reach", now=self.timeline.now))
        else:
            self._detach(peer)
            self._connect(peer, target)
            self.do(self.core.on_attached(peer, target.wire))

    def _connect(self, peer: Peer, target: Target) -> None:
        self.wires[peer] = Wire(
            self.process,
            target,
            self,
            timeline=self.timeline,
            faults=self.setup.faults,
            totals=self.totals,
        )

    def _detach(self, peer: Peer) -> None:
        wire = self.wires.pop(peer, None)
        if wire is not None:
            wire.close()

    def _release(self, release: Release) -> None:
        """A room has ended."""
        if release.key in self.ends:
            raise InvariantBroken(f"{self.address} released {release.key} twice")
        self.ends[release.key] = release
        self.budget.release(release.key)
        self.process.run_after(0.0, self._offer_waiting)

    # ------------------------------------------------------------------ what the wire reports

    def on_landed(self, write: Write, landed_tokens: int) -> None:
        """A part of a round has landed."""
        number, now = write.round.number, self.timeline.now
        self.do(self.core.on_landed(write.key, number, landed_tokens, now=now))

    def on_outcome(self, write: Write, outcome: Outcome) -> None:
        """A write returned."""
        key, number, now = write.key, write.round.number, self.timeline.now
        if outcome is Outcome.LANDED:
            self.do(self.core.on_written(key, number, now=now))
        elif outcome is Outcome.LOST:
            self.do(self.core.on_write_lost(key, number, "lost", now=now))
        else:
            self.do(self.core.on_write_unknown(key, number, "in doubt", now=now))
            old = self.wires.get(write.peer)
            self.process.run_after(self.setup.proof_s, lambda: self._end_doubt(write.peer, key, old))

    def _end_doubt(self, peer: Peer, key: RoomKey, old: Wire | None) -> None:
        """Close the wire over which the write went, and reach the receiver anew."""
        if old is not None and self.wires.get(peer) is old:
            target = self._reach(self.address, peer)
            self._detach(peer)
            if target is not None:
                self._connect(peer, target)
        self.do(self.core.on_doubt_ended(peer, key))
