"""How long does an embedding take from a sender's process into the receiver's tensor, against the same copies made by nothing but the
operating system?

Both are measured in the same run, in turns, over the same memory: ours ends with every byte in one contiguous array, and so does
the baseline.

    shm    baseline: two copies in memory, source to buffer and buffer to destination
    tcp    baseline: a blocking socket between two processes, into a buffer, and a copy from there to the destination

A room whose pool is smaller than itself resumes; beside each such case stands the same room in one round. Where the language side has
several ranks, each is a process, and beside it stands the same room to one such process, into fresh memory; a group makes its assemblies
itself, and where its ranks share them they are memory that was used before. Who calls: ``embedwire bench`` and its tests, on the main
thread. The clock runs from ``open`` until ``result`` has returned, on every rank; the source is ready by then, and summed up by its
sender. Every byte is checked outside that.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from embedwire.bench.host import UnusableTransport
from embedwire.bench.payload import WORD_BYTES, Payload, layout
from embedwire.bench.peer import HOST, Peer, peer
from embedwire.bench.ranks import Ranks, TimedRank
from embedwire.endpoint import ReceiverEndpoint
from embedwire.errors import ConfigurationError, TransferError, TransportError
from embedwire.limits import DEFAULT_LIMITS, RANKS_MAX, Limits
from embedwire.protocol.topology import ALONE, Delivery, RankGroup

WARM_UP = 2
RESULT_WAIT_S = 120.0
_SOCKET = "blocking socket and one memory copy"
BASELINES = {"shm": "two memory copies", "tcp": _SOCKET, "mooncake": _SOCKET, "nixl": _SOCKET}


@dataclass(frozen=True, slots=True, kw_only=True)
class Subject:
    """One room size over one wire, through each of these pools. ``pools_tokens`` are rounded up to whole blocks."""

    transport: str
    tokens: int
    token_bytes: int
    pools_tokens: tuple[int, ...]
    block_size: int = 128
    window_rounds: int = DEFAULT_LIMITS.window_rounds
    ranks: int = 1
    delivery: Delivery = "share"

    def __post_init__(self) -> None:
        if self.transport not in BASELINES:
            raise ConfigurationError(
                f"transport {self.transport!r} has no baseline; there are {', '.join(BASELINES)}"
            )
        if self.tokens < 1 or min(self.pools_tokens, default=1) < 1 or self.block_size < 1:
            raise ConfigurationError("tokens, pool tokens and block size have to be at least 1")
        if not 1 <= self.ranks <= RANKS_MAX:
            raise ConfigurationError(f"{self.ranks} ranks; there are 1 to {RANKS_MAX}")
        if self.token_bytes < 1 or self.token_bytes % WORD_BYTES:
            raise ConfigurationError(
                f"token_bytes is {self.token_bytes}; it has to be a multiple of {WORD_BYTES}"
            )

    @property
    def pools(self) -> tuple[int, ...]:
        """Tokens of each pool: first one that holds the room in one round, then the others."""
        whole = self._rounded(self.tokens)
        return (
            whole,
            *sorted({self._rounded(p) for p in self.pools_tokens if p < self.tokens} - {whole}, reverse=True),
        )

    def _rounded(self, tokens: int) -> int:
        return -(-tokens // self.block_size) * self.block_size


@dataclass(frozen=True, slots=True)
class Case:
    """What was measured. ``ratio`` is the baseline's time over ours (more is better); ``resume_cost`` is ours over that of the
    same room in one round (1 means that resuming costs nothing), and None for the case of one round itself. ``ranks_ratio`` is the time to
    one rank over that to ``ranks`` of them (1 means that the others cost nothing); it is None for one rank, and so is ``delivery``."""

    transport: str
    tokens: int
    token_bytes: int
    bytes: int
    pool_tokens: int
    window_rounds: int
    rounds: int
    repeat: int
    median_s: float
    best_s: float
    baseline: str
    baseline_median_s: float
    ratio: float
    one_round_median_s: float
    resume_cost: float | None
    ranks: int
    delivery: Delivery | None
    one_rank_median_s: float | None
    ranks_ratio: float | None


@dataclass(slots=True)
class _Way:
    """One way for the bytes to get here: ``run`` takes a room there and returns its seconds, ``is_right`` looks at every byte of it."""

    run: Callable[[int], float]
    is_right: Callable[[int], bool]
    times_s: list[float] = field(default_factory=list)

    @property
    def median_s(self) -> float:
        return statistics.median(self.times_s[WARM_UP:])


@dataclass(slots=True)
class _Pool:
    """The ways through one size of a pool. ``one_rank`` is only there where there are several."""

    tokens: int
    way: _Way
    one_rank: _Way | None
    rounds: tuple[int, ...] = ()


def measure(
    subject: Subject, *, repeat: int = 9, on_progress: Callable[[], None] = lambda: None
) -> list[Case]:
    """Measure a subject: a case for one round and one for each smaller pool. Raises TransferError for a wrong byte, UnusableTransport when
    its transport cannot run here.

    ``on_progress`` is called after each of the ``steps(subject, repeat=…)`` transfers.
    """
    if repeat < 1:
        raise ConfigurationError(f"repeat is {repeat}; it has to be at least 1")
    with ExitStack() as stack:
        child = stack.enter_context(
            peer(tokens=subject.tokens, token_bytes=subject.token_bytes, transport=subject.transport)
        )
        try:
            bench = _Bench(subject, child, stack)
        except TransportError as error:
            raise UnusableTransport(subject.transport, error) from error
        for turn in range(WARM_UP + repeat):
            # Each turn takes the ways in the other direction, so that none has the warmer memory every time.
            for way in bench.ways[:: 1 if turn % 2 else -1]:
                way.times_s.append(bench.timed(way))
                on_progress()
        return bench.cases(repeat)


def steps(subject: Subject, *, repeat: int) -> int:
    """How many transfers :func:`measure` makes."""
    return (WARM_UP + repeat) * (1 + len(subject.pools) * (2 if subject.ranks > 1 else 1))


class _Bench:
    def __init__(self, subject: Subject, child: Peer, stack: ExitStack) -> None:
        self._subject = subject
        self._child = child
        self._stack = stack
        self._room = 0
        self._expected = Payload(subject.tokens, subject.token_bytes)
        self._buffer = np.zeros_like(self._expected.rows)
        self._destination = np.zeros_like(self._expected.rows)
        self._baseline = _Way(self._copies if subject.transport == "shm" else self._socket, self._is_here)
        make = self._pool_of_one if subject.ranks == 1 else self._pool_of_ranks
        self._pools = [make(pool_tokens) for pool_tokens in subject.pools]

    @property
    def ways(self) -> list[_Way]:
        """All that are measured."""
        ways = [way for pool in self._pools for way in (pool.one_rank, pool.way) if way is not None]
        return [self._baseline, *ways]

    def timed(self, way: _Way) -> float:
        """One transfer, checked byte for byte: its seconds."""
        self._room += 1
        self._expected.fill(self._room)
        seconds = way.run(self._room)
        if not way.is_right(self._room):
            raise TransferError("corrupt", f"room {self._room} arrived with a wrong byte")
        return seconds

    def _is_here(self, room: int) -> bool:
        return self._expected.equals(self._destination)

    def cases(self, repeat: int) -> list[Case]:
        return [self._case(pool, repeat) for pool in self._pools]

    def _case(self, pool: _Pool, repeat: int) -> Case:
        subject, median_s, whole_s = self._subject, pool.way.median_s, self._pools[0].way.median_s
        one_rank_s = None if pool.one_rank is None else pool.one_rank.median_s
        return Case(
            transport=subject.transport,
            tokens=subject.tokens,
            token_bytes=subject.token_bytes,
            bytes=subject.tokens * subject.token_bytes,
            pool_tokens=pool.tokens,
            window_rounds=subject.window_rounds,
            rounds=len(pool.rounds),
            repeat=repeat,
            median_s=median_s,
            best_s=min(pool.way.times_s[WARM_UP:]),
            baseline=BASELINES[subject.transport],
            baseline_median_s=self._baseline.median_s,
            ratio=self._baseline.median_s / median_s,
            one_round_median_s=whole_s,
            resume_cost=median_s / whole_s if len(pool.rounds) > 1 else None,
            ranks=subject.ranks,
            delivery=subject.delivery if subject.ranks > 1 else None,
            one_rank_median_s=one_rank_s,
            ranks_ratio=None if one_rank_s is None else one_rank_s / median_s,
        )

    def _settings(self, pool_tokens: int) -> dict[str, Any]:
        subject = self._subject
        return {
            "num_blocks": pool_tokens // subject.block_size,
            "block_size": subject.block_size,
            "default_allocate_tokens": pool_tokens,
            "assembly_bytes": 2 * subject.tokens * subject.token_bytes,
            "host": HOST,
            "transports": (subject.transport,),
            "limits": Limits(window_rounds=subject.window_rounds),
        }

    def _pool_of_one(self, pool_tokens: int) -> _Pool:
        """A receiver in this process, with an assembly of ours."""
        shape = layout(self._subject.token_bytes)
        receiver = self._stack.enter_context(ReceiverEndpoint(shape, **self._settings(pool_tokens)))

        def assembly(total_tokens: int) -> dict[str, np.ndarray]:
            return {"embeddings": self._destination[:total_tokens]}

        def receive(room: int) -> float:
            self._child.prepare(room, readers=1)
            began_s = time.perf_counter()
            reception = receiver.open(room, self._child.control_address, make_assembly=assembly)
            received = reception.result(RESULT_WAIT_S)
            seconds = time.perf_counter() - began_s
            pool.rounds = received.report.rounds
            received.release()
            return seconds

        pool = _Pool(pool_tokens, _Way(receive, self._is_here), None)
        return pool

    def _pool_of_ranks(self, pool_tokens: int) -> _Pool:
        """A group of processes, and one process beside it."""
        subject, shape = self._subject, layout(self._subject.token_bytes)

        def way(group: RankGroup) -> _Way:
            ranks = self._stack.enter_context(
                Ranks(group, TimedRank, shape, subject.tokens, self._settings(pool_tokens))
            )

            def receive(room: int) -> float:
                self._child.prepare(room, readers=len(group.readers))
                passages = ranks.all("receive", room, [self._child.control_address])
                pool.rounds = passages[0].rounds
                return float(max(passage.arrived_s for passage in passages) - passages[0].began_s)

            return _Way(receive, lambda room: all(ranks.all("is_right", room)))

        group = RankGroup.on_one_host(subject.ranks, delivery=subject.delivery)
        pool = _Pool(pool_tokens, way(group), way(ALONE))
        return pool

    def _copies(self, room: int) -> float:
        began_s = time.perf_counter()
        np.copyto(self._buffer, self._expected.rows)
        np.copyto(self._destination, self._buffer)
        return time.perf_counter() - began_s

    def _socket(self, room: int) -> float:
        self._child.prepare(room, readers=0)
        view = self._buffer.reshape(-1).data
        began_s = time.perf_counter()
        self._child.stream.sendall(b"!")
        at = 0
        while at < len(view):
            received = self._child.stream.recv_into(view[at:])
            if not received:
                raise TransferError("peer_lost", "the sending process closed the baseline's socket")
            at += received
        np.copyto(self._destination, self._buffer)
        return time.perf_counter() - began_s
