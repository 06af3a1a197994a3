"""The thread that drives one protocol core: it alone touches the core and the sockets.

Other threads hand it tasks (``post``, ``call``); it sleeps in one poll over its sockets, a wake-up descriptor and the core's next due
time, so nothing is polled by sleeping. A task or message that raises is logged and does not end the thread.
"""

from __future__ import annotations

import hashlib
import logging
import math
import os
import threading
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextlib import suppress
from functools import partial
from typing import TypeVar

import zmq

from embedwire.errors import ConfigurationError, UsageError
from embedwire.limits import ATTEMPT_MAX, ROOM_MAX
from embedwire.transports import built_in

logger = logging.getLogger(__name__)
T = TypeVar("T")

FRAMES_PER_TURN_MAX = 256
"""Frames read from one socket before the others and the timers have their turn."""


def identity_of(incarnation: int, address: str) -> bytes:
    """The routing id under which a receiver's socket is known to a sender's: it begins with the receiver's incarnation, and differs for
    each ``address`` that the receiver knows a sender by, since one sender may have several."""
    return _prefix(incarnation) + hashlib.blake2b(address.encode(), digest_size=8).digest()


def is_of(identity: bytes, incarnation: int) -> bool:
    """Whether a routing id is one of that receiver's."""
    return identity.startswith(_prefix(incarnation))


def _prefix(incarnation: int) -> bytes:
    return b"R" + incarnation.to_bytes(8, "big")


def check_key(room: int, attempt: int) -> None:
    """Raise UsageError for what no message can name."""
    if not 0 <= room <= ROOM_MAX or not 0 <= attempt <= ATTEMPT_MAX:
        raise UsageError(
            f"room {room} attempt {attempt}: rooms go from 0 to {ROOM_MAX}, attempts from 0 to {ATTEMPT_MAX}"
        )


def chosen(transports: Sequence[str] | None) -> tuple[str, ...]:
    """The wires to offer, best first: the built-in ones unless told. Raises ConfigurationError for none."""
    wires = built_in() if transports is None else tuple(transports)
    if not wires:
        raise ConfigurationError("an endpoint needs at least one transport")
    return wires


class Driver(ABC):
    """A thread, its poller and its tasks. Subclasses own the core and say what to do in a turn."""

    def __init__(self, name: str) -> None:
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._poller = zmq.Poller()
        self._wake = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._poller.register(self._wake, zmq.POLLIN)
        self._tasks: deque[Callable[[], None]] = deque()
        self._gate = threading.RLock()  # the collector may run a finalizer that posts in the midst of a post
        self._closing = threading.Lock()
        self._is_open = True
        self._is_running = True
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)

    @abstractmethod
    def _on_frames(self, socket: zmq.Socket[bytes], frames: list[list[bytes]]) -> None:
        """Take what has come in on one of the registered sockets."""

    @abstractmethod
    def _on_time(self, now: float) -> None:
        """Carry out what is due."""

    @abstractmethod
    def _next_due(self) -> float | None:
        """When ``_on_time`` has something to do."""

    def post(self, task: Callable[[], None]) -> bool:
        """Run a task on the driver's thread, soon. Thread-safe; False, and dropped, when the driver has ended."""
        with self._gate:
            if self._is_open:
                self._tasks.append(task)
                os.eventfd_write(self._wake, 1)
            return self._is_open

    @property
    def is_driving(self) -> bool:
        """Whether this is the driver's thread."""
        return threading.current_thread() is self._thread

    def call(self, task: Callable[[], T]) -> T:
        """Run a task on the driver's thread and return what it returned. Raises UsageError when the driver has ended."""
        if self.is_driving:
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

    def close(self) -> None:
        """End all rooms (cause ``closed``), tell their peers, and free everything. Idempotent, from any thread but the driver's own,
        where callbacks run: there it raises UsageError."""
        if self.is_driving:
            raise UsageError(f"{self._thread.name} can not be closed out of a callback of its own")
        with self._closing:
            if self._thread.is_alive():
                self._close()

    @abstractmethod
    def _close(self) -> None:
        """End the rooms and then the thread. Called once."""

    def _run(self) -> None:
        while self._is_running:
            self._turn()
        self._free()

    def _free(self) -> None:
        self._context.destroy(linger=200)
        with self._gate:
            self._is_open = False
            self._tasks.clear()
            os.close(self._wake)

    def _turn(self) -> None:
        due = self._next_due()
        timeout_ms = None if due is None else math.ceil(max(0.0, due - time.monotonic()) * 1000)
        for readable, _ in self._poller.poll(timeout_ms):
            if readable == self._wake:
                os.eventfd_read(self._wake)
            else:
                frames = self._read_all(readable)
                self._run_tasks()  # what was posted before a message came in is known before that is
                self._guard(partial(self._on_frames, readable, frames))
        self._run_tasks()
        self._guard(lambda: self._on_time(time.monotonic()))

    def _run_tasks(self) -> None:
        for _ in range(len(self._tasks)):
            self._guard(self._tasks.popleft())

    def _guard(self, step: Callable[[], None]) -> None:
        try:
            step()
        except Exception:
            logger.exception("%s: a step failed; the thread goes on", self._thread.name)

    def _stop(self) -> None:
        """End the thread after this turn. On the driver's thread."""
        self._is_running = False

    @staticmethod
    def _read_all(socket: zmq.Socket[bytes]) -> list[list[bytes]]:
        """The frames that are there, up to a bound; the poll tells of the rest."""
        frames: list[list[bytes]] = []
        with suppress(zmq.Again):
            while len(frames) < FRAMES_PER_TURN_MAX and int(socket.getsockopt(zmq.EVENTS)) & zmq.POLLIN:
                frames.append(socket.recv_multipart(zmq.NOBLOCK))
        return frames
