"""A server of several ranks from outside: one process a rank, which start, serve and end together.

Owns the processes, the directory in which they meet, and what becomes of the others when one is lost. It must not know what a rank does,
and imports no model library. Main thread.

Nobody can put a lost rank back into step with the others, so a group ends as a whole. The rank 0 that is left answers what is under way
with the cause, and then all start anew on the same port.
"""

from __future__ import annotations

import signal
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import Any, NoReturn
from urllib.parse import urlsplit

from embedwire.cli.cluster import EMBEDWIRE, Child, ChildFailed, Cluster
from embedwire.cli.process import Voice
from embedwire.cli.screen import err
from embedwire.cli.settings import PREFIX, Loaded
from embedwire.serve.signals import end_signals

READY_S = 600.0
"""Loading a large model takes minutes."""
STOP_MARGIN_S = 3.0
"""As in ``cluster.py``, and less than there: who started this process ends it later than it ends its ranks."""
FAILURES_MAX = 5
"""A group that fails so often in a row is given up."""
STABLE_S = 60.0
"""A group that was ready for this long begins a new row."""
PAUSE_MIN_S, PAUSE_MAX_S = 0.5, 10.0
"""Before the group starts anew; twice as long with every failure in a row."""


def serve_group(
    loaded: Loaded, arguments: Sequence[str], *, voice: Voice, program: Sequence[str] = EMBEDWIRE
) -> NoReturn:
    """Run ``program ARGUMENTS --rank R --group-dir DIR --child`` for each rank until SIGTERM or Ctrl-C; then exit.

    Raises ChildFailed, in one line, when the ranks do not become ready the first time, when one is lost and the setting says exit, and
    when they were lost too often in a row.
    """
    group = _Group(loaded, arguments, voice=voice, program=program)
    failures = 0
    while True:
        try:
            group.live()
        except ChildFailed as failed:
            failures = 1 if group.ready_for_s >= STABLE_S else failures + 1
            if loaded.settings.on_rank_failure == "exit" or not group.was_ever_ready:
                raise
            if failures >= FAILURES_MAX:
                raise ChildFailed(f"{failed}; given up after {failures} failures in a row") from None
            err.print(f"embedwire: {failed}; all ranks start anew", markup=False, soft_wrap=True)
            time.sleep(min(PAUSE_MAX_S, PAUSE_MIN_S * 2 ** (failures - 1)))


class _Group:
    """The ranks of one server, in one life after the other."""

    def __init__(
        self, loaded: Loaded, arguments: Sequence[str], *, voice: Voice, program: Sequence[str]
    ) -> None:
        self._settings = loaded.settings
        self._arguments = arguments
        self._voice = voice
        self._program = program
        self._variables = loaded.as_variables()
        self._ready_at: float | None = None
        self._is_ending = False
        self._exit_code: int | None = None
        self.was_ever_ready = False
        for number in end_signals():
            signal.signal(number, self._on_signal)

    @property
    def ready_for_s(self) -> float:
        """How long this life has been ready."""
        return 0.0 if self._ready_at is None else time.monotonic() - self._ready_at

    def live(self) -> None:
        """One life. Ends with ChildFailed, or with SystemExit by a signal; no rank is left then."""
        self._ready_at = None
        cluster = Cluster(
            self._variables,
            shutdown_s=self._settings.shutdown_s,
            margin_s=STOP_MARGIN_S,
            program=self._program,
            shares_log=True,
        )
        with tempfile.TemporaryDirectory(prefix="embedwire-group-") as directory:
            ranks: list[Child] = []
            try:
                for rank in range(self._settings.tensor_parallel_size):
                    place = ("--rank", str(rank), "--group-dir", directory)
                    ranks.append(cluster.start(f"rank {rank}", *self._arguments, *place))
                cluster.wait_ready(ranks, timeout_s=READY_S)
                self._on_ready(ranks)
                while True:
                    cluster.watch()
            except ChildFailed:
                self._kill(ranks[1:])  # whoever waits for one of them in a step hears of it at once
                raise
            finally:
                with self._signals_wait():
                    self._end(cluster, ranks)

    def _on_ready(self, ranks: Sequence[Child]) -> None:
        self.was_ever_ready, self._ready_at = True, time.monotonic()
        facts: dict[str, Any] = {name: fact for name, fact in ranks[0].facts.items() if name != "pid"}
        self._variables[f"{PREFIX}PORT"] = str(urlsplit(ranks[0].url).port)
        pids = [rank.process.pid for rank in ranks]
        self._voice.say(facts | {"ranks": len(ranks), "rank_pids": pids})

    def _end(self, cluster: Cluster, ranks: Sequence[Child]) -> None:
        """Rank 0 ends the others when it has answered what is under way. Those that are loading hold nothing yet."""
        from embedwire.transports.shm import sweep

        if self._ready_at is None:
            self._kill(ranks)
        cluster.stop()
        sweep()

    @staticmethod
    def _kill(ranks: Sequence[Child]) -> None:
        for rank in ranks:
            rank.process.kill()

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self._exit_code is None:
            self._exit_code = 0 if number == signal.SIGTERM or self._ready_at is not None else 128 + number
        if not self._is_ending:
            sys.exit(self._exit_code)

    @contextmanager
    def _signals_wait(self) -> Iterator[None]:
        """What is being ended is ended to the end."""
        self._is_ending = True
        yield
        self._is_ending = False
        if self._exit_code is not None:
            sys.exit(self._exit_code)
