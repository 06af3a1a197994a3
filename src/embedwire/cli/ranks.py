"""The ranks of one server, from outside and from inside: one process per rank; they start, serve and end together.

Outside, :func:`serve_group` owns the processes, the directory in which the ranks meet, and what becomes of the others when one is lost. A
lost rank cannot rejoin in step with the others, so a group ends as a whole: rank 0 answers the requests under way with the cause, and then
all ranks are started again on the same port. It imports no model library. Main thread.

Inside, :class:`Membership` is one rank's part in its group: it joins the ranks and reports when the group cannot continue. It must not know
what the server does. Created by the main thread; a loss is reported on any.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, NoReturn
from urllib.parse import urlsplit

from embedwire.cli.options import Loaded
from embedwire.cli.processes import EMBEDWIRE, Child, ChildFailed, Cluster, Voice
from embedwire.cli.screen import err
from embedwire.cli.settings import Settings, variables
from embedwire.serve.signals import end_signals

if TYPE_CHECKING:
    from embedwire.endpoint import Reception, SenderEndpoint
    from embedwire.group import FollowingSender, LeadingSender, RankConfig

READY_S = 600.0
"""Loading a large model takes minutes."""
RANKS_MARGIN_S = 3.0
"""In place of that in ``processes.py``, and less: this process is ended later than it ends its ranks."""
FAILURES_MAX = 5
"""A group that fails this many times in a row is not started again."""
STABLE_S = 60.0
"""A group that was ready for this long starts a new count of failures."""
PAUSE_MIN_S, PAUSE_MAX_S = 0.5, 10.0
"""Before the group is started again; doubled with every failure in a row."""


def serve_group(
    loaded: Loaded, arguments: Sequence[str], *, voice: Voice, program: Sequence[str] = EMBEDWIRE
) -> NoReturn:
    """Run ``program ARGUMENTS --rank R --group-dir DIR --child`` for each rank until SIGTERM or Ctrl-C; then exit.

    Raises ChildFailed, in one line, when the ranks do not become ready the first time, when one is lost and ``on_rank_failure`` is exit,
    and when they were lost too often in a row.
    """
    group = _Group(loaded, arguments, voice=voice, program=program)
    failures = 0
    while True:
        try:
            group.run()
        except ChildFailed as failed:
            failures = 1 if group.ready_for_s >= STABLE_S else failures + 1
            if loaded.settings.on_rank_failure == "exit" or not group.was_ever_ready:
                raise
            if failures >= FAILURES_MAX:
                raise ChildFailed(f"{failed}; given up after {failures} failures in a row") from None
            err.print(f"embedwire: {failed}; all ranks start anew", markup=False, soft_wrap=True)
            time.sleep(min(PAUSE_MAX_S, PAUSE_MIN_S * 2 ** (failures - 1)))


class _Group:
    """The ranks of one server, started again after each loss."""

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
        """How long the ranks have been ready since they were last started."""
        return 0.0 if self._ready_at is None else time.monotonic() - self._ready_at

    def run(self) -> None:
        """Start the ranks and watch them. Ends with ChildFailed, or with SystemExit by a signal; no rank is left then."""
        self._ready_at = None
        cluster = Cluster(
            self._variables,
            shutdown_s=self._settings.shutdown_s,
            margin_s=RANKS_MARGIN_S,
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
                self._kill(ranks[1:])  # a step that waits for one of them fails at once
                raise
            finally:
                with self._signals_wait():
                    self._end(cluster, ranks)

    def _on_ready(self, ranks: Sequence[Child]) -> None:
        self.was_ever_ready, self._ready_at = True, time.monotonic()
        facts: dict[str, Any] = {name: fact for name, fact in ranks[0].facts.items() if name != "pid"}
        self._variables |= variables(port=urlsplit(ranks[0].url).port)
        pids = [rank.process.pid for rank in ranks]
        self._voice.say(facts | {"ranks": len(ranks), "rank_pids": pids})

    def _end(self, cluster: Cluster, ranks: Sequence[Child]) -> None:
        """Rank 0 ends the others when it has answered the requests under way. Ranks that are loading hold nothing yet."""
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
        """A signal that arrives inside takes effect when the block has ended."""
        self._is_ending = True
        yield
        self._is_ending = False
        if self._exit_code is not None:
            sys.exit(self._exit_code)


def report_error(detail: str) -> None:
    """Report to the supervisor why this rank cannot continue. One write, so that lines of several threads do not mix."""
    os.write(sys.stdout.fileno(), json.dumps({"error": detail}).encode() + b"\n")


class Membership:
    """This process's part in the group of ranks that ``directory`` belongs to. Its block ends when all ranks have left."""

    def __init__(self, settings: Settings, *, rank: int, directory: Path) -> None:
        """Returns when all ranks are there. Raises RankError."""
        from embedwire.engines.transformers.parallel import TensorParallel
        from embedwire.protocol.topology import RankGroup

        size, on_cuda = settings.tensor_parallel_size, settings.device.startswith("cuda")
        self.rank = rank
        self.group = RankGroup.on_one_host(
            size, delivery="share" if settings.delivery == "auto" else settings.delivery
        )
        self.device = f"cuda:{rank}" if on_cuda else settings.device
        self.threads = max(1, (settings.threads or len(os.sched_getaffinity(0))) // size)
        self._settings = settings
        self._directory = directory
        self._on_lost: list[Callable[[str], None]] = []
        self.tensor_parallel = TensorParallel(
            rank,
            size=size,
            address=f"file://{directory}/store",
            backend="nccl" if on_cuda else "gloo",
            timeout_s=settings.rank_timeout_s,
            on_broken=lambda error: self.lose(str(error)),
        )

    def rank_config(self, on_room: Callable[[Reception], None] | None) -> RankConfig:
        """The place of this rank's receiver. All ranks call this together."""
        from embedwire.engines.gloo import GlooCollective
        from embedwire.group import RankConfig

        return RankConfig(
            self.group,
            self.rank,
            address=f"ipc://{self._directory}/agreement",
            collective=GlooCollective(self.tensor_parallel.new_gloo_group()),
            timeout_s=self._settings.rank_timeout_s,
            on_room=on_room,
            on_lost=self.lose,
        )

    @contextmanager
    def leading(self, endpoint: SenderEndpoint) -> Iterator[LeadingSender]:
        """On rank 0: offers on all ranks. All ranks enter this or :meth:`following` together."""
        from embedwire.group import LeadingSender

        addresses = self.tensor_parallel.gather(endpoint.address)
        others = [self._rooms_of(rank) for rank in range(1, self.group.size)]
        with LeadingSender(endpoint, addresses=addresses, others=others) as sender:
            yield sender

    @contextmanager
    def following(self, endpoint: SenderEndpoint) -> Iterator[FollowingSender]:
        """On the other ranks: offers what rank 0 offers."""
        from embedwire.group import FollowingSender

        wait_s = self._settings.memory_wait_s
        with FollowingSender(endpoint, address=self._rooms_of(self.rank), memory_wait_s=wait_s) as sender:
            self.tensor_parallel.gather(endpoint.address)
            yield sender

    def _rooms_of(self, rank: int) -> str:
        return f"ipc://{self._directory}/rooms-{rank}"

    def on_lost(self, callback: Callable[[str], None]) -> None:
        """Register a callback that gets the reason when the group cannot continue, on any thread; it must not block."""
        self._on_lost.append(callback)

    def lose(self, detail: str) -> None:
        """The group cannot continue: run the callbacks, then report to the supervisor, which ends the group."""
        for callback in self._on_lost:
            callback(detail)
        report_error(detail)

    def __enter__(self) -> Membership:
        return self

    def __exit__(self, *raised: object) -> None:
        self.tensor_parallel.close()
        # The supervisor may have been killed. Every rank does this, since each rank that leaves may create torch's file again.
        shutil.rmtree(self._directory, ignore_errors=True)
