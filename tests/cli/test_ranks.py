"""A group of rank processes: they start, serve, fail and end together, and nothing of them is left."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from embedwire.cli.options import load
from embedwire.cli.ranks import Membership

BODY = Path(__file__).with_name("rank_body.py")
RANKS = 4
LIVES = int(os.environ.get("GROUP_LIVES", "2"))
"""How often a group is started and stopped where each time costs seconds."""
ENDS_WITHIN_S = 30

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(120)]


class Group:
    """A running supervisor and what it says."""

    def __init__(self, mode: str, directory: Path, environment: dict[str, str]) -> None:
        self.directory = directory
        settings = {"TENSOR_PARALLEL_SIZE": RANKS, "SHUTDOWN_S": 0.5}
        self.process = subprocess.Popen(
            [sys.executable, str(BODY), mode],
            env=environment
            | {"TMPDIR": str(directory)}
            | {f"EMBEDWIRE_{name}": str(value) for name, value in settings.items()},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def ready(self) -> dict[str, Any]:
        """What it says when all ranks are ready, in this life."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, self.process.communicate()[1]
        facts: dict[str, Any] = json.loads(line)
        assert len(facts["rank_pids"]) == facts["ranks"] == RANKS
        assert all(psutil.pid_exists(pid) for pid in facts["rank_pids"])
        return facts

    def end(self, number: signal.Signals | None = None) -> tuple[int, list[str]]:
        """Its exit code and what it said on stderr, after this signal."""
        if number is not None:
            self.process.send_signal(number)
        _, said = self.process.communicate(timeout=ENDS_WITHIN_S)
        return self.process.returncode, said.splitlines()

    def left(self, *pids: int) -> list[Any]:
        """Processes and files that are still there."""
        return [pid for pid in pids if psutil.pid_exists(pid)] + list(self.directory.glob("embedwire-*"))


@pytest.fixture
def start(tmp_path: Path, environment: dict[str, str]) -> Iterator[Callable[..., Group]]:
    """``start(mode, **settings)``"""
    started: list[Group] = []

    def start(mode: str, **settings: str) -> Group:
        variables = {f"EMBEDWIRE_{name.upper()}": value for name, value in settings.items()}
        started.append(Group(mode, tmp_path, environment | variables))
        return started[-1]

    yield start
    for group in started:
        group.process.kill()  # and its ranks end by themselves
        group.process.communicate()


@pytest.mark.failure_mode("leak-at-shutdown")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_all_ranks(start: Any, number: signal.Signals) -> None:
    """One signal to the supervisor ends every rank."""
    group = start("well")
    facts = group.ready()
    assert os.path.isdir(facts["directory"])
    assert group.end(number) == (0, [])
    assert group.left(*facts["rank_pids"]) == []


@pytest.mark.failure_mode("leak-at-shutdown")
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 0), (signal.SIGINT, 130)])
def test_a_signal_while_the_ranks_are_loading(start: Any, number: signal.Signals, code: int) -> None:
    """A signal during start also ends every rank."""
    group = start("loads")
    assert [group.process.stderr.readline() for _ in range(RANKS)] == ["loading\n"] * RANKS
    pids = [child.pid for child in psutil.Process(group.process.pid).children()]
    assert group.end(number) == (code, [])
    assert (len(pids), group.left(*pids)) == (RANKS, [])


@pytest.mark.failure_mode("rank-lost", "restart-on-same-address")
def test_a_killed_rank_is_named_and_all_start_anew_on_the_same_port(start: Any) -> None:
    """After the loss of a rank all ranks are restarted together on the same port."""
    group = start("well")
    first = group.ready()
    os.kill(first["rank_pids"][2], signal.SIGKILL)
    second = group.ready()
    assert second["url"] == first["url"]
    assert not set(second["rank_pids"]) & set(first["rank_pids"])
    assert not any(psutil.pid_exists(pid) for pid in first["rank_pids"])
    assert group.end(signal.SIGTERM) == (
        0,
        ["embedwire: rank 2 has ended: killed by signal 9; all ranks start anew"],
    )
    assert group.left(*second["rank_pids"]) == []


def test_or_the_server_ends_with_one_line(start: Any) -> None:
    group = start("well", on_rank_failure="exit")
    facts = group.ready()
    os.kill(facts["rank_pids"][0], signal.SIGKILL)
    assert group.end() == (2, ["embedwire: rank 0 has ended: killed by signal 9"])
    assert group.left(*facts["rank_pids"]) == []


@pytest.mark.failure_mode("rank-lost")
def test_a_rank_that_says_that_the_group_is_lost(start: Any) -> None:
    """A stopped rank does not exit; another rank reports the loss, and the supervisor ends the stopped one too."""
    group = start("well", on_rank_failure="exit")
    facts = group.ready()
    os.kill(facts["rank_pids"][3], signal.SIGSTOP)
    os.kill(facts["rank_pids"][0], signal.SIGUSR1)
    assert group.end() == (2, ["embedwire: rank 0: the group is lost"])
    assert group.left(*facts["rank_pids"]) == []


def test_who_ended_is_named_and_not_who_complains(start: Any) -> None:
    group = start("well", on_rank_failure="exit")
    facts = group.ready()
    for rank in (0, 3):
        os.kill(facts["rank_pids"][rank], signal.SIGUSR1)
    os.kill(facts["rank_pids"][1], signal.SIGKILL)
    assert group.end() == (2, ["embedwire: rank 1 has ended: killed by signal 9"])


def test_a_group_that_never_was_ready_is_not_started_again(start: Any) -> None:
    group = start("refuses")
    code, said = group.end()
    assert (code, len(said)) == (2, 1)
    assert said[0].endswith(": there is no model")
    assert group.left() == []


def test_a_group_that_fails_again_and_again_is_given_up(start: Any) -> None:
    group = start("well")
    for _ in range(5):
        os.kill(group.ready()["rank_pids"][1], signal.SIGKILL)
    lost = "embedwire: rank 1 has ended: killed by signal 9"
    again, given_up = f"{lost}; all ranks start anew", f"{lost}; given up after 5 failures in a row"
    assert group.end() == (2, [again] * 4 + [given_up])
    assert group.left() == []


@pytest.mark.failure_mode("orphaned-process")
def test_ranks_end_when_their_supervisor_is_killed(start: Any) -> None:
    """Ranks exit by themselves when their supervisor is killed."""
    group = start("well")
    ranks = [psutil.Process(pid) for pid in group.ready()["rank_pids"]]
    group.end(signal.SIGKILL)
    gone, alive = psutil.wait_procs(ranks, timeout=ENDS_WITHIN_S)
    assert (len(gone), alive) == (RANKS, [])


@pytest.mark.failure_mode("leak-at-shutdown")
def test_a_stopped_rank_does_not_hold_up_the_end(start: Any) -> None:
    """A stopped rank is killed when the time for a clean exit is over."""
    group = start("well")
    facts = group.ready()
    os.kill(facts["rank_pids"][1], signal.SIGSTOP)
    assert group.end(signal.SIGTERM) == (0, [])
    assert group.left(*facts["rank_pids"]) == []


@pytest.mark.model
@pytest.mark.timeout(60 + 20 * LIVES)
@pytest.mark.parametrize("delivery", ["share", "replicate"])
def test_groups_come_and_go_and_leave_nothing(start: Any, delivery: str) -> None:
    """All but the model: every rank has received a room. No rank is aborted at its end, and nobody says a word."""
    for _ in range(LIVES):
        group = start("moves", delivery=delivery, num_blocks="2", block_size="16")
        facts = group.ready()
        assert len(facts["segments"]) >= 1
        assert group.end(signal.SIGTERM) == (0, [])
        assert group.left(*facts["rank_pids"]) == []
        assert not any(os.path.exists(path) for path in facts["segments"])


@pytest.mark.failure_mode("orphaned-process", "leftovers-of-a-dead-process")
@pytest.mark.model
def test_ranks_clean_up_when_their_supervisor_is_killed(start: Any) -> None:
    """Orphaned ranks remove their rendezvous directory and their shared memory."""
    group = start("moves", num_blocks="2", block_size="16")
    facts = group.ready()
    ranks = [psutil.Process(pid) for pid in facts["rank_pids"]]
    group.end(signal.SIGKILL)
    gone, alive = psutil.wait_procs(ranks, timeout=ENDS_WITHIN_S)
    assert (len(gone), alive, group.left()) == (RANKS, [], [])
    assert not any(os.path.exists(path) for path in facts["segments"])


class Alone:
    """In place of ``TensorParallel``: a rank that joins nobody."""

    def __init__(self, *args: Any, **more: Any) -> None:
        pass

    def close(self) -> None:
        pass


@pytest.mark.failure_mode("leftovers-of-a-dead-process")
@pytest.mark.model
def test_the_last_to_leave_removes_what_the_first_could_not(tmp_path: Path, monkeypatch: Any) -> None:
    """A rank may write into torch's file once more while rank 0 removes the directory; the last rank to leave removes it."""
    from embedwire.engines.transformers import parallel

    monkeypatch.setattr(parallel, "TensorParallel", Alone)
    directory = tmp_path / "group"
    directory.mkdir()
    (directory / "store").touch()
    settings = load({"tensor_parallel_size": 2}).settings
    first, last = (Membership(settings, rank=rank, directory=directory) for rank in range(2))
    with monkeypatch.context() as patched:

        def rmdir(*args: Any, **more: Any) -> None:
            raise OSError(errno.ENOTEMPTY, "Directory not empty")

        patched.setattr(os, "rmdir", rmdir)
        first.__exit__()
    assert directory.exists()
    last.__exit__()
    assert not directory.exists()
