"""One room on the receiving side."""

from __future__ import annotations

from typing import Any

import pytest

from embedwire.errors import ProtocolViolation
from embedwire.limits import AUX_WORDS
from embedwire.protocol.messages import Announce, Cause, Init, ResumeTransfer, RoomKey
from embedwire.protocol.receiver import CorruptRoom, ReceiverTransfer
from embedwire.protocol.states import Poll, ReceiverState


def aux_of(total: int) -> tuple[int, ...]:
    return (total, -756, *[0] * (AUX_WORDS - 2))


SUMS = (9,)


def announce(total: int = 2000, **other: Any) -> Announce:
    content: dict[str, Any] = {
        "total_tokens": total,
        "aux": aux_of(total),
        "content_hash": b"h",
        "ready": True,
        "digests": SUMS,
    } | other
    return Announce(source=1, room=7, **content)


def room(total: int = 2000) -> ReceiverTransfer:
    """An announced room."""
    made = ReceiverTransfer(RoomKey(7), "encoder-1", opened_at=0.0)
    assert made.on_announce(announce(total))
    return made


def test_announced_once_and_for_all() -> None:
    """Becoming ready is news once; other facts are a violation."""
    made = ReceiverTransfer(RoomKey(7), "encoder-1", opened_at=0.0)
    assert (made.total_tokens, made.poll) == (0, Poll.BOOTSTRAPPING)
    assert made.on_announce(announce(ready=False))
    assert not made.is_ready
    assert not made.on_announce(announce(ready=False))
    assert made.on_announce(announce())
    assert not made.on_announce(announce())
    assert not made.on_announce(announce(ready=False)), "a late one does not take it back"
    assert made.is_ready
    for other in (
        {"total_tokens": 1999, "aux": aux_of(1999)},
        {"content_hash": b"x"},
        {"aux": (2000, *[0] * 15)},
    ):
        with pytest.raises(ProtocolViolation):
            made.on_announce(announce(**other))
    assert (made.total_tokens, made.state) == (2000, ReceiverState.WAITING)


@pytest.mark.failure_mode("aux-read-from-resumed-block")
@pytest.mark.invariant("aux-once")
def test_total_and_aux_agree() -> None:
    """A total that differs from aux is a violation, and the room does not change."""
    made = ReceiverTransfer(RoomKey(7), "encoder-1", opened_at=0.0)
    with pytest.raises(ProtocolViolation, match="aux says 0"):
        made.on_announce(announce(aux=(0,) * 16))
    assert made.state is ReceiverState.OPENING


@pytest.mark.failure_mode("grant-not-whole-blocks", "last-round-by-configured-size")
@pytest.mark.invariant("alignment")
def test_a_grant_covers_what_its_blocks_hold() -> None:
    """8 blocks of 128 are 1024; the last round holds the rest and still announces whole blocks."""
    made = room()
    first = made.grant(tuple(range(8)), block_size=128, ticket=5)
    assert (first.tokens, made.remaining_tokens, made.state) == (1024, 976, ReceiverState.FILLING)
    second = made.grant(tuple(range(8, 16)), block_size=128, ticket=6)
    assert (second.start_token, second.tokens) == (1024, 976)
    told = [made.grant_message(r, block_size=128, source=1, target=2) for r in (first, second)]
    assert [type(t) for t in told] == [Init, ResumeTransfer]
    assert [(t.allocated_tokens, t.start_token, t.ticket) for t in told] == [(1024, 0, 5), (1024, 1024, 6)]


def test_landed_only_grows_and_is_drained_once() -> None:
    """Late and repeated statuses are no news; each token is drained exactly once, in order."""
    made = room()
    made.grant((3,), block_size=128, ticket=1)
    made.grant((1,), block_size=128, ticket=2)
    assert made.on_progress(100)
    assert [(d.from_token, d.to_token) for d in made.take_drains()] == [(0, 100)]
    assert not made.on_progress(50)
    assert made.take_drains() == []
    assert made.on_progress(200)
    drains = made.take_drains()
    assert [(d.from_token, d.to_token, d.round.number) for d in drains] == [(100, 128, 0), (128, 200, 1)]
    assert made.landed_tokens == 200


def test_more_than_was_granted_is_a_violation() -> None:
    """Whoever says that more has landed than may have is not believed."""
    made = room()
    made.grant((3,), block_size=128, ticket=1)
    with pytest.raises(ProtocolViolation, match="129 tokens sent, but only 128"):
        made.on_progress(129)


def test_a_round_is_done_when_drained() -> None:
    """Not when it has landed; the oldest first."""
    made = room(200)
    first = made.grant((3,), block_size=128, ticket=1)
    assert made.pop_round_done() is None
    assert made.on_progress(128)
    assert not made.on_progress(128)
    assert made.pop_round_done() is None
    made.on_drained(127, aux=aux_of(200), digests=None)
    assert made.pop_round_done() is None
    made.on_drained(128, aux=None, digests=None)
    assert made.pop_round_done() is first
    assert made.pop_round_done() is None


def test_sums_that_differ_and_another_aux_are_corruption() -> None:
    """Neither is a success."""
    made = room(128)
    made.grant((3,), block_size=128, ticket=1)
    made.on_progress(128)
    with pytest.raises(CorruptRoom, match="aux"):
        made.on_drained(100, aux=(0,) * 16, digests=None)
    with pytest.raises(CorruptRoom, match="sums"):
        made.on_drained(128, aux=None, digests=(8,))
    made.on_drained(128, aux=aux_of(128), digests=SUMS)


def test_a_failed_room_hands_over_its_rounds() -> None:
    """Blocks of open rounds are the caller's to free or to quarantine."""
    made = room()
    granted = made.grant((3,), block_size=128, ticket=1)
    made.fail(Cause.ABORTED, "gone")
    assert made.quarantined == [granted]
    assert not made.open_rounds
    assert (made.poll, made.is_live, made.end) == (Poll.FAILED, False, (Cause.ABORTED, "gone"))


def test_a_room_is_one_line() -> None:
    made = ReceiverTransfer(RoomKey(7), "encoder-1", opened_at=0.0)
    assert (
        repr(made) == "<ReceiverTransfer room=7 attempt=0 lane=0 opening tokens=0/? rounds=0 from=encoder-1>"
    )
    made.on_announce(announce())
    made.grant(tuple(range(8)), block_size=128, ticket=1)
    made.on_progress(100)
    assert repr(made) == (
        "<ReceiverTransfer room=7 attempt=0 lane=0 filling tokens=100/2000 rounds=1 from=encoder-1>"
    )
