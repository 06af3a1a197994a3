"""Has one media item encoded: by the encoder with the least outstanding tokens, and by another one when that fails.

Owns the choice of an encoder and the call to it; it must not know requests. On the router's event loop.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Collection
from contextlib import AsyncExitStack
from functools import partial

import anyio
import httpx
import msgspec

from embedwire.registry import Registry, Role, Worker
from embedwire.serve.attempts import AttemptFailed, Attempts
from embedwire.serve.calls import WorkerCalls, named, read_fault
from embedwire.serve.faults import Fault, FaultError, unreachable
from embedwire.serve.metrics import AppMetrics
from embedwire.serve.openai import Passage
from embedwire.serve.vllm.items import Encoded, Offered
from embedwire.serve.vllm.request import Item

FIRST_BYTES_A_TOKEN = 256
"""Assumed until the first item of a modality has been encoded."""


class EncoderAnswer(msgspec.Struct):
    """What matters of a producer's completion."""

    ec_transfer_params: dict[str, Offered]


class TokenEstimate:
    """How many tokens an item will have, from its bytes and from what others of its modality had."""

    def __init__(self) -> None:
        self._bytes: Counter[str] = Counter()
        self._tokens: Counter[str] = Counter()

    def of(self, item: Item) -> int:
        """Tokens, at least one."""
        seen = self._tokens[item.modality]
        bytes_a_token = self._bytes[item.modality] / seen if seen else FIRST_BYTES_A_TOKEN
        return max(1, round(item.size_bytes / max(bytes_a_token, 1)))

    def learn(self, item: Item, tokens: int) -> None:
        self._bytes[item.modality] += item.size_bytes
        self._tokens[item.modality] += tokens


class Encoders:
    """The encoders of ``table``. An item is encoded within ``item_deadline_s``, whoever does it in the end."""

    def __init__(
        self,
        table: Registry,
        calls: WorkerCalls,
        *,
        metrics: AppMetrics,
        attempts_max: int,
        item_deadline_s: float,
    ) -> None:
        self._table = table
        self._calls = calls
        self._metrics = metrics
        self._attempts_max = attempts_max
        self._item_deadline_s = item_deadline_s
        self._estimate = TokenEstimate()

    async def encode(self, item: Item, avoid: Collection[str]) -> Encoded:
        """Raises FaultError: what the encoders answered, that there is none, or that it took too long."""
        attempts = Attempts(self._table, attempts_max=self._attempts_max, metrics=self._metrics, avoid=avoid)
        try:
            with anyio.fail_after(self._item_deadline_s):
                async with AsyncExitStack() as stack:
                    return await attempts.run(partial(self._attempt, item, attempts), stack)
        except TimeoutError:
            message = f"no encoder server had encoded the media item within {self._item_deadline_s:g} s"
            raise FaultError(
                Fault(status=504, type="timeout_error", code="deadline", message=message)
            ) from None

    async def _attempt(self, item: Item, attempts: Attempts, _number: int, stack: AsyncExitStack) -> Encoded:
        encoder = attempts.pick(Role.ENCODER, model=item.model)
        began_s = time.monotonic()
        stack.enter_context(self._table.loaded(encoder.url, self._estimate.of(item)))
        response = await self._calls.post(encoder, "/v1/chat/completions", item.encode_body(), stack)
        if response.status_code != 200:
            raise refused(encoder, response.status_code, await read_fault(response, encoder))
        try:
            answer = msgspec.json.decode(await response.aread(), type=EncoderAnswer)
            if not answer.ec_transfer_params:
                raise msgspec.ValidationError("it offers nothing")
        except (httpx.HTTPError, msgspec.MsgspecError) as error:
            raise AttemptFailed(unreachable(named(encoder), error), to_blame=encoder.url) from None
        encoded = Encoded(offered=answer.ec_transfer_params, encoder=encoder.url, at_s=began_s)
        self._estimate.learn(item, encoded.tokens)
        self._metrics.observe(Passage(encode_ms=(time.monotonic() - began_s) * 1000))
        return encoded


def refused(worker: Worker, status: int, fault: Fault) -> AttemptFailed | FaultError:
    """What an answer without success means: below 500 it is the request's fault, and no other worker would help."""
    if status < 500:
        return FaultError(fault)
    if status == 500:
        fault = failed_inside(worker, fault.message)
    return AttemptFailed(fault, to_blame=worker.url)


def failed_inside(worker: Worker, said: str) -> Fault:
    """502: vLLM's bare "Internal server error", with who said it."""
    return Fault(
        status=502,
        type="upstream_error",
        code=f"{worker.role}_failed",
        message=f"{named(worker)} failed: {said}",
    )
