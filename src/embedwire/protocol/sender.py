"""One lane on the sending side: what was granted, what has landed, and whether a write is under way; and the room that lanes make up.

Called by ``sender_core`` only, which exchanges the messages. Raises ProtocolViolation for what a receiver may not ask for; then
nothing has changed but the story.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from embedwire.errors import ProtocolViolation
from embedwire.limits import AUX_TOTAL_TOKENS, OPEN_ROUNDS_MAX
from embedwire.protocol.actions import LaneReport, Peer, Round
from embedwire.protocol.messages import Announce, Cause, Grant, RoomKey, Status
from embedwire.protocol.states import POLL_OF, SENDER_TABLE, Machine, Poll, SenderEvent, SenderState


@dataclass(eq=False, slots=True, repr=False)
class SenderRoom:
    """A room that this side offers: its lanes that begin here and have not ended, the reports of those that have, and the cause of its
    end once a lane has failed."""

    key: RoomKey
    lanes: dict[RoomKey, SenderTransfer] = field(default_factory=dict)
    reports: list[LaneReport] = field(default_factory=list)
    end: tuple[Cause, str] = (Cause.DONE, "")

    def __repr__(self) -> str:
        lanes = " ".join(map(repr, self.lanes.values()))
        return f"<SenderRoom room={self.key.room} attempt={self.key.attempt} end={self.end[0].value} lanes=[{lanes}]>"


class SenderTransfer:
    """One lane of a room. Its token 0 is the room's token ``first_row``. ``sent_tokens`` is the contiguous landed prefix; it only grows."""

    def __init__(
        self,
        key: RoomKey,
        *,
        total_tokens: int,
        aux: tuple[int, ...],
        content_hash: bytes,
        first_row: int = 0,
    ) -> None:
        assert aux[AUX_TOTAL_TOKENS] >= first_row + total_tokens
        self.key = key
        self.first_row = first_row
        self.total_tokens = total_tokens
        self.aux = aux
        self.content_hash = content_hash
        self.machine: Machine[SenderState, SenderEvent] = Machine(SENDER_TABLE, SenderState.OFFERED)
        self.peer: Peer | None = None
        self.is_ready = False
        self.source_ms = 0.0
        self.granted_tokens = 0
        self.sent_tokens = 0
        self.rounds: list[Round] = []
        self.landed_tokens: dict[int, int] = {}
        self.digests: tuple[int, ...] = ()
        self.write_attempts: dict[int, int] = {}
        self.lost_rounds: dict[int, str] = {}
        self.writes_under_way = 0
        self.end: tuple[Cause, str] | None = None
        self.is_certain = True

    def __repr__(self) -> str:
        progress = f"tokens={self.sent_tokens}/{self.total_tokens} rounds={len(self.rounds)}"
        receiver = "" if self.peer is None else f" receiver={self.peer:x}"
        return (
            f"<SenderTransfer room={self.key.room} attempt={self.key.attempt} lane={self.key.lane} "
            f"{self.state.value} {progress}{receiver}>"
        )

    @property
    def state(self) -> SenderState:
        return self.machine.state

    @property
    def poll(self) -> Poll:
        return POLL_OF[self.state]

    @property
    def open_rounds(self) -> list[Round]:
        """Rounds that are granted and have not landed whole."""
        open_rounds = []
        for granted in reversed(self.rounds):
            if granted.end_token <= self.sent_tokens:
                break
            open_rounds.append(granted)
        return open_rounds[::-1]

    def on_open(self, peer: Peer) -> None:
        """A receiver asked for the room: from now on it belongs to that one."""
        if self.peer is None:
            self.peer = peer
            self.machine.step(SenderEvent.OPENED)

    def on_ready(self, source_ms: float, digests: tuple[int, ...]) -> None:
        """The source can be written from; ``digests`` are of all of it."""
        self.is_ready = True
        self.digests = digests
        self.source_ms = source_ms

    def on_grant(self, grant: Grant, *, block_size: int, num_blocks: int) -> Round | None:
        """The new round, or None when the grant is one already known, or one that came before its predecessor."""
        if grant.round != len(self.rounds):
            if grant.round < len(self.rounds) and self.rounds[grant.round].ticket != grant.ticket:
                raise ProtocolViolation(f"round {grant.round} was granted twice, under different tickets")
            return None
        self._check(grant, block_size=block_size, num_blocks=num_blocks)
        tokens = min(grant.allocated_tokens, self.total_tokens - self.granted_tokens)
        new = Round(grant.round, grant.start_token, tokens, grant.block_indices, grant.ticket)
        self.machine.step(SenderEvent.GRANTED)
        self.rounds.append(new)
        self.granted_tokens = new.end_token
        return new

    def _check(self, grant: Grant, *, block_size: int, num_blocks: int) -> None:
        blocks = grant.block_indices
        if self.granted_tokens >= self.total_tokens:
            raise ProtocolViolation(
                f"round {grant.round}: nothing is left to send, all {self.total_tokens} tokens were granted"
            )
        if not self.machine.can(SenderEvent.GRANTED):
            raise ProtocolViolation(f"a grant for a room that is {self.state.value}")
        if grant.start_token != self.granted_tokens:
            raise ProtocolViolation(
                f"round {grant.round} starts at token {grant.start_token}, expected {self.granted_tokens}"
            )
        if grant.allocated_tokens != len(blocks) * block_size:
            raise ProtocolViolation(
                f"{grant.allocated_tokens} tokens announced for {len(blocks)} blocks of {block_size}: {len(blocks) * block_size}"
            )
        if max(blocks) >= num_blocks or len(set(blocks)) != len(blocks):
            raise ProtocolViolation(
                f"round {grant.round}: blocks out of range 0..{num_blocks - 1}, or one twice"
            )
        if len(self.open_rounds) >= OPEN_ROUNDS_MAX:
            raise ProtocolViolation(f"more than {OPEN_ROUNDS_MAX} rounds open at a time")

    def on_landed(self, number: int, landed_tokens: int) -> bool:
        """Tokens of a round that have landed so far. True when ``sent_tokens`` grew."""
        self.landed_tokens[number] = max(landed_tokens, self.landed_tokens.get(number, 0))
        before = self.sent_tokens
        for granted in self.open_rounds:  # a lost write is tried again, behind others: there may be gaps
            self.sent_tokens = granted.start_token + self.landed_tokens.get(granted.number, 0)
            if self.sent_tokens < granted.end_token:
                break
        return self.sent_tokens > before

    def on_round_landed(self, number: int) -> bool:
        """A round has landed whole. True when ``sent_tokens`` grew."""
        is_news = self.on_landed(number, self.rounds[number].tokens)
        for memory in (self.landed_tokens, self.write_attempts):
            memory.pop(number - OPEN_ROUNDS_MAX, None)
        if self.sent_tokens == self.total_tokens and not self.writes_under_way:
            self.machine.step(SenderEvent.ALL_LANDED)
        return is_news

    def fail(self, cause: Cause, detail: str) -> None:
        """End it, once: the first cause stays. It has ended only when its writes have returned."""
        if self.machine.can(SenderEvent.FAILED):
            self.machine.step(SenderEvent.FAILED)
            self.end = (cause, detail)

    def on_done(self) -> None:
        """The receiver has all of it. Raises ProtocolViolation before everything has landed."""
        if not self.machine.can(SenderEvent.DONE_HEARD):
            raise ProtocolViolation(
                f"done after {self.sent_tokens} of {self.total_tokens} tokens, room {self.state.value}"
            )
        self.machine.step(SenderEvent.DONE_HEARD)
        self.end = (Cause.DONE, "")

    def announcement(self, source: int, target: int) -> Announce:
        """The room's facts, as a message."""
        return Announce(
            source=source,
            target=target,
            **self.key._asdict(),
            total_tokens=self.total_tokens,
            aux=self.aux,
            content_hash=self.content_hash,
            ready=self.is_ready,
            digests=self.digests,
            source_ms=self.source_ms,
        )

    def status(self, source: int, target: int, *, number: int) -> Status:
        """How far it has got, at an event of round ``number``."""
        return Status(
            source=source,
            target=target,
            **self.key._asdict(),
            poll=self.poll,
            round=number,
            sent_tokens=self.sent_tokens,
        )
