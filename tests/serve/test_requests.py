"""What apps record of each request: a count, and one line in the log."""

from __future__ import annotations

import re
import threading
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from fastapi.responses import StreamingResponse
from fastapi.testclient import TestClient

from embedwire.serve.metrics import AppMetrics
from embedwire.serve.requests import RecordRequests

WAIT_S = 20.0


def post(server: Any, body: Any, path: str = "/v1/chat/completions") -> httpx.Response:
    return httpx.post(f"{getattr(server, 'url', server)}{path}", json=body, timeout=WAIT_S)


@pytest.mark.parametrize("stream", [False, True])
def test_a_request_at_a_language_server(cluster: Any, chat: Any, next_line: Any, stream: bool) -> None:
    _, server = cluster.add_language()
    assert post(server, chat("one two three", stream=stream)).status_code == 200
    line = "POST /v1/chat/completions status=200 model=tiny prompt_tokens=7 completion_tokens=3 complete=True"
    assert next_line() == ("INFO", line)


def test_a_request_with_media_at_every_server(cluster: Any, chat: Any, next_line: Any) -> None:
    router = cluster.add_router(cluster.add_encoder()[1], cluster.add_language()[1])
    answer = post(router, chat("what?", b"one"))
    room, begin = answer.json()["embedwire"]["room"], "POST /v1/chat/completions status=200 model=tiny"
    assert {next_line() for _ in range(3)} == {
        ("INFO", f"POST /encode status=200 model=tiny room={room} attempt=0 tokens=2000"),
        ("INFO", f"{begin} room={room} attempt=0 prompt_tokens=2000 completion_tokens=3 complete=True"),
        ("INFO", f"{begin} room={room} tokens=2000 complete=True"),
    }


def test_a_refused_request(cluster: Any, chat: Any, next_line: Any) -> None:
    _, server = cluster.add_language()
    assert post(server, chat("x") | {"model": "an\nother"}).status_code == 404
    assert next_line() == ("INFO", "POST /v1/chat/completions status=404")


def test_a_room_that_is_ended(cluster: Any, next_line: Any) -> None:
    _, server = cluster.add_encoder()
    assert httpx.delete(f"{server.url}/rooms/5", params={"attempt": 2}).status_code == 200
    assert next_line() == ("INFO", "DELETE /rooms/{room} status=200 room=5 attempt=2")


def test_a_client_that_disconnects(cluster: Any, chat: Any, hang_up_after: Any, next_line: Any) -> None:
    double, server = cluster.add_language(steps=threading.Semaphore(0))
    with hang_up_after(f"{server.url}/v1/chat/completions", chat("one")):
        double.jobs.get(timeout=WAIT_S)
    assert next_line()[1].startswith("POST /v1/chat/completions status=499 model=tiny")


def test_no_other_logger_repeats_a_request_and_checks_are_at_debug(cluster: Any, records: Any) -> None:
    _, server = cluster.add_language()
    with httpx.Client(base_url=server.url, timeout=WAIT_S) as client:
        client.get("/v1/models")
        client.get("/health")
        client.get("/a%0Ab")
    cluster.stack.close()  # whatever the server logs is logged by now
    found = [records.get_nowait() for _ in range(records.qsize())]
    lines = [
        (r.levelname, r.getMessage().partition(" status")[0])
        for r in found
        if not r.name.startswith(("httpx", "httpcore")) and re.search("models|health|/a", r.getMessage())
    ]
    assert lines == [("INFO", "GET /v1/models"), ("DEBUG", "GET /health"), ("INFO", "GET /a%0Ab")]


@pytest.mark.parametrize("is_begun", [False, True])
def test_a_fault_of_our_own_counts_as_one(is_begun: bool) -> None:
    """Not as a client that went away. Where an answer has begun, its status has gone out."""
    metrics = AppMetrics()
    app = FastAPI()
    app.add_middleware(RecordRequests, metrics=metrics)

    @app.get("/")
    async def fail() -> StreamingResponse:
        async def pieces() -> AsyncIterator[bytes]:
            yield b"a piece"
            raise RuntimeError("injected")

        if not is_begun:
            raise RuntimeError("injected")
        return StreamingResponse(pieces())

    with TestClient(app, raise_server_exceptions=False) as client:
        client.get("/")
    status = "200" if is_begun else "500"
    assert (
        metrics.registry.get_sample_value("embedwire_requests_total", {"route": "/", "status": status}) == 1
    )
