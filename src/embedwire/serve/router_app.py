"""The public API: OpenAI's chat completions over encoders and language servers.

Owns the client's connection, admission and the deadline; the way of a request behind it is ``dispatch.py``.
On the event loop.

    POST /v1/chat/completions    as in ``openai.py``; streaming or not
    GET  /v1/models              what the language servers serve
    GET  /health, /metrics
"""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import anyio
import anyio.to_thread
import httpx
from fastapi import FastAPI
from starlette.requests import Request
from starlette.responses import Response

from embedwire.errors import ConfigurationError, InvalidRequestError
from embedwire.registry import Registry, Role
from embedwire.serve.dispatch import Dispatch, DispatchLimits, Way
from embedwire.serve.exchange import Admission, EventStream, read_body, unless_disconnected
from embedwire.serve.faults import (
    FaultError,
    answer_faults,
    deadline_passed,
    json_response,
    overloaded,
    unreachable,
)
from embedwire.serve.language_app import model_not_found
from embedwire.serve.metrics import AppMetrics, CountRequests
from embedwire.serve.openai import DONE_EVENT, ChatRequest, decode_object, model_list, parse_chat
from embedwire.serve.watch import WatchTimes, check_workers, every, follow_registry
from embedwire.serve.worker_app import add_metrics_route

LAST_WORDS_S = 5.0
"""After the deadline, a client has this long to read what is left; then it is cut off."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RouterSettings:
    """Where the workers are (a registry, or URLs that the router checks itself), and the bounds of what is
    taken in."""

    registry_url: str | None = None
    worker_urls: Sequence[str] = ()
    requests_max: int = 1024
    body_bytes_max: int = 64 * 2**20
    bodies_bytes_max: int = 4 * 2**30
    """Of all requests under way together. Their decoded form takes about as much again."""
    misses_to_evict: int = 3
    watch: WatchTimes = field(default_factory=WatchTimes)
    limits: DispatchLimits = field(default_factory=DispatchLimits)

    def __post_init__(self) -> None:
        if (self.registry_url is None) == (not self.worker_urls):
            raise ConfigurationError("a router needs either registry_url or worker_urls, and not both")
        for name in ("requests_max", "body_bytes_max", "bodies_bytes_max"):
            if getattr(self, name) < 1:
                raise ConfigurationError(f"{name} is {getattr(self, name)}; it has to be above 0")


class Router:
    """The state of a router's app: its table, and the connections to its workers while it runs."""

    def __init__(self, settings: RouterSettings) -> None:
        self.settings = settings
        self.table = Registry(misses_to_evict=settings.misses_to_evict)
        self.metrics = AppMetrics()
        self.admission = Admission(settings.requests_max, bytes_max=settings.bodies_bytes_max)
        self.dispatch: Dispatch

    @asynccontextmanager
    async def lifespan(self, _app: FastAPI) -> AsyncIterator[None]:
        """Knows its workers before it takes a request in, and keeps knowing them."""
        watch, limits = self.settings.watch, self.settings.limits
        async with (
            httpx.AsyncClient(timeout=watch.timeout_s, trust_env=False) as watcher,
            anyio.create_task_group() as background,
        ):
            self.dispatch = Dispatch(self.table, background=background, metrics=self.metrics, limits=limits)
            await self._look(watcher)
            background.start_soon(every, watch.interval_s, lambda: self._look(watcher))
            yield
            await self.dispatch.close()
            background.cancel_scope.cancel()

    async def _look(self, client: httpx.AsyncClient) -> None:
        if self.settings.registry_url is None:
            urls = [url.rstrip("/") for url in self.settings.worker_urls]
            await check_workers(self.table, client, static_urls=urls)
        else:
            await follow_registry(self.table, client, self.settings.registry_url.rstrip("/"))
        self.dispatch.give_up_on_evicted()

    def parse(self, body: bytes) -> tuple[dict[str, Any], ChatRequest]:
        """On a worker thread: a body may be megabytes. Raises InvalidRequestError."""
        raw = decode_object(body)
        if "embedwire_room" in raw:
            raise InvalidRequestError("embedwire_room is for routers to set", param="embedwire_room")
        return raw, parse_chat(raw)

    def check_model(self, name: str) -> None:
        """Raises InvalidRequestError (404), or FaultError (503) while no model is known."""
        known = self.table.models()
        if not known:
            raise FaultError(overloaded("no language server is known yet"))
        if name not in known:
            raise model_not_found(name, known)


def router_app(settings: RouterSettings) -> FastAPI:
    """The app. Its workers are looked up when it starts."""
    router = Router(settings)
    app = FastAPI(title="Embedwire", lifespan=router.lifespan, openapi_url=None)
    app.add_middleware(CountRequests, metrics=router.metrics)
    answer_faults(app)
    add_metrics_route(app, router.metrics)

    @app.post("/v1/chat/completions")
    async def chat(request: Request) -> Response:
        began_s, deadline_s = anyio.current_time(), settings.limits.deadline_s
        async with AsyncExitStack() as stack:
            hold = stack.enter_context(router.admission.admitted())
            try:
                with anyio.fail_after(deadline_s):
                    body = await read_body(request, settings.body_bytes_max, hold=hold)
                    raw, asked = await anyio.to_thread.run_sync(router.parse, body)
                    router.check_model(asked.model)
                    way = stack.enter_context(router.dispatch.way(raw, asked, began_s=time.monotonic()))
                    response = await unless_disconnected(request, lambda: router.dispatch.open(way, stack))
                    if not asked.stream:
                        return await unless_disconnected(request, lambda: relay_whole(response, way))
            except TimeoutError:
                raise FaultError(deadline_passed(deadline_s)) from None
            until = began_s + deadline_s
            events = relay_events(response, way, until=until, deadline_s=deadline_s)
            return EventStream(events, on_close=stack.pop_all().aclose, until=until + LAST_WORDS_S)

    @app.get("/v1/models")
    async def models() -> Response:
        return json_response(model_list(router.table.models()))

    @app.get("/health")
    async def health() -> Response:
        workers = {role.value: len(router.table.candidates(role)) for role in Role}
        return json_response({"status": "ok", "workers": workers, "under_way": router.admission.under_way})

    return app


async def relay_whole(response: httpx.Response, way: Way) -> Response:
    """A language server's answer as ours. Raises FaultError when it breaks off."""
    try:
        content = await response.aread()
    except httpx.HTTPError as error:
        raise FaultError(unreachable("the language server broke off", error)) from None
    way.finished = True
    return Response(content, media_type="application/json")


async def relay_events(
    response: httpx.Response, way: Way, *, until: float, deadline_s: float
) -> AsyncIterator[bytes]:
    """A language server's events, whole ones only, until the time ``until`` of the event loop's clock.

    What goes wrong now is an event: the status has gone out, and another attempt would say the beginning
    twice.
    """
    parts, tail = response.aiter_raw(), b""
    try:
        while True:
            with anyio.fail_after(until - anyio.current_time()):
                tail += await anext(parts)
            whole, end, tail = tail.rpartition(b"\n\n")
            if whole:
                yield whole + end
    except StopAsyncIteration:
        way.finished = True
        return
    except TimeoutError:
        fault = deadline_passed(deadline_s)
    except httpx.HTTPError as error:
        fault = unreachable("the language server broke off", error)
    yield fault.as_event()
    yield DONE_EVENT
