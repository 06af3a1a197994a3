"""All rooms and sessions of a sender, message by message."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest

from embedwire.errors import OverloadedError, UsageError
from embedwire.limits import AUX_WORDS, PROTOCOL_VERSION, Limits
from embedwire.protocol.actions import (
    Attach,
    CancelWrites,
    Detach,
    LaneReport,
    Release,
    Reply,
    SenderAction,
    Want,
    Write,
)
from embedwire.protocol.handshake import difference
from embedwire.protocol.messages import (
    Abort,
    Announce,
    Cause,
    Done,
    Ended,
    Grant,
    Hello,
    Init,
    Kept,
    Message,
    Open,
    Ping,
    Pong,
    Refused,
    ResumeTransfer,
    RoomKey,
    Status,
    Stranger,
    Welcome,
)
from embedwire.protocol.sender_core import SenderCore
from embedwire.protocol.states import Poll

SENDER, PEER, KEY = 11, 5, RoomKey(7)
DIGESTS = {KEY: (9,)}
TO: dict[str, Any] = {"source": PEER, "target": SENDER}


def hello(source: int = PEER, **other: Any) -> Hello:
    content: dict[str, Any] = {
        "version": PROTOCOL_VERSION,
        "nonce": 1,
        "fields": ("a",),
        "block_size": 128,
        "num_blocks": 9,
    }
    return Hello(source=source, **(content | {"wires": (("shm", b""),)} | other))


def grant(number: int = 0, start: int = 0, blocks: tuple[int, ...] = (1, 2)) -> Grant:
    kind = Init if number == 0 else ResumeTransfer
    return kind(
        **TO,
        room=7,
        round=number,
        start_token=start,
        allocated_tokens=len(blocks) * 128,
        block_indices=blocks,
        ticket=number + 1,
    )


def said(actions: list[SenderAction]) -> list[Message]:
    return [a.message for a in actions if isinstance(a, Reply)]


class Bench:
    """A core, and a receiver whose memory is in reach."""

    def __init__(self, **limits: Any) -> None:
        self.core = SenderCore(incarnation=SENDER, fields=("a",), limits=Limits(**limits))
        self.core.on_message(hello(), now=0.0)
        self.core.on_attached(PEER, "shm")

    def say(self, message: Any, now: float = 1.0) -> list[SenderAction]:
        return self.core.on_message(message, now=now)

    def offer(
        self,
        key: RoomKey = KEY,
        total: int = 300,
        now: float = 1.0,
        digests: Mapping[RoomKey, tuple[int, ...]] | None = None,
    ) -> list[SenderAction]:
        aux = (total, *[0] * (AUX_WORDS - 1))
        return self.core.offer(key, total_tokens=total, aux=aux, content_hash=b"", now=now, digests=digests)

    def write(self) -> Write:
        """A room in the middle of its first write."""
        self.offer()
        self.say(Open(**TO, room=7))
        self.core.ready(KEY, source_ms=1.0, digests=DIGESTS, now=1.0)
        (write,) = (a for a in self.say(grant()) if isinstance(a, Write))
        return write


def test_hello_is_answered_when_the_memory_is_in_reach() -> None:
    """Attach once; each hello is answered with its own nonce, whichever comes first."""
    core = SenderCore(incarnation=SENDER, fields=("a",))
    (attach,) = core.on_message(hello(nonce=3), now=0.0)
    assert isinstance(attach, Attach)
    assert core.on_message(hello(nonce=4), now=0.1) == []
    (welcome,) = said(core.on_attached(PEER, "shm"))
    assert isinstance(welcome, Welcome)
    assert (welcome.nonce, welcome.wire, welcome.target) == (4, "shm", PEER)
    for nonce in (6, 5):
        (again,) = said(core.on_message(hello(nonce=nonce), now=0.2))
        assert isinstance(again, Welcome)
        assert again.nonce == nonce


def test_who_subscribes_hears_of_items() -> None:
    """Any hello of it may say so; nobody else is told, nor anyone whose memory is not in reach."""
    bench = Bench()
    for number in (6, 7):
        bench.say(hello(number, nonce=1, subscribes=True))
    bench.core.on_attached(6, "shm")
    (kept,) = said(bench.core.keep(b"a", tokens=9))
    assert kept == Kept(source=SENDER, target=6, content_hash=b"a", tokens=9)
    bench.say(hello(nonce=3, subscribes=True))
    bench.say(hello(nonce=2))  # late
    bench.say(hello(nonce=4))  # under another address
    assert [m.target for m in said(bench.core.keep(b"b", tokens=9))] == [PEER, 6]


@pytest.mark.failure_mode("layouts-differ")
@pytest.mark.parametrize(
    ("other", "cause", "words"),
    [
        ({"version": 99}, Cause.HANDSHAKE, f"sender {PROTOCOL_VERSION}, receiver 99"),
        ({"fields": ("a", "b")}, Cause.HANDSHAKE, "field 1: sender none, receiver b"),
        ({"source": 0}, Cause.VIOLATION, "incarnation"),
    ],
)
def test_hello_is_refused(other: dict[str, Any], cause: Cause, words: str) -> None:
    """The answer names the field."""
    core = SenderCore(incarnation=SENDER, fields=("a",))
    (refused,) = said(core.on_message(hello(**other), now=0.0))
    assert isinstance(refused, Refused)
    assert (refused.cause, refused.nonce) == (cause, 1)
    assert words in refused.detail
    assert not core.sessions


def test_a_wire_that_does_not_reach() -> None:
    """The session is over, and the receiver hears it; a late result of an attach harms nobody."""
    core = SenderCore(incarnation=SENDER, fields=("a",))
    core.on_message(hello(nonce=8), now=0.0)
    (refused,) = said(core.on_attach_failed(PEER, "other host", now=1.0))
    assert isinstance(refused, Refused)
    assert (refused.cause, refused.nonce) == (Cause.WIRE_FAILED, 8)
    assert core.on_attach_failed(PEER, "again", now=1.0) == []
    assert core.on_attached(PEER, "shm") == [Detach(PEER)]


@pytest.mark.failure_mode("message-from-earlier-life")
@pytest.mark.invariant("validation")
@pytest.mark.parametrize(
    "message",
    [Ping(source=6, target=SENDER), Ping(source=PEER, target=99), Open(source=6, target=SENDER, room=7)],
)
def test_strangers(message: Message) -> None:
    """A message from an unknown receiver or to an earlier incarnation gets ``stranger`` and changes nothing."""
    bench = Bench()
    assert said(bench.say(message)) == [Stranger(source=SENDER, target=message.source)]
    assert not bench.core._pending_opens


def test_ping_pong() -> None:
    """A known receiver is answered."""
    assert said(Bench().say(Ping(**TO))) == [Pong(source=SENDER, target=PEER)]


def test_offer_then_open_then_ready() -> None:
    """Announced at once, and again when the source is ready; ready twice writes and says nothing twice."""
    bench = Bench()
    assert bench.offer() == []
    (early,) = said(bench.say(Open(**TO, room=7)))
    assert isinstance(early, Announce)
    assert not early.ready
    (ready,) = said(bench.core.ready(KEY, source_ms=2.0, digests=DIGESTS, now=1.0))
    assert isinstance(ready, Announce)
    assert ready.ready
    assert bench.core.ready(KEY, source_ms=2.0, digests=DIGESTS, now=1.0) == []
    bench.say(grant())
    assert bench.core.ready(KEY, source_ms=2.0, digests=DIGESTS, now=1.0) == [], (
        "no second write of the open round"
    )


@pytest.mark.failure_mode("messages-cross")
def test_open_then_offer() -> None:
    """The open waits and is answered with a status; the announcement then follows without another request."""
    bench = Bench()
    (told,) = said(bench.say(Open(**TO, room=7)))
    assert isinstance(told, Status)
    assert told.poll is Poll.BOOTSTRAPPING
    (announced,) = said(bench.offer())
    assert isinstance(announced, Announce)
    assert not bench.core._pending_opens


def test_an_open_waits_with_a_deadline() -> None:
    """Asking again does not prolong it."""
    bench = Bench()
    bench.say(Open(**TO, room=7), now=0.0)
    bench.say(Open(**TO, room=7), now=29.0)
    assert not any(isinstance(m, Ended) for m in said(bench.core.on_tick(29.9)))
    (ended,) = (m for m in said(bench.core.on_tick(30.1)) if isinstance(m, Ended))
    assert ended.cause is Cause.UNKNOWN_ROOM


def test_offered_twice_and_too_many() -> None:
    """A key is offered once in a life; rooms are bounded."""
    bench = Bench(rooms_max=2)
    bench.offer(RoomKey(1))
    with pytest.raises(UsageError):
        bench.offer(RoomKey(1))
    bench.offer(RoomKey(1, 1))
    with pytest.raises(OverloadedError):
        bench.offer(RoomKey(2))
    bench.core.fail(RoomKey(1, 1), Cause.ENCODER_FAILED, "no", now=1.0)
    with pytest.raises(UsageError):
        bench.offer(RoomKey(1, 1))


@pytest.mark.failure_mode("refusal-not-sent")
def test_a_room_that_was_never_offered_can_be_refused() -> None:
    """A waiting open is refused at once, a later one in one round trip; the key cannot be used again."""
    bench = Bench()
    bench.say(Open(**TO, room=7))
    (told,) = said(bench.core.fail(KEY, Cause.OVERLOADED, "no memory", now=1.0))
    assert isinstance(told, Ended)
    assert (told.cause, told.certain) == (Cause.OVERLOADED, True)
    assert bench.core.fail(KEY, Cause.ABORTED, "again", now=1.0) == []
    (again,) = said(bench.say(Open(**TO, room=7)))
    assert isinstance(again, Ended)
    assert again.cause is Cause.OVERLOADED
    with pytest.raises(UsageError):
        bench.offer()
    assert not bench.core._pending_opens


def test_a_whole_room() -> None:
    """Two rounds, done, ended; the owner of the source gets it back with the cause and the rounds."""
    bench = Bench()
    write = bench.write()
    assert (write.round.tokens, write.landed_tokens) == (256, 0)
    (half,) = said(bench.core.on_landed(KEY, 0, 128, now=2.0))
    assert isinstance(half, Status)
    assert half.sent_tokens == 128
    (whole,) = said(bench.core.on_written(KEY, 0, now=2.0))
    assert isinstance(whole, Status)
    assert whole.sent_tokens == 256
    bench.say(grant(1, 256, (1,)))
    bench.core.on_written(KEY, 1, now=3.0)
    actions = bench.say(Done(**TO, room=7))
    assert actions[-1] == Release(KEY, Cause.DONE, "", (LaneReport(KEY, (256, 44)),))
    (ended,) = said(actions)
    assert isinstance(ended, Ended)
    assert ended.cause is Cause.DONE
    (again,) = said(bench.say(Done(**TO, room=7)))
    assert again == ended, "a lost end is said again"


@pytest.mark.failure_mode("repeated-grant-written-twice", "message-lost")
@pytest.mark.invariant("receiver-drives")
def test_a_grant_that_comes_again_is_answered_with_the_state() -> None:
    """No second write; the answer holds what a lost status held, and no deadline moves."""
    bench = Bench()
    bench.write()
    bench.core.on_written(KEY, 0, now=2.0)
    due = dict(bench.core._timers._due)
    (told,) = bench.say(grant(), now=50.0)
    assert isinstance(told, Reply)
    assert isinstance(told.message, Status)
    assert told.message.sent_tokens == 256
    assert bench.core._timers._due == due


def test_a_bad_grant_fails_its_own_room() -> None:
    """Nothing raises; the room ends on both sides, and another one does not."""
    bench = Bench()
    bench.offer(RoomKey(8))
    bench.write()
    actions = bench.say(grant(1, 999, (3,)))
    assert CancelWrites(KEY) in actions
    actions = bench.core.on_write_lost(KEY, 0, "cancelled", now=2.0)
    (ended,) = said(actions)
    assert isinstance(ended, Ended)
    assert ended.cause is Cause.VIOLATION
    assert list(bench.core.rooms) == [RoomKey(8)]


@pytest.mark.failure_mode("reuse-during-write")
@pytest.mark.invariant("no-early-reuse")
def test_an_abort_is_acknowledged_after_the_write_has_returned() -> None:
    """The source is not released before, and a repeated abort gets no early answer."""
    bench = Bench()
    bench.write()
    assert bench.say(Abort(**TO, room=7, cause=Cause.ABORTED)) == [CancelWrites(KEY)]
    assert bench.say(Abort(**TO, room=7, cause=Cause.ABORTED)) == []
    actions = bench.core.on_write_lost(KEY, 0, "cancelled", now=2.0)
    assert [type(a) for a in actions] == [Reply, Release]
    (ended,) = said(actions)
    assert isinstance(ended, Ended)
    assert (ended.cause, ended.certain) == (Cause.ABORTED, True)


@pytest.mark.failure_mode("messages-cross")
def test_an_abort_of_a_room_that_was_never_opened_is_acknowledged() -> None:
    """The open was lost: the abort is answered all the same."""
    bench = Bench()
    bench.offer()
    (ended,) = said(bench.say(Abort(**TO, room=7, cause=Cause.ABORTED)))
    assert isinstance(ended, Ended)
    assert (ended.cause, ended.target) == (Cause.ABORTED, PEER)


def test_a_lost_write_is_tried_again_a_few_times() -> None:
    """From where it had landed, each time the receiver asks again; then the room fails."""
    bench = Bench(write_attempts_max=2)
    bench.write()
    bench.core.on_landed(KEY, 0, 100, now=2.0)
    assert bench.core.on_write_lost(KEY, 0, "lost", now=2.0) == []
    (again,) = (a for a in bench.say(grant()) if isinstance(a, Write))
    assert again.landed_tokens == 100
    assert not any(isinstance(a, Write) for a in bench.say(grant()))
    assert bench.core.on_write_lost(KEY, 0, "lost", now=2.0) == []
    _, ended = said(bench.say(grant()))
    assert isinstance(ended, Ended)
    assert (ended.cause, ended.certain) == (Cause.WIRE_FAILED, True)


@pytest.mark.failure_mode("abort-not-propagated", "messages-cross")
def test_a_write_lost_to_an_abort_that_is_on_its_way_ends_as_aborted() -> None:
    """A fenced wire ends the write before the abort message arrives."""
    bench = Bench(write_attempts_max=1)
    bench.write()
    bench.core.on_write_lost(KEY, 0, "revoked", now=2.0)
    (ended,) = said(bench.say(Abort(**TO, room=7, cause=Cause.ABORTED)))
    assert isinstance(ended, Ended)
    assert ended.cause == Cause.ABORTED


@pytest.mark.failure_mode("write-outcome-unknown")
@pytest.mark.invariant("no-early-reuse")
def test_a_doubt_lasts_until_there_is_proof() -> None:
    """An unknown write ends the room uncertainly; when its session is closed, the receiver gets the certain end."""
    bench = Bench()
    bench.write()
    (ended,) = said(bench.core.on_write_unknown(KEY, 0, "timed out", now=2.0))
    assert isinstance(ended, Ended)
    assert not ended.certain
    (asked,) = said(bench.say(Abort(**TO, room=7, cause=Cause.ABORTED)))
    assert isinstance(asked, Ended)
    assert not asked.certain
    (certain,) = said(bench.core.on_doubt_ended(PEER, KEY))
    assert isinstance(certain, Ended)
    assert certain.certain
    assert bench.core.on_doubt_ended(PEER, RoomKey(99)) == []


def test_another_receiver_does_not_get_the_room() -> None:
    """It belongs to who opened it; the other hears why, and the room goes on."""
    bench = Bench()
    bench.write()
    bench.core.on_message(hello(6), now=1.0)
    bench.core.on_attached(6, "shm")
    (ended,) = said(bench.say(Open(source=6, target=SENDER, room=7)))
    assert isinstance(ended, Ended)
    assert ended.cause is Cause.VIOLATION
    assert KEY in bench.core.rooms


@pytest.mark.parametrize("idle_s", [1.0, 6.0, 30.0])
def test_a_receiver_that_was_idle_is_lost_as_soon_as_any(idle_s: float) -> None:
    """Without rooms it may be silent for long; from its first room on it may not."""
    bench = Bench(peer_silence_s=5.0)
    while (due := bench.core.next_due()) is not None and due <= idle_s:
        bench.core.on_tick(due)
    bench.core.offer(KEY, total_tokens=300, aux=(300, *[0] * (AUX_WORDS - 1)), content_hash=b"", now=idle_s)
    bench.say(Open(**TO, room=7), now=idle_s)
    released: list[Any] = []
    while not released:
        due = bench.core.next_due()
        assert due is not None
        released = [action for action in bench.core.on_tick(due) if isinstance(action, Release)]
    assert (released[0].cause, due) == (Cause.PEER_LOST, idle_s + 5.0)


def test_an_abort_for_no_reason_is_a_violation() -> None:
    """Else the room would count as received."""
    bench = Bench()
    bench.offer()
    bench.say(Open(**TO, room=7))
    ended = bench.say(Abort(**TO, room=7, cause=Cause.DONE))
    assert [action.cause for action in ended if isinstance(action, Release)] == [Cause.VIOLATION]


@pytest.mark.failure_mode("language-server-killed")
@pytest.mark.invariant("deadlines")
def test_a_silent_receiver_is_lost() -> None:
    """Its rooms end when its writes have returned, its session at once."""
    bench = Bench()
    bench.write()
    assert bench.core.on_tick(5.9) == []
    actions = bench.core.on_tick(6.0)
    assert CancelWrites(KEY) in actions
    assert actions[-1] == Detach(PEER)
    assert not bench.core.sessions
    (_, release) = bench.core.on_write_lost(KEY, 0, "gone", now=7.0)
    assert isinstance(release, Release)
    assert release.cause is Cause.PEER_LOST


@pytest.mark.parametrize(
    ("step", "deadline_s"), [("offered", 30.0), ("not ready", 120.0), ("ready", 180.0), ("writing", 60.0)]
)
def test_every_state_has_a_deadline(step: str, deadline_s: float) -> None:
    """A receiver that only pings does not keep a room for ever."""
    bench = Bench()
    if step == "writing":
        bench.write()
    else:
        bench.offer()
    if step in ("not ready", "ready"):
        bench.say(Open(**TO, room=7))
    if step == "ready":
        bench.core.ready(KEY, source_ms=1.0, digests=DIGESTS, now=1.0)
    now, room = 1.0, bench.core.transfers[KEY]
    while now < 1.0 + deadline_s - 1.0:
        bench.say(Ping(**TO), now)
        bench.core.on_tick(now)
        assert room.end is None
        now += 1.0
    bench.say(Ping(**TO), now)
    bench.core.on_tick(1.0 + deadline_s)
    assert room.end is not None
    assert room.end[0] is Cause.DEADLINE


def test_the_memory_of_ended_rooms_is_bounded() -> None:
    """The oldest is forgotten first, but not one that is still asked for."""
    bench = Bench(tombstones_max=3)
    for number in range(3):
        bench.core.fail(RoomKey(number), Cause.OVERLOADED, "", now=1.0)
    bench.say(Open(**TO, room=0))
    bench.core.fail(RoomKey(3), Cause.OVERLOADED, "", now=1.0)
    assert list(bench.core._tombstones) == [RoomKey(2), RoomKey(0), RoomKey(3)]


def test_closing_ends_every_room() -> None:
    """And tells everybody."""
    bench = Bench()
    bench.write()
    bench.offer(RoomKey(8))
    actions = bench.core.close(now=2.0) + bench.core.on_write_lost(KEY, 0, "closed", now=2.0)
    assert {a.key: a.cause for a in actions if isinstance(a, Release)} == {
        KEY: Cause.CLOSED,
        RoomKey(8): Cause.CLOSED,
    }
    assert not bench.core.rooms


@pytest.mark.failure_mode("layouts-differ")
def test_difference_names_the_first_field() -> None:
    """The text names the field and both values."""
    assert "field 0: sender a, receiver b" in difference(("a",), ("b",))
    assert "sender b, receiver none" in difference(("a", "b"), ("a",))


def test_an_item_is_wanted_once_and_then_offered() -> None:
    """A room that the receiver numbered itself: its owner is asked once, however often `open` comes."""
    bench = Bench()
    wanted = Open(**TO, room=7, item=b"hash")
    assert [a for a in bench.say(wanted) if isinstance(a, Want)] == [Want(KEY, b"hash")]
    assert [a for a in bench.say(wanted) if isinstance(a, Want)] == []
    (announced,) = said(bench.offer())
    assert isinstance(announced, Announce)
    assert [a for a in bench.say(Open(**TO, room=8)) if isinstance(a, Want)] == []


def test_what_is_ready_when_it_is_offered_is_announced_once() -> None:
    bench = Bench()
    bench.say(Open(**TO, room=7, item=b"hash"))
    (announced,) = said(bench.offer(digests=DIGESTS))
    assert isinstance(announced, Announce)
    assert (announced.ready, announced.digests) == (True, (9,))
    assert bench.core.ready(KEY, source_ms=5.0, digests=DIGESTS, now=1.0) == []


def test_an_item_that_is_not_kept_ends_at_once() -> None:
    """The one who asks hears it in one round trip, and again when it asks again."""
    bench = Bench()
    wanted = Open(**TO, room=7, item=b"hash")
    bench.say(wanted)
    (ended,) = said(bench.core.fail(KEY, Cause.UNKNOWN_ITEM, "not kept", now=1.0))
    assert isinstance(ended, Ended)
    assert (ended.cause, ended.detail, ended.certain) == (Cause.UNKNOWN_ITEM, "not kept", True)
    assert [m.cause for m in said(bench.say(wanted)) if isinstance(m, Ended)] == [Cause.UNKNOWN_ITEM]
    assert said(bench.core.on_tick(31.0)) == []  # nor does anything of it come due


def test_an_item_that_is_refused_on_another_rank_of_the_encoder() -> None:
    """The lane that was opened ends, with its cause, although the topology gives this rank another one."""
    core = SenderCore(incarnation=SENDER, fields=("a",), rank=1, ranks=2)
    core.on_message(hello(), now=0.0)
    core.on_attached(PEER, "shm")
    core.on_message(Open(**TO, room=7, item=b"hash"), now=1.0)
    (ended,) = said(core.fail(KEY, Cause.UNKNOWN_ITEM, "nothing is kept here", now=1.0))
    assert isinstance(ended, Ended)
    assert (ended.key, ended.cause) == (KEY, Cause.UNKNOWN_ITEM)


def test_a_receiver_that_had_two_lanes_of_a_room_is_lost() -> None:
    """The first lane that fails ends the other one too."""
    bench = Bench()
    aux = (300, *[0] * (AUX_WORDS - 1))
    bench.core.offer(KEY, total_tokens=300, aux=aux, content_hash=b"", now=1.0, readers=2)
    for lane in (0, 1):
        bench.say(Open(**TO, room=7, lane=lane))
    actions = bench.core.on_peer_lost(PEER, "it is gone", now=2.0)
    (release,) = (a for a in actions if isinstance(a, Release))
    assert (release.cause, release.detail) == (Cause.PEER_LOST, "it is gone")
    assert {report.key for report in release.lanes} == {KEY, KEY._replace(lane=1)}
