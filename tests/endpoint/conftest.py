"""Real endpoints for tests, over every wire, in one process (``endpoint_stage``), and what a process holds."""

from __future__ import annotations

import gc
import os
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from endpoint_stage import brake, pytest_generate_tests, stage

from embedwire.endpoint import ReceiverEndpoint, SenderEndpoint
from embedwire.memory.layout import Layout

__all__ = ["brake", "pytest_generate_tests", "stage"]


@dataclass(frozen=True)
class Holdings:
    """What a process holds: the number of descriptors, segments of shared memory, and threads of ours."""

    descriptors: int
    segments: frozenset[str]
    threads: frozenset[str]

    @classmethod
    def now(cls) -> Holdings:
        gc.collect()
        links = set()
        for fd in os.listdir("/proc/self/fd"):
            with suppress(FileNotFoundError):  # the one that lists them
                links.add((fd, os.readlink(f"/proc/self/fd/{fd}")))
        with open("/proc/self/maps") as maps:
            mapped = {line.split()[5] for line in maps if "/dev/shm/embedwire-" in line}
        segments = mapped | {link for _, link in links if "/dev/shm/embedwire-" in link}
        threads = {thread.name for thread in threading.enumerate() if thread.name.startswith("embedwire")}
        return cls(len(links), frozenset(segments), frozenset(threads))


@pytest.fixture
def stamped() -> Callable[..., dict[str, np.ndarray]]:
    """``stamped(layout, tokens, room)``: a payload in which every int32 of every field is the room's number."""

    def make(layout: Layout, tokens: int, room: int) -> dict[str, np.ndarray]:
        arrays = {}
        for field in layout:
            words = np.full(tokens * field.token_bytes // 4, room, np.int32)
            arrays[field.name] = words.view(field.numpy_dtype).reshape(tokens, *field.shape)
        return arrays

    return make


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The kinds of all control messages that any endpoint sends, in order."""
    kinds: list[str] = []
    for endpoint in (SenderEndpoint, ReceiverEndpoint):

        def say(self: Any, to: Any, message: Any, real: Callable[..., None] = endpoint._say) -> None:
            kinds.append(message.__struct_config__.tag)
            real(self, to, message)

        monkeypatch.setattr(endpoint, "_say", say)
    return kinds


@pytest.fixture
def holdings() -> Callable[[], Holdings]:
    """``holdings()``: what this process holds now."""
    return Holdings.now
