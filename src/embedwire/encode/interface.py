"""What the encode floor asks of an encoder engine. It knows no model library; engines implement it.

Called by: ``embedwire.encode`` (from its worker threads) and ``embedwire.serve``.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from embedwire.memory.layout import Layout


@dataclass(frozen=True, slots=True)
class ChatPrompt:
    """A chat as it came from the user, its media fetched but not decoded.

    ``messages`` is OpenAI's list, except that every image part is ``{"type": "image"}``; ``media`` holds
    the encoded bytes (PNG, JPEG, …) of those parts, in the order in which they stand in the messages.
    """

    messages: Sequence[Mapping[str, Any]]
    media: Sequence[bytes] = ()


@dataclass(frozen=True, slots=True)
class PreparedPrompt:
    """A prompt whose length is known although no tower has run yet.

    ``total_tokens`` counts rows of the room; ``mrope_position_delta`` is 0 for models without mrope;
    ``content_hash`` names the content (equal bytes and settings give equal hashes); ``inputs`` belongs to the engine. ``key``
    (room, attempt) names the prompt to other ranks of the encoder; the engine hands it on.
    """

    total_tokens: int
    mrope_position_delta: int
    content_hash: bytes
    inputs: Any = field(repr=False, default=None)
    key: tuple[int, int] | None = None


class EncoderEngine(Protocol):
    """The encode half of a model. Methods may be called from several threads unless stated otherwise."""

    model_name: str
    layout: Layout
    max_tokens: int
    """The model's context, in tokens."""

    def prepare(self, prompt: ChatPrompt) -> PreparedPrompt:
        """Decode, resize and tokenize; runs no tower.

        Raises :class:`~embedwire.errors.InvalidRequestError` with a code: ``invalid_image`` (broken, or over the
        pixel limit), ``context_length_exceeded`` (more than ``max_tokens``), ``invalid_messages``.
        """
        ...

    def encode(self, batch: Sequence[PreparedPrompt]) -> Iterable[Mapping[str, np.ndarray]]:
        """Run the tower. One mapping a prompt, in order: layout field name to an array of shape (total_tokens, *field.shape)
        in the field's numpy dtype, C-contiguous, owned by the caller. Each may be made when it is asked for, so that it can be sent while
        the next is made. Called, and read from, by one thread at a time."""
        ...
