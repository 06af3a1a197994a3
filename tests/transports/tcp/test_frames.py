"""The bytes of the tcp wire, without a socket."""

from __future__ import annotations

import struct
from collections import deque

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from embedwire.errors import ProtocolViolation, TransportError
from embedwire.transports.contract import Piece
from embedwire.transports.tcp import frames


def test_a_frame_byte_by_byte() -> None:
    """The worked example of the wire format: one frame of two pieces."""
    buffers = frames.encode_frame(3, 4, [(memoryview(b"ab"), 256), (memoryview(b"c"), 1)])
    assert b"".join(buffers) == (
        b"EWf1"
        b"\x03\0\0\0\0\0\0\0"  # ticket
        b"\x04\0\0\0"  # number
        b"\x02\0\0\0"  # pieces
        b"\0\x01\0\0\0\0\0\0\x02\0\0\0\0\0\0\0"
        b"\x01\0\0\0\0\0\0\0\x01\0\0\0\0\0\0\0"
        b"abc"
    )
    whole = b"".join(buffers)
    assert frames.decode_header(whole[:20]) == (3, 4, 2)
    assert frames.decode_table(whole[20:52]) == [(256, 2), (1, 1)]


def test_answers_round_trip() -> None:
    assert frames.decode_ack(frames.encode_ack(2**63 - 1, 7, verdict=frames.LANDED)) == (2**63 - 1, 7, True)
    assert frames.decode_ack(frames.encode_ack(1, 7, verdict=frames.REFUSED)) == (1, 7, False)


@pytest.mark.failure_mode("malformed-message")
@pytest.mark.invariant("validation")
def test_what_the_format_does_not_allow() -> None:
    """Garbage, and an announced length of a gigabyte."""
    with pytest.raises(ProtocolViolation, match="began with"):
        frames.decode_header(b"EWf2" + bytes(16))
    with pytest.raises(ProtocolViolation, match="1025 pieces, the limit is 1024"):
        frames.decode_header(struct.pack("<4sQII", b"EWf1", 1, 0, 1025))
    for table in ([(0, 2**30)], [(0, 2**64 - 1)], [(0, 9 * 2**20), (0, 9 * 2**20)]):
        with pytest.raises(ProtocolViolation, match="the limit is 16777216"):
            frames.decode_table(b"".join(struct.pack("<QQ", *piece) for piece in table))
    with pytest.raises(ProtocolViolation, match="empty piece"):
        frames.decode_table(bytes(16))
    for ack in (b"EWa2" + bytes(13), b"EWa1" + bytes(13)):
        with pytest.raises(ProtocolViolation, match="answer"):
            frames.decode_ack(ack)


def test_a_descriptor_cut_anywhere_is_refused() -> None:
    descriptor = frames.msgspec.msgpack.encode(frames.Descriptor("127.0.0.1", 1, bytes(16), 5))
    assert frames.decode_descriptor(descriptor).nbytes == 5
    for end in range(len(descriptor)):
        with pytest.raises(TransportError):
            frames.decode_descriptor(descriptor[:end])
    for wrong in (
        ("h", 0, bytes(16), 5),
        ("h", 2**16, bytes(16), 5),
        ("h", 1, bytes(15), 5),
        ("h", 1, bytes(16), 0),
    ):
        with pytest.raises(TransportError):
            frames.decode_descriptor(frames.msgspec.msgpack.encode(frames.Descriptor(*wrong)))


@pytest.mark.failure_mode("block-sizes-differ")
@settings(deadline=None, max_examples=50)
@given(
    st.lists(st.integers(0, 40 * 2**20).map(lambda n: n if n % 3 else n % 1000), max_size=4),
    st.integers(0, 2500),
)
def test_a_cut_slice_is_the_same_slice(large: list[int], small: int) -> None:
    """Pieces divided at the limits of the wire keep their bytes and places."""
    block = memoryview(bytes(40 * 2**20))
    sizes = large + [5] * small
    offsets = [sum(sizes[:at]) for at in range(len(sizes))] if len(sizes) < 100 else list(range(len(sizes)))
    batches = list(frames.split([Piece(block[:n], offset) for n, offset in zip(sizes, offsets, strict=True)]))
    assert batches
    for batch in batches:
        assert len(batch) <= frames.PIECES_MAX
        assert sum(len(run) for run, _ in batch) <= frames.FRAME_BYTES_MAX
        assert all(len(run) for run, _ in batch)
    assert sum(len(run) for batch in batches for run, _ in batch) == sum(sizes)


def test_advance_drops_exactly_what_was_taken() -> None:
    for taken in range(7):
        buffers = deque([memoryview(b"ab"), memoryview(b"c"), memoryview(b"def")])
        frames.advance(buffers, taken)
        assert b"".join(buffers) == b"abcdef"[taken:]
