"""Server processes, from both sides: how one starts, reports that it is ready, serves and ends; and children that are started, watched
and stopped together (:class:`Cluster`).

Imports no app and no command. The functions of a server run on its main thread; a Cluster is used from one thread, and a thread per child
reads what the child reports. However a parent dies, its children end: each reads a pipe that closes with the parent.
"""

from __future__ import annotations

import json
import logging
import math
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from queue import Empty, Queue
from types import FrameType, TracebackType
from typing import TYPE_CHECKING, Any

from embedwire.cli.screen import out
from embedwire.cli.settings import PREFIX, Settings
from embedwire.errors import ConfigurationError, EmbedwireError
from embedwire.serve.signals import end_signals

if TYPE_CHECKING:
    from fastapi import FastAPI

logger = logging.getLogger(__name__)
EMBEDWIRE = (sys.executable, "-m", "embedwire.cli")
LOG_LINES = 12
ORPHAN_MARGIN_S = 10.0
"""A child whose parent has died ends within this, on top of the time that answers under way have. Longer than it takes to end children
of its own."""
STOP_MARGIN_S = 5.0
"""On top of the time that answers under way have: closing endpoints and engines."""
CAUSE_WAIT_S = 1.0
"""After a child has reported an error, the child that caused it may be seen to end within this."""
SIGNAL_WAIT_S = 0.5
"""No wait is longer at a time. Python handles signals between two instructions: one that arrives just as a wait for a queue begins is
handled when that wait ends. This may be why a group that was stopped as it became ready was once seen to keep running."""


@dataclass(frozen=True, slots=True)
class Voice:
    """How a server reports that it is ready: a line for people, or JSON for the process that started it."""

    ready_file: Path | None
    is_child: bool

    def say(self, facts: dict[str, Any]) -> None:
        """Called once, when requests are answered. ``facts`` hold ``role`` and ``url``."""
        text = json.dumps(facts | {"pid": os.getpid()})
        if self.ready_file is not None:
            part = self.ready_file.with_name(self.ready_file.name + ".part")
            part.write_text(text + "\n")
            part.replace(self.ready_file)  # a reader never sees half of it
        if self.is_child:
            print(text, flush=True)
            return
        out.print(f"[bold]{facts['role']}[/] ready at {facts['url']}", soft_wrap=True)
        for name, fact in facts.items():
            if name not in ("role", "url"):
                out.print(f"  {name.replace('_', ' ')}: {fact}", soft_wrap=True, markup=False)


def begin(settings: Settings, *, is_child: bool) -> None:
    """Called before anything is held: from then on signals end this process through its cleanup, also while a model is loading."""
    logging.basicConfig(
        level=settings.log_level.upper(),
        stream=sys.stderr,
        format="%(asctime)s %(levelname)s %(name)s %(message)s",
    )
    logging.getLogger("httpx").setLevel(max(logging.WARNING, logging.getLogger().level))
    end_in_order()
    if is_child:
        bound_s = settings.shutdown_s + ORPHAN_MARGIN_S
        threading.Thread(target=_end_with_stdin, args=(bound_s,), name="embedwire-stdin", daemon=True).start()


def end_in_order(*, exit_code: int | None = 0) -> None:
    """Let SIGTERM, and SIGHUP unless it is ignored, unwind this process like Ctrl-C. Further ones change nothing: a terminal that is closed
    sends two. ``exit_code`` None is 128 plus the signal's number."""
    numbers = [number for number in end_signals() if number != signal.SIGINT]

    def end(number: int, frame: FrameType | None) -> None:
        for one in numbers:
            signal.signal(one, lambda *_: None)  # not SIG_IGN: children would inherit it
        sys.exit(128 + number if exit_code is None else exit_code)

    for number in numbers:
        signal.signal(number, end)


def _end_with_stdin(bound_s: float) -> None:
    """The parent holds the other end: however it dies, its children end, if need be without cleanup."""
    while os.read(sys.stdin.fileno(), 4096):
        pass
    os.kill(os.getpid(), signal.SIGTERM)
    threading.Event().wait(bound_s)
    os._exit(1)


def check_can_listen(host: str, port: int) -> None:
    """Called before anything large is loaded. Raises ConfigurationError."""
    try:
        socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET).close()
    except OSError as error:
        raise ConfigurationError(f"cannot listen on {host}:{port}: {error}") from None


def serve(
    app: FastAPI, settings: Settings, facts: dict[str, Any], *, voice: Voice, port: int | None = None
) -> None:
    """Answer requests until a signal; from then on this process ignores signals.

    Raises ConfigurationError when the address cannot be bound.
    """
    from embedwire.serve.run import AppServer

    port = settings.port if port is None else port
    on_ready: Callable[[str], None] = lambda url: voice.say(facts | {"url": url})  # noqa: E731
    try:
        server = AppServer(
            app, host=settings.host, port=port, shutdown_s=settings.shutdown_s, on_ready=on_ready
        )
    except OSError as error:
        raise ConfigurationError(f"cannot listen on {settings.host}:{port}: {error}") from None
    server.serve()
    # a second one would interrupt the cleanup, and leave shared memory behind
    for number in end_signals():
        signal.signal(number, signal.SIG_IGN)


class ChildFailed(EmbedwireError):
    """A child has ended, or did not become ready. The message has the end of its log."""


@dataclass(slots=True)
class Child:
    """One server. ``facts`` is its report when it was ready: ``url``, ``role``, ``pid`` and more; ``error`` is why it cannot continue."""

    name: str
    process: subprocess.Popen[str]
    log: Path | None
    facts: Mapping[str, Any] = field(default_factory=dict)

    @property
    def url(self) -> str:
        """Its HTTP address; known once it is ready."""
        return str(self.facts["url"])

    @property
    def pids(self) -> tuple[int, ...]:
        """Its process, and where it has several ranks, theirs; known once it is ready."""
        return (self.facts["pid"], *self.facts.get("rank_pids", ()))

    @property
    def in_words(self) -> str:
        """What it reported beside its address: its receive pool, or where rooms are requested."""
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
                start_new_session=True,  # Ctrl-C reaches only the parent, which ends them in order
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
        """Wait for an event of a child, for ``timeout_s`` at most. Raises ChildFailed when one has ended or cannot continue."""
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

    def _to_blame_for(self, reporting: Child) -> Child:
        """The child that ended without a report while others reported errors; else the first that reported one."""
        deadline_s = time.monotonic() + CAUSE_WAIT_S
        while (left_s := deadline_s - time.monotonic()) > 0:
            try:
                child = self._events.get(timeout=left_s)
            except Empty:
                break
            if child.process.poll() is not None and "error" not in child.facts:
                return child
        return reporting

    def stop(self) -> dict[str, int]:
        """End all within ``shutdown_s`` plus ``margin_s``; returns exit codes, negative for one that had to be killed. Idempotent."""
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
        """On a thread per child: the child's lines, then its end."""
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
    """Settings are passed on as they were read, so that a file does not count twice."""
    return {name: value for name, value in variables.items() if not name.upper().startswith(PREFIX)}


def _meaning(status: int) -> str:
    return f"killed by signal {-status}" if status < 0 else f"exit code {status}"
