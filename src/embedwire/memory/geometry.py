"""Where a token lies in a region. Owns the arithmetic from tokens of a grant to bytes; holds no memory.

A region is field-major: one area a field, in which the tokens of all blocks follow each other, and behind
them one aux row a block. So blocks that are neighbours in the pool are neighbours in every field, and cost
one piece together::

    | input_embeddings of block 0, 1, … | fill_ids of block 0, 1, … | … | aux of block 0, 1, … |
      each area starts at a multiple of AREA_ALIGNMENT_BYTES

Both sides compute with it from (layout, block_size, num_blocks) alone. It is pure: any thread may call it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from embedwire.errors import ConfigurationError, UsageError
from embedwire.limits import AUX_BYTES, BLOCKS_MAX, TOKENS_MAX
from embedwire.memory.layout import Layout

AREA_ALIGNMENT_BYTES = 4096


class Run(NamedTuple):
    """``tokens`` tokens that are neighbours in the pool, from token ``token`` of the range asked for on.

    ``slot`` is the place of the first in the pool: ``block_index * block_size + position_in_block``.
    """

    token: int
    slot: int
    tokens: int


class Span(NamedTuple):
    """A run in one field: ``nbytes`` bytes at byte ``offset`` of the region."""

    field_index: int
    token: int
    offset: int
    nbytes: int


@dataclass(frozen=True)
class PoolGeometry:
    """A pool of ``num_blocks`` times ``block_size`` tokens. Raises ConfigurationError for an empty one."""

    layout: Layout
    block_size: int
    num_blocks: int

    def __post_init__(self) -> None:
        if not 1 <= self.block_size <= TOKENS_MAX:
            raise ConfigurationError(f"block_size is {self.block_size}; it has to be in 1 .. {TOKENS_MAX}")
        if not 1 <= self.num_blocks <= BLOCKS_MAX:
            raise ConfigurationError(f"num_blocks is {self.num_blocks}; it has to be in 1 .. {BLOCKS_MAX}")

    @property
    def slots(self) -> int:
        """Tokens that the whole pool holds."""
        return self.num_blocks * self.block_size

    @cached_property
    def token_bytes(self) -> tuple[int, ...]:
        """Bytes of one token, for each field in the layout's order."""
        return tuple(f.token_bytes for f in self.layout)

    @cached_property
    def area_offsets(self) -> tuple[int, ...]:
        """Where each field's area starts, in bytes, and last where the aux area does."""
        offsets = [0]
        for nbytes in self.token_bytes:
            end = offsets[-1] + self.slots * nbytes
            offsets.append(-(-end // AREA_ALIGNMENT_BYTES) * AREA_ALIGNMENT_BYTES)
        return tuple(offsets)

    @property
    def region_bytes(self) -> int:
        """Bytes of the whole region."""
        return self.area_offsets[-1] + self.num_blocks * AUX_BYTES

    @property
    def block_bytes(self) -> int:
        """Bytes of one block over all fields, with its aux row."""
        return self.block_size * sum(self.token_bytes) + AUX_BYTES

    def aux_offset(self, block_index: int) -> int:
        """Where the aux row of a block starts, in bytes. Raises UsageError for an index outside the pool."""
        self.check_blocks((block_index,))
        return self.area_offsets[-1] + block_index * AUX_BYTES

    def check_blocks(self, block_indices: Sequence[int]) -> None:
        """Raise UsageError unless the indices are distinct blocks of this pool."""
        for index in block_indices:
            if not 0 <= index < self.num_blocks:
                raise UsageError(f"block {index} is not in the pool of {self.num_blocks} blocks")
        if len(set(block_indices)) != len(block_indices):
            (index, times), *_ = Counter(block_indices).most_common(1)
            raise UsageError(f"block {index} is named {times} times among {len(block_indices)} blocks")

    def runs(self, block_indices: Sequence[int], *, start: int, tokens: int) -> list[Run]:
        """The tokens [start, start + tokens), counted from a grant's first, as runs in token order.

        Neighbours are joined, so the list is as short as it can be. Takes time for the blocks it touches and
        not for the whole grant, and checks only those; :meth:`check_blocks` checks a grant once. Raises
        UsageError when the range is not inside the grant, or a block is not in the pool or named twice.
        """
        size = self.block_size
        if start < 0 or tokens < 0 or start + tokens > len(block_indices) * size:
            end = len(block_indices) * size
            raise UsageError(f"tokens [{start}, {start + tokens}) are not inside the grant's [0, {end})")
        touched = block_indices[start // size : -(-(start + tokens) // size)] if tokens else ()
        self.check_blocks(touched)
        runs: list[Run] = []
        begin = first = count = 0  # the run that is being joined: its token, its slot, its length
        token, slot, skip = 0, 0, start % size
        for index in touched:
            if index * size + skip != slot and count:
                runs.append(Run(begin, first, count))
                count = 0
            if not count:
                begin, first = token, index * size + skip
            step = min(size - skip, tokens - token)
            token, count, slot, skip = token + step, count + step, index * size + skip + step, 0
        if count:
            runs.append(Run(begin, first, count))
        return runs

    def spans(self, block_indices: Sequence[int], *, start: int, tokens: int) -> list[Span]:
        """The same as bytes of the region: the runs of the first field, then those of the next."""
        runs = self.runs(block_indices, start=start, tokens=tokens)
        areas = zip(self.area_offsets, self.token_bytes, strict=False)  # the last offset is that of aux
        return [
            Span(field_index, run.token, area + run.slot * nbytes, run.tokens * nbytes)
            for field_index, (area, nbytes) in enumerate(areas)
            for run in runs
        ]

    def grant_spans(self, block_indices: Sequence[int]) -> list[tuple[int, int]]:
        """The (offset, length) pairs that a writer may touch: whole blocks, and the aux row of the first."""
        if not block_indices:
            return []
        whole = self.spans(block_indices, start=0, tokens=len(block_indices) * self.block_size)
        return [*((s.offset, s.nbytes) for s in whole), (self.aux_offset(block_indices[0]), AUX_BYTES)]
