"""What the encoder's and the language server's apps share: who they are, their registration, health and
metrics.

Owns these routes and the lifespan; it must not know what the worker does. On the event loop.

    GET /health     {"status": "ok", "worker": …}: the registry's and the router's check
    GET /info       the worker, its layout field by field
    GET /metrics    Prometheus
"""

from __future__ import annotations

import secrets
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager, nullcontext
from dataclasses import dataclass, field
from urllib.parse import urlsplit

import msgspec
from fastapi import FastAPI
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.responses import Response

from embedwire.errors import ConfigurationError
from embedwire.limits import INCARNATION_MAX
from embedwire.memory.layout import Layout
from embedwire.registry import WILDCARDS, Role, Worker
from embedwire.serve.faults import answer_faults, json_response
from embedwire.serve.metrics import AppMetrics
from embedwire.serve.registration import RegistrationTimes, registered
from embedwire.serve.requests import RecordRequests


@dataclass(frozen=True, slots=True, kw_only=True)
class Identity:
    """Who a worker is, but for its URL, which only its socket knows."""

    role: Role
    model: str
    layout: Layout
    control_addresses: tuple[str, ...] = ()
    readers: int = 1
    incarnation: int = field(default_factory=lambda: 1 + secrets.randbelow(INCARNATION_MAX))

    def at(self, url: str) -> Worker:
        return Worker(
            role=self.role,
            url=url,
            model=self.model,
            fingerprint=self.layout.fingerprint,
            incarnation=self.incarnation,
            control_addresses=self.control_addresses,
            readers=self.readers,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class RegistryLink:
    """The registry that a worker belongs to; without a URL it stands alone."""

    url: str | None = None
    times: RegistrationTimes = field(default_factory=RegistrationTimes)


def worker_app(
    identity: Identity,
    metrics: AppMetrics,
    *,
    registry: RegistryLink | None = None,
    while_running: AbstractAsyncContextManager[object] | None = None,
) -> FastAPI:
    """An app with these routes. It reads its own address from ``app.state.url`` when it starts, and takes its leave of the registry before
    it stops to listen, by ``app.state.before_shutdown`` (see ``run.py``); it enters ``while_running`` for as long as it runs."""
    link = registry or RegistryLink()

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        worker = identity.at(app.state.url)
        if link.url and urlsplit(worker.url).hostname in WILDCARDS:
            raise ConfigurationError(f"nobody can reach {worker.url}: a registry needs an advertise_host")
        async with while_running or nullcontext(), registered(link.url, worker, times=link.times) as leave:
            app.state.before_shutdown.append(leave)
            yield

    app = FastAPI(title=f"Embedwire {identity.role}", lifespan=lifespan, openapi_url=None)
    app.add_middleware(RecordRequests, metrics=metrics)
    answer_faults(app)
    add_metrics_route(app, metrics)

    def me() -> dict[str, object]:
        worker: dict[str, object] = msgspec.to_builtins(identity.at(app.state.url))
        return worker

    @app.get("/health")
    async def health() -> Response:
        return json_response({"status": "ok", "worker": me()})

    @app.get("/info")
    async def info() -> Response:
        layout = {"name": identity.layout.name, "fields": identity.layout.describe()}
        return json_response({"worker": me(), "layout": layout})

    return app


def add_metrics_route(app: FastAPI, metrics: AppMetrics) -> None:
    """GET /metrics, on a worker thread."""

    @app.get("/metrics")
    def expose() -> Response:
        return Response(metrics.expose(), media_type=CONTENT_TYPE_LATEST)
