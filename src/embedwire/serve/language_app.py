"""The language half as a server: OpenAI's chat completions, for text, or for a room that the router names.

Owns the routes; it must not know the model. Behind a router: ``embedwire_room`` makes it connect to an
address that the request names, so do not let users reach it.

    POST /v1/chat/completions    a ChatRequest without media, or a RoomRequest
    GET  /v1/models
"""

from __future__ import annotations

import time
from contextlib import AsyncExitStack

import anyio.to_thread
from fastapi import FastAPI
from starlette.requests import Request
from starlette.responses import Response

from embedwire.errors import InvalidRequestError
from embedwire.memory.layout import Layout
from embedwire.registry import Role
from embedwire.serve.answering import Answer, Asked, LanguageService, chunks, completion
from embedwire.serve.exchange import EventStream, read_body, unless_disconnected
from embedwire.serve.faults import json_response
from embedwire.serve.metrics import AppMetrics
from embedwire.serve.openai import (
    AnswerWriter,
    ChatRequest,
    RoomRequest,
    convert,
    decode_object,
    model_list,
    refuse_what_changes_meaning,
)
from embedwire.serve.requests import describe
from embedwire.serve.worker_app import Identity, RegistryLink, worker_app


def language_app(
    service: LanguageService,
    *,
    model: str,
    layout: Layout,
    metrics: AppMetrics | None = None,
    registry: RegistryLink | None = None,
    default_max_tokens: int = 256,
    readers: int = 1,
    body_bytes_max: int = 16 * 2**20,
) -> FastAPI:
    """An app around a service. ``default_max_tokens`` holds for a request that names no limit; ``readers`` is how many ranks of the
    server receive from the wire."""
    metrics = metrics or AppMetrics()
    identity = Identity(role=Role.LANGUAGE, model=model, layout=layout, readers=readers)
    app = worker_app(identity, metrics, registry=registry)

    @app.post("/v1/chat/completions")
    async def chat(request: Request) -> Response:
        began_s = time.monotonic()
        body = await read_body(request, body_bytes_max)
        asked = await anyio.to_thread.run_sync(_parse, body)
        if asked.model != model:
            raise model_not_found(asked.model, [model])
        answer = Answer(service, asked, began_s=began_s, default_max_tokens=default_max_tokens)
        writer = AnswerWriter(model, bool(asked.return_token_ids))
        async with AsyncExitStack() as stack:
            stack.callback(lambda: describe(request, **answer.facts))
            stack.push_async_callback(answer.close)
            first = await unless_disconnected(request, answer.begin)
            metrics.observe(answer.passage)
            if asked.stream:
                events = chunks(answer, first, writer, include_usage=asked.include_usage)
                return EventStream(events, on_close=stack.pop_all().aclose)
            content = await unless_disconnected(request, lambda: completion(answer, first, writer))
            return Response(content, media_type="application/json")

    @app.get("/v1/models")
    async def models() -> Response:
        return json_response(model_list([model]))

    return app


def model_not_found(name: str, known: list[str]) -> InvalidRequestError:
    """404, with the names that would have been found."""
    return InvalidRequestError(
        f"the model {name!r} does not exist here; there is {', '.join(known)}",
        code="model_not_found",
        param="model",
        status=404,
    )


def _parse(body: bytes) -> Asked:
    """On a worker thread: a body may be megabytes."""
    raw = decode_object(body)
    refuse_what_changes_meaning(raw)
    return convert(raw, RoomRequest) if "embedwire_room" in raw else convert(raw, ChatRequest)
