"""OpenAI's chat schema: what a request may say, and how answers are written.

Owns field names, ranges and JSON; it must not know servers, workers or models. Called by the apps: parsing
from worker threads, since a body may be megabytes; writing from the event loop, one small object at a time.

Sampling fields that we do not have (``top_k``, ``presence_penalty``, …) are ignored, as other compatible
servers do. A field that would change what the answer *is* (``n``, ``tools``, ``response_format``, …) is
refused by name.

Extensions. In: ``ignore_eos``, and ``return_token_ids``, which adds ``token_ids`` to every choice. Out: a
completion and the last chunk of a stream carry ``embedwire``, a :class:`Passage`; for a text-only prompt all
of it but ``ttft_ms`` is null.
"""

from __future__ import annotations

import re
import secrets
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, TypeVar

import msgspec
from msgspec import Meta, Struct

from embedwire.errors import InvalidRequestError
from embedwire.language.interface import FinishReason, SamplingParams
from embedwire.limits import RANKS_MAX

NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "audio": (),
    "function_call": ("none", "auto"),
    "functions": ([],),
    "guided_choice": (),
    "guided_grammar": (),
    "guided_json": (),
    "guided_regex": (),
    "logit_bias": ({},),
    "logprobs": (False,),
    "modalities": (["text"],),
    "n": (1,),
    "prediction": (),
    "prompt_logprobs": (0,),
    "response_format": ({"type": "text"},),
    "structured_outputs": (),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "top_logprobs": (0,),
    "web_search_options": (),
}
"""Fields that change what an answer is, and the values (beside null) with which they do not."""

DONE_EVENT = b"data: [DONE]\n\n"

Stop = Annotated[str, Meta(min_length=1, max_length=1024)]
Stops = Annotated[list[Stop], Meta(max_length=4)]
Positive = Annotated[int, Meta(ge=1, le=2**31 - 1)]


class TextPart(Struct, tag_field="type", tag="text"):
    text: str


class ImageUrl(Struct):
    url: Annotated[str, Meta(min_length=1)]


class ImagePart(Struct, tag_field="type", tag="image_url"):
    image_url: ImageUrl


class Message(Struct):
    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextPart | ImagePart]


class StreamOptions(Struct):
    include_usage: bool | None = None


class Options(Struct, kw_only=True):
    """Everything of a request but what it asks about."""

    model: str
    max_tokens: Positive | None = None
    max_completion_tokens: Positive | None = None
    temperature: Annotated[float, Meta(ge=0, le=2)] | None = None
    top_p: Annotated[float, Meta(gt=0, le=1)] | None = None
    seed: Annotated[int, Meta(ge=-(2**63), le=2**63 - 1)] | None = None
    stop: Stop | Stops | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    ignore_eos: bool | None = None
    return_token_ids: bool | None = None

    @property
    def include_usage(self) -> bool:
        return bool(self.stream_options and self.stream_options.include_usage)

    def sampling(self, default_max_tokens: int) -> SamplingParams:
        """As the engine wants it. Temperature and top_p default to 1, as OpenAI's do."""
        stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())
        return SamplingParams(
            max_tokens=self.max_completion_tokens or self.max_tokens or default_max_tokens,
            temperature=1.0 if self.temperature is None else self.temperature,
            top_p=1.0 if self.top_p is None else self.top_p,
            seed=self.seed,
            stop=stop,
            ignore_eos=bool(self.ignore_eos),
        )


class ChatRequest(Options, kw_only=True):
    """A chat as it came from the user."""

    messages: Annotated[list[Message], Meta(min_length=1)]


class RoomRef(Struct, kw_only=True):
    """Where the embedding of a prompt is to be had; ``control_addresses`` has one for each rank of the encoder; ``elapsed_ms`` is what
    the router took before it asked."""

    room: Annotated[int, Meta(ge=1, le=2**63 - 1)]
    attempt: Annotated[int, Meta(ge=0, le=2**31 - 1)]
    control_addresses: Annotated[tuple[str, ...], Meta(min_length=1, max_length=RANKS_MAX)]
    encoder: str
    elapsed_ms: float = 0.0


class RoomRequest(Options, kw_only=True):
    """What the router asks a language server for: the room's tokens are the prompt, so there are no
    messages."""

    embedwire_room: RoomRef


class Passage(Struct, kw_only=True):
    """How a prompt came to the language server: the answer's ``embedwire`` object. ``rounds`` are tokens a round; ``bytes`` are those of
    the embedding, ``wire_bytes`` what the wire carried for all ``ranks`` of the language server together. ``delivery`` is null where
    there is one rank."""

    room: int | None = None
    encoder: str | None = None
    transport: str | None = None
    total_tokens: int | None = None
    rounds: tuple[int, ...] | None = None
    bytes: int | None = None
    wire_bytes: int | None = None
    ranks: int | None = None
    delivery: str | None = None
    encode_ms: float | None = None
    transfer_ms: float | None = None
    ttft_ms: float | None = None


S = TypeVar("S")


def decode_object(body: bytes) -> dict[str, Any]:
    """The JSON object in ``body``. Raises InvalidRequestError."""
    try:
        return msgspec.json.decode(body, type=dict[str, Any])
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise InvalidRequestError(f"the body is not a JSON object: {error}", code="invalid_json") from None


def convert(raw: Mapping[str, Any], into: type[S]) -> S:
    """Check a decoded object against a schema. Raises InvalidRequestError that names the field at fault."""
    try:
        return msgspec.convert(raw, into)
    except msgspec.ValidationError as error:
        text, _, path = str(error).partition(" - at `$")
        raise InvalidRequestError(text, param=path.strip(".`") or _missing_field(text)) from None


def refuse_what_changes_meaning(raw: Mapping[str, Any]) -> None:
    """Raises InvalidRequestError for a field of NEUTRAL whose value asks for something that we do not do."""
    for name, neutral in NEUTRAL.items():
        value = raw.get(name)
        if value is not None and value not in neutral:
            raise InvalidRequestError(f"{name} is not supported", code="unsupported_parameter", param=name)


def parse_chat(raw: Mapping[str, Any]) -> ChatRequest:
    """Check a public request. Raises InvalidRequestError."""
    refuse_what_changes_meaning(raw)
    return convert(raw, ChatRequest)


def plain_messages(messages: Sequence[Message]) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """Messages whose image parts say only that there is one, and the URLs of these images by their place in
    the request (``messages[0].content[1].image_url``), in order."""
    plain, urls = [], {}
    for i, message in enumerate(messages):
        content: str | list[dict[str, str]]
        if isinstance(message.content, str):
            content = message.content
        else:
            content = []
            for j, part in enumerate(message.content):
                if isinstance(part, ImagePart):
                    urls[f"messages[{i}].content[{j}].image_url"] = part.image_url.url
                    content.append({"type": "image"})
                else:
                    content.append({"type": "text", "text": part.text})
        plain.append({"role": message.role, "content": content})
    return plain, urls


@dataclass(frozen=True, slots=True)
class AnswerWriter:
    """Writes one answer, whole or in chunks, under one id."""

    model: str
    with_token_ids: bool = False
    id: str = field(default_factory=lambda: f"chatcmpl-{secrets.token_hex(12)}")
    created: int = field(default_factory=lambda: int(time.time()))

    def completion(
        self,
        text: str,
        *,
        finish_reason: FinishReason,
        token_ids: Sequence[int],
        usage: Mapping[str, int],
        passage: Passage,
    ) -> bytes:
        """The whole answer as JSON."""
        message = {"role": "assistant", "content": text, "refusal": None}
        choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": finish_reason}
        return msgspec.json.encode(
            self._head("chat.completion", self._with_ids(choice, token_ids))
            | {"usage": usage, "embedwire": passage}
        )

    def chunk(
        self,
        delta: Mapping[str, str],
        *,
        finish_reason: FinishReason | None = None,
        token_ids: Sequence[int] = (),
        **extra: Any,
    ) -> bytes:
        """One event of a stream; ``extra`` stands beside the choice."""
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish_reason}
        return event(self._head("chat.completion.chunk", self._with_ids(choice, token_ids)) | extra)

    def usage_chunk(self, usage: Mapping[str, int], passage: Passage) -> bytes:
        """The event without a choice that ``include_usage`` asks for."""
        return event(self._head("chat.completion.chunk") | {"usage": usage, "embedwire": passage})

    def _with_ids(self, choice: dict[str, Any], token_ids: Sequence[int]) -> dict[str, Any]:
        return choice | {"token_ids": token_ids} if self.with_token_ids else choice

    def _head(self, kind: str, *choices: dict[str, Any]) -> dict[str, Any]:
        return {
            "id": self.id,
            "object": kind,
            "created": self.created,
            "model": self.model,
            "choices": choices,
        }


def usage_of(prompt_tokens: int, completion_tokens: int) -> dict[str, int]:
    """OpenAI's usage object."""
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
    }


def event(data: Any) -> bytes:
    """A server-sent event."""
    return b"data: " + msgspec.json.encode(data) + b"\n\n"


def read_events(parts: Iterable[bytes]) -> Iterator[bytes]:
    """The data of each event of such a stream but for the last, ``[DONE]``. Lines are ended by line feeds alone: JSON may hold what Python
    and httpx also take for the end of a line."""
    tail = b""
    for part in parts:
        *lines, tail = (tail + part).split(b"\n")
        for line in lines:
            name, _, data = line.removesuffix(b"\r").partition(b": ")
            if name == b"data" and data != b"[DONE]":
                yield data


def model_list(models: Sequence[str]) -> dict[str, Any]:
    """The answer to GET /v1/models."""
    return {
        "object": "list",
        "data": [{"id": m, "object": "model", "created": 0, "owned_by": "embedwire"} for m in models],
    }


def _missing_field(text: str) -> str | None:
    found = re.search(r"missing required field `(\w+)`", text)
    return found.group(1) if found else None
