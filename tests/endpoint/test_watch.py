"""For how long a receiver looks at the marks of a room."""

from __future__ import annotations

import time
from unittest.mock import Mock

from embedwire.endpoint.watch import WATCH_S, Watch
from embedwire.protocol.messages import RoomKey


def test_the_last_look_comes_after_the_time_is_over() -> None:
    """The thread may have been away meanwhile, and nothing else tells soon of what has landed."""
    watch, wire, key = Watch(), Mock(has_marks=True), RoomKey(1, 0)
    now = time.monotonic()
    watch.begin(key, wire)
    assert watch.due(now) == [(key, wire)]
    assert watch
    assert watch.due(time.monotonic() + WATCH_S) == [(key, wire)]
    assert not watch
    assert watch.due(time.monotonic()) == []


def test_a_wire_without_marks_is_not_looked_at() -> None:
    watch = Watch()
    watch.begin(RoomKey(1, 0), Mock(has_marks=False))
    watch.begin(RoomKey(2, 0), None)
    assert not watch
