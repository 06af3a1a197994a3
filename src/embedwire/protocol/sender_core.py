"""All rooms and sessions of one sender: which lanes make up a room, who may ask for what, deadlines, the memory of ended rooms. No wires.

A lane is what this rank sends of a room to one rank of the receiver. It has messages, rounds and an end of its own. A room ends with the
last of its lanes, and a lane that fails ends the others.

Called by one driver thread (``endpoint.sender``) or by the simulation. Every public method returns the actions that follow.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass

from embedwire.errors import OverloadedError, ProtocolViolation, UsageError
from embedwire.limits import DEFAULT_LIMITS, Limits
from embedwire.protocol.actions import (
    Attach,
    CancelWrites,
    Detach,
    LaneReport,
    Peer,
    Release,
    Reply,
    Round,
    SenderAction,
    Want,
    Write,
)
from embedwire.protocol.handshake import Problem, SenderSession, problem_with_hello, refusal
from embedwire.protocol.messages import (
    Abort,
    Cause,
    Done,
    Ended,
    Grant,
    Hello,
    Kept,
    Message,
    Open,
    Ping,
    Pong,
    RoomKey,
    RoomMessage,
    Status,
    Stranger,
    ToSender,
    cut,
)
from embedwire.protocol.sender import SenderRoom, SenderTransfer
from embedwire.protocol.states import HOLDS_SOURCE, Poll, SenderEvent, SenderState
from embedwire.protocol.timers import Timers
from embedwire.protocol.tombstones import Tombstone, Tombstones
from embedwire.protocol.topology import lanes_of_sender


@dataclass(frozen=True, slots=True)
class SenderSnapshot:
    """``lanes`` counts lanes by state; ``sessions`` are receivers attached or about to be."""

    lanes: Mapping[str, int]
    sessions: int


class SenderCore:
    """The sending side of the protocol, for any number of rooms and receivers."""

    def __init__(
        self,
        *,
        incarnation: int,
        fields: tuple[str, ...],
        limits: Limits = DEFAULT_LIMITS,
        rank: int = 0,
        ranks: int = 1,
    ) -> None:
        self.incarnation = incarnation
        self.rank = rank
        self.ranks = ranks
        self.fields = fields
        self.limits = limits
        self.rooms: dict[RoomKey, SenderRoom] = {}
        self.transfers: dict[RoomKey, SenderTransfer] = {}
        self.sessions: dict[Peer, SenderSession] = {}
        self._pending_opens: dict[RoomKey, Peer] = {}
        self._tombstones = Tombstones(limits.tombstones_max)
        self._timers: Timers[RoomKey | Peer] = Timers()
        self._actions: list[SenderAction] = []

    # ------------------------------------------------------------------ what the owner of the source says

    def shares(self, key: RoomKey, total_tokens: int, *, readers: int = 1) -> dict[RoomKey, range]:
        """The lanes of a room that begin at this rank, each with its tokens of the room; ``readers`` are the ranks of the receiver that
        receive from the wire. Depends on nothing that changes, so any thread may call it."""
        lanes = lanes_of_sender(self.rank, senders=self.ranks, readers=readers)
        return {key._replace(lane=lane.number): lane.share(total_tokens) for lane in lanes}

    def check_offer(self, keys: Collection[RoomKey]) -> None:
        """Raise what offering these lanes would: UsageError for a known key, OverloadedError over ``rooms_max``."""
        self.check_known(keys)
        if len(self.transfers) + len(keys) > self.limits.rooms_max:
            raise OverloadedError(
                f"{len(self.transfers)} rooms are offered; at most {self.limits.rooms_max} at a time"
            )

    def check_known(self, keys: Collection[RoomKey]) -> None:
        """Raise UsageError for a lane that was offered before."""
        for key in keys:
            if key in self.transfers or key in self._tombstones:
                raise UsageError(f"room {key.room} attempt {key.attempt} was offered before")

    def offer(
        self,
        key: RoomKey,
        *,
        total_tokens: int,
        aux: tuple[int, ...],
        content_hash: bytes,
        now: float,
        readers: int = 1,
        digests: Mapping[RoomKey, tuple[int, ...]] | None = None,
    ) -> list[SenderAction]:
        """A room whose source memory is reserved; with ``digests`` (of :meth:`ready`) it can be written from already. Raises as
        :meth:`check_offer` does."""
        shares = self.shares(key, total_tokens, readers=readers)
        self.check_offer(shares)
        room = self.rooms[key] = SenderRoom(key)
        for lane_key, share in shares.items():
            lane = SenderTransfer(
                lane_key,
                total_tokens=len(share),
                aux=aux,
                content_hash=content_hash,
                first_row=share.start,
            )
            if digests is not None:
                lane.on_ready(0.0, digests[lane_key])
            room.lanes[lane_key] = self.transfers[lane_key] = lane
            self._timers.set(lane_key, now + self.limits.open_wait_s)
        for lane in list(room.lanes.values()):
            peer = self._pending_opens.pop(lane.key, None)
            if peer is not None and peer in self.sessions:
                self._on_open(lane, peer, now)
        return self._take()

    def ready(
        self, key: RoomKey, *, source_ms: float, digests: Mapping[RoomKey, tuple[int, ...]], now: float
    ) -> list[SenderAction]:
        """The source of a room can be written from; ``digests`` are, for each lane, one XXH3-64 a field over the lane's tokens.

        Harmless when it was ready before, or the room has ended."""
        room = self.rooms.get(key)
        for lane in [] if room is None else list(room.lanes.values()):
            if lane.end is None and not lane.is_ready:
                lane.on_ready(source_ms, digests[lane.key])
                self._on_ready(lane, now)
        return self._take()

    def _on_ready(self, lane: SenderTransfer, now: float) -> None:
        if lane.peer is not None:
            self._say(lane.peer, lane.announcement(self.incarnation, lane.peer))
            self._await_progress(lane, now)
            for granted in lane.open_rounds:
                self._write(lane, granted)

    def fail(
        self, key: RoomKey, cause: Cause, detail: str, *, now: float, readers: int = 1
    ) -> list[SenderAction]:
        """End a room from this side, also one that was never offered: a receiver that opens it gets the cause at once. Harmless when it
        has ended."""
        room = self.rooms.get(key)
        if room is not None:
            for lane in list(room.lanes.values()):
                self._fail(lane, cause, detail, now)
        else:
            if key in self._pending_opens:  # for an item: as lane 0, which may be another rank's by topology
                self._refuse(key, cause, detail)
            for lane_key in self.shares(key, 1, readers=readers):
                self._refuse(lane_key, cause, detail)
        return self._take()

    def _refuse(self, key: RoomKey, cause: Cause, detail: str) -> None:
        """End a lane that was never offered."""
        if key in self._tombstones:
            return
        self._tombstones.bury(key, Tombstone(cause, cut(detail), is_certain=True))
        peer = self._pending_opens.pop(key, None)
        if peer is not None:
            self._timers.clear(key)
            self._end(peer, key, cause, detail)

    def keep(self, content_hash: bytes, *, tokens: int) -> list[SenderAction]:
        """There is an item under this hash now: tell those who subscribe."""
        for peer, session in self.sessions.items():
            if session.subscribes and session.wire is not None:
                kept = Kept(source=self.incarnation, target=peer, content_hash=content_hash, tokens=tokens)
                self._say(peer, kept)
        return self._take()

    # ------------------------------------------------------------------ what receivers say

    def on_message(self, message: ToSender, *, now: float) -> list[SenderAction]:
        """Take one decoded message. Nothing that a peer sends raises."""
        peer = message.source
        if isinstance(message, Hello):
            self._on_hello(message, now)
            return self._take()
        session = self.sessions.get(peer)
        if session is None or message.target != self.incarnation:
            self._say(peer, Stranger(source=self.incarnation, target=peer))
            return self._take()
        session.heard_at = now
        if isinstance(message, Ping):
            self._say(peer, Pong(source=self.incarnation, target=peer))
        elif session.wire is not None:
            self._on_room_message(message, peer, now)
        return self._take()

    def _on_hello(self, hello: Hello, now: float) -> None:
        peer = hello.source
        problem = self._problem_with(hello)
        if problem is not None:
            self._say(peer, refusal(peer, hello.nonce, problem, source=self.incarnation))
            return
        session = self.sessions.get(peer)
        if session is None:
            self.sessions[peer] = SenderSession(hello, hello.nonce, now, hello.subscribes)
            self._timers.set(peer, now + self.limits.peer_silence_s)
            self._actions.append(Attach(peer, hello))
            return
        session.heard_at, session.nonce = now, hello.nonce
        session.subscribes |= hello.subscribes
        if session.wire is not None:
            self._welcome(peer, session.wire)

    def _problem_with(self, hello: Hello) -> Problem | None:
        problem = problem_with_hello(hello, self.fields)
        if (
            problem is None
            and hello.source not in self.sessions
            and len(self.sessions) >= self.limits.sessions_max
        ):
            return Cause.OVERLOADED, f"{len(self.sessions)} receivers; at most {self.limits.sessions_max}"
        return problem

    def on_attached(self, peer: Peer, wire: str) -> list[SenderAction]:
        """The receiver's memory is in reach."""
        session = self.sessions.get(peer)
        if session is None:
            self._actions.append(Detach(peer))
        else:
            session.wire = wire
            self._welcome(peer, wire)
        return self._take()

    def on_attach_failed(self, peer: Peer, detail: str, *, now: float) -> list[SenderAction]:
        """No wire reaches the receiver: it is refused, or lost where one did before."""
        session = self.sessions.get(peer)
        if session is not None and session.wire is not None:
            self._lose(peer, detail, now)
        elif session is not None:
            del self.sessions[peer]
            self._timers.clear(peer)
            self._say(
                peer, refusal(peer, session.nonce, (Cause.WIRE_FAILED, detail), source=self.incarnation)
            )
        return self._take()

    def _welcome(self, peer: Peer, wire: str) -> None:
        self._say(peer, self.sessions[peer].welcome(self.fields, source=self.incarnation, wire=wire))

    def _on_room_message(self, message: RoomMessage, peer: Peer, now: float) -> None:
        room = self.transfers.get(message.key)
        if room is None:
            self._on_unknown_room(message, peer, now)
        elif room.peer not in (None, peer):
            self._end(peer, message.key, Cause.VIOLATION, "another receiver has opened this room")
        else:
            try:
                self._on_message_of(room, message, peer, now)
            except ProtocolViolation as violation:
                self._fail(room, Cause.VIOLATION, str(violation), now)

    def _on_unknown_room(self, message: RoomMessage, peer: Peer, now: float) -> None:
        key = message.key
        tombstone = self._tombstones.visit(key)
        if tombstone is not None:
            self._end(peer, key, tombstone.cause, tombstone.detail, certain=tombstone.is_certain)
        elif not isinstance(message, Open):
            self._end(
                peer, key, Cause.UNKNOWN_ROOM, f"room {key.room} attempt {key.attempt} is not known here"
            )
        elif key in self._pending_opens or len(self._pending_opens) < self.limits.pending_opens_max:
            if key not in self._pending_opens:
                if message.item and key.lane:
                    self._end(peer, key, Cause.VIOLATION, f"an item is sent as lane 0, not {key.lane}")
                    return
                self._timers.set(key, now + self.limits.open_wait_s)
                if message.item:
                    self._actions.append(Want(key, message.item))
            self._pending_opens[key] = peer
            poll = Poll.BOOTSTRAPPING
            self._say(peer, Status(source=self.incarnation, target=peer, poll=poll, **key._asdict()))
        else:
            self._end(peer, key, Cause.OVERLOADED, f"{len(self._pending_opens)} opens wait for their room")

    def _on_message_of(self, room: SenderTransfer, message: RoomMessage, peer: Peer, now: float) -> None:
        if isinstance(message, Abort):
            if message.cause is Cause.DONE:
                raise ProtocolViolation("an abort whose cause is that all is well")
            room.peer = peer  # also when its `open` was lost: who ends a room hears of the end
            self._fail(room, message.cause, message.detail or "the receiver ended it", now)
        elif room.state is SenderState.ENDING:
            pass  # `ended` follows when its writes have returned
        elif isinstance(message, Open):
            self._on_open(room, peer, now)
        elif isinstance(message, Done):
            room.on_done()
            self._forget(room)
        elif isinstance(message, Grant):
            self._on_grant(room, message, peer, now)

    def _on_open(self, room: SenderTransfer, peer: Peer, now: float) -> None:
        if room.peer is None:
            room.on_open(peer)
            session = self.sessions[peer]
            if not session.rooms:  # from now on its silence is short
                self._timers.set(peer, session.heard_at + self.limits.peer_silence_s)
            session.rooms.add(room.key)
            self._await_progress(room, now)
        self._say(peer, room.announcement(self.incarnation, peer))

    def _on_grant(self, room: SenderTransfer, grant: Grant, peer: Peer, now: float) -> None:
        hello = self.sessions[peer].hello
        granted = room.on_grant(grant, block_size=hello.block_size, num_blocks=hello.num_blocks)
        if granted is None:
            self._say(peer, room.status(self.incarnation, peer, number=min(grant.round, len(room.rounds))))
            if grant.round in room.lost_rounds:
                self._write_again(room, grant.round, now)
            return
        if room.is_ready:
            self._write(room, granted)
        self._await_progress(room, now)

    # ------------------------------------------------------------------ what the wire says

    def on_landed(self, key: RoomKey, number: int, landed_tokens: int, *, now: float) -> list[SenderAction]:
        """So many tokens of a round have landed; the write goes on."""
        room = self.transfers.get(key)
        if room is not None and room.state is SenderState.WRITING and room.on_landed(number, landed_tokens):
            self._report(room, number, now)
        return self._take()

    def on_written(self, key: RoomKey, number: int, *, now: float) -> list[SenderAction]:
        """A write returned: the whole round has landed."""
        room = self._write_returned(key)
        if room.state is SenderState.WRITING and room.on_round_landed(number):
            self._report(room, number, now)
        self._settle(room)
        return self._take()

    def on_write_lost(self, key: RoomKey, number: int, detail: str, *, now: float) -> list[SenderAction]:
        """A write returned, and what was not reported as landed never will. It is tried again, a few times, when the receiver asks
        again: that it still does is the proof that the grant still stands, and was not revoked by an end that is on its way."""
        room = self._write_returned(key)
        if room.state is SenderState.WRITING:
            room.lost_rounds[number] = detail
        self._settle(room)
        return self._take()

    def on_write_unknown(self, key: RoomKey, number: int, detail: str, *, now: float) -> list[SenderAction]:
        """A write returned, and it may still land: the receiver has to keep its blocks in quarantine."""
        room = self._write_returned(key)
        room.is_certain = False
        self._fail(room, Cause.WIRE_FAILED, detail, now)
        self._settle(room)
        return self._take()

    def on_doubt_ended(self, peer: Peer, key: RoomKey) -> list[SenderAction]:
        """Proof has come that a write which returned as unknown can not land any more: the wire that it went over was closed."""
        room, tombstone = self.transfers.get(key), self._tombstones.visit(key)
        if room is not None:
            room.is_certain = True
        elif tombstone is not None:
            tombstone.is_certain = True
            self._end(peer, key, tombstone.cause, tombstone.detail)
        return self._take()

    def _write(self, room: SenderTransfer, granted: Round) -> None:
        assert room.peer is not None
        room.writes_under_way += 1
        room.write_attempts[granted.number] = room.write_attempts.get(granted.number, 0) + 1
        landed = room.landed_tokens.get(granted.number, 0)
        self._actions.append(Write(room.peer, room.key, granted, landed, room.first_row))

    def _write_again(self, room: SenderTransfer, number: int, now: float) -> None:
        detail = room.lost_rounds.pop(number)
        if room.write_attempts[number] < self.limits.write_attempts_max:
            self._write(room, room.rounds[number])
        else:
            self._fail(room, Cause.WIRE_FAILED, detail, now)

    def _write_returned(self, key: RoomKey) -> SenderTransfer:
        room = self.transfers[key]  # a room stays until its writes have returned
        room.writes_under_way -= 1
        assert room.writes_under_way >= 0
        return room

    def _report(self, room: SenderTransfer, number: int, now: float) -> None:
        assert room.peer is not None
        self._say(room.peer, room.status(self.incarnation, room.peer, number=number))
        self._await_progress(room, now)

    # ------------------------------------------------------------------ time, ends

    def snapshot(self) -> SenderSnapshot:
        """Counts for statistics."""
        return SenderSnapshot(
            lanes=Counter(lane.state.value for lane in self.transfers.values()), sessions=len(self.sessions)
        )

    def next_due(self) -> float | None:
        """When ``on_tick`` has something to do."""
        return self._timers.next_due()

    def on_tick(self, now: float) -> list[SenderAction]:
        """Carry out what is due."""
        for due in self._timers.pop_due(now):
            if not isinstance(due, RoomKey):
                self._on_peer_due(due, now)
            elif due in self._pending_opens:
                peer = self._pending_opens.pop(due)
                self._end(
                    peer, due, Cause.UNKNOWN_ROOM, f"nobody offered it within {self.limits.open_wait_s} s"
                )
            elif due in self.transfers:
                room = self.transfers[due]
                self._fail(
                    room, Cause.DEADLINE, f"nothing happened in time while it was {room.state.value}", now
                )
        return self._take()

    def _await_progress(self, room: SenderTransfer, now: float) -> None:
        limits = self.limits
        if room.end is not None:
            self._timers.clear(room.key)
        elif not room.is_ready:
            self._timers.set(room.key, now + limits.source_wait_s)
        elif room.open_rounds:
            self._timers.set(room.key, now + limits.round_s)
        else:  # the receiver drains, waits for assembly or for blocks
            self._timers.set(room.key, now + limits.round_s + limits.blocks_wait_s)

    def _on_peer_due(self, peer: Peer, now: float) -> None:
        session = self.sessions.get(peer)
        if session is None:
            return
        silence = self.limits.peer_silence_s if session.rooms else self.limits.peer_silence_s * 12
        if now < session.heard_at + silence:
            self._timers.set(peer, session.heard_at + silence)
        else:
            self._lose(peer, f"the receiver said nothing for {silence:g} s", now)

    def on_peer_lost(self, peer: Peer, detail: str, *, now: float) -> list[SenderAction]:
        """A receiver's connection is gone for good."""
        if peer in self.sessions:
            self._lose(peer, detail, now)
        return self._take()

    def _lose(self, peer: Peer, detail: str, now: float) -> None:
        session = self.sessions.pop(peer)
        self._timers.clear(peer)
        for key in sorted(session.rooms):
            if key in self.transfers:  # the end of another lane of its room may have ended it
                self._fail(self.transfers[key], Cause.PEER_LOST, detail, now)
        self._actions.append(Detach(peer))

    def close(self, *, now: float) -> list[SenderAction]:
        """End every room and session."""
        for room in list(self.transfers.values()):
            self._fail(room, Cause.CLOSED, "the sender is shutting down", now)
        return self._take()

    def _fail(self, lane: SenderTransfer, cause: Cause, detail: str, now: float) -> None:
        """End a lane, and with it the other lanes of its room. The first cause stays."""
        if not lane.machine.can(SenderEvent.FAILED):
            return
        room = self.rooms[lane.key.of_room]
        room.end = (cause, cut(detail))
        lane.fail(cause, cut(detail))
        self._timers.clear(lane.key)
        if lane.writes_under_way:
            self._actions.append(CancelWrites(lane.key))
        self._settle(lane)
        for other in list(room.lanes.values()):
            self._fail(other, cause, detail, now)

    def _settle(self, room: SenderTransfer) -> None:
        """A failed room is over once its writes have returned: only then is its end told."""
        if room.state is SenderState.ENDING and not room.writes_under_way:
            room.machine.step(SenderEvent.WRITES_RETURNED)
            self._forget(room)

    def _forget(self, room: SenderTransfer) -> None:
        assert room.end is not None
        assert room.state not in HOLDS_SOURCE
        cause, detail = room.end
        del self.transfers[room.key]
        self._timers.clear(room.key)
        self._tombstones.bury(room.key, Tombstone(cause, detail, room.is_certain))
        if room.peer is not None:
            if room.peer in self.sessions:
                self.sessions[room.peer].rooms.discard(room.key)
            self._end(room.peer, room.key, cause, detail, certain=room.is_certain)
        self._end_lane(room)

    def _end_lane(self, lane: SenderTransfer) -> None:
        room = self.rooms[lane.key.of_room]
        del room.lanes[lane.key]
        room.reports.append(LaneReport(lane.key, tuple(granted.tokens for granted in lane.rounds)))
        if not room.lanes:
            del self.rooms[room.key]
            self._actions.append(Release(room.key, *room.end, tuple(room.reports)))

    def _end(self, peer: Peer, key: RoomKey, cause: Cause, detail: str, *, certain: bool = True) -> None:
        ended = Ended(
            source=self.incarnation,
            target=peer,
            **key._asdict(),
            cause=cause,
            detail=cut(detail),
            certain=certain,
        )
        self._say(peer, ended)

    def _say(self, peer: Peer, message: Message) -> None:
        self._actions.append(Reply(peer, message))

    def _take(self) -> list[SenderAction]:
        actions, self._actions = self._actions, []
        return actions
