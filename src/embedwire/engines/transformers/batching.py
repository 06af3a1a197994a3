"""The key-value caches of the sequences that decode together, merged into one.

Owns the padding: shorter sequences are padded on the left, and the mask hides it. A batch of one, and one
of equal lengths, has neither padding nor mask. Must not know what the rows are for. Used by ``generation`` on
the engine's thread.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import DynamicCache

from embedwire.engines.transformers.language import LanguageHalf


class DecodeBatch:
    """Rows in the order in which they joined. After an error in a method it is unusable: make a new one."""

    def __init__(self) -> None:
        self._cache: DynamicCache | None = None
        self._lengths: list[int] = []

    def __len__(self) -> int:
        return len(self._lengths)

    @property
    def width(self) -> int:
        """Tokens that each row takes in memory: as many as the longest has."""
        return max(self._lengths, default=0)

    def join(self, cache: DynamicCache) -> None:
        """Add a row: the cache of one sequence, which the batch owns from now on."""
        length = cache.get_seq_length()
        if self._cache is None:
            self._cache = cache
        else:
            width = max(self.width, length)
            for mine, other in zip(self._cache.layers, cache.layers, strict=True):
                mine.keys = torch.cat([_widen(mine.keys, width), _widen(other.keys, width)])
                mine.values = torch.cat([_widen(mine.values, width), _widen(other.values, width)])
        self._lengths.append(length)

    def keep(self, rows: Sequence[int]) -> None:
        """Drop all rows but these (indices, ascending), and the padding that nobody needs any more."""
        before, self._lengths = self.width, [self._lengths[row] for row in rows]
        if self._cache is None or not rows:
            self._cache = None
            return
        start = before - self.width
        for layer in self._cache.layers:
            layer.keys = layer.keys[list(rows), :, start:]
            layer.values = layer.values[list(rows), :, start:]

    def decode(self, half: LanguageHalf, tokens: Sequence[int], *, positions: Sequence[int]) -> Tensor:
        """Run one token of every row in one forward. Returns logits (rows, vocabulary)."""
        assert self._cache is not None
        assert len(tokens) == len(positions) == len(self)
        logits = half.decode(
            torch.tensor(tokens), torch.tensor(positions), cache=self._cache, mask=self._mask()
        )
        self._lengths = [length + 1 for length in self._lengths]
        return logits

    def _mask(self) -> Tensor | None:
        """(rows, width + 1) bool for the next step. None if it hides nothing, as it would change the
        kernel."""
        padding = torch.tensor([self.width - length for length in self._lengths])
        return torch.arange(self.width + 1) >= padding[:, None] if padding.any() else None


def _widen(states: Tensor, width: int) -> Tensor:
    return pad(states, (0, 0, width - states.shape[-2], 0))
