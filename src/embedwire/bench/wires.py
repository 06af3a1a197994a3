"""What does our contract cost over a vendor's engine? The same batch through both, in turns, in one run.

The source is registered memory of this process, the target a region of another one, and a batch is ``nbytes`` in pieces of
``piece_bytes``. *ours* is ``RemoteRegion.write`` of one slice; *direct* hands the same pieces to the vendor's engine in one batch and
waits for it as its own examples do. Every byte is looked at in the end. The other process is this module, run with the wire's name.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np

from embedwire.bench.host import UnusableTransport
from embedwire.errors import ConfigurationError, EmbedwireError, TransportError
from embedwire.transports import open_inbound, open_outbound
from embedwire.transports.contract import Outcome, Piece
from embedwire.transports.mooncake import MooncakeSendingEngine
from embedwire.transports.nixl import NixlSendingEngine
from embedwire.transports.onesided.greeting import decode_descriptor
from embedwire.transports.onesided.session import Session

WIRES = ("mooncake", "nixl")
HOST = "127.0.0.1"
WARM_UP = 3
WAIT_S = 60.0
FLOOR = 0.9
"""Ours is at least this much of the engine's own rate, on an idle machine."""


@dataclass(frozen=True, slots=True)
class WireCase:
    """``ratio``: the engine's time over ours; 1 is as fast, less is slower."""

    transport: str
    bytes: int
    piece_bytes: int
    repeats: int
    median_s: float
    direct_median_s: float
    ratio: float


def measure(wire: str, *, nbytes: int, piece_bytes: int, repeat: int) -> WireCase:
    """Raises ConfigurationError when the wire is no vendor's, UnusableTransport when it cannot run here, TransportError when a write
    fails."""
    if wire not in WIRES:
        raise ConfigurationError(
            f"transport {wire!r} has no engine to compare with; there are {', '.join(WIRES)}"
        )
    rng = np.random.default_rng(7)
    source = rng.integers(0, 256, nbytes, np.uint8)
    starts = range(0, nbytes, piece_bytes)
    view = source.data
    pieces = [Piece(view[at : at + piece_bytes], at) for at in starts]
    with _receiver(wire, nbytes) as (descriptor, other_sum):
        outbound = open_outbound(wire, host=HOST)
        outbound.register(view)
        try:
            region = outbound.connect(descriptor, sender_token=1, timeout_s=WAIT_S)
            session = _direct_session(wire, descriptor, source)
        except TransportError as error:
            raise UnusableTransport(wire, error) from error

        def ours() -> None:
            outcome = region.write(
                1, [pieces], is_permitted=lambda: True, on_landed=lambda _: None, timeout_s=WAIT_S
            )
            if outcome is not Outcome.LANDED:
                raise TransportError(f"a write over {wire} ended as {outcome.value}")

        runs = [(source.ctypes.data + at, at, min(piece_bytes, nbytes - at)) for at in starts]
        direct = _direct(wire, session.engine, runs)
        times: dict[Callable[[], None], list[float]] = {ours: [], direct: []}
        for number in range(WARM_UP + repeat):
            for way in (ours, direct) if number % 2 else (direct, ours):
                began = time.perf_counter()
                way()
                if number >= WARM_UP:
                    times[way].append(time.perf_counter() - began)
        if other_sum() != int(source.sum(dtype=np.uint64)):
            raise TransportError(f"a wrong byte arrived over {wire}")
        session.end()
        session.presence.close()
        region.close()
        outbound.close()
    median, base = statistics.median(times[ours]), statistics.median(times[direct])
    return WireCase(wire, nbytes, piece_bytes, repeat, median, base, base / median)


def _direct_session(wire: str, descriptor: bytes, source: np.ndarray) -> Session:
    """A session whose engine is then used without us."""

    def make_engine() -> MooncakeSendingEngine | NixlSendingEngine:
        engine = MooncakeSendingEngine(host=HOST) if wire == "mooncake" else NixlSendingEngine()
        engine.register(source.ctypes.data, source.nbytes)
        return engine

    target = decode_descriptor(descriptor, wire=wire)
    return Session(target, sender_token=2, make_engine=make_engine, timeout_s=WAIT_S)


def _direct(wire: str, engine: Any, runs: Sequence[tuple[int, int, int]]) -> Callable[[], None]:
    """One batch through the library's own interface."""
    sources = [source for source, _, _ in runs]
    lengths = [nbytes for _, _, nbytes in runs]
    targets = [engine.base + offset for _, offset, _ in runs]

    def mooncake() -> None:
        if engine.engine.batch_transfer_sync_write(engine.segment, sources, targets, lengths):
            raise TransportError("Mooncake did not move a batch")

    def nixl() -> None:
        agent = engine.agent
        ours = agent.get_xfer_descs([(a, n, 0) for a, n in zip(sources, lengths, strict=True)], "DRAM")
        theirs = agent.get_xfer_descs([(a, n, 0) for a, n in zip(targets, lengths, strict=True)], "DRAM")
        handle = agent.initialize_xfer("WRITE", ours, theirs, engine.peer)
        state = agent.transfer(handle)
        while state == "PROC":
            state = agent.check_xfer_state(handle)
        agent.release_xfer_handle(handle)
        if state != "DONE":
            raise TransportError(f"NIXL says {state}")

    return mooncake if wire == "mooncake" else nixl


@contextmanager
def _receiver(wire: str, nbytes: int) -> Iterator[tuple[bytes, Callable[[], int]]]:
    """Another process with a region: its descriptor, and how to ask for the sum of its bytes."""
    command = [sys.executable, "-m", __name__, wire, str(nbytes)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdin is not None
        assert child.stdout is not None
        stdin, stdout = child.stdin, child.stdout

        def total() -> int:
            stdin.write("sum\n")
            stdin.flush()
            return int(stdout.readline())

        try:
            descriptor, _, reason = stdout.readline().strip().partition(" ")
            if not descriptor or reason:
                raise UnusableTransport(wire, reason or "the receiving process has ended")
            yield bytes.fromhex(descriptor), total
        finally:
            stdin.close()
            try:
                child.wait(WAIT_S)
            except subprocess.TimeoutExpired:
                child.kill()


def _receive(wire: str, nbytes: int) -> None:
    """Print the descriptor, or "-" and the reason why there is none."""
    try:
        inbound = open_inbound(wire, host=HOST)
        memory = inbound.allocate(nbytes)
    except EmbedwireError as error:
        print("-", " ".join(str(error).split()), flush=True)
        return
    print(inbound.descriptor().hex(), flush=True)
    for _ in sys.stdin:
        print(int(np.frombuffer(memory, np.uint8).sum(dtype=np.uint64)), flush=True)
    memory.release()
    inbound.close()


if __name__ == "__main__":
    _receive(sys.argv[1], int(sys.argv[2]))
