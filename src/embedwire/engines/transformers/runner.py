"""Runs a language half: the cache of the prompt that is being read, and the batch of the sequences that decode together.

Owns those caches. Must not know answers, sampling, or the order of work. Called by ``scheduler`` on the engine's thread. Equal calls on
equal weights have equal results, which is what lets several ranks run as one: all are given the same calls.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor
from transformers import DynamicCache

from embedwire.engines.transformers.batching import DecodeBatch
from embedwire.engines.transformers.language import LanguageHalf
from embedwire.language.interface import AssembledPrompt


class ModelRunner:
    """At most one prompt is being read at a time; it ends with :meth:`join` or :meth:`discard`. After an error in ``join``, ``keep`` or
    ``decode`` the batch is empty."""

    def __init__(self, half: LanguageHalf) -> None:
        self._half = half
        self._prompt: AssembledPrompt | None = None
        self._cache: DynamicCache | None = None
        self._batch = DecodeBatch()

    def prefill(self, prompt: AssembledPrompt, *, start: int, end: int) -> Tensor:
        """Run tokens ``start`` to ``end`` of a prompt; 0 begins a new one. Returns logits (vocabulary,) of the last of them."""
        if start == 0:
            self._prompt, self._cache = prompt, self._half.new_cache()
        assert self._cache is not None
        return self._half.prefill(prompt, self._cache, start=start, end=end)[0]

    def join(self) -> None:
        """The prompt has been read: its sequence becomes the batch's last row."""
        assert self._cache is not None
        cache, self._prompt, self._cache = self._cache, None, None
        try:
            self._batch.join(cache)
        except Exception:
            self._batch = DecodeBatch()
            raise

    def discard(self, prompt: AssembledPrompt) -> None:
        """Nobody wants this prompt, or more of it: forget it. Also for one that has not begun. Raises nothing."""
        if prompt is self._prompt:
            self._prompt = self._cache = None

    def keep(self, rows: Sequence[int]) -> None:
        """Drop all rows of the batch but these (indices, ascending)."""
        try:
            self._batch.keep(rows)
        except Exception:
            self._batch = DecodeBatch()
            raise

    def decode(self, tokens: Sequence[int], *, positions: Sequence[int]) -> Tensor:
        """Run one token of every row. Returns logits (rows, vocabulary)."""
        try:
            return self._batch.decode(self._half, tokens, positions=positions)
        except Exception:
            self._batch = DecodeBatch()
            raise

    def close(self) -> None:
        """No call comes after this one."""
