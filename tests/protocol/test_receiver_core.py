"""All rooms and sessions of a receiver, message by message."""

from __future__ import annotations

from typing import Any

import pytest

from embedwire.errors import OverloadedError, UsageError
from embedwire.limits import AUX_WORDS, PROTOCOL_VERSION, Limits
from embedwire.memory.allocator import BlockAllocator
from embedwire.memory.budget import Budget
from embedwire.protocol.actions import (
    Assemble,
    Drain,
    Failed,
    Finished,
    Hangup,
    Heard,
    Permit,
    ReceiverAction,
    Reconnect,
    Revoke,
    Send,
)
from embedwire.protocol.handshake import Offered
from embedwire.protocol.messages import (
    Abort,
    Announce,
    Cause,
    Done,
    Ended,
    Hello,
    Init,
    Kept,
    Message,
    Open,
    Ping,
    Refused,
    ResumeTransfer,
    RoomKey,
    Status,
    Stranger,
    Welcome,
)
from embedwire.protocol.receiver_core import ReceiverCore
from embedwire.protocol.receiver_lanes import IDLE_S
from embedwire.protocol.states import Poll, ReceiverState

ME, SENDER, ADDRESS, KEY = 5, 11, "tcp://encoder:1", RoomKey(7)
FROM: dict[str, Any] = {"source": SENDER, "target": ME}


def sent(actions: list[ReceiverAction]) -> list[Message]:
    return [a.message for a in actions if isinstance(a, Send)]


class Bench:
    """A core with a pool of 4 blocks of 128, one byte a token."""

    def __init__(self, *, wire: str = "tcp", memory: int = 10_000, **limits: Any) -> None:
        self.blocks, self.memory = BlockAllocator(4, 128), Budget(memory)
        self.core = ReceiverCore(
            incarnation=ME,
            offered=Offered(("a",), 128, 4, (("tcp", b""), ("shm", b"")), frozenset({"tcp"})),
            blocks=self.blocks,
            memory=self.memory,
            token_bytes=1,
            default_allocate_tokens=256,
            limits=Limits(**{"window_rounds": 1, **limits}),
        )
        self.wire = wire

    def hear(self, message: Any, now: float = 1.0) -> list[ReceiverAction]:
        return self.core.on_message(message, ADDRESS, now=now)

    def welcome(self, source: int = SENDER, **other: Any) -> Welcome:
        nonce = self.core.lanes.sessions[ADDRESS].nonce
        content: dict[str, Any] = {
            "version": PROTOCOL_VERSION,
            "nonce": nonce,
            "fields": ("a",),
            "wire": self.wire,
        } | other
        return Welcome(source=source, target=ME, **content)

    def open(self, key: RoomKey = KEY, now: float = 0.0) -> None:
        """A room whose sender has welcomed us."""
        self.core.open(key, ADDRESS, now=now)
        self.hear(self.welcome(), now)

    def announce(self, key: RoomKey = KEY, total: int = 300, **other: Any) -> list[ReceiverAction]:
        aux = (total, *[0] * (AUX_WORDS - 1))
        content: dict[str, Any] = {
            "total_tokens": total,
            "aux": aux,
            "content_hash": b"",
            "ready": True,
            "digests": (9,),
        } | other
        return self.hear(Announce(**FROM, room=key[0], attempt=key[1], **content))

    def status(self, landed: int, number: int = 0, *, poll: Poll = Poll.TRANSFERRING) -> list[ReceiverAction]:
        return self.hear(Status(**FROM, room=7, poll=poll, round=number, sent_tokens=landed))

    def drained(self, to: int, digests: tuple[int, ...] | None = None) -> list[ReceiverAction]:
        return self.core.on_drained(KEY, to, aux=None, digests=digests, now=1.0)

    def fill(self) -> None:
        """The room is granted its first round."""
        self.open()
        self.announce()
        assert self.core.lanes.transfers[KEY].state is ReceiverState.FILLING


def test_hello_then_open() -> None:
    """The room is asked for once the sender has welcomed us; the hello is said again until then, under one nonce."""
    bench = Bench()
    (hello,) = sent(bench.core.open(KEY, ADDRESS, now=0.0))
    assert isinstance(hello, Hello)
    assert sent(bench.core.on_tick(0.3)) == [hello]
    assert [type(m) for m in sent(bench.hear(bench.welcome()))] == [Open]


def test_a_subscription_is_kept_up() -> None:
    """Without a room: said hello until it is welcomed, then pinged, said hello again to a new life, reached anew when it is silent."""
    bench = Bench(peer_silence_s=4.0)
    (first,) = sent(bench.core.subscribe(ADDRESS, now=0.0))
    assert isinstance(first, Hello)
    assert first.subscribes
    assert bench.core.subscribe(ADDRESS, now=0.0) == []
    assert sent(bench.core.on_tick(1.1)) == [first]
    kept = Kept(**FROM, content_hash=b"h", tokens=5)
    assert bench.hear(kept) == []  # nobody has welcomed us
    bench.hear(bench.welcome(), now=1.2)
    assert bench.hear(kept) == [Heard(ADDRESS, b"h", 5)]
    assert [type(m) for m in sent(bench.core.on_tick(2.2))] == [Ping]
    (again,) = sent(bench.hear(Stranger(source=12, target=ME), now=2.3))
    assert isinstance(again, Hello)
    assert (again.subscribes, again.nonce > first.nonce) == (True, True)
    assert Reconnect(ADDRESS) in bench.core.on_tick(7.0)
    assert Hangup(ADDRESS) not in bench.core.on_tick(7.0 + 2 * IDLE_S)


def test_a_subscription_to_a_sender_that_is_known() -> None:
    """It is told of it, and its rooms go on; without a subscription nothing is heard of what it keeps."""
    bench = Bench()
    bench.fill()
    assert bench.hear(Kept(**FROM, content_hash=b"h", tokens=5)) == []
    (again,) = sent(bench.core.subscribe(ADDRESS, now=2.0))
    assert isinstance(again, Hello)
    assert again.subscribes
    bench.hear(bench.welcome(), now=2.0)
    assert [type(a) for a in bench.status(256)] == [Drain]


def test_a_room_does_not_wait_for_a_subscription() -> None:
    """Who only subscribes says hello rarely, but a room is asked for as soon as without."""
    bench = Bench(retry_s=0.25, peer_silence_s=4.0)
    bench.core.subscribe(ADDRESS, now=0.0)
    assert [type(m) for m in sent(bench.core.open(KEY, ADDRESS, now=0.1))] == [Hello]
    assert [type(m) for m in sent(bench.core.on_tick(0.4))] == [Hello]


def test_a_whole_room() -> None:
    """Assembly, permit, grant, drain, revoke: in this order, round by round; then `done`, and whoever waits."""
    bench = Bench()
    bench.open()
    first = bench.announce()
    assert [type(a) for a in first] == [Assemble, Permit, Send]
    assert [type(a) for a in bench.status(256)] == [Drain]
    second = bench.drained(256)
    assert [type(a) for a in second] == [Revoke, Permit, Send]
    assert isinstance(sent(second)[0], ResumeTransfer)
    bench.status(300, 1)
    last = bench.drained(300, (9,))
    assert [type(a) for a in last] == [Revoke, Send, Finished]
    assert isinstance(sent(last)[0], Done)
    assert bench.blocks.blocks_free == 4
    assert bench.hear(Ended(**FROM, room=7, cause=Cause.DONE)) == []
    assert not bench.core.lanes.transfers
    assert bench.memory.used_bytes == 300
    assert isinstance(last[-1], Finished)
    for _ in range(2):
        bench.core.on_assembly_released(last[-1].reservation, now=2.0)
    assert bench.memory.used_bytes == 0


@pytest.mark.failure_mode("layouts-differ")
@pytest.mark.parametrize(
    ("other", "cause"),
    [
        ({"version": 99}, Cause.HANDSHAKE),
        ({"fields": ("b",)}, Cause.HANDSHAKE),
        ({"wire": "carrier pigeon"}, Cause.VIOLATION),
    ],
)
def test_a_welcome_that_does_not_fit(other: dict[str, Any], cause: Cause) -> None:
    """The rooms end with the cause."""
    bench = Bench()
    bench.core.open(KEY, ADDRESS, now=0.0)
    (failed,) = (a for a in bench.hear(bench.welcome(**other)) if isinstance(a, Failed))
    assert failed.cause is cause


@pytest.mark.failure_mode("message-from-earlier-life")
@pytest.mark.invariant("validation")
@pytest.mark.parametrize("kind", ["welcome", "refused"])
def test_an_answer_to_an_earlier_hello_is_none(kind: str) -> None:
    """A late answer from an earlier life of the sender opens, changes and ends no session."""
    bench = Bench()
    bench.fill()
    late: Message = bench.welcome(source=99)
    if kind == "refused":
        late = Refused(source=99, target=ME, nonce=1, cause=Cause.OVERLOADED, detail="")
    assert bench.hear(late) == []
    bench.hear(Stranger(**FROM))
    assert bench.hear(late) == [], "another hello is on its way, with another nonce"
    assert bench.core.lanes.sessions[ADDRESS].incarnation == SENDER
    assert bench.core.lanes.transfers[KEY].is_live


@pytest.mark.failure_mode("message-from-earlier-life")
def test_a_stranger_is_a_question_not_an_answer() -> None:
    """After a ``stranger``, no room ends before a new welcome shows which incarnation is there."""
    bench = Bench()
    bench.fill()
    (hello,) = sent(bench.hear(Stranger(source=99, target=ME)))
    assert isinstance(hello, Hello)
    assert bench.hear(Stranger(source=99, target=ME)) == []
    assert bench.core.lanes.transfers[KEY].is_live
    again = sent(bench.hear(bench.welcome()))
    assert [type(m) for m in again] == [Init]


@pytest.mark.failure_mode("restart-on-same-address", "message-from-earlier-life")
@pytest.mark.invariant("no-early-reuse")
@pytest.mark.parametrize(("wire", "free"), [("tcp", 4), ("shm", 2)])
def test_another_life_of_the_sender(wire: str, free: int) -> None:
    """Rooms that the earlier incarnation had announced are lost; the blocks it may write to stay in quarantine under it."""
    bench = Bench(wire=wire)
    bench.fill()
    bench.core.open(RoomKey(8), ADDRESS, now=1.0)
    bench.hear(Stranger(source=99, target=ME))
    actions = bench.hear(bench.welcome(source=99))
    (failed,) = (a for a in actions if isinstance(a, Failed))
    assert (failed.key, failed.cause) == (KEY, Cause.PEER_LOST)
    assert {type(m) for m in sent(actions)} == {Abort, Open}
    assert bench.blocks.blocks_free == free
    assert bench.core.suspects() == ({SENDER} if wire == "shm" else set())
    unknown = Ended(source=99, target=ME, room=7, cause=Cause.UNKNOWN_ROOM)
    bench.hear(unknown)
    assert bench.blocks.blocks_free == free, "the new life can not speak for the old one"
    bench.core.on_peer_gone(SENDER, now=2.0)
    assert bench.blocks.blocks_free == 4


def test_another_wire_does_not_vouch_for_the_first() -> None:
    """Rounds granted over a one-sided wire stay in quarantine when the sender comes back over a fenced one."""
    bench = Bench(wire="shm")
    bench.fill()
    bench.hear(Stranger(**FROM))
    bench.hear(bench.welcome(wire="tcp"))
    assert bench.blocks.blocks_quarantined == 2


@pytest.mark.failure_mode("reuse-during-write", "write-outcome-unknown")
@pytest.mark.invariant("no-early-reuse")
def test_blocks_in_doubt_are_kept_until_the_end_is_certain() -> None:
    """An uncertain end gives the cause, and frees no block."""
    bench = Bench(wire="shm")
    bench.fill()
    actions = bench.core.abort(KEY, Cause.ABORTED, "gone", now=1.0)
    assert [type(a) for a in actions] == [Failed, Revoke, Send]
    assert bench.memory.used_bytes == 0
    assert bench.blocks.blocks_quarantined == 2
    bench.hear(Ended(**FROM, room=7, cause=Cause.ABORTED, certain=False))
    assert not bench.core.lanes.transfers
    assert bench.blocks.blocks_quarantined == 2
    with pytest.raises(UsageError):
        bench.core.open(KEY, ADDRESS, now=1.0)
    asked = [m for m in sent(bench.core.on_tick(20.0)) if isinstance(m, Abort)]
    assert asked, "the end is still asked for"
    bench.hear(Ended(**FROM, room=7, cause=Cause.ABORTED, certain=True))
    assert bench.blocks.blocks_free == 4


def test_a_drain_that_comes_after_the_end_is_harmless() -> None:
    """While the room is being aborted, and when it is forgotten."""
    bench = Bench()
    bench.fill()
    bench.status(256)
    bench.core.abort(KEY, Cause.ABORTED, "", now=1.0)
    assert bench.drained(256) == []
    bench.hear(Ended(**FROM, room=7, cause=Cause.ABORTED))
    assert bench.drained(256) == []


def test_a_window_finishes_with_its_last_round() -> None:
    """Two rounds are open; the room is whole when both are drained, and the blocks of both come back."""
    bench = Bench(window_rounds=2)
    bench.fill()
    room = bench.core.lanes.transfers[KEY]
    assert len(room.open_rounds) == 2
    bench.status(300)
    assert not any(isinstance(a, Finished) for a in bench.drained(256))
    assert any(isinstance(a, Finished) for a in bench.drained(300, (9,)))
    assert bench.blocks.blocks_free == 4


def test_wrong_sums_end_the_room_as_corrupt() -> None:
    """Both sides hear it, and the blocks are free."""
    bench = Bench()
    bench.open()
    bench.announce(total=256)
    bench.status(256)
    actions = bench.drained(256, (8,))
    (failed,) = (a for a in actions if isinstance(a, Failed))
    assert failed.cause is Cause.CORRUPT
    (abort,) = sent(actions)
    assert isinstance(abort, Abort)
    assert abort.cause is Cause.CORRUPT
    assert bench.blocks.blocks_free == 4


@pytest.mark.failure_mode("lying-peer")
@pytest.mark.invariant("validation")
@pytest.mark.parametrize("bad", ["announce", "status"])
def test_a_violation_ends_its_own_room(bad: str) -> None:
    """No exception is raised, and the other room goes on."""
    bench = Bench()
    bench.fill()
    bench.core.open(RoomKey(8), ADDRESS, now=1.0)
    actions = bench.announce(total=301) if bad == "announce" else bench.status(257)
    (failed,) = (a for a in actions if isinstance(a, Failed))
    assert (failed.key, failed.cause) == (KEY, Cause.VIOLATION)
    assert bench.core.lanes.transfers[RoomKey(8)].is_live


@pytest.mark.failure_mode("lying-peer")
@pytest.mark.invariant("validation")
@pytest.mark.parametrize(
    ("poll", "number", "landed"),
    [
        (Poll.FAILED, 0, 0),  # an end is reported by `ended`
        (Poll.SUCCESS, 0, 256),
        (Poll.TRANSFERRING, 1, 256),  # round 1 was never granted
        (Poll.WAITING_FOR_INPUT, 1, 0),
        (Poll.BOOTSTRAPPING, 1, 0),
        (Poll.WAITING_FOR_INPUT, 0, 128),  # nothing lands before the sender writes
        (Poll.BOOTSTRAPPING, 0, 128),
    ],
)
def test_a_status_that_no_sender_can_report_ends_its_room(poll: Poll, number: int, landed: int) -> None:
    """A room with one granted round of 256 tokens fails; the other room of the same sender goes on."""
    bench = Bench()
    bench.fill()
    bench.core.open(RoomKey(8), ADDRESS, now=1.0)
    (failed,) = (a for a in bench.status(landed, number, poll=poll) if isinstance(a, Failed))
    assert (failed.key, failed.cause) == (KEY, Cause.VIOLATION)
    assert bench.core.lanes.transfers[RoomKey(8)].is_live


@pytest.mark.failure_mode("lying-peer")
@pytest.mark.invariant("validation")
@pytest.mark.parametrize("poll", [Poll.TRANSFERRING, Poll.WAITING_FOR_INPUT])
def test_a_status_before_any_grant_ends_its_room(poll: Poll) -> None:
    """Only BOOTSTRAPPING is legal there, the answer to an early `open`."""
    bench = Bench()
    bench.open()
    assert bench.status(0, poll=Poll.BOOTSTRAPPING) == []
    (failed,) = (a for a in bench.status(0, poll=poll) if isinstance(a, Failed))
    assert failed.cause is Cause.VIOLATION


@pytest.mark.failure_mode("message-repeated-or-late")
@pytest.mark.invariant("validation")
def test_late_and_repeated_statuses_change_nothing() -> None:
    """Of an earlier round, of an earlier poll, or the same again."""
    bench = Bench()
    bench.open()
    bench.announce(total=300)
    bench.status(256)
    bench.drained(256)
    lane = bench.core.lanes.transfers[KEY]
    assert len(lane.round_sizes) == 2
    late = [
        (256, 0, Poll.TRANSFERRING),
        (100, 0, Poll.TRANSFERRING),
        (0, 0, Poll.WAITING_FOR_INPUT),
        (0, 0, Poll.BOOTSTRAPPING),
    ]
    for landed, number, poll in late:
        assert bench.status(landed, number, poll=poll) == []
    assert (lane.landed_tokens, lane.state) == (256, ReceiverState.FILLING)


@pytest.mark.failure_mode("message-from-earlier-life", "lying-peer")
@pytest.mark.invariant("validation")
def test_what_is_not_for_us_or_not_from_our_sender_is_nothing() -> None:
    """Messages with another target, another source or another address are ignored."""
    bench = Bench()
    bench.fill()
    ended: dict[str, Any] = {"room": 7, "cause": Cause.ABORTED}
    assert bench.hear(Ended(source=SENDER, target=99, **ended)) == []
    assert bench.hear(Ended(source=99, target=ME, **ended)) == []
    assert bench.core.on_message(Ended(**FROM, **ended), "tcp://other:1", now=1.0) == []
    assert bench.core.lanes.transfers[KEY].is_live


@pytest.mark.failure_mode("abort-not-propagated")
def test_a_room_that_is_not_ours_any_more_is_aborted() -> None:
    """A message about a forgotten room is answered with its end in one round trip; an ``ended`` is not answered."""
    bench = Bench()
    bench.open(RoomKey(8))
    (abort,) = sent(bench.announce())
    assert isinstance(abort, Abort)
    assert (abort.room, abort.cause) == (7, Cause.UNKNOWN_ROOM)
    assert bench.hear(Ended(**FROM, room=7, cause=Cause.DONE)) == []


def test_opened_twice_and_too_many() -> None:
    """Rooms are bounded, and a key is open once."""
    bench = Bench(rooms_max=2)
    bench.open()
    with pytest.raises(UsageError):
        bench.core.open(KEY, ADDRESS, now=0.0)
    bench.core.open(RoomKey(7, 1), ADDRESS, now=0.0)
    with pytest.raises(OverloadedError):
        bench.core.open(RoomKey(9), ADDRESS, now=0.0)


@pytest.mark.failure_mode("request-never-fits")
def test_never_fits_is_said_before_the_source_is_ready() -> None:
    """Refused on the announcement, before the encoder has run."""
    bench = Bench(memory=299)
    bench.open()
    actions = bench.announce(ready=False)
    assert [type(a) for a in actions] == [Failed, Send]
    assert isinstance(actions[0], Failed)
    assert actions[0].cause is Cause.NEVER_FITS


@pytest.mark.failure_mode("encoder-killed")
@pytest.mark.invariant("deadlines")
def test_a_silent_sender_is_lost_and_asked_on() -> None:
    """After ``peer_silence_s`` its rooms end; a new room gets the whole time again."""
    bench = Bench()
    bench.open()
    bench.announce(ready=False)
    now, causes = 1.0, []
    while now < 1.0 + 5.0 * 1.25:
        now += 0.2
        causes += [a.cause for a in bench.core.on_tick(now) if isinstance(a, Failed)]
    assert causes == [Cause.PEER_LOST]
    bench.core.open(RoomKey(8), ADDRESS, now=now)
    assert not [a for a in bench.core.on_tick(now + 4.0) if isinstance(a, Failed)]


@pytest.mark.parametrize(
    ("step", "deadline_s"), [("opening", 35.0), ("not ready", 120.0), ("no blocks", 120.0), ("filling", 60.0)]
)
def test_every_state_has_a_deadline(step: str, deadline_s: float) -> None:
    """A sender that only answers pings does not keep a room for ever."""
    bench = Bench()
    bench.open(now=1.0)
    if step == "no blocks":
        bench.blocks.alloc_blocks(4)
    if step != "opening":
        bench.announce(ready=step != "not ready")
    now, ends = 1.0, []
    while now < 1.0 + deadline_s + 1.5:
        bench.core.lanes.sessions[ADDRESS].heard_at = now
        ends += [(now, a.cause) for a in bench.core.on_tick(now) if isinstance(a, Failed)]
        now += 0.5
    ((at, cause),) = ends
    assert cause is Cause.DEADLINE
    assert 1.0 + deadline_s <= at <= 1.0 + deadline_s + 0.5


def test_an_idle_session_ends_at_its_time() -> None:
    """Also where the clock's last bit is lost in a sum: one tick at the due time is enough, or a driver would spin on it."""
    bench, heard_at = Bench(), next(t for n in range(1, 1000) if (t := n / 7) + IDLE_S - t < IDLE_S)
    bench.open(now=0.0)
    bench.core.abort(KEY, Cause.ABORTED, "", now=0.0)
    bench.hear(Ended(**FROM, room=7, cause=Cause.ABORTED), now=heard_at)
    actions: list[ReceiverAction] = []
    for _ in range(100):
        due = bench.core.next_due()
        if due is None:
            break
        actions += bench.core.on_tick(due)
    assert actions[-1] == Hangup(ADDRESS)
    assert not bench.core.lanes.sessions


@pytest.mark.failure_mode("malformed-message")
@pytest.mark.invariant("validation")
def test_no_message_ends_the_rooms_of_its_origin() -> None:
    """A frame that does not decode ends the rooms of the address that it came from."""
    bench = Bench()
    bench.fill()
    assert bench.core.on_violation("tcp://other:1", "noise", now=1.0) == []
    actions = bench.core.on_violation(ADDRESS, "noise", now=1.0)
    assert [a.cause for a in actions if isinstance(a, Failed)] == [Cause.VIOLATION]


def test_closing_ends_every_room() -> None:
    """And tells the sender."""
    bench = Bench()
    bench.fill()
    actions = bench.core.close(now=1.0)
    assert [a.cause for a in actions if isinstance(a, Failed)] == [Cause.CLOSED]
    assert [type(m) for m in sent(actions)] == [Abort]
    assert bench.core.close(now=1.0) == []


def test_pings_while_there_are_rooms() -> None:
    """So that both sides know of each other while a room waits for its turn."""
    bench = Bench()
    bench.open()
    bench.announce(ready=False)
    assert any(isinstance(m, Ping) for m in sent(bench.core.on_tick(2.0)))
