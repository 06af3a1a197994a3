"""What runs next: one chunk of a prompt, then one token of every running answer.

Owns the answers that were admitted, and the order of work among them. Must not know threads, queues or
clocks: the same calls give the same steps. Called by ``generation`` on the engine's thread.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import dataclass

from torch import Tensor
from transformers import DynamicCache

from embedwire.engines.transformers.answer import Answer
from embedwire.engines.transformers.batching import DecodeBatch
from embedwire.engines.transformers.language import LanguageHalf
from embedwire.language.interface import AssembledPrompt

_log = logging.getLogger(__name__)


@dataclass(slots=True)
class _Prefill:
    """A prompt on its way into the batch; what its cache holds is how far it got."""

    answer: Answer
    prompt: AssembledPrompt
    cache: DynamicCache


class Scheduler:
    """Admitted answers: at most one whose prompt is being run, and the running ones, which decode together.

    ``_running`` and the rows of ``_batch`` are the same answers in the same order. For the parameters see
    :class:`~embedwire.engines.transformers.generation.TransformersLanguage`.
    """

    def __init__(
        self, half: LanguageHalf, *, max_batch: int, max_cache_tokens: int, prefill_chunk_tokens: int | None
    ) -> None:
        self._half = half
        self._max_batch = max_batch
        self._max_cache_tokens = max_cache_tokens
        self._chunk_tokens = prefill_chunk_tokens
        self._prefill: _Prefill | None = None
        self._running: list[Answer] = []
        self._batch = DecodeBatch()

    @property
    def is_idle(self) -> bool:
        """Whether :meth:`turn` would have nothing to do."""
        return self._prefill is None and not self._running

    def can_admit(self, answer: Answer) -> bool:
        """Whether there is room: one prompt at a time, a row in the batch, and memory for the merged cache
        when all answers are as long as they may get. A single answer always has room."""
        if self._prefill is not None or len(self._running) >= self._max_batch:
            return False
        longest = max(a.total_tokens for a in (answer, *self._running))
        return not self._running or (len(self._running) + 1) * longest <= self._max_cache_tokens

    def admit(self, answer: Answer, prompt: AssembledPrompt) -> None:
        """Take an answer for which there is room; its prompt runs in the next turns."""
        if answer.budget_tokens:
            self._prefill = _Prefill(answer, prompt, self._half.new_cache())
        else:
            answer.end("length")

    def turn(self) -> None:
        """Run one chunk of a prompt and one token of every running answer.

        An error ends the answers that took part in the step that raised it, and no others.
        """
        self._drop_cancelled()
        if self._prefill is not None:
            self._run_prompt(self._prefill)
        if self._running:
            self._run_batch()

    def cancel_all(self) -> None:
        """End every answer."""
        for answer in self._admitted():
            answer.cancel()
        self._drop_cancelled()

    def _admitted(self) -> list[Answer]:
        return [*([self._prefill.answer] if self._prefill else []), *self._running]

    def _drop_cancelled(self) -> None:
        for answer in self._admitted():
            if answer.is_cancelled:
                answer.end("cancelled")
        if self._prefill is not None and self._prefill.answer.finished:
            self._prefill = None
        self._drop_finished()

    def _run_prompt(self, prefill: _Prefill) -> None:
        answer, cache = prefill.answer, prefill.cache
        start, length = cache.get_seq_length(), len(prefill.prompt.fill_ids)
        end = length if self._chunk_tokens is None else min(length, start + self._chunk_tokens)
        try:
            logits = self._half.prefill(prefill.prompt, cache, start=start, end=end)
        except Exception as error:
            self._prefill = None
            _fail([answer], error)
            return
        if end == length:
            self._prefill = None
            _take(answer, logits[0])
            if not answer.finished:
                self._join(answer, cache)

    def _join(self, answer: Answer, cache: DynamicCache) -> None:
        self._running.append(answer)
        try:
            self._batch.join(cache)
        except Exception as error:
            self._fail_batch(error)

    def _run_batch(self) -> None:
        try:
            logits = self._batch.decode(
                self._half,
                [answer.last_token for answer in self._running],
                positions=[answer.position for answer in self._running],
            )
        except Exception as error:
            self._fail_batch(error)
            return
        for answer, row in zip(self._running, logits, strict=True):
            _take(answer, row)
        self._drop_finished()

    def _drop_finished(self) -> None:
        rows = [row for row, answer in enumerate(self._running) if not answer.finished]
        if len(rows) == len(self._running):
            return
        self._running = [self._running[row] for row in rows]
        try:
            self._batch.keep(rows)
        except Exception as error:
            self._fail_batch(error)

    def _fail_batch(self, error: Exception) -> None:
        failed, self._running, self._batch = self._running, [], DecodeBatch()
        _fail(failed, error)


def _take(answer: Answer, logits: Tensor) -> None:
    try:
        answer.take(logits)
    except Exception as error:
        _fail([answer], error)


def _fail(answers: Iterable[Answer], error: Exception) -> None:
    _log.error("a step failed", exc_info=error)
    for answer in answers:
        answer.end("error", error=f"{type(error).__name__}: {error}")
