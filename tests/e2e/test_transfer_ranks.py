"""Groups of ranks as real processes over Gloo, without a model: rooms that all ranks get together, and ranks that are slow, stop or die."""

from __future__ import annotations

import os
import signal
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
from embedwire.limits import Limits
from embedwire.memory.layout import multimodal
from embedwire.protocol.agreement import WIDTH
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

    def wait_idle(self, *, lost: Sequence[int] = ()) -> None:
        """Nothing is held anywhere that still lives."""
        living = [remote for rank, remote in enumerate(self.ranks.remotes) if rank not in lost]
        for remote in (*living, *self.encoders):
            until(lambda r=remote: r.call("is_idle"), otherwise=lambda r=remote: r.call("stats"))

    def bytes_sent(self) -> int:
        return sum(stats.bytes_total for stats in self.tell_encoders("stats"))

    def close(self) -> list[int | None]:
        for remote in self.ranks.remotes:
            if remote.process.is_alive():
                remote.signal(signal.SIGCONT)
        codes = self.ranks.close()
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


@pytest.mark.parametrize(
    ("group", "rounds"),
    [
        (RankGroup.on_one_host(4, delivery="replicate"), [(1024, 976)] * 4),
        (TWO_HOSTS, [(1024, 976), (), (1024, 976), ()]),
    ],
    ids=["replicate", "share"],
)
def test_four_ranks_resume_and_finish_together(group: RankGroup, rounds: list[tuple[int, ...]]) -> None:
    """Scenarios 21, 21a, 21b and 26a: 2000 tokens through eight blocks of 128, whether ranks 1 and 3 are dummies or slow; every rank has
    the same tensor, the same total and the same position delta, at the same time."""
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
