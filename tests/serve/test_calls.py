"""Connections to workers."""

from __future__ import annotations

from contextlib import AsyncExitStack
from typing import Any

import anyio
import pytest
from fastapi import FastAPI
from starlette.requests import Request
from starlette.responses import JSONResponse

from embedwire.registry import Registry, Role, Worker
from embedwire.serve import calls
from embedwire.serve.calls import WorkerCalls

UVICORN_KEEPS_S = 5


@pytest.mark.anyio
async def test_a_connection_is_not_kept_until_the_server_hangs_up(
    cluster: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A call that is on its way when the server closes an idle connection is lost, and with it a request."""
    assert calls.KEPT_IDLE_S < UVICORN_KEEPS_S
    monkeypatch.setattr(calls, "KEPT_IDLE_S", 2.0)
    app = FastAPI()

    @app.post("/")
    async def whence(request: Request) -> JSONResponse:
        assert request.client is not None
        return JSONResponse(request.client.port)

    server = cluster.run(app)
    worker = Worker(url=server.url, role=Role.ENCODER, model="m", fingerprint="0", incarnation=1)
    made = WorkerCalls(Registry(), connect_timeout_s=3)

    async def port() -> int:
        async with AsyncExitStack() as stack:
            answer = await made.post(worker, "/", {}, stack)
            return int(await answer.aread())

    first = await port()
    assert await port() == first
    await anyio.sleep(2.2)
    assert await port() != first
    await made.close()
