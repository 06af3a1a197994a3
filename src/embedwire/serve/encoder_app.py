"""The encoder as a server: takes prompts with media from the router and announces their embeddings.

Owns the internal routes and the fetching of media; it must not know the model. The service's calls block and
run on worker threads of their own. These routes are for routers: do not let users reach them.

    POST   /encode          {"room", "attempt", "readers", "messages"} → {"total_tokens", "control_addresses", "content_hash"}
    DELETE /rooms/{room}    ?attempt=…  ends a room that nobody needs any more; harmless when it is not there
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Protocol

import anyio
import anyio.to_thread
from fastapi import FastAPI
from msgspec import Meta, Struct
from starlette.requests import Request
from starlette.responses import Response

from embedwire.encode.interface import ChatPrompt
from embedwire.errors import InvalidRequestError
from embedwire.limits import RANKS_MAX, ROOM_MAX
from embedwire.memory.layout import Layout
from embedwire.registry import Role
from embedwire.serve.exchange import Admission, read_body, unless_disconnected
from embedwire.serve.faults import ClientGone, json_response
from embedwire.serve.media import MediaFetcher
from embedwire.serve.metrics import AppMetrics
from embedwire.serve.openai import Message, convert, decode_object, plain_messages
from embedwire.serve.requests import describe
from embedwire.serve.worker_app import Identity, RegistryLink, worker_app


class TakenUp(Protocol):
    @property
    def total_tokens(self) -> int: ...
    @property
    def control_addresses(self) -> Sequence[str]: ...
    @property
    def content_hash(self) -> bytes: ...


class EncodeService(Protocol):
    """What this app asks of :class:`embedwire.encode.service.EncodeService`. Both calls may block."""

    def take_up(self, room: int, prompt: ChatPrompt, *, attempt: int = 0, readers: int = 1) -> TakenUp: ...
    def abort(self, room: int, *, attempt: int = 0, detail: str = "") -> None: ...


class EncodeRequest(Struct, kw_only=True):
    room: Annotated[int, Meta(ge=1, le=ROOM_MAX)]
    attempt: Annotated[int, Meta(ge=0, le=2**31 - 1)] = 0
    readers: Annotated[int, Meta(ge=1, le=RANKS_MAX)] = 1
    messages: Annotated[list[Message], Meta(min_length=1)]


def encoder_app(
    service: EncodeService,
    *,
    model: str,
    layout: Layout,
    control_addresses: Sequence[str],
    media: MediaFetcher | None = None,
    metrics: AppMetrics | None = None,
    registry: RegistryLink | None = None,
    requests_max: int = 256,
    body_bytes_max: int = 80 * 2**20,
    bodies_bytes_max: int = 4 * 2**30,
) -> FastAPI:
    """An app around a service. ``requests_max`` are taken up at a time and hold bodies of
    ``bodies_bytes_max`` together; what is more is refused with 503. A body may take a little more than a
    router's."""
    fetcher = media or MediaFetcher()
    identity = Identity(
        role=Role.ENCODER, model=model, layout=layout, control_addresses=tuple(control_addresses)
    )
    app = worker_app(identity, metrics or AppMetrics(), registry=registry, while_running=fetcher)
    admission = Admission(requests_max, bytes_max=bodies_bytes_max)
    threads = anyio.CapacityLimiter(requests_max)  # each may wait for memory, and must not hold up the others

    async def take_up(asked: EncodeRequest) -> TakenUp:
        messages, urls = plain_messages(asked.messages)
        prompt = ChatPrompt(messages, await fetcher.fetch_all(urls))
        return await anyio.to_thread.run_sync(
            lambda: service.take_up(asked.room, prompt, attempt=asked.attempt, readers=asked.readers),
            limiter=threads,
        )

    async def abort(room: int, attempt: int, detail: str) -> None:
        await anyio.to_thread.run_sync(lambda: service.abort(room, attempt=attempt, detail=detail))

    @app.post("/encode")
    async def encode(request: Request) -> Response:
        with admission.admitted() as hold:
            body = await read_body(request, body_bytes_max, hold=hold)
            asked = await anyio.to_thread.run_sync(_parse, body)
            describe(request, model=model, room=asked.room, attempt=asked.attempt)
            try:
                taken = await unless_disconnected(request, lambda: take_up(asked))
            except ClientGone:
                await abort(asked.room, asked.attempt, "the router closed its connection")
                raise
        describe(request, tokens=taken.total_tokens)
        return json_response(
            {
                "total_tokens": taken.total_tokens,
                "control_addresses": taken.control_addresses,
                "content_hash": taken.content_hash.hex(),
            }
        )

    @app.delete("/rooms/{room}")
    async def end(room: str, request: Request) -> Response:
        attempt = request.query_params.get("attempt", "0")
        if not (room.isdecimal() and attempt.isdecimal()):
            raise InvalidRequestError("room and attempt are numbers", param="room")
        describe(request, room=room, attempt=attempt)
        await abort(int(room), int(attempt), "the router ended it")
        return json_response({"room": int(room)})

    return app


def _parse(body: bytes) -> EncodeRequest:
    """On a worker thread: images in data: URLs make bodies large."""
    return convert(decode_object(body), EncodeRequest)
