"""The registry as a server: workers register, their health is checked, routers ask who is there.

For workers and routers: do not let users reach it. Owns routes only; the table is
:class:`embedwire.registry.Registry`. Everything runs on the event loop.

    POST   /workers        a Worker as JSON; the same again is a heartbeat
    DELETE /workers        ?url=…&incarnation=… (the latter may be left out)
    GET    /workers        {"workers": [{"worker", "candidate", "silent", "missed", "age_s"}]}
    GET    /health
"""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import anyio
import msgspec
from fastapi import FastAPI
from starlette.requests import Request
from starlette.responses import Response

from embedwire.errors import InvalidRequestError
from embedwire.registry import Registry, Worker
from embedwire.serve.exchange import read_body
from embedwire.serve.faults import answer_faults, json_response
from embedwire.serve.openai import convert, decode_object
from embedwire.serve.watch import WatchTimes, check_workers, checking_client, every

BODY_BYTES_MAX = 64 * 2**10


def registry_app(table: Registry, *, times: WatchTimes | None = None) -> FastAPI:
    """An app around ``table``, which belongs to its event loop from now on."""
    times = times or WatchTimes()

    @asynccontextmanager
    async def lifespan(_app: FastAPI) -> AsyncIterator[None]:
        async with (
            checking_client(times) as client,
            anyio.create_task_group() as group,
        ):
            group.start_soon(every, times.interval_s, lambda: check_workers(table, client))
            yield
            group.cancel_scope.cancel()

    app = FastAPI(title="Embedwire registry", lifespan=lifespan, openapi_url=None)
    answer_faults(app)

    @app.post("/workers")
    async def register(request: Request) -> Response:
        worker = convert(decode_object(await read_body(request, BODY_BYTES_MAX)), Worker)
        table.register(worker, now=time.monotonic())
        return json_response({"registered": worker.url})

    @app.delete("/workers")
    async def remove(request: Request) -> Response:
        incarnation = request.query_params.get("incarnation")
        if incarnation is not None and not incarnation.isdecimal():
            raise InvalidRequestError("incarnation is not a number", param="incarnation")
        url = request.query_params.get("url", "")
        removed = table.remove(url, incarnation=None if incarnation is None else int(incarnation))
        return json_response({"removed": removed})

    @app.get("/workers")
    async def workers() -> Response:
        now = time.monotonic()
        lines = [
            {
                "worker": msgspec.to_builtins(e.worker),
                "candidate": table.is_candidate(e),
                "silent": e.is_silent,
                "missed": e.missed,
                "age_s": now - e.seen_s,
            }
            for e in table
        ]
        return json_response({"workers": lines})

    @app.get("/health")
    async def health() -> Response:
        return json_response({"status": "ok", "workers": len(table)})

    return app
