"""Real endpoints for tests, over every wire, in one process: for the tests of ``endpoint`` and of ``group``.

Whatever a test made is checked when it ends: nothing is held any more (conservation), and all of it can be
closed.
"""

from __future__ import annotations

import gc
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from embedwire.endpoint import Offer, Received, ReceiverEndpoint, Reception, SenderEndpoint
from embedwire.errors import ConfigurationError, TransferError
from embedwire.limits import Limits
from embedwire.memory.layout import Layout, multimodal
from embedwire.memory.source import Source
from embedwire.testing import wires
from embedwire.testing.payload import differing, payload

LAYOUT = multimodal(8)
"""32 bytes a token."""
WIRES = {"mooncake": wires.mooncake, "nixl": wires.nixl}
"""Those whose library may be missing."""
PATIENCE_S = 20.0
"""Longer than anything takes here on a busy machine; what takes longer hangs."""
QUICK = Limits(
    retry_s=0.05,
    peer_silence_s=1.0,
    open_wait_s=PATIENCE_S,
    source_wait_s=PATIENCE_S,
    blocks_wait_s=PATIENCE_S,
    round_s=PATIENCE_S,
    close_s=1.0,
    write_timeout_s=1.0,
)
"""Limits for tests in which a peer goes silent."""


class Stage:
    """Makes endpoints over one wire, moves rooms between them, and checks at the end that nothing is left."""

    layout = LAYOUT
    quick = QUICK

    def __init__(self, wire: str) -> None:
        self.wire = wire
        self.senders: list[SenderEndpoint] = []
        self.receivers: list[ReceiverEndpoint] = []

    def sender(self, layout: Layout = LAYOUT, **settings: Any) -> SenderEndpoint:
        self.senders.append(SenderEndpoint(layout, **{"transports": (self.wire,), **settings}))
        return self.senders[-1]

    def receiver(self, layout: Layout = LAYOUT, **settings: Any) -> ReceiverEndpoint:
        self.receivers.append(ReceiverEndpoint(layout, **{"transports": (self.wire,), **settings}))
        return self.receivers[-1]

    def offer(self, sender: SenderEndpoint, room: int, tokens: int, **more: Any) -> Offer:
        """Offer a room and fill it with its payload at once."""
        offer = sender.offer(room, total_tokens=tokens, **more)
        offer.fill(payload(sender.layout, tokens, room=room))
        return offer

    def move(self, sender: SenderEndpoint, receiver: ReceiverEndpoint, room: int, tokens: int) -> Received:
        """Move one room and check every byte of it on the way."""
        offer = self.offer(sender, room, tokens)
        received = self.check(receiver.open(room, sender.address), tokens)
        assert offer.result(PATIENCE_S).rounds == received.report.rounds
        return received

    def check(self, reception: Reception, tokens: int) -> Received:
        """Wait for a room and check every byte of it against its payload."""
        received = reception.result(PATIENCE_S)
        layout = reception.layout
        assert differing(layout, payload(layout, tokens, room=received.room), received.arrays) == []
        assert received.aux[0] == received.report.total_tokens == tokens
        return received

    def failure_of(self, ending: Offer | Reception) -> TransferError:
        """How a room ended on one side, which has to be without its embedding."""
        with pytest.raises(TransferError) as caught:
            ending.result(PATIENCE_S)
        return caught.value

    def until(self, condition: Callable[[], bool], *, otherwise: Callable[[], object] = lambda: "") -> None:
        """Wait until the condition holds; fail with what ``otherwise`` says when it never does."""
        pause, deadline = threading.Event(), time.monotonic() + PATIENCE_S
        while not condition():
            assert time.monotonic() < deadline, otherwise()
            pause.wait(0.005)

    def wait_idle(self) -> None:
        """Wait until nothing is held on either side. What was received is let go of first."""
        gc.collect()
        for sender in (s for s in self.senders if s.loop.is_alive):
            self.until(lambda s=sender: _is_idle_sender(s), otherwise=sender.stats)
        for receiver in (r for r in self.receivers if r.loop.is_alive):
            self.until(lambda r=receiver: _is_idle_receiver(r), otherwise=receiver.stats)

    def close(self) -> None:
        for receiver in self.receivers:
            receiver.close()
        for sender in self.senders:
            sender.close()


def _is_idle_sender(sender: SenderEndpoint) -> bool:
    stats = sender.stats()
    return not sum(stats.rooms.values()) and stats.memory_reserved_bytes == 0


def _is_idle_receiver(receiver: ReceiverEndpoint) -> bool:
    stats = receiver.stats()
    held = (*stats.rooms.values(), *stats.waiting.values(), stats.memory_reserved_bytes)
    if any(held) or stats.blocks_free != stats.blocks_total:
        return False
    receiver.loop.call(receiver._landing.blocks.check)
    return True


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """``stage`` comes once a wire: those that are built in, or those of the mark ``wires``."""
    if "stage" in metafunc.fixturenames:
        mark = metafunc.definition.get_closest_marker("wires")
        metafunc.parametrize("stage", mark.args if mark is not None else ("shm", "tcp"), indirect=True)


@pytest.fixture
def stage(request: pytest.FixtureRequest) -> Iterator[Stage]:
    """Endpoints over each wire. Teardown checks conservation: free + granted + quarantined = total, and all blocks are free."""
    if request.param in ("mooncake", "nixl"):
        try:
            WIRES[request.param]()
        except ConfigurationError as reason:
            pytest.skip(f"{request.param} is not installed: {reason}")
    made = Stage(request.param)
    try:
        yield made
        made.wait_idle()
    finally:
        made.close()


class Brake:
    """Holds the writers of a process when they cut a slice, until it is let go.

    ``reached`` is set when the first writer has come to a stop.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *, after_slices: int = 0) -> None:
        self.reached = threading.Event()
        self._released = threading.Event()
        self._left = after_slices
        real = Source.pieces

        def pieces(source: Source, *args: Any, **more: Any) -> Any:
            if self._left <= 0:
                self.reached.set()
                assert self._released.wait(PATIENCE_S), "the brake was never let go"
            self._left -= 1
            return real(source, *args, **more)

        monkeypatch.setattr(Source, "pieces", pieces)

    def wait_reached(self) -> None:
        assert self.reached.wait(PATIENCE_S), "no writer came to the brake"

    def release(self) -> None:
        self._released.set()


@pytest.fixture
def brake(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Brake]]:
    """Make a brake; it is let go at the end at the latest."""
    made: list[Brake] = []

    def make(*, after_slices: int = 0) -> Brake:
        made.append(Brake(monkeypatch, after_slices=after_slices))
        return made[-1]

    yield make
    for one in made:
        one.release()
