"""One room on the receiving side: what was announced, which grants are open, what has landed and what is drained.

Called by ``receiver_core`` only, which does the talking. Raises ProtocolViolation for what a sender may not say, and
CorruptRoom for bytes that are not the sender's.
"""

from __future__ import annotations

from collections import deque

from embedwire.errors import ProtocolViolation
from embedwire.limits import AUX_TOTAL_TOKENS
from embedwire.protocol.actions import Address, Drain, Round
from embedwire.protocol.messages import (
    Abort,
    Announce,
    Cause,
    Done,
    Init,
    Open,
    ResumeTransfer,
    RoomKey,
    RoomMessage,
    Status,
)
from embedwire.protocol.states import (
    LIVE,
    POLL_OF,
    RECEIVER_TABLE,
    STATUS_POLLS,
    Machine,
    Poll,
    ReceiverEvent,
    ReceiverState,
)
from embedwire.protocol.topology import ONLY_LANE, Lane


class CorruptRoom(Exception):
    """What arrived is not what was sent. Ends the room with cause ``corrupt``."""


class ReceiverTransfer:
    """A room that this side asked for. ``landed_tokens`` and ``drained_tokens`` are contiguous prefixes; they only grow."""

    def __init__(
        self,
        key: RoomKey,
        address: Address,
        *,
        lane: Lane = ONLY_LANE,
        item: bytes = b"",
        opened_at: float,
    ) -> None:
        self.key = key
        self.lane = lane
        self.item = item
        self.address = address
        self.opened_at = opened_at
        self.ready_at = self.granted_at = opened_at
        self.machine: Machine[ReceiverState, ReceiverEvent] = Machine(RECEIVER_TABLE, ReceiverState.OPENING)
        self.announced: Announce | None = None
        self.granted_tokens = 0
        self.landed_tokens = 0
        self.draining_tokens = 0
        self.drained_tokens = 0
        self.open_rounds: deque[Round] = deque()
        self.round_sizes: list[int] = []
        self.quarantined: list[Round] = []
        self.end: tuple[Cause, str] | None = None
        self.deadline = opened_at
        self.wait_s = 0.0
        self.wire = ""

    def __repr__(self) -> str:
        progress = f"tokens={self.landed_tokens}/{self.total_tokens or '?'} rounds={len(self.round_sizes)}"
        return (
            f"<ReceiverTransfer room={self.key.room} attempt={self.key.attempt} lane={self.key.lane} "
            f"{self.state.value} {progress} from={self.address}>"
        )

    @property
    def state(self) -> ReceiverState:
        return self.machine.state

    @property
    def poll(self) -> Poll:
        return POLL_OF[self.state]

    @property
    def is_live(self) -> bool:
        return self.state in LIVE

    @property
    def is_ready(self) -> bool:
        """Announced, and its source can be written from."""
        return self.announced is not None and self.announced.ready

    @property
    def total_tokens(self) -> int:
        """0 as long as it was not announced."""
        return 0 if self.announced is None else self.announced.total_tokens

    @property
    def first_row(self) -> int:
        """Where its tokens begin in the room's assembly."""
        return 0 if self.announced is None else self.lane.share(self.announced.aux[AUX_TOTAL_TOKENS]).start

    @property
    def remaining_tokens(self) -> int:
        """Tokens that no grant covers yet."""
        return self.total_tokens - self.granted_tokens

    def on_announce(self, announce: Announce) -> bool:
        """The room's facts. True when they are new, or the source has become ready. Raises ProtocolViolation when they changed."""
        known = self.announced
        if known is None:
            whole = announce.aux[AUX_TOTAL_TOKENS]
            if whole < 1 or len(self.lane.share(whole)) != announce.total_tokens:
                part = f", part {self.lane.part} of {self.lane.parts}" if self.lane.parts > 1 else ""
                raise ProtocolViolation(f"announced {announce.total_tokens} tokens, aux says {whole}{part}")
            self.machine.step(ReceiverEvent.ANNOUNCED)
            self.announced = announce
            return True
        if (announce.total_tokens, announce.aux, announce.content_hash) != (
            known.total_tokens,
            known.aux,
            known.content_hash,
        ):
            raise ProtocolViolation(
                f"announced {known.total_tokens} tokens first, then {announce.total_tokens} or another content"
            )
        if announce.ready and not known.ready:
            self.announced = announce
            return True
        return False

    def grant(self, block_indices: tuple[int, ...], *, block_size: int, ticket: int) -> Round:
        """Open the next round on blocks that were allocated for it."""
        tokens = min(len(block_indices) * block_size, self.remaining_tokens)
        assert tokens > 0, "a grant with nothing left to send"
        self.machine.step(ReceiverEvent.GRANTED)
        new = Round(len(self.round_sizes), self.granted_tokens, tokens, block_indices, ticket)
        self.open_rounds.append(new)
        self.round_sizes.append(tokens)
        self.granted_tokens = new.end_token
        return new

    def check_status(self, status: Status) -> None:
        """Raise ProtocolViolation for a poll or round that no sender of this room can report. What is merely late passes.

        A status is sent in answer to an early ``open`` (BOOTSTRAPPING), or at an event of a granted round."""
        poll, number = status.poll, status.round
        if poll not in STATUS_POLLS:
            raise ProtocolViolation(
                f"status with poll {poll.name}; legal are {', '.join(p.name for p in STATUS_POLLS)}"
            )
        if poll is not Poll.TRANSFERRING and status.sent_tokens:
            raise ProtocolViolation(f"status with poll {poll.name} and {status.sent_tokens} tokens sent")
        rounds = len(self.round_sizes)
        if number >= rounds and (poll is not Poll.BOOTSTRAPPING or number):
            raise ProtocolViolation(f"status of round {number}; {rounds} rounds were granted")

    def on_progress(self, sent_tokens: int) -> bool:
        """How far the sender has got. True when that is news."""
        if sent_tokens > self.granted_tokens:
            raise ProtocolViolation(f"{sent_tokens} tokens sent, but only {self.granted_tokens} were granted")
        is_news = sent_tokens > self.landed_tokens
        self.landed_tokens = max(self.landed_tokens, sent_tokens)
        return is_news

    def take_drains(self) -> list[Drain]:
        """What has landed and is not being drained yet, a piece a round."""
        drains = []
        for granted in self.open_rounds:
            first = max(self.draining_tokens, granted.start_token)
            last = min(self.landed_tokens, granted.end_token)
            if first < last:
                drains.append(
                    Drain(self.key, granted, first, last, self.first_row, last == self.total_tokens)
                )
                self.draining_tokens = last
        return drains

    def on_drained(
        self, to_token: int, *, aux: tuple[int, ...] | None, digests: tuple[int, ...] | None
    ) -> None:
        """Tokens up to ``to_token`` are in the assembly. ``aux`` comes with the first of the room, ``digests`` with the last.
        Raises CorruptRoom when either is not the announced one."""
        assert self.announced is not None
        self.drained_tokens = to_token
        if aux is not None and aux != self.announced.aux:
            raise CorruptRoom(f"aux arrived as {list(aux)}, announced was {list(self.announced.aux)}")
        if digests is not None and digests != self.announced.digests:
            raise CorruptRoom(f"sums of what arrived are {digests}, announced were {self.announced.digests}")

    def pop_round_done(self) -> Round | None:
        """The oldest open round, once it is drained; its blocks are the caller's to free."""
        if self.open_rounds and self.open_rounds[0].end_token <= self.drained_tokens:
            return self.open_rounds.popleft()
        return None

    def fail(self, cause: Cause, detail: str) -> None:
        """End it without its embedding. Blocks of open rounds go to ``quarantined``: the caller decides what becomes of them."""
        self.machine.step(ReceiverEvent.FAILED)
        self.end = (cause, detail)
        self.quarantined = list(self.open_rounds)
        self.open_rounds.clear()

    def questions(self, *, source: int, target: int, block_size: int) -> list[RoomMessage]:
        """What the room waits for an answer to: nothing while it waits for our own memory."""
        match self.state:
            case ReceiverState.FILLING:
                return [
                    self.grant_message(granted, block_size=block_size, source=source, target=target)
                    for granted in self.open_rounds
                ]
            case ReceiverState.CLOSING:
                return [Done(source=source, target=target, **self.key._asdict())]
            case ReceiverState.ABORTING if self.end is not None:
                cause, detail = self.end
                return [Abort(source=source, target=target, **self.key._asdict(), cause=cause, detail=detail)]
            case ReceiverState.OPENING | ReceiverState.WAITING if not self.is_ready:
                return [Open(source=source, target=target, **self.key._asdict(), item=self.item)]
        return []

    def grant_message(
        self, granted: Round, *, block_size: int, source: int, target: int
    ) -> Init | ResumeTransfer:
        """A round as a message: ``init`` for the first, ``resume_transfer`` for every later one."""
        kind = Init if granted.number == 0 else ResumeTransfer
        return kind(
            source=source,
            target=target,
            **self.key._asdict(),
            round=granted.number,
            start_token=granted.start_token,
            allocated_tokens=len(granted.block_indices) * block_size,
            block_indices=granted.block_indices,
            ticket=granted.ticket,
        )
