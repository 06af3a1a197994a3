"""Servers that behave like vLLM 0.32 where the router meets it: health, models, completions with ``ec_transfer_params``."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import queue
import threading
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from typing import Any

import httpx
import msgspec
import pytest
from fastapi import FastAPI, Response
from starlette.requests import Request
from starlette.responses import StreamingResponse

from embedwire.serve.media import MediaLimits
from embedwire.serve.run import AppServer
from embedwire.serve.vllm.app import VllmSettings, vllm_app
from embedwire.serve.vllm.dispatch import VllmLimits

MODEL = "tiny"
WAIT_S = 20.0
KINDS = ("image_url", "video_url", "audio_url", "input_audio")


def media_of(body: dict[str, Any]) -> list[dict[str, Any]]:
    return [
        part
        for message in body["messages"]
        if isinstance(message["content"], list)
        for part in message["content"]
        if any(kind in part for kind in KINDS) or part["type"].endswith("_embeds")
    ]


def options_of(body: dict[str, Any]) -> bytes:
    options = [body.get("mm_processor_kwargs"), body.get("media_io_kwargs")]
    return msgspec.json.encode(options) if any(options) else b""


def seen(part: dict[str, Any], body: dict[str, Any]) -> str:
    """What the server makes of a part: of its bytes and options; where it gets no bytes, the name that it is given."""
    kind = next((kind for kind in KINDS if kind in part), None)
    if kind is None:
        return str(part["uuid"])
    content = part[kind]["data"] if kind == "input_audio" else part[kind]["url"].partition(",")[2]
    return hashlib.blake2b(base64.b64decode(content) + options_of(body)).hexdigest()[:32]


def identifier(part: dict[str, Any], body: dict[str, Any]) -> str:
    """As vLLM: a uuid stands for itself, unless the request has options, which are folded in."""
    if "uuid" in part and (options := options_of(body)):
        return hashlib.blake2b(str(part["uuid"]).encode() + options).hexdigest()[:64]
    return str(part.get("uuid", seen(part, body)))


def error(message: str = "Internal server error", code: int = 500) -> dict[str, Any]:
    return {"error": {"message": message, "type": "InternalServerError", "param": None, "code": code}}


def failure(code: int, message: str) -> Response:
    return Response(msgspec.json.encode(error(message, code)), code, media_type="application/json")


async def held(request: Request, gate: threading.Event) -> bool:
    """Until the gate opens (True), or the client is gone (False)."""
    opened = asyncio.ensure_future(asyncio.to_thread(gate.wait, WAIT_S))
    gone = asyncio.ensure_future(request.receive())
    await asyncio.wait({opened, gone}, return_when=asyncio.FIRST_COMPLETED)
    return not gone.done()


def common_app() -> FastAPI:
    app = FastAPI()

    @app.get("/health")
    async def health() -> Response:
        return Response()

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [{"id": MODEL, "object": "model"}, {"id": "adapter"}]}

    return app


@dataclass
class EncoderDouble:
    """A producer. ``fails`` is (status, words); ``gate`` holds answers up; ``tokens`` is what each item has."""

    number: int
    fails: tuple[int, str] | None = None
    gate: threading.Event | None = None
    tokens: int = 100
    bodies: list[dict[str, Any]] = field(default_factory=list)
    entered: queue.Queue[str] = field(default_factory=queue.Queue)
    disconnected: queue.Queue[str] = field(default_factory=queue.Queue)

    @property
    def address(self) -> str:
        return f"tcp://127.0.0.1:{40001 + self.number}"

    def app(self) -> FastAPI:
        app = common_app()

        @app.post("/v1/chat/completions")
        async def chat(request: Request) -> Any:
            body = await request.json()
            self.bodies.append(body)
            (part,) = media_of(body)
            name = seen(part, body)
            self.entered.put(name)
            if self.gate and not await held(request, self.gate):
                self.disconnected.put(name)
                return Response(status_code=499)
            if self.fails:
                return failure(*self.fails)
            entry = {
                "item_indices": [0],
                "metadata": {"image_grid_thw": [1, 2, 2]},
                "addresses": [self.address],
                "tokens": self.tokens,
            }
            return {"id": "x", "choices": [], "ec_transfer_params": {identifier(part, body): entry}}

        return app


@dataclass
class LanguageDouble:
    """A consumer. Each request takes one of ``ends``, (cause, detail), which is reported to the router before it fails; an empty cause
    reports nothing. ``gate`` holds the stream up after its first token, or the answer. A stream fails behind its role chunk, as vLLM's
    do, or, with ``fails_late``, behind its first token."""

    ends: list[tuple[str, str]] = field(default_factory=list)
    fails_late: bool = False
    fails_texts: bool = False
    fails: tuple[int, str] | None = None
    gate: threading.Event | None = None
    router: list[str] = field(default_factory=list)
    bodies: list[dict[str, Any]] = field(default_factory=list)
    entered: queue.Queue[dict[str, Any]] = field(default_factory=queue.Queue)
    disconnected: queue.Queue[int] = field(default_factory=queue.Queue)

    def app(self) -> FastAPI:
        app = common_app()

        @app.post("/v1/chat/completions")
        async def chat(request: Request) -> Any:
            body = await request.json()
            self.bodies.append(body)
            self.entered.put(body)
            failed = await self._fail(body)
            if body.get("stream"):
                return StreamingResponse(self._events(body, failed), media_type="text/event-stream")
            if self.gate and not await held(request, self.gate):
                self.disconnected.put(1)
                return Response(status_code=499)
            if self.fails:
                return failure(*self.fails)
            if failed:
                return failure(500, "Internal server error")
            message = {"role": "assistant", "content": self.text(body)}
            return {
                "id": "c",
                "choices": [{"index": 0, "message": message, "finish_reason": "stop"}],
                "vllm_field": 1.5,
            }

        return app

    @staticmethod
    def text(body: dict[str, Any]) -> str:
        return "saw " + " ".join(seen(part, body) for part in media_of(body))

    async def _fail(self, body: dict[str, Any]) -> bool:
        if not self.ends or "ec_transfer_params" not in body:
            return self.fails_texts
        cause, detail = self.ends.pop(0)
        told = body["ec_transfer_params"]["embedwire"]
        name, entry = next(iter(told["items"].items()))
        end = {"ticket": told["ticket"], "cause": cause, "detail": detail, "identifier": name}
        if cause:
            async with httpx.AsyncClient() as client:
                url = f"{self.router[0]}/vllm/ends"
                answer = await client.post(url, json=end | {"address": entry["addresses"][0]})
                assert answer.status_code == 204
        return True

    async def _events(self, body: dict[str, Any], failed: bool) -> AsyncIterator[bytes]:
        def chunk(**choice: Any) -> bytes:
            data = {"id": "c", "object": "chat.completion.chunk", "choices": [{"index": 0, **choice}]}
            return b"data: " + msgspec.json.encode(data) + b"\n\n"

        def failure() -> bytes:
            code, words = self.fails or (500, "Internal server error")
            return b"data: " + msgspec.json.encode(error(words, code)) + b"\n\ndata: [DONE]\n\n"

        yield chunk(delta={"role": "assistant", "content": ""}, finish_reason=None)
        if failed and not self.fails_late:
            yield failure()
            return
        text = self.text(body)
        yield chunk(delta={"content": text[:4]}, finish_reason=None)
        if self.gate:
            try:
                await asyncio.to_thread(self.gate.wait, WAIT_S)
            except asyncio.CancelledError:
                self.disconnected.put(1)
                raise
        if failed:
            yield failure()
            return
        yield chunk(delta={"content": text[4:]}, finish_reason=None)
        yield chunk(delta={}, finish_reason="stop")
        yield b"data: [DONE]\n\n"


@dataclass
class Servers:
    """What one test has started."""

    cluster: Any
    encoders: list[EncoderDouble] = field(default_factory=list)
    languages: list[LanguageDouble] = field(default_factory=list)
    encoder_servers: list[AppServer] = field(default_factory=list)
    language_servers: list[AppServer] = field(default_factory=list)

    def encoder(self, **how: Any) -> EncoderDouble:
        double = EncoderDouble(len(self.encoders), **how)
        self.encoders.append(double)
        self.encoder_servers.append(self.cluster.run(double.app()))
        return double

    def language(self, **how: Any) -> LanguageDouble:
        double = LanguageDouble(**how)
        self.languages.append(double)
        self.language_servers.append(self.cluster.run(double.app()))
        return double

    def router(self, **how: Any) -> str:
        """The router's URL."""
        limits = VllmLimits(**{k: how.pop(k) for k in tuple(how) if k in VllmLimits.__dataclass_fields__})
        settings: dict[str, Any] = {
            "encoder_urls": [s.url for s in self.encoder_servers],
            "language_urls": [s.url for s in self.language_servers],
            "media_limits": MediaLimits(allow_private_media=True),
            "limits": limits,
        }
        url: str = self.cluster.run(vllm_app(VllmSettings(**(settings | how)))).url
        for language in self.languages:
            language.router.append(url)
        return url


@pytest.fixture
def servers(cluster: Any) -> Servers:
    return Servers(cluster)


Post = Callable[..., httpx.Response]


@pytest.fixture
def post() -> Post:
    def send(url: str, body: Any) -> httpx.Response:
        content = body if isinstance(body, bytes) else msgspec.json.encode(body)
        return httpx.post(f"{url}/v1/chat/completions", content=content, timeout=WAIT_S)

    return send


@pytest.fixture
def name_of() -> Callable[..., str]:
    """(bytes, options of the request) → what a server says that it saw."""

    def name(content: bytes, **options: Any) -> str:
        return hashlib.blake2b(content + options_of(options)).hexdigest()[:32]

    return name
