"""What the language floor hands to a language engine, and what it gets back. It knows no model library.

Called by: ``embedwire.language`` and ``embedwire.serve``; implemented by ``embedwire.engines``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import numpy as np

from embedwire.memory.layout import Layout
from embedwire.protocol.topology import Delivery

FinishReason = Literal["stop", "length", "error", "cancelled"]


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How to choose tokens. ``temperature`` 0 is greedy; ``top_p`` in (0, 1]; ``stop`` are strings that end the
    answer and are not part of it; ``max_tokens`` counts generated tokens."""

    max_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    ignore_eos: bool = False


@dataclass(frozen=True, slots=True)
class AssembledPrompt:
    """A prompt as the language model reads it. Arrays are of T tokens and owned by whoever holds this object.

    ``fill_ids`` (T,) int32. ``input_embeddings`` (T, hidden) in the model's dtype, or None for a text-only prompt, which the engine embeds
    itself. ``mrope_positions`` (T, 3) int32 or None where the model has none; ``mrope_position_delta`` is added to a
    decoded token's index to get its position. ``deepstack_embeddings`` (T, levels, hidden), zero at text tokens, or None. ``key`` (room,
    attempt) names the prompt to ranks that have arrays of it themselves; None when they have not.
    """

    fill_ids: np.ndarray
    input_embeddings: np.ndarray | None = None
    mrope_positions: np.ndarray | None = None
    mrope_position_delta: int = 0
    deepstack_embeddings: np.ndarray | None = None
    key: tuple[int, int] | None = None


@dataclass(frozen=True, slots=True)
class Delta:
    """One step of an answer. ``finish_reason`` is set in the last one only; ``error`` says why when it is ``"error"``."""

    token_ids: tuple[int, ...] = ()
    text: str = ""
    finish_reason: FinishReason | None = None
    error: str | None = None


class Generation(Protocol):
    """A running answer."""

    def cancel(self) -> None:
        """Stop it; a last delta with ``finish_reason="cancelled"`` follows. Harmless when it has ended."""
        ...


class LanguageEngine(Protocol):
    """The language half of a model, with its own thread that batches what was submitted."""

    model_name: str
    layout: Layout
    max_tokens: int
    """The model's context, in tokens: prompt and answer together."""

    def tokenize(self, messages: Sequence[Mapping[str, Any]]) -> np.ndarray:
        """Token ids (T,) int32 of a chat without media. Raises InvalidRequestError. Thread-safe."""
        ...

    def submit(
        self, prompt: AssembledPrompt, sampling: SamplingParams, *, on_delta: Callable[[Delta], None]
    ) -> Generation:
        """Queue a prompt. ``on_delta`` is called on the engine's thread and must not block.

        Raises OverloadedError when its bounded queue is full, InvalidRequestError when the prompt is over ``max_tokens``.
        """
        ...

    def close(self) -> None:
        """End the thread; what runs is cancelled."""
        ...


@dataclass(frozen=True, slots=True)
class TransferReport:
    """What the transfer of one room was, for the answer's ``embedwire`` object. Times in milliseconds. ``bytes`` came to this rank;
    ``wire_bytes`` to all ``ranks`` together, by ``delivery`` (None for a single rank)."""

    room: int
    transport: str
    total_tokens: int
    rounds: tuple[int, ...]
    bytes: int
    encode_ms: float
    transfer_ms: float
    wire_bytes: int
    ranks: int = 1
    delivery: Delivery | None = None
    extra: Mapping[str, Any] = field(default_factory=dict)
