"""For how long a receiver looks at the marks of a lane, and what they show."""

from __future__ import annotations

import time
from unittest.mock import Mock

from embedwire.endpoint.watch import WATCH_S, Watch
from embedwire.protocol.actions import Round
from embedwire.protocol.messages import RoomKey

KEY = RoomKey(1, 0)
FIRST, SECOND = Round(0, 0, 256, (0, 1), ticket=7), Round(1, 256, 44, (2,), ticket=8)


def wire(**marks: int) -> Mock:
    """A wire that shows these marks, by ticket."""
    return Mock(has_marks=True, mark=lambda ticket: marks.get(f"t{ticket}", 0))


def test_the_last_look_comes_after_the_time_is_over() -> None:
    """The thread may have been away meanwhile, and no message reports soon what has landed."""
    watch = Watch()
    watch.add(KEY, FIRST, wire(t7=128))
    assert not watch
    now = time.monotonic()
    watch.begin(KEY)
    assert watch.look(now) == [(KEY, 128)]
    assert watch
    assert watch.look(time.monotonic() + WATCH_S) == [(KEY, 128)]
    assert not watch
    assert watch.look(time.monotonic()) == []


def test_marks_of_several_rounds_are_one_prefix() -> None:
    """A gap ends it, more than was granted does not count, and what came before the oldest permitted round is drained."""
    for marks, landed in (
        ({"t8": 44}, 0),
        ({"t7": 100, "t8": 44}, 100),
        ({"t7": 256}, 256),
        ({"t7": 999, "t8": 20}, 276),
    ):
        watch, now = Watch(), time.monotonic()
        for granted in (FIRST, SECOND):
            watch.add(KEY, granted, wire(**marks))
        watch.begin(KEY)
        assert watch.look(now) == [(KEY, landed)]
    watch.remove(KEY, 7)
    assert watch.look(now) == [(KEY, 276)]


def test_a_lane_without_permitted_rounds_is_not_looked_at() -> None:
    watch = Watch()
    watch.add(KEY, FIRST, wire(t7=1))
    watch.begin(KEY)
    watch.remove(KEY, 7)
    assert not watch
    watch.begin(KEY)
    assert not watch


def test_a_wire_without_marks_is_not_looked_at() -> None:
    watch = Watch()
    for key, inbound in ((RoomKey(1), Mock(has_marks=False)), (RoomKey(2), None)):
        watch.add(key, FIRST, inbound)
        watch.begin(key)
    assert not watch
