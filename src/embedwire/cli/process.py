"""A server process from outside: its log, its signals, how it says that it is ready, and its end. Knows no app. Main thread."""

from __future__ import annotations

import json
import logging
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from embedwire.cli.screen import out
from embedwire.cli.settings import Settings
from embedwire.errors import ConfigurationError
from embedwire.serve.signals import end_signals

if TYPE_CHECKING:
    from fastapi import FastAPI

ORPHAN_MARGIN_S = 10.0
"""A child whose parent has died ends within this, on top of the time that answers under way have. Longer than it takes to end children
of its own."""


@dataclass(frozen=True, slots=True)
class Voice:
    """How a server says that it is ready: a line for people, or JSON for whoever started it."""

    ready_file: Path | None
    is_child: bool

    def say(self, facts: dict[str, Any]) -> None:
        """Once, when requests are answered. ``facts`` hold ``role`` and ``url``."""
        text = json.dumps(facts | {"pid": os.getpid()})
        if self.ready_file is not None:
            part = self.ready_file.with_name(self.ready_file.name + ".part")
            part.write_text(text + "\n")
            part.replace(self.ready_file)  # whoever waits for it never sees half of it
        if self.is_child:
            print(text, flush=True)
            return
        out.print(f"[bold]{facts['role']}[/] ready at {facts['url']}", soft_wrap=True)
        for name, fact in facts.items():
            if name not in ("role", "url"):
                out.print(f"  {name.replace('_', ' ')}: {fact}", soft_wrap=True, markup=False)


def begin(settings: Settings, *, is_child: bool) -> None:
    """Before anything is held: from now on signals end this process through its cleaning up, also while a model is loading."""
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
    """SIGTERM, and SIGHUP where it means something, unwind this process like Ctrl-C; more of them change nothing, and a terminal that is
    closed sends two. ``exit_code`` None is 128 and the signal's number."""
    numbers = [number for number in end_signals() if number != signal.SIGINT]

    def end(number: int, frame: FrameType | None) -> None:
        for one in numbers:
            signal.signal(one, lambda *_: None)  # not SIG_IGN: children would inherit it
        sys.exit(128 + number if exit_code is None else exit_code)

    for number in numbers:
        signal.signal(number, end)


def _end_with_stdin(bound_s: float) -> None:
    """The parent holds the other end: however it dies, its children end, if need be without cleaning up."""
    while os.read(sys.stdin.fileno(), 4096):
        pass
    os.kill(os.getpid(), signal.SIGTERM)
    threading.Event().wait(bound_s)
    os._exit(1)


def check_can_listen(host: str, port: int) -> None:
    """Before much is loaded that would be of no use. Raises ConfigurationError."""
    try:
        socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET).close()
    except OSError as error:
        raise ConfigurationError(f"can not listen on {host}:{port}: {error}") from None


def serve(
    app: FastAPI, settings: Settings, facts: dict[str, Any], *, voice: Voice, port: int | None = None
) -> None:
    """Answer requests until a signal; from then on this process ignores them.

    Raises ConfigurationError when the address can not be had.
    """
    from embedwire.serve.run import AppServer

    port = settings.port if port is None else port
    on_ready: Callable[[str], None] = lambda url: voice.say(facts | {"url": url})  # noqa: E731
    try:
        server = AppServer(
            app, host=settings.host, port=port, shutdown_s=settings.shutdown_s, on_ready=on_ready
        )
    except OSError as error:
        raise ConfigurationError(f"can not listen on {settings.host}:{port}: {error}") from None
    server.serve()
    # a second one would interrupt the cleaning up, and leave shared memory behind
    for number in end_signals():
        signal.signal(number, signal.SIG_IGN)
