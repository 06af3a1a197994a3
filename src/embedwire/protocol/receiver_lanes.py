"""All lanes and sessions of one receiving rank. It drives: what it waits for it asks for again, until it has it or gives up.

A lane is what one sender sends to this rank of one room; here it is a room of its own, and is called one. Which lanes make up a room,
and what follows for it, is the part of ``receiver_core``, the only caller. Every public method returns the actions that follow.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

from embedwire.errors import OverloadedError, ProtocolViolation, UsageError
from embedwire.limits import DEFAULT_LIMITS, Limits
from embedwire.protocol.actions import (
    Address,
    Hangup,
    Heard,
    LaneAnnounced,
    LaneEvent,
    LaneFailed,
    LaneWhole,
    Permit,
    ReceiverAction,
    Reconnect,
    Revoke,
    Round,
    Send,
)
from embedwire.protocol.admission import Admission, Blocks
from embedwire.protocol.handshake import Offered, ReceiverSession
from embedwire.protocol.messages import (
    Abort,
    Announce,
    Cause,
    Ended,
    Kept,
    Refused,
    RoomKey,
    RoomMessage,
    Status,
    Stranger,
    ToReceiver,
    Welcome,
    cut,
)
from embedwire.protocol.receiver import CorruptRoom, ReceiverTransfer
from embedwire.protocol.states import ReceiverEvent, ReceiverState
from embedwire.protocol.timers import Timers
from embedwire.protocol.topology import ONLY_LANE, Lane

RESEND_S_MAX = 1.0
"""A message that waits for something slow is sent again at growing intervals, up to this."""
IDLE_S = 60.0
"""A session without rooms is kept this long."""

LaneAction: TypeAlias = ReceiverAction | LaneEvent


class ReceiverLanes:
    """The receiving side of the protocol, for any number of lanes and senders."""

    def __init__(
        self,
        *,
        incarnation: int,
        offered: Offered,
        blocks: Blocks,
        default_allocate_tokens: int,
        limits: Limits = DEFAULT_LIMITS,
    ) -> None:
        self.incarnation = incarnation
        self.offered = offered
        self.limits = limits
        self.transfers: dict[RoomKey, ReceiverTransfer] = {}
        self.sessions: dict[Address, ReceiverSession] = {}
        self.admission = Admission(
            blocks,
            default_allocate_tokens=default_allocate_tokens,
            window_rounds=limits.window_rounds,
        )
        self._tickets = 0
        self._nonces = 0
        self._timers: Timers[RoomKey | Address] = Timers()
        self._actions: list[LaneAction] = []

    # ------------------------------------------------------------------ what the owner of the assembly says

    def check_open(self, keys: Sequence[RoomKey]) -> None:
        """Raise what :meth:`open` would: UsageError for a known key, OverloadedError over ``rooms_max``."""
        for key in keys:
            if key in self.transfers or key in self.admission.quarantined:
                raise UsageError(f"room {key.room} attempt {key.attempt} is open already")
        if len(self.transfers) + len(keys) > self.limits.rooms_max:
            raise OverloadedError(
                f"{len(self.transfers)} rooms are open; at most {self.limits.rooms_max} at a time"
            )

    def open(
        self, key: RoomKey, address: Address, *, lane: Lane = ONLY_LANE, item: bytes = b"", now: float
    ) -> list[LaneAction]:
        """Ask the sender at ``address`` for a lane. Raises as :meth:`check_open` does."""
        self.check_open((key,))
        room = ReceiverTransfer(key, address, lane=lane, item=item, opened_at=now)
        self.transfers[key] = room
        session = self._session(address, now)
        was_idle = not session.rooms
        session.rooms.add(key)
        if was_idle:
            session.heard_at = now  # silence counts from the first question on
            if session.wire is None:
                self._ask_session(address, session, now)
            else:
                self._timers.set(address, now + self.limits.peer_silence_s / 4)
        self._ask(room)
        self._await(room, self.limits.open_wait_s + self.limits.peer_silence_s, now)
        return self._take()

    def _session(self, address: Address, now: float) -> ReceiverSession:
        session = self.sessions.get(address)
        if session is None:
            session = self.sessions[address] = ReceiverSession(now, self._next_nonce())
        return session

    def subscribe(self, address: Address, *, now: float) -> list[LaneAction]:
        """Hear of the items that the sender at ``address`` will keep from now on. The session is kept up, and begun anew when the sender
        is."""
        session = self._session(address, now)
        if not session.subscribes:
            session.subscribes = True
            session.wire, session.nonce = None, self._next_nonce()
            self._ask_session(address, session, now)
        return self._take()

    def abort(self, key: RoomKey, cause: Cause, detail: str, *, now: float) -> list[LaneAction]:
        """End a room from this side. Harmless when it is over."""
        room = self.transfers.get(key)
        if room is not None and room.is_live:
            self._fail(room, cause, detail, now)
        return self._take()

    def admit(self, key: RoomKey, *, now: float) -> list[LaneAction]:
        """The assembly that a lane is a part of is there: it may have blocks. Harmless when the lane has ended."""
        room = self.transfers.get(key)
        if room is not None and room.is_live:
            self.admission.join(room)
            self._pump(now)
        return self._take()

    # ------------------------------------------------------------------ what senders say

    def on_message(self, message: ToReceiver, address: Address, *, now: float) -> list[LaneAction]:
        """Take one decoded message that came from ``address``. Nothing that a peer sends raises."""
        session = self.sessions.get(address)
        if session is None or message.target != self.incarnation:
            return []
        if isinstance(message, Welcome):
            self._on_welcome(message, address, session, now)
        elif isinstance(message, Stranger):
            self._on_stranger(address, session, now)
        elif isinstance(message, Refused):
            if session.wire is None and message.nonce == session.nonce:
                session.heard_at = now
                cause = Cause.VIOLATION if message.cause is Cause.DONE else message.cause
                self._fail_all(session, cause, f"refused: {message.detail}", now)
        elif message.source == session.incarnation:
            session.heard_at = now
            if isinstance(message, RoomMessage):
                self._on_room_message(message, address, now)
            elif isinstance(message, Kept):
                self._on_kept(message)
        return self._take()

    def _on_welcome(self, welcome: Welcome, address: Address, session: ReceiverSession, now: float) -> None:
        if session.wire is not None or welcome.nonce != session.nonce:
            return  # late, and maybe from an earlier life of the sender
        session.heard_at = now
        problem = self.offered.problem_with(welcome)
        if problem is not None:
            self._fail_all(session, *problem, now)
            return
        if session.is_other(welcome, self.offered):  # its rounds end as those of the earlier one
            for room in self._rooms_of(session):
                if room.state is not ReceiverState.OPENING:  # a room that was not announced may yet come
                    self._fail(room, Cause.PEER_LOST, f"the sender at {address} was started anew", now)
        session.begin(welcome, self.offered)
        for key in sorted(session.rooms & self.transfers.keys()):
            self._ask(self.transfers[key])

    def _on_stranger(self, address: Address, session: ReceiverSession, now: float) -> None:
        """Somebody there does not know us, or did not once: the answer to a new hello will tell who it is."""
        session.heard_at = now
        if session.wire is not None:
            session.wire, session.nonce = None, self._next_nonce()
            self._ask_session(address, session, now)

    def _next_nonce(self) -> int:
        self._nonces += 1
        return self._nonces

    def _on_kept(self, kept: Kept) -> None:
        for address, session in self.sessions.items():
            if session.subscribes and session.incarnation == kept.source:
                self._actions.append(Heard(address, kept.content_hash, kept.tokens))

    def _on_room_message(self, message: RoomMessage, address: Address, now: float) -> None:
        """Of a sender that is known under several addresses it may come from any of them."""
        room = self.transfers.get(message.key)
        if room is None or self.sessions[room.address].incarnation != message.source:
            self._on_unknown_room(message, address, now)
        elif isinstance(message, Ended):
            self._on_ended(room, message, now)
        elif room.is_live:
            try:
                if isinstance(message, Announce):
                    self._on_announce(room, message, now)
                elif isinstance(message, Status):
                    room.check_status(message)
                    self._on_progress(room, message.sent_tokens, now)
            except ProtocolViolation as violation:
                self._fail(room, Cause.VIOLATION, str(violation), now)

    def _on_unknown_room(self, message: RoomMessage, address: Address, now: float) -> None:
        if isinstance(message, Ended):
            self._on_certainty(message, now)
        else:
            abort = Abort(
                source=self.incarnation,
                target=message.source,
                **message.key._asdict(),
                cause=Cause.UNKNOWN_ROOM,
            )
            self._actions.append(Send(address, abort))

    def _on_announce(self, room: ReceiverTransfer, announce: Announce, now: float) -> None:
        was_opening = room.state is ReceiverState.OPENING
        is_news = room.on_announce(announce)
        if is_news and room.is_ready:
            room.ready_at = now
            self._await(room, self.limits.blocks_wait_s, now)
        elif was_opening:
            self._await(room, self.limits.source_wait_s, now)
        if is_news:
            self._actions.append(LaneAnnounced(room.key))

    def on_landed(self, key: RoomKey, sent_tokens: int, *, now: float) -> list[LaneAction]:
        """What the wire itself shows of a room's landed prefix, before a status says so. Harmless when the room has ended."""
        room = self.transfers.get(key)
        if room is not None and room.is_live:
            self._on_progress(room, sent_tokens, now)
        return self._take()

    def _on_progress(self, room: ReceiverTransfer, sent_tokens: int, now: float) -> None:
        if room.on_progress(sent_tokens):
            self._await(room, self.limits.round_s, now)
            self._actions.extend(room.take_drains())

    def _on_ended(self, room: ReceiverTransfer, ended: Ended, now: float) -> None:
        if room.is_live:
            cause, detail = ended.cause, ended.detail
            if cause is Cause.DONE:  # it was another try under this key that was, or the sender is wrong
                cause, detail = Cause.UNKNOWN_ROOM, "it was received before"
            self._fail(room, cause, detail, now, is_told=True, is_certain=ended.certain)
            return
        self._on_certainty(ended, now)
        self._confirm(room)

    def _on_certainty(self, ended: Ended, now: float) -> None:
        held = self.admission.quarantined.get(ended.key)
        if ended.certain and held is not None and held.incarnation == ended.source:
            self._end_quarantine(ended.key, now)

    # ------------------------------------------------------------------ what the pool says

    def on_drained(
        self,
        key: RoomKey,
        to_token: int,
        *,
        aux: tuple[int, ...] | None,
        digests: tuple[int, ...] | None,
        now: float,
    ) -> list[LaneAction]:
        """A Drain was carried out: ``aux`` (a copy) comes with the first of a room, ``digests`` of all of it with the last.
        Harmless when the room has ended."""
        room = self.transfers.get(key)
        if room is None or not room.is_live:
            return []
        try:
            room.on_drained(to_token, aux=aux, digests=digests)
        except CorruptRoom as corrupt:
            self._fail(room, Cause.CORRUPT, str(corrupt), now)
        else:
            self._settle_rounds(room, now)
        return self._take()

    def _settle_rounds(self, room: ReceiverTransfer, now: float) -> None:
        """Give back the blocks of what is drained; then the room is whole, or wants more."""
        freed = 0
        while (granted := room.pop_round_done()) is not None:
            self._actions.append(Revoke(room.key, granted.ticket))
            self.admission.give_back(room.address, granted)
            freed += 1
        if not freed:
            return
        if room.open_rounds:
            self.admission.want_more(room)
        elif room.drained_tokens == room.total_tokens:
            self._finish(room, now)
        else:
            room.machine.step(ReceiverEvent.ROUNDS_DRAINED)
            self._await(room, self.limits.blocks_wait_s, now)
            self.admission.rejoin(room)
        self._pump(now)

    def _finish(self, room: ReceiverTransfer, now: float) -> None:
        room.machine.step(ReceiverEvent.ALL_DRAINED)
        room.end = (Cause.DONE, "")
        self._actions.append(LaneWhole(room.key))
        self._ask(room)
        self._await(room, self.limits.close_s, now)

    def _pump(self, now: float) -> None:
        """Hand out blocks."""
        peers = len(self.sessions)  # also those without a room: blocks held by others may never come back
        while (turn := self.admission.next_grant(peers=peers)) is not None:
            room, blocks = turn
            self._tickets += 1
            room.granted_at = room.granted_at if room.round_sizes else now
            room.wire = self.sessions[room.address].wire or room.wire
            granted = room.grant(blocks, block_size=self.offered.block_size, ticket=self._tickets)
            self.admission.want_more(room)
            self._actions.append(Permit(room.key, room.wire, granted))
            self._send_grant(room, granted)
            self._await(room, self.limits.round_s, now)

    # ------------------------------------------------------------------ ends

    def _fail(
        self,
        room: ReceiverTransfer,
        cause: Cause,
        detail: str,
        now: float,
        *,
        is_told: bool = False,
        is_certain: bool = False,
    ) -> None:
        """End a room without its embedding. ``is_told``: it was the sender who said so; ``is_certain``: none of its writes can land."""
        session = self.sessions[room.address]
        room.fail(cause, cut(detail))
        self.admission.leave(room)
        for granted in room.quarantined:
            self._actions.append(Revoke(room.key, granted.ticket))
        if is_certain or session.is_fenced:
            for granted in room.quarantined:
                self.admission.give_back(room.address, granted)
        elif room.quarantined:
            self.admission.quarantine(room, incarnation=session.incarnation)
        self._actions.append(LaneFailed(room.key, cause, room.end[1] if room.end else ""))
        if is_told:
            self._confirm(room)
        else:
            self._ask(room)
            self._await(room, self.limits.close_s, now)
        self._pump(now)

    def _fail_all(self, session: ReceiverSession, cause: Cause, detail: str, now: float) -> None:
        """No session with this sender: its rooms end, and it need not be told."""
        for room in self._rooms_of(session):
            self._fail(room, cause, detail, now, is_told=True)

    def _confirm(self, room: ReceiverTransfer) -> None:
        """The sender knows that the room is over, or has had time enough to hear it."""
        room.machine.step(ReceiverEvent.CONFIRMED)
        del self.transfers[room.key]
        if room.key in self.admission.quarantined:
            return  # its end is still asked for, with the session
        self._timers.clear(room.key)
        self.sessions[room.address].rooms.discard(room.key)

    def _end_quarantine(self, key: RoomKey, now: float) -> None:
        held = self.admission.release(key)
        if key not in self.transfers:
            self._timers.clear(key)
            if held.address in self.sessions:
                self.sessions[held.address].rooms.discard(key)
        self._pump(now)

    def suspects(self) -> frozenset[int]:
        """Incarnations that may still write to quarantined blocks: the driver checks whether they are gone."""
        return frozenset(held.incarnation for held in self.admission.quarantined.values())

    def on_peer_gone(self, incarnation: int, *, now: float) -> list[LaneAction]:
        """Proof that no write of a sender's incarnation can land any more."""
        for key in [k for k, held in self.admission.quarantined.items() if held.incarnation == incarnation]:
            self._end_quarantine(key, now)
        return self._take()

    def on_violation(self, address: Address, detail: str, *, now: float) -> list[LaneAction]:
        """What came from ``address`` was no message: its rooms end."""
        session = self.sessions.get(address)
        if session is not None:
            for room in self._rooms_of(session):
                self._fail(room, Cause.VIOLATION, detail, now)
        return self._take()

    def close(self, *, now: float) -> list[LaneAction]:
        """End every room."""
        for room in [r for r in self.transfers.values() if r.is_live]:
            self._fail(room, Cause.CLOSED, "the receiver is shutting down", now)
        return self._take()

    # ------------------------------------------------------------------ time

    def next_due(self) -> float | None:
        """When ``on_tick`` has something to do."""
        return self._timers.next_due()

    def on_tick(self, now: float) -> list[LaneAction]:
        """Carry out what is due."""
        for due in self._timers.pop_due(now):
            if not isinstance(due, RoomKey):
                self._on_session_due(due, now)
            elif due in self.transfers:
                self._on_room_due(self.transfers[due], now)
            elif due in self.admission.quarantined:
                self._ask_end(due, now)
        return self._take()

    def _on_room_due(self, room: ReceiverTransfer, now: float) -> None:
        if now < room.deadline:
            self._ask(room)
            if room.state is not ReceiverState.FILLING:
                room.wait_s = min(room.wait_s * 2, RESEND_S_MAX)
            self._timers.set(room.key, min(now + room.wait_s, room.deadline))
        elif room.is_live:
            waited = {True: "its blocks", False: "the sender"}[room.is_ready and not room.open_rounds]
            self._fail(
                room, Cause.DEADLINE, f"waited too long for {waited} while it was {room.state.value}", now
            )
        else:
            self._confirm(room)
            if room.key in self.admission.quarantined:
                self._ask_end(room.key, now)

    def _ask_end(self, key: RoomKey, now: float) -> None:
        """Ask again for the end of a room that is forgotten but for its quarantined blocks, if there is still whom to ask."""
        held = self.admission.quarantined[key]
        session = self.sessions[held.address]
        if session.wire is not None and session.incarnation == held.incarnation:
            target, cause = held.incarnation, Cause.ABORTED
            abort = Abort(source=self.incarnation, target=target, **key._asdict(), cause=cause)
            self._actions.append(Send(held.address, abort))
        self._timers.set(key, now + self.limits.peer_silence_s)

    def _on_session_due(self, address: Address, now: float) -> None:
        session = self.sessions.get(address)
        if session is None:
            return
        silent_s = now - session.heard_at
        if session.rooms or session.subscribes:
            if silent_s >= self.limits.peer_silence_s:
                self._lose(
                    address, session, f"the sender at {address} said nothing for {silent_s:.1f} s", now
                )
            self._ask_session(address, session, now)
        elif now < session.heard_at + IDLE_S:
            self._timers.set(address, session.heard_at + IDLE_S)
        else:
            del self.sessions[address]
            self._actions.append(Hangup(address))

    def _lose(self, address: Address, session: ReceiverSession, detail: str, now: float) -> None:
        for room in self._rooms_of(session):
            self._fail(room, Cause.PEER_LOST, detail, now)
        self._actions.append(Reconnect(address))
        session.heard_at = now  # whoever opens a room now gets the whole time again

    def _await(self, room: ReceiverTransfer, deadline_s: float, now: float) -> None:
        """The room waits anew: its question is asked again soon, and it ends when this long has passed."""
        room.deadline = now + deadline_s
        room.wait_s = self.limits.retry_s
        self._timers.set(room.key, min(now + room.wait_s, room.deadline))

    # ------------------------------------------------------------------ talking

    def _ask(self, room: ReceiverTransfer) -> None:
        """Send what the room waits for an answer to; without a session, that asks for itself first, and its welcome for the rooms."""
        session = self.sessions[room.address]
        if session.wire is not None:
            size = self.offered.block_size
            for message in room.questions(
                source=self.incarnation, target=session.incarnation, block_size=size
            ):
                self._actions.append(Send(room.address, message))

    def _ask_session(self, address: Address, session: ReceiverSession, now: float) -> None:
        self._actions.append(Send(address, session.question(self.offered, source=self.incarnation)))
        is_urgent = session.wire is None and session.rooms  # who only subscribes may wait
        wait_s = self.limits.retry_s if is_urgent else self.limits.peer_silence_s / 4
        self._timers.set(address, now + wait_s)

    def _send_grant(self, room: ReceiverTransfer, granted: Round) -> None:
        target = self.sessions[room.address].incarnation
        message = room.grant_message(
            granted, block_size=self.offered.block_size, source=self.incarnation, target=target
        )
        self._actions.append(Send(room.address, message))

    def _rooms_of(self, session: ReceiverSession) -> list[ReceiverTransfer]:
        return [
            self.transfers[key]
            for key in sorted(session.rooms)
            if key in self.transfers and self.transfers[key].is_live
        ]

    def _take(self) -> list[LaneAction]:
        actions, self._actions = self._actions, []
        return actions
