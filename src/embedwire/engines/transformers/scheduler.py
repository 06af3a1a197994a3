"""What runs next: one chunk of a prompt, then one token of every running answer.

Owns the answers that were admitted, and the order of work among them. Must not know threads, queues or
clocks: the same calls give the same steps. Called by ``generation`` on the engine's thread.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import dataclass

from torch import Tensor

from embedwire.engines.transformers.answer import Answer
from embedwire.engines.transformers.runner import ModelRunner
from embedwire.language.interface import AssembledPrompt

_log = logging.getLogger(__name__)


@dataclass(slots=True)
class _Prefill:
    """A prompt on its way into the batch."""

    answer: Answer
    prompt: AssembledPrompt
    tokens_read: int = 0


class Scheduler:
    """Admitted answers: at most one whose prompt is being run, and the running ones, which decode together.

    ``_running`` and the rows of the runner's batch are the same answers in the same order. For the parameters see
    :class:`~embedwire.engines.transformers.generation.TransformersLanguage`.
    """

    def __init__(
        self, runner: ModelRunner, *, max_batch: int, max_cache_tokens: int, prefill_chunk_tokens: int | None
    ) -> None:
        self._runner = runner
        self._max_batch = max_batch
        self._max_cache_tokens = max_cache_tokens
        self._chunk_tokens = prefill_chunk_tokens
        self._prefill: _Prefill | None = None
        self._running: list[Answer] = []

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
            self._prefill = _Prefill(answer, prompt)
        else:
            self._runner.discard(prompt)
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
            self._runner.discard(self._prefill.prompt)
            self._prefill = None
        self._drop_finished()

    def _run_prompt(self, prefill: _Prefill) -> None:
        answer, prompt, start = prefill.answer, prefill.prompt, prefill.tokens_read
        length = len(prompt.fill_ids)
        end = length if self._chunk_tokens is None else min(length, start + self._chunk_tokens)
        try:
            logits = self._runner.prefill(prompt, start=start, end=end)
        except Exception as error:
            self._prefill = None
            self._runner.discard(prompt)
            _fail([answer], error)
            return
        prefill.tokens_read = end
        if end == length:
            self._prefill = None
            _take(answer, logits)
            if answer.finished:
                self._runner.discard(prompt)
            else:
                self._join(answer)

    def _join(self, answer: Answer) -> None:
        self._running.append(answer)
        try:
            self._runner.join()
        except Exception as error:
            self._fail_batch(error)

    def _run_batch(self) -> None:
        try:
            logits = self._runner.decode(
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
            self._runner.keep(rows)
        except Exception as error:
            self._fail_batch(error)

    def _fail_batch(self, error: Exception) -> None:
        failed, self._running = self._running, []
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
