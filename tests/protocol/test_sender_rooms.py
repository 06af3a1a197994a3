"""Rooms of several lanes at a sender: where they begin, and that they end as one."""

from __future__ import annotations

from typing import Any

import pytest

from embedwire.limits import AUX_WORDS, PROTOCOL_VERSION, Limits
from embedwire.protocol.actions import CancelWrites, LaneReport, Release, Reply, SenderAction, Want, Write
from embedwire.protocol.messages import Abort, Announce, Cause, Done, Ended, Hello, Init, Open, RoomKey
from embedwire.protocol.sender_core import SenderCore

SENDER, PEERS, KEY = 11, (5, 6), RoomKey(7)
LANES = (KEY, KEY._replace(lane=1))
AUX = (300, *[0] * (AUX_WORDS - 1))


class Bench:
    """A core, and the two ranks of a receiver, each of which reads one lane of every room."""

    def __init__(self, *, readers: int = 2, **settings: Any) -> None:
        self.readers = readers
        self.core = SenderCore(incarnation=SENDER, fields=("a",), limits=Limits(), **settings)
        for peer in PEERS:
            hello = Hello(
                source=peer,
                version=PROTOCOL_VERSION,
                nonce=1,
                fields=("a",),
                block_size=128,
                num_blocks=9,
                wires=(("shm", b""),),
            )
            self.core.on_message(hello, now=0.0)
            self.core.on_attached(peer, "shm")

    def say(self, kind: type[Any], lane: int, **content: Any) -> list[SenderAction]:
        """The rank that reads this lane sends a message about room 7."""
        message = kind(source=PEERS[lane % 2], target=SENDER, room=7, lane=lane, **content)
        return self.core.on_message(message, now=1.0)

    def offer(self) -> None:
        """Room 7 of 300 tokens, ready."""
        self.core.offer(KEY, total_tokens=300, aux=AUX, content_hash=b"", readers=self.readers, now=1.0)
        shares = self.core.shares(KEY, 300, readers=self.readers)
        self.core.ready(KEY, source_ms=1.0, digests=dict.fromkeys(shares, (9,)), now=1.0)

    def grant(self, lane: int) -> Write:
        """The lane is opened and granted all that it has."""
        (announced,) = replies(self.say(Open, lane))
        assert isinstance(announced, Announce)
        blocks = tuple(range(-(-announced.total_tokens // 128)))
        (write,) = self.say(
            Init,
            lane,
            round=0,
            start_token=0,
            allocated_tokens=128 * len(blocks),
            block_indices=blocks,
            ticket=lane + 1,
        )
        assert isinstance(write, Write)
        return write


def replies(actions: list[SenderAction]) -> list[Any]:
    return [action.message for action in actions if isinstance(action, Reply)]


def releases(actions: list[SenderAction]) -> list[Release]:
    return [action for action in actions if isinstance(action, Release)]


@pytest.mark.failure_mode("part-taken-for-whole-room")
def test_a_room_ends_with_the_last_of_its_lanes() -> None:
    """Each rank has all of it, in a lane of its own; the source is free when both have said so."""
    bench = Bench()
    bench.offer()
    for lane in (0, 1):
        write = bench.grant(lane)
        assert (write.key, write.first_row) == (LANES[lane], 0)
        bench.core.on_written(LANES[lane], 0, now=1.0)
    assert releases(bench.say(Done, 1)) == []
    assert releases(bench.say(Done, 0)) == [
        Release(KEY, Cause.DONE, "", (LaneReport(LANES[1], (300,)), LaneReport(LANES[0], (300,))))
    ]
    assert not bench.core.rooms


@pytest.mark.failure_mode("abort-not-propagated")
def test_a_lane_that_fails_ends_the_others() -> None:
    """Both ranks get the same cause; the room ends once."""
    bench = Bench()
    bench.offer()
    for lane in (0, 1):
        bench.say(Open, lane)
    actions = bench.say(Abort, 1, cause=Cause.CORRUPT)
    ends = {message.lane: message.cause for message in replies(actions) if isinstance(message, Ended)}
    assert ends == {0: Cause.CORRUPT, 1: Cause.CORRUPT}
    (release,) = releases(actions)
    assert (release.key, release.cause) == (KEY, Cause.CORRUPT)


@pytest.mark.failure_mode("reuse-during-write")
@pytest.mark.invariant("no-early-reuse")
def test_a_room_keeps_its_source_while_a_lane_of_it_is_written() -> None:
    """Also when another lane has failed: the write is cancelled, and the room ends when it has returned."""
    bench = Bench()
    bench.offer()
    bench.grant(0)
    bench.say(Open, 1)
    actions = bench.say(Abort, 1, cause=Cause.ABORTED)
    assert [action.key for action in actions if isinstance(action, CancelWrites)] == [LANES[0]]
    assert releases(actions) == []
    (release,) = releases(bench.core.on_write_lost(LANES[0], 0, "", now=1.0))
    assert release.cause is Cause.ABORTED


def test_a_lost_receiver_ends_the_lanes_of_all() -> None:
    """Of rooms that it shares with another receiver, too."""
    bench = Bench()
    bench.offer()
    for lane in (0, 1):
        bench.say(Open, lane)
    actions = bench.core.on_attach_failed(PEERS[0], "out of reach", now=2.0)
    (release,) = releases(actions)
    assert release.cause is Cause.PEER_LOST
    assert [message.lane for message in replies(actions) if isinstance(message, Ended)] == [0, 1]


def test_the_second_rank_sends_the_second_half() -> None:
    bench = Bench(readers=1, rank=1, ranks=2)
    assert bench.core.shares(KEY, 300) == {LANES[1]: range(150, 300)}
    bench.offer()
    write = bench.grant(1)
    assert (write.key, write.first_row, write.round.tokens) == (LANES[1], 150, 150)


@pytest.mark.failure_mode("refusal-not-sent")
def test_a_room_that_is_refused_is_refused_in_all_lanes() -> None:
    """A rank that opened its lane before gets the cause at once, one that opens it later too."""
    bench = Bench()
    bench.say(Open, 1)
    (ended,) = replies(bench.core.fail(KEY, Cause.NEVER_FITS, "too large", readers=2, now=1.0))
    assert (ended.lane, ended.cause) == (1, Cause.NEVER_FITS)
    (ended,) = replies(bench.say(Open, 0))
    assert (ended.lane, ended.cause) == (0, Cause.NEVER_FITS)


@pytest.mark.invariant("validation")
def test_an_item_is_one_lane() -> None:
    """A receiver that opens another lane of one is refused, and the owner is not asked for it."""
    bench = Bench()
    (ended,) = replies(bench.say(Open, 1, item=b"x"))
    assert ended.cause is Cause.VIOLATION
    assert [action for action in bench.say(Open, 0, item=b"x") if isinstance(action, Want)] == [
        Want(KEY, b"x")
    ]
