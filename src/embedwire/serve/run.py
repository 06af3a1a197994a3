"""Runs an app on a socket until it is told to stop.

Owns the socket, the signals and the bounded shutdown; it must not know which app it is. ``serve_app`` blocks
the thread that calls it; on the main thread signals end it (``signals.py``), and it returns, so that the caller
can close what stands behind the app.
"""

from __future__ import annotations

import json
import signal
import socket
import sys
import threading
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager

import uvicorn
from fastapi import FastAPI

from embedwire.serve.signals import end_signals


class AppServer:
    """An app bound to a free or a given port.

    ``url`` is known from the start, and connections wait from then on; so an app may name its own address
    while it starts (``app.state.url``). ``advertise_host`` is the host under which others reach it, where
    that is not ``host``. What the app appends to ``app.state.before_shutdown`` is awaited before it stops to listen.
    """

    def __init__(
        self,
        app: FastAPI,
        *,
        host: str = "127.0.0.1",
        port: int = 0,
        advertise_host: str | None = None,
        shutdown_s: float = 10.0,
        on_ready: Callable[[str], None] | None = None,
    ) -> None:
        self._socket = socket.create_server(
            (host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET, backlog=2048
        )
        # asyncio does this only for sockets that name their protocol, which the standard library's do not; without
        # it, an answer waits 40 ms for the acknowledgement of its own head.
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.url = _url(advertise_host or host, self._socket.getsockname()[1])
        app.state.url = self.url
        app.state.before_shutdown = before_shutdown = list[Callable[[], Awaitable[None]]]()
        self._stopped = threading.Event()
        config = uvicorn.Config(
            app,
            log_config=None,  # a library does not configure logging
            access_log=False,
            timeout_graceful_shutdown=max(1, round(shutdown_s)),
            timeout_keep_alive=30,
        )
        self._server = _Server(
            config,
            on_started=lambda: on_ready(self.url) if on_ready else None,
            before_shutdown=before_shutdown,
        )

    def serve(self) -> None:
        """Block until :meth:`stop` or a signal; then let answers under way end, for ``shutdown_s`` at
        most."""
        try:
            with self._socket:
                self._server.run(sockets=[self._socket])
        finally:
            self._stopped.set()

    def stop(self) -> None:
        """Ask it to end. From any thread, and from a signal handler."""
        self._server.should_exit = True

    def close(self) -> None:
        """Give the port back; for a server that never served."""
        self._socket.close()

    def wait_stopped(self, timeout_s: float | None = None) -> bool:
        """Wait on another thread than the server's until it has ended. False when it has not."""
        return self._stopped.wait(timeout_s)


def print_ready(url: str) -> None:
    """For ``on_ready``: one JSON line on stdout, for whoever started this process."""
    print(json.dumps({"ready": url}), file=sys.stdout, flush=True)


class _Server(uvicorn.Server):
    def __init__(
        self,
        config: uvicorn.Config,
        *,
        on_started: Callable[[], None],
        before_shutdown: Sequence[Callable[[], Awaitable[None]]],
    ) -> None:
        super().__init__(config)
        self._on_started = on_started
        self._before_shutdown = before_shutdown

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started:
            self._on_started()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        # uvicorn ends the app's lifespan after it has let answers end, and nobody can connect while it does
        for step in self._before_shutdown:
            await step()
        await super().shutdown(sockets)

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        # uvicorn raises the signal again once it has stopped, and SIGTERM would end the process before
        # its caller could free shared memory.
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.signal(number, self.handle_exit) for number in end_signals()}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def _url(host: str, port: int) -> str:
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
