"""A budget: never above its limit, and a reservation ends once."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from embedwire.errors import ConfigurationError, UsageError
from embedwire.memory.budget import Budget


def test_reserve_and_release() -> None:
    budget = Budget(100)
    assert budget.try_reserve("a", 60)
    assert not budget.try_reserve("b", 41)
    assert budget.try_reserve("b", 40)
    assert (budget.used_bytes, budget.peak_bytes) == (100, 100)
    assert budget.release("a")
    assert not budget.release("a")
    assert (budget.used_bytes, budget.peak_bytes, budget.limit_bytes) == (40, 100, 100)
    assert budget.try_reserve("a", 60)


@pytest.mark.failure_mode("request-never-fits")
def test_what_can_never_fit_is_known_at_once() -> None:
    """A request larger than the whole budget."""
    budget = Budget(100)
    assert budget.can_ever(100)
    assert not budget.can_ever(101)
    assert budget.try_reserve("a", 100)
    assert budget.can_ever(100)


def test_a_key_reserves_once() -> None:
    budget = Budget(100)
    assert budget.try_reserve("a", 0)
    with pytest.raises(UsageError, match="'a'"):
        budget.try_reserve("a", 1)
    with pytest.raises(UsageError, match="-1"):
        budget.try_reserve("b", -1)
    assert budget.used_bytes == 0
    assert not budget.release("b")


@pytest.mark.parametrize("limit_bytes", [0, -1])
def test_an_empty_budget_is_refused(limit_bytes: int) -> None:
    with pytest.raises(ConfigurationError):
        Budget(limit_bytes)


@given(st.integers(1, 50), st.lists(st.tuples(st.integers(0, 4), st.integers(0, 30) | st.none())))
def test_against_a_dictionary(limit_bytes: int, steps: list[tuple[int, int | None]]) -> None:
    """``None`` releases; anything else reserves that many bytes."""
    budget, model, peak = Budget(limit_bytes), dict[int, int](), 0
    for key, nbytes in steps:
        if nbytes is None:
            assert budget.release(key) == (model.pop(key, None) is not None)
        elif key not in model:
            fits = sum(model.values()) + nbytes <= limit_bytes
            assert budget.try_reserve(key, nbytes) == fits
            model.update({key: nbytes} if fits else {})
        peak = max(peak, sum(model.values()))
        assert budget.used_bytes == sum(model.values()) <= limit_bytes
        assert budget.peak_bytes == peak
