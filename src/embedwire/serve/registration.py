"""Keeps a worker in the registry: says who it is again and again, and says good-bye.

Owns the loop; it must not know what the worker does. A task of the worker app's lifespan runs it, on the
event loop. A registry that is away, or that was restarted and has forgotten everything, costs one interval
and no worker.
"""

from __future__ import annotations

import logging
import random
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass

import anyio
import httpx
import msgspec

from embedwire.errors import ConfigurationError
from embedwire.registry import Worker

log = logging.getLogger(__name__)

GOODBYE_S = 2.0
"""Good-bye is a courtesy: without it the registry's checks find out."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RegistrationTimes:
    """Seconds between two registrations, and the least and the most between two attempts while they fail."""

    interval_s: float = 5.0
    retry_min_s: float = 0.2
    retry_max_s: float = 5.0
    timeout_s: float = 5.0

    def __post_init__(self) -> None:
        if not 0 < self.retry_min_s <= self.retry_max_s or self.interval_s <= 0 or self.timeout_s <= 0:
            raise ConfigurationError(f"times have to be above 0, and retry_min_s <= retry_max_s: {self}")


Leave = Callable[[], Awaitable[None]]


@asynccontextmanager
async def registered(
    registry_url: str | None, worker: Worker, *, times: RegistrationTimes | None = None
) -> AsyncIterator[Leave]:
    """Be in the registry while the block runs, or until what it is given is called; without a registry, do nothing."""
    if registry_url is None:
        yield _do_nothing
        return
    times = times or RegistrationTimes()
    client = httpx.AsyncClient(base_url=registry_url, timeout=times.timeout_s, trust_env=False)
    saying = anyio.CancelScope()

    async def say() -> None:
        with saying:
            await _keep_saying(client, worker, times)

    async def leave() -> None:
        if saying.cancel_called:
            return
        saying.cancel()
        with anyio.move_on_after(GOODBYE_S, shield=True):
            await _say_goodbye(client, worker)

    async with client, anyio.create_task_group() as group:
        group.start_soon(say)
        try:
            yield leave
        finally:
            await leave()


async def _do_nothing() -> None:
    pass


async def _keep_saying(client: httpx.AsyncClient, worker: Worker, times: RegistrationTimes) -> None:
    body = msgspec.json.encode(worker)
    wait_s = times.retry_min_s
    while True:
        try:
            (await client.post("/workers", content=body)).raise_for_status()
        except httpx.HTTPError as error:
            log.warning("registry %s: %s; again in %.1f s", client.base_url, error, wait_s)
            # A registry that comes back is not to be met by all workers in the same instant.
            await anyio.sleep(wait_s * random.uniform(0.75, 1.0))
            wait_s = min(wait_s * 2, times.retry_max_s)
        else:
            wait_s = times.retry_min_s
            await anyio.sleep(times.interval_s)


async def _say_goodbye(client: httpx.AsyncClient, worker: Worker) -> None:
    try:
        await client.delete("/workers", params={"url": worker.url, "incarnation": worker.incarnation})
    except httpx.HTTPError as error:
        log.info("registry %s did not hear the good-bye: %s", client.base_url, error)
