"""Registration, health checks, and a registry or a worker that goes away and comes back."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import anyio
import httpx
import msgspec
import pytest
from fastapi.testclient import TestClient

from embedwire.errors import ConfigurationError
from embedwire.memory.layout import multimodal
from embedwire.registry import Registry, Role, Worker
from embedwire.serve.metrics import AppMetrics
from embedwire.serve.registration import RegistrationTimes
from embedwire.serve.run import AppServer
from embedwire.serve.watch import (
    WatchTimes,
    check_workers,
    checking_client,
    every,
    follow_registry,
    is_refusal,
)
from embedwire.serve.worker_app import Identity, RegistryLink, worker_app

WAIT_S = 20.0
FAST = RegistrationTimes(interval_s=0.02, retry_min_s=0.02, retry_max_s=0.05)
NEVER = WatchTimes(interval_s=3600)


class Watched(Registry):
    """Tells when it hears from a worker."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.heard = threading.Event()
        self.count = 0

    def register(self, worker: Worker, *, now: float) -> None:
        super().register(worker, now=now)
        self.count += 1
        self.heard.set()


def listed(url: str) -> list[dict[str, Any]]:
    workers: list[dict[str, Any]] = httpx.get(f"{url}/workers").json()["workers"]
    return workers


def test_a_worker_registers_itself_and_says_goodbye(cluster: Any) -> None:
    table = Watched()
    registry = cluster.add_registry(table, times=NEVER)
    link = RegistryLink(url=registry.url, times=FAST)
    double, encoder = cluster.add_encoder(registry=link)
    assert table.heard.wait(WAIT_S)
    (line,) = listed(registry.url)
    assert line["candidate"]
    assert line["worker"]["url"] == encoder.url
    assert line["worker"]["control_addresses"] == [double.address]
    assert line["worker"] == httpx.get(f"{encoder.url}/health").json()["worker"]
    encoder.stop()
    for _ in range(500):
        if not listed(registry.url):
            break
    else:
        pytest.fail("it did not say good-bye")


@pytest.mark.parametrize("has_registry", [True, False])
def test_who_is_told_to_end_ends_what_it_has_begun(cluster: Any, chat: Any, has_registry: bool) -> None:
    """It has taken its leave by then, or refuses connections, and is not taken for one that is frozen: no answer is begun twice."""
    fast = WatchTimes(interval_s=0.05)
    registry = cluster.add_registry(times=fast)
    link = {"registry": RegistryLink(url=registry.url, times=FAST)} if has_registry else {}
    languages = [
        cluster.add_language(steps=threading.Semaphore(0), shutdown_s=WAIT_S, **link) for _ in range(2)
    ]
    known = {"registry_url": registry.url} if has_registry else {}
    router = cluster.add_router(
        *([] if has_registry else [s for _, s in languages]), watch=fast, misses_to_evict=1, **known
    )
    health = f"{router.url}/health"
    wait(lambda: httpx.get(health).json()["workers"].get("language") == 2)
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(
            httpx.post, f"{router.url}/v1/chat/completions", json=chat("a b c"), timeout=WAIT_S
        )
        wait(lambda: any(language.samplings for language, _ in languages))
        (busy, server), (idle, _) = sorted(languages, key=lambda one: not one[0].samplings)
        server.stop()
        wait(lambda: httpx.get(health).json()["workers"].get("language") == 1)
        time.sleep(5 * fast.interval_s)
        busy.steps.release(3)
        assert answer.result().status_code == 200
    assert not idle.samplings


def wait(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + WAIT_S
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_an_address_that_nobody_can_reach_is_not_registered() -> None:
    app = worker_app(
        Identity(role=Role.LANGUAGE, model="m", layout=multimodal(8)),
        AppMetrics(),
        registry=RegistryLink(url="http://registry"),
    )
    server = AppServer(app, host="0.0.0.0")
    with pytest.raises(ConfigurationError, match="advertise_host"), TestClient(app):
        pass
    server.close()


def test_heartbeats_are_one_entry(cluster: Any) -> None:
    table = Watched()
    registry = cluster.add_registry(table, times=NEVER)
    cluster.add_language(registry=RegistryLink(url=registry.url, times=FAST))
    for _ in range(3):
        table.heard.clear()
        assert table.heard.wait(WAIT_S)
    assert len(listed(registry.url)) == 1


@pytest.mark.failure_mode("restart-on-same-address")
def test_a_restarted_registry_learns_its_workers_again(cluster: Any) -> None:
    """After a restart on the same port the registry gets its workers back."""
    first, second = Watched(), Watched()
    registry = cluster.add_registry(first, times=NEVER)
    _, language = cluster.add_language(registry=RegistryLink(url=registry.url, times=FAST))
    assert first.heard.wait(WAIT_S)
    port = int(registry.url.rpartition(":")[2])
    registry.stop()
    assert registry.wait_stopped(WAIT_S)
    again = cluster.add_registry(second, port=port, times=NEVER)
    assert second.heard.wait(WAIT_S)
    assert [line["worker"]["url"] for line in listed(again.url)] == [language.url]


def test_what_is_no_worker_is_refused(cluster: Any) -> None:
    registry = cluster.add_registry(times=NEVER)
    good = Worker(role=Role.ENCODER, url="http://a:1", model="m", fingerprint="f", incarnation=1)
    for change, param in (
        ({"role": "router"}, "role"),
        ({"url": "a"}, "url"),
        ({"incarnation": 0}, "incarnation"),
    ):
        body = msgspec.json.encode(msgspec.to_builtins(good) | change)
        answer = httpx.post(f"{registry.url}/workers", content=body)
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, param)
    assert httpx.post(f"{registry.url}/workers", content=b"{").status_code == 400
    assert httpx.delete(f"{registry.url}/workers", params={"url": "x", "incarnation": "y"}).status_code == 400
    assert httpx.get(f"{registry.url}/health").json() == {"status": "ok", "workers": 0}


def test_goodbye_of_an_old_life_is_not_heard(cluster: Any) -> None:
    registry = cluster.add_registry(times=NEVER)
    worker = Worker(role=Role.ENCODER, url="http://a:1", model="m", fingerprint="f", incarnation=2)
    httpx.post(f"{registry.url}/workers", content=msgspec.json.encode(worker))

    def goodbye(incarnation: int) -> bool:
        params: dict[str, Any] = {"url": worker.url, "incarnation": incarnation}
        removed: bool = httpx.delete(f"{registry.url}/workers", params=params).json()["removed"]
        return removed

    assert [goodbye(1), goodbye(2), goodbye(2)] == [False, True, False]


@pytest.mark.failure_mode("restart-on-same-address", "one-failure-shuts-peer-out")
@pytest.mark.anyio
async def test_evicted_after_missed_checks_and_back_after_one(cluster: Any) -> None:
    """A dead worker is evicted, and used again after one successful check."""
    table = Registry(misses_to_evict=2)
    _, encoder = cluster.add_encoder()
    port = int(encoder.url.rpartition(":")[2])
    async with httpx.AsyncClient(timeout=WAIT_S) as client:
        await check_workers(table, client, static_urls=[encoder.url])
        (first,) = table.candidates(Role.ENCODER)
        encoder.stop()
        assert encoder.wait_stopped(WAIT_S)
        await check_workers(table, client)
        assert table.candidates(Role.ENCODER) == [first]
        await check_workers(table, client)
        assert table.candidates(Role.ENCODER) == []
        cluster.add_encoder(port=port)
        await check_workers(table, client)
        (second,) = table.candidates(Role.ENCODER)
        assert second.url == first.url
        assert second.incarnation != first.incarnation


@pytest.mark.anyio
async def test_a_check_needs_a_worker_at_the_other_end(cluster: Any) -> None:
    registry = cluster.add_registry(times=NEVER)
    table = Registry()
    async with httpx.AsyncClient(timeout=WAIT_S) as client:
        await check_workers(table, client, static_urls=[registry.url])
    assert len(table) == 0


@pytest.mark.anyio
async def test_a_check_that_fails_oddly_is_a_check_that_fails() -> None:
    """It takes no other one with it, and is no reason to keep that worker."""
    odd, well = (
        Worker(role=Role.ENCODER, url=f"http://{n}:1", model="m", fingerprint="f", incarnation=1)
        for n in ("odd", "well")
    )

    def answer(request: httpx.Request) -> httpx.Response:
        if request.url.host == "odd":
            raise OverflowError("injected")
        return httpx.Response(200, json={"worker": msgspec.to_builtins(well)})

    table = Registry(misses_to_evict=1)
    for worker in (odd, well):
        table.register(worker, now=0.0)
    table.missed(well.url)
    async with httpx.AsyncClient(transport=httpx.MockTransport(answer)) as client:
        await check_workers(table, client)
    assert table.candidates(Role.ENCODER) == [well]


@pytest.mark.anyio
async def test_who_said_goodbye_while_it_was_asked_is_gone() -> None:
    """The answer to a check does not bring it back."""
    worker = Worker(role=Role.ENCODER, url="http://a:1", model="m", fingerprint="f", incarnation=1)
    table = Registry()
    table.register(worker, now=0.0)

    def answer(request: httpx.Request) -> httpx.Response:
        table.remove(worker.url)
        return httpx.Response(200, json={"worker": msgspec.to_builtins(worker)})

    async with httpx.AsyncClient(transport=httpx.MockTransport(answer)) as client:
        await check_workers(table, client)
        assert len(table) == 0
        await check_workers(table, client, static_urls=[worker.url])
        assert table.candidates(Role.ENCODER) == [worker]


def test_what_is_a_refusal() -> None:
    """Of any address that a name has, under whatever the libraries have put around it."""
    refused = ConnectionRefusedError(111, "refused")
    one, two = httpx.ConnectError("failed"), OSError("all failed")
    one.__cause__, two.__cause__ = two, ExceptionGroup("", [OSError("unreachable"), refused])
    assert is_refusal(refused)
    assert is_refusal(one)
    assert not is_refusal(httpx.ReadTimeout("late"))


@pytest.mark.anyio
async def test_those_who_do_not_answer_take_no_time_from_the_others(cluster: Any) -> None:
    """There may be many: processes that are frozen, or hosts that are gone."""
    table = Registry(misses_to_evict=1)
    _, encoder = cluster.add_encoder()
    with socket.create_server(("0.0.0.0", 0), backlog=512) as frozen:
        port = frozen.getsockname()[1]
        for number in range(1, 151):
            url = f"http://127.0.0.{number}:{port}"
            worker = Worker(role=Role.ENCODER, url=url, model="m", fingerprint="f", incarnation=1)
            table.register(worker, now=time.monotonic())
        async with checking_client(WatchTimes(timeout_s=5.0)) as client:
            with anyio.fail_after(WAIT_S):
                await check_workers(table, client, static_urls=[encoder.url])
    assert [worker.url for worker in table.candidates(Role.ENCODER)] == [encoder.url]


@pytest.mark.anyio
async def test_following_a_registry() -> None:
    a, b, c = (
        Worker(role=Role.ENCODER, url=f"http://{n}:1", model="m", fingerprint="f", incarnation=1)
        for n in "abc"
    )
    listed = {a: True, b: False, c: True}
    status = 200

    def registry(request: httpx.Request) -> httpx.Response:
        assert str(request.url) == "http://registry/workers"
        lines = [{"worker": msgspec.to_builtins(w), "candidate": is_one} for w, is_one in listed.items()]
        return httpx.Response(status, json={"workers": lines})

    table = Registry(misses_to_evict=3)  # which is for checks of its own: the registry has counted already
    async with httpx.AsyncClient(transport=httpx.MockTransport(registry)) as client:

        async def candidates() -> list[Worker]:
            await follow_registry(table, client, "http://registry")
            return table.candidates(Role.ENCODER)

        assert await candidates() == [a, c]
        listed[b] = True
        del listed[c]
        assert await candidates() == [a, b]
        listed[a] = False
        assert await candidates() == [b]
        listed[a] = True
        assert await candidates() == [a, b]
        status = 500
        assert await candidates() == [a, b], "a registry that is away takes nobody with it"


@pytest.mark.failure_mode("exception-ends-thread")
@pytest.mark.anyio
async def test_a_background_step_that_fails_does_not_end_the_loop() -> None:
    """The loop goes on after an exception in one step."""
    steps = []

    class Enough(BaseException):
        pass

    async def step() -> None:
        steps.append(1)
        if len(steps) == 3:
            raise Enough
        raise ValueError

    with pytest.raises(Enough):
        await every(0.0, step)
    assert len(steps) == 3


def test_times_are_checked() -> None:
    with pytest.raises(ConfigurationError):
        RegistrationTimes(retry_min_s=2, retry_max_s=1)
    with pytest.raises(ConfigurationError):
        WatchTimes(interval_s=0)
