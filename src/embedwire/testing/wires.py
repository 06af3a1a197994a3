"""What the conformance suite is made of: the wires, a region with a model of it, bytes to write, and what is
held.

For tests only; every function runs on the caller's thread. ``PATIENCE_S`` bounds every wait.
"""

from __future__ import annotations

import gc
import os
import random
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cache, partial

from embedwire.testing.fake_wire import FakeNetwork
from embedwire.transports import open_inbound, open_outbound
from embedwire.transports.contract import Inbound, Outbound, Outcome, Piece, RemoteRegion, Slice

PATIENCE_S = 20.0
KIB = 1024


class NotApplicable(Exception):
    """The wire makes no promise of this kind. The message says which."""


@dataclass(frozen=True, slots=True)
class Wire:
    """A wire under test. ``importable_as`` is the ``module:function`` that returns this object in another
    process, or "" when no other process can reach a region."""

    inbound: Callable[[], Inbound]
    outbound: Callable[[], Outbound]
    importable_as: str = ""


def shm() -> Wire:
    return _registered("shm")


def tcp() -> Wire:
    return _registered("tcp")


def mooncake() -> Wire:
    return _with_library("mooncake")


def nixl() -> Wire:
    return _with_library("nixl")


def fake() -> Wire:
    network = FakeNetwork()
    return Wire(network.inbound, network.outbound)


def fake_one_sided() -> Wire:
    network = FakeNetwork(is_fenced=False)
    return Wire(network.inbound, network.outbound)


def _registered(name: str) -> Wire:
    return Wire(
        partial(open_inbound, name, host="127.0.0.1"),
        partial(open_outbound, name, host="127.0.0.1"),
        importable_as=f"{__name__}:{name}",
    )


@cache
def _with_library(name: str) -> Wire:
    """One session is held first: a library makes descriptors and threads for the whole process with its first engine, and keeps them.
    Raises ConfigurationError when it is not installed."""
    wire = _registered(name)
    inbound, outbound = wire.inbound(), wire.outbound()
    inbound.allocate(KIB).release()
    write(
        outbound.connect(inbound.descriptor(), sender_token=1, timeout_s=PATIENCE_S),
        1,
        [[piece(0, KIB, seed=1)]],
    )
    outbound.close()
    inbound.close()
    return wire


@dataclass(slots=True)
class Receiver:
    """A region of one byte value, 0xEE, and a model of what should be in it."""

    inbound: Inbound
    memory: memoryview
    model: bytearray = field(init=False)

    def __post_init__(self) -> None:
        self.model = bytearray(b"\xee" * len(self.memory))
        self.memory[:] = self.model

    def expect(self, slices: Iterable[Slice]) -> None:
        for pieces in slices:
            for piece in pieces:
                self.model[piece.offset : piece.offset + piece.source.nbytes] = piece.source

    def check(self) -> None:
        assert self.memory == self.model, f"{first_difference(self.memory, self.model)}"


def write(
    region: RemoteRegion,
    ticket: int,
    slices: Iterable[Slice],
    *,
    is_permitted: Callable[[], bool] = lambda: True,
    on_landed: Callable[[int], object] = lambda _: None,
    timeout_s: float = PATIENCE_S,
) -> Outcome:
    def report(landed: int) -> None:
        on_landed(landed)

    return region.write(ticket, slices, is_permitted=is_permitted, on_landed=report, timeout_s=timeout_s)


def piece(offset: int, nbytes: int, *, seed: int) -> Piece:
    pattern = bytes((seed * 31 + n * 7) % 251 for n in range(min(nbytes, 251)))
    return Piece(memoryview((pattern * (nbytes // 251 + 1))[:nbytes]), offset)


def scattered(rng: random.Random, region_bytes: int) -> list[list[Piece]]:
    """Slices of pieces that do not overlap, some of them empty, in no order."""
    cuts = sorted(rng.sample(range(region_bytes), 2 * rng.choice((1, 30, 300))))
    pieces = [piece(start, end - start, seed=start) for start, end in zip(cuts[::2], cuts[1::2], strict=True)]
    pieces += [piece(rng.randrange(region_bytes), 0, seed=1) for _ in range(9)]
    rng.shuffle(pieces)
    width = rng.choice((1, 7, 100))
    return [pieces[at : at + width] for at in range(0, len(pieces), width)]


def first_difference(found: memoryview, wanted: bytearray) -> str:
    at = next(n for n, (a, b) in enumerate(zip(found, wanted, strict=True)) if a != b)
    return f"byte {at} of {len(wanted)} is {found[at]}, not {wanted[at]}"


def assert_raises(kind: type[Exception], call: Callable[[], object]) -> None:
    try:
        call()
    except kind:
        return
    raise AssertionError(f"{kind.__name__} was not raised")


def stop(child: subprocess.Popen[str]) -> None:
    child.send_signal(signal.SIGSTOP)
    os.waitpid(child.pid, os.WUNTRACED)  # returns when it has stopped


def eventually(holds: Callable[[], bool]) -> None:
    deadline_s = time.monotonic() + PATIENCE_S
    while not holds():
        assert time.monotonic() < deadline_s, f"did not become true within {PATIENCE_S} s"
        os.sched_yield()


def mapped_files() -> set[str]:
    with open("/proc/self/maps") as maps:
        return {line.split()[-1] for line in maps if "/dev/shm/" in line and "(deleted)" not in line}


def held() -> tuple[int, int, int]:
    """How many descriptors, threads and mapped files of shared memory this process holds, garbage aside."""
    gc.collect()
    with suppress(FileNotFoundError):
        return len(os.listdir("/proc/self/fd")), threading.active_count(), len(mapped_files())
    return 0, threading.active_count(), 0
