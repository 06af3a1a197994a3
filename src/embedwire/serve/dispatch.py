"""One request's way through the router: a room, an encoder, a language server, and others when these fail.

Owns the choice of workers and the calls to them; it must not know the client's connection. On the router's
event loop.

As long as no token has gone out, a failed attempt is followed by another one on workers that have not failed
this request, under the same room and the next attempt number. The language server answers with a status only
when it has its first token, so whatever fails before that shows here as a status.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Iterator, Mapping
from contextlib import AsyncExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

import httpx
import msgspec
from anyio.abc import TaskGroup

from embedwire.errors import ConfigurationError
from embedwire.limits import ROOM_MAX
from embedwire.registry import Registry, Role, Worker
from embedwire.serve.attempts import AttemptFailed, Attempts
from embedwire.serve.calls import WorkerCalls, raise_fault, read_fault
from embedwire.serve.faults import unreachable
from embedwire.serve.metrics import AppMetrics
from embedwire.serve.openai import ChatRequest, RoomRef, plain_messages

NOT_RETRIED_CODES = frozenset({"aborted"})


@dataclass(frozen=True, slots=True, kw_only=True)
class DispatchLimits:
    """Bounds on one request's way. ``deadline_s`` is from its first byte to the last one of the answer."""

    attempts_max: int = 3
    deadline_s: float = 600.0
    connect_timeout_s: float = 3.0
    abort_timeout_s: float = 5.0
    default_max_tokens: int = 256
    """How many tokens a request without a limit counts as, when load is compared."""

    def __post_init__(self) -> None:
        for name in self.__dataclass_fields__:
            if getattr(self, name) <= 0:
                raise ConfigurationError(f"{name} is {getattr(self, name)}; it has to be above 0")


@dataclass(slots=True)
class Way:
    """One request under way. ``held`` is the encoder and the attempt that hold memory for it, ``total_tokens`` what that encoder
    announced; ``finished`` is set when the answer is complete, so that there is nothing to abort."""

    raw: Mapping[str, Any]
    asked: ChatRequest
    media: int
    began_s: float
    room: int
    held: tuple[Worker, int] | None = None
    total_tokens: int | None = None
    finished: bool = False

    @property
    def stream(self) -> bool:
        return bool(self.asked.stream)

    @property
    def facts(self) -> Mapping[str, object]:
        room = self.room if self.media else None
        return {"model": self.asked.model, "room": room, "tokens": self.total_tokens}


class TakenUp(msgspec.Struct):
    """An encoder's answer to POST /encode."""

    total_tokens: int
    control_addresses: tuple[str, ...]


class Dispatch:
    """Sends requests to the workers of ``table``. Aborts run in ``background``, so that nobody waits for a
    dead encoder."""

    def __init__(
        self,
        table: Registry,
        *,
        background: TaskGroup,
        metrics: AppMetrics,
        limits: DispatchLimits,
    ) -> None:
        self._table = table
        self.calls = WorkerCalls(table, connect_timeout_s=limits.connect_timeout_s)
        self._background = background
        self._metrics = metrics
        self._limits = limits
        self._rooms: set[int] = set()

    @contextmanager
    def way(self, raw: Mapping[str, Any], asked: ChatRequest, *, began_s: float) -> Iterator[Way]:
        """A request and its room, which is nobody else's while the block runs."""
        while (room := 1 + secrets.randbelow(ROOM_MAX)) in self._rooms:
            pass
        self._rooms.add(room)
        way = Way(raw, asked, len(plain_messages(asked.messages)[1]), began_s, room)
        try:
            yield way
        finally:
            self._rooms.remove(room)
            if way.held and not way.finished:
                self._background.start_soon(self._abort, room, *way.held)

    async def open(self, way: Way, stack: AsyncExitStack) -> httpx.Response:
        """A language server's answer, status 200, its body not yet read. What it holds is given back by
        ``stack``.

        Raises FaultError: what a worker answered, or that there is none.
        """
        attempts = Attempts(self._table, attempts_max=self._limits.attempts_max, metrics=self._metrics)
        return await attempts.run(
            partial(self._attempt, way, attempts),
            stack,
            after_failure=partial(self._let_go, way, attempts),
        )

    async def _attempt(
        self, way: Way, attempts: Attempts, number: int, stack: AsyncExitStack
    ) -> httpx.Response:
        language = attempts.pick(Role.LANGUAGE, model=way.asked.model)
        tokens = way.asked.max_completion_tokens or way.asked.max_tokens or self._limits.default_max_tokens
        stack.enter_context(self._table.loaded(language.url, tokens))
        if not way.media:
            return await self._post(language, "/v1/chat/completions", way.raw, stack)
        encoder = attempts.pick(Role.ENCODER, model=way.asked.model, fingerprint=language.fingerprint)
        with self._table.loaded(encoder.url, way.media):  # its room is over when the answer begins
            way.held = encoder, number
            taken = await self._encode(way, number, encoder, readers=language.readers)
            way.total_tokens = taken.total_tokens
            stack.enter_context(self._table.loaded(language.url, taken.total_tokens))
            room = RoomRef(
                room=way.room,
                attempt=number,
                control_addresses=taken.control_addresses,
                encoder=encoder.url,
                elapsed_ms=(time.monotonic() - way.began_s) * 1000,
            )
            body = {name: value for name, value in way.raw.items() if name != "messages"}
            try:
                return await self._post(
                    language, "/v1/chat/completions", body | {"embedwire_room": room}, stack
                )
            except AttemptFailed as failure:
                if failure.fault.type == "transfer_error":
                    failure.to_blame = encoder.url  # the language server only reports it
                raise

    async def _let_go(self, way: Way, attempts: Attempts) -> None:
        """End the room of an attempt that failed: at once where the next attempt may come to the same
        encoder."""
        if way.held is None:
            return
        encoder, attempt = way.held
        if encoder.url in attempts.failed:
            self._background.start_soon(self._abort, way.room, encoder, attempt)
        else:
            await self._abort(way.room, encoder, attempt)
        way.held = None

    async def _encode(self, way: Way, attempt: int, encoder: Worker, *, readers: int) -> TakenUp:
        body = {
            "room": way.room,
            "attempt": attempt,
            "readers": readers,
            "messages": way.raw["messages"],
        }
        async with AsyncExitStack() as stack:
            response = await self._post(encoder, "/encode", body, stack)
            try:
                return msgspec.json.decode(await response.aread(), type=TakenUp)
            except (httpx.HTTPError, msgspec.MsgspecError) as error:
                fault = unreachable(f"encoder {encoder.url}", error)
                raise AttemptFailed(fault, to_blame=encoder.url) from None

    async def _post(
        self, worker: Worker, path: str, body: Mapping[str, Any], stack: AsyncExitStack
    ) -> httpx.Response:
        """A response with status 200, not yet read; ``stack`` closes it. Raises AttemptFailed, or FaultError
        when another worker would not help."""
        response = await self.calls.post(worker, path, body, stack)
        if response.status_code != 200:
            raise_fault(await read_fault(response, worker), worker, final=NOT_RETRIED_CODES)
        return response

    async def _abort(self, room: int, encoder: Worker, attempt: int) -> None:
        url, timeout_s = f"{encoder.url}/rooms/{room}", self._limits.abort_timeout_s
        with suppress(Exception):  # a room that nobody reads ends by its own deadline too
            async with self.calls.client() as client:
                await client.delete(url, params={"attempt": attempt}, timeout=timeout_s)
