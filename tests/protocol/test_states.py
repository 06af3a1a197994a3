"""The tables: what is in them is legal, what is absent is an error that tells how it came to it."""

from __future__ import annotations

from enum import Enum
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from embedwire.errors import IllegalTransition
from embedwire.protocol import states
from embedwire.protocol.states import (
    POLL_OF,
    RECEIVER_TABLE,
    RECEIVER_TERMINAL,
    SENDER_TABLE,
    SENDER_TERMINAL,
    Machine,
    Poll,
    ReceiverEvent,
    ReceiverState,
    SenderEvent,
    SenderState,
)

TABLES: list[tuple[Any, Any, Any, Any, Any]] = [
    (SENDER_TABLE, SenderState, SenderEvent, SENDER_TERMINAL, SenderState.OFFERED),
    (RECEIVER_TABLE, ReceiverState, ReceiverEvent, RECEIVER_TERMINAL, ReceiverState.OPENING),
]
ABSENT = [
    (table, state, event)
    for table, all_states, all_events, _, _ in TABLES
    for state in all_states
    for event in all_events
    if (state, event) not in table
]


@pytest.mark.parametrize(
    ("table", "state", "event"), ABSENT, ids=lambda p: p.name if isinstance(p, Enum) else ""
)
def test_an_absent_pair_raises_and_tells_the_story(table: Any, state: Any, event: Any) -> None:
    """Nothing has changed, and the error names the event, the state and how it got there."""
    machine = Machine(table, state)
    assert not machine.can(event)
    with pytest.raises(IllegalTransition, match=state.value) as caught:
        machine.step(event)
    assert event.value in str(caught.value)
    assert machine.state is state
    assert list(machine.story) == [state.value]


@pytest.mark.parametrize("sides", TABLES, ids=["sender", "receiver"])
def test_every_state_is_reached_and_every_one_can_end(sides: Any) -> None:
    """From the first state all are reachable, and from each some terminal one."""
    table, all_states, _, terminal, first = sides
    reach = {s: {s} for s in all_states}
    for _ in all_states:
        for (before, _event), after in table.items():
            reach[before] |= reach[after]
    assert reach[first] == set(all_states)
    assert all(reached & terminal for reached in reach.values())


@pytest.mark.failure_mode("status-raised-again")
@pytest.mark.parametrize("sides", TABLES, ids=["sender", "receiver"])
@given(data=st.data())
def test_the_poll_never_falls_but_to_failed(sides: Any, data: st.DataObject) -> None:
    """Along any path the poll only rises, or becomes FAILED and stays FAILED."""
    table, _, events, _, first = sides
    machine = Machine(table, first)
    poll = POLL_OF[machine.state]
    for event in data.draw(st.lists(st.sampled_from(list(events)), max_size=20)):
        if machine.can(event):
            machine.step(event)
        now = POLL_OF[machine.state]
        assert now is Poll.FAILED or (poll is not Poll.FAILED and now >= poll)
        poll = now


def test_the_story_is_short() -> None:
    """It keeps the last steps only, however long a room lives."""
    machine = Machine(RECEIVER_TABLE, ReceiverState.WAITING)
    for _ in range(100):
        machine.step(ReceiverEvent.GRANTED)
        machine.step(ReceiverEvent.ROUNDS_DRAINED)
    assert len(machine.story) == 16
    assert machine.story[-1] == "-[rounds drained]-> partial"


def test_min_over_ranks_is_what_the_order_of_polls_says() -> None:
    """The slowest decides, and one failure fails all."""
    assert min(Poll.SUCCESS, Poll.TRANSFERRING) is Poll.TRANSFERRING
    assert min(Poll.FAILED, Poll.BOOTSTRAPPING) is Poll.FAILED
    assert states.HOLDS_BLOCKS < states.PEER_MAY_WRITE
