"""One language half on several ranks: rank 0 tells the others each call of its runner, and all carry it out.

Owns those messages, rank 0's runner, and the loop of the others. Must not know answers, sampling or rooms. The leading runner is called by
``scheduler`` on the engine's thread; a follower is a process of its own.

A follower never decides anything, so its caches are those of rank 0 after the same calls. A rank that fails in a step can not be brought
back into step with the others, so any error breaks the group.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from typing import Any

import msgspec
import numpy as np
import torch
from msgspec import Struct
from torch import Tensor

from embedwire.engines.transformers.checkpoint import resolve_model
from embedwire.engines.transformers.language import LanguageHalf, load_language_half
from embedwire.engines.transformers.parallel import TensorParallel
from embedwire.engines.transformers.runner import ModelRunner
from embedwire.errors import UsageError
from embedwire.language.interface import AssembledPrompt

Key = tuple[int, int]
"""Room and attempt, which name a prompt of which each rank has arrays of its own."""


class _Prefill(Struct, tag=True, frozen=True):
    """The arrays of a prompt without a key come with the call that begins it."""

    start: int
    end: int
    key: Key | None


class _Join(Struct, tag=True, frozen=True):
    pass


class _Discard(Struct, tag=True, frozen=True):
    key: Key | None


class _Keep(Struct, tag=True, frozen=True):
    rows: list[int]


class _Decode(Struct, tag=True, frozen=True):
    tokens: list[int]
    positions: list[int]


class _Close(Struct, tag=True, frozen=True):
    pass


_Call = _Prefill | _Join | _Discard | _Keep | _Decode | _Close


class LeadingRunner(ModelRunner):
    """Rank 0's runner. Its methods raise RankError when the group is broken, or breaks."""

    def __init__(self, half: LanguageHalf, tensor_parallel: TensorParallel) -> None:
        super().__init__(half)
        self._ranks = tensor_parallel

    def prefill(self, prompt: AssembledPrompt, *, start: int, end: int) -> Tensor:
        arrays: dict[str, np.ndarray] = {}
        if start == 0 and prompt.key is None:
            named = {field.name: getattr(prompt, field.name) for field in self._half.layout}
            arrays = {name: array for name, array in named.items() if array is not None}
        with self._all(_Prefill(start, end, prompt.key), arrays):
            return super().prefill(prompt, start=start, end=end)

    def join(self) -> None:
        with self._all(_Join()):
            super().join()

    def discard(self, prompt: AssembledPrompt) -> None:
        if prompt is self._prompt or prompt.key is not None:
            with suppress(Exception), self._all(_Discard(prompt.key)):
                pass
        super().discard(prompt)

    def keep(self, rows: Sequence[int]) -> None:
        with self._all(_Keep(list(rows))):
            super().keep(rows)

    def decode(self, tokens: Sequence[int], *, positions: Sequence[int]) -> Tensor:
        with self._all(_Decode(list(tokens), list(positions))):
            return super().decode(tokens, positions=positions)

    def close(self) -> None:
        with suppress(Exception), self._all(_Close()):
            pass

    @contextmanager
    def _all(self, call: _Call, arrays: Mapping[str, np.ndarray] | None = None) -> Iterator[None]:
        """Tell the others to do what the body does here."""
        with self._ranks.in_step():
            self._ranks.send(msgspec.msgpack.encode(call), arrays or {})
            yield


class TransformersFollower:
    """A rank other than 0 of a :class:`~embedwire.engines.transformers.generation.TransformersLanguage`, which has equal ``model`` and
    ``dtype``.

    ``prompt_of`` gives this rank's arrays of a prompt with a key and waits until they are there; ``on_read`` is called with that key when
    they are no longer needed, once for every such prompt that was submitted at rank 0, also if it was refused, cancelled or never begun.
    Both are called on the thread of :meth:`run`. The constructor returns when all ranks have their weights. Raises ConfigurationError as
    rank 0 does, and RankError.
    """

    def __init__(
        self,
        model: str,
        *,
        tensor_parallel: TensorParallel,
        dtype: str = "bfloat16",
        device: str = "cpu",
        threads: int | None = None,
        prompt_of: Callable[[Key], AssembledPrompt] | None = None,
        on_read: Callable[[Key], None] | None = None,
    ) -> None:
        if threads is not None:
            torch.set_num_threads(threads)
        self._ranks = tensor_parallel
        self._half = load_language_half(
            resolve_model(model), dtype=dtype, device=device, shard=tensor_parallel.shard
        )
        self.layout = self._half.layout
        self._runner = ModelRunner(self._half)
        self._prompt: AssembledPrompt | None = None
        self._prompt_of = prompt_of
        self._on_read = on_read
        tensor_parallel.wait_for_all()

    def run(self) -> None:
        """Do what rank 0 does, until it closes its engine. Raises RankError when the group breaks: end the process then."""
        decoder = msgspec.msgpack.Decoder(_Call)
        with self._ranks.in_step():
            while True:
                message, arrays = self._ranks.receive()
                call = decoder.decode(message)
                if isinstance(call, _Close):
                    return
                self._carry_out(call, arrays)

    def _carry_out(self, call: _Call, arrays: Mapping[str, Any]) -> None:
        match call:
            case _Prefill(start=start, end=end, key=key):
                if start == 0:
                    self._prompt = AssembledPrompt(**arrays) if key is None else self._find(key)
                assert self._prompt is not None
                self._runner.prefill(self._prompt, start=start, end=end)
            case _Join():
                assert self._prompt is not None
                self._runner.join()
                self._end_prompt(self._prompt.key)
            case _Discard(key=key):
                self._end_prompt(key)
            case _Keep(rows=rows):
                self._runner.keep(rows)
            case _Decode(tokens=tokens, positions=positions):
                self._runner.decode(tokens, positions=positions)

    def _find(self, key: Key) -> AssembledPrompt:
        if self._prompt_of is None:
            raise UsageError(f"nothing here knows the prompt of room {key[0]}, attempt {key[1]}")
        return replace(self._prompt_of(key), key=key)

    def _end_prompt(self, key: Key | None) -> None:
        """Let go of the prompt that is being read, if it is this one, and say so. None is a prompt without a key."""
        if self._prompt is not None and self._prompt.key == key:
            self._runner.discard(self._prompt)
            self._prompt = None
        if key is not None and self._on_read is not None:
            self._on_read(key)
