"""Tokens in and out of blocks: scattered, split anywhere, beside other rooms."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from embedwire.errors import ConfigurationError, UsageError
from embedwire.limits import AUX_WORDS
from embedwire.memory.allocator import BlockAllocator
from embedwire.memory.geometry import PoolGeometry
from embedwire.memory.layout import Field, Layout, Rows, item, multimodal
from embedwire.memory.pool import BlockPool, pack_aux
from embedwire.testing.payload import cut, differing, payload
from embedwire.testing.region import Region

LAYOUT = multimodal(6, deepstack_levels=3)
SCATTERED = [
    ([8, 9, 3, 4, 5], 640),
    ([5, 2, 8], 384),
    ([15, 16, 17, 18, 19, 14, 13, 12, 11, 10], 1000),
]


def make_aux(total: int, delta: int = 0) -> tuple[int, ...]:
    return (total, delta) + (0,) * (AUX_WORDS - 2)


@pytest.mark.failure_mode("scattered-blocks")
@pytest.mark.parametrize(("blocks", "tokens"), SCATTERED)
def test_blocks_that_are_neither_adjacent_nor_sorted(blocks: list[int], tokens: int) -> None:
    """B = 128: every byte is right in these blocks, and no other block changes."""
    pool = Region(LAYOUT, 128, 20)
    others = [i for i in range(20) if i not in blocks]
    neighbour = payload(LAYOUT, len(others) * 128, room=1)
    pool.write(others, neighbour, aux=make_aux(1, 1))
    sent = payload(LAYOUT, tokens, room=2)
    pool.write(blocks, sent, aux=make_aux(tokens, -756))
    assert differing(LAYOUT, sent, pool.read(blocks, tokens)) == []
    assert differing(LAYOUT, neighbour, pool.read(others, len(others) * 128)) == []
    assert pool.pool.read_aux(blocks[0])[:2] == (tokens, -756)
    assert pool.pool.read_aux(others[0])[:2] == (1, 1)


@pytest.mark.failure_mode("scattered-blocks")
@pytest.mark.parametrize(("blocks", "tokens"), SCATTERED)
def test_a_block_lies_where_its_index_says(blocks: list[int], tokens: int) -> None:
    """Writing and reading could be wrong in the same way, so each block is read on its own."""
    pool = Region(LAYOUT, 128, 20)
    sent = payload(LAYOUT, tokens)
    pool.write(blocks, sent)
    for place, block in enumerate(blocks):
        part = cut(sent, place * 128, min((place + 1) * 128, tokens))
        assert differing(LAYOUT, part, pool.read([block], len(part["fill_ids"]))) == []


@pytest.mark.failure_mode("cut-inside-block")
@given(st.data())
@settings(deadline=None, max_examples=60)
def test_any_cut_inside_a_block_is_legal(data: st.DataObject) -> None:
    """Written with one division and read with another, both at any token."""
    block_size = data.draw(st.integers(1, 7))
    pool = Region(LAYOUT, block_size, 10)
    blocks = data.draw(st.permutations(range(10)))[: data.draw(st.integers(1, 10))]
    tokens = data.draw(st.integers(1, len(blocks) * block_size))
    sent = payload(LAYOUT, tokens)
    places = st.sets(st.integers(1, max(1, tokens - 1)), max_size=5)
    writes, reads = ([0, *sorted(data.draw(places)), tokens] for _ in range(2))
    for start, stop in itertools.pairwise(writes):
        pool.write(blocks, cut(sent, start, stop), start=start)
    out = LAYOUT.empty(tokens)
    for start, stop in itertools.pairwise(reads):
        pool.pool.get_rows(blocks, LAYOUT.rows(out), row=start, start=start, tokens=max(0, stop - start))
    assert differing(LAYOUT, sent, out) == []


@pytest.mark.failure_mode("aux-read-from-resumed-block")
@pytest.mark.invariant("aux-once")
def test_aux_belongs_to_the_first_block_of_the_first_round() -> None:
    """8192 tokens in blocks 0–63, 976 in 64–71: block 64 has no total, and the room's total stays 9168."""
    pool = Region(multimodal(2), 128, 72)
    sent = payload(pool.layout, 9168)
    pool.write(range(64), cut(sent, 0, 8192), aux=make_aux(9168, -756))
    remembered = pool.pool.read_aux(0)
    pool.write(range(64, 72), cut(sent, 8192, 9168))
    assert pool.pool.read_aux(64) == make_aux(0)
    assert remembered == make_aux(9168, -756)
    assembly = pool.layout.empty(remembered[0])
    rows = pool.layout.rows(assembly)
    pool.pool.get_rows(range(64), rows, tokens=8192)
    pool.pool.get_rows(range(64, 72), rows, row=8192, tokens=976)
    assert assembly["mrope_positions"].shape == (9168, 3)
    assert differing(pool.layout, sent, assembly) == []


@pytest.mark.failure_mode("aux-view-of-freed-block")
@pytest.mark.invariant("aux-once")
def test_remembered_aux_outlives_its_block() -> None:
    """The block is freed and written by another room; the aux row read before does not change."""
    pool, allocator = Region(item(4), 8, 1), BlockAllocator(1, 8)
    blocks = allocator.alloc_blocks(1)
    assert blocks is not None
    pool.write(blocks, payload(item(4), 8), aux=make_aux(2000, -3))
    remembered = pool.pool.read_aux(blocks[0])
    allocator.free(blocks)
    again = allocator.alloc_blocks(1)
    assert again == blocks
    pool.write(again, payload(item(4), 5, room=1), aux=make_aux(5, 9))
    assert remembered == make_aux(2000, -3)
    assert pool.pool.read_aux(blocks[0]) == make_aux(5, 9)


@pytest.mark.failure_mode("no-media")
@pytest.mark.parametrize("layout", [multimodal(6), multimodal(6, mrope=False), item(6), LAYOUT])
def test_every_layout_and_no_tokens_at_all(layout: Layout) -> None:
    """A layout without deepstack; a write of zero tokens changes nothing."""
    pool = Region(layout, 4, 3)
    sent = payload(layout, 11)
    pool.write((2, 0, 1), sent)
    pool.write((2, 0, 1), layout.empty(0), start=3)
    pool.write((), layout.empty(0))
    assert differing(layout, sent, pool.read((2, 0, 1), 11)) == []
    assert set(pool.read((), 0)) == {f.name for f in layout}


@pytest.mark.failure_mode("no-media")
def test_rooms_with_and_without_media_share_a_pool() -> None:
    """The deepstack of text rooms is zero and stays zero beside rooms with media."""
    pool, allocator = Region(LAYOUT, 4, 12), BlockAllocator(12, 4)
    rooms = []
    for room, tokens in enumerate((9, 3, 14, 8)):
        sent = payload(LAYOUT, tokens, room=room)
        if room % 2:
            sent["deepstack_embeddings"][:] = 0
        blocks = allocator.alloc_blocks(allocator.blocks_for(tokens))
        assert blocks is not None
        rooms.append((blocks, sent))
    for start in (0, 5):
        for blocks, sent in rooms:
            part = cut(sent, start, start + 5 if start == 0 else 99)
            pool.write(blocks, part, start=min(start, len(sent["fill_ids"])))
    for blocks, sent in rooms:
        assert differing(LAYOUT, sent, pool.read(blocks, len(sent["fill_ids"]))) == []


def test_rows_beyond_the_tokens_read_stay_as_they_are() -> None:
    pool = Region(item(4), 4, 2)
    pool.write([1, 0], payload(item(4), 8))
    out = payload(item(4), 6, room=1)
    pool.pool.get_rows([1, 0], item(4).rows(out), start=3, tokens=2)
    assert differing(item(4), cut(payload(item(4), 8), 3, 5), cut(out, 0, 2)) == []
    assert differing(item(4), cut(payload(item(4), 6, room=1), 2, 6), cut(out, 2, 6)) == []


WRONG: list[tuple[str, Callable[[BlockPool, Rows], object]]] = [
    ("not in the pool", lambda p, out: p.get_rows([0, 9], [out], tokens=5)),
    ("named 2 times", lambda p, out: p.get_rows([1, 1], [out], tokens=5)),
    ("not inside the grant", lambda p, out: p.get_rows([1], [out], tokens=5)),
    ("not inside the grant", lambda p, out: p.get_rows([1], [out], start=-1, tokens=1)),
    ("not in the pool", lambda p, out: p.read_aux(-1)),
    ("not in the pool", lambda p, out: p.read_aux(3)),
]


@pytest.mark.parametrize(("words", "call"), WRONG)
def test_a_wrong_call_touches_no_byte(words: str, call: Callable[[BlockPool, Rows], object]) -> None:
    pool, out = Region(item(1, dtype="int32"), 4, 3), np.full((9, 4), 7, np.uint8)
    with pytest.raises(UsageError, match=words):
        call(pool.pool, out)
    assert (out == 7).all()


@pytest.mark.parametrize("aux", [(2**31,) * AUX_WORDS, (1, 2)])
def test_an_aux_row_that_does_not_fit_is_refused(aux: tuple[int, ...]) -> None:
    with pytest.raises(UsageError, match="int32"):
        pack_aux(aux)


def test_a_buffer_that_can_not_be_a_pool_is_refused() -> None:
    geometry = PoolGeometry(item(4), 4, 3)
    n = geometry.region_bytes
    for buffer in (memoryview(bytes(n)), memoryview(bytearray(n - 1)), memoryview(bytearray(2 * n))[::2]):
        with pytest.raises(ConfigurationError, match=str(n)):
            BlockPool(geometry, buffer)


def test_a_dropped_pool_lets_go_of_its_memory() -> None:
    geometry = PoolGeometry(item(4), 4, 3)
    memory = bytearray(geometry.region_bytes)
    pool = BlockPool(geometry, memoryview(memory))
    assert pool.read_aux(0) == make_aux(0)
    with pytest.raises(BufferError):
        memory.clear()
    del pool
    memory.clear()


def test_aux_is_little_endian_int32() -> None:
    assert pack_aux(make_aux(1, -1)) == b"\1\0\0\0" + b"\xff" * 4 + b"\0" * 56


TINY = Layout("TINY", (Field("a", "bfloat16", (3,)), Field("b", "uint8")))


class PoolMachine(RuleBasedStateMachine):
    """Rooms that begin, write anywhere and end, against a dictionary of (grant, token)."""

    @initialize(block_size=st.integers(1, 4))
    def create(self, block_size: int) -> None:
        self.allocator = BlockAllocator(8, block_size)
        self.pool = Region(TINY, block_size, 8)
        self.model: dict[tuple[tuple[int, ...], int], bytes] = {}
        self.aux: dict[tuple[int, ...], tuple[int, ...]] = {}
        self.rooms = 0

    def draw_range(self, data: st.DataObject) -> tuple[tuple[int, ...], int, int]:
        grant = data.draw(st.sampled_from(sorted(self.aux)))
        size = len(grant) * self.pool.geometry.block_size
        start = data.draw(st.integers(0, size))
        return grant, start, data.draw(st.integers(0, size - start))

    def remember(self, grant: tuple[int, ...], start: int, arrays: dict[str, np.ndarray]) -> None:
        for n, row in enumerate(np.hstack(TINY.rows(arrays))):
            self.model[grant, start + n] = row.tobytes()

    @rule(tokens=st.integers(1, 12))
    def grant(self, tokens: int) -> None:
        blocks = self.allocator.alloc_blocks(self.allocator.blocks_for(tokens))
        if blocks is not None:
            self.rooms += 1
            self.aux[blocks] = make_aux(self.rooms, -self.rooms)
            self.pool.write(blocks, TINY.empty(0), aux=self.aux[blocks])

    @precondition(lambda self: self.aux)
    @rule(data=st.data())
    def write(self, data: st.DataObject) -> None:
        grant, start, tokens = self.draw_range(data)
        self.rooms += 1
        arrays = payload(TINY, tokens, room=self.rooms)
        self.pool.write(grant, arrays, start=start)
        self.remember(grant, start, arrays)

    @precondition(lambda self: self.aux)
    @rule(data=st.data(), quarantine=st.booleans())
    def end(self, data: st.DataObject, quarantine: bool) -> None:
        grant = data.draw(st.sampled_from(sorted(self.aux)))
        if quarantine:
            self.allocator.quarantine(grant, peer=1)
            self.allocator.release_quarantine(grant)
        else:
            self.allocator.free(data.draw(st.permutations(grant)))
        del self.aux[grant]
        self.model = {key: row for key, row in self.model.items() if key[0] != grant}

    @invariant()
    def every_room_reads_what_it_wrote(self) -> None:
        for grant, aux in getattr(self, "aux", {}).items():
            assert self.pool.pool.read_aux(grant[0]) == aux
            found = np.hstack(TINY.rows(self.pool.read(grant, len(grant) * self.pool.geometry.block_size)))
            for token, row in enumerate(found):
                assert self.model.get((grant, token), row.tobytes()) == row.tobytes()

    def teardown(self) -> None:
        if hasattr(self, "allocator"):
            self.allocator.check()


TestPoolMachine = PoolMachine.TestCase
TestPoolMachine.settings = settings(max_examples=40, stateful_step_count=25, deadline=None)
