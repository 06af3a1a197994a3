"""A chat request for vLLM servers: which media it names, and what each side is sent.

Owns the parts of a message that name media; it must not know workers. Everything else of a request is vLLM's to read,
and is passed on as it came. Pure; parsing runs on worker threads, since a body may be megabytes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
import pybase64

from embedwire.errors import InvalidRequestError
from embedwire.serve.front import object_without

KINDS = {"image_url": "image", "video_url": "video", "audio_url": "audio", "input_audio": "audio"}
"""Fields of a message's part that name media, and their modality."""
CACHE_NAMES = frozenset({"image_embeds", "video_embeds", "audio_embeds", "prompt_embeds", "image_pil"})
"""Parts that stand for what a server has cached, or would unpickle. They are not for users to send."""
MEDIA_OPTIONS = ("mm_processor_kwargs", "media_io_kwargs")
"""Fields of a request that change what becomes of its media: both sides get them, so that both hash the same."""
TRANSFER = "ec_transfer_params"


class Head(msgspec.Struct):
    """What a router has to know of a request."""

    model: str
    messages: list[dict[str, Any]]
    stream: bool | None = None


@dataclass(frozen=True, slots=True)
class MediaPart:
    """Part ``index`` of message ``message``. ``url`` is where its bytes are, as a URL."""

    message: int
    index: int
    kind: str
    part: Mapping[str, Any]
    url: str

    @property
    def place(self) -> str:
        """Where it stands in the request, for errors."""
        return f"messages[{self.message}].content[{self.index}].{self.kind}"

    def with_url(self, url: str) -> dict[str, Any]:
        """The part with its bytes at ``url``, every other option as it was, but without the user's ``uuid``: that would become the
        name of a cache entry. The router gives each item a name of its own."""
        made = {name: value for name, value in self.part.items() if name != "uuid"}
        value = made[self.kind]
        if self.kind != "input_audio":
            made[self.kind] = {**value, "url": url} if isinstance(value, dict) else url
        return made


@dataclass(frozen=True, slots=True)
class Asked:
    """A request as it came, and the media in it."""

    raw: Mapping[str, Any]
    model: str
    stream: bool
    media: tuple[MediaPart, ...]


@dataclass(frozen=True, slots=True)
class Item:
    """A media item with its bytes. ``key`` is the SHA-256 of all that determines its embedding: the bytes, the modality, and the options
    of the part and of the request. Items of equal ``key`` have the same embedding, wherever they came from."""

    key: bytes
    model: str
    modality: str
    size_bytes: int
    part: Mapping[str, Any]
    options: Mapping[str, Any]

    @property
    def uuid(self) -> str:
        """Its name on both servers: 64 hexadecimal digits. Without one vLLM chooses the name; where both of its caches are off that is a
        counter, which starts over with every process."""
        return self.key.hex()

    def encode_body(self) -> dict[str, Any]:
        """The request to an encoder."""
        messages = [{"role": "user", "content": [self.part]}]
        return {
            "model": self.model,
            "messages": messages,
            "max_tokens": 1,
            "stream": False,
            **self.options,
        }


def parse(body: bytes) -> Asked:
    """Raises InvalidRequestError."""
    raw = object_without(body, TRANSFER)
    if isinstance(arguments := raw.get("vllm_xargs"), dict) and TRANSFER in arguments:
        raise InvalidRequestError(f"{TRANSFER} is for routers to set", param="vllm_xargs")
    try:
        head = msgspec.convert(raw, Head)
    except msgspec.ValidationError as error:
        raise InvalidRequestError(str(error)) from None
    return Asked(raw, head.model, bool(head.stream), tuple(_media(head.messages)))


def _media(messages: Sequence[Mapping[str, Any]]) -> Iterator[MediaPart]:
    for i, message in enumerate(messages):
        content = message.get("content")
        for j, part in enumerate(content if isinstance(content, list) else ()):
            if isinstance(part, dict) and (kind := _kind(part, f"messages[{i}].content[{j}]")):
                place = f"messages[{i}].content[{j}].{kind}"
                yield MediaPart(i, j, kind, part, _url(kind, part[kind], place))


def _kind(part: Mapping[str, Any], place: str) -> str | None:
    """Which field names the media. vLLM looks at some of these whatever the part's type is, so no part may slip through with
    a URL that a server would fetch by itself."""
    named = [kind for kind in KINDS if kind in part]
    if CACHE_NAMES.intersection(part) or part.get("type") in CACHE_NAMES:
        raise InvalidRequestError(f"{place}: embeddings are for routers to send", param=place)
    if not named:
        if part.get("type") in KINDS:
            raise InvalidRequestError(f"{place} has no {part['type']}", param=place)
        return None
    kind = named[0]
    types = (None, kind, "input_image") if kind == "image_url" else (None, kind)
    if len(named) > 1 or part.get("type") not in types:
        raise InvalidRequestError(f"{place} is of another type than its fields", param=place)
    return kind


def _url(kind: str, value: Any, place: str) -> str:
    if kind == "input_audio":
        if isinstance(value, dict) and isinstance(value.get("data"), str):
            return f"data:audio/{value.get('format', '')};base64,{value['data']}"
    else:
        url = value.get("url") if isinstance(value, dict) else value
        if isinstance(url, str) and url:
            return url
    raise InvalidRequestError(f"{place} names no media", param=place)


def items_of(asked: Asked, contents: Sequence[bytes]) -> list[Item]:
    """The items of a request, in order, from the bytes of each. On a worker thread: it hashes and encodes all of them."""
    options = {name: asked.raw[name] for name in MEDIA_OPTIONS if name in asked.raw}
    return [
        _item(asked.model, media, content, options)
        for media, content in zip(asked.media, contents, strict=True)
    ]


def _item(model: str, media: MediaPart, content: bytes, options: Mapping[str, Any]) -> Item:
    url = media.url
    if url[:5].lower() != "data:":
        url = "data:application/octet-stream;base64," + pybase64.b64encode_as_string(content)
    part = media.with_url(url)
    told = media.with_url(url.partition(",")[0])
    if media.kind == "input_audio":
        told = {**told, media.kind: {k: v for k, v in told[media.kind].items() if k != "data"}}
    digest = hashlib.sha256(msgspec.json.encode([model, told, options], order="deterministic"))
    digest.update(content)
    named = {**part, "uuid": digest.hexdigest()}
    return Item(digest.digest(), model, KINDS[media.kind], len(content), named, options)


def language_body(
    asked: Asked, parts: Sequence[Mapping[str, Any]], transfer: Mapping[str, Any] | None
) -> dict[str, Any]:
    """The request to a language server: as it came, with ``parts`` in the places of its media."""
    body = dict(asked.raw)
    if parts:
        messages = list(body["messages"])
        for media, part in zip(asked.media, parts, strict=True):
            content = list(messages[media.message]["content"])
            content[media.index] = part
            messages[media.message] = {**messages[media.message], "content": content}
        body["messages"] = messages
    if transfer is not None:
        body[TRANSFER] = {"embedwire": transfer}
    return body
