"""The attempts of one request: a failed one is followed by another, on workers that have not failed this request.

Owns the loop, and what it remembers of failures; it must not know what an attempt does. On the router's event loop.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Collection
from contextlib import AsyncExitStack
from typing import TypeVar

from embedwire.registry import Registry, Role, Worker
from embedwire.serve.faults import Fault, FaultError, more_telling, overloaded
from embedwire.serve.metrics import AppMetrics

T = TypeVar("T")

Attempt = Callable[[int, AsyncExitStack], Awaitable[T]]
"""(number of the attempt from 0, stack for what it holds) → its result. Raises AttemptFailed; whatever else it raises ends the request."""


async def _nothing() -> None:
    pass


class AttemptFailed(Exception):
    """Another attempt may succeed: it avoids the worker ``to_blame`` (URL), and uses the worker ``doubted`` only if there is no other."""

    def __init__(self, fault: Fault, *, to_blame: str | None = None, doubted: str | None = None) -> None:
        super().__init__(fault.message)
        self.fault = fault
        self.to_blame = to_blame
        self.doubted = doubted


class Attempts:
    """At most ``attempts_max`` attempts on the workers of ``table`` outside ``avoid`` (URLs). ``failed`` are the workers that later
    attempts avoid, ``fault`` is the one to report if no attempt succeeds."""

    def __init__(
        self, table: Registry, *, attempts_max: int, metrics: AppMetrics, avoid: Collection[str] = ()
    ) -> None:
        self._table = table
        self._attempts_max = attempts_max
        self._metrics = metrics
        self._doubted: set[str] = set()
        self.failed = set(avoid)
        self.fault: Fault | None = None

    def pick(self, role: Role, *, model: str, fingerprint: str | None = None) -> Worker:
        """A worker for the next call. Raises FaultError when none is left: the fault of the attempts before, or that there is none."""
        for avoid in (self.failed | self._doubted, self.failed):
            worker = self._table.pick(role, model=model, fingerprint=fingerprint, avoid=avoid)
            if worker is not None:
                return worker
        raise FaultError(self.fault or overloaded(f"no {role} server for {model!r} is available"))

    async def run(
        self,
        attempt: Attempt[T],
        stack: AsyncExitStack,
        *,
        after_failure: Callable[[], Awaitable[None]] = _nothing,
    ) -> T:
        """The result of the first attempt that succeeds. What that attempt holds is released by ``stack``; what a failed one holds, before
        ``after_failure``. Raises FaultError when all have failed."""
        for number in range(self._attempts_max):
            try:
                async with AsyncExitStack() as held:
                    result = await attempt(number, held)
                    stack.push_async_exit(held.pop_all())
                    return result
            except AttemptFailed as failure:
                self._record(failure)
            await after_failure()
        assert self.fault is not None
        raise FaultError(self.fault)

    def _record(self, failure: AttemptFailed) -> None:
        self.fault = more_telling(self.fault, failure.fault)
        self.failed.update(filter(None, [failure.to_blame]))
        self._doubted.update(filter(None, [failure.doubted]))
        self._metrics.retries.labels(failure.fault.code).inc()
