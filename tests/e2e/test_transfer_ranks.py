"""Groups of ranks as real processes over Gloo, without a model: rooms that all ranks get together, and ranks that are slow, stop or die."""

from __future__ import annotations

import os
import re
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest

from embedwire.bench.ranks import Ranks
from embedwire.bench.remote import Remote
from embedwire.errors import TransferError
from embedwire.group.agreement import WIDTH
from embedwire.limits import Limits
from embedwire.memory.layout import multimodal
from embedwire.protocol.topology import RankGroup
from embedwire.testing.rank_processes import PATIENCE_S, EncoderRank, End, LanguageRank

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(120)]

LAYOUT = multimodal(64)
RANK_TIMEOUT_S = 3.0
POOL = {"num_blocks": 8, "block_size": 128, "default_allocate_tokens": 1024}
LIMITS = Limits(retry_s=0.05, peer_silence_s=2.0, write_timeout_s=30.0, round_s=40.0, close_s=2.0)
ONE_AT_A_TIME = Limits(
    retry_s=0.05, peer_silence_s=2.0, write_timeout_s=30.0, round_s=40.0, close_s=2.0, window_rounds=1
)
DELTA = -756
TWO_HOSTS = RankGroup(("a", "a", "b", "b"))


def until(holds: Callable[[], Any], *, otherwise: Callable[[], object] = str) -> None:
    pause, deadline = threading.Event(), time.monotonic() + PATIENCE_S
    while not holds():
        assert time.monotonic() < deadline, otherwise()
        pause.wait(0.01)


class World:
    """The ranks of an encoder and of a language server, and the rooms between them."""

    def __init__(self, group: RankGroup, *, encoders: int = 1, **settings: Any) -> None:
        self.group = group
        self.lost: set[int] = set()
        self.ranks = Ranks(
            group, LanguageRank, LAYOUT, {**POOL, "limits": LIMITS, **settings}, timeout_s=RANK_TIMEOUT_S
        )
        self.encoders = [
            Remote(EncoderRank, rank, encoders, LAYOUT, {"limits": LIMITS}) for rank in range(encoders)
        ]
        for encoder in self.encoders:
            encoder.answer()
        self.addresses = [encoder.call("address") for encoder in self.encoders]

    def tell_encoders(self, method: str, *args: Any, **more: Any) -> list[Any]:
        return [encoder.call(method, *args, **more) for encoder in self.encoders]

    def offer(self, room: int, tokens: int, **more: Any) -> None:
        self.tell_encoders("offer", room, tokens, readers=len(self.group.readers), **more)

    def open(self, room: int, attempt: int = 0) -> None:
        self.ranks.remotes[0].call("open", room, self.addresses, attempt=attempt)

    def move(self, room: int, tokens: int, **more: Any) -> list[End]:
        """A room, as every rank has it. It is still held."""
        self.offer(room, tokens, **more)
        self.open(room)
        ends = self.ranks.all("end", room)
        assert self.tell_encoders("end", room) == ["done"] * len(self.encoders)
        return ends

    def check(self, room: int, tokens: int, **more: Any) -> None:
        """A room comes to every rank, and is let go of."""
        for end in self.move(room, tokens, **more):
            assert (end.cause, end.tokens, end.wrong) == ("done", tokens, ()), end
        self.ranks.all("forget", room)

    @property
    def living(self) -> list[Remote]:
        return [remote for rank, remote in enumerate(self.ranks.remotes) if rank not in self.lost]

    def lose(self, rank: int, number: signal.Signals) -> None:
        """A rank dies, or answers no more."""
        self.lost.add(rank)
        self.ranks.remotes[rank].signal(number)

    def wait_idle(self) -> None:
        """Nothing is held anywhere that still lives."""
        for remote in (*self.living, *self.encoders):
            until(lambda r=remote: r.call("is_idle"), otherwise=lambda r=remote: r.call("stats"))

    def pids(self) -> set[int]:
        return {remote.process.pid for remote in (*self.ranks.remotes, *self.encoders)}

    def files(self) -> set[str]:
        """The group's directory, the socket of its turns, and all shared memory that has a name."""
        maps = "".join(Path(f"/proc/{pid}/maps").read_text() for pid in self.pids())
        directory = self.ranks.directory
        return {directory, f"{directory}/agreement", *re.findall(r"/dev/shm/embedwire-\w+", maps)}

    def bytes_sent(self) -> int:
        return sum(stats.bytes_total for stats in self.tell_encoders("stats"))

    def close(self) -> list[int | None]:
        """The exit codes of all that were not lost."""
        for rank in self.lost:
            self.ranks.remotes[rank].process.kill()
        codes = [code for rank, code in enumerate(self.ranks.close()) if rank not in self.lost]
        for encoder in self.encoders:
            encoder.begin_close()
        return codes + [encoder.close() for encoder in self.encoders]


@contextmanager
def world(group: RankGroup, **settings: Any) -> Iterator[World]:
    """It ends well: with nothing held, and every process by itself."""
    made = World(group, **settings)
    try:
        yield made
        made.wait_idle()
        codes = made.close()
        assert not any(codes), codes
    finally:
        made.close()


def settled(ends: Sequence[End]) -> set[tuple[str, int, tuple[int, ...], int, tuple[str, ...]]]:
    """What all ranks have to have in common."""
    return {(end.cause, end.tokens, end.aux, end.digest, end.wrong) for end in ends}


@pytest.mark.failure_mode(
    "ranks-see-different-totals",
    "fastest-rank-decides",
    "position-delta-reduced",
    "shared-assembly-reused-early",
)
@pytest.mark.parametrize(
    ("group", "rounds"),
    [
        (RankGroup.on_one_host(4, delivery="replicate"), [(1024, 976)] * 4),
        (TWO_HOSTS, [(1024, 976), (), (1024, 976), ()]),
    ],
    ids=["replicate", "share"],
)
def test_four_ranks_resume_and_finish_together(group: RankGroup, rounds: list[tuple[int, ...]]) -> None:
    """2000 tokens through eight blocks of 128; ranks 1 and 3 are dummy ranks or slow. Every rank has the same tensor, total and
    position delta."""
    with world(group, limits=ONE_AT_A_TIME) as made:
        ends = made.move(1, 2000, aux=(DELTA,))
        assert [end.rounds for end in ends] == rounds
        ((cause, tokens, aux, _, wrong),) = settled(ends)
        assert (cause, tokens, aux[:2], wrong) == ("done", 2000, (2000, DELTA), ())
        assert made.bytes_sent() == len(group.readers) * 2000 * LAYOUT.token_bytes
        made.ranks.all("forget", 1)
        made.wait_idle()
        # one reader's writes wait: nobody has the room until it has
        last = len(group.readers) - 1
        made.encoders[0].call("hold", last)
        made.offer(2, 2000, aux=(DELTA,))
        made.open(2)
        assert made.encoders[0].call("wait_held")
        others = [made.ranks.remotes[rank] for rank in group.readers[:-1]]
        for other in others:
            until(lambda o=other: o.call("stats").bytes_total == 2 * 2000 * LAYOUT.token_bytes)
        assert made.ranks.all("is_done", 2) == [False] * 4
        made.encoders[0].call("let_go")
        ((cause, tokens, aux, _, wrong),) = settled(made.ranks.all("end", 2))
        assert (cause, tokens, aux[:2], wrong) == ("done", 2000, (2000, DELTA), ())
        made.ranks.all("forget", 2)


@pytest.mark.failure_mode("fastest-rank-decides", "one-rank-cannot-allocate")
def test_a_rank_whose_pool_is_taken_delays_all_and_stops_nobody() -> None:
    """Rank 1 has no blocks for the second room until the first is done; rank 0, which has all of both, waits for rank 1."""
    with world(RankGroup.on_one_host(2, delivery="replicate"), limits=ONE_AT_A_TIME) as made:
        made.encoders[0].call("hold", 1)
        made.offer(1, 1024)
        made.offer(2, 2000)
        made.open(1)
        assert made.encoders[0].call("wait_held")
        made.open(2)
        first, second = made.ranks.remotes
        until(lambda: first.call("stats").bytes_total == 3024 * LAYOUT.token_bytes)
        until(lambda: second.call("stats").waiting["blocks"] == 1)
        assert [made.ranks.all("is_done", room) for room in (1, 2)] == [[False, False]] * 2
        made.encoders[0].call("let_go")
        for room, tokens in ((1, 1024), (2, 2000)):
            ((cause, found, _, _, wrong),) = settled(made.ranks.all("end", room))
            assert (cause, found, wrong) == ("done", tokens, ())
            made.ranks.all("forget", room)


@pytest.mark.failure_mode("rank-counts-differ", "part-taken-for-whole-room")
@pytest.mark.parametrize("delivery", ["replicate", "share"])
@pytest.mark.parametrize(("encoders", "ranks"), [(1, 2), (2, 4), (4, 2)])
def test_any_number_of_ranks_to_any_number(encoders: int, ranks: int, delivery: Any) -> None:
    """Every byte reaches every rank, once over the wire for each reader; a room is complete when all of its senders have sent their
    parts."""
    group = RankGroup.on_one_host(ranks, delivery=delivery)
    readers = len(group.readers)
    with world(group, encoders=encoders, num_blocks=2, default_allocate_tokens=128) as made:
        made.check(1, 1)
        made.wait_idle()
        before = made.bytes_sent()
        made.check(2, 1100)
        assert made.bytes_sent() - before == readers * 1100 * LAYOUT.token_bytes
        for room, encoder in enumerate(made.encoders, start=3):
            sender = room - 3
            encoder.call("hold", *range(sender * readers, (sender + 1) * readers))
            made.offer(room, 1100)
            made.open(room)
            assert encoder.call("wait_held")
            assert made.ranks.all("is_done", room) == [False] * ranks
            encoder.call("let_go")
            assert {(end.cause, end.wrong) for end in made.ranks.all("end", room)} == {("done", ())}
            made.ranks.all("forget", room)


@pytest.mark.failure_mode("rank-lost")
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
@pytest.mark.parametrize("lost", [1, 0])
@pytest.mark.parametrize("delivery", ["replicate", "share"])
def test_a_rank_is_lost_in_mid_transfer(delivery: Any, lost: int, number: signal.Signals) -> None:
    """The rooms of all other ranks end, on the encoder too, and their memory comes back; no room can be opened afterwards."""
    group = RankGroup.on_one_host(3, delivery=delivery)
    with world(group) as made:
        made.check(1, 2000)
        made.encoders[0].call("hold", *range(len(group.readers)))
        for room in (2, 3):
            made.offer(room, 2000)
            made.open(room)
            made.ranks.all("is_done", room)
        assert made.encoders[0].call("wait_held")
        made.lose(lost, number)
        for room in (2, 3):
            ends = [remote.call("end", room) for remote in made.living]
            assert {end.cause for end in ends} == {"rank_lost"}, ends
            in_collective = "lost its group"  # which does not say who it was
            assert f"rank {lost} " in ends[0].detail or in_collective in ends[0].detail
            for remote in made.living:
                remote.call("forget", room)
        made.encoders[0].call("let_go")
        assert {made.encoders[0].call("end", room) for room in (2, 3)} <= {"rank_lost", "peer_lost"}
        assert [len(remote.call("losses")) for remote in made.living] == [1, 1]
        if lost != 0:
            with pytest.raises(TransferError, match="rank_lost"):
                made.open(4)


@pytest.mark.failure_mode("ranks-admit-different-rooms")
def test_fifty_rooms_at_once() -> None:
    """Far more rooms than the pool holds, some aborted on either side: each ends in the same way on every rank. Every collective has
    one width, for any number of rooms."""
    with world(RankGroup.on_one_host(4, delivery="replicate")) as made:
        rooms, given_up = range(1, 51), {5: "rank 0", 6: "encoder", 21: "rank 0", 22: "encoder", 50: "rank 0"}
        made.encoders[0].call("hold", *range(4))
        for room in rooms:
            made.offer(room, 300 + room)
            made.open(room)
        for room in rooms:
            assert made.ranks.all("is_done", room) == [False] * 4
        for room, by in given_up.items():
            if by == "rank 0":
                made.ranks.remotes[0].call("cancel", room)
            else:
                made.encoders[0].call("abort", room)
        made.encoders[0].call("let_go")
        for room in rooms:
            ends = made.ranks.all("end", room)
            causes = {end.cause for end in ends} | {made.encoders[0].call("end", room)}
            assert causes == ({"aborted"} if room in given_up else {"done"}), (room, ends)
            assert not any(end.wrong for end in ends)
            assert len({(end.tokens, end.digest) for end in ends}) == 1
            made.ranks.all("forget", room)
        made.wait_idle()
        until(lambda: len({len(widths) for widths in made.ranks.all("collectives")}) == 1)
        (turns,) = {stats.turns_total for stats in made.ranks.all("stats")}
        assert made.ranks.all("collectives") == [[WIDTH] * turns] * 4


@pytest.mark.failure_mode("shared-assembly-reused-early")
def test_a_slow_reader_of_a_shared_assembly_keeps_it() -> None:
    """Four ranks read one memory that was filled once. It stays whole for the slowest reader, whatever the others write, the owner
    releases, and arrives since; then it is used again."""
    with world(RankGroup.on_one_host(4), assembly_bytes=2500 * LAYOUT.token_bytes) as made:
        ends = made.move(1, 2000)
        assert [end.bytes for end in ends] == [2000 * LAYOUT.token_bytes, 0, 0, 0]
        assert made.bytes_sent() == 2000 * LAYOUT.token_bytes
        owner, scribbler, *slow = made.ranks.remotes
        (shared,) = {tuple(sorted(inodes)) for inodes in made.ranks.all("assemblies")}
        assert len(shared) == 1
        scribbler.call("scribble", 1)
        owner.call("forget", 1)
        for room in range(2, 22):
            made.check(room, 2000)
        assert [remote.call("end", 1) for remote in slow] == ends[2:]
        for remote in (scribbler, *slow):
            remote.call("forget", 1)
        made.wait_idle()
        until(lambda: not any(made.ranks.all("assemblies")[1:]))
        made.check(30, 2000)
        (kept, *_) = made.ranks.all("assemblies")
        made.check(31, 2000)
        assert made.ranks.all("assemblies") == [kept, set(), set(), set()]


def test_starting_and_stopping_leaves_nothing() -> None:
    """Ten times (or EMBEDWIRE_TEST_STARTS) a group of four: no process, no shared memory, no socket's file and no port is left."""
    for number in range(int(os.environ.get("EMBEDWIRE_TEST_STARTS", "10"))):
        with world(RankGroup.on_one_host(4)) as made:
            made.check(number, 2000)
            pids, files, (address,) = made.pids(), made.files(), made.addresses
            assert len(pids) == 5
            assert len(files) == 1 + 4 + 1
        assert not [pid for pid in pids if psutil.pid_exists(pid)]
        assert not [file for file in files if os.path.exists(file)]
        host, _, port = address.removeprefix("tcp://").partition(":")
        socket.create_server((host, int(port))).close()
