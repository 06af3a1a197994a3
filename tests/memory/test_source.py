"""Pieces for a wire: they land where the receiver reads, are few, and copy nothing."""

from __future__ import annotations

import numpy as np
import pytest

from embedwire.errors import UsageError
from embedwire.limits import AUX_BYTES, AUX_WORDS
from embedwire.memory.geometry import PoolGeometry
from embedwire.memory.layout import item, multimodal
from embedwire.memory.pool import BlockPool, pack_aux
from embedwire.memory.source import Source
from embedwire.testing.payload import differing, payload

LAYOUT = multimodal(6, deepstack_levels=3)
AUX = pack_aux((2000, -756) + (0,) * (AUX_WORDS - 2))


def land(memory: bytearray, pieces: list[tuple[memoryview, int]]) -> None:
    for source, offset in pieces:
        assert offset + len(source) <= len(memory)
        memory[offset : offset + len(source)] = source


@pytest.mark.failure_mode("resume-never-triggered", "scattered-blocks", "block-sizes-differ")
@pytest.mark.parametrize("block_size", [128, 96, 1000])
@pytest.mark.parametrize("slice_tokens", [1, 37, 128, 5000])
def test_two_rounds_in_slices(block_size: int, slice_tokens: int) -> None:
    """The bytes of 2000/1024, in scattered blocks of any size and slices of any size."""
    geometry = PoolGeometry(LAYOUT, block_size, 40)
    memory = bytearray(geometry.region_bytes)
    pool = BlockPool(geometry, memoryview(memory))
    sent = payload(LAYOUT, 2000)
    source = Source(LAYOUT, sent)
    order = np.random.default_rng(0).permutation(40).tolist()
    found = LAYOUT.empty(2000)
    for start, stop in ((0, 1024), (1024, 2000)):
        blocks = [order.pop() for _ in range(-(-(stop - start) // block_size))]
        for token in range(start, stop, slice_tokens):
            tokens = min(slice_tokens, stop - token)
            aux = AUX if token == 0 else None
            land(
                memory,
                source.pieces(geometry, blocks, start_token=start, token=token, tokens=tokens, aux=aux),
            )
        pool.get_rows(blocks, LAYOUT.rows(found), row=start, tokens=stop - start)
        total = pool.read_aux(blocks[0])[0]
        assert total == (2000 if start == 0 else 0)
    assert differing(LAYOUT, sent, found) == []


def test_a_contiguous_run_of_blocks_costs_one_piece_a_field() -> None:
    geometry = PoolGeometry(LAYOUT, 128, 64)
    source = Source(LAYOUT, payload(LAYOUT, 8192))
    whole = source.pieces(geometry, range(64), start_token=0, token=0, tokens=8192, aux=AUX)
    assert [len(piece) for piece, _ in whole] == [8192 * f.token_bytes for f in LAYOUT] + [AUX_BYTES]
    assert len(source.pieces(geometry, range(64), start_token=0, token=77, tokens=1000)) == 4
    assert len(source.pieces(geometry, [0, 1, 5, 6], start_token=0, token=0, tokens=512)) == 8


def test_pieces_are_views_of_the_rooms_own_arrays() -> None:
    arrays = payload(LAYOUT, 300)
    pieces = Source(LAYOUT, arrays).pieces(
        PoolGeometry(LAYOUT, 128, 4), [3, 1], start_token=100, token=110, tokens=190
    )
    for piece, _ in pieces:
        assert piece.readonly
        assert piece.format == "B"
        assert piece.ndim == 1
        assert any(np.shares_memory(np.frombuffer(piece, np.uint8), a) for a in arrays.values())
    assert sum(len(piece) for piece, _ in pieces) == 190 * LAYOUT.token_bytes


def test_a_source_of_no_tokens() -> None:
    source = Source(LAYOUT, LAYOUT.empty(0))
    assert source.tokens == 0
    assert source.pieces(PoolGeometry(LAYOUT, 128, 4), [3], start_token=0, token=0, tokens=0) == []


@pytest.mark.parametrize(
    ("start_token", "token", "tokens", "words"),
    [
        (0, 290, 11, r"\[290, 301\).*room's \[0, 300\)"),
        (0, -1, 5, "room's"),
        (0, 5, -1, "grant's"),
        (100, 99, 5, "grant's"),
        (0, 250, 10, r"\[250, 260\).*grant's \[0, 256\)"),
    ],
)
def test_tokens_outside_are_refused(start_token: int, token: int, tokens: int, words: str) -> None:
    source = Source(LAYOUT, payload(LAYOUT, 300))
    with pytest.raises(UsageError, match=words):
        source.pieces(
            PoolGeometry(LAYOUT, 128, 4), [3, 1], start_token=start_token, token=token, tokens=tokens
        )


def test_another_layout_and_a_wrong_aux_are_refused() -> None:
    source = Source(LAYOUT, payload(LAYOUT, 3))
    with pytest.raises(UsageError, match="layout"):
        source.pieces(PoolGeometry(item(4), 128, 4), [3], start_token=0, token=0, tokens=3)
    with pytest.raises(UsageError, match="5 bytes"):
        source.pieces(PoolGeometry(LAYOUT, 128, 4), [3], start_token=0, token=0, tokens=3, aux=b"short")
    with pytest.raises(UsageError, match="0 blocks"):
        source.pieces(PoolGeometry(LAYOUT, 128, 4), [], start_token=0, token=0, tokens=0, aux=AUX)
