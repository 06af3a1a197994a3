"""A sender as a library user sees it: offer a room, fill it, learn how it ended.

``SenderEndpoint`` may be called from any thread. Its driver thread owns the protocol core, the control socket and the memory budget;
one writer thread a receiver moves the bytes.
"""

from __future__ import annotations

import logging
import secrets
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from types import TracebackType

import zmq

from embedwire.endpoint.event_loop import EventLoop
from embedwire.endpoint.identity import check_key, chosen, is_of
from embedwire.endpoint.offer import Digests, Filling, Offer
from embedwire.endpoint.stats import SenderStats
from embedwire.endpoint.statuses import HeldStatuses
from embedwire.endpoint.writer import SessionWriter, WriteJob, WriterReports
from embedwire.errors import (
    ConfigurationError,
    NeverFitsError,
    OverloadedError,
    ProtocolViolation,
    TransferError,
    TransportError,
    UsageError,
)
from embedwire.limits import (
    AUX_WORDS,
    CONTENT_HASH_BYTES_MAX,
    DEFAULT_LIMITS,
    DEFAULT_SOURCE_BYTES,
    MESSAGE_BYTES_MAX,
    TOKENS_MAX,
    Limits,
)
from embedwire.memory.budget import Budget
from embedwire.memory.layout import Layout
from embedwire.memory.pool import pack_aux
from embedwire.memory.source import Source
from embedwire.protocol import messages
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
from embedwire.protocol.messages import Cause, RoomKey
from embedwire.protocol.sender_core import SenderCore
from embedwire.transports import open_outbound
from embedwire.transports.contract import Outcome

logger = logging.getLogger(__name__)

OnWanted = Callable[[RoomKey, bytes], None]
"""Called on the driver's thread when a receiver asks for what is kept under a content hash: :meth:`SenderEndpoint.lend` it, now or
later, or :meth:`SenderEndpoint.refuse` it."""


class SenderEndpoint:
    """Offers rooms of one layout to any number of receivers.

    ``memory_bytes`` bounds what all rooms reserve together; ``transports`` are the wires that receivers may use. Where an encoder has
    several ``ranks``, each has such an endpoint and offers the same rooms; this is ``rank``, and it sends its part. ``on_wanted`` is asked
    for what receivers want by its content hash; without it they hear ``unknown_item``. Raises ConfigurationError or TransportError when it
    can not be set up as told. Use it as a context manager, or ``close`` it.
    """

    def __init__(
        self,
        layout: Layout,
        *,
        host: str = "127.0.0.1",
        port: int = 0,
        memory_bytes: int = DEFAULT_SOURCE_BYTES,
        transports: Sequence[str] | None = None,
        limits: Limits = DEFAULT_LIMITS,
        rank: int = 0,
        ranks: int = 1,
        on_wanted: OnWanted | None = None,
    ) -> None:
        if not 0 <= rank < ranks:
            raise ConfigurationError(f"rank {rank} of {ranks}; ranks count from 0")
        self.layout = layout
        self.limits = limits
        self._on_wanted = on_wanted
        self._outbounds = {name: open_outbound(name, host=host) for name in chosen(transports)}
        self._incarnation = secrets.randbelow(2**62 - 1) + 1
        self._core = SenderCore(
            incarnation=self._incarnation, fields=layout.describe(), limits=limits, rank=rank, ranks=ranks
        )
        self._budget = Budget(memory_bytes)
        self.loop = EventLoop(
            "embedwire-sender", on_frames=self._on_frames, on_time=self._on_time, next_due=self._next_due
        )
        """The driver's thread, on which an owner may run tasks of its own beside ``on_wanted``."""
        self._reports = WriterReports(
            self._attached, self._attach_failed, self._landed, self._written, self._doubt_ended
        )
        self._offers: dict[RoomKey, Offer] = {}
        self._writers: dict[Peer, SessionWriter] = {}
        self._retired: list[SessionWriter] = []
        self._routes: dict[Peer, bytes] = {}
        self._landed_tokens: dict[tuple[RoomKey, int], int] = {}
        self._landed_lock = threading.Lock()
        self._held = HeldStatuses()
        self._is_ending = False
        self._ended: Counter[str] = Counter()
        self._rounds_total = self._bytes_total = self._frames_refused = 0
        self._socket = self.loop.socket(zmq.ROUTER)
        self.address = self._bind(f"tcp://{host}:{port or '*'}")
        self.loop.start()

    @property
    def addresses(self) -> tuple[str, ...]:
        """Where its rooms are asked for."""
        return (self.address,)

    def _bind(self, address: str) -> str:
        self._socket.setsockopt(zmq.ROUTER_HANDOVER, 1)
        self._socket.setsockopt(zmq.MAXMSGSIZE, MESSAGE_BYTES_MAX)
        self._socket.setsockopt(zmq.LINGER, 200)
        try:
            self._socket.bind(address)
        except zmq.ZMQError as error:
            self.loop.free()
            raise TransportError(f"can not listen at {address}: {error}") from error
        self.loop.register(self._socket)
        return self._socket.getsockopt_string(zmq.LAST_ENDPOINT)

    # ------------------------------------------------------------------ for the owner of the source; any thread

    def offer(
        self,
        room: int,
        *,
        total_tokens: int,
        attempt: int = 0,
        aux: Sequence[int] = (),
        content_hash: bytes = b"",
        readers: int = 1,
    ) -> Offer:
        """Reserve memory for a room and announce it. ``aux`` are up to 15 int32 that follow the total in the aux row;
        ``content_hash`` is at most 64 bytes; ``readers`` is how many ranks of the language server receive from the wire.

        Raises NeverFitsError when it is larger than ``memory_bytes``, OverloadedError when that much is not free now or too many
        rooms are offered, UsageError for a room and attempt that were offered before, or a number out of range.
        """
        check_key(room, attempt)
        if not 1 <= total_tokens <= TOKENS_MAX:
            raise UsageError(f"total_tokens is {total_tokens}; it has to be in 1 .. {TOKENS_MAX}")
        if len(content_hash) > CONTENT_HASH_BYTES_MAX:
            raise UsageError(f"content_hash has {len(content_hash)} bytes; at most {CONTENT_HASH_BYTES_MAX}")
        row = (total_tokens, *aux, *([0] * (AUX_WORDS - 1 - len(aux))))
        pack_aux(row)
        offer = self._new_offer(RoomKey(room, attempt), total_tokens, row, readers=readers)
        self.loop.call(partial(self._reserve_and_offer, offer, content_hash, readers))
        return offer

    def _new_offer(self, key: RoomKey, total_tokens: int, aux: tuple[int, ...], *, readers: int = 1) -> Offer:
        shares = self._core.shares(key, total_tokens, readers=readers)
        return Offer(
            self.layout,
            key,
            total_tokens,
            aux,
            address=self.address,
            shares=shares,
            on_filled=self._fill,
            on_end=self._end,
        )

    def lend(self, key: RoomKey, filling: Filling, *, content_hash: bytes) -> Offer:
        """Answer a receiver that wants something by its hash: a room whose memory is its owner's, who keeps it until the offer has
        ended. Raises OverloadedError and UsageError as :meth:`offer` does."""
        total_tokens = filling.source.tokens
        row = (total_tokens, *([0] * (AUX_WORDS - 1)))
        offer = self._new_offer(key, total_tokens, row)

        def lend() -> None:
            if self._is_ending:
                raise OverloadedError("the sender is shutting down")
            self._core.check_offer([key])
            offer.filled_with(filling)
            self._announce(offer, content_hash, digests={key: filling.digests})

        self.loop.call(lend)
        return offer

    def tell_kept(self, content_hash: bytes, *, tokens: int) -> None:
        """Say to receivers that subscribe: whoever asks for something under this hash gets it from now on."""
        self.loop.call(lambda: self._carry_out(self._core.keep(content_hash, tokens=tokens)))

    def refuse(self, key: RoomKey, cause: Cause, detail: str) -> None:
        """Answer a receiver that wants something by its hash: it can not have it."""
        self.loop.post(lambda: self._fail(key, cause, detail))

    def _reserve_and_offer(self, offer: Offer, content_hash: bytes, readers: int) -> None:
        self._check_open()
        self._core.check_known(offer.shares)
        need = offer.total_tokens * self.layout.token_bytes
        if not self._budget.can_ever(need):
            limit = self._budget.limit_bytes
            detail = f"{offer.total_tokens} tokens need {need} bytes of source memory; there are {limit}"
            # a receiver that has opened the room already gets the cause at once
            self._fail(offer.key, Cause.NEVER_FITS, detail, readers=readers)
            raise NeverFitsError(detail)
        self._core.check_offer(offer.shares)
        if not self._budget.try_reserve(offer.key, need):
            raise OverloadedError(f"{need} bytes of source memory are not free now")
        self._announce(offer, content_hash, readers=readers)

    def _check_open(self) -> None:
        if self._is_ending:
            raise UsageError("the sender is closed")

    def _announce(
        self,
        offer: Offer,
        content_hash: bytes,
        *,
        readers: int = 1,
        digests: Mapping[RoomKey, Digests] | None = None,
    ) -> None:
        self._offers[offer.key] = offer
        actions = self._core.offer(
            offer.key,
            total_tokens=offer.total_tokens,
            aux=offer.aux,
            content_hash=content_hash,
            readers=readers,
            digests=digests,
            now=time.monotonic(),
        )
        self._carry_out(actions)

    def _fill(
        self, offer: Offer, source: Source, digests: Mapping[RoomKey, Digests], source_ms: float
    ) -> None:
        def fill() -> None:
            if not offer.done():
                offer.source = source
                now = time.monotonic()
                self._carry_out(self._core.ready(offer.key, source_ms=source_ms, digests=digests, now=now))

        self.loop.post(fill)

    def _end(self, offer: Offer, cause: Cause, detail: str) -> None:
        self.loop.post(lambda: self._fail(offer.key, cause, detail))

    def _fail(self, key: RoomKey, cause: Cause, detail: str, *, readers: int = 1) -> None:
        self._carry_out(self._core.fail(key, cause, detail, readers=readers, now=time.monotonic()))

    def stats(self) -> SenderStats:
        """A snapshot."""
        return self.loop.call(self._stats)

    def _stats(self) -> SenderStats:
        counts = self._core.snapshot()
        return SenderStats(
            rooms=counts.lanes,
            ended=dict(self._ended),
            sessions=counts.sessions,
            rounds_total=self._rounds_total,
            bytes_total=self._bytes_total,
            memory_reserved_bytes=self._budget.used_bytes,
            memory_limit_bytes=self._budget.limit_bytes,
            frames_refused_total=self._frames_refused,
        )

    def close(self) -> None:
        """End all rooms (cause ``closed``), report it to their receivers, and free everything. Idempotent. Raises UsageError in a callback,
        which runs on the driver's thread."""
        self.loop.close(self._shut_down)

    def _shut_down(self) -> None:
        self.loop.post(self._end_all)
        self.loop.call(self._retire_writers)
        for writer in self._retired:
            writer.abandon()
        for writer in self._retired:
            writer.join(self.limits.write_timeout_s)
        self.loop.stop()  # what the writers reported last is in the queue before this
        for outbound in self._outbounds.values():
            outbound.close()

    def _end_all(self) -> None:
        self._is_ending = True
        self._carry_out(self._core.close(now=time.monotonic()))

    def _retire_writers(self) -> None:
        for peer in list(self._writers):
            self._detach(peer)

    def __enter__(self) -> SenderEndpoint:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # ------------------------------------------------------------------ the driver's thread

    def _next_due(self) -> float | None:
        dues = (self._core.next_due(), self._held.next_due)
        return min((due for due in dues if due is not None), default=None)

    def _on_time(self, now: float) -> None:
        self._carry_out(self._core.on_tick(now))
        for peer, status in self._held.take_due(now):
            self._say(peer, status)

    def _on_frames(self, socket: zmq.Socket[bytes], frames: list[list[bytes]]) -> None:
        for parts in frames:
            identity, frame = parts[0], parts[-1]
            try:
                message = messages.decode_for_sender(frame)
                if len(parts) != 2 or not is_of(identity, message.source):
                    raise ProtocolViolation("a message under another receiver's name")
            except ProtocolViolation as violation:
                self._refuse(identity, violation)
                continue
            self._note_route(message.source, identity)
            self._carry_out(self._core.on_message(message, now=time.monotonic()))

    def _note_route(self, peer: Peer, identity: bytes) -> None:
        """Answers go where the receiver was last heard from."""
        self._routes.pop(peer, None)
        self._routes[peer] = identity
        if len(self._routes) > 2 * self.limits.sessions_max:
            del self._routes[next(iter(self._routes))]

    def _refuse(self, identity: bytes, violation: ProtocolViolation) -> None:
        self._frames_refused += 1
        logger.warning("! refused a frame: %s", violation)
        peer = int.from_bytes(identity[1:9], "big")
        if is_of(identity, peer):
            self._carry_out(
                self._core.on_peer_lost(peer, f"it sent no message: {violation}", now=time.monotonic())
            )

    def _carry_out(self, actions: list[SenderAction]) -> None:
        """In order; an action that fails does not stop those behind it."""
        for action in actions:
            self.loop.guard(partial(self._do, action))

    def _has_marks(self, peer: Peer) -> bool:
        writer = self._writers.get(peer)
        return writer is not None and writer.has_marks

    def _do(self, action: SenderAction) -> None:
        match action:
            case Reply(peer, messages.Status() as status) if self._has_marks(peer):
                is_watched = self._writers[peer].is_watched(status.key)
                self._held.hold(peer, status, is_watched=is_watched, now=time.monotonic())
            case Reply(peer, message):
                if isinstance(message, messages.Ended):
                    self._held.drop(peer, message.key)
                self._say(peer, message)
            case Attach(peer) if self._is_ending:  # its writer would never be closed
                now = time.monotonic()
                self._carry_out(self._core.on_attach_failed(peer, "the sender is shutting down", now=now))
            case Attach(peer, hello):
                self._writers[peer] = SessionWriter(
                    peer,
                    hello,
                    self._outbounds,
                    layout=self.layout,
                    incarnation=self._incarnation,
                    reports=self._reports,
                    limits=self.limits,
                )
            case Detach(peer):
                self._detach(peer)
            case Write():
                try:
                    self._write(action)
                except Exception:
                    self._written(action, Outcome.LOST)  # the core counts on an answer to every write
                    raise
            case CancelWrites(key):
                self._offers[key.of_room].withdrawn.add(key)
            case Want(key, item) if self._on_wanted is not None:
                self._on_wanted(key, item)
            case Want(key, item):
                self._fail(key, Cause.UNKNOWN_ITEM, "this sender keeps nothing by its content hash")
            case Release():
                self._release(action)

    def _say(self, peer: Peer, message: messages.Message) -> None:
        if isinstance(message, messages.Refused):
            logger.warning("! receiver %x refused: %s: %s", peer, message.cause, message.detail)
        logger.debug("> %x %s", peer, message)
        try:
            self._socket.send_multipart([self._routes[peer], messages.encode(message)], zmq.NOBLOCK)
        except KeyError:  # so many others have spoken since that its route is forgotten; it asks again
            logger.debug("! no route to %x", peer)
        except zmq.ZMQError as error:  # its queue is full or it is gone; the receiver asks again
            logger.debug("! not sent to %x: %s", peer, error)

    def _detach(self, peer: Peer) -> None:
        writer = self._writers.pop(peer, None)
        if writer is not None:
            writer.close()
            self._retired = [w for w in self._retired if w.is_alive()] + [writer]

    def _write(self, write: Write) -> None:
        offer = self._offers[write.key.of_room]
        writer = self._writers.get(write.peer)
        if writer is None or offer.source is None:
            self._written(write, Outcome.LOST)
            return
        offer.landed.setdefault((write.key, write.round.number), 0)
        writer.submit(
            WriteJob(
                write=write,
                source=offer.source,
                aux=pack_aux(offer.aux),
                is_permitted=lambda: write.key not in offer.withdrawn,
                geometry=writer.geometry,
            )
        )

    def _release(self, release: Release) -> None:
        """A room has ended, and its source is no longer read."""
        offer = self._offers.pop(release.key)
        offer.source = None
        self._budget.release(offer.key)
        offer.log_end(release.cause, release.detail)
        outcome = offer.outcome(release, token_bytes=self.layout.token_bytes)
        if isinstance(outcome, TransferError):
            self._ended[outcome.cause] += 1
            offer.set_exception(outcome)
        else:
            self._ended[Cause.DONE.value] += 1
            offer.set_result(outcome)

    # ------------------------------------------------------------------ writers' reports, on their threads

    def _attached(self, writer: SessionWriter, wire: str) -> None:
        """A writer has reached its receiver."""

        def attached() -> None:
            if self._writers.get(writer.peer) is writer:
                self._carry_out(self._core.on_attached(writer.peer, wire))

        self.loop.post(attached)

    def _attach_failed(self, writer: SessionWriter, detail: str) -> None:
        """A writer's receiver is out of reach, for the first time or again. One whose session has ended has nothing to say."""

        def failed() -> None:
            if self._writers.get(writer.peer) is writer:
                self._detach(writer.peer)
                self._carry_out(self._core.on_attach_failed(writer.peer, detail, now=time.monotonic()))

        self.loop.post(failed)

    def _landed(self, write: Write, landed_tokens: int) -> None:
        """Tokens of a round have landed. Reports that the driver has not read yet are merged into the newest."""
        slot = (write.key, write.round.number)
        with self._landed_lock:
            is_waiting = slot in self._landed_tokens
            self._landed_tokens[slot] = landed_tokens
        if not is_waiting:
            self.loop.post(partial(self._on_landed, slot))

    def _on_landed(self, slot: tuple[RoomKey, int]) -> None:
        key, number = slot
        with self._landed_lock:
            landed_tokens = self._landed_tokens.pop(slot)
        self._record(key, number, landed_tokens)
        self._carry_out(self._core.on_landed(key, number, landed_tokens, now=time.monotonic()))

    def _written(self, write: Write, outcome: Outcome) -> None:
        """A write has returned."""
        self.loop.post(partial(self._on_written, write, outcome))

    def _on_written(self, write: Write, outcome: Outcome) -> None:
        key, number, now = write.key, write.round.number, time.monotonic()
        if outcome is Outcome.LANDED:
            self._record(key, number, write.round.tokens)
            self._rounds_total += 1
            self._bytes_total += (write.round.tokens - write.landed_tokens) * self.layout.token_bytes
            self._carry_out(self._core.on_written(key, number, now=now))
        elif outcome is Outcome.LOST:
            self._carry_out(self._core.on_write_lost(key, number, "the write was lost", now=now))
        else:
            self._carry_out(self._core.on_write_unknown(key, number, "the write may still land", now=now))

    def _record(self, key: RoomKey, number: int, landed_tokens: int) -> None:
        offer = self._offers.get(key.of_room)
        if offer is not None:
            offer.landed[key, number] = landed_tokens

    def _doubt_ended(self, write: Write) -> None:
        """A write that was reported as unknown can not land any more."""
        self.loop.post(lambda: self._carry_out(self._core.on_doubt_ended(write.peer, write.key)))
