"""A simulated receiver: what ``endpoint.receiver`` does with threads and sockets, done in virtual time. One thread.

A node is an address; it lives one process after another. ``sim_checks`` looks at nodes, ``simulation`` makes them.
"""

from __future__ import annotations

from collections import Counter, defaultdict, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from embedwire.errors import ProtocolViolation
from embedwire.limits import Limits
from embedwire.memory.allocator import BlockAllocator
from embedwire.memory.budget import Budget
from embedwire.protocol.actions import (
    Assemble,
    Drain,
    Failed,
    Finished,
    Hangup,
    Heard,
    Permit,
    ReceiverAction,
    Revoke,
    Send,
)
from embedwire.protocol.coordinator import Coordinator, LocalCoordinator
from embedwire.protocol.handshake import Offered
from embedwire.protocol.messages import Cause, Grant, Message, RoomKey, decode_for_receiver
from embedwire.protocol.receiver_core import ReceiverCore
from embedwire.protocol.topology import ALONE, RankGroup
from embedwire.testing.sim_memory import FIELDS, TOKEN_BYTES, Cells, Memory, cells, digests, room_of
from embedwire.testing.sim_timeline import Process, Timeline
from embedwire.testing.sim_wire import FENCED, InvariantBroken, Target


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
        group: RankGroup = ALONE,
        rank: int = 0,
        on_end: Callable[[ReceiverNode, RoomKey, Finished | Failed], None] | None = None,
        on_heard: Callable[[ReceiverNode, Heard], None] | None = None,
    ) -> None:
        self.address = address
        self.setup = setup
        self.group = group
        self.rank = rank
        self._on_end = on_end
        self._on_heard = on_heard
        self.subscriptions: set[str] = set()
        """Addresses whose items it wants to hear of, in each life."""
        self.timeline = timeline
        self._say = say
        self._is_gone = is_gone

    def start(self, incarnation: int) -> None:
        """Begin a life, with memory of its own."""
        setup = self.setup
        self.has_moved = True
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
            group=self.group,
            rank=self.rank,
            coordinator=self._coordinator(),
        )
        self.assemblies: dict[RoomKey, Cells] = {}
        self.grants: defaultdict[RoomKey, list[Grant]] = defaultdict(list)
        self.opened: set[RoomKey] = set()
        self.ends: dict[RoomKey, Finished | Failed] = {}
        self.heard: Counter[tuple[str, bytes]] = Counter()
        self._pending: deque[ReceiverAction] = deque()
        self._is_busy = False
        for sender in sorted(self.subscriptions):
            self._subscribe(sender)

    def _coordinator(self) -> Coordinator:
        return LocalCoordinator(self.budget, token_bytes=TOKEN_BYTES)

    def target(self, is_cut: Callable[[], bool]) -> Target:
        """The memory that a sender may write to."""
        return Target(self.memory, self.process, self.setup.wire, self._holds, is_cut)

    def _holds(self, key: RoomKey, ticket: int) -> bool:
        room, doubted = self.core.lanes.transfers.get(key), self.core.admission.quarantined.get(key)
        kept = (
            *(room.open_rounds if room is not None else ()),
            *(doubted.rounds if doubted is not None else ()),
        )
        return any(granted.ticket == ticket for granted in kept)

    def kill(self) -> None:
        """End a life."""
        self.process.kill()

    @property
    def nodes(self) -> list[ReceiverNode]:
        """Itself: a receiver is a group of one."""
        return [self]

    def open(self, key: RoomKey, addresses: Sequence[str], *, item: bytes = b"") -> None:
        """A request came in, with ``item`` for what is kept under that content hash. Raises OverloadedError."""
        actions = self.core.open(key, addresses, item=item, now=self.timeline.now)
        self.opened.add(key)
        self.do(actions)

    def subscribe(self, address: str) -> None:
        """From now on, hear of the items that the sender at ``address`` keeps."""
        self.subscriptions.add(address)
        self.process.run(lambda: self._subscribe(address))

    def _subscribe(self, address: str) -> None:
        self.do(self.core.subscribe(address, now=self.timeline.now))

    def unsubscribe(self) -> None:
        """Nobody cares any more; sessions without rooms come to their end."""
        self.subscriptions.clear()
        for session in self.core.lanes.sessions.values():
            session.subscribes = False

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
        for incarnation in sorted(self.core.suspects()):
            if self._is_gone(incarnation, self.setup.proof_s):
                self.do(self.core.on_peer_gone(incarnation, now=self.timeline.now))

    def do(self, actions: list[ReceiverAction]) -> None:
        """Carry out orders in order; what a drain brings about queues behind what is there."""
        self.has_moved = True
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
            case Assemble(key, total_tokens, _):
                self.assemblies[key] = np.zeros(total_tokens, np.int64)
            case Permit(_, _, granted):
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
            case Heard(address, content_hash):
                self.heard[address, content_hash] += 1
                if self._on_heard is not None:
                    self._on_heard(self, action)
            case Hangup(address):
                self.timeline.note(f"{self.address} hangs up on {address}")

    def _drain(self, drain: Drain) -> None:
        key, granted = drain.key, drain.round
        if granted.ticket not in self.memory.permits:
            return  # its lane failed meanwhile, and its blocks may be another's
        first, last, row = drain.from_token, drain.to_token, drain.first_row
        found = self.memory.read(granted, first - granted.start_token, last - granted.start_token)
        self._check(key, found, cells(key, row + first, row + last))
        part = self.assemblies[key.of_room][row : row + last]
        part[first:] = found
        aux = self.memory.aux[granted.block_indices[0]] if first == 0 else None
        sums = digests(part) if drain.is_last else None
        now = self.timeline.now
        self.do(self.core.on_drained(key, last, aux=aux, digests=sums, now=now))

    def _check(self, key: RoomKey, found: Cells, expected: Cells) -> None:
        if not self.setup.tolerates_wrong_bytes and not np.array_equal(found, expected):
            at = int(np.flatnonzero(found != expected)[0])
            raise InvariantBroken(
                f"{self.address}: room {key} drains a cell of {room_of(int(found[at]))}, {at} of {len(found)}"
            )

    def _finish(self, key: RoomKey, finished: Finished) -> None:
        if self.group.is_dummy(self.rank):
            self._end(key, finished)
            return
        held = self.assemblies[key]
        if not np.array_equal(held, cells(key, 0, len(held))):
            raise InvariantBroken(f"{self.address}: room {key} finished with wrong bytes")
        self._end(key, finished)
        self.process.run_after(self.setup.read_s, lambda: self._release(finished))

    def _release(self, finished: Finished) -> None:
        del self.assemblies[finished.key]
        self.do(self.core.on_assembly_released(finished.reservation, now=self.timeline.now))

    def _end(self, key: RoomKey, end: Finished | Failed) -> None:
        if key in self.ends:
            raise InvariantBroken(f"{self.address}: room {key} ended twice: {self.ends[key]}, then {end}")
        self.ends[key] = end
        if self._on_end is not None:
            self._on_end(self, key, end)
        self.timeline.note(f"{self.address} {end}")
