"""One room on the sending side."""

from __future__ import annotations

from typing import Any

import pytest

from embedwire.errors import ProtocolViolation
from embedwire.limits import AUX_WORDS, OPEN_ROUNDS_MAX
from embedwire.protocol.messages import Cause, Init, ResumeTransfer, RoomKey
from embedwire.protocol.sender import SenderRoom, SenderTransfer
from embedwire.protocol.states import Poll, SenderState

SIZES: dict[str, Any] = {"block_size": 128, "num_blocks": 1000}


def room(total: int = 2000) -> SenderTransfer:
    """A room that was opened by peer 5 and whose source is ready."""
    aux = (total, *[0] * (AUX_WORDS - 1))
    made = SenderTransfer(RoomKey(7), total_tokens=total, aux=aux, content_hash=b"h")
    made.on_open(5)
    made.on_ready(1.0, (9,))
    return made


def grant(number: int, start: int, blocks: tuple[int, ...], **other: int) -> Init:
    """A grant of whole blocks of 128."""
    kind = Init if number == 0 else ResumeTransfer
    content = {"allocated_tokens": len(blocks) * 128, "ticket": number + 1} | other
    return kind(source=5, room=7, round=number, start_token=start, block_indices=blocks, **content)  # type: ignore[return-value]


@pytest.mark.failure_mode("resume-never-triggered")
def test_two_rounds() -> None:
    """2000/1024: the second round starts at 1024 and has 976 tokens."""
    made = room()
    first = made.on_grant(grant(0, 0, tuple(range(8))), **SIZES)
    assert first is not None
    assert (first.start_token, first.tokens) == (0, 1024)
    made.on_round_landed(0)
    assert (made.sent_tokens, made.state, made.poll) == (1024, SenderState.WRITING, Poll.TRANSFERRING)
    second = made.on_grant(grant(1, 1024, tuple(range(8))), **SIZES)
    assert second is not None
    assert (second.start_token, second.tokens, second.end_token) == (1024, 976, 2000)
    made.on_round_landed(1)
    assert (made.sent_tokens, made.state) == (2000, SenderState.DELIVERED)
    made.on_done()
    assert (made.poll, made.end) == (Poll.SUCCESS, (Cause.DONE, ""))


@pytest.mark.failure_mode("repeated-grant-written-twice")
@pytest.mark.invariant("token-progress")
def test_a_known_grant_is_no_new_one() -> None:
    """A repeated grant starts no write, nor does one that arrives before its predecessor."""
    made = room()
    assert made.on_grant(grant(1, 1024, (1,)), **SIZES) is None
    assert made.on_grant(grant(0, 0, (1,)), **SIZES) is not None
    assert made.on_grant(grant(0, 0, (1,)), **SIZES) is None
    assert len(made.rounds) == 1


@pytest.mark.failure_mode("grant-not-whole-blocks", "lying-peer")
@pytest.mark.invariant("alignment", "validation")
@pytest.mark.parametrize(
    ("bad", "words"),
    [
        (grant(1, 127, (2,)), "starts at token 127, expected 128"),
        (grant(1, 256, (2,)), "starts at token 256, expected 128"),
        (grant(1, 128, (2, 3), allocated_tokens=255), "255 tokens announced for 2 blocks of 128: 256"),
        (grant(1, 128, (2, 2)), "one twice"),
        (grant(1, 128, (1000,)), "0..999"),
        (grant(0, 0, (1,), ticket=9), "different tickets"),
    ],
)
def test_a_grant_that_is_wrong_changes_nothing(bad: Init, words: str) -> None:
    """Among others: a grant announces exactly its whole blocks."""
    made = room()
    made.on_grant(grant(0, 0, (1,)), **SIZES)
    with pytest.raises(ProtocolViolation, match=words):
        made.on_grant(bad, **SIZES)
    assert (made.granted_tokens, len(made.rounds), made.state) == (128, 1, SenderState.WRITING)


def test_a_grant_with_nothing_left_or_too_early_or_too_many() -> None:
    """Each is a violation."""
    full = room(100)
    full.on_grant(grant(0, 0, (1,)), **SIZES)
    with pytest.raises(ProtocolViolation, match="nothing is left"):
        full.on_grant(grant(1, 100, (2,)), **SIZES)
    unopened = SenderTransfer(RoomKey(7), total_tokens=9, aux=(9, *[0] * 15), content_hash=b"")
    with pytest.raises(ProtocolViolation, match="offered"):
        unopened.on_grant(grant(0, 0, (1,)), **SIZES)
    many = room(100_000)
    for number in range(OPEN_ROUNDS_MAX):
        many.on_grant(grant(number, number * 128, (number,)), **SIZES)
    with pytest.raises(ProtocolViolation, match="more than 16"):
        many.on_grant(grant(16, 16 * 128, (16,)), **SIZES)


def test_sent_tokens_are_a_contiguous_prefix() -> None:
    """A round that landed before its predecessor counts only when that one has, too; nothing makes the number fall."""
    made = room()
    for number in range(3):
        made.on_grant(grant(number, number * 128, (number,)), **SIZES)
    assert not made.on_landed(1, 128)
    assert made.sent_tokens == 0
    assert made.on_landed(0, 100)
    assert made.sent_tokens == 100
    assert not made.on_landed(0, 50)
    assert made.on_landed(0, 128)
    assert made.sent_tokens == 256


def test_delivered_only_when_every_write_has_returned() -> None:
    """All has landed, but one write has not returned: its source may still be read."""
    made = room(256)
    for number in range(2):
        made.on_grant(grant(number, number * 128, (number,)), **SIZES)
    made.writes_under_way = 2
    made.on_landed(0, 128)
    made.writes_under_way = 1
    made.on_round_landed(1)
    assert (made.sent_tokens, made.state) == (256, SenderState.WRITING)
    made.writes_under_way = 0
    made.on_round_landed(0)
    assert made.state is SenderState.DELIVERED


def test_digests_are_announced_once_the_source_is_there() -> None:
    """And not before: what is not there can not be summed up."""
    made = SenderTransfer(RoomKey(7), total_tokens=9, aux=(9, *[0] * (AUX_WORDS - 1)), content_hash=b"h")
    assert made.announcement(1, 5).digests == ()
    made.on_ready(3.0, (42,))
    told = made.announcement(1, 5)
    assert (told.ready, told.digests, told.source_ms) == (True, (42,), 3.0)


@pytest.mark.failure_mode("status-raised-again")
def test_the_first_cause_stays() -> None:
    """FAILED is final, and ``done`` before all has landed is a violation."""
    made = room()
    with pytest.raises(ProtocolViolation, match="0 of 2000"):
        made.on_done()
    made.fail(Cause.DEADLINE, "first")
    made.fail(Cause.ABORTED, "second")
    assert made.end == (Cause.DEADLINE, "first")
    with pytest.raises(ProtocolViolation):
        made.on_done()
    assert made.poll is Poll.FAILED


def test_a_room_belongs_to_who_opened_it_first() -> None:
    """A second opening changes nothing."""
    made = room()
    made.on_open(6)
    assert made.peer == 5
    told = made.announcement(1, 5)
    assert (told.total_tokens, told.aux[0], told.ready, told.source_ms) == (2000, 2000, True, 1.0)


def test_a_room_is_one_line() -> None:
    made = room()
    assert made.on_grant(grant(0, 0, tuple(range(8))), **SIZES) is not None
    made.on_landed(0, 100)
    line = "<SenderTransfer room=7 attempt=0 lane=0 writing tokens=100/2000 rounds=1 receiver=5>"
    assert repr(made) == line
    assert repr(SenderRoom(RoomKey(7), lanes={made.key: made})) == (
        f"<SenderRoom room=7 attempt=0 end=done lanes=[{line}]>"
    )
