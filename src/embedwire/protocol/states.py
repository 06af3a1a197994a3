"""Both halves of a room as tables: (state, event) → state. A pair that is absent is the error.

What others see of a room is its :class:`Poll`; each state has one. A poll only rises, or falls to FAILED, which is final:
that is asserted below for every step of both tables, so no code has to take care of it.

A sender's room is
    offered     its memory is reserved
    announced   a receiver opened it
    writing     it was granted blocks
    delivered   everything has landed; it is kept until ``done``
    ending      it failed, but a write of its own is still under way
    failed, done

A receiver's room is
    opening     it asks the sender
    waiting     announced; for its source, its assembly or its first blocks
    filling     a round is open
    partial     all open rounds are drained and more is to come; it holds no block
    closing     whole; ``done`` is not answered yet
    aborting    it failed; the sender has not confirmed
    failed, done
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from enum import Enum, IntEnum
from typing import Generic, TypeVar

from embedwire.errors import IllegalTransition


class Poll(IntEnum):
    """What others see of a room. The order makes MIN over ranks mean "the slowest decides, one failure fails all"."""

    FAILED = 0
    BOOTSTRAPPING = 1
    WAITING_FOR_INPUT = 2
    TRANSFERRING = 3
    SUCCESS = 4


class SenderState(Enum):
    OFFERED = "offered"
    ANNOUNCED = "announced"
    WRITING = "writing"
    DELIVERED = "delivered"
    ENDING = "ending"
    FAILED = "failed"
    DONE = "done"


class SenderEvent(Enum):
    OPENED = "opened"
    GRANTED = "granted"
    ALL_LANDED = "all landed"
    DONE_HEARD = "done heard"
    FAILED = "failed"
    WRITES_RETURNED = "writes returned"


class ReceiverState(Enum):
    OPENING = "opening"
    WAITING = "waiting"
    FILLING = "filling"
    PARTIAL = "partial"
    CLOSING = "closing"
    ABORTING = "aborting"
    DONE = "done"
    FAILED = "failed"


class ReceiverEvent(Enum):
    ANNOUNCED = "announced"
    GRANTED = "granted"
    ROUNDS_DRAINED = "rounds drained"
    ALL_DRAINED = "all drained"
    FAILED = "failed"
    CONFIRMED = "confirmed"


State = TypeVar("State", bound=Enum)
Event = TypeVar("Event", bound=Enum)

_S, _SE, _R, _RE = SenderState, SenderEvent, ReceiverState, ReceiverEvent

SENDER_TABLE: Mapping[tuple[SenderState, SenderEvent], SenderState] = {
    (_S.OFFERED, _SE.OPENED): _S.ANNOUNCED,
    (_S.OFFERED, _SE.FAILED): _S.ENDING,
    (_S.ANNOUNCED, _SE.GRANTED): _S.WRITING,
    (_S.ANNOUNCED, _SE.FAILED): _S.ENDING,
    (_S.WRITING, _SE.GRANTED): _S.WRITING,
    (_S.WRITING, _SE.ALL_LANDED): _S.DELIVERED,
    (_S.WRITING, _SE.FAILED): _S.ENDING,
    (_S.DELIVERED, _SE.DONE_HEARD): _S.DONE,
    (_S.DELIVERED, _SE.FAILED): _S.ENDING,
    (_S.ENDING, _SE.WRITES_RETURNED): _S.FAILED,
}

RECEIVER_TABLE: Mapping[tuple[ReceiverState, ReceiverEvent], ReceiverState] = {
    (_R.OPENING, _RE.ANNOUNCED): _R.WAITING,
    (_R.OPENING, _RE.FAILED): _R.ABORTING,
    (_R.WAITING, _RE.GRANTED): _R.FILLING,
    (_R.WAITING, _RE.FAILED): _R.ABORTING,
    (_R.FILLING, _RE.GRANTED): _R.FILLING,
    (_R.FILLING, _RE.ROUNDS_DRAINED): _R.PARTIAL,
    (_R.FILLING, _RE.ALL_DRAINED): _R.CLOSING,
    (_R.FILLING, _RE.FAILED): _R.ABORTING,
    (_R.PARTIAL, _RE.GRANTED): _R.FILLING,
    (_R.PARTIAL, _RE.FAILED): _R.ABORTING,
    (_R.CLOSING, _RE.CONFIRMED): _R.DONE,
    (_R.ABORTING, _RE.CONFIRMED): _R.FAILED,
}

POLL_OF: Mapping[SenderState | ReceiverState, Poll] = {
    _S.OFFERED: Poll.BOOTSTRAPPING,
    _S.ANNOUNCED: Poll.WAITING_FOR_INPUT,
    _S.WRITING: Poll.TRANSFERRING,
    _S.DELIVERED: Poll.TRANSFERRING,
    _S.ENDING: Poll.FAILED,
    _S.FAILED: Poll.FAILED,
    _S.DONE: Poll.SUCCESS,
    _R.OPENING: Poll.BOOTSTRAPPING,
    _R.WAITING: Poll.WAITING_FOR_INPUT,
    _R.FILLING: Poll.TRANSFERRING,
    _R.PARTIAL: Poll.TRANSFERRING,
    _R.CLOSING: Poll.SUCCESS,
    _R.DONE: Poll.SUCCESS,
    _R.ABORTING: Poll.FAILED,
    _R.FAILED: Poll.FAILED,
}

STATUS_POLLS = (Poll.BOOTSTRAPPING, Poll.WAITING_FOR_INPUT, Poll.TRANSFERRING)
"""What a status may report. The end of a room, good or bad, is reported by ``ended`` alone."""
SENDER_TERMINAL = frozenset({_S.FAILED, _S.DONE})
RECEIVER_TERMINAL = frozenset({_R.DONE, _R.FAILED})
HOLDS_SOURCE = frozenset(_S) - SENDER_TERMINAL
"""The sender's memory of the room is reserved."""
HOLDS_BLOCKS = frozenset({_R.FILLING})
"""The receiver's room has granted blocks. (In ABORTING it may have quarantined ones.)"""
PEER_MAY_WRITE = frozenset({_R.FILLING, _R.ABORTING})
"""A write of the sender may land."""
LIVE = frozenset({_R.OPENING, _R.WAITING, _R.FILLING, _R.PARTIAL})
"""The receiver's room is still on its way."""

assert HOLDS_BLOCKS < PEER_MAY_WRITE
assert HOLDS_BLOCKS < LIVE
assert not LIVE & RECEIVER_TERMINAL
for _table, _terminal in ((SENDER_TABLE, SENDER_TERMINAL), (RECEIVER_TABLE, RECEIVER_TERMINAL)):
    for (_before, _event), _after in _table.items():
        assert _before not in _terminal, f"{_before} is final"
        _low, _high = POLL_OF[_before], POLL_OF[_after]
        assert _high is Poll.FAILED or (_low is not Poll.FAILED and _low <= _high), (
            f"{_before} to {_after} lowers the poll"
        )


class Machine(Generic[State, Event]):
    """A state, the table that it moves by, and a short story of how it got here."""

    def __init__(self, table: Mapping[tuple[State, Event], State], initial: State) -> None:
        self._table = table
        self.state = initial
        self.story: deque[str] = deque([initial.value], maxlen=16)

    def can(self, event: Event) -> bool:
        """Whether the table has this step from here."""
        return (self.state, event) in self._table

    def step(self, event: Event) -> None:
        """Take the step, or raise IllegalTransition with the story; then nothing has changed."""
        try:
            self.state = self._table[self.state, event]
        except KeyError:
            raise IllegalTransition(
                f"no step for {event.value!r} when {self.state.value!r}; so far: {' '.join(self.story)}"
            ) from None
        self.story.append(f"-[{event.value}]-> {self.state.value}")
