"""One thread a receiver: what fails in it ends a room, never the thread, and reaches nobody else."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest

from embedwire.endpoint.writer import SessionWriter
from embedwire.errors import TransportError
from embedwire.limits import Limits
from embedwire.memory.source import Source
from embedwire.transports.contract import Outcome
from embedwire.transports.onesided.outbound import OneSidedOutbound, OneSidedRegion
from embedwire.transports.shm import ShmOutbound, ShmRegion
from embedwire.transports.tcp import TcpOutbound
from embedwire.transports.tcp.outbound import TcpRegion

pytestmark = [pytest.mark.timeout(60), pytest.mark.wires("shm", "tcp", "mooncake", "nixl")]

REGIONS: dict[str, Any] = {
    "shm": ShmRegion,
    "tcp": TcpRegion,
    "mooncake": OneSidedRegion,
    "nixl": OneSidedRegion,
}
OUTBOUNDS: dict[str, Any] = {
    "shm": ShmOutbound,
    "tcp": TcpOutbound,
    "mooncake": OneSidedOutbound,
    "nixl": OneSidedOutbound,
}
TOKENS = 1000


def writers() -> set[threading.Thread]:
    return {thread for thread in threading.enumerate() if thread.name.startswith("embedwire-writer")}


def script(
    monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, steps: list[Callable[[], Any] | None]
) -> list[Callable[[], Any] | None]:
    """The first calls of a method do these steps instead; None, and whatever follows, is the real thing. Returns those that are left."""
    real, left = getattr(owner, name), list(steps)

    def stand_in(*args: Any, **more: Any) -> Any:
        step = left.pop(0) if left else None
        return real(*args, **more) if step is None else step()

    monkeypatch.setattr(owner, name, stand_in)
    return left


def crash() -> None:
    raise RuntimeError("injected")


@pytest.mark.failure_mode("exception-ends-thread", "one-failure-shuts-peer-out")
@pytest.mark.parametrize(("owner", "skip"), [("region", 0), ("source", 0), ("source", 1)])
def test_an_exception_ends_its_room_only(stage: Any, monkeypatch: Any, owner: str, skip: int) -> None:
    """The writer of a peer survives an exception in a write, and serves the peer's next room."""
    where = {"region": (REGIONS[stage.wire], "write"), "source": (Source, "pieces")}[owner]
    sender, receiver = stage.sender(), stage.receiver(num_blocks=2)
    stage.move(sender, receiver, 1, TOKENS)
    before = writers()
    script(monkeypatch, *where, [*[None] * skip, crash])
    offer = stage.offer(sender, 2, TOKENS)
    reception = receiver.open(2, sender.address)
    assert stage.failure_of(reception).cause == stage.failure_of(offer).cause == "wire_failed"
    stage.move(sender, receiver, 3, TOKENS)
    assert writers() == before
    assert sender.stats().sessions == 1


@pytest.mark.failure_mode("exception-ends-thread")
def test_an_exception_before_the_write(stage: Any, monkeypatch: Any) -> None:
    """The driver's thread goes on, and every write gets its result."""
    crashes = script(monkeypatch, SessionWriter, "submit", [crash, None, crash])
    sender, receiver = stage.sender(), stage.receiver(num_blocks=4)
    stage.move(sender, receiver, 1, TOKENS)
    assert not crashes
    assert sender.stats().ended == {"done": 1}


@pytest.mark.failure_mode("one-failure-shuts-peer-out")
def test_a_lost_write_is_tried_again(stage: Any, monkeypatch: Any) -> None:
    """One lost write does not end the room; every byte is right."""
    lost = script(
        monkeypatch, REGIONS[stage.wire], "write", [lambda: Outcome.LOST, None, lambda: Outcome.LOST]
    )
    sender = stage.sender()
    stage.move(sender, stage.receiver(num_blocks=4), 1, TOKENS)
    assert not lost
    assert sender.stats().ended == {"done": 1}


def test_a_write_that_is_always_lost(stage: Any, monkeypatch: Any) -> None:
    """It is tried ``write_attempts_max`` times; then the room ends on both sides, and the next works."""
    script(monkeypatch, REGIONS[stage.wire], "write", [lambda: Outcome.LOST] * 3)
    sender, receiver = stage.sender(), stage.receiver()
    offer = stage.offer(sender, 1, TOKENS)
    assert stage.failure_of(receiver.open(1, sender.address)).cause == "wire_failed"
    assert stage.failure_of(offer).cause == "wire_failed"
    stage.move(sender, receiver, 2, TOKENS)


def test_callbacks_run_on_the_drivers_thread(stage: Any, monkeypatch: Any) -> None:
    """Also where a write ends the room, which its writer's thread reports."""
    script(monkeypatch, REGIONS[stage.wire], "write", [lambda: Outcome.UNKNOWN])
    ran_on: list[threading.Thread] = []
    sender = stage.sender()
    offer = stage.offer(sender, 1, TOKENS)
    offer.add_done_callback(lambda _: ran_on.append(threading.current_thread()))
    stage.failure_of(stage.receiver().open(1, sender.address))
    stage.wait_idle()
    assert ran_on == [sender.loop._thread]


@pytest.mark.failure_mode("write-outcome-unknown", "one-failure-shuts-peer-out")
@pytest.mark.invariant("no-early-reuse")
def test_an_unknown_outcome_keeps_the_blocks_until_proof(stage: Any, monkeypatch: Any) -> None:
    """UNKNOWN is not LOST: blocks of a one-sided wire stay in quarantine until its session is closed; then they are free, and the peer
    is served again."""
    region, may_close = REGIONS[stage.wire], threading.Event()
    real = region.close

    def close(self: Any) -> bool:
        assert may_close.wait(30)
        return bool(real(self))

    monkeypatch.setattr(region, "close", close)
    script(monkeypatch, region, "write", [lambda: Outcome.UNKNOWN])
    sender, receiver = (
        stage.sender(),
        stage.receiver(num_blocks=4, default_allocate_tokens=128, limits=Limits(window_rounds=1)),
    )
    stage.offer(sender, 1, TOKENS)
    assert stage.failure_of(receiver.open(1, sender.address)).cause == "wire_failed"
    assert receiver.stats().blocks_quarantined == (0 if stage.wire == "tcp" else 1)
    stage.move(stage.sender(), receiver, 2, TOKENS).release()
    may_close.set()
    stage.wait_idle()
    stage.move(sender, receiver, 3, TOKENS)


@pytest.mark.failure_mode("write-outcome-unknown")
@pytest.mark.invariant("no-early-reuse")
def test_a_doubt_outlives_a_close_that_proved_nothing(stage: Any, monkeypatch: Any) -> None:
    """A receiver that does not answer proves nothing; the writer requests proof again, and then the blocks are free."""
    region, may_end, asked = REGIONS[stage.wire], threading.Event(), threading.Semaphore(0)
    real = region.close

    def close(self: Any) -> bool:
        asked.release()
        return may_end.is_set() and bool(real(self))

    monkeypatch.setattr(region, "close", close)
    script(monkeypatch, region, "write", [lambda: Outcome.UNKNOWN])
    sender = stage.sender(limits=stage.quick)
    receiver = stage.receiver(num_blocks=4, default_allocate_tokens=128, limits=Limits(window_rounds=1))
    stage.offer(sender, 1, TOKENS)
    assert stage.failure_of(receiver.open(1, sender.address)).cause == "wire_failed"
    assert all(asked.acquire(timeout=30) for _ in range(3))
    assert receiver.stats().blocks_quarantined == (0 if stage.wire == "tcp" else 1)
    may_end.set()
    stage.wait_idle()


@pytest.mark.failure_mode("frozen-peer-holds-blocks", "write-outcome-unknown")
@pytest.mark.invariant("no-early-reuse")
def test_a_doubt_outlives_its_writer(stage: Any, monkeypatch: Any) -> None:
    """A receiver frozen in mid-write for longer than its sender waits: its blocks are free when the old session has ended, however many
    new sessions there are, and the sender keeps no state of it."""
    region, may_end, lost, awake = (REGIONS[stage.wire], *(threading.Event() for _ in range(3)))
    before = writers()
    real = region.close
    monkeypatch.setattr(region, "close", lambda self: may_end.is_set() and bool(real(self)))

    def write() -> Outcome:
        receiver.loop.post(lambda: awake.wait(30) and None)
        assert lost.wait(30)
        return Outcome.UNKNOWN

    script(monkeypatch, region, "write", [write])
    sender = stage.sender(limits=stage.quick)
    receiver = stage.receiver(num_blocks=4, default_allocate_tokens=128, limits=Limits(window_rounds=1))
    offer, reception = stage.offer(sender, 1, TOKENS), receiver.open(1, sender.address)
    stage.until(lambda: sender.stats().sessions == 1)
    stage.until(lambda: sender.stats().sessions == 0)
    lost.set()
    assert stage.failure_of(offer).cause == "peer_lost"
    awake.set()
    stage.failure_of(reception)
    assert receiver.stats().blocks_quarantined == (0 if stage.wire == "tcp" else 1)
    may_end.set()
    stage.until(lambda: not receiver.stats().blocks_quarantined)
    stage.move(sender, receiver, 2, TOKENS).release()
    stage.until(lambda: len(writers() - before) == len(sender._outbounds[stage.wire]._regions) == 1)


def test_a_receiver_that_can_not_be_reached_again(stage: Any, monkeypatch: Any) -> None:
    """After an unknown outcome: its rooms end, none waits for its deadline, and its next try works."""

    def unreachable() -> None:
        raise TransportError("injected: no way")

    sender, receiver = stage.sender(), stage.receiver(num_blocks=4)
    stage.move(sender, receiver, 1, TOKENS).release()
    bystander, waiting = sender.offer(9, total_tokens=TOKENS), receiver.open(9, sender.address)
    stage.until(lambda: receiver.stats().rooms.get("waiting") == 1)
    script(monkeypatch, REGIONS[stage.wire], "write", [lambda: Outcome.UNKNOWN])
    script(monkeypatch, OUTBOUNDS[stage.wire], "connect", [unreachable])
    offer = stage.offer(sender, 2, TOKENS)
    assert stage.failure_of(receiver.open(2, sender.address)).cause == "wire_failed"
    assert stage.failure_of(offer).cause == "wire_failed"
    assert stage.failure_of(bystander).cause == stage.failure_of(waiting).cause == "peer_lost"
    stage.move(sender, receiver, 3, TOKENS)


def test_a_receiver_out_of_reach(stage: Any, monkeypatch: Any) -> None:
    """No wire works: refused with each wire's reason, at once. Next time it may work."""

    def unreachable() -> None:
        raise TransportError("injected: no way")

    script(monkeypatch, OUTBOUNDS[stage.wire], "connect", [unreachable, crash])
    sender, receiver = stage.sender(), stage.receiver()
    stage.offer(sender, 1, TOKENS)
    for words in (f"{stage.wire}: injected: no way", f"{stage.wire}: RuntimeError: injected"):
        failure = stage.failure_of(receiver.open(1, sender.address))
        assert failure.cause == "wire_failed"
        assert words in failure.detail
        stage.until(lambda: not sum(receiver.stats().rooms.values()))
    stage.check(receiver.open(1, sender.address), TOKENS)


def test_no_wire_in_common(stage: Any) -> None:
    """Both sides' wires are named."""
    other = "tcp" if stage.wire == "shm" else "shm"
    sender = stage.sender()
    failure = stage.failure_of(stage.receiver(transports=(other,)).open(1, sender.address))
    assert failure.cause == "wire_failed"
    assert f"{other}: not offered by the sender" in failure.detail
