"""Pools smaller than what goes through them."""

from __future__ import annotations

import pytest

from embedwire.errors import ConfigurationError
from embedwire.limits import Limits
from embedwire.protocol.messages import Cause
from embedwire.protocol.states import ReceiverState
from embedwire.testing.sim_memory import TOKEN_BYTES
from embedwire.testing.simulation import FENCED, ONE_SIDED, WireFaults, World


@pytest.mark.failure_mode("pool-held-by-partial-rooms")
@pytest.mark.invariant("no-hold-and-wait")
def test_a_pool_held_by_partials() -> None:
    """64 rooms hold one block each of 64, and all need more: all finish."""
    world = World()
    world.add_sender()
    receiver = world.add_receiver(num_blocks=64, default_allocate_tokens=128)
    transfers = [world.request(room, 1000) for room in range(1, 65)]
    world.run_until(lambda: sum(len(r.open_rounds) for r in receiver.core.lanes.transfers.values()) == 64)
    assert receiver.blocks.blocks_free == 0
    world.settle()
    assert all(t.is_done and t.rounds[0] == 128 for t in transfers)


@pytest.mark.failure_mode("longer-than-memory")
@pytest.mark.invariant("no-hold-and-wait")
def test_longer_than_the_pool_and_than_all_receive_memory() -> None:
    """100,000 tokens through 2 blocks of 96, two rooms at once, with assembly memory for one of them only."""
    world = World()
    world.add_sender(faults=WireFaults(slice_tokens=4096))
    receiver = world.add_receiver(num_blocks=2, block_size=96, assembly_bytes=100_000 * TOKEN_BYTES)
    transfers = [world.request(room, 100_000) for room in (1, 2)]
    world.settle()
    assert all(t.is_done and len(t.rounds) >= 521 for t in transfers)
    assert receiver.budget.peak_bytes == 100_000 * TOKEN_BYTES


@pytest.mark.failure_mode("request-never-fits")
@pytest.mark.parametrize("wire", [FENCED, ONE_SIDED])
def test_what_can_never_be_served_is_refused_at_once(wire: str) -> None:
    """More tokens than all assembly memory: both sides get the cause before anything was granted."""
    world = World()
    world.add_sender()
    world.add_receiver(assembly_bytes=1000 * TOKEN_BYTES, wire=wire)
    large, small = world.request(1, 1001), world.request(2, 1000)
    world.run(for_s=1.0)
    assert large.receiver_end is large.sender_end is Cause.NEVER_FITS
    assert not large.grants
    world.settle()
    assert small.is_done


@pytest.mark.failure_mode("request-never-fits")
def test_a_pool_without_blocks_is_no_pool() -> None:
    """Zero blocks configured."""
    with pytest.raises(ConfigurationError):
        World().add_receiver(num_blocks=0)


@pytest.mark.invariant("deadlines")
def test_a_room_that_waits_for_blocks_does_so_before_a_deadline() -> None:
    """The only block is with a peer that does not write: the next room ends with a cause, not never."""
    world = World(limits=Limits(blocks_wait_s=10.0))
    slow = world.add_sender("encoder-1", faults=WireFaults(slice_s=(50.0, 50.0)))
    quick = world.add_sender("encoder-2")
    receiver = world.add_receiver(num_blocks=1, wire=FENCED)
    held = world.request(1, 100, sender=slow)
    world.run_until(lambda: bool(held.grants))
    waiting = world.request(2, 100, sender=quick)
    world.run_until(lambda: waiting.receiver_end is not None)
    assert waiting.receiver_end is Cause.DEADLINE
    assert receiver.core.lanes.transfers[held.key].state is ReceiverState.FILLING
    world.settle()
    assert waiting.sender_end is Cause.DEADLINE
    assert held.is_done
