"""Attempts of one request: how failures are followed by others, and what is reported in the end."""

from __future__ import annotations

from contextlib import AsyncExitStack

import pytest

from embedwire.registry import Registry, Role, Worker
from embedwire.serve.attempts import AttemptFailed, Attempts
from embedwire.serve.faults import Fault, FaultError, overloaded
from embedwire.serve.metrics import AppMetrics

LOST = Fault(status=502, type="transfer_error", code="peer_lost", message="the encoder is lost")

pytestmark = pytest.mark.anyio


def table_of(*urls: str) -> Registry:
    table = Registry()
    for url in urls:
        worker = Worker(url=url, role=Role.LANGUAGE, model="m", fingerprint="f", incarnation=1)
        table.register(worker, now=0.0)
        table.answered(url, now=0.0)
    return table


def attempts_on(table: Registry, *, attempts_max: int = 3, avoid: tuple[str, ...] = ()) -> Attempts:
    return Attempts(table, attempts_max=attempts_max, metrics=AppMetrics(), avoid=avoid)


def pick(attempts: Attempts) -> str:
    return attempts.pick(Role.LANGUAGE, model="m").url


async def test_a_failed_attempt_is_followed_by_one_on_another_worker() -> None:
    attempts = attempts_on(table_of("http://a", "http://b"))
    events: list[str] = []

    async def attempt(number: int, held: AsyncExitStack) -> str:
        url = pick(attempts)
        held.callback(events.append, f"release {url}")
        if number == 0:
            raise AttemptFailed(LOST, to_blame=url)
        return url

    async def after_failure() -> None:
        events.append("after failure")

    async with AsyncExitStack() as stack:
        second = await attempts.run(attempt, stack, after_failure=after_failure)
        (first,) = attempts.failed
        assert {first, second} == {"http://a", "http://b"}
        assert events == [f"release {first}", "after failure"]
    assert events[2:] == [f"release {second}"]


async def test_when_all_have_failed_the_most_telling_fault_is_raised() -> None:
    attempts = attempts_on(table_of("http://a"), attempts_max=2)
    numbers = []

    async def attempt(number: int, held: AsyncExitStack) -> None:
        numbers.append(number)
        raise AttemptFailed(LOST if number == 0 else overloaded("no room"))

    with pytest.raises(FaultError) as raised:
        await attempts.run(attempt, AsyncExitStack())
    assert raised.value.fault == LOST
    assert numbers == [0, 1]


async def test_any_other_error_ends_the_request() -> None:
    attempts, numbers = attempts_on(table_of("http://a")), []

    async def attempt(number: int, held: AsyncExitStack) -> None:
        numbers.append(number)
        raise FaultError(LOST)

    with pytest.raises(FaultError):
        await attempts.run(attempt, AsyncExitStack())
    assert numbers == [0]


async def test_a_doubted_worker_is_used_only_if_there_is_no_other() -> None:
    table, used = table_of("http://a", "http://b"), []
    attempts = attempts_on(table)

    async def attempt(number: int, held: AsyncExitStack) -> None:
        used.append(pick(attempts))
        if number == 0:
            raise AttemptFailed(LOST, doubted=used[-1])
        raise AttemptFailed(LOST, to_blame=used[-1])

    with table.loaded("http://b", 100), pytest.raises(FaultError):
        await attempts.run(attempt, AsyncExitStack())
    assert used == ["http://a", "http://b", "http://a"]


async def test_when_no_worker_is_left_the_fault_of_the_last_attempt_is_raised() -> None:
    attempts = attempts_on(table_of("http://a"))

    async def attempt(number: int, held: AsyncExitStack) -> None:
        raise AttemptFailed(LOST, to_blame=pick(attempts))

    with pytest.raises(FaultError) as raised:
        await attempts.run(attempt, AsyncExitStack())
    assert raised.value.fault == LOST
    with pytest.raises(FaultError) as raised:
        pick(attempts_on(table_of("http://a"), avoid=("http://a",)))
    assert raised.value.fault == overloaded("no language server for 'm' is available")
