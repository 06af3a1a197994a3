"""Receivers that are ranks of a group, in one process: agreement steps, lanes, shared assemblies, and the loss of a rank."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zmq

from embedwire.endpoint import ReceiverEndpoint, Reception, SenderEndpoint
from embedwire.errors import TransferError, TransportError, UsageError
from embedwire.group import RankConfig, member
from embedwire.group.agreement import WIDTH, agree
from embedwire.group.driver import MISSED_MAX, Heartbeat
from embedwire.protocol.topology import RankGroup
from embedwire.testing.payload import payload

TIMEOUT_S = 5.0


class Meeting:
    """A collective of threads, which counts."""

    def __init__(self, size: int) -> None:
        self._barrier = threading.Barrier(size)
        self._words: list[Sequence[int]] = []
        self._lock = threading.Lock()
        self.widths: list[int] = []

    def all_reduce_min(self, words: Sequence[int]) -> list[int]:
        with self._lock:
            self._words.append(words)
        first = self._barrier.wait(TIMEOUT_S) == 0
        agreed = agree(self._words)
        self._barrier.wait(TIMEOUT_S)
        if first:
            self._words.clear()
            self.widths.append(len(words))
        self._barrier.wait(TIMEOUT_S)
        return agreed


class Group:
    """One language server of several ranks, and the encoder ranks that it hears."""

    def __init__(
        self, stage: Any, group: RankGroup, directory: Path, *, senders: int = 1, **settings: Any
    ) -> None:
        self.stage = stage
        self.meeting = Meeting(group.size)
        self.group = group
        self.lost: list[str] = []
        self.receptions: dict[tuple[int, int], Future[Reception]] = {}
        self._lock = threading.Lock()
        self.ranks: list[ReceiverEndpoint] = []
        for rank in range(group.size):
            config = RankConfig(
                group,
                rank,
                address=f"ipc://{directory}/agreement",
                collective=self.meeting,
                timeout_s=TIMEOUT_S,
                on_room=None if rank == 0 else self._hear(rank),
                on_lost=self.lost.append,
            )
            self.ranks.append(stage.receiver(place=config, **settings))
        self.senders: list[SenderEndpoint] = [
            stage.sender(rank=rank, ranks=senders) for rank in range(senders)
        ]

    def _hear(self, rank: int) -> Callable[[Reception], None]:
        return lambda reception: self._at(reception.key.room, rank).set_result(reception)

    def _at(self, room: int, rank: int) -> Future[Reception]:
        with self._lock:
            return self.receptions.setdefault((room, rank), Future())

    def rest(self) -> None:
        """Wait until no rank holds anything, and no step is under way or requested."""
        self.receptions.clear()
        self.stage.wait_idle()
        self.wait_between_steps()

    def wait_between_steps(self) -> None:
        members: list[Any] = [rank._member for rank in self.ranks]

        def is_quiet() -> bool:
            before = {step for member in members for step in (member.step, member.steps_total)}
            threading.Event().wait(0.1)  # for what is on its way between the ranks
            return len(before) == 1 and before == {member.steps_total for member in members}

        self.stage.until(is_quiet)

    def offer(self, room: int, tokens: int, **more: Any) -> list[Any]:
        readers = len(self.group.readers)
        return [self.stage.offer(sender, room, tokens, readers=readers, **more) for sender in self.senders]

    def open(self, room: int) -> list[Reception]:
        """A room as every rank has it."""
        first = self.ranks[0].open(room, [sender.address for sender in self.senders])
        return [first, *(self._at(room, rank).result(20) for rank in range(1, self.group.size))]


@pytest.fixture
def make_group(stage: Any, tmp_path: Path) -> Iterator[Callable[..., Group]]:
    made: list[Group] = []

    def make(group: RankGroup, **settings: Any) -> Group:
        made.append(Group(stage, group, tmp_path, **settings))
        return made[-1]

    yield make
    for group in made:
        group.receptions.clear()  # and the arrays with them


def test_where_one_rank_alone_receives_there_is_no_collective(
    make_group: Callable[..., Group], stage: Any
) -> None:
    """Rank 0's facts are what all would agree on, so it decides, success and failure alike; the others get them in the step."""
    made = make_group(RankGroup.on_one_host(3))
    made.offer(7, 100)
    for reception in made.open(7):
        stage.check(reception, 100)
    made.ranks[0]._budget.limit_bytes = 1000
    made.offer(8, 100)
    assert {stage.failure_of(reception).cause for reception in made.open(8)} == {"never_fits"}
    del reception
    made.rest()
    assert made.ranks[1].stats().turns_total > 0
    assert made.meeting.widths == []


@pytest.mark.failure_mode("rank-counts-differ")
@pytest.mark.parametrize("delivery", ["replicate", "share"])
@pytest.mark.parametrize(("senders", "ranks"), [(1, 2), (2, 4), (4, 2), (3, 2)])
def test_every_rank_gets_every_byte(
    make_group: Callable[..., Group], stage: Any, senders: int, ranks: int, delivery: Any
) -> None:
    """Every rank gets the same tensor through a pool that is too small; with ``share`` the wire carries it once."""
    made = make_group(
        RankGroup.on_one_host(ranks, delivery=delivery), senders=senders, num_blocks=2, block_size=64
    )
    offers = made.offer(7, 1000, aux=(-756,))
    for reception in made.open(7):
        received = stage.check(reception, 1000)
        assert received.aux[:2] == (1000, -756)
        assert received.report.readers == len(made.group.readers)
    assert all(offer.result(20).total_tokens == 1000 for offer in offers)
    carried = sum(sender.stats().bytes_total for sender in made.senders)
    assert carried == 1000 * stage.layout.token_bytes * len(made.group.readers)
    assert len(made.group.readers) == (1 if delivery == "share" else ranks)


@pytest.mark.failure_mode("shared-assembly-reused-early")
def test_dummy_ranks_map_the_owners_memory(make_group: Callable[..., Group], stage: Any) -> None:
    """One copy per host: what a rank writes into it stays private, and the mapping outlives the release by the owner."""
    made = make_group(RankGroup.on_one_host(3))
    made.offer(7, 5000)
    owner, *others = (stage.check(reception, 5000) for reception in made.open(7))
    assert [other.report.bytes for other in others] == [0, 0]
    others[0].arrays["fill_ids"][:] = 1
    assert not np.array_equal(others[0].arrays["fill_ids"], owner.arrays["fill_ids"])
    assert np.array_equal(others[1].arrays["fill_ids"], owner.arrays["fill_ids"])
    expected = payload(stage.layout, 5000, room=7)
    owner.release()
    del owner
    made.offer(8, 5000)
    for reception in made.open(8):
        stage.check(reception, 5000)
    assert np.array_equal(others[1].arrays["fill_ids"], expected["fill_ids"])


def test_ranks_on_two_hosts(make_group: Callable[..., Group], stage: Any) -> None:
    """Share within each host, replicate between them: the wire carries it twice, for four ranks."""
    made = make_group(RankGroup(("a", "a", "b", "b")))
    assert made.group.readers == (0, 2)
    made.offer(7, 700)
    for reception in made.open(7):
        stage.check(reception, 700)
    assert made.senders[0].stats().bytes_total == 2 * 700 * stage.layout.token_bytes


def test_many_rooms_take_few_steps_and_an_idle_group_none(
    make_group: Callable[..., Group], stage: Any
) -> None:
    """One collective a step, of one width; no step without news. A step serves many rooms: fewer steps than two a room."""
    made = make_group(RankGroup.on_one_host(2, delivery="replicate"), num_blocks=4, block_size=64)
    rooms = range(1, 101)
    for room in rooms:
        made.offer(room, 60)
    addresses = [made.senders[0].address]
    receptions = [made.ranks[0].open(room, addresses) for room in rooms]
    for reception in receptions:
        stage.check(reception, 60)
    del receptions, reception
    made.rest()
    steps = made.ranks[0].stats().turns_total
    assert made.meeting.widths == [WIDTH] * steps
    assert steps < 200
    idle = threading.Event()
    assert not idle.wait(0.3)
    assert made.ranks[0].stats().turns_total == steps


def test_one_ranks_failure_is_everybodys(make_group: Callable[..., Group], stage: Any) -> None:
    """Rank 1 has no memory for such a room: it ends on every rank with the same cause, and the next one is received."""
    made = make_group(RankGroup.on_one_host(3, delivery="replicate"))
    made.ranks[1]._budget.limit_bytes = 1000
    offers = made.offer(7, 1000)
    assert {stage.failure_of(one).cause for one in (*made.open(7), *offers)} == {"never_fits"}
    made.offer(8, 20)
    for reception in made.open(8):
        stage.check(reception, 20)


def test_the_client_goes(make_group: Callable[..., Group], stage: Any, brake: Any) -> None:
    """Aborted on rank 0 in mid-write: aborted everywhere, with nothing kept."""
    made = make_group(RankGroup.on_one_host(2, delivery="replicate"))
    held = brake()
    offers = made.offer(7, 1000)
    receptions = made.open(7)
    held.wait_reached()
    receptions[0].cancel()
    made.ranks[0].stats()  # behind the cancellation: else the room may be whole before it
    held.release()
    assert {stage.failure_of(one).cause for one in (*receptions, *offers)} == {"aborted"}


@pytest.mark.failure_mode("rank-lost")
def test_a_rank_that_closes_ends_the_group(make_group: Callable[..., Group], stage: Any) -> None:
    """Open rooms end on the other ranks and on the encoder with a cause that names the rank; no room can be opened afterwards."""
    made = make_group(RankGroup.on_one_host(3, delivery="replicate"))
    receptions = made.open(7)
    made.ranks[2].close()
    for reception in receptions[:2]:
        failure = stage.failure_of(reception)
        assert failure.cause == "rank_lost"
        assert "rank 2" in failure.detail
    with pytest.raises(TransferError, match="rank_lost"):
        made.ranks[0].open(8, made.senders[0].address)
    stage.until(lambda: len(made.lost) == 2)


@pytest.fixture
def stall() -> Iterator[Callable[[ReceiverEndpoint], None]]:
    """Let a rank take part in no step any more."""
    go_on = threading.Event()

    def stall(rank: ReceiverEndpoint) -> None:
        is_stalled = threading.Event()
        member: Any = rank._member
        member._driver._loop.post(lambda: (is_stalled.set(), go_on.wait(20))[0])
        assert is_stalled.wait(20)

    yield stall
    go_on.set()


@pytest.mark.failure_mode("rank-lost")
@pytest.mark.invariant("deadlines")
@pytest.mark.parametrize("rank", [1, 0])
def test_a_rank_that_stops_while_nothing_happens(
    make_group: Callable[..., Group], stage: Any, stall: Callable[..., None], rank: int
) -> None:
    """All rooms wait for their encoder, so no rank has anything to report; the stopped rank is still found."""
    made = make_group(RankGroup.on_one_host(3, delivery="replicate"))
    receptions = made.open(7)
    made.wait_between_steps()
    stall(made.ranks[rank])
    for other, reception in enumerate(receptions):
        if other != rank:
            failure = stage.failure_of(reception)
            assert failure.cause == "rank_lost"
            # the latter if it stopped in the midst of a step
            assert f"rank {rank} " in failure.detail or "lost its group" in failure.detail


def test_an_open_room_is_no_news(make_group: Callable[..., Group], stage: Any) -> None:
    """It waits for its encoder through many heartbeats. The steps meanwhile lose no rank, and change nothing."""
    made = make_group(RankGroup.on_one_host(3, delivery="replicate"))
    receptions = made.open(7)
    before = made.ranks[0].stats().turns_total
    stage.until(lambda: made.ranks[0].stats().turns_total >= before + MISSED_MAX + 2)
    made.offer(7, 100)
    for reception in receptions:
        stage.check(reception, 100)


def test_heartbeats() -> None:
    """A step resets the count, and a rank that was stopped for a minute has missed one."""
    beats = Heartbeat(0.5)
    for step in (10.0, 20.0):
        beats.on_step(step)
        assert beats.next_due == step + 0.5
        assert [beats.miss(step + at) for at in range(1, MISSED_MAX)] == [False] * (MISSED_MAX - 1)
    beats.on_step(30.0)
    assert not beats.miss(90.0)
    assert beats.next_due == 90.5
    assert [beats.miss(90.0 + at) for at in range(1, MISSED_MAX)] == [False] * (MISSED_MAX - 2) + [True]


def test_no_control_socket_has_a_heartbeat(make_group: Callable[..., Group]) -> None:
    """libzmq ends the process where one falls due while a socket closes whose peer has gone (its issue 4364)."""
    made = make_group(RankGroup.on_one_host(2))
    members: list[Any] = [rank._member for rank in made.ranks]
    sockets = [member._driver._socket for member in members]
    assert [socket.getsockopt(zmq.HEARTBEAT_IVL) for socket in sockets] == [0, 0]


@pytest.mark.failure_mode("rank-lost")
@pytest.mark.invariant("deadlines")
def test_a_rank_that_does_not_answer_is_named(
    make_group: Callable[..., Group], stage: Any, stall: Callable[..., None]
) -> None:
    """A rank that stalls for longer than the deadline is found before the others enter a collective with it."""
    made = make_group(RankGroup.on_one_host(3, delivery="replicate"))
    made.offer(6, 10)
    for reception in made.open(6):
        stage.check(reception, 10)
    del reception
    made.rest()
    stall(made.ranks[1])
    failure = stage.failure_of(made.ranks[0].open(7, made.senders[0].address))
    assert failure.cause == "rank_lost"
    assert "rank 1 did not answer" in failure.detail


def test_a_rank_that_can_not_map_an_assembly_is_lost(
    make_group: Callable[..., Group], stage: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The others have the room already: it fails on that rank, and the group ends."""

    def attach(*_: Any) -> Any:
        raise TransportError("injected")

    monkeypatch.setattr(member, "attach", attach)
    made = make_group(RankGroup.on_one_host(2))
    made.offer(7, 100)
    first, second = made.open(7)
    stage.check(first, 100)
    failure = stage.failure_of(second)
    assert (failure.cause, failure.detail) == ("rank_lost", "injected")
    stage.until(lambda: len(made.lost) == 2)


@pytest.mark.parametrize("delivery", ["replicate", "share"])
def test_a_room_that_was_received_before(make_group: Callable[..., Group], stage: Any, delivery: Any) -> None:
    """Asked for again under the same number and attempt, as by a request that is sent twice: it ends on every rank, and not as done."""
    made = make_group(RankGroup.on_one_host(2, delivery=delivery))
    made.offer(7, 100)
    for reception in made.open(7):
        stage.check(reception, 100).release()
    del reception
    made.rest()
    assert {stage.failure_of(reception).cause for reception in made.open(7)} == {"unknown_room"}


def test_where_rooms_may_be_opened(make_group: Callable[..., Group], stage: Any) -> None:
    """On rank 0, once, into assemblies that the group makes."""
    made = make_group(RankGroup.on_one_host(2))
    address = made.senders[0].address
    with pytest.raises(UsageError, match="rank 0"):
        made.ranks[1].open(7, address)
    with pytest.raises(UsageError, match="itself"):
        made.ranks[0].open(7, address, make_assembly=stage.layout.empty)
    first = made.ranks[0].open(7, address)
    with pytest.raises(UsageError, match="open already"):
        made.ranks[0].open(7, address)
    first.cancel()
    assert stage.failure_of(first).cause == "aborted"


def test_an_address_that_cannot_be_used(stage: Any) -> None:
    """The receiver is not made, and no thread of it is left."""
    config = RankConfig(RankGroup.on_one_host(2), 0, "ipc:///nowhere/agreement", collective=Meeting(2))
    with pytest.raises(TransportError, match="agreement at ipc:///nowhere"):
        ReceiverEndpoint(stage.layout, place=config)
    threads = {thread.name for thread in threading.enumerate()}
    assert not threads & {"embedwire-receiver", "embedwire-agreement-0"}
