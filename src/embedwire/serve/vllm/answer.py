"""A vLLM server's answer: whether it fails, before or after its first content, and with the ``embedwire`` object in it.

Owns vLLM's stream of events; it must not know workers. Bytes that need no change are passed on as they came. On the
router's event loop.

vLLM sends a chunk with the role before anything of a request can fail. So nothing is passed on before an event with content.
"""

from __future__ import annotations

import re
import time
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import suppress
from typing import Any

import httpx
import msgspec

from embedwire.serve.faults import Fault, fault_from
from embedwire.serve.metrics import AppMetrics
from embedwire.serve.openai import DONE_EVENT, Passage

LAST_CHUNK = re.compile(rb'"finish_reason":\s*"|"choices":\s*\[\]')
"""In a chunk that ends a choice, or tells the usage. In a text the quotes would be escaped."""
DATA = b"data:"
EVENT_END = b"\n\n"
HELD_BYTES_MAX = 2**20
"""Of a stream without content. More is passed on: memory for a request is bounded, whatever its server sends."""

Explain = Callable[[Fault], Awaitable[Fault]]
"""vLLM's own error → the error with its cause, as far as it is known."""


class ItemTransfer(msgspec.Struct, kw_only=True):
    """One item's room: rows, rows a round, bytes over the wire, milliseconds from the first grant to the last byte checked."""

    tokens: int
    rounds: tuple[int, ...]
    bytes: int
    transport: str
    transfer_ms: float


class _Choice(msgspec.Struct):
    delta: dict[str, Any] = {}
    finish_reason: str | None = None
    token_ids: list[int] | None = None
    logprobs: Any = None


class _Chunk(msgspec.Struct):
    choices: list[_Choice] = []


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
    """An answer of status 200 from the server ``who``. ``began_s`` is when the request came in, by the monotonic clock;
    ``explain`` finds the cause of an error that comes after content."""

    def __init__(
        self,
        response: httpx.Response,
        passage: ItemsPassage,
        *,
        who: str,
        explain: Explain,
        began_s: float,
        metrics: AppMetrics,
    ) -> None:
        self._response = response
        self._passage = passage
        self._who = who
        self._explain = explain
        self._began_s = began_s
        self._metrics = metrics
        self._parts = response.aiter_raw()
        self._held: deque[bytes] = deque()
        self._tail = bytearray()

    async def begin(self) -> Fault | None:
        """Wait for the first event with content. Returns the fault if an error comes before it: nothing has been passed on by then.
        Raises httpx.HTTPError."""
        held_bytes = 0
        while events := await self._next_events():
            self._held.append(events)
            held_bytes += len(events) + len(EVENT_END)
            for event in events.split(EVENT_END):
                if fault := _error_in(event, who=self._who):
                    return fault
                if _has_content(event):
                    self._passage.ttft_ms = round((time.monotonic() - self._began_s) * 1000, 3)
                    self._metrics.observe(Passage(ttft_ms=self._passage.ttft_ms))
                    return None
            if held_bytes > HELD_BYTES_MAX:
                return None
        return fault_from(502, bytes(self._tail), retry_after=None, who=self._who)

    async def _next_events(self) -> bytes:
        """The next events that have arrived whole, without the end of the last; nothing at the end of the stream."""
        async for part in self._parts:
            seen = max(0, len(self._tail) + 1 - len(EVENT_END))
            self._tail += part
            if (end := self._tail.rfind(EVENT_END, seen)) >= 0:
                events = bytes(self._tail[:end])
                del self._tail[: end + len(EVENT_END)]
                return events
        return b""

    async def aread(self) -> bytes:
        """The whole answer."""
        return self._with_passage(await self._response.aread())

    async def aiter_raw(self) -> AsyncIterator[bytes]:
        """Its events, from the first one on, in whole ones. An error is the last one, with its cause."""
        while whole := self._held.popleft() if self._held else await self._next_events():
            events, fault = self._until_error(whole)
            if events:
                yield self._marked(events) + EVENT_END
            if fault is not None:
                yield (await self._explain(fault)).as_event() + DONE_EVENT
                return
        if self._tail:
            yield bytes(self._tail)

    def _until_error(self, events: bytes) -> tuple[bytes, Fault | None]:
        """The events before the first error, and that error."""
        if b'"error"' not in events:
            return events, None
        before: list[bytes] = []
        for event in events.split(EVENT_END):
            if fault := _error_in(event, who=self._who):
                return EVENT_END.join(before), fault
            before.append(event)
        return events, None

    def _marked(self, events: bytes) -> bytes:
        if not LAST_CHUNK.search(events):
            return events
        return EVENT_END.join(self._with_mark(event) for event in events.split(EVENT_END))

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


def _error_in(event: bytes, *, who: str) -> Fault | None:
    content = event.removeprefix(DATA)
    try:
        error: Any = msgspec.json.decode(content)["error"]
    except (msgspec.MsgspecError, KeyError, TypeError):
        return None
    if not isinstance(error, dict | str):
        return None
    code = error.get("code") if isinstance(error, dict) else None
    status = code if isinstance(code, int) and 400 <= code < 600 else 500
    return fault_from(status, content, retry_after=None, who=who)


def _has_content(event: bytes) -> bool:
    """Whether a choice has a text, reasoning, a tool call, token ids or a finish reason, or the stream ends here."""
    if not event.startswith(DATA):
        return False
    content = event.removeprefix(DATA).strip()
    if content == b"[DONE]":
        return True
    try:
        choices: list[_Choice] = msgspec.json.decode(content, type=_Chunk).choices
    except msgspec.MsgspecError:
        return True  # of no form that is known here: not to be held back
    return any(
        choice.finish_reason
        or choice.token_ids
        or choice.logprobs
        or any(value for name, value in choice.delta.items() if name != "role")
        for choice in choices
    )
