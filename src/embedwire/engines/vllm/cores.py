"""Who gets a core in vLLM's processes: the threads of a transfer share theirs with a busy wait.

A vLLM process that waits for another calls ``sched_yield`` in a loop, until a second has passed without a message (``SpinCondition`` in
its ``shm_broadcast.py``); then it waits for the notification that comes with a message. With fewer cores than such processes a thread
that has a message to pass on waits for its turn: on two cores with Linux 6.18 for a quarter of a second at times. So while that matters
the process waits for notifications from the start, and threads of a transfer take short turns. Notifications get lost, supposedly where
one message follows another within a millisecond: steps of a model stood still for seconds. So it never waits for them alone.
"""

from __future__ import annotations

import ctypes
import os
import platform
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

REST_MS = 1
"""So long until the next look, where no notification comes. A step of a model takes milliseconds."""
TURN_NS = 100_000
"""The least that Linux gives; its own choice is a millisecond or more."""
_SCHED_SETATTR = {"x86_64": 314, "aarch64": 274}
"""Numbers of the system call, by machine."""
_ATTRIBUTES = struct.Struct("=IIQiIQQQ")
"""``struct sched_attr``: size, policy, flags, nice, priority, runtime, deadline, period."""


def rest_while(is_called_for: Callable[[], bool]) -> None:
    """From now on this process waits almost without a core for what other processes of vLLM tell it, whenever ``is_called_for()``, which
    has to be cheap. Nothing happens with a vLLM that waits in another way."""
    from vllm.distributed.device_communicators import shm_broadcast

    condition: Any = getattr(shm_broadcast, "SpinCondition", None)
    if condition is None:
        return
    look_or_wait: Callable[..., None] = condition.wait

    def wait(self: Any, timeout_ms: int | None = None) -> None:
        if not is_called_for():
            look_or_wait(self, timeout_ms)
            return
        last_read, self.last_read = self.last_read, float("-inf")  # as if the last message were long ago
        try:
            look_or_wait(self, REST_MS if timeout_ms is None else min(timeout_ms, REST_MS))
        finally:
            self.last_read = last_read

    condition.wait = wait


@contextmanager
def short_turns() -> Iterator[None]:
    """Threads that are started meanwhile take short turns on a core, and so are let in before another thread's longer one is over: what
    Linux 6.12 and later makes of ``sched_runtime``, without any privilege. Elsewhere nothing happens."""
    _ask_for_turns(TURN_NS)
    try:
        yield
    finally:
        _ask_for_turns(0)


def _ask_for_turns(runtime_ns: int) -> None:
    """Of this length, for the calling thread, unless its owner has given it a policy of its own; 0 leaves it to the system."""
    number = _SCHED_SETATTR.get(platform.machine()) if platform.system() == "Linux" else None
    if number is not None and os.sched_getscheduler(0) == os.SCHED_OTHER:
        nice = os.getpriority(os.PRIO_PROCESS, 0)
        attributes = _ATTRIBUTES.pack(_ATTRIBUTES.size, os.SCHED_OTHER, 0, nice, 0, runtime_ns, 0, 0)
        ctypes.CDLL(None).syscall(ctypes.c_long(number), 0, attributes, 0)
