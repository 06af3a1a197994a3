"""Admission: who gets blocks, and in which order."""

from __future__ import annotations

import pytest

from embedwire.limits import AUX_WORDS
from embedwire.memory.allocator import BlockAllocator
from embedwire.protocol.actions import Round
from embedwire.protocol.admission import Admission
from embedwire.protocol.messages import Announce, Cause, RoomKey
from embedwire.protocol.receiver import ReceiverTransfer


def admission(*, blocks: int = 8, default: int = 512, window: int = 1) -> Admission:
    """A pool of blocks of 128 tokens."""
    return Admission(
        BlockAllocator(blocks, 128),
        default_allocate_tokens=default,
        window_rounds=window,
    )


def room(number: int, total: int, address: str = "encoder-1") -> ReceiverTransfer:
    """A room that was announced as ready."""
    made = ReceiverTransfer(RoomKey(number), address, opened_at=0.0)
    aux = (total, *[0] * (AUX_WORDS - 1))
    made.on_announce(
        Announce(source=1, room=number, total_tokens=total, aux=aux, content_hash=b"", ready=True)
    )
    return made


def grant_next(line: Admission, *, peers: int = 1) -> tuple[int, int, Round] | None:
    """The next grant as (room, blocks, round), opened in the room."""
    turn = line.next_grant(peers=peers)
    if turn is None:
        return None
    granted = turn[0].grant(turn[1], block_size=128, ticket=1)
    line.want_more(turn[0])
    return turn[0].key[0], len(turn[1]), granted


def admit_all(line: Admission, *rooms: ReceiverTransfer) -> None:
    for one in rooms:
        line.join(one)


@pytest.mark.failure_mode("grant-not-whole-blocks", "last-round-by-configured-size")
def test_the_default_is_for_the_first_round_only() -> None:
    """500 configured tokens are 4 blocks; later rounds take what is free, up to the remainder."""
    line = admission(default=500)
    one = room(1, 5000)
    admit_all(line, one)
    granted = grant_next(line)
    assert granted is not None
    assert granted[:2] == (1, 4)
    one.open_rounds.clear()
    line.give_back(one.address, granted[2])
    line.rejoin(one)
    again = grant_next(line)
    assert again is not None
    assert again[:2] == (1, 8)


@pytest.mark.failure_mode("pool-held-by-partial-rooms")
@pytest.mark.invariant("no-hold-and-wait")
def test_fewer_free_blocks_are_better_than_none() -> None:
    """The next room in the queue takes the blocks that are free."""
    line = admission(blocks=5)
    admit_all(line, room(1, 5000), room(2, 5000), room(3, 5000))
    assert [g and g[:2] for g in (grant_next(line), grant_next(line), grant_next(line))] == [
        (1, 4),
        (2, 1),
        None,
    ]
    assert [r.key[0] for r in line.for_blocks] == [3]


@pytest.mark.failure_mode("frozen-peer-holds-blocks")
@pytest.mark.invariant("no-early-reuse")
def test_one_of_several_peers_does_not_get_the_whole_pool() -> None:
    """A quarter of the pool stays for other peers; a room of another peer overtakes rooms of a peer at its limit."""
    line = admission(default=5000)
    admit_all(line, room(1, 5000, "a"), room(2, 5000, "a"), room(3, 5000, "b"))
    assert [g and g[:2] for g in (grant_next(line, peers=2), grant_next(line, peers=2))] == [(1, 6), (3, 2)]
    assert grant_next(line, peers=2) is None


@pytest.mark.failure_mode("extreme-length")
@pytest.mark.parametrize("blocks", [1, 2, 3])
def test_a_small_pool_serves_anybody(blocks: int) -> None:
    """One block is enough for any number of peers."""
    line = admission(blocks=blocks)
    admit_all(line, room(1, 5000, "a"))
    assert grant_next(line, peers=5) is not None


@pytest.mark.failure_mode("frozen-peer-holds-blocks")
@pytest.mark.invariant("no-early-reuse")
def test_nothing_while_blocks_are_in_quarantine() -> None:
    """A peer gets no block while any of its blocks are in quarantine, and these count as held by it."""
    line = admission()
    one, two = room(1, 128, "a"), room(2, 128, "a")
    admit_all(line, one, two)
    granted = grant_next(line)
    assert granted is not None
    one.fail(Cause.ABORTED, "")
    line.quarantine(one, incarnation=77)
    assert grant_next(line) is None
    assert (line.held["a"], line.in_quarantine["a"]) == (1, 1)
    line.release(one.key)
    assert grant_next(line) is not None
    assert (line.held["a"], line.in_quarantine["a"]) == (1, 0)


def test_a_window_splits_the_pool() -> None:
    """With a window of 2 a room may have two rounds of at most half the pool each, and no third."""
    line = admission(window=2, default=5000)
    one = room(1, 5000)
    admit_all(line, one)
    assert [g and g[:2] for g in (grant_next(line), grant_next(line))] == [(1, 4), (1, 4)]
    assert not line.for_more
    assert not line.for_blocks


def test_who_has_nothing_comes_before_who_wants_more() -> None:
    """A second round of one room waits behind the first of another."""
    line = admission(window=2, default=256)
    one, two = room(1, 5000), room(2, 5000)
    admit_all(line, one, two)
    assert [grant[0] for grant in (grant_next(line), grant_next(line), grant_next(line)) if grant] == [
        1,
        2,
        1,
    ]


def test_leaving_takes_a_room_out_of_every_queue() -> None:
    """And harms nobody when it is in none."""
    line = admission(blocks=1)
    rooms = [room(n, 500) for n in (1, 2, 3)]
    admit_all(line, *rooms)
    for one in (*rooms, room(9, 1)):
        line.leave(one)
    assert grant_next(line) is None
