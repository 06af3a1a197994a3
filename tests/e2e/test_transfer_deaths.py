"""Processes that die, freeze and come back while rooms are under way between them."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from embedwire.endpoint import ReceiverEndpoint, Reception, SenderEndpoint
from embedwire.errors import ConfigurationError, TransferError
from embedwire.limits import Limits
from embedwire.memory.layout import multimodal
from embedwire.memory.source import Source
from embedwire.testing.payload import differing, payload
from embedwire.transports import open_outbound

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(90)]

LAYOUT = multimodal(8)
LIMITS = Limits(retry_s=0.05, peer_silence_s=2.0, write_timeout_s=2.0, close_s=2.0)
TOKENS = 2000
PATIENCE_S = 30.0


class Worker:
    """A process of ``transfer_worker.py``."""

    def __init__(self, role: str, wire: str, *, port: int = 0) -> None:
        script = Path(__file__).with_name("transfer_worker.py")
        self.process = subprocess.Popen(
            [sys.executable, str(script), role, wire, str(port)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        self._unread = b""
        self.greeting = self.read()

    @property
    def port(self) -> int:
        return int(self.greeting.rpartition(":")[2])

    def ask(self, line: str) -> str:
        """Tell it something, and read its answer."""
        self.tell(line)
        return self.read()

    def tell(self, line: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(line.encode() + b"\n")
        self.process.stdin.flush()

    def read(self) -> str:
        """Its next line, which has to come in time."""
        assert self.process.stdout is not None
        while b"\n" not in self._unread:
            assert select.select([self.process.stdout], [], [], PATIENCE_S)[0], "the worker says nothing"
            data = os.read(self.process.stdout.fileno(), 4096)
            assert data, "the worker has ended"
            self._unread += data
        line, _, self._unread = self._unread.partition(b"\n")
        return line.decode()

    def signal(self, number: int) -> None:
        self.process.send_signal(number)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait(PATIENCE_S)

    def segments(self) -> set[str]:
        """The shared memory that it has mapped."""
        with open(f"/proc/{self.process.pid}/maps") as maps:
            return {line.split()[5] for line in maps if "/dev/shm/embedwire-" in line}

    def end(self) -> None:
        """Let it close its endpoint, or kill it."""
        if self.process.poll() is None:
            self.signal(signal.SIGCONT)
            assert self.process.stdin is not None
            self.process.stdin.close()
            try:
                self.process.wait(PATIENCE_S)
            except subprocess.TimeoutExpired:
                self.kill()
                raise
        for stream in (self.process.stdin, self.process.stdout):
            assert stream is not None
            stream.close()


@pytest.fixture(params=["shm", "tcp", "mooncake", "nixl"])
def wire(request: pytest.FixtureRequest) -> str:
    try:
        open_outbound(request.param, host="127.0.0.1").close()
    except ConfigurationError as reason:
        pytest.skip(f"{request.param} is not installed: {reason}")
    return str(request.param)


@pytest.fixture
def start(wire: str) -> Iterator[Callable[..., Worker]]:
    """Start workers; all of them end with the test."""
    workers: list[Worker] = []

    def make(role: str, *, port: int = 0) -> Worker:
        workers.append(Worker(role, wire, port=port))
        return workers[-1]

    yield make
    for worker in workers:
        worker.end()


@pytest.fixture
def receiver(wire: str) -> Iterator[ReceiverEndpoint]:
    """A receiver of this process, whose pool is whole again at the end."""
    with ReceiverEndpoint(LAYOUT, num_blocks=8, transports=(wire,), limits=LIMITS) as made:
        yield made
        wait_for(lambda: is_whole(made), made)


@pytest.fixture
def sender(wire: str) -> Iterator[SenderEndpoint]:
    """A sender of this process, whose memory is free again at the end."""
    with SenderEndpoint(LAYOUT, transports=(wire,), limits=LIMITS) as made:
        yield made
        wait_for(lambda: made.stats().memory_reserved_bytes == 0 == sum(made.stats().rooms.values()), made)


def wait_for(condition: Callable[[], bool], endpoint: Any) -> None:
    pause, deadline = threading.Event(), time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline, endpoint.stats()
        pause.wait(0.01)


def is_whole(receiver: ReceiverEndpoint) -> bool:
    stats = receiver.stats()
    return stats.blocks_free == stats.blocks_total and stats.memory_reserved_bytes == 0


def check(reception: Reception) -> None:
    """Every byte has arrived."""
    received = reception.result(PATIENCE_S)
    assert differing(LAYOUT, payload(LAYOUT, TOKENS, room=received.room), received.arrays) == []
    received.release()


def serve(sender: SenderEndpoint, receiver: ReceiverEndpoint, room: int) -> None:
    """Another sender's room is served."""
    sender.offer(room, total_tokens=TOKENS).fill(payload(LAYOUT, TOKENS, room=room))
    check(receiver.open(room, sender.address))


def failure_of(ending: Any) -> TransferError:
    with pytest.raises(TransferError) as caught:
        ending.result(PATIENCE_S)
    return caught.value


@pytest.mark.failure_mode("encoder-killed", "restart-on-same-address")
@pytest.mark.invariant("no-early-reuse", "deadlines")
@pytest.mark.parametrize("restarted", ["at once", "later"])
def test_the_sender_is_killed(start: Any, receiver: Any, sender: Any, restarted: str) -> None:
    """SIGKILL in mid-round: the receiver ends the room within its deadline, gets its blocks back after proof, and is served by a sender
    restarted on the same port, under the next attempt of the room."""
    worker = start("sender")
    assert worker.ask("hold") == "holding"
    assert worker.ask(f"offer 1 0 {TOKENS}") == "offered"
    reception = receiver.open(1, worker.greeting)
    assert worker.read() == "held"
    assert receiver.stats().blocks_granted > 0
    worker.kill()
    if restarted == "at once":
        again = start("sender", port=worker.port)
    failure = failure_of(reception)
    assert failure.cause == "peer_lost"
    assert worker.greeting in failure.detail
    serve(sender, receiver, 2)
    if restarted == "later":
        again = start("sender", port=worker.port)
    assert again.greeting == worker.greeting
    assert again.ask(f"offer 1 1 {TOKENS}") == "offered"
    check(receiver.open(1, again.greeting, attempt=1))
    assert again.ask("ended 1 1") == "done"


@pytest.mark.failure_mode("language-server-killed", "leftovers-of-a-dead-process")
@pytest.mark.invariant("deadlines")
@pytest.mark.parametrize("restarted", ["at once", "later"])
def test_the_receiver_is_killed(start: Any, sender: Any, monkeypatch: Any, restarted: str) -> None:
    """SIGKILL in mid-round: the sender ends the room, frees its memory and serves the next receiver, which removes the shared memory of
    the dead one."""
    reached, released, real = threading.Event(), threading.Event(), Source.pieces

    def pieces(*args: Any, **more: Any) -> Any:
        reached.set()
        assert released.wait(PATIENCE_S)
        return real(*args, **more)

    monkeypatch.setattr(Source, "pieces", pieces)
    worker = start("receiver")
    offer = sender.offer(1, total_tokens=TOKENS)
    offer.fill(payload(LAYOUT, TOKENS, room=1))
    assert worker.ask(f"open 1 0 {sender.address}") == "opened"
    assert reached.wait(PATIENCE_S)
    segments = worker.segments()
    worker.kill()
    if restarted == "at once":
        again = start("receiver")
    released.set()
    failure = failure_of(offer)
    assert failure.cause in ("peer_lost", "wire_failed")
    assert failure.detail
    if restarted == "later":
        again = start("receiver")
    assert not [path for path in segments if os.path.exists(path)]
    sender.offer(1, attempt=1, total_tokens=TOKENS).fill(payload(LAYOUT, TOKENS, room=1))
    assert again.ask(f"open 1 1 {sender.address}") == "opened"
    assert again.ask("ended 1 1") == "done"


@pytest.mark.failure_mode("frozen-peer-holds-blocks")
@pytest.mark.invariant("no-early-reuse")
def test_a_frozen_sender(start: Any, receiver: Any, sender: Any, wire: str) -> None:
    """A frozen sender holds grants; other senders are served meanwhile, and after its late write. On shm and one-sided wires its blocks
    come back only with its own confirmation, since lock and connection show that it is alive; on tcp the receiver rejects the late
    write."""
    worker = start("sender")
    assert worker.ask("hold") == "holding"
    assert worker.ask(f"offer 1 0 {TOKENS}") == "offered"
    serve(sender, receiver, 2)
    reception = receiver.open(1, worker.greeting)
    assert worker.read() == "held"
    granted = receiver.stats().blocks_granted
    assert 0 < granted < receiver.stats().blocks_total
    worker.signal(signal.SIGSTOP)
    assert failure_of(reception).cause == "peer_lost"
    for room in range(3, 8):
        serve(sender, receiver, room)
    assert receiver.stats().blocks_quarantined == (0 if wire == "tcp" else granted)
    worker.tell("go")
    worker.signal(signal.SIGCONT)
    for room in range(8, 16):
        serve(sender, receiver, room)
    assert worker.read() == "going"
    assert worker.ask("ended 1 0") in ("peer_lost", "wire_failed")
    wait_for(lambda: is_whole(receiver), receiver)
    assert worker.ask(f"offer 1 1 {TOKENS}") == "offered"
    check(receiver.open(1, worker.greeting, attempt=1))


@pytest.mark.failure_mode("frozen-peer-holds-blocks")
@pytest.mark.invariant("deadlines")
def test_a_frozen_receiver(start: Any, sender: Any, receiver: Any, wire: str) -> None:
    """The sender ends the room of a frozen receiver within its deadline and serves others."""
    worker = start("receiver")
    blocker = sender.offer(1, total_tokens=TOKENS)
    assert worker.ask(f"open 1 0 {sender.address}") == "opened"
    wait_for(lambda: sender.stats().rooms.get("announced") == 1, sender)
    worker.signal(signal.SIGSTOP)
    blocker.fill(payload(LAYOUT, TOKENS, room=1))
    for room in range(2, 6):
        serve(sender, receiver, room)
    assert failure_of(blocker).cause == "peer_lost"
    serve(sender, receiver, 6)
    worker.signal(signal.SIGCONT)
    assert worker.ask("ended 1 0") == "peer_lost"
    sender.offer(1, attempt=1, total_tokens=TOKENS).fill(payload(LAYOUT, TOKENS, room=1))
    assert worker.ask(f"open 1 1 {sender.address}") == "opened"
    assert worker.ask("ended 1 1") == "done"
