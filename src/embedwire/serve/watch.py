"""Keeps a table of workers true: checks their health, or follows a registry that does.

Owns the loops that fill a :class:`~embedwire.registry.Registry`; it must not know requests. Tasks of the
lifespan of the registry's app and of the router's app run it, on the event loop, which owns the table.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Awaitable, Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Literal

import anyio
import httpx
import msgspec

from embedwire.errors import ConfigurationError, OverloadedError
from embedwire.registry import Registry, Role, Worker

log = logging.getLogger(__name__)
CHECKS_MAX = 256
"""At a time, each a connection."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WatchTimes:
    """Seconds between two checks, and how long one may take."""

    interval_s: float = 2.0
    timeout_s: float = 2.0

    def __post_init__(self) -> None:
        if self.interval_s <= 0 or self.timeout_s <= 0:
            raise ConfigurationError(f"times have to be above 0: {self}")


class Health(msgspec.Struct):
    """A worker's answer to GET /health."""

    worker: Worker


class Listing(msgspec.Struct):
    """One line of a registry's answer to GET /workers."""

    worker: Worker
    candidate: bool
    silent: bool = True


class Listings(msgspec.Struct):
    workers: list[Listing]


class Model(msgspec.Struct):
    """One of those that a vLLM server names at GET /v1/models."""

    id: str


class Models(msgspec.Struct):
    data: list[Model]


def checking_client(times: WatchTimes) -> httpx.AsyncClient:
    """For checks. One that has to wait for a connection, since so many others get no answer, has not failed."""
    return httpx.AsyncClient(
        timeout=httpx.Timeout(times.timeout_s, pool=None),
        limits=httpx.Limits(max_connections=CHECKS_MAX),
        trust_env=False,
    )


async def every(interval_s: float, step: Callable[[], Awaitable[None]]) -> None:
    """Run ``step`` for ever. A step that fails is logged, and does not end the loop."""
    while True:
        try:
            await step()
        except Exception:
            log.exception("a background step failed; it goes on")
        await anyio.sleep(interval_s)


async def check_workers(
    table: Registry, client: httpx.AsyncClient, *, static_urls: Collection[str] = ()
) -> None:
    """Ask every worker of the table, and those at ``static_urls``, for its health, all at once."""
    async with anyio.create_task_group() as group:
        foreign = {e.worker.url: e.worker.role for e in table if e.worker.engine == "vllm"}
        for url in dict.fromkeys((*(e.worker.url for e in table), *static_urls)):
            if url not in foreign:
                group.start_soon(_check, table, client, url, url in static_urls)
        for url, role in foreign.items():
            group.start_soon(_check_vllm, table, client, url, role, False)
    table.forget_silent(now=time.monotonic())


async def check_vllm_workers(table: Registry, client: httpx.AsyncClient, roles: Mapping[str, Role]) -> None:
    """Ask stock vLLM servers, by URL, for their health and their model, all at once."""
    async with anyio.create_task_group() as group:
        for url, role in roles.items():
            group.start_soon(_check_vllm, table, client, url, role, True)


async def follow_registry(
    table: Registry,
    client: httpx.AsyncClient,
    registry_url: str,
    *,
    engine: Literal["embedwire", "vllm"] = "embedwire",
) -> None:
    """Make the table hold the registry's candidates of one engine. While the registry is away the table stays as it is."""
    try:
        answer = (await client.get(f"{registry_url}/workers")).raise_for_status()
        found = msgspec.json.decode(answer.content, type=Listings).workers
    except (httpx.HTTPError, msgspec.MsgspecError) as error:
        log.warning("registry %s: %s", registry_url, error)
        return
    listed = [listing for listing in found if listing.worker.engine == engine]
    now = time.monotonic()
    for listing in listed:
        table.register(listing.worker, now=now)
        if listing.candidate:
            table.answered(listing.worker.url, now=now)
        else:
            table.evicted(listing.worker.url, is_silent=listing.silent)
    for gone in {e.worker.url for e in table} - {line.worker.url for line in listed}:
        table.remove(gone)


async def _check(table: Registry, client: httpx.AsyncClient, url: str, is_static: bool) -> None:
    try:
        answer = (await client.get(f"{url}/health")).raise_for_status()
        worker = msgspec.json.decode(answer.content, type=Health).worker
    except Exception as error:  # whatever it is: the other checks go on
        log.info("worker %s: %s", url, error)
        table.missed(url, is_silent=not is_refusal(error))
        return
    # It may say another name of itself than the one it was asked by: this is the one it can be reached by.
    _enter(table, msgspec.structs.replace(worker, url=url), is_static=is_static)


async def _check_vllm(
    table: Registry, client: httpx.AsyncClient, url: str, role: Role, is_static: bool
) -> None:
    """Its health is a bare status (503 once its engine has died); its first model is the one it serves."""
    try:
        (await client.get(f"{url}/health")).raise_for_status()
        answer = (await client.get(f"{url}/v1/models")).raise_for_status()
        model = msgspec.json.decode(answer.content, type=Models).data[0].id
    except Exception as error:
        log.info("vLLM server %s: %s", url, error)
        table.missed(url, is_silent=not is_refusal(error))
        return
    _enter(
        table,
        Worker(role=role, url=url, model=model, fingerprint="vllm", incarnation=1, engine="vllm"),
        is_static=is_static,
    )


def is_refusal(error: BaseException | None) -> bool:
    """Whether there is a host, and nobody listens at that port. A name may have several addresses."""
    if error is None or isinstance(error, ConnectionRefusedError):
        return error is not None
    if isinstance(error, BaseExceptionGroup):
        return any(map(is_refusal, error.exceptions))
    return is_refusal(error.__cause__ or error.__context__)


def _enter(table: Registry, worker: Worker, *, is_static: bool) -> None:
    """One that is not ``is_static`` may have said good-bye while it was asked."""
    if not is_static and worker.url not in table:
        return
    now = time.monotonic()
    try:
        table.register(worker, now=now)
        table.answered(worker.url, now=now)
    except OverloadedError as error:
        log.warning("worker %s: %s", worker.url, error)
