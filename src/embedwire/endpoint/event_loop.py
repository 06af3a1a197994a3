"""The thread that drives one protocol core: it alone touches the core and the sockets.

Other threads hand it tasks (``post``, ``call``); it sleeps in one poll over its sockets, a wake-up descriptor and the core's next due
time, so nothing is polled by sleeping. A task or message that raises is logged and does not end the thread.
"""

from __future__ import annotations

import logging
import math
import os
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from functools import partial
from typing import TypeAlias, TypeVar

import zmq

from embedwire.errors import UsageError

logger = logging.getLogger(__name__)
T = TypeVar("T")
Socket: TypeAlias = "zmq.Socket[bytes]"

FRAMES_PER_TURN_MAX = 256
"""Frames read from one socket before the other sockets and the timers are served."""


class EventLoop:
    """A thread, its sockets and its tasks, for the endpoint that owns it.

    ``on_frames(socket, messages)`` takes what has come in on a registered socket, ``on_time(now)`` carries out what is due, and
    ``next_due()`` is when it has something to do (None: never). All three run on the loop's thread, after ``start``.
    """

    def __init__(
        self,
        name: str,
        *,
        on_frames: Callable[[Socket, list[list[bytes]]], None],
        on_time: Callable[[float], None],
        next_due: Callable[[], float | None],
    ) -> None:
        self._on_frames = on_frames
        self._on_time = on_time
        self._next_due = next_due
        self._context: zmq.Context[Socket] = zmq.Context()
        self._poller = zmq.Poller()
        self._wake = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._poller.register(self._wake, zmq.POLLIN)
        self._tasks: deque[Callable[[], None]] = deque()
        self._gate = threading.RLock()  # re-entrant: a finalizer may call post() during garbage collection
        self._closing = threading.Lock()
        self._is_open = True
        self._is_running = True
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)

    def start(self) -> None:
        """Begin. Once."""
        self._thread.start()

    # ------------------------------------------------------------------ sockets; before the start, or on the loop's thread

    def socket(self, kind: int) -> Socket:
        """A new socket, which ends with the loop."""
        return self._context.socket(kind)

    def register(self, socket: Socket) -> None:
        """Hand what comes in on a socket to ``on_frames``."""
        self._poller.register(socket, zmq.POLLIN)

    def unregister(self, socket: Socket) -> None:
        """Stop to do so."""
        self._poller.unregister(socket)

    @staticmethod
    def read_all(socket: Socket) -> list[list[bytes]]:
        """The messages that are there, up to a bound; the next poll reports the rest."""
        frames: list[list[bytes]] = []
        with suppress(zmq.Again):
            while len(frames) < FRAMES_PER_TURN_MAX and int(socket.getsockopt(zmq.EVENTS)) & zmq.POLLIN:
                frames.append(socket.recv_multipart(zmq.NOBLOCK))
        return frames

    # ------------------------------------------------------------------ tasks; any thread

    @property
    def is_current(self) -> bool:
        """Whether this is the loop's thread."""
        return threading.current_thread() is self._thread

    @property
    def is_alive(self) -> bool:
        """Whether its thread runs."""
        return self._thread.is_alive()

    def post(self, task: Callable[[], None]) -> bool:
        """Run a task on the loop's thread, soon. False, and dropped, when the loop has ended."""
        with self._gate:
            if self._is_open:
                self._tasks.append(task)
                os.eventfd_write(self._wake, 1)
            return self._is_open

    def call(self, task: Callable[[], T]) -> T:
        """Run a task on the loop's thread and return what it returned. Raises UsageError when the loop has ended."""
        if self.is_current:
            return task()
        future: Future[T] = Future()

        def run() -> None:
            try:
                future.set_result(task())
            except BaseException as error:  # handed to the caller
                future.set_exception(error)

        self.post(run)
        while self._thread.is_alive():
            try:
                return future.result(timeout=1.0)
            except TimeoutError:
                if future.done():  # now, or by a task that has timed out itself
                    return future.result()
        if future.done():
            return future.result()
        raise UsageError(f"{self._thread.name} is closed")

    def guard(self, step: Callable[[], None]) -> None:
        """Run a step; log what it raises."""
        try:
            step()
        except Exception:
            logger.exception("%s: a step failed; the thread goes on", self._thread.name)

    # ------------------------------------------------------------------ the end

    def close(self, shut_down: Callable[[], None]) -> None:
        """Call ``shut_down``, which ends in :meth:`stop`, unless the loop has ended already. Idempotent, from any thread but the loop's
        own, where callbacks run: there it raises UsageError."""
        if self.is_current:
            raise UsageError(f"{self._thread.name} can not be closed out of a callback of its own")
        with self._closing:
            if self._thread.is_alive():
                shut_down()

    def stop(self) -> None:
        """End the thread after the tasks that are queued, and wait until it has ended. Not on the loop's thread."""
        self.call(self._stop)
        self._thread.join()

    def _stop(self) -> None:
        self._is_running = False

    def free(self) -> None:
        """Close the sockets and refuse tasks: done by the loop when it ends, and by the owner of one that was never started."""
        self._context.destroy(linger=200)
        with self._gate:
            self._is_open = False
            self._tasks.clear()
            os.close(self._wake)

    # ------------------------------------------------------------------ the loop's thread

    def _run(self) -> None:
        while self._is_running:
            self._turn()
        self.free()

    def _turn(self) -> None:
        due = self._next_due()
        timeout_ms = None if due is None else math.ceil(max(0.0, due - time.monotonic()) * 1000)
        for readable, _ in self._poller.poll(timeout_ms):
            if readable == self._wake:
                os.eventfd_read(self._wake)
            else:
                frames = self.read_all(readable)
                self._run_tasks()  # what was posted before a message came in is known before that is
                self.guard(partial(self._on_frames, readable, frames))
        self._run_tasks()
        self.guard(lambda: self._on_time(time.monotonic()))

    def _run_tasks(self) -> None:
        for _ in range(len(self._tasks)):
            self.guard(self._tasks.popleft())
