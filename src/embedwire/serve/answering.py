"""One answer of a language server: from the engine's threads to the event loop, and into OpenAI's words.

Owns the bridge between the two and the end of the job, however the request ends; it must not know HTTP.
Callbacks arrive on foreign threads and only pass on; everything else is on the event loop.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any, Protocol

import anyio
import anyio.to_thread

from embedwire.errors import EmbedwireError, InvalidRequestError
from embedwire.language.interface import Delta, SamplingParams, TransferReport
from embedwire.serve.faults import Fault, FaultError, fault_of
from embedwire.serve.openai import (
    DONE_EVENT,
    AnswerWriter,
    ChatRequest,
    Passage,
    RoomRequest,
    plain_messages,
    usage_of,
)


class Job(Protocol):
    """An answer under way in the service. ``prompt_tokens`` of a room's job is known with its report."""

    def cancel(self) -> None: ...


class TextJob(Job, Protocol):
    @property
    def prompt_tokens(self) -> int: ...


class LanguageService(Protocol):
    """What is asked of :class:`embedwire.language.service.LanguageService`. Both calls may block a moment."""

    def generate_text(
        self,
        messages: Sequence[Mapping[str, Any]],
        sampling: SamplingParams,
        *,
        on_delta: Callable[[Delta], None],
        on_error: Callable[[EmbedwireError], None],
    ) -> TextJob: ...

    def generate_room(
        self,
        room: int,
        addresses: Sequence[str],
        sampling: SamplingParams,
        *,
        attempt: int = 0,
        on_report: Callable[[TransferReport, int], None],
        on_delta: Callable[[Delta], None],
        on_error: Callable[[EmbedwireError], None],
    ) -> Job: ...


Asked = ChatRequest | RoomRequest
Event = tuple[TransferReport, int] | Delta | EmbedwireError


class Answer:
    """What one request gets. ``begin`` once, then ``next`` until a delta has a finish reason, then ``close``,
    always."""

    def __init__(
        self, service: LanguageService, asked: Asked, *, began_s: float, default_max_tokens: int
    ) -> None:
        self._service = service
        self._asked = asked
        self._sampling = asked.sampling(default_max_tokens)
        self._loop = asyncio.get_running_loop()
        self._events: asyncio.Queue[Event] = asyncio.Queue()
        self._job: Job | None = None
        self._ended = False
        self._is_complete = False
        self._began_s = began_s
        self._prompt_tokens = 0
        self._completion_tokens = 0
        self.passage = Passage()

    @property
    def usage(self) -> dict[str, int]:
        """So far."""
        return usage_of(self._prompt_tokens, self._completion_tokens)

    @property
    def facts(self) -> Mapping[str, object]:
        """For the log."""
        ref = self._asked.embedwire_room if isinstance(self._asked, RoomRequest) else None
        return {
            "model": self._asked.model,
            "room": ref and ref.room,
            "attempt": ref and ref.attempt,
            "prompt_tokens": self._prompt_tokens,
            "completion_tokens": self._completion_tokens,
            "complete": self._is_complete,
        }

    async def begin(self) -> Delta:
        """Start the job and wait for its first delta, so that a failure before it can still have a status of
        its own.

        Raises what the service raises or reports: any EmbedwireError.
        """
        await anyio.to_thread.run_sync(self._start)
        first = await self.next()
        elapsed_ms = self._asked.embedwire_room.elapsed_ms if isinstance(self._asked, RoomRequest) else 0.0
        self.passage.ttft_ms = round(elapsed_ms + (time.monotonic() - self._began_s) * 1000, 3)
        return first

    async def next(self) -> Delta:
        """The next delta. Raises EmbedwireError when there is none, because the room or the generation
        failed."""
        while True:
            happened = await self._events.get()
            match happened:
                case Delta():
                    self._ended = happened.finish_reason is not None
                    _raise_failed(happened)
                    self._is_complete = self._ended
                    self._completion_tokens += len(happened.token_ids)
                    return happened
                case EmbedwireError():
                    self._ended = True
                    raise happened
                case report, prompt_tokens:
                    self._prompt_tokens = prompt_tokens
                    self._describe(report)

    async def close(self) -> None:
        """End the job if it still runs."""
        if self._job is None or self._ended:
            return
        self._ended = True
        with anyio.CancelScope(shield=True):
            await anyio.to_thread.run_sync(self._job.cancel)

    def _start(self) -> None:
        """On a worker thread. The job is kept from here, since whoever awaits this may be cancelled
        meanwhile."""
        match self._asked:
            case RoomRequest(embedwire_room=ref):
                self._job = self._service.generate_room(
                    ref.room,
                    ref.control_addresses,
                    self._sampling,
                    attempt=ref.attempt,
                    on_report=lambda report, prompt_tokens: self._put((report, prompt_tokens)),
                    on_delta=self._put,
                    on_error=self._put,
                )
            case ChatRequest(messages=messages):
                plain, urls = plain_messages(messages)
                if urls:
                    raise InvalidRequestError(
                        "a language server takes no media: ask a router",
                        code="media_not_served",
                        param=next(iter(urls)),
                    )
                job = self._service.generate_text(
                    plain, self._sampling, on_delta=self._put, on_error=self._put
                )
                self._job, self._prompt_tokens = job, job.prompt_tokens

    def _put(self, happened: Event) -> None:
        """On any thread."""
        with suppress(RuntimeError):  # the loop is closed: nobody listens any more
            self._loop.call_soon_threadsafe(self._events.put_nowait, happened)

    def _describe(self, report: TransferReport) -> None:
        assert isinstance(self._asked, RoomRequest)
        self.passage = Passage(
            room=report.room,
            encoder=self._asked.embedwire_room.encoder,
            transport=report.transport,
            total_tokens=report.total_tokens,
            rounds=tuple(report.rounds),
            bytes=report.bytes,
            wire_bytes=report.wire_bytes,
            ranks=report.ranks,
            delivery=report.delivery,
            encode_ms=round(report.encode_ms, 3),
            transfer_ms=round(report.transfer_ms, 3),
        )


async def completion(answer: Answer, first: Delta, writer: AnswerWriter) -> bytes:
    """The whole answer as JSON. Raises EmbedwireError."""
    deltas = [first]
    while deltas[-1].finish_reason is None:
        deltas.append(await answer.next())
    assert deltas[-1].finish_reason is not None
    return writer.completion(
        "".join(d.text for d in deltas),
        finish_reason=deltas[-1].finish_reason,
        token_ids=[i for d in deltas for i in d.token_ids],
        usage=answer.usage,
        passage=answer.passage,
    )


async def chunks(
    answer: Answer, first: Delta, writer: AnswerWriter, *, include_usage: bool
) -> AsyncIterator[bytes]:
    """The answer as events. A failure is an event too: the status has gone out."""
    delta, role = first, {"role": "assistant"}
    while delta.finish_reason is None:
        if delta.text or writer.with_token_ids:
            yield writer.chunk(role | {"content": delta.text}, token_ids=delta.token_ids)
            role = {}
        try:
            delta = await answer.next()
        except EmbedwireError as error:
            yield fault_of(error).as_event()
            yield DONE_EVENT
            return
    extra = {} if include_usage else {"embedwire": answer.passage}
    content = role | ({"content": delta.text} if delta.text or role else {})
    yield writer.chunk(content, finish_reason=delta.finish_reason, token_ids=delta.token_ids, **extra)
    if include_usage:
        yield writer.usage_chunk(answer.usage, answer.passage)
    yield DONE_EVENT


def _raise_failed(delta: Delta) -> None:
    if delta.finish_reason == "error":
        message = f"the generation failed: {delta.error or 'no cause was given'}"
        raise FaultError(Fault(status=500, type="server_error", code="generation_failed", message=message))
    if delta.finish_reason == "cancelled":
        message = "the generation was ended by the server"
        raise FaultError(Fault(status=503, type="server_error", code="cancelled", message=message))
