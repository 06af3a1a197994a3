"""The drivers of a simulated world: what ``endpoint`` does with threads and sockets, done in virtual time. One thread.

A node is an address; it lives one process after another. ``sim_checks`` looks at nodes, ``simulation`` makes them.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import numpy as np

from embedwire.errors import OverloadedError, ProtocolViolation
from embedwire.limits import Limits
from embedwire.memory.allocator import BlockAllocator
from embedwire.memory.budget import Budget
from embedwire.protocol.actions import (
    Assemble,
    Attach,
    CancelWrites,
    Detach,
    Drain,
    Failed,
    Finished,
    Hangup,
    Peer,
    Permit,
    ReceiverAction,
    Release,
    Reply,
    Revoke,
    Send,
    SenderAction,
    Write,
)
from embedwire.protocol.handshake import Offered
from embedwire.protocol.messages import Cause, Grant, Message, RoomKey, decode_for_receiver, decode_for_sender
from embedwire.protocol.receiver_core import ReceiverCore
from embedwire.protocol.sender_core import SenderCore
from embedwire.testing.sim_memory import FIELDS, TOKEN_BYTES, Cells, Memory, aux_of, cells, digests, room_of
from embedwire.testing.sim_timeline import Process, Timeline
from embedwire.testing.sim_wire import FENCED, InvariantBroken, Target, Wire, WireFaults
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
    ) -> None:
        self.address = address
        self.setup = setup
        self.timeline = timeline
        self._say = say
        self._reach = reach

    def start(self, incarnation: int) -> None:
        """Begin a life."""
        self.process = Process(incarnation, self.timeline)
        self.core = SenderCore(incarnation=incarnation, fields=self.setup.fields, limits=self.setup.limits)
        self.budget = Budget(self.setup.source_bytes)
        self.waiting: deque[Waiting] = deque()
        self.total_tokens: dict[RoomKey, int] = {}
        self.wires: dict[Peer, Wire] = {}
        self.writes: list[Write] = []
        self.ends: dict[RoomKey, Release] = {}
        self.offered: set[RoomKey] = set()
        self.gone: set[RoomKey] = set()

    def kill(self) -> None:
        """End a life."""
        for wire in self.wires.values():
            wire.on_kill()
        self.process.kill()

    def request(self, key: RoomKey, total_tokens: int, *, source_s: float = 0.0) -> None:
        """A request came in. What can never fit, or what the queue has no place for, is refused at once."""
        if key in self.gone:
            return
        self.total_tokens[key] = total_tokens
        need = total_tokens * TOKEN_BYTES
        if not self.budget.can_ever(need):
            self._refuse(key, Cause.NEVER_FITS, f"{need} bytes of source")
        elif len(self.waiting) >= self.setup.queue_max:
            self._refuse(key, Cause.OVERLOADED, f"{len(self.waiting)} wait for memory")
        else:
            self.waiting.append(Waiting(key, total_tokens, source_s))
            self._offer_waiting()

    def abort(self, key: RoomKey) -> None:
        """The client of a room has gone."""
        self.gone.add(key)
        self.waiting = deque(w for w in self.waiting if w.key != key)
        self.do(self.core.fail(key, Cause.ABORTED, "the client has gone", now=self.timeline.now))

    def _refuse(self, key: RoomKey, cause: Cause, detail: str) -> None:
        self.do(self.core.fail(key, cause, detail, now=self.timeline.now))

    def _offer_waiting(self) -> None:
        while self.waiting:
            first = self.waiting[0]
            if not self.budget.try_reserve(first.key, first.total_tokens * TOKEN_BYTES):
                return
            self.waiting.popleft()
            self._offer(first)

    def _offer(self, waiting: Waiting) -> None:
        key, total = waiting.key, waiting.total_tokens
        aux, now = aux_of(key, total), self.timeline.now
        try:
            actions = self.core.offer(
                key, total_tokens=total, aux=aux, content_hash=str(key).encode(), now=now
            )
        except OverloadedError as overload:
            self.budget.release(key)
            self._refuse(key, Cause.OVERLOADED, str(overload))
            return
        self.offered.add(key)
        self.do(actions)
        self.process.run_after(
            waiting.source_s, lambda: self.do(self.core.ready(key, source_ms=1.0, now=self.timeline.now))
        )

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
        for action in actions:
            match action:
                case Reply(peer, message):
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
                        self.process.run_after(0.0, partial(self.on_outcome, action, Outcome.LOST, ()))
                case CancelWrites(key):
                    for wire in self.wires.values():
                        wire.cancel(key)
                case Release():
                    self._release(action)

    def _attach(self, peer: Peer) -> None:
        target = self._reach(self.address, peer)
        if target is None or self.setup.attach_fails:
            self.do(self.core.on_attach_failed(peer, "out of reach"))
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
            total_tokens=self.total_tokens,
        )

    def _detach(self, peer: Peer) -> None:
        wire = self.wires.pop(peer, None)
        if wire is not None:
            wire.close()

    def _release(self, release: Release) -> None:
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

    def on_outcome(self, write: Write, outcome: Outcome, sums: tuple[int, ...]) -> None:
        """A write returned."""
        key, number, now = write.key, write.round.number, self.timeline.now
        if outcome is Outcome.LANDED:
            self.do(self.core.on_written(key, number, digests=sums, now=now))
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


@dataclass(slots=True)
class ReceiverSetup:
    """What stays the same over a receiver's lives."""

    limits: Limits
    num_blocks: int = 128
    block_size: int = 128
    default_allocate_tokens: int = 8192
    assembly_bytes: int = 2**40
    wire: str = FENCED
    fields: tuple[str, ...] = FIELDS
    read_s: float = 0.01
    """How long a whole embedding is read before its assembly is released."""
    proof_s: float = 0.5
    """How long after a sender's death the receiver can prove it."""
    tolerates_wrong_bytes: bool = False
    """The wire is broken on purpose: what is drained may be wrong, what is finished may not."""


class ReceiverNode:
    """A language server: opens rooms, drains blocks into assemblies, and checks every cell."""

    def __init__(
        self,
        address: str,
        setup: ReceiverSetup,
        *,
        timeline: Timeline,
        say: Callable[[str, str, Message], None],
        is_gone: Callable[[int, float], bool],
    ) -> None:
        self.address = address
        self.setup = setup
        self.timeline = timeline
        self._say = say
        self._is_gone = is_gone

    def start(self, incarnation: int) -> None:
        """Begin a life, with memory of its own."""
        setup = self.setup
        self.process = Process(incarnation, self.timeline)
        self.blocks = BlockAllocator(setup.num_blocks, setup.block_size)
        self.budget = Budget(setup.assembly_bytes)
        self.memory = Memory(setup.num_blocks, setup.block_size)
        self.core = ReceiverCore(
            incarnation=incarnation,
            offered=Offered(
                setup.fields, setup.block_size, setup.num_blocks, ((setup.wire, b""),), frozenset({FENCED})
            ),
            blocks=self.blocks,
            memory=self.budget,
            token_bytes=TOKEN_BYTES,
            default_allocate_tokens=setup.default_allocate_tokens,
            limits=setup.limits,
        )
        self.assemblies: dict[RoomKey, Cells] = {}
        self.grants: defaultdict[RoomKey, list[Grant]] = defaultdict(list)
        self.opened: set[RoomKey] = set()
        self.ends: dict[RoomKey, Finished | Failed] = {}
        self._pending: deque[ReceiverAction] = deque()
        self._is_busy = False

    def target(self, is_cut: Callable[[], bool]) -> Target:
        """The memory that a sender may write to."""
        return Target(self.memory, self.process, self.setup.wire, self._holds, is_cut)

    def _holds(self, key: RoomKey, ticket: int) -> bool:
        room, doubted = self.core.rooms.get(key), self.core.admission.quarantined.get(key)
        kept = (
            *(room.open_rounds if room is not None else ()),
            *(doubted.rounds if doubted is not None else ()),
        )
        return any(granted.ticket == ticket for granted in kept)

    def kill(self) -> None:
        """End a life."""
        self.process.kill()

    def open(self, key: RoomKey, address: str) -> None:
        """A request came in. Raises OverloadedError."""
        actions = self.core.open(key, address, now=self.timeline.now)
        self.opened.add(key)
        self.do(actions)

    def abort(self, key: RoomKey) -> None:
        """The client of a room has gone."""
        self.do(self.core.abort(key, Cause.ABORTED, "the client has gone", now=self.timeline.now))

    # ------------------------------------------------------------------ driving

    def on_frame(self, frame: bytes, *, origin: str) -> None:
        """A frame came in from a sender."""
        now = self.timeline.now
        try:
            message = decode_for_receiver(frame)
        except ProtocolViolation as violation:
            self.do(self.core.on_violation(origin, str(violation), now=now))
        else:
            self.do(self.core.on_message(message, origin, now=now))

    def tick(self) -> None:
        """Carry out what is due."""
        self.do(self.core.on_tick(self.timeline.now))

    def look_for_proof(self) -> None:
        """Tell the core which suspects are gone."""
        for incarnation in sorted(self.core.suspects):
            if self._is_gone(incarnation, self.setup.proof_s):
                self.do(self.core.on_peer_gone(incarnation, now=self.timeline.now))

    def do(self, actions: list[ReceiverAction]) -> None:
        """Carry out orders in order; what a drain brings about queues behind what is there."""
        self._pending.extend(actions)
        if self._is_busy:
            return
        self._is_busy = True
        while self._pending:
            self._do(self._pending.popleft())
        self._is_busy = False

    def _do(self, action: ReceiverAction) -> None:
        match action:
            case Send(address, message):
                if isinstance(message, Grant) and len(self.grants[message.key]) == message.round:
                    self.grants[message.key].append(message)
                self._say(self.address, address, message)
            case Assemble(key, total_tokens):
                self.assemblies[key] = np.zeros(total_tokens, np.int64)
            case Permit(_, granted):
                self.memory.permits.add(granted.ticket)
            case Revoke(_, ticket):
                self.memory.permits.discard(ticket)
            case Drain():
                self._drain(action)
            case Finished(key):
                self._finish(key, action)
            case Failed(key):
                self._end(key, action)
                self.assemblies.pop(key, None)
            case Hangup(address):
                self.timeline.note(f"{self.address} hangs up on {address}")

    def _drain(self, drain: Drain) -> None:
        key, granted = drain.key, drain.round
        room = self.core.rooms.get(key)
        if room is None or not room.is_live:
            return  # it failed meanwhile; its blocks may be somebody else's
        first, last = drain.from_token, drain.to_token
        found = self.memory.read(granted, first - granted.start_token, last - granted.start_token)
        self._check(key, found, cells(key, first, last))
        self.assemblies[key][first:last] = found
        aux = self.memory.aux[granted.block_indices[0]] if first == 0 else None
        sums = (
            digests(self.assemblies[key][granted.start_token : last]) if last == granted.end_token else None
        )
        now = self.timeline.now
        self.do(self.core.on_drained(key, granted.number, last, aux=aux, digests=sums, now=now))

    def _check(self, key: RoomKey, found: Cells, expected: Cells) -> None:
        if not self.setup.tolerates_wrong_bytes and not np.array_equal(found, expected):
            at = int(np.flatnonzero(found != expected)[0])
            raise InvariantBroken(
                f"{self.address}: room {key} drains a cell of {room_of(int(found[at]))}, {at} of {len(found)}"
            )

    def _finish(self, key: RoomKey, finished: Finished) -> None:
        held = self.assemblies[key]
        if not np.array_equal(held, cells(key, 0, len(held))):
            raise InvariantBroken(f"{self.address}: room {key} finished with wrong bytes")
        self._end(key, finished)
        self.process.run_after(self.setup.read_s, lambda: self._release(key))

    def _release(self, key: RoomKey) -> None:
        del self.assemblies[key]
        self.do(self.core.on_assembly_released(key, now=self.timeline.now))

    def _end(self, key: RoomKey, end: Finished | Failed) -> None:
        if key in self.ends:
            raise InvariantBroken(f"{self.address}: room {key} ended twice: {self.ends[key]}, then {end}")
        self.ends[key] = end
        self.timeline.note(f"{self.address} {end}")
