"""What two sides can do to each other: rings of waiting, lost and crossing messages, frozen peers."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from embedwire.limits import Limits
from embedwire.protocol.messages import (
    Announce,
    Cause,
    Done,
    Ended,
    Hello,
    Init,
    Message,
    Open,
    ResumeTransfer,
    Status,
    Welcome,
)
from embedwire.testing.sim_link import Rule, delay
from embedwire.testing.sim_memory import TOKEN_BYTES
from embedwire.testing.sim_receiver import ReceiverNode
from embedwire.testing.simulation import FENCED, ONE_SIDED, Transfer, WireFaults, World


@pytest.mark.failure_mode("deadlock-across-servers")
@pytest.mark.invariant("no-hold-and-wait")
@pytest.mark.parametrize("wire", [FENCED, ONE_SIDED])
def test_a_ring_over_both_sides(wire: str) -> None:
    """Two full encoders and two granted pools wait for each other in a ring: A, B, C and D all finish."""
    world = World()
    room_bytes = 1024 * TOKEN_BYTES
    one, two = (world.add_sender(f"encoder-{i}", source_bytes=room_bytes) for i in (1, 2))
    left, right = (
        world.add_receiver(f"language-{i}", num_blocks=8, assembly_bytes=room_bytes, wire=wire)
        for i in (1, 2)
    )
    b = world.request(2, 1024, sender=two, receiver=left, offer_after_s=0.1)
    d = world.request(4, 1024, sender=one, receiver=right, offer_after_s=0.1)
    a = world.request(1, 1024, sender=one, receiver=left, open_after_s=0.2)
    c = world.request(3, 1024, sender=two, receiver=right, open_after_s=0.2)
    world.run(for_s=0.15)
    assert {one.core.rooms.keys() == {a.key}, two.core.rooms.keys() == {c.key}} == {True}
    assert len(one.waiting) == len(two.waiting) == 1
    world.settle()
    assert all(t.is_done for t in (a, b, c, d))


@pytest.mark.failure_mode("assemblies-block-each-other")
@pytest.mark.invariant("no-hold-and-wait")
def test_rooms_larger_than_the_memory_for_assemblies() -> None:
    """64 rooms of 100,000 tokens, memory for three and a half of them: none blocks another, and the limit holds."""
    world = World(limits=Limits(blocks_wait_s=600.0))
    world.add_sender(faults=WireFaults(slice_tokens=8192))
    limit = 350_000 * TOKEN_BYTES
    receiver = world.add_receiver(num_blocks=128, default_allocate_tokens=8192, assembly_bytes=limit)
    transfers = [world.request(room, 100_000) for room in range(1, 65)]
    world.settle()
    assert all(t.is_done for t in transfers)
    assert receiver.budget.peak_bytes == 300_000 * TOKEN_BYTES


def landed(receiver: ReceiverNode, transfer: Transfer) -> int:
    """Tokens of a room that its receiver knows to have landed."""
    room = receiver.core.lanes.transfers.get(transfer.key)
    return room.landed_tokens if room is not None else 0


def lose_nth(kind: type[Message], n: int) -> tuple[Rule, list[Message]]:
    """A rule: of this kind, only the n-th message (from 0) is lost; and what was."""
    seen, lost = iter(range(10_000)), list[Message]()

    def rule(envelope: Any) -> tuple[()] | None:
        if not isinstance(envelope.message, kind) or next(seen) != n:
            return None
        lost.append(envelope.message)
        return ()

    return rule, lost


def run_partial(rule: Rule | None) -> tuple[bool, float, float]:
    """A room of two rounds, one after the other, under a rule: whether it came through, and when each side knew."""
    world = World(limits=Limits(window_rounds=1))
    sender = world.add_sender(faults=WireFaults(slice_tokens=2048))
    receiver = world.add_receiver(default_allocate_tokens=1024)
    if rule is not None:
        world.link.rules.append(rule)
    transfer = world.request(7, 2000, source_s=0.01)
    world.run_until(lambda: transfer.receiver_end is not None)
    received_at = world.now
    world.run_until(lambda: not sender.core.rooms and not receiver.core.lanes.transfers)
    ended_at = world.now
    world.settle()
    return transfer.is_done and transfer.rounds == (1024, 976), received_at, ended_at


@pytest.mark.failure_mode("message-lost")
@pytest.mark.invariant("receiver-drives")
@pytest.mark.parametrize(
    ("kind", "n"),
    [
        (Hello, 0),
        (Welcome, 0),
        (Open, 0),
        (Announce, 0),
        (Announce, 1),
        (Init, 0),
        (Status, 0),
        (Status, 1),
        (ResumeTransfer, 0),
        (Done, 0),
        (Ended, 0),
    ],
)
def test_each_message_lost_once(kind: type[Message], n: int) -> None:
    """Whichever single message is lost, the transfer goes on one retry interval later."""
    is_done, received_at, ended_at = run_partial(None)
    assert is_done
    rule, lost = lose_nth(kind, n)
    is_done, late_received_at, late_ended_at = run_partial(rule)
    assert is_done
    assert len(lost) == 1
    assert late_received_at - received_at < Limits().retry_s + 0.02
    assert late_ended_at - ended_at < Limits().retry_s + 0.02


@pytest.mark.failure_mode("status-overtakes-bytes")
def test_the_status_overtakes_the_bytes() -> None:
    """A wire that reports bytes too early: no reader gets them, and both sides get the cause."""
    world = World()
    world.add_sender(faults=WireFaults(says_landed_too_early=True, slice_s=(0.05, 0.05)))
    receiver = world.add_receiver(tolerates_wrong_bytes=True)
    transfer = world.request(7, 512 * 3)
    world.settle()
    assert transfer.receiver_end is transfer.sender_end is Cause.CORRUPT
    assert receiver.blocks.blocks_free == receiver.blocks.blocks_total


@pytest.mark.failure_mode("messages-cross", "abort-not-propagated")
@pytest.mark.parametrize("wire", [FENCED, ONE_SIDED])
@pytest.mark.parametrize("kind", [Init, ResumeTransfer])
def test_an_abort_crosses_a_grant(kind: type[Message], wire: str) -> None:
    """A grant that arrives after the abort of its room starts no write."""
    world = World(limits=Limits(window_rounds=1))
    sender = world.add_sender()
    receiver = world.add_receiver(default_allocate_tokens=1024, wire=wire)
    world.link.rules.append(delay(kind, 5.0))
    transfer = world.request(7, 2000)
    world.run_until(lambda: any(isinstance(e.message, kind) for e in world.link.sent))
    before = len(sender.writes)
    receiver.abort(transfer.key)
    world.run(for_s=0.01)
    assert transfer.sender_end is transfer.receiver_end is Cause.ABORTED
    assert receiver.blocks.blocks_free == receiver.blocks.blocks_total, "the confirmation frees the blocks"
    world.settle()
    assert len(sender.writes) == before


@pytest.mark.failure_mode("messages-cross")
@pytest.mark.parametrize("wait_s", [0.0, 3.0, 25.0])
def test_the_open_arrives_before_the_request(wait_s: float) -> None:
    """The open waits for its room to be offered and blocks nothing else."""
    world = World()
    sender = world.add_sender()
    world.add_receiver()
    transfer = world.request(7, 500, offer_after_s=wait_s)
    world.settle()
    assert transfer.is_done
    assert not sender.core._pending_opens


@pytest.mark.failure_mode("messages-cross")
@pytest.mark.invariant("deadlines")
def test_an_open_waits_only_so_long() -> None:
    """The room is never offered: the open ends with a cause after ``open_wait_s``."""
    world = World()
    world.add_sender()
    receiver = world.add_receiver()
    transfer = world.request(7, 500, offer_after_s=100.0)
    world.run(for_s=Limits().open_wait_s + 0.1)
    assert transfer.receiver_end is Cause.UNKNOWN_ROOM
    receiver.abort(transfer.key)
    world.settle()


@pytest.mark.failure_mode("messages-cross")
def test_an_abort_overtakes_its_own_open() -> None:
    """The abort arrives before the open, and the open does not start the room again."""
    world = World()
    sender = world.add_sender()
    receiver = world.add_receiver()
    warm = world.request(1, 10)
    world.settle()
    world.link.rules.append(delay(Open, 2.0))
    transfer = world.request(7, 500)
    world.run(for_s=0.5)
    receiver.abort(transfer.key)
    world.run(for_s=0.01)
    assert warm.is_done
    assert transfer.receiver_end is transfer.sender_end is Cause.ABORTED, (
        "one round trip, though it was never opened"
    )
    world.settle()
    assert not sender.writes[1:]


@pytest.mark.failure_mode("frozen-peer-holds-blocks")
@pytest.mark.invariant("no-early-reuse")
@pytest.mark.parametrize("wire", [FENCED, ONE_SIDED])
def test_a_frozen_encoder_does_not_take_the_pool(wire: str) -> None:
    """Encoder 1 freezes in mid-slice with its whole share granted; encoder 2 goes on in the rest of the pool, also after the late
    write."""
    world = World()
    frozen, healthy = world.add_sender("encoder-1"), world.add_sender("encoder-2")
    receiver = world.add_receiver(num_blocks=8, wire=wire)
    held = world.request(1, 5000, sender=frozen)
    first = world.request(100, 3000, sender=healthy, source_s=0.1)
    world.run_until(lambda: landed(receiver, held) > 0)
    frozen.process.freeze()
    more = [world.request(101 + i, 3000, sender=healthy, open_after_s=i * 1.0) for i in range(20)]
    world.run(for_s=60.0)
    assert first.is_done
    assert all(t.is_done for t in more), "the rest of the pool serves the others"
    assert held.receiver_end is Cause.PEER_LOST
    in_doubt = receiver.blocks.blocks_quarantined
    assert in_doubt == {FENCED: 0, ONE_SIDED: 8 - 2}[wire]
    before = receiver.memory.cells.copy()
    after_waking = [world.request(200 + i, 3000, sender=healthy) for i in range(5)]
    frozen.process.wake()
    if wire == ONE_SIDED:
        assert np.any(receiver.memory.cells != before), "the slice under way landed after all"
    world.settle()
    assert all(t.is_done for t in after_waking)
    again = world.request(300, 3000, sender=frozen)
    world.settle()
    assert again.is_done, "who was frozen is as good as anybody"


@pytest.mark.failure_mode("frozen-peer-holds-blocks")
@pytest.mark.invariant("no-early-reuse")
def test_no_peer_gets_more_while_its_blocks_are_in_doubt() -> None:
    """Waiting rooms of the frozen encoder get no blocks."""
    world = World()
    frozen, healthy = world.add_sender("encoder-1"), world.add_sender("encoder-2")
    receiver = world.add_receiver(num_blocks=8, default_allocate_tokens=128, wire=ONE_SIDED)
    transfers = [world.request(room, 5000, sender=frozen) for room in range(1, 20)]
    other = world.request(100, 50_000, sender=healthy)
    world.run_until(lambda: sum(r.landed_tokens for r in receiver.core.lanes.transfers.values()) > 2000)
    frozen.process.freeze()
    world.run(for_s=7.0)
    assert other.is_done
    doubted = receiver.blocks.blocks_quarantined
    assert 0 < doubted <= 6
    late = world.request(50, 300, sender=frozen, offer_after_s=1.0)
    world.run(for_s=10.0)
    assert receiver.blocks.blocks_quarantined == doubted
    frozen.process.wake()
    world.settle()
    assert {t.receiver_end for t in transfers} <= {Cause.PEER_LOST, Cause.DONE}
    assert late.receiver_end is not None
