"""Which block is free, granted or quarantined. Owns each block's one state; knows neither bytes nor rooms.

The table of legal steps; whatever is not in it is a UsageError, and then nothing has changed::

    free ── alloc ──► granted ── free ──► free
                      granted ── quarantine ──► quarantined for a peer ── release_quarantine ──► free

Not thread-safe by design: one driver thread owns it, and does nothing else between a question and its answer.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

from embedwire.errors import ConfigurationError, UsageError
from embedwire.limits import BLOCKS_MAX, TOKENS_MAX

_FREE = -1
_GRANTED = -2
# Every other state is the number of the peer that the block is in quarantine for.


class BlockAllocator:
    """Hands out the blocks of one pool. Raises ConfigurationError for a pool without blocks.

    Free blocks are reused first in, first out: blocks freed in some order come back in that order.
    """

    def __init__(self, num_blocks: int, block_size: int) -> None:
        if not 1 <= num_blocks <= BLOCKS_MAX:
            raise ConfigurationError(f"num_blocks is {num_blocks}; it has to be in 1 .. {BLOCKS_MAX}")
        if not 1 <= block_size <= TOKENS_MAX:
            raise ConfigurationError(f"block_size is {block_size}; it has to be in 1 .. {TOKENS_MAX}")
        self.block_size = block_size
        self._states = [_FREE] * num_blocks
        self._free = deque(range(num_blocks))  # an index over _states: the order of reuse
        self._granted = 0
        self._quarantined = 0

    @property
    def blocks_total(self) -> int:
        """Blocks of the pool."""
        return len(self._states)

    @property
    def blocks_free(self) -> int:
        return len(self._free)

    @property
    def blocks_granted(self) -> int:
        return self._granted

    @property
    def blocks_quarantined(self) -> int:
        return self._quarantined

    def blocks_for(self, tokens: int) -> int:
        """How many blocks ``tokens`` tokens take: rounded up, since a grant announces whole blocks only."""
        if tokens < 0:
            raise UsageError(f"tokens is {tokens}; it has to be at least 0")
        return -(-tokens // self.block_size)

    def alloc_blocks(self, n: int) -> tuple[int, ...] | None:
        """``n`` blocks (at least 1), or None when fewer are free; then nothing has changed."""
        if n < 1:
            raise UsageError(f"a grant has at least 1 block, {n} were asked for")
        if n > len(self._free):
            return None
        indices = tuple(self._free.popleft() for _ in range(n))
        for index in indices:
            self._states[index] = _GRANTED
        self._granted += n
        return indices

    def free(self, indices: Sequence[int]) -> None:
        """Give granted blocks back."""
        self._expect(indices, granted=True)
        self._to_free(indices)
        self._granted -= len(indices)

    def quarantine(self, indices: Sequence[int], *, peer: int) -> None:
        """Set granted blocks aside for as long as ``peer`` (at least 0) may still write into them."""
        if peer < 0:
            raise UsageError(f"peer is {peer}; it has to be at least 0")
        self._expect(indices, granted=True)
        for index in indices:
            self._states[index] = peer
        self._granted -= len(indices)
        self._quarantined += len(indices)

    def release_quarantine(self, indices: Sequence[int]) -> None:
        """Make quarantined blocks free: there is proof that no write can land in them."""
        self._expect(indices, granted=False)
        self._to_free(indices)
        self._quarantined -= len(indices)

    def check(self) -> None:
        """Assert from a fresh count: free + granted + quarantined = total, and no block is two of them."""
        granted = self._states.count(_GRANTED)
        free = {i for i, state in enumerate(self._states) if state == _FREE}
        assert free == set(self._free), "the queue of free blocks is not the set of free blocks"
        assert len(free) == len(self._free), "a block is queued twice as free"
        assert granted == self._granted, f"{granted} blocks are granted, {self._granted} were counted"
        assert len(free) + granted + self._quarantined == self.blocks_total, (
            f"of {self.blocks_total} blocks some are lost: {self}"
        )

    def __repr__(self) -> str:
        counts = f"free={self.blocks_free}, granted={self._granted}, quarantined={self._quarantined}"
        return f"BlockAllocator({counts}, total={self.blocks_total})"

    def _expect(self, indices: Sequence[int], *, granted: bool) -> None:
        seen: set[int] = set()
        for index in indices:
            if not 0 <= index < self.blocks_total:
                raise UsageError(f"block {index} is not in the pool of {self.blocks_total} blocks")
            state = self._states[index]
            if index in seen or not (state == _GRANTED if granted else state >= 0):
                wanted = "granted" if granted else "quarantined"
                found = "named twice" if index in seen else _in_words(state)
                raise UsageError(f"block {index} has to be {wanted} and is {found}")
            seen.add(index)

    def _to_free(self, indices: Sequence[int]) -> None:
        for index in indices:
            self._states[index] = _FREE
        self._free.extend(indices)


def _in_words(state: int) -> str:
    return {_FREE: "free", _GRANTED: "granted"}.get(state, f"quarantined for peer {state}")
