"""What an app records of each request: a count for Prometheus, and one line in the log.

Owns the middleware and the form of the line; it must not know what a request is about: routes pass that to :func:`describe`. On the event
loop.
"""

from __future__ import annotations

import logging
import time
from typing import Any

from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from embedwire.serve.metrics import AppMetrics

log = logging.getLogger(__name__)

FACTS = "embedwire.facts"
CHECKS = frozenset({"/health", "/info", "/metrics"})
"""Registries, routers and Prometheus request these every few seconds, so they are logged at DEBUG; all else is logged at INFO."""
PATH_CHARS_MAX = 100


def describe(request: Request, **facts: object) -> None:
    """Add to the log line of a request what is known of it by now; None is left out. Later values override earlier ones."""
    request.scope[FACTS].update(facts)


class RecordRequests:
    """ASGI middleware: counts requests by route and status, and logs each when its answer has ended. One that ended without a status
    counts as 499, or as 500 where that is our own fault."""

    def __init__(self, app: ASGIApp, metrics: AppMetrics) -> None:
        self._app = app
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        status: int | None = None
        began_s = time.monotonic()
        scope[FACTS] = {}

        async def send_and_look(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        with self._metrics.under_way.track_inprogress():
            try:
                await self._app(scope, receive, send_and_look)
            except Exception:
                status = status or 500
                raise
            finally:
                route = getattr(scope.get("route"), "path", None)
                self._metrics.requests.labels(route or "other", status or 499).inc()
                _log(scope, route, status or 499, ms=(time.monotonic() - began_s) * 1000)


def _log(scope: Scope, route: str | None, status: int, *, ms: float) -> None:
    level = logging.DEBUG if route in CHECKS else logging.INFO
    if log.isEnabledFor(level):
        # percent-encoded as it came: a decoded path may hold line feeds, with which a client could forge a line
        path = route or scope.get("raw_path", b"")[:PATH_CHARS_MAX].decode("ascii", "backslashreplace")
        facts: dict[str, Any] = {"status": status} | scope[FACTS] | {"ms": f"{ms:.1f}"}
        told = " ".join(f"{name}={fact}" for name, fact in facts.items() if fact is not None)
        log.log(level, "%s %s %s", scope["method"], path, told)
