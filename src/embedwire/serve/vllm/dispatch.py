"""One request's way to vLLM servers: its media to encoders, then all of it to a language server, and again when one fails.

Owns attempts and the calls to language servers; it must not know the client's connection. On the router's
event loop.

As long as no content has gone out, a failed attempt is followed by another one. Items that were encoded stay encoded, unless
the failure says otherwise.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AsyncExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import anyio
import anyio.to_thread
import httpx
from anyio.abc import TaskGroup

from embedwire.errors import ConfigurationError
from embedwire.registry import Registry, Role, Worker
from embedwire.serve.attempts import AttemptFailed, Attempts
from embedwire.serve.calls import WorkerCalls, named, read_fault
from embedwire.serve.exchange import Hold
from embedwire.serve.faults import Fault, FaultError, more_telling, unreachable
from embedwire.serve.media import MediaFetcher
from embedwire.serve.metrics import AppMetrics
from embedwire.serve.vllm.answer import Explain, ItemsPassage, VllmAnswer
from embedwire.serve.vllm.encoders import Encoders, failed_inside, refused
from embedwire.serve.vllm.ends import Ends
from embedwire.serve.vllm.failures import Verdict, judge
from embedwire.serve.vllm.items import Encoded, Items
from embedwire.serve.vllm.request import Asked, Item, items_of, language_body


@dataclass(frozen=True, slots=True, kw_only=True)
class VllmLimits:
    """Bounds on one request's way. ``deadline_s`` is from its first byte to the last one of the answer, ``item_deadline_s`` for an
    item to be encoded. ``cause_wait_s`` is how long a failure waits for its cause:
    longer than a connector tries to tell another router first (1 s)."""

    attempts_max: int = 3
    deadline_s: float = 600.0
    item_deadline_s: float = 30.0
    connect_timeout_s: float = 3.0
    cause_wait_s: float = 2.0
    default_max_tokens: int = 256
    """How many tokens a request without a limit counts as, when load is compared."""
    remembered_max: int = 4096
    """Answers of encoders that are kept; 0 keeps none."""

    def __post_init__(self) -> None:
        for name in self.__dataclass_fields__:
            if name != "remembered_max" and getattr(self, name) <= 0:
                raise ConfigurationError(f"{name} is {getattr(self, name)}; it has to be above 0")
        if self.remembered_max < 0:
            raise ConfigurationError(f"remembered_max is {self.remembered_max}; it can not be below 0")


@dataclass(slots=True)
class VllmWay:
    """One request under way."""

    asked: Asked
    began_s: float
    hold: Hold
    total_tokens: int | None = None
    """Of all its media items, once they are encoded."""
    finished: bool = False

    @property
    def stream(self) -> bool:
        return self.asked.stream

    @property
    def facts(self) -> Mapping[str, object]:
        items = len(self.asked.media) or None
        return {"model": self.asked.model, "items": items, "tokens": self.total_tokens}


class VllmDispatch:
    """Sends requests to the workers of ``table``; ``media`` is what the language server gets of an item: its bytes, or only what vLLM
    needs to know of its shape."""

    def __init__(
        self,
        table: Registry,
        *,
        background: TaskGroup,
        metrics: AppMetrics,
        limits: VllmLimits,
        fetcher: MediaFetcher,
        media: Literal["bytes", "metadata"] = "bytes",
    ) -> None:
        self._table = table
        self._metrics = metrics
        self._limits = limits
        self._fetcher = fetcher
        self._media = media
        self.ends = Ends()
        self.calls = WorkerCalls(table, connect_timeout_s=limits.connect_timeout_s)
        encoders = Encoders(
            table,
            self.calls,
            metrics=metrics,
            attempts_max=limits.attempts_max,
            item_deadline_s=limits.item_deadline_s,
        )
        self._items = Items(
            encoders.encode,
            background=background,
            remembered_max=limits.remembered_max,
            is_there=table.has_candidate,
        )

    @contextmanager
    def way(self, asked: Asked, *, began_s: float, hold: Hold) -> Iterator[VllmWay]:
        """A request under way."""
        yield VllmWay(asked, began_s, hold)

    async def open(self, way: VllmWay, stack: AsyncExitStack) -> VllmAnswer:
        """A language server's answer, which, if it streams, has begun to have content. What it holds is given back by ``stack``.

        Raises FaultError: what a worker answered, the cause of a transfer's end, or that nobody is there; MediaError.
        """
        attempts = Attempts(self._table, attempts_max=self._limits.attempts_max, metrics=self._metrics)
        attempts.pick(Role.LANGUAGE, model=way.asked.model)  # nothing is encoded if no server can answer
        items = await self._fetch(way)
        return await attempts.run(partial(self._attempt, way, items, attempts), stack)

    async def _fetch(self, way: VllmWay) -> list[Item]:
        contents = await self._fetcher.fetch_all({media.place: media.url for media in way.asked.media})
        way.hold(sum(map(len, contents)))
        return await anyio.to_thread.run_sync(items_of, way.asked, contents)

    async def _attempt(
        self, way: VllmWay, items: Sequence[Item], attempts: Attempts, _number: int, stack: AsyncExitStack
    ) -> VllmAnswer:
        began_s = time.monotonic()
        encoded = await self._encode(items, attempts)
        passage = _passage(encoded, encode_ms=(time.monotonic() - began_s) * 1000)
        way.total_tokens = passage.total_tokens or None
        language = attempts.pick(Role.LANGUAGE, model=way.asked.model)
        stack.enter_context(self._table.loaded(language.url, passage.total_tokens + self._max_tokens(way)))
        ticket = stack.enter_context(self.ends.ticket())

        async def verdict_on(said: Fault) -> Verdict:
            """Why vLLM failed the request, as far as its connector reports it. What is lost is forgotten."""
            if not items:  # what kills an engine would kill the next one too
                return Verdict(fault=said, is_final=True)
            end = await self.ends.wait(ticket, within_s=self._limits.cause_wait_s)
            verdict = judge(said, end, encoded, language_url=language.url, began_s=began_s)
            self._forget(verdict)
            return verdict

        async def explain(said: Fault) -> Fault:
            if said.status != 500:
                return said
            return (await verdict_on(failed_inside(language, said.message))).fault

        transfer = {"ticket": ticket, "items": _whereabouts(encoded)} if items else None
        body = language_body(way.asked, self._parts(items, encoded), transfer)
        answer = await self._ask(language, body, way, passage, explain, stack)
        if isinstance(answer, VllmAnswer):
            return answer
        verdict = await verdict_on(answer)
        if verdict.is_final:
            raise FaultError(verdict.fault)
        raise AttemptFailed(verdict.fault, to_blame=verdict.to_blame, doubted=verdict.doubted)

    async def _ask(
        self,
        language: Worker,
        body: dict[str, Any],
        way: VllmWay,
        passage: ItemsPassage,
        explain: Explain,
        stack: AsyncExitStack,
    ) -> VllmAnswer | Fault:
        """The answer, or what vLLM said that may have a cause of ours. Raises FaultError and AttemptFailed for all else."""
        response = await self.calls.post(language, "/v1/chat/completions", body, stack)
        who = named(language)
        if response.status_code == 500:
            return failed_inside(language, (await read_fault(response, language)).message)
        if response.status_code != 200:
            raise refused(language, response.status_code, await read_fault(response, language))
        answer = VllmAnswer(
            response, passage, who=who, explain=explain, began_s=way.began_s, metrics=self._metrics
        )
        if not way.stream:
            return answer
        try:
            with self.calls.waits_for(language):
                fault = await answer.begin()
        except httpx.HTTPError as error:
            raise AttemptFailed(unreachable(who, error), to_blame=language.url) from None
        if fault is None:
            return answer
        if fault.status == 500:
            return failed_inside(language, fault.message)
        raise refused(language, fault.status, fault)

    async def _encode(self, items: Sequence[Item], attempts: Attempts) -> list[Encoded]:
        """All items at once; of equal ones, one. Raises FaultError: the first one's."""
        found: dict[bytes, Encoded] = {}
        faults: list[FaultError] = []

        async def get(item: Item) -> None:
            try:
                found[item.key] = await self._items.get(item, avoid=attempts.failed)
            except FaultError as error:
                faults.append(error)
                group.cancel_scope.cancel()

        async with anyio.create_task_group() as group:
            for item in {item.key: item for item in items}.values():
                group.start_soon(get, item)
        if faults:
            raise FaultError(more_telling(attempts.fault, faults[0].fault))
        return [found[item.key] for item in items]

    def _parts(self, items: Sequence[Item], encoded: Sequence[Encoded]) -> list[Any]:
        if self._media == "bytes":
            return [item.part for item in items]
        return [_metadata_part(item, answer) for item, answer in zip(items, encoded, strict=True)]

    def _forget(self, verdict: Verdict) -> None:
        """Items that are lost are encoded again for the next request that needs them."""
        self._items.forget(verdict.lost)
        if verdict.lost_encoder:
            self._items.forget_encoder(verdict.lost_encoder)

    def _max_tokens(self, way: VllmWay) -> int:
        for name in ("max_completion_tokens", "max_tokens"):
            if isinstance(tokens := way.asked.raw.get(name), int):
                return max(0, tokens)
        return self._limits.default_max_tokens


def _passage(encoded: Sequence[Encoded], *, encode_ms: float) -> ItemsPassage:
    if not encoded:
        return ItemsPassage()
    return ItemsPassage(
        encoders=tuple(dict.fromkeys(answer.encoder for answer in encoded)),
        items=len(encoded),
        total_tokens=sum(answer.tokens for answer in encoded),
        encode_ms=round(encode_ms, 3),
    )


def _whereabouts(encoded: Sequence[Encoded]) -> dict[str, dict[str, Any]]:
    return {
        name: {"addresses": entry.addresses, "tokens": entry.tokens}
        for answer in encoded
        for name, entry in answer.offered.items()
    }


def _metadata_part(item: Item, answer: Encoded) -> dict[str, Any]:
    """Instead of the media, what vLLM has to know of it. Raises FaultError where the encoder did not say."""
    entry, *others = answer.offered.values()
    if others or not entry.metadata:
        message = f"encoder server {answer.encoder} told no metadata of a media item"
        raise FaultError(
            Fault(status=502, type="upstream_error", code="bad_upstream_answer", message=message)
        )
    kind = f"{item.modality}_embeds"
    return {"type": kind, kind: entry.metadata, "uuid": item.uuid}
