"""Cores that vLLM's busy wait gives way on."""

from __future__ import annotations

import re
import threading
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


def test_the_busy_wait_rests_while_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """In vLLM's own reader, which hears of a message all the same: of one that came before as well, and where the notification is lost."""
    looks: list[str] = []
    monkeypatch.setattr(shm_broadcast, "sched_yield", lambda: looks.append("yield"))
    monkeypatch.setattr(shm_broadcast.SpinCondition, "wait", shm_broadcast.SpinCondition.wait)
    called_for = [True]
    cores.rest_while(lambda: called_for[0])
    writer = shm_broadcast.MessageQueue(1, 1)
    reader = shm_broadcast.MessageQueue.create_from_handle(writer.export_handle(), 0)
    ready = threading.Thread(target=writer.wait_until_ready)
    ready.start()
    reader.wait_until_ready()
    ready.join()
    writer.enqueue("early")
    assert reader.dequeue(timeout=20.0) == "early"
    late = threading.Timer(0.2, writer.enqueue, ["late"])
    late.start()
    assert reader.dequeue(timeout=20.0) == "late"
    with monkeypatch.context() as patched:
        patched.setattr(writer._spin_condition, "notify", lambda: None)
        lost = threading.Timer(0.2, writer.enqueue, ["lost"])
        lost.start()
        assert reader.dequeue(timeout=20.0) == "lost"
        assert not looks
        ends = threading.Timer(0.1, called_for.__setitem__, [0, False])
        ends.start()
        lost = threading.Timer(0.2, writer.enqueue, ["lost"])
        lost.start()
        assert reader.dequeue(timeout=20.0) == "lost"
    assert looks
    looks.clear()
    later = threading.Timer(0.2, writer.enqueue, ["later"])
    later.start()
    assert reader.dequeue(timeout=20.0) == "later"
    assert looks
