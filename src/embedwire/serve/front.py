"""The public side of a router: OpenAI's chat completions, whatever the workers behind it are.

Owns the client's connection, admission and the deadline; it must not know how a request is served. A router is a
:class:`Front` with its own way of doing that: ``router_app.py`` and ``vllm/app.py``. On the event loop.

    POST /v1/chat/completions    streaming or not
    GET  /v1/models              what the language servers serve
    GET  /health, /metrics
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Mapping
from contextlib import AbstractContextManager, AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, Generic, Protocol, TypeVar

import anyio
import anyio.to_thread
import httpx
from anyio.abc import TaskGroup
from fastapi import FastAPI
from starlette.requests import Request
from starlette.responses import Response

from embedwire.errors import ConfigurationError, InvalidRequestError
from embedwire.registry import Registry, Role
from embedwire.serve.calls import WorkerCalls
from embedwire.serve.exchange import Admission, EventStream, Hold, read_body, unless_disconnected
from embedwire.serve.faults import (
    FaultError,
    answer_faults,
    deadline_passed,
    json_response,
    overloaded,
    unreachable,
)
from embedwire.serve.language_app import model_not_found
from embedwire.serve.metrics import AppMetrics
from embedwire.serve.openai import DONE_EVENT, decode_object, model_list
from embedwire.serve.requests import RecordRequests, describe
from embedwire.serve.watch import WatchTimes, checking_client, every
from embedwire.serve.worker_app import add_metrics_route

LAST_WORDS_S = 5.0
"""After the deadline, a client has this long to read what is left; then it is cut off."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FrontSettings:
    """The bounds of what is taken in, and how workers are watched. ``registry_url`` is None where they are told by URL."""

    registry_url: str | None = None
    requests_max: int = 1024
    body_bytes_max: int = 64 * 2**20
    bodies_bytes_max: int = 4 * 2**30
    """Of all requests under way together. Their decoded form takes about as much again."""
    misses_to_evict: int = 3
    watch: WatchTimes = field(default_factory=WatchTimes)

    def __post_init__(self) -> None:
        for name in ("requests_max", "body_bytes_max", "bodies_bytes_max"):
            if getattr(self, name) < 1:
                raise ConfigurationError(f"{name} is {getattr(self, name)}; it has to be above 0")


class UnderWay(Protocol):
    """A request that is being served. ``finished`` is set when its answer is complete. ``facts`` are for the log."""

    finished: bool

    @property
    def stream(self) -> bool: ...

    @property
    def facts(self) -> Mapping[str, object]: ...


class Answer(Protocol):
    """What a language server answers, its status known to be 200: a whole body, or events. An ``httpx.Response`` is one."""

    async def aread(self) -> bytes: ...

    def aiter_raw(self) -> AsyncIterator[bytes]: ...


P = TypeVar("P")
W = TypeVar("W", bound=UnderWay)


class Front(ABC, Generic[P, W]):
    """The state of a router's app: its table, and the connections to its workers while it runs. P is a request as it was read, W one
    under way."""

    calls: WorkerCalls

    def __init__(self, settings: FrontSettings, *, deadline_s: float) -> None:
        self.settings = settings
        self.deadline_s = deadline_s
        self.table = Registry(misses_to_evict=settings.misses_to_evict)
        self.metrics = AppMetrics()
        self.admission = Admission(settings.requests_max, bytes_max=settings.bodies_bytes_max)

    @abstractmethod
    def parse(self, body: bytes) -> P:
        """On a worker thread: a body may be megabytes. Raises InvalidRequestError."""

    @abstractmethod
    def way(self, parsed: P, *, began_s: float, hold: Hold) -> AbstractContextManager[W]:
        """The request is under way while the block runs. ``hold`` counts what it keeps beside its body. Raises what
        :meth:`check_model` does."""

    @abstractmethod
    async def open(self, way: W, stack: AsyncExitStack) -> Answer:
        """A language server's answer; what it holds is given back by ``stack``. Raises FaultError or InvalidRequestError."""

    @abstractmethod
    async def look(self, client: httpx.AsyncClient) -> None:
        """Bring the table up to date."""

    @abstractmethod
    def connect(self, background: TaskGroup) -> WorkerCalls:
        """Get ready to serve; ``background`` takes tasks that outlive a request."""

    @asynccontextmanager
    async def lifespan(self, _app: FastAPI) -> AsyncIterator[None]:
        """Knows its workers before it takes a request in, and keeps knowing them."""
        watch = self.settings.watch
        async with (
            checking_client(watch) as watcher,
            anyio.create_task_group() as background,
        ):
            self.calls = self.connect(background)
            await self._look(watcher)
            background.start_soon(every, watch.interval_s, lambda: self._look(watcher))
            yield
            await self.calls.close()
            background.cancel_scope.cancel()

    async def _look(self, client: httpx.AsyncClient) -> None:
        await self.look(client)
        self.calls.give_up_on_lost()

    def check_model(self, name: str) -> None:
        """Raises InvalidRequestError (404), or FaultError (503) while no model is known."""
        known = self.table.models()
        if not known:
            raise FaultError(overloaded("no language server is known yet"))
        if name not in known:
            raise model_not_found(name, known)


def front_app(front: Front[P, W]) -> FastAPI:
    """The app. Its workers are looked up when it starts."""
    app = FastAPI(title="Embedwire", lifespan=front.lifespan, openapi_url=None)
    app.add_middleware(RecordRequests, metrics=front.metrics)
    answer_faults(app)
    add_metrics_route(app, front.metrics)

    @app.post("/v1/chat/completions")
    async def chat(request: Request) -> Response:
        began_s, deadline_s = anyio.current_time(), front.deadline_s
        async with AsyncExitStack() as stack:
            hold = stack.enter_context(front.admission.admitted())
            try:
                with anyio.fail_after(deadline_s):
                    body = await read_body(request, front.settings.body_bytes_max, hold=hold)
                    parsed = await anyio.to_thread.run_sync(front.parse, body)
                    way = stack.enter_context(front.way(parsed, began_s=time.monotonic(), hold=hold))
                    stack.callback(lambda: describe(request, **way.facts, complete=way.finished))
                    answer = await unless_disconnected(request, lambda: front.open(way, stack))
                    if not way.stream:
                        return await unless_disconnected(request, lambda: relay_whole(answer, way))
            except TimeoutError:
                raise FaultError(deadline_passed(deadline_s)) from None
            until = began_s + deadline_s
            events = relay_events(answer, way, until=until, deadline_s=deadline_s)
            return EventStream(events, on_close=stack.pop_all().aclose, until=until + LAST_WORDS_S)

    @app.get("/v1/models")
    async def models() -> Response:
        return json_response(model_list(front.table.models()))

    @app.get("/health")
    async def health() -> Response:
        workers = {role.value: len(front.table.candidates(role)) for role in Role}
        return json_response({"status": "ok", "workers": workers, "under_way": front.admission.under_way})

    return app


async def relay_whole(answer: Answer, way: UnderWay) -> Response:
    """A language server's answer as ours. Raises FaultError when it breaks off."""
    try:
        content = await answer.aread()
    except httpx.HTTPError as error:
        raise FaultError(unreachable("the language server broke off", error)) from None
    way.finished = True
    return Response(content, media_type="application/json")


async def relay_events(
    answer: Answer, way: UnderWay, *, until: float, deadline_s: float
) -> AsyncIterator[bytes]:
    """A language server's events, whole ones only, until the time ``until`` of the event loop's clock.

    What goes wrong now is an event: the status has gone out, and another attempt would say the beginning
    twice.
    """
    parts, tail = answer.aiter_raw(), b""
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


def object_without(body: bytes, ours: str) -> dict[str, Any]:
    """The JSON object in a body, which has not the field ``ours``: that is for routers to set. Raises InvalidRequestError."""
    raw = decode_object(body)
    if ours in raw:
        raise InvalidRequestError(f"{ours} is for routers to set", param=ours)
    return raw
