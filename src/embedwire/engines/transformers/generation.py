"""Answers many prompts at once: the language engine on transformers.

Owns the engine's thread and its bounded queue. Must not know HTTP or rooms, nor in which order answers
advance. Called by the language floor, from any thread.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import GenerationConfig

from embedwire.engines.transformers.answer import Answer
from embedwire.engines.transformers.checkpoint import load_config, resolve_model
from embedwire.engines.transformers.detokenize import Vocabulary
from embedwire.engines.transformers.language import load_language_half
from embedwire.engines.transformers.parallel import TensorParallel
from embedwire.engines.transformers.processing import ChatTokenizer, check_length, invalid_messages
from embedwire.engines.transformers.ranks import LeadingRunner
from embedwire.engines.transformers.runner import ModelRunner
from embedwire.engines.transformers.sampling import check_sampling
from embedwire.engines.transformers.scheduler import Scheduler
from embedwire.errors import ConfigurationError, EmbedwireError, OverloadedError
from embedwire.language.interface import AssembledPrompt, Delta, SamplingParams


class TransformersLanguage:
    """A :class:`~embedwire.language.interface.LanguageEngine` on one device, or on one a rank.

    ``model`` is a directory or a Hub id. ``max_batch`` answers run at a time, ``max_waiting`` more may
    wait. A prompt longer than ``prefill_chunk_tokens`` (None: never) runs in chunks of that many, with a
    step of the others after each. ``max_cache_tokens`` bounds the merged cache: the number of answers times
    the tokens of the longest. ``threads`` is how many CPU threads torch takes, in the whole process (None:
    as it is). With ``tensor_parallel`` this is rank 0 of that group, and each other rank runs a
    :class:`~embedwire.engines.transformers.ranks.TransformersFollower`; the caller closes the group after the engine. When the group
    breaks, all answers end with an error, and :meth:`submit` raises RankError from then on.

    A prompt runs alone, and so does a single answer: their logits are bit-equal to the undivided model's.
    Merged with others an answer has the same ids in float32, but in bfloat16 they may differ where two are
    nearly even. The same goes for several ranks, whatever is merged.

    Raises ConfigurationError for a model or a setting that can not be used, and RankError.
    """

    def __init__(
        self,
        model: str,
        *,
        dtype: str = "bfloat16",
        device: str = "cpu",
        max_batch: int = 32,
        max_waiting: int = 256,
        prefill_chunk_tokens: int | None = None,
        max_cache_tokens: int = 262_144,
        threads: int | None = None,
        tensor_parallel: TensorParallel | None = None,
    ) -> None:
        _check_positive(max_batch=max_batch, max_waiting=max_waiting, max_cache_tokens=max_cache_tokens)
        _check_positive(prefill_chunk_tokens=prefill_chunk_tokens, threads=threads)
        path = resolve_model(model)
        self._ranks = tensor_parallel
        shard = tensor_parallel.shard if tensor_parallel else None
        self._half = load_language_half(path, dtype=dtype, device=device, shard=shard)
        self._runner = (
            LeadingRunner(self._half, tensor_parallel) if tensor_parallel else ModelRunner(self._half)
        )
        self._end_ids = _end_ids(path)
        self._chat = ChatTokenizer(path)
        self._vocabulary = Vocabulary(self._chat.backend)
        self.model_name = model
        self.layout = self._half.layout
        self.max_tokens = self._half.max_tokens
        self._scheduler = Scheduler(
            self._runner,
            max_batch=max_batch,
            max_cache_tokens=max_cache_tokens,
            prefill_chunk_tokens=prefill_chunk_tokens,
        )
        self._max_waiting = max_waiting
        self._wakeup = threading.Condition()
        self._waiting: deque[tuple[Answer, AssembledPrompt]] = deque()
        self._refused: deque[AssembledPrompt] = deque()
        self._is_closing = False
        if tensor_parallel:
            tensor_parallel.wait_for_all()
        self._thread = threading.Thread(target=self._run, args=(threads,), name="language", daemon=True)
        self._thread.start()

    def tokenize(self, messages: Sequence[Mapping[str, Any]]) -> np.ndarray:
        """Token ids (T,) int32 of a chat without media.

        Raises InvalidRequestError: ``invalid_messages``, also for media, or ``context_length_exceeded``.
        """
        ids = self._chat.encode(messages)
        if self._half.holds_media(ids):
            raise invalid_messages("messages hold media, but only their text has come here")
        check_length(len(ids), self.max_tokens)
        return ids

    def submit(
        self, prompt: AssembledPrompt, sampling: SamplingParams, *, on_delta: Callable[[Delta], None]
    ) -> Answer:
        """Queue a prompt; see :meth:`embedwire.language.interface.LanguageEngine.submit`.

        Also raises InvalidRequestError for sampling parameters out of range, and UsageError for a prompt
        that is not of this model's layout. An answer that reaches ``max_tokens`` ends there, with
        ``"length"``.
        """
        try:
            return self._queue(prompt, sampling, on_delta=on_delta)
        except EmbedwireError:
            if prompt.key is not None:
                with self._wakeup:
                    self._refused.append(prompt)
                    self._wakeup.notify()
            raise

    def _queue(
        self, prompt: AssembledPrompt, sampling: SamplingParams, *, on_delta: Callable[[Delta], None]
    ) -> Answer:
        if self._ranks is not None:
            self._ranks.check()
        check_sampling(sampling)
        self._half.check(prompt)
        prompt_tokens = len(prompt.fill_ids)
        check_length(prompt_tokens, self.max_tokens)
        answer = Answer(
            sampling,
            prompt_tokens=prompt_tokens,
            position_delta=prompt.mrope_position_delta,
            budget_tokens=min(sampling.max_tokens, self.max_tokens - prompt_tokens),
            end_ids=frozenset() if sampling.ignore_eos else self._end_ids,
            vocabulary=self._vocabulary,
            on_delta=on_delta,
        )
        with self._wakeup:
            if self._is_closing:
                raise OverloadedError("the engine is shutting down")
            if len(self._waiting) >= self._max_waiting:
                raise OverloadedError(f"{self._max_waiting} prompts are waiting already")
            self._waiting.append((answer, prompt))
            self._wakeup.notify()
        return answer

    def close(self) -> None:
        """End the thread; what runs or waits is cancelled. Idempotent. Not to be called from ``on_delta``."""
        with self._wakeup:
            self._is_closing = True
            self._wakeup.notify()
        self._thread.join()

    def _run(self, threads: int | None) -> None:
        if threads is not None:
            torch.set_num_threads(threads)
        while self._has_work():
            self._drop_cancelled()
            self._admit()
            self._scheduler.turn()
        for answer, _ in self._waiting:
            answer.cancel()
        self._drop_cancelled()
        self._scheduler.cancel_all()
        self._runner.close()

    def _has_work(self) -> bool:
        """Sleep until there is work, or no more will come."""
        with self._wakeup:
            self._wakeup.wait_for(
                lambda: self._is_closing or self._waiting or self._refused or not self._scheduler.is_idle
            )
            return not self._is_closing

    def _drop_cancelled(self) -> None:
        """A prompt that nobody waits for leaves its place in the queue to others at once."""
        with self._wakeup:
            cancelled = [entry for entry in self._waiting if entry[0].is_cancelled]
            if cancelled:
                gone = {id(answer) for answer, _ in cancelled}  # and nobody who is cancelled from now on
                self._waiting = deque(entry for entry in self._waiting if id(entry[0]) not in gone)
            unread = [*self._refused, *(prompt for _, prompt in cancelled)]
            self._refused.clear()
        for prompt in unread:
            self._runner.discard(prompt)
        for answer, _ in cancelled:
            answer.end("cancelled")

    def _admit(self) -> None:
        with self._wakeup:
            if not self._waiting or not self._scheduler.can_admit(self._waiting[0][0]):
                return
            answer, prompt = self._waiting.popleft()
        self._scheduler.admit(answer, prompt)


def _check_positive(**settings: int | None) -> None:
    for name, value in settings.items():
        if value is not None and value < 1:
            raise ConfigurationError(f"{name} has to be at least 1, got {value}")


def _end_ids(path: Path) -> frozenset[int]:
    """The tokens that end an answer: one, several or none, by the generation settings, else by the
    model's."""
    try:
        ids = GenerationConfig.from_pretrained(path, local_files_only=True).eos_token_id
    except OSError:
        ids = load_config(path).get_text_config().eos_token_id
    return frozenset([ids] if isinstance(ids, int) else ids or ())
