"""Senders of two encoder ranks that offer the same rooms: what rank 0 offers, the other one does."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from embedwire import Field, Layout, ReceiverEndpoint, SenderEndpoint
from embedwire.errors import TransferError
from embedwire.group import FollowingSender, LeadingSender

LAYOUT = Layout("ITEM", (Field("embeddings", "float32", (4,)),))
WAIT_S = 20
TOKENS = 100


def embedding(room: int) -> dict[str, np.ndarray]:
    rows = np.arange(room, room + TOKENS, dtype=np.float32)
    return {"embeddings": np.repeat(rows[:, None], 4, axis=1)}


class Ranks:
    """Rank 0 and rank 1 of an encoder, the second with memory for ``rooms`` rooms, and a receiver."""

    def __init__(self, directory: Path, *, rooms: int = 8) -> None:
        room_bytes = TOKENS * LAYOUT.token_bytes
        self.ends = [
            SenderEndpoint(LAYOUT, rank=0, ranks=2),
            SenderEndpoint(LAYOUT, rank=1, ranks=2, memory_bytes=rooms * room_bytes),
        ]
        address = f"ipc://{directory}/rooms-1"
        self.follower = FollowingSender(self.ends[1], address=address, memory_wait_s=WAIT_S)
        self.leader = LeadingSender(
            self.ends[0], addresses=[end.address for end in self.ends], others=[address]
        )
        self.receiver = ReceiverEndpoint(LAYOUT, num_blocks=2, block_size=16)

    def close(self) -> None:
        self.receiver.close()
        with self.leader:
            pass
        self.follower.close()
        for end in self.ends:
            end.close()


@pytest.fixture
def ranks(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Ranks]:
    made = Ranks(tmp_path, rooms=getattr(request, "param", 8))
    yield made
    made.close()


@pytest.mark.failure_mode("part-taken-for-whole-room")
def test_each_rank_sends_its_part(ranks: Ranks) -> None:
    """A room is complete when both parts are; aux and the number of readers are those of rank 0."""
    offer = ranks.leader.offer(7, total_tokens=TOKENS, aux=[-5], content_hash=b"h", attempt=1)
    reception = ranks.receiver.open(7, ranks.leader.addresses, attempt=1)
    offer.fill(embedding(7))
    ranks.follower.fill((7, 1), embedding(7))
    received = reception.result(WAIT_S)
    assert np.array_equal(received.arrays["embeddings"], embedding(7)["embeddings"])
    assert (received.aux[:2], received.report.content_hash) == ((TOKENS, -5), b"h")
    assert [end.stats().bytes_total for end in ranks.ends] == [TOKENS // 2 * LAYOUT.token_bytes] * 2
    assert offer.result(WAIT_S).bytes == TOKENS // 2 * LAYOUT.token_bytes


@pytest.mark.parametrize("ranks", [1], indirect=True)
def test_a_room_waits_for_memory_that_is_not_free_here_yet(ranks: Ranks) -> None:
    """Rank 0 may have freed a room that another rank still holds. Nothing is refused for that."""
    receptions = []
    for room in (1, 2, 3):
        ranks.leader.offer(room, total_tokens=TOKENS).fill(embedding(room))
        receptions.append(ranks.receiver.open(room, ranks.leader.addresses))
    for room, reception in zip((1, 2, 3), receptions, strict=True):
        ranks.follower.fill((room, 0), embedding(room))
        assert np.array_equal(reception.result(WAIT_S).arrays["embeddings"], embedding(room)["embeddings"])


def test_a_room_that_ends_on_one_rank_ends_on_all(ranks: Ranks) -> None:
    """Its receiver gives up the other part; a source that comes too late does no harm."""
    offer = ranks.leader.offer(9, total_tokens=TOKENS)
    reception = ranks.receiver.open(9, ranks.leader.addresses)
    wait(lambda: ranks.ends[1].stats().rooms.get("announced", 0) == 1)  # the receiver has asked there too
    offer.abort("nobody wants it")
    with pytest.raises(TransferError, match="aborted"):
        reception.result(WAIT_S)
    ranks.follower.fill((9, 0), embedding(9))
    wait(lambda: ranks.ends[1].stats().memory_reserved_bytes == 0)


@pytest.mark.parametrize("ranks", [1], indirect=True)
@pytest.mark.parametrize("is_offered", [True, False])
def test_a_room_that_nobody_has_opened_ends_on_all(ranks: Ranks, is_offered: bool) -> None:
    """The client has gone before a language server asked: no rank keeps the room or its place in the line, and none of those who encode
    it waits for what will never be."""
    first = None if is_offered else ranks.leader.offer(1, total_tokens=TOKENS)
    offer = ranks.leader.offer(2, total_tokens=TOKENS)
    wait(lambda: ranks.ends[1].stats().memory_reserved_bytes > 0)
    offer.abort("nobody wants it")
    ranks.follower.fill((2, 0), embedding(2))
    if first is not None:
        first.abort("nor this")
    wait(lambda: ranks.ends[1].stats().memory_reserved_bytes == 0)
    assert not ranks.follower._loop.call(lambda: ranks.follower._line or ranks.follower._open)
    ranks.leader.offer(3, total_tokens=TOKENS).fill(embedding(3))
    ranks.follower.fill((3, 0), embedding(3))
    received = ranks.receiver.open(3, ranks.leader.addresses).result(WAIT_S)
    assert np.array_equal(received.arrays["embeddings"], embedding(3)["embeddings"])


def test_a_room_that_fails_fails_with_one_cause(ranks: Ranks) -> None:
    """That of rank 0, on all: it decides what becomes of the request."""
    offer = ranks.leader.offer(5, total_tokens=TOKENS)
    wait(lambda: bool(ranks.follower._open))
    followed = ranks.follower._open[5, 0]
    offer.fail("the tower is broken")
    for part in (offer, followed):
        with pytest.raises(TransferError) as caught:
            part.result(WAIT_S)
        assert (caught.value.cause, caught.value.detail) == ("encoder_failed", "the tower is broken")


def wait(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < deadline
        os.sched_yield()
