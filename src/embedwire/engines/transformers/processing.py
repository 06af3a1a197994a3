"""Turns a chat into what a model reads: token ids with its placeholders expanded, and pixels.

Owns: the chat template, the tokenizer, the image processor, and that no text of a user is ever taken for a
special token. Must not know: weights, rooms. Everything here may be called from several threads at once:
tokenizers are used through calls that leave them as they are, never through those that set padding or
truncation first.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from tokenizers import Tokenizer
from transformers import AutoImageProcessor, AutoTokenizer

from embedwire.encode.interface import ChatPrompt
from embedwire.engines.transformers.families import family_of
from embedwire.engines.transformers.images import MAX_IMAGE_PIXELS, decode_image, invalid_image
from embedwire.errors import ConfigurationError, InvalidRequestError

_ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant", "tool": "tool"}
_PRIVATE_USE = range(0xE000, 0xF8FF)


@dataclass(frozen=True, slots=True)
class Processed:
    """A prompt of T tokens, ready for its tower. ``ids`` is (T,) int32; ``pixels`` holds float32 and int64
    arrays by the names that the tower takes them by, empty for text alone."""

    ids: np.ndarray
    content_hash: bytes
    pixels: Mapping[str, np.ndarray] = field(repr=False, default_factory=dict)


def invalid_messages(message: str) -> InvalidRequestError:
    """The error for a chat that can not be served."""
    return InvalidRequestError(message, code="invalid_messages", param="messages")


def check_length(tokens: int, max_tokens: int) -> None:
    """Raise InvalidRequestError (``context_length_exceeded``) when a prompt has more than ``max_tokens``
    tokens."""
    if tokens > max_tokens:
        raise InvalidRequestError(
            f"the prompt has {tokens} tokens or more, and the model's context is {max_tokens} tokens",
            code="context_length_exceeded",
            param="messages",
        )


class ChatTokenizer:
    """The chat template and the tokenizer of a checkpoint."""

    def __init__(self, path: Path) -> None:
        try:
            self._tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True)
        except (OSError, ValueError) as error:
            raise ConfigurationError(f"no usable tokenizer in {path}: {error}") from error
        if not self._tokenizer.is_fast:
            raise ConfigurationError(
                f"{path} has a tokenizer without tokenizer.json, which is not thread-safe"
            )
        self._template = _chat_template(path, self._tokenizer)
        self._refuse_plain_template(path)
        self._backend: Tokenizer = self._tokenizer.backend_tokenizer
        self._backend.no_padding()
        self._backend.no_truncation()
        # A second one that reads special tokens as plain text; a copy, because a tokenizer keeps the setting.
        self._literal = Tokenizer.from_str(self._backend.to_str())
        self._literal.encode_special_tokens = True
        added = self._backend.get_added_tokens_decoder().items()
        self._special_ids = {token.content: id_ for id_, token in added if token.special}
        longest_first = sorted(self._special_ids, key=len, reverse=True)
        self._special = re.compile("|".join(map(re.escape, longest_first)) or "(?!)")

    def _refuse_plain_template(self, path: Path) -> None:
        """That of a model for text takes a string: it would write a list of parts as Python or JSON does, leave it out, or fail."""
        probe = "a probe"

        def is_said(content: Any) -> bool | None:
            """None for a chat that the template refuses."""
            try:
                text = self._render([{"role": "user", "content": content}])
            except (jinja2.TemplateError, TypeError):
                return None
            return probe in text and f"'{probe}'" not in text and f'"{probe}"' not in text

        if not is_said([{"type": "text", "text": probe}]) and is_said(probe):
            raise ConfigurationError(
                f"the chat template takes no parts (text, image) in a message, only strings: {path}"
            )

    def _render(self, chat: Sequence[Mapping[str, Any]]) -> str:
        text: str = self._tokenizer.apply_chat_template(
            chat, chat_template=self._template, tokenize=False, add_generation_prompt=True
        )
        return text

    @property
    def backend(self) -> Tokenizer:
        """The tokenizer itself, to decode with."""
        return self._backend

    def encode(self, messages: Sequence[Mapping[str, Any]]) -> np.ndarray:
        """Token ids (T,) int32 of a chat, up to where the assistant begins to speak; one placeholder an
        image.

        Special tokens come from the chat template only: where a user wrote one, it is tokenized as the plain
        text it is. Raises InvalidRequestError (``invalid_messages``).
        """
        chat = [_checked(message) for message in messages]
        if not chat:
            raise invalid_messages("messages is empty")
        mark = self._shield(chat)
        try:
            text = self._render(chat)
        except (jinja2.TemplateError, TypeError) as error:
            raise invalid_messages(f"the model's chat template refuses these messages: {error}") from error
        if not _is_unicode(text):
            raise invalid_messages("messages hold half a surrogate pair, which is no character")
        return np.array(self._encode_text(text, mark), np.int32)

    def _shield(self, chat: Sequence[dict[str, Any]]) -> str:
        """Break every special token that a user wrote with a mark that no user wrote, and return the mark;
        "" when there was none to break."""
        parts = [part for message in chat for part in message["content"] if part["type"] == "text"]
        if not any(self._special.search(part["text"]) for part in parts):
            return ""
        used = set().union(*(part["text"] for part in parts))
        mark = next((chr(code) for code in _PRIVATE_USE if chr(code) not in used), None)
        if mark is None:
            raise invalid_messages("messages hold special tokens and every private-use character")
        for part in parts:
            part["text"] = self._special.sub(lambda found: found[0][0] + mark + found[0][1:], part["text"])
        return mark

    def _encode_text(self, text: str, mark: str) -> list[int]:
        begin = self._tokenizer.bos_token
        # Some templates write the first token, some leave it to the tokenizer.
        add = not (begin and text.startswith(begin))
        if not mark:
            ids: list[int] = self._backend.encode(text, add_special_tokens=add).ids
            return ids
        ids = list(self._backend.encode("", add_special_tokens=add).ids)
        end = 0
        for special in self._special.finditer(text):
            ids += self._encode_literal(text[end : special.start()], mark)
            ids.append(self._special_ids[special[0]])
            end = special.end()
        return ids + self._encode_literal(text[end:], mark)

    def _encode_literal(self, text: str, mark: str) -> list[int]:
        ids: list[int] = self._literal.encode(text.replace(mark, ""), add_special_tokens=False).ids
        return ids


class PromptProcessor:
    """Makes prompts for one model: its :class:`ChatTokenizer` and its image processor."""

    def __init__(
        self, path: Path, config: Any, *, max_tokens: int, max_image_pixels: int = MAX_IMAGE_PIXELS
    ) -> None:
        self.chat = ChatTokenizer(path)
        try:
            self._images = AutoImageProcessor.from_pretrained(path, local_files_only=True, backend="pil")
        except (OSError, ValueError) as error:
            raise ConfigurationError(f"no usable image processor in {path}: {error}") from error
        self._settings = json.dumps(self._images.to_dict(), sort_keys=True, default=str).encode()
        self._config = config
        self._family = family_of(config)
        self._max_tokens = max_tokens
        self._max_image_pixels = max_image_pixels

    def process(self, prompt: ChatPrompt) -> Processed:
        """Tokenize a chat and read its pictures.

        Raises InvalidRequestError: ``invalid_messages``, ``invalid_image``, or ``context_length_exceeded`` as
        soon as the prompt is known to be too long, before the pictures that are left have been decoded.
        """
        ids = self.chat.encode(prompt.messages)
        places = np.flatnonzero(ids == self._config.image_token_id)
        if len(places) != len(prompt.media):
            raise invalid_messages(
                f"the messages make {len(places)} places for images, and {len(prompt.media)} images came"
            )
        total = len(ids)
        check_length(total, self._max_tokens)
        repeats = np.ones(len(ids), np.int64)
        pixels: list[Mapping[str, np.ndarray]] = []
        for place, data in zip(places, prompt.media, strict=True):
            pixels.append(self._read(data))
            (repeats[place],) = self._family.count_rows(self._config, pixels[-1])
            total += int(repeats[place]) - 1
            check_length(total, self._max_tokens)
        ids = np.repeat(ids, repeats)
        return Processed(ids, self._hash(ids, prompt.media), _joined(pixels))

    def _read(self, data: bytes) -> Mapping[str, np.ndarray]:
        image = decode_image(data, max_pixels=self._max_image_pixels)
        try:
            return dict(self._images(images=[image], return_tensors="np"))
        except ValueError as error:
            raise invalid_image(f"an image of {image.width} x {image.height} pixels: {error}") from error

    def _hash(self, ids: np.ndarray, media: Sequence[bytes]) -> bytes:
        digest = hashlib.blake2b(digest_size=32)
        for piece in (self._settings, ids.tobytes(), *media):
            digest.update(len(piece).to_bytes(8, "little"))
            digest.update(piece)
        return digest.digest()


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _joined(pixels: Sequence[Mapping[str, np.ndarray]]) -> Mapping[str, np.ndarray]:
    if len(pixels) < 2:
        return pixels[0] if pixels else {}
    return {name: np.concatenate([one[name] for one in pixels]) for name in pixels[0]}


def _checked(message: Mapping[str, Any]) -> dict[str, Any]:
    """A message as chat templates take it; runs of text are joined, so that no token can hide across two."""
    if not isinstance(message, Mapping):
        raise invalid_messages(f"a message is a {type(message).__name__}, not an object")
    role = _ROLES.get(str(message.get("role")))
    if role is None:
        raise invalid_messages(f"role {message.get('role')!r} is not one of {', '.join(_ROLES)}")
    content = message.get("content")
    if content is None or isinstance(content, str):
        content = [{"type": "text", "text": content}] if content else []
    if not isinstance(content, list | tuple):
        raise invalid_messages(f"content is a {type(content).__name__}, not a string or a list of parts")
    parts: list[dict[str, str]] = []
    for part in map(_checked_part, content):
        if parts and parts[-1]["type"] == part["type"] == "text":
            parts[-1]["text"] += part["text"]
        else:
            parts.append(part)
    return {"role": role, "content": parts}


def _checked_part(part: Any) -> dict[str, str]:
    match part:
        case {"type": "image"}:
            return {"type": "image"}
        case {"type": "text", "text": str(text)}:
            return {"type": "text", "text": text}
        case {"type": kind}:
            raise invalid_messages(f"a part of type {kind!r} can not be served, or lacks its text")
    raise invalid_messages("a part of a message is no object with a type")


def _chat_template(path: Path, tokenizer: Any) -> str:
    """The template of the whole model where the checkpoint has one, as older ones keep it, else the
    tokenizer's."""
    older = path / "chat_template.json"
    if older.exists() and not (path / "chat_template.jinja").exists():
        return str(json.loads(older.read_text())["chat_template"])
    if not isinstance(tokenizer.chat_template, str):
        raise ConfigurationError(f"{path} has no chat template")
    return tokenizer.chat_template
