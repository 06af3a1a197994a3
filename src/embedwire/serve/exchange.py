"""One HTTP exchange: a bounded body in, a disconnect noticed at any time, a stream of events out.

Owns what every app needs of HTTP beyond a route. It must not know OpenAI's schema or workers. On the event
loop.
"""

from __future__ import annotations

import math
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import anyio
from starlette.requests import ClientDisconnect, Request
from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from embedwire.errors import InvalidRequestError, OverloadedError
from embedwire.serve.faults import ClientGone

T = TypeVar("T")


Hold = Callable[[int], None]
"""Counts bytes as held. Raises OverloadedError."""


async def read_body(request: Request, limit_bytes: int, *, hold: Hold = lambda _count: None) -> bytes:
    """The request's body. Raises InvalidRequestError (413) as soon as it is known to be over the limit, and
    what ``hold`` raises, which is told of every byte as it comes."""
    declared = request.headers.get("content-length", "")
    if declared.isdecimal() and int(declared) > limit_bytes:
        raise _too_large(limit_bytes)
    body = bytearray()
    try:
        async for chunk in request.stream():
            body += chunk
            hold(len(chunk))
            if len(body) > limit_bytes:
                raise _too_large(limit_bytes)
    except ClientDisconnect:
        raise ClientGone from None
    return bytes(body)


async def unless_disconnected(request: Request, work: Callable[[], Awaitable[T]]) -> T:
    """Run ``work``; cancel it and raise ClientGone when the client closes the connection first.

    The body must have been read. Work in a thread is waited for, and its outcome dropped, so that the caller
    can undo it.
    """
    done: list[T] = []
    failed: list[Exception] = []

    async def run() -> None:
        try:
            done.append(await work())
        except Exception as error:
            failed.append(error)
        group.cancel_scope.cancel()

    gone = False
    async with anyio.create_task_group() as group:
        group.start_soon(run)
        while (await request.receive())["type"] != "http.disconnect":
            pass
        gone = True
        group.cancel_scope.cancel()
    if gone:
        raise ClientGone
    if failed:
        raise failed[0]
    return done[0]


class Admission:
    """At most ``requests_max`` requests under way, and bodies of ``bytes_max`` together; what is more is
    refused at once."""

    def __init__(self, requests_max: int, *, bytes_max: int) -> None:
        self._requests_max = requests_max
        self._bytes_max = bytes_max
        self._held_bytes = 0
        self.under_way = 0

    @contextmanager
    def admitted(self) -> Iterator[Hold]:
        """Take one place while the block runs, and what is held through the result. Raises
        OverloadedError."""
        if self.under_way >= self._requests_max:
            raise OverloadedError(f"{self._requests_max} requests are under way already")
        mine_bytes = 0

        def hold(count: int) -> None:
            nonlocal mine_bytes
            mine_bytes += count
            self._held_bytes += count
            if self._held_bytes > self._bytes_max:
                raise OverloadedError(f"the requests under way hold {self._bytes_max} bytes already")

        self.under_way += 1
        try:
            yield hold
        finally:
            self.under_way -= 1
            self._held_bytes -= mine_bytes


class EventStream(StreamingResponse):
    """Server-sent events.

    They are cut off at ``until`` of the event loop's clock, even if the client does not read. ``on_close`` is
    awaited when the stream has ended, however it ended, and also if it never began.
    """

    def __init__(
        self,
        events: AsyncIterator[bytes],
        *,
        on_close: Callable[[], Awaitable[None]],
        until: float = math.inf,
    ) -> None:
        headers = {"cache-control": "no-cache", "x-accel-buffering": "no"}
        super().__init__(events, headers=headers, media_type="text/event-stream")
        self._on_close = on_close
        self._until = until

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            with anyio.CancelScope(deadline=self._until):
                await super().__call__(scope, receive, send)
        finally:
            with anyio.CancelScope(shield=True):
                await self._on_close()


def _too_large(limit_bytes: int) -> InvalidRequestError:
    return InvalidRequestError(
        f"the request's body is over the limit of {limit_bytes} bytes", code="request_too_large", status=413
    )
