"""Sums: equal for equal bytes however they were cut, different for any difference."""

from __future__ import annotations

import itertools
import tracemalloc

import numpy as np
import pytest
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st

from embedwire.errors import UsageError
from embedwire.memory.checksum import FieldDigests
from embedwire.memory.layout import Layout, item, multimodal
from embedwire.testing.payload import cut, payload
from embedwire.testing.region import Region

LAYOUT = multimodal(3, deepstack_levels=2)


def whole(layout: Layout, arrays: dict[str, np.ndarray]) -> tuple[int, ...]:
    return tuple(xxhash.xxh3_64_intdigest(arrays[f.name].tobytes()) for f in layout)


@given(st.data())
@settings(deadline=None, max_examples=60)
def test_sums_depend_neither_on_cuts_nor_on_block_sizes(data: st.DataObject) -> None:
    """The sender hashes its arrays in one cut, the receiver what it drains from blocks in another."""
    tokens = data.draw(st.integers(0, 40))
    sent = payload(LAYOUT, tokens, room=data.draw(st.integers(0, 3)))
    places = st.lists(st.integers(0, tokens), max_size=5)
    sender, receiver = FieldDigests(LAYOUT), FieldDigests(LAYOUT)
    cuts = [0, *sorted(data.draw(places)), tokens]
    for start, stop in itertools.pairwise(cuts):
        sender.update(cut(sent, start, stop))

    block_size = data.draw(st.integers(1, 9))
    pool = Region(LAYOUT, block_size, 40)
    blocks = data.draw(st.permutations(range(40)))
    pool.write(blocks, sent)
    cuts = [0, *sorted(data.draw(places)), tokens]
    for start, stop in itertools.pairwise(cuts):
        receiver.update(pool.read(blocks, stop - start, start=start))
    assert sender.digest() == receiver.digest() == whole(LAYOUT, sent)


def test_one_flipped_bit_changes_the_sum_of_its_field_only() -> None:
    sent = payload(LAYOUT, 10)
    before = whole(LAYOUT, sent)
    sent["mrope_positions"][7, 2] ^= 1
    digests = FieldDigests(LAYOUT)
    digests.update(sent)
    assert [a == b for a, b in zip(before, digests.digest(), strict=True)] == [True, True, False, True]


def test_swapped_tokens_change_the_sums() -> None:
    sent = payload(LAYOUT, 10)
    digests = FieldDigests(LAYOUT)
    for start in (5, 0):
        digests.update(cut(sent, start, start + 5))
    assert all(a != b for a, b in zip(digests.digest(), whole(LAYOUT, sent), strict=True))


def test_digest_can_be_asked_on_the_way() -> None:
    sent, digests = payload(LAYOUT, 10), FieldDigests(LAYOUT)
    assert digests.digest() == whole(LAYOUT, LAYOUT.empty(0))
    digests.update(cut(sent, 0, 4))
    assert digests.digest() == whole(LAYOUT, cut(sent, 0, 4))
    digests.update(cut(sent, 4, 10))
    assert digests.digest() == whole(LAYOUT, sent)
    assert all(0 <= number < 2**64 for number in digests.digest())


def test_arrays_are_read_in_place() -> None:
    layout = item(1024)
    sent, digests = payload(layout, 1024), FieldDigests(layout)
    tracemalloc.start()
    digests.update(sent)
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert sent["embeddings"].nbytes == 2 * 2**20
    assert peak_bytes < 64 * 2**10


def test_what_does_not_match_is_refused_before_anything_is_added() -> None:
    digests = FieldDigests(LAYOUT)
    arrays = payload(LAYOUT, 4)
    arrays["deepstack_embeddings"] = arrays["deepstack_embeddings"][::2]
    with pytest.raises(UsageError, match="deepstack_embeddings"):
        digests.update(arrays)
    assert digests.digest() == whole(LAYOUT, LAYOUT.empty(0))
