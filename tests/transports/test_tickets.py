"""Spans of a ticket against a plain model: a set of bytes."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from embedwire.errors import UsageError
from embedwire.transports.tickets import Tickets

SPANS = st.lists(st.tuples(st.integers(0, 60), st.integers(1, 12)), max_size=8)


@pytest.mark.failure_mode("scattered-blocks")
@given(SPANS, SPANS)
def test_covers_is_what_a_set_of_bytes_says(
    spans: list[tuple[int, int]], table: list[tuple[int, int]]
) -> None:
    """Spans in any order, adjacent or overlapping."""
    tickets = Tickets()
    tickets.permit(1, spans)
    allowed = {byte for start, length in spans for byte in range(start, start + length)}
    wanted = {byte for start, length in table for byte in range(start, start + length)}
    assert tickets.covers(1, table) == (wanted <= allowed)


def test_a_ticket_is_open_until_it_is_revoked() -> None:
    tickets = Tickets()
    tickets.permit(1, [(0, 1)])
    assert tickets.is_open(1)
    with pytest.raises(UsageError, match="open already"):
        tickets.permit(1, [])
    tickets.revoke(1)
    tickets.revoke(1)
    assert not tickets.is_open(1)
