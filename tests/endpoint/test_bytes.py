"""Every byte of every room, over real wires, threads and sockets."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from embedwire.limits import Limits
from embedwire.memory.layout import item, multimodal
from embedwire.testing.payload import differing

pytestmark = [pytest.mark.timeout(60), pytest.mark.wires("shm", "tcp", "mooncake", "nixl")]

ONE_BY_ONE = Limits(window_rounds=1)
"""Each round takes all of the pool that it can use, and the next waits for it."""
ROUNDS = [
    # total, default_allocate_tokens, blocks of the pool, the rounds that follow
    pytest.param(2000, 1024, 64, (1024, 976), id="1-resume"),
    pytest.param(9040, 8000, 63, (8064, 976), id="2-alignment"),
    pytest.param(9168, 8192, 64, (8192, 976), id="3-aux-once"),
    pytest.param(500, 1024, 64, (500,), id="6-shorter"),
    pytest.param(1024, 1024, 64, (1024,), id="6-exact"),
    pytest.param(2000, 1200, 64, (1280, 720), id="7-granted-not-configured"),
    pytest.param(50000, 8192, 128, (8192, 16384, 16384, 9040), id="8-three-and-more"),
    pytest.param(10000, 8192, 128, (8192, 1808), id="12-10000/8192"),
    pytest.param(10000, 4096, 128, (4096, 5904), id="12-10000/4096"),
    pytest.param(12000, 8192, 128, (8192, 3808), id="12-12000/8192"),
    pytest.param(100000, 16384, 782, (16384, 83616), id="12-100000/16384"),
    pytest.param(1, 8192, 1, (1,), id="one-token"),
]


@pytest.mark.failure_mode(
    "resume-never-triggered",
    "grant-not-whole-blocks",
    "aux-read-from-resumed-block",
    "partial-reported-as-success",
    "last-round-by-configured-size",
    "later-rounds-lose-fields",
    "extreme-length",
)
@pytest.mark.parametrize(("total", "default", "blocks", "rounds"), ROUNDS)
def test_rounds(stage: Any, total: int, default: int, blocks: int, rounds: tuple[int, ...]) -> None:
    """B = 128: the expected number of rounds, whole blocks in each, and every byte right."""
    receiver = stage.receiver(num_blocks=blocks, default_allocate_tokens=default, limits=ONE_BY_ONE)
    received = stage.move(stage.sender(), receiver, 7, total)
    assert received.report.rounds == rounds
    assert received.report.transport == stage.wire
    assert received.report.bytes == total * stage.layout.token_bytes
    assert received.arrays["mrope_positions"].shape == (total, 3)


@pytest.mark.failure_mode("extreme-length", "longer-than-memory")
@pytest.mark.invariant("no-hold-and-wait")
def test_one_block_moves_any_length(stage: Any) -> None:
    """100,000 tokens through a pool of one block, which is granted 782 times."""
    sender, receiver = stage.sender(), stage.receiver(num_blocks=1)
    received = stage.move(sender, receiver, 1, 100000)
    assert received.report.rounds == (128,) * 781 + (32,)
    assert receiver.stats().rounds_total == sender.stats().rounds_total == 782


@pytest.mark.failure_mode("block-sizes-differ")
@pytest.mark.parametrize("block_size", [96, 128, 16, 8192])
def test_any_block_size(stage: Any, block_size: int) -> None:
    """The sender uses the block size of the receiver; slice sizes need not divide it."""
    receiver = stage.receiver(num_blocks=3, block_size=block_size, limits=ONE_BY_ONE)
    first = min(3 * block_size, 2500)
    assert stage.move(stage.sender(), receiver, 1, 2500).report.rounds[0] == first


@pytest.mark.failure_mode("no-media")
@pytest.mark.parametrize(
    "layout",
    [
        pytest.param(multimodal(8, deepstack_levels=3), id="deepstack"),
        pytest.param(multimodal(8, mrope=False), id="no-mrope"),
        pytest.param(multimodal(4, dtype="float32"), id="float32"),
        pytest.param(item(24), id="item"),
        pytest.param(item(3, dtype="uint8"), id="odd-width"),
    ],
)
def test_any_layout(stage: Any, layout: Any) -> None:
    """Layouts with and without deepstack and positions, each in several rounds."""
    received = stage.move(
        stage.sender(layout), stage.receiver(layout, num_blocks=5, limits=ONE_BY_ONE), 2, 2000
    )
    assert received.report.rounds == (640, 640, 640, 80)
    assert set(received.arrays) == {field.name for field in layout}


def test_fields_of_bfloat16_stay_bfloat16(stage: Any) -> None:
    """What arrives has the dtype that was sent, not one of the same width."""
    received = stage.move(stage.sender(), stage.receiver(), 1, 10)
    assert received.arrays["input_embeddings"].dtype.name == "bfloat16"
    assert received.arrays["input_embeddings"].shape == (10, 8)


@pytest.mark.failure_mode("aux-view-of-freed-block", "position-delta-reduced")
@pytest.mark.invariant("aux-once")
def test_aux_and_content_hash_arrive(stage: Any) -> None:
    """A negative position delta stays negative, and is still right after its block was freed."""
    sender, receiver = stage.sender(), stage.receiver(num_blocks=1)
    offer = stage.offer(sender, 5, 300, aux=[-756, 3], content_hash=b"h" * 64)
    received = receiver.open(5, sender.address).result(30)
    stage.move(sender, receiver, 6, 300)  # through the same block
    assert received.aux == (300, -756, 3, *[0] * 13)
    assert received.report.content_hash == b"h" * 64
    assert offer.result(30).total_tokens == 300


def test_the_owner_says_where_it_lies(stage: Any) -> None:
    """An assembly of the owner's own is filled in place, once, with nothing in between."""
    sender, receiver = stage.sender(), stage.receiver(num_blocks=2)
    mine = stage.layout.empty(700)
    asked: list[int] = []

    def make(total: int) -> dict[str, np.ndarray]:
        asked.append(total)
        return mine

    stage.offer(sender, 1, 700)
    received = stage.check(receiver.open(1, sender.address, make_assembly=make), 700)
    assert asked == [700]
    assert all(received.arrays[name] is mine[name] for name in mine)


@pytest.mark.failure_mode("bytes-of-another-room")
def test_no_room_reads_another_rooms_bytes(stage: Any, stamped: Any) -> None:
    """Every payload is filled with its room number, and so is what arrives."""
    sender, receiver = stage.sender(), stage.receiver(num_blocks=3)
    rooms = range(1000, 1040)
    for room in rooms:
        sender.offer(room, total_tokens=room - 500).fill(stamped(stage.layout, room - 500, room))
    receptions = [receiver.open(room, sender.address) for room in rooms]
    for room, reception in zip(rooms, receptions, strict=True):
        expected = stamped(stage.layout, room - 500, room)
        assert differing(stage.layout, expected, reception.result(30).arrays) == []


def test_the_first_wire_that_works_is_used(stage: Any) -> None:
    """A receiver offers several wires over one pool; the sender takes the first that it knows too."""
    receiver = stage.receiver(transports=tuple(dict.fromkeys(("shm", "tcp", stage.wire))))
    other = "tcp" if stage.wire == "shm" else "shm"
    for room, wires, used in (
        (1, (stage.wire,), stage.wire),
        (2, (other,), other),
        (3, ("tcp", "shm"), "shm"),
    ):
        assert stage.move(stage.sender(transports=wires), receiver, room, 300).report.transport == used


@pytest.mark.failure_mode("messages-cross")
def test_a_room_may_be_opened_before_it_is_offered(stage: Any) -> None:
    """The room waits for its offer, and then for its source."""
    sender, receiver = stage.sender(), stage.receiver()
    reception = receiver.open(3, sender.address)
    stage.until(lambda: sender.stats().sessions == 1)
    stage.offer(sender, 3, 200)
    stage.check(reception, 200)
