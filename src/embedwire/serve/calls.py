"""A router's calls to its workers: connections that are kept, and waiting that ends when a worker is lost.

Owns the HTTP clients; it must not know what is asked, nor what an answer's status means. On the router's event
loop.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from typing import Any, NoReturn

import anyio
import anyio.to_thread
import httpx
import msgspec

from embedwire.registry import Registry, Worker
from embedwire.serve.attempts import AttemptFailed
from embedwire.serve.faults import Fault, FaultError, fault_from, unreachable
from embedwire.serve.watch import is_refusal

IDLE_CLIENTS_MAX = 64
KEPT_IDLE_S = 2.0
"""How long a connection is kept without a call. Servers hang up in their turn, and a call that is on its way just then is lost:
uvicorn, and so vLLM, does it after 5 s (``VLLM_HTTP_TIMEOUT_KEEP_ALIVE``)."""
RETRIED_STATUS = frozenset({502, 503, 504})
"""What another worker may not answer."""


class WorkerCalls:
    """Calls the workers of ``table``. A connection takes ``connect_timeout_s`` at most; nothing else has a time-out here: the
    request's deadline stands over the rest."""

    def __init__(self, table: Registry, *, connect_timeout_s: float) -> None:
        self._table = table
        self._tls = httpx.create_ssl_context(trust_env=False)
        self._connect_timeout_s = connect_timeout_s
        self._idle: list[httpx.AsyncClient] = []
        self._waiting: dict[anyio.CancelScope, Worker] = {}

    async def post(
        self, worker: Worker, path: str, body: Mapping[str, Any], stack: AsyncExitStack
    ) -> httpx.Response:
        """A response of any status, its body not yet read; ``stack`` closes it. Raises AttemptFailed when there is none."""
        content = await anyio.to_thread.run_sync(msgspec.json.encode, body)
        client = await stack.enter_async_context(self.client())
        try:
            request = client.build_request(
                "POST", worker.url + path, content=content, headers={"content-type": "application/json"}
            )
            with self.waits_for(worker):
                response = await client.send(request, stream=True)
        except (httpx.HTTPError, httpx.InvalidURL, ValueError) as error:
            if not isinstance(error, httpx.HTTPError) or isinstance(
                error, httpx.ConnectError | httpx.ConnectTimeout
            ):
                self._table.missed(worker.url, is_silent=not is_refusal(error))
            raise AttemptFailed(unreachable(named(worker), error), to_blame=worker.url) from None
        stack.push_async_callback(response.aclose)
        return response

    def give_up_on_lost(self) -> None:
        """End the waiting for workers that are not there any more: those that another life has taken the place of, and those that say
        nothing when they are checked, where another one can take over. A process that is frozen takes connections, and answers none; a
        host that is gone says nothing of it. To be called when the table has changed."""
        for scope, worker in self._waiting.items():
            others = self._table.candidates(worker.role, model=worker.model, fingerprint=worker.fingerprint)
            if self._table.is_replaced(worker) or (others and self._table.is_silent(worker.url)):
                scope.cancel()

    @contextmanager
    def waits_for(self, worker: Worker) -> Iterator[None]:
        """Until the worker's answer begins. Raises AttemptFailed when it was given up."""
        with anyio.CancelScope() as scope:
            self._waiting[scope] = worker
            try:
                yield
            finally:
                del self._waiting[scope]
            return
        lost = unreachable(named(worker), TimeoutError("it does not answer its checks, or was started anew"))
        raise AttemptFailed(lost, to_blame=worker.url)

    @asynccontextmanager
    async def client(self) -> AsyncIterator[httpx.AsyncClient]:
        """A client for one call at a time, with the connections that it has kept. One pool for all calls
        would search itself through for each of them: its cost is quadratic in the calls under way."""
        client = self._idle.pop() if self._idle else self._new_client()
        try:
            yield client
        finally:
            if len(self._idle) < IDLE_CLIENTS_MAX:
                self._idle.append(client)
            else:
                await client.aclose()

    def _new_client(self) -> httpx.AsyncClient:
        timeout = httpx.Timeout(None, connect=self._connect_timeout_s)
        limits = httpx.Limits(keepalive_expiry=KEPT_IDLE_S)
        return httpx.AsyncClient(verify=self._tls, timeout=timeout, limits=limits, trust_env=False)

    async def close(self) -> None:
        """Close the connections to workers, when no request is under way any more."""
        while self._idle:
            await self._idle.pop().aclose()


def named(worker: Worker) -> str:
    """A worker in words, for errors."""
    return f"{worker.role} server {worker.url}"


async def read_fault(response: httpx.Response, worker: Worker) -> Fault:
    """What a worker answered instead of 200. Raises AttemptFailed when it broke off."""
    who = named(worker)
    try:
        text = await response.aread()
    except httpx.HTTPError as error:
        raise AttemptFailed(unreachable(who, error), to_blame=worker.url) from None
    return fault_from(response.status_code, text, retry_after=response.headers.get("retry-after"), who=who)


def raise_fault(fault: Fault, worker: Worker, *, final: frozenset[str] = frozenset()) -> NoReturn:
    """Raise AttemptFailed where another worker may do better, else FaultError. ``final`` are codes that end a request, whatever the
    status."""
    if fault.status in RETRIED_STATUS and fault.code not in final:
        raise AttemptFailed(fault, to_blame=worker.url)
    raise FaultError(fault)
