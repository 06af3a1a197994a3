"""Turns the token ids of one answer into text, piece by piece.

Owns the way from ids to bytes to characters, and the text held back for stop strings. A character leaves
only when all its bytes are there. A token costs its own bytes, however long the answer, as nothing is decoded
twice.
Knows no model and no thread; called by ``generation`` on the engine's thread.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterator, Sequence
from typing import Any

from tokenizers import Tokenizer

from embedwire.errors import ConfigurationError

_BYTE_TOKEN = re.compile(r"<0x([0-9A-F]{2})>")


class Vocabulary:
    """The bytes of every token of one tokenizer.

    It reads byte-level BPE (Qwen, Llama 3) and SentencePiece with byte fallback (Llama 2).
    Raises ConfigurationError for another kind of decoder.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._token_of = tokenizer.id_to_token
        added = tokenizer.get_added_tokens_decoder()
        self._special = {token_id for token_id, token in added.items() if token.special}
        self._known: dict[int, bytes] = {}
        decoder = tokenizer.decoder
        steps = list(_steps(json.loads(decoder.__getstate__()))) if decoder is not None else []
        kinds = [step["type"] for step in steps]
        if "ByteLevel" in kinds:
            self._to_bytes = _from_byte_level
        elif "ByteFallback" in kinds:
            self._to_bytes = _from_sentence_piece
        else:
            raise ConfigurationError(f"tokenizer decoder {kinds} is neither ByteLevel nor ByteFallback")
        self.strips_first_space = any(step["type"] == "Strip" and step.get("start") for step in steps)
        """SentencePiece writes a space before the first word, which is not part of the text."""

    def token_bytes(self, token_id: int) -> bytes:
        """The token's bytes, not always whole characters. A special token has none, nor has an id that the
        tokenizer does not know (models pad their vocabulary)."""
        known = self._known.get(token_id)
        if known is None:
            token = "" if token_id in self._special else self._token_of(token_id) or ""
            known = self._known[token_id] = self._to_bytes(token)
        return known


class Detokenizer:
    """The text of one answer. Bytes that are no UTF-8 become U+FFFD, as in ``tokenizer.decode``."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        self._vocabulary = vocabulary
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._strips = vocabulary.strips_first_space

    def push(self, token_id: int) -> str:
        """Take one token; returns the characters that are whole now, often none."""
        return self._stripped(self._decoder.decode(self._vocabulary.token_bytes(token_id)))

    def flush(self) -> str:
        """What is left at the end: nothing, or U+FFFD for a character that stayed in pieces."""
        return self._stripped(self._decoder.decode(b"", final=True))

    def _stripped(self, text: str) -> str:
        if self._strips and text:
            self._strips = False
            return text.removeprefix(" ")
        return text


class StopStrings:
    """Ends a text at the stop string that is complete first; of those that end together, the longest.

    Text is held back while it may still turn out to be part of a stop. So what is let through depends on the
    text alone, never on how it was cut into tokens.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._held = ""

    def push(self, text: str) -> tuple[str, bool]:
        """Take text; returns what may be shown now, and whether a stop was found, which is the end."""
        text = self._held + text
        found = [(start + len(stop), start) for stop in self._stops if (start := text.find(stop)) >= 0]
        if found:
            self._held = ""
            return text[: min(found)[1]], True
        keep = max((_overlap(text, stop) for stop in self._stops), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep], False

    def flush(self) -> str:
        """What was held back, when the answer ended for another reason: it is no stop after all."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of ``text`` with which ``stop`` begins."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)


def _steps(decoder: dict[str, Any]) -> Iterator[dict[str, Any]]:
    for step in decoder.get("decoders", (decoder,)):
        yield from _steps(step) if "decoders" in step else (step,)


def _byte_alphabet() -> dict[str, int]:
    """The byte that each character of byte-level BPE stands for, as GPT-2 defined it: a printable Latin-1
    character for itself, those from U+0100 on for the bytes that are left, in order."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = (byte for byte in range(256) if byte not in printable)
    return {chr(byte): byte for byte in printable} | {chr(256 + n): byte for n, byte in enumerate(others)}


_BYTE_OF = _byte_alphabet()


def _from_byte_level(token: str) -> bytes:
    try:
        return bytes(_BYTE_OF[character] for character in token)
    except KeyError:  # an added token, which is written as it is
        return token.encode()


def _from_sentence_piece(token: str) -> bytes:
    if match := _BYTE_TOKEN.fullmatch(token):
        return bytes.fromhex(match[1])
    return token.replace("▁", " ").encode()
