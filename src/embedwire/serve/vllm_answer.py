"""A vLLM server's answer, looked into: whether it begins with an error, and with the ``embedwire`` object in it.

Owns vLLM's stream of events; it must not know workers. Bytes that need no change are passed on as they came. On the
router's event loop.
"""

from __future__ import annotations

import re
import time
from collections.abc import AsyncIterator
from contextlib import suppress
from typing import Any

import httpx
import msgspec

from embedwire.serve.faults import Fault, fault_from
from embedwire.serve.metrics import AppMetrics
from embedwire.serve.openai import Passage

LAST_CHUNK = re.compile(rb'"finish_reason":\s*"|"choices":\s*\[\]')
"""In a chunk that ends a choice, or tells the usage. In a text the quotes would be escaped."""
DATA = b"data:"


class ItemTransfer(msgspec.Struct, kw_only=True):
    """One item's room: rows, rows a round, bytes over the wire, milliseconds from the first grant to the last byte checked."""

    tokens: int
    rounds: tuple[int, ...]
    bytes: int
    transport: str
    transfer_ms: float


class _Came(msgspec.Struct):
    items: dict[str, ItemTransfer]


class _Params(msgspec.Struct):
    embedwire: _Came


class ItemsPassage(msgspec.Struct, kw_only=True):
    """How the media of a prompt came to the language server: the answer's ``embedwire`` object behind this router. ``items`` counts
    the prompt's media, ``encoders`` are those that they came from, ``total_tokens`` is all their rows, ``encode_ms`` how long it took
    until all were encoded (next to nothing when they were already). ``transfers``: how each item came over, by its identifier, as the
    language server says in an answer that is no stream."""

    encoders: tuple[str, ...] = ()
    items: int = 0
    total_tokens: int = 0
    encode_ms: float | None = None
    ttft_ms: float | None = None
    transfers: dict[str, ItemTransfer] = {}


class VllmAnswer:
    """An answer of status 200; ``began_s`` is when the request came in, by the monotonic clock."""

    def __init__(
        self, response: httpx.Response, passage: ItemsPassage, *, began_s: float, metrics: AppMetrics
    ) -> None:
        self._response = response
        self._passage = passage
        self._began_s = began_s
        self._metrics = metrics
        self._parts = response.aiter_raw()
        self._first = b""

    async def begin(self, *, who: str) -> Fault | None:
        """Wait for the first event, and say what went wrong if it is an error: nothing has gone out yet then. Raises
        httpx.HTTPError."""
        while b"\n\n" not in self._first:
            try:
                self._first += await anext(self._parts)
            except StopAsyncIteration:
                return fault_from(502, self._first, retry_after=None, who=who)
        event, _, _ = self._first.partition(b"\n\n")
        if fault := _error_in(event.removeprefix(DATA), who=who):
            return fault
        self._passage.ttft_ms = round((time.monotonic() - self._began_s) * 1000, 3)
        self._metrics.observe(Passage(ttft_ms=self._passage.ttft_ms))
        return None

    async def aread(self) -> bytes:
        """The whole answer."""
        return self._with_passage(await self._response.aread())

    async def aiter_raw(self) -> AsyncIterator[bytes]:
        """Its events, from the first one on, in whole ones."""
        tail = self._first
        while True:
            whole, end, tail = tail.rpartition(b"\n\n")
            if end:
                yield self._marked(whole) + end
            try:
                tail += await anext(self._parts)
            except StopAsyncIteration:
                break
        if tail:
            yield tail

    def _marked(self, events: bytes) -> bytes:
        if not LAST_CHUNK.search(events):
            return events
        return b"\n\n".join(self._with_mark(event) for event in events.split(b"\n\n"))

    def _with_mark(self, event: bytes) -> bytes:
        if event.startswith(DATA) and LAST_CHUNK.search(event):
            return DATA + b" " + self._with_passage(event.removeprefix(DATA))
        return event

    def _with_passage(self, content: bytes) -> bytes:
        try:
            fields = msgspec.json.decode(content, type=dict[str, msgspec.Raw])
        except msgspec.MsgspecError:
            return content
        with suppress(msgspec.MsgspecError):
            params = msgspec.json.decode(fields.pop("ec_transfer_params", b"null"), type=_Params)
            self._passage.transfers = params.embedwire.items
        return msgspec.json.encode({**fields, "embedwire": self._passage})


def _error_in(content: bytes, *, who: str) -> Fault | None:
    try:
        error: Any = msgspec.json.decode(content)["error"]
    except (msgspec.MsgspecError, KeyError, TypeError):
        return None
    code = error.get("code") if isinstance(error, dict) else None
    return fault_from(
        code if isinstance(code, int) and 400 <= code < 600 else 500, content, retry_after=None, who=who
    )
