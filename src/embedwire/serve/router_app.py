"""The router in front of this package's own encoders and language servers.

Owns what makes :mod:`embedwire.serve.front` a router for them; the way of a request is ``dispatch.py``. On the event
loop.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, AsyncExitStack
from dataclasses import dataclass, field
from typing import Any

import httpx
from anyio.abc import TaskGroup
from fastapi import FastAPI

from embedwire.errors import ConfigurationError
from embedwire.serve.calls import WorkerCalls
from embedwire.serve.dispatch import Dispatch, DispatchLimits, Way
from embedwire.serve.exchange import Hold
from embedwire.serve.front import Front, FrontSettings, front_app, object_without
from embedwire.serve.openai import ChatRequest, parse_chat
from embedwire.serve.watch import check_workers, follow_registry


@dataclass(frozen=True, slots=True, kw_only=True)
class RouterSettings(FrontSettings):
    """Where the workers are (a registry, or URLs that the router checks itself), and the bounds of what is
    taken in."""

    worker_urls: Sequence[str] = ()
    limits: DispatchLimits = field(default_factory=DispatchLimits)

    def __post_init__(self) -> None:
        FrontSettings.__post_init__(self)
        if (self.registry_url is None) == (not self.worker_urls):
            raise ConfigurationError("a router needs either registry_url or worker_urls, and not both")


Parsed = tuple[Mapping[str, Any], ChatRequest]


class Router(Front[Parsed, Way]):
    """Rooms of whole prompts: an encoder takes the prompt up, a language server reads it."""

    dispatch: Dispatch

    def __init__(self, settings: RouterSettings) -> None:
        super().__init__(settings, deadline_s=settings.limits.deadline_s)
        self._settings = settings

    def connect(self, background: TaskGroup) -> WorkerCalls:
        self.dispatch = Dispatch(
            self.table, background=background, metrics=self.metrics, limits=self._settings.limits
        )
        return self.dispatch.calls

    async def look(self, client: httpx.AsyncClient) -> None:
        if self._settings.registry_url is None:
            urls = [url.rstrip("/") for url in self._settings.worker_urls]
            await check_workers(self.table, client, static_urls=urls)
        else:
            await follow_registry(self.table, client, self._settings.registry_url.rstrip("/"))

    def parse(self, body: bytes) -> Parsed:
        raw = object_without(body, "embedwire_room")
        return raw, parse_chat(raw)

    def way(self, parsed: Parsed, *, began_s: float, hold: Hold) -> AbstractContextManager[Way]:
        raw, asked = parsed
        self.check_model(asked.model)
        return self.dispatch.way(raw, asked, began_s=began_s)

    async def open(self, way: Way, stack: AsyncExitStack) -> httpx.Response:
        return await self.dispatch.open(way, stack)


def router_app(settings: RouterSettings) -> FastAPI:
    """The app. Its workers are looked up when it starts."""
    return front_app(Router(settings))
