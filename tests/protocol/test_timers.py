"""Timers: one due time a key."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from embedwire.protocol.timers import STALE_MIN, Timers


def test_due_in_order_and_once() -> None:
    """Earliest first, equal times in the order in which they were set, each once."""
    timers: Timers[str] = Timers()
    for key, when in (("late", 3.0), ("a", 1.0), ("b", 1.0), ("mid", 2.0)):
        timers.set(key, when)
    assert timers.next_due() == 1.0
    assert timers.pop_due(0.9) == []
    assert timers.pop_due(2.0) == ["a", "b", "mid"]
    assert timers.pop_due(9.0) == ["late"]
    assert timers.next_due() is None
    assert timers.pop_due(9.0) == []


def test_set_replaces_and_clear_removes() -> None:
    """Earlier or later, only the last time counts."""
    timers: Timers[str] = Timers()
    timers.set("a", 5.0)
    timers.set("a", 1.0)
    timers.set("a", 7.0)
    timers.set("b", 6.0)
    assert timers.next_due() == 6.0
    timers.clear("b")
    timers.clear("never set")
    assert timers.next_due() == 7.0
    assert timers.pop_due(6.5) == []
    assert timers.pop_due(7.0) == ["a"]


def test_a_deadline_that_moves_fills_no_memory() -> None:
    """Moved a hundred thousand times before it is reached, as by every slice of a long write."""
    timers: Timers[str] = Timers()
    timers.set("first", 0.5)
    for i in range(100_000):
        timers.set("moving", 60.0 + i)
        assert len(timers._heap) <= STALE_MIN + 2 * 2 + 1
    assert timers.pop_due(1e9) == ["first", "moving"]


@given(st.lists(st.tuples(st.integers(0, 5), st.one_of(st.none(), st.integers(0, 20))), max_size=200))
def test_as_a_dictionary_would_have_it(steps: list[tuple[int, int | None]]) -> None:
    """Any sequence of set and clear (None), against the simplest model there is."""
    timers: Timers[int] = Timers()
    model: dict[int, float] = {}
    for key, when in steps:
        if when is None:
            timers.clear(key)
            model.pop(key, None)
        else:
            timers.set(key, float(when))
            model[key] = float(when)
        assert timers.next_due() == min(model.values(), default=None)
    due = timers.pop_due(10.0)
    assert sorted(due) == sorted(k for k, when in model.items() if when <= 10.0)
    assert [model[k] for k in due] == sorted(model[k] for k in due)
