"""An object in a process of its own, whose methods its parent calls through a pipe. For measurements, and for tests with real processes.

Knows nothing of what the object does. Its methods run one at a time on the child's main thread; an exception comes back as it is. A child
ends when its pipe does, so that nothing outlives the parent. The parent's side: any thread, one at a time.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from typing import Any

from embedwire.errors import TransportError

ANSWER_WAIT_S = 60.0


class Remote:
    """``make(*args)`` in a new process: a context manager, inside whose block the methods are called."""

    def __init__(self, make: Callable[..., Any], *args: Any, preload: Sequence[str] = ()) -> None:
        """Returns at once; the first :meth:`answer` is None, or what ``make`` raised. Modules of ``preload`` are imported once for all
        children of this process."""
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload([__name__, *preload])
        self._pipe, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs, make, args), daemon=True)
        self.process.start()
        theirs.close()

    def tell(self, method: str, *args: Any, **more: Any) -> None:
        """Begin a call; its :meth:`answer` has to be heard before the next one."""
        try:
            self._pipe.send((method, args, more))
        except OSError as error:
            raise TransportError(f"process {self.process.pid} has ended") from error

    def answer(self, timeout_s: float = ANSWER_WAIT_S) -> Any:
        """What the call returned, or raise what it raised; TransportError when the process is gone or does not answer in time."""
        try:
            if not self._pipe.poll(timeout_s):
                raise TransportError(f"process {self.process.pid} does not answer within {timeout_s:g} s")
            is_well, value = self._pipe.recv()
        except (EOFError, OSError) as error:
            raise TransportError(f"process {self.process.pid} has ended") from error
        if is_well:
            return value
        raise value

    def call(self, method: str, *args: Any, **more: Any) -> Any:
        """A call and its answer."""
        self.tell(method, *args, **more)
        return self.answer()

    def signal(self, number: int) -> None:
        """Send a signal to it."""
        assert self.process.pid is not None
        os.kill(self.process.pid, number)

    def begin_close(self) -> None:
        """Let it leave its block, as soon as its call has ended. Idempotent."""
        self._pipe.close()

    def close(self, timeout_s: float = ANSWER_WAIT_S) -> int | None:
        """Its exit code, after it has closed; killed when it does not end in time. Idempotent."""
        self.begin_close()
        self.process.join(timeout_s)
        if self.process.is_alive():
            self.process.kill()
            self.process.join()
        return self.process.exitcode


def _serve(pipe: Connection, make: Callable[..., Any], args: Sequence[Any]) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides when it is over
    try:
        made = make(*args)
    except Exception as error:
        pipe.send((False, error))
        return
    with made:
        try:
            pipe.send((True, None))
            while True:
                method, given, more = pipe.recv()
                try:
                    answer = (True, getattr(made, method)(*given, **more))
                except Exception as error:
                    answer = (False, error)
                pipe.send(answer)
        except (EOFError, OSError):
            pass
