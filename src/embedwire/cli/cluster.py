"""A handful of our own servers as child processes: started, watched, and ended together.

Owns the processes, their pipes and their logs; it must not know what they serve. Used from one thread; a thread a child waits for what that
child has to say. However this process dies, the children end: each reads a pipe that closes with it.
"""

from __future__ import annotations

import json
import logging
import math
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from queue import Empty, Queue
from types import TracebackType
from typing import Any

from embedwire.errors import EmbedwireError

EMBEDWIRE = (sys.executable, "-m", "embedwire.cli")
logger = logging.getLogger(__name__)
LOG_LINES = 12
STOP_MARGIN_S = 5.0
"""On top of the time that answers under way have: closing endpoints and engines."""
CAUSE_WAIT_S = 1.0
"""When a child says that it can not go on, the one that is to blame for that may be seen to end within this."""
SIGNAL_WAIT_S = 0.5
"""No wait is longer at a time. Python looks for signals between two instructions, so of one that comes just as a wait for a queue
begins it knows only when that ends. That may be why a group that was told to end as it became ready was once seen not to."""


class ChildFailed(EmbedwireError):
    """A child has ended, or did not become ready. The message has the end of its log."""


@dataclass(slots=True)
class Child:
    """One server. ``facts`` are what it said when it was ready: ``url``, ``role``, ``pid`` and more; ``error`` is why it can not go on."""

    name: str
    process: subprocess.Popen[str]
    log: Path | None
    facts: Mapping[str, Any] = field(default_factory=dict)

    @property
    def url(self) -> str:
        """Where it answers; known once it is ready."""
        return str(self.facts["url"])

    @property
    def pids(self) -> tuple[int, ...]:
        """Its process, and where it has several ranks, theirs; known once it is ready."""
        return (self.facts["pid"], *self.facts.get("rank_pids", ()))

    @property
    def in_words(self) -> str:
        """What there is to know about it beside its address: how its embeddings come, or where rooms are asked for."""
        ranks = f"{self.facts['ranks']} ranks" if "ranks" in self.facts else None
        said = (self.facts.get(name) for name in ("engine", "pool", "rooms_at", "delivery"))
        known = (*said, ranks)
        return ", ".join(filter(None, known))

    def last_words(self) -> str:
        """The end of its log, if it has one of its own."""
        if self.log is None:
            return ""
        lines = self.log.read_text(errors="replace").splitlines()[-LOG_LINES:]
        return "\n".join(f"  {self.name} | {line}" for line in lines)


class Cluster:
    """Children of this process, each a run of ``program``. A context manager: at its end none of them is left. Each has a log of its own,
    unless ``shares_log``: then they write to this process's stderr."""

    def __init__(
        self,
        variables: Mapping[str, str],
        *,
        shutdown_s: float = 10.0,
        margin_s: float = STOP_MARGIN_S,
        program: Sequence[str] = EMBEDWIRE,
        shares_log: bool = False,
    ) -> None:
        self._variables = variables
        self._stop_s = shutdown_s + margin_s
        self._program = program
        self._children: list[Child] = []
        # Not a SimpleQueue: in CPython 3.11 its get with a tiny timeout may never return.
        self._events: Queue[Child] = Queue()
        self._logs = None if shares_log else tempfile.TemporaryDirectory(prefix="embedwire-logs-")

    def start(self, name: str, *arguments: str, variables: Mapping[str, str] | None = None) -> Child:
        """Start ``embedwire ARGUMENTS``; returns at once."""
        log = Path(self._logs.name) / f"{name.replace(' ', '-')}.log" if self._logs else None
        with log.open("wb") if log else nullcontext() as stderr:
            process = subprocess.Popen(
                [*self._program, *arguments, "--child"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stderr,
                env=_without_settings(os.environ) | dict(self._variables) | dict(variables or {}),
                start_new_session=True,  # Ctrl-C is for the parent alone, which ends them in order
                text=True,
            )
        child = Child(name, process, log)
        self._children.append(child)
        threading.Thread(target=self._listen, args=(child,), name=f"embedwire-{name}", daemon=True).start()
        return child

    def wait_ready(self, children: Sequence[Child], *, timeout_s: float) -> None:
        """Until all of these are ready. Raises ChildFailed when any child has ended, or at the deadline."""
        deadline_s = time.monotonic() + timeout_s
        while not all(child.facts for child in children):
            self.watch(timeout_s=max(0.0, deadline_s - time.monotonic()))
            late = next((child for child in children if not child.facts), None)
            if late is not None and time.monotonic() >= deadline_s:
                raise ChildFailed(
                    f"{late.name} was not ready within {timeout_s:g} s\n{late.last_words()}".rstrip()
                )

    def watch(self, *, timeout_s: float | None = None) -> None:
        """Wait for news of a child, for ``timeout_s`` at most. Raises ChildFailed when one has ended, or says that it can not go on."""
        child = self._news(math.inf if timeout_s is None else timeout_s)
        if child is None:
            return
        if "error" in child.facts:
            child = self._to_blame_for(child)
        if "error" in child.facts:
            raise ChildFailed(f"{child.name}: {child.facts['error']}")
        status = child.process.poll()
        if status is not None:
            raise ChildFailed(f"{child.name} has ended: {_meaning(status)}\n{child.last_words()}".rstrip())

    def _news(self, timeout_s: float) -> Child | None:
        until_s = time.monotonic() + timeout_s
        while True:
            left_s = until_s - time.monotonic()
            try:
                return self._events.get(timeout=max(0.0, min(left_s, SIGNAL_WAIT_S)))
            except Empty:
                if left_s <= SIGNAL_WAIT_S:
                    return None

    def _to_blame_for(self, complaining: Child) -> Child:
        """Whoever ends without a word while others complain is the cause; else the first who complained."""
        deadline_s = time.monotonic() + CAUSE_WAIT_S
        while (left_s := deadline_s - time.monotonic()) > 0:
            try:
                child = self._events.get(timeout=left_s)
            except Empty:
                break
            if child.process.poll() is not None and "error" not in child.facts:
                return child
        return complaining

    def stop(self) -> dict[str, int]:
        """End all within ``shutdown_s`` and ``margin_s``; returns exit codes, negative for one that had to be killed. Idempotent."""
        deadline_s = time.monotonic() + self._stop_s
        codes = {}
        for child in reversed(self._children):
            child.process.terminate()
        for child in reversed(self._children):
            try:
                child.process.wait(max(0.0, deadline_s - time.monotonic()))
            except subprocess.TimeoutExpired:
                child.process.kill()
            codes[child.name] = child.process.wait()
            assert child.process.stdin is not None
            child.process.stdin.close()
        self._children.clear()
        return codes

    def __enter__(self) -> Cluster:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()
        if self._logs:
            self._logs.cleanup()

    def _listen(self, child: Child) -> None:
        """On a thread of its own: the child's lines, then its end."""
        assert child.process.stdout is not None
        with child.process.stdout as lines:
            for line in lines:
                try:
                    child.facts = {**child.facts, **json.loads(line)}
                except ValueError:
                    logger.warning("%s said %r", child.name, line)
                    continue
                self._events.put(child)
        child.process.wait()
        self._events.put(child)


def _without_settings(variables: Mapping[str, str]) -> dict[str, str]:
    """Ours are passed on as they were read, so that a file does not count twice."""
    return {name: value for name, value in variables.items() if not name.upper().startswith("EMBEDWIRE_")}


def _meaning(status: int) -> str:
    return f"killed by signal {-status}" if status < 0 else f"exit code {status}"
