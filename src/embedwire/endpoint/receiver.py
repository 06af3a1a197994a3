"""A receiver as a library user sees it: open a room, get its arrays.

``ReceiverEndpoint`` may be called from any thread. Its driver thread owns the protocol core, the pool, one control socket a sender, and
drains blocks into assemblies.
"""

from __future__ import annotations

import logging
import secrets
import time
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial
from types import TracebackType

import zmq

from embedwire.endpoint.event_loop import EventLoop
from embedwire.endpoint.identity import check_key, chosen, identity_of
from embedwire.endpoint.landing import Landing
from embedwire.endpoint.member import Member, RankPlace, ReceiverParts
from embedwire.endpoint.reception import MakeAssembly, Reception, Receptions
from embedwire.endpoint.stats import ReceiverStats
from embedwire.endpoint.watch import Watch
from embedwire.errors import (
    ConfigurationError,
    EmbedwireError,
    ProtocolViolation,
    UsageError,
)
from embedwire.limits import (
    CONTENT_HASH_BYTES_MAX,
    DEFAULT_ALLOCATE_TOKENS,
    DEFAULT_ASSEMBLY_BYTES,
    DEFAULT_BLOCK_SIZE,
    DEFAULT_LIMITS,
    DEFAULT_NUM_BLOCKS,
    MESSAGE_BYTES_MAX,
    TOKENS_MAX,
    Limits,
)
from embedwire.memory.budget import Budget
from embedwire.memory.layout import Layout
from embedwire.protocol import messages
from embedwire.protocol.actions import (
    Address,
    Assemble,
    Drain,
    Failed,
    Finished,
    Hangup,
    Heard,
    Permit,
    ReceiverAction,
    Reconnect,
    Revoke,
    Send,
)
from embedwire.protocol.coordinator import Decision
from embedwire.protocol.messages import Cause, RoomKey
from embedwire.protocol.receiver_core import ReceiverCore
from embedwire.protocol.topology import ALONE

logger = logging.getLogger(__name__)

OnKept = Callable[[str, bytes, int], None]
"""Called with a sender's control address, and an item's content hash and tokens."""
PROOF_POLL_S = 0.5
"""How often to look whether a peer that may still write to quarantined blocks is gone."""


class ReceiverEndpoint:
    """Receives rooms of one layout from any number of senders, through one pool of ``num_blocks`` blocks of ``block_size`` tokens.

    ``assembly_bytes`` bounds what rooms being received, or received and still held, take together; ``transports`` are the wires it
    offers, best first. Raises ConfigurationError or TransportError when it can not be set up as told.

    ``place`` (``group.RankConfig``) makes it one rank of a group: rooms are opened on rank 0, and all ranks get a room together, or none
    does.
    """

    def __init__(
        self,
        layout: Layout,
        *,
        num_blocks: int = DEFAULT_NUM_BLOCKS,
        block_size: int = DEFAULT_BLOCK_SIZE,
        default_allocate_tokens: int = DEFAULT_ALLOCATE_TOKENS,
        assembly_bytes: int = DEFAULT_ASSEMBLY_BYTES,
        host: str = "127.0.0.1",
        transports: Sequence[str] | None = None,
        limits: Limits = DEFAULT_LIMITS,
        place: RankPlace | None = None,
    ) -> None:
        if not 1 <= default_allocate_tokens <= TOKENS_MAX:
            raise ConfigurationError(
                f"default_allocate_tokens is {default_allocate_tokens}; it has to be at least 1"
            )
        self.layout = layout
        self.limits = limits
        self._budget = Budget(assembly_bytes)
        self._landing = Landing(
            layout, num_blocks=num_blocks, block_size=block_size, transports=chosen(transports), host=host
        )
        self._incarnation = secrets.randbelow(2**62 - 1) + 1
        self.loop = EventLoop(
            "embedwire-receiver",
            on_frames=self._on_frames,
            on_time=self._on_time,
            next_due=self._next_due,
        )
        """The driver's thread, on which an owner may run tasks of its own."""
        self._group = place.group if place is not None else ALONE
        self._receptions = Receptions(
            layout,
            readers=len(self._group.readers),
            on_cancel=self._cancel,
            on_released=self._released,
            on_left=self._left,
        )
        parts = ReceiverParts(
            layout=layout,
            loop=self.loop,
            budget=self._budget,
            receptions=self._receptions,
            open_now=self._open_now,
            decide=self._decide,
            end_all=self._end_all,
        )
        self._member = place.join(parts) if place is not None else Member(parts)
        self._core = ReceiverCore(
            incarnation=self._incarnation,
            offered=self._landing.offered(),
            blocks=self._landing.blocks,
            memory=self._budget,
            token_bytes=layout.token_bytes,
            default_allocate_tokens=default_allocate_tokens,
            limits=limits,
            group=self._group,
            rank=place.rank if place is not None else 0,
            coordinator=self._member.coordinator,
        )
        self._sockets: dict[Address, zmq.Socket[bytes]] = {}
        self._subscriptions: dict[Address, OnKept] = {}
        self._silent: set[Address] = set()
        self._pending: deque[ReceiverAction] = deque()
        self._rounds_total = self._bytes_total = self._frames_refused = 0
        self._proof_at = 0.0
        self._watch = Watch()
        self._is_ending = False
        self.loop.start()
        try:
            self._member.start()
        except BaseException:
            self.close()
            raise

    # ------------------------------------------------------------------ for the owner of the assembly; any thread

    def open(
        self,
        room: int,
        addresses: str | Sequence[str],
        *,
        attempt: int = 0,
        item: bytes = b"",
        make_assembly: MakeAssembly | None = None,
    ) -> Reception:
        """Ask for a room; returns at once. ``addresses`` (``tcp://host:port``) are those of its encoder's ranks, in order of ranks.
        With ``item``, a content hash of at most 64 bytes, it is what the sender keeps under that hash; the number of the room is then
        this side's own choice, at random.

        ``make_assembly`` says where the embedding is to lie (default: fresh numpy arrays). Raises OverloadedError when too many rooms
        are open, UsageError for a room and attempt that are open already, an address that is none, or a rank other than 0, and
        TransferError when a rank of this group was lost.
        """
        check_key(room, attempt)
        if isinstance(addresses, str):
            addresses = (addresses,)
        if self._group.size > 1 and (make_assembly is not None or item):
            raise UsageError("a group of ranks makes its assemblies itself, and asks for rooms by number")
        if len(item) > CONTENT_HASH_BYTES_MAX:
            raise UsageError(f"item has {len(item)} bytes; at most {CONTENT_HASH_BYTES_MAX}")
        key = RoomKey(room, attempt)
        return self.loop.call(lambda: self._open(key, tuple(addresses), item, make_assembly))

    def subscribe(self, address: str, on_kept: OnKept) -> None:
        """From now on, call ``on_kept`` for each item that the sender at ``address`` begins to keep, also in a later life of it: on the
        driver's thread, where it must not block. Raises UsageError for an address that is none."""

        def subscribe() -> None:
            if address not in self._sockets:
                self._connect(address)
            self._subscriptions[address] = on_kept
            self._carry_out(self._core.subscribe(address, now=time.monotonic()))

        self.loop.call(subscribe)

    def _open(
        self, key: RoomKey, addresses: tuple[Address, ...], item: bytes, make_assembly: MakeAssembly | None
    ) -> Reception:
        if self._is_ending:
            raise UsageError("the receiver is closed")
        self._member.check_open()
        if key in self._receptions:
            raise UsageError(f"room {key.room} attempt {key.attempt} is open already")
        self._core.check_open(key, senders=len(addresses))
        self._connect_all(key, addresses)
        reception = self._receptions.expect(key, make_assembly)
        self._member.open(key, addresses, item)
        return reception

    def _open_now(self, key: RoomKey, addresses: Sequence[Address], item: bytes) -> None:
        """Open a room on this rank. What is wrong with it fails the room. On the driver's thread."""
        now = time.monotonic()
        self._receptions[key].addresses = tuple(addresses)
        try:
            self._connect_all(key, addresses)
            actions = self._core.open(key, addresses, item=item, now=now)
        except EmbedwireError as error:
            actions = self._core.open_failed(key, str(error), now=now)
        self._carry_out(actions)

    def _connect_all(self, key: RoomKey, addresses: Sequence[Address]) -> None:
        for lane in self._core.lanes_of(key, senders=len(addresses)).values():
            if addresses[lane.sender] not in self._sockets:
                self._connect(addresses[lane.sender])

    def _cancel(self, key: RoomKey, detail: str) -> None:
        def cancel() -> None:
            if self._member.withdraw(key):
                self._receptions.give_up(key, Cause.ABORTED, detail)
            else:
                self._carry_out(self._core.abort(key, Cause.ABORTED, detail, now=time.monotonic()))

        self.loop.post(cancel)

    @property
    def is_receiving(self) -> bool:
        """Whether a room is open. Costs nothing, from any thread."""
        return bool(self._receptions)

    def stats(self) -> ReceiverStats:
        """A snapshot."""
        return self.loop.call(self._stats)

    def _stats(self) -> ReceiverStats:
        counts, blocks = self._core.snapshot(), self._landing.blocks
        return ReceiverStats(
            rooms=counts.lanes,
            ended=dict(self._receptions.ended),
            waiting={"assembly": counts.for_assembly, "blocks": counts.for_blocks},
            sessions=counts.sessions,
            rounds_total=self._rounds_total,
            bytes_total=self._bytes_total,
            blocks_total=blocks.blocks_total,
            blocks_free=blocks.blocks_free,
            blocks_granted=blocks.blocks_granted,
            blocks_quarantined=blocks.blocks_quarantined,
            memory_reserved_bytes=self._budget.used_bytes,
            memory_limit_bytes=self._budget.limit_bytes,
            frames_refused_total=self._frames_refused,
            turns_total=self._member.steps_total,
        )

    def close(self) -> None:
        """End all rooms (cause ``closed``), report it to their senders, and free everything. Idempotent. Raises UsageError in a callback,
        which runs on the driver's thread."""
        self.loop.close(self._shut_down)

    def _shut_down(self) -> None:
        self._member.close()
        self.loop.post(self._close_core)
        self.loop.stop()
        self._landing.close()

    def _close_core(self) -> None:
        self._is_ending = True
        self._carry_out(self._core.close(now=time.monotonic()))

    def __enter__(self) -> ReceiverEndpoint:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # ------------------------------------------------------------------ the driver's thread

    def _connect(self, address: Address) -> None:
        socket = self.loop.socket(zmq.DEALER)
        try:
            socket.setsockopt(zmq.IDENTITY, identity_of(self._incarnation, address))
            socket.setsockopt(zmq.MAXMSGSIZE, MESSAGE_BYTES_MAX)
            socket.setsockopt(zmq.LINGER, 200)
            socket.setsockopt(zmq.RECONNECT_IVL, 50)
            # a sender that is back is reached long before its silence would count as a loss
            socket.setsockopt(
                zmq.RECONNECT_IVL_MAX, max(50, int(min(1.0, self.limits.peer_silence_s / 8) * 1000))
            )
            socket.connect(address)
        except zmq.ZMQError as error:
            socket.close()
            raise UsageError(f"{address!r} is no control address: {error}") from error
        self._sockets[address] = socket
        self.loop.register(socket)

    def _hang_up(self, address: Address) -> None:
        socket = self._sockets.pop(address)
        self.loop.unregister(socket)
        socket.close()

    def _connect_again(self, address: Address) -> None:
        """The connection may be what is dead, and not the sender: half open, or its identity taken by another."""
        self._hang_up(address)
        self._connect(address)

    def _next_due(self) -> float | None:
        if self._watch:
            return 0.0
        proof_at = self._proof_at if self._core.suspects() else None
        dues = (self._core.next_due(), proof_at)
        return min((due for due in dues if due is not None), default=None)

    def _on_time(self, now: float) -> None:
        self._carry_out(self._core.on_tick(now))
        self._look(now)
        while self._silent:
            self._connect_again(self._silent.pop())
        if now >= self._proof_at and (suspects := self._core.suspects()):
            self._proof_at = now + PROOF_POLL_S
            for incarnation in suspects:
                if self._landing.is_gone(incarnation):
                    self._carry_out(self._core.on_peer_gone(incarnation, now=now))

    def _look(self, now: float) -> None:
        """Take from the wire's marks what has landed in the lanes that are watched."""
        was_news = False
        for key, landed_tokens in self._watch.look(now):
            if actions := self._core.on_landed(key, landed_tokens, now=now):
                was_news = True
                self._carry_out(actions)
        if self._watch and not was_news:
            self._watch.nap()

    def _on_frames(self, socket: zmq.Socket[bytes], frames: list[list[bytes]]) -> None:
        address = next(a for a, s in self._sockets.items() if s is socket)
        for *_, frame in frames:
            try:
                message = messages.decode_for_receiver(frame)
            except ProtocolViolation as violation:
                self._frames_refused += 1
                logger.warning("! refused a frame from %s: %s", address, violation)
                self._carry_out(self._core.on_violation(address, str(violation), now=time.monotonic()))
                continue
            logger.debug("< %s %s", address, message)
            self._carry_out(self._core.on_message(message, address, now=time.monotonic()))

    def _carry_out(self, actions: list[ReceiverAction]) -> None:
        """In order; what a drain brings about queues behind what is there. On the driver's thread."""
        self._pending.extend(actions)
        while self._pending:
            self._do(self._pending.popleft())
        self._member.on_actions()

    def _decide(self, decisions: Sequence[Decision]) -> None:
        self._carry_out(self._core.on_decided(decisions, now=time.monotonic()))

    def _end_all(self, cause: Cause, detail: str) -> None:
        self._carry_out(self._core.end_all(cause, detail, now=time.monotonic()))

    def _do(self, action: ReceiverAction) -> None:
        match action:
            case Send(_, messages.Done()) if any(isinstance(later, Finished) for later in self._pending):
                self._pending.append(action)  # who waits for the embedding comes before the sender's memory
            case Send(address, messages.Grant() as grant):
                self._say(address, grant)
                self._watch.begin(grant.key)
            case Send(address, message):
                self._say(address, message)
            case Permit(key, wire, granted):
                self._landing.permit(granted)
                self._watch.add(key, granted, self._landing.wire(wire))
            case Revoke(key, ticket):
                self._landing.revoke(ticket)
                self._watch.remove(key, ticket)
            case Assemble():
                self._assemble(action)
            case Drain():
                try:
                    self._drain(action)
                except Exception as error:
                    detail = f"not drained: {type(error).__name__}: {error}"
                    failed = action.key.of_room
                    self._pending.extend(
                        self._core.abort(failed, Cause.WIRE_FAILED, detail, now=time.monotonic())
                    )
                    raise
            case Finished():
                self._member.finish(action)
            case Failed(key, cause, detail):
                self._member.fail(key)
                self._receptions.give_up(key, cause, detail)
            case Heard(address, content_hash, tokens):
                self._subscriptions[address](address, content_hash, tokens)
            case Reconnect(address):
                self._silent.add(address)
            case Hangup(address):
                self._hang_up(address)

    def _say(self, address: Address, message: messages.Message) -> None:
        logger.debug("> %s %s", address, message)
        try:
            self._sockets[address].send(messages.encode(message), zmq.NOBLOCK)
        except zmq.ZMQError as error:  # its queue is full; it is asked again
            logger.debug("! not sent to %s: %s", address, error)

    def _assemble(self, order: Assemble) -> None:
        key = order.key
        if key not in self._receptions:
            return
        try:
            make_assembly = self._member.assembly_of(order)
            self._receptions.assemble(key, order.total_tokens, make_assembly=make_assembly)
        except Exception as error:
            detail = f"no assembly: {type(error).__name__}: {error}"
            self._pending.extend(self._core.abort(key, Cause.OVERLOADED, detail, now=time.monotonic()))

    def _drain(self, drain: Drain) -> None:
        if not self._landing.is_permitted(drain.round):
            return  # its lane failed meanwhile, and its blocks may be another's
        reception = self._receptions[drain.key.of_room]
        sums = reception.sums[drain.key]
        aux = self._landing.drain(drain, reception.rows, sums)
        digests = sums.digest() if drain.is_last else None
        self._receptions.drained(drain)
        self._rounds_total += drain.to_token == drain.round.end_token
        self._bytes_total += (drain.to_token - drain.from_token) * self.layout.token_bytes
        now = time.monotonic()
        actions = self._core.on_drained(drain.key, drain.to_token, aux=aux, digests=digests, now=now)
        self._pending.extendleft(reversed(actions))  # a grant goes out before the next drain: both sides work
        self._watch.begin(drain.key)

    def _released(self, reservation: int) -> None:
        """The arrays of a room are no longer needed. Any thread."""
        self.loop.post(partial(self._let_go, reservation))

    def _left(self, key: RoomKey, reservation: int) -> None:
        """The last array of a room is collected. Any thread."""

        def left() -> None:
            self._member.left(key)
            self._let_go(reservation)

        self.loop.post(left)

    def _let_go(self, reservation: int) -> None:
        self._carry_out(self._core.on_assembly_released(reservation, now=time.monotonic()))
