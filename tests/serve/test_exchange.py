"""One exchange alone, without a server: bodies, disconnects and streams that end before they begin."""

from __future__ import annotations

import threading
from collections.abc import AsyncIterator
from typing import Any

import anyio
import anyio.from_thread
import anyio.lowlevel
import anyio.to_thread
import pytest
from starlette.requests import Request

from embedwire.errors import InvalidRequestError, OverloadedError
from embedwire.serve.exchange import Admission, EventStream, read_body, unless_disconnected
from embedwire.serve.faults import ClientGone

pytestmark = pytest.mark.anyio
SCOPE = {"type": "http", "method": "POST", "path": "/", "headers": [], "asgi": {"spec_version": "2.3"}}


def request(*messages: dict[str, Any], hang: bool = True, **headers: str) -> Request:
    left = list(messages)

    async def receive() -> dict[str, Any]:
        if not left and hang:
            await anyio.sleep_forever()
        return left.pop(0)

    raw = [(k.replace("_", "-").encode(), v.encode()) for k, v in headers.items()]
    return Request({**SCOPE, "headers": raw}, receive)


def part(body: bytes, more: bool) -> dict[str, Any]:
    return {"type": "http.request", "body": body, "more_body": more}


DISCONNECT = {"type": "http.disconnect"}


async def test_a_body_in_parts() -> None:
    assert await read_body(request(part(b"ab", True), part(b"c", False)), 3) == b"abc"


async def test_a_body_over_the_limit_is_not_read_to_its_end() -> None:
    with pytest.raises(InvalidRequestError, match="limit of 3 bytes") as caught:
        await read_body(request(part(b"ab", True), part(b"cd", True)), 3)
    assert caught.value.status == 413
    with pytest.raises(InvalidRequestError):
        await read_body(request(content_length="4"), 3)


async def test_a_body_that_breaks_off() -> None:
    with pytest.raises(ClientGone):
        await read_body(request(part(b"ab", True), DISCONNECT), 3)


@pytest.mark.failure_mode("malformed-message")
@pytest.mark.invariant("backpressure")
async def test_bodies_share_a_bound() -> None:
    """Many large bodies at once are refused before they are in memory."""
    admission = Admission(3, bytes_max=5)
    with admission.admitted() as one, admission.admitted() as other:
        assert await read_body(request(part(b"abc", False)), 9, hold=one) == b"abc"
        with pytest.raises(OverloadedError, match="5 bytes"):
            await read_body(request(part(b"abc", False)), 9, hold=other)
    with admission.admitted() as hold:
        assert await read_body(request(part(b"abcde", False)), 9, hold=hold) == b"abcde"
    assert admission.under_way == 0


async def test_places_are_bounded_and_given_back() -> None:
    admission = Admission(1, bytes_max=1)
    for _ in range(2):
        with admission.admitted(), pytest.raises(OverloadedError, match="1 requests"), admission.admitted():
            pass


async def test_work_is_cancelled_when_the_client_goes() -> None:
    ended = []

    async def work() -> None:
        try:
            await anyio.sleep_forever()
        finally:
            ended.append("cancelled")

    with pytest.raises(ClientGone):
        await unless_disconnected(request(DISCONNECT), work)
    assert ended == ["cancelled"]


async def test_the_outcome_of_work_in_a_thread_is_dropped() -> None:
    """It can not be cancelled, so its result must not pass for an answer: the caller undoes it."""
    began, seen = anyio.Event(), threading.Event()
    ended = []

    async def receive() -> dict[str, Any]:
        await began.wait()
        seen.set()
        return DISCONNECT

    def in_thread() -> None:
        anyio.from_thread.run_sync(began.set)
        assert seen.wait(20)
        ended.append(1)

    with pytest.raises(ClientGone):
        await unless_disconnected(Request(SCOPE, receive), lambda: anyio.to_thread.run_sync(in_thread))
    assert ended == [1]


async def test_what_work_returns_or_raises() -> None:
    async def fails() -> None:
        raise KeyError("as it is")

    async def returns() -> int:
        return 7

    assert await unless_disconnected(request(), returns) == 7
    with pytest.raises(KeyError, match="as it is"):
        await unless_disconnected(request(), fails)


async def run_stream(stream: EventStream, *, gone: bool, stuck: bool = False) -> list[bytes]:
    sent: list[bytes] = []

    async def receive() -> Any:
        if not gone:
            await anyio.sleep_forever()
        return DISCONNECT

    async def send(message: Any) -> None:
        if stuck:
            await anyio.sleep_forever()
        sent.append(message.get("body", b""))

    await stream(SCOPE, receive, send)
    return sent


async def events(count: int) -> AsyncIterator[bytes]:
    for _ in range(count):
        yield b"x"
        await anyio.lowlevel.checkpoint()


@pytest.mark.failure_mode("abort-not-propagated")
async def test_a_stream_closes_what_it_stands_on() -> None:
    """Also when the client disconnects before the first event, and when it does not read."""
    closed: list[str] = []

    async def on_close() -> None:
        await anyio.lowlevel.checkpoint()
        closed.append("closed")

    assert b"".join(await run_stream(EventStream(events(3), on_close=on_close), gone=False)) == b"xxx"
    assert len(await run_stream(EventStream(events(10**9), on_close=on_close), gone=True)) < 10
    past = anyio.current_time() - 1
    await run_stream(EventStream(events(3), on_close=on_close, until=past), gone=False, stuck=True)
    assert closed == ["closed"] * 3
