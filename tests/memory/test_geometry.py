"""Tokens to bytes: checked token by token against the definition, and for how few spans it takes."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from embedwire.errors import ConfigurationError, UsageError
from embedwire.limits import AUX_BYTES, BLOCKS_MAX
from embedwire.memory.geometry import AREA_ALIGNMENT_BYTES, PoolGeometry, Run
from embedwire.memory.layout import Field, Layout, item, multimodal

LAYOUT = Layout("TEST", (Field("a", "bfloat16", (3,)), Field("b", "uint8"), Field("c", "int32", (2, 2))))


def token_offset(geometry: PoolGeometry, field_index: int, blocks: Sequence[int], token: int) -> int:
    """Where one token lies, by the definition and one step at a time."""
    area = 0
    for field in geometry.layout.fields[:field_index]:
        area += geometry.num_blocks * geometry.block_size * field.token_bytes
        while area % AREA_ALIGNMENT_BYTES:
            area += 1
    slot = blocks[token // geometry.block_size] * geometry.block_size + token % geometry.block_size
    return area + slot * geometry.layout.fields[field_index].token_bytes


@st.composite
def ranges(draw: st.DrawFn) -> tuple[PoolGeometry, list[int], int, int]:
    geometry = PoolGeometry(LAYOUT, draw(st.integers(1, 9)), draw(st.integers(1, 12)))
    indices = st.integers(0, geometry.num_blocks - 1)
    blocks = draw(
        st.lists(indices, unique=True, min_size=1)
        | st.permutations(range(geometry.num_blocks))
        | indices.map(lambda first: list(range(first, geometry.num_blocks)))
    )
    start = draw(st.integers(0, len(blocks) * geometry.block_size))
    tokens = draw(st.integers(0, len(blocks) * geometry.block_size - start))
    return geometry, blocks, start, tokens


@pytest.mark.failure_mode("cut-inside-block")
@given(ranges())
def test_spans_are_what_the_definition_says(case: tuple[PoolGeometry, list[int], int, int]) -> None:
    """The stride is that of the block, wherever the round ends."""
    geometry, blocks, start, tokens = case
    found = []
    for span in geometry.spans(blocks, start=start, tokens=tokens):
        nbytes = geometry.token_bytes[span.field_index]
        assert span.nbytes > 0
        assert span.nbytes % nbytes == 0
        for n in range(span.nbytes // nbytes):
            found.append((span.field_index, span.token + n, span.offset + n * nbytes))
    assert found == [
        (field_index, token, token_offset(geometry, field_index, blocks, start + token))
        for field_index in range(len(LAYOUT.fields))
        for token in range(tokens)
    ]


@given(ranges())
def test_no_two_runs_could_have_been_one(case: tuple[PoolGeometry, list[int], int, int]) -> None:
    geometry, blocks, start, tokens = case
    runs = geometry.runs(blocks, start=start, tokens=tokens)
    for first, second in itertools.pairwise(runs):
        assert first.slot + first.tokens != second.slot


@given(ranges())
def test_a_grant_permits_its_blocks_and_one_aux_row(case: tuple[PoolGeometry, list[int], int, int]) -> None:
    geometry, blocks, start, tokens = case
    permitted = geometry.grant_spans(blocks)
    written = [(s.offset, s.nbytes) for s in geometry.spans(blocks, start=start, tokens=tokens)]
    written.append((geometry.aux_offset(blocks[0]), AUX_BYTES))
    for offset, nbytes in written:
        assert any(o <= offset and offset + nbytes <= o + n for o, n in permitted)
    bytes_of_blocks = len(blocks) * geometry.block_size * LAYOUT.token_bytes
    assert sum(nbytes for _, nbytes in permitted) == bytes_of_blocks + AUX_BYTES
    ordered = sorted(permitted)
    assert all(a + n <= b for (a, n), (b, _) in itertools.pairwise(ordered))
    assert all(o >= 0 and o + n <= geometry.region_bytes for o, n in permitted)


@pytest.mark.failure_mode("scattered-blocks")
@pytest.mark.parametrize(
    ("blocks", "tokens", "runs"),
    [
        ([8, 9, 3, 4, 5], 640, [Run(0, 1024, 256), Run(256, 384, 384)]),
        ([5, 2, 8], 384, [Run(0, 640, 128), Run(128, 256, 128), Run(256, 1024, 128)]),
        (
            [15, 16, 17, 18, 19, 14, 13, 12, 11, 10],
            1000,
            [Run(0, 1920, 640), Run(640, 1792, 128), Run(768, 1664, 128), Run(896, 1536, 104)],
        ),
    ],
)
def test_blocks_that_are_neither_adjacent_nor_sorted(blocks: list[int], tokens: int, runs: list[Run]) -> None:
    """Exactly these runs, B = 128. Blocks 14 to 10 descend, so they cannot be joined."""
    geometry = PoolGeometry(item(16), 128, 20)
    assert geometry.runs(blocks, start=0, tokens=tokens) == runs


def test_a_contiguous_run_of_blocks_costs_one_span_a_field() -> None:
    geometry = PoolGeometry(multimodal(64, deepstack_levels=3), 128, 64)
    assert len(geometry.spans(range(64), start=0, tokens=8192)) == 4
    assert len(geometry.spans(range(7, 20), start=100, tokens=1500)) == 4
    assert len(geometry.grant_spans(range(64))) == 5


def test_where_the_areas_lie() -> None:
    geometry = PoolGeometry(multimodal(1024, deepstack_levels=3), 100, 3)
    assert geometry.token_bytes == (2048, 4, 12, 6144)
    assert geometry.area_offsets == (0, 614400, 618496, 622592, 2465792)
    assert all(offset % AREA_ALIGNMENT_BYTES == 0 for offset in geometry.area_offsets)
    assert geometry.aux_offset(2) == 2465792 + 128
    assert geometry.region_bytes == 2465792 + 3 * 64
    assert geometry.block_bytes == 100 * 8208 + 64


@pytest.mark.parametrize(
    ("blocks", "start", "tokens", "words"),
    [
        ([0, 1], -1, 1, r"\[-1, 0\)"),
        ([0, 1], 0, -1, r"\[0, -1\)"),
        ([0, 1], 5, -1, r"\[5, 4\)"),
        ([0, 1], 0, 21, r"\[0, 21\).*\[0, 20\)"),
        ([0, 1], 20, 1, r"\[20, 21\).*\[0, 20\)"),
        ([], 0, 1, r"\[0, 0\)"),
        ([0, 4], 0, 20, "block 4 is not in the pool of 4"),
        ([0, -1], 0, 20, "block -1 is not in the pool of 4"),
        ([3, 1, 3], 0, 30, "block 3 is named 2 times"),
    ],
)
def test_what_is_outside_is_refused(blocks: list[int], start: int, tokens: int, words: str) -> None:
    geometry = PoolGeometry(LAYOUT, 10, 4)
    with pytest.raises(UsageError, match=words):
        geometry.spans(blocks, start=start, tokens=tokens)


@pytest.mark.parametrize("blocks", [[4], [-1], [0, 0]])
def test_a_grant_of_wrong_blocks_is_refused(blocks: list[int]) -> None:
    geometry = PoolGeometry(LAYOUT, 10, 4)
    with pytest.raises(UsageError, match="block"):
        geometry.grant_spans(blocks)
    with pytest.raises(UsageError, match="block"):
        geometry.check_blocks(blocks)


def test_nothing_costs_nothing() -> None:
    geometry = PoolGeometry(LAYOUT, 10, 4)
    assert geometry.spans([], start=0, tokens=0) == []
    assert geometry.spans([2], start=10, tokens=0) == []
    assert geometry.grant_spans([]) == []


def test_a_slice_looks_at_the_blocks_it_touches_only() -> None:
    """The cost of one slice does not grow with the grant."""

    class Counted(tuple[int, ...]):
        looked_at = 0

        def __getitem__(self, key: Any) -> Any:
            part = super().__getitem__(key)
            Counted.looked_at += len(part) if isinstance(part, tuple) else 1
            return part

        def __iter__(self) -> object:  # type: ignore[override]
            raise AssertionError("went through the whole grant")

    geometry = PoolGeometry(LAYOUT, 10, 1000)
    geometry.spans(Counted(range(1000)), start=4995, tokens=20)
    assert Counted.looked_at == 3


@pytest.mark.failure_mode("request-never-fits")
@pytest.mark.parametrize(
    ("block_size", "num_blocks"), [(0, 1), (-1, 1), (1, 0), (1, -1), (1, BLOCKS_MAX + 1), (2**31, 1)]
)
def test_a_pool_without_blocks_or_too_large_is_refused(block_size: int, num_blocks: int) -> None:
    """A pool that could never hold anything, and one above the bound, are refused."""
    with pytest.raises(ConfigurationError):
        PoolGeometry(LAYOUT, block_size, num_blocks)
