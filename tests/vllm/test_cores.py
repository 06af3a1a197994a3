"""Cores that vLLM's busy wait gives way on."""

from __future__ import annotations

import re
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed here: make test-vllm")

from vllm.distributed.device_communicators import shm_broadcast

from embedwire.engines.vllm import cores


def slice_of_a_new_thread() -> int:
    """In nanoseconds, as the system has it."""
    found: list[str] = []

    def read() -> None:
        found.extend(re.findall(r"slice\s*:\s*(\d+)", Path("/proc/thread-self/sched").read_text()))

    thread = threading.Thread(target=read)
    thread.start()
    thread.join()
    if not found:
        pytest.skip("this system does not tell how long turns are")
    return int(found[0])


def test_threads_take_short_turns() -> None:
    """Those that are started meanwhile, and nobody else."""
    usual = slice_of_a_new_thread()
    with cores.short_turns():
        short = slice_of_a_new_thread()
    if short == usual:
        pytest.skip("this system gives all threads the same turns")
    assert short == cores.TURN_NS
    assert slice_of_a_new_thread() == usual


def test_elsewhere_nothing_happens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cores.platform, "machine", lambda: "unheard-of")
    usual = slice_of_a_new_thread()
    with cores.short_turns():
        assert slice_of_a_new_thread() == usual


def test_the_busy_wait_naps_while_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the loop of vLLM's own reader."""
    events: list[str] = []
    monkeypatch.setattr(shm_broadcast, "sched_yield", lambda: events.append("yield"))
    sleep: Callable[[float], None] = lambda _: events.append("nap")  # noqa: E731
    monkeypatch.setattr(cores.time, "sleep", sleep)
    called_for = [True]
    cores.nap_while(lambda: called_for[0])
    condition = object.__new__(shm_broadcast.SpinCondition)
    condition.is_reader, condition.busy_loop_s, condition.last_read = True, 1e9, 0.0
    condition.wait()
    called_for[0] = False
    condition.wait()
    assert events == ["nap", "yield"]
