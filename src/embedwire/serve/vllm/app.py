"""The router in front of stock vLLM servers: encoders (``ec_producer``) and language servers (``ec_consumer``).

Owns what makes :mod:`embedwire.serve.front` a router for them; the way of a request is ``dispatch.py``. On the event
loop.

    POST /vllm/ends    causes of failed transfers, from the language servers' connectors (``ends.py``)
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import AbstractContextManager, AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from typing import Literal

import httpx
from anyio.abc import TaskGroup
from fastapi import FastAPI
from starlette.requests import Request
from starlette.responses import Response

from embedwire.errors import ConfigurationError
from embedwire.registry import Role
from embedwire.serve.calls import WorkerCalls
from embedwire.serve.exchange import Hold, read_body
from embedwire.serve.front import Front, FrontSettings, front_app
from embedwire.serve.media import MediaFetcher, MediaLimits
from embedwire.serve.openai import convert, decode_object
from embedwire.serve.vllm.answer import VllmAnswer
from embedwire.serve.vllm.dispatch import VllmDispatch, VllmLimits, VllmWay
from embedwire.serve.vllm.ends import BODY_BYTES_MAX, End
from embedwire.serve.vllm.request import Asked, parse
from embedwire.serve.watch import check_vllm_workers, follow_registry

MEDIA_TYPES = "image/*,video/*,audio/*"


@dataclass(frozen=True, slots=True, kw_only=True)
class VllmSettings(FrontSettings):
    """Where the servers are (a registry, or URLs), and what a language server gets of a media item."""

    encoder_urls: Sequence[str] = ()
    language_urls: Sequence[str] = ()
    media: Literal["bytes", "metadata"] = "bytes"
    limits: VllmLimits = field(default_factory=VllmLimits)
    media_limits: MediaLimits = field(default_factory=MediaLimits)

    def __post_init__(self) -> None:
        FrontSettings.__post_init__(self)
        if (self.registry_url is None) == (not self.language_urls):
            raise ConfigurationError(
                "a router for vLLM needs either registry_url or the URLs of language servers, and not both"
            )
        if self.registry_url and self.encoder_urls:
            raise ConfigurationError("encoders are told by URL or by registry_url, not by both")


class VllmRouter(Front[Asked, VllmWay]):
    """Rooms of single media items, each encoded by itself; the language server gets the request as it came."""

    dispatch: VllmDispatch

    def __init__(self, settings: VllmSettings) -> None:
        super().__init__(settings, deadline_s=settings.limits.deadline_s)
        self._settings = settings
        self._fetcher = MediaFetcher(settings.media_limits, accept=MEDIA_TYPES)

    def connect(self, background: TaskGroup) -> WorkerCalls:
        self.dispatch = VllmDispatch(
            self.table,
            background=background,
            metrics=self.metrics,
            limits=self._settings.limits,
            fetcher=self._fetcher,
            media=self._settings.media,
        )
        return self.dispatch.calls

    @asynccontextmanager
    async def lifespan(self, app: FastAPI) -> AsyncIterator[None]:
        async with self._fetcher, super().lifespan(app):
            yield

    async def look(self, client: httpx.AsyncClient) -> None:
        if self._settings.registry_url is None:
            roles = {
                Role.ENCODER: self._settings.encoder_urls,
                Role.LANGUAGE: self._settings.language_urls,
            }
            urls = {url.rstrip("/"): role for role, found in roles.items() for url in found}
            await check_vllm_workers(self.table, client, urls)
        else:
            await follow_registry(self.table, client, self._settings.registry_url.rstrip("/"), engine="vllm")

    def parse(self, body: bytes) -> Asked:
        return parse(body)

    def way(self, parsed: Asked, *, began_s: float, hold: Hold) -> AbstractContextManager[VllmWay]:
        self.check_model(parsed.model)
        return self.dispatch.way(parsed, began_s=began_s, hold=hold)

    async def open(self, way: VllmWay, stack: AsyncExitStack) -> VllmAnswer:
        return await self.dispatch.open(way, stack)


def vllm_app(settings: VllmSettings) -> FastAPI:
    """The app. Its servers are looked up when it starts, and again and again from then on."""
    router = VllmRouter(settings)
    app = front_app(router)

    @app.post("/vllm/ends")
    async def ends(request: Request) -> Response:
        router.dispatch.ends.tell(convert(decode_object(await read_body(request, BODY_BYTES_MAX)), End))
        return Response(status_code=204)

    return app
