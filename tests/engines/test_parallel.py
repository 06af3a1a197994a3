"""Groups of ranks: how they begin and end, and what the loss of a rank does."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
from pathlib import Path

import numpy as np
import psutil
import pytest

from embedwire.engines.transformers.language import LanguageHalf
from embedwire.engines.transformers.parallel import TensorParallel
from embedwire.errors import ConfigurationError, RankError
from embedwire.language.interface import AssembledPrompt

sys.path.insert(0, str(Path(__file__).parent))  # so that the other processes can import it by its name
from rank_worker import STEPS, Group, Reader, ask, timeouts_of

pytestmark = [pytest.mark.model, pytest.mark.e2e]
TEXT = AssembledPrompt(fill_ids=np.arange(5, 14, dtype=np.int32))


def test_groups_come_and_go_and_leave_nothing() -> None:
    """Ranks that ended without waiting for each other were aborted now and then."""
    Group(4).close()
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(10):
        assert Group(4).close() == [0, 0, 0]
    assert not multiprocessing.active_children()
    assert len(os.listdir("/proc/self/fd")) <= before


def test_an_idle_rank_has_no_deadline_and_rank_0_has_one() -> None:
    """A follower waits for the next step in a group of its own; rank 0 waits there for a follower that is not ready."""
    with Group(2, timeout_s=7.0) as group:
        for pipe in group.pipes:
            pipe.send("time-outs")
        assert timeouts_of(group.ranks) == [7.0, 7.0]
        ((signals_s, model_s),) = group.hear()
        assert group.close() == [0]
    assert signals_s > 365 * 86400
    assert model_s == 7.0


def test_nothing_listens_beyond_the_address() -> None:
    """What the ranks say to each other is neither authenticated nor encrypted."""
    with Group(2) as group:
        own = [each.laddr.ip for each in psutil.Process().net_connections("tcp") if each.status == "LISTEN"]
        assert group.close() == [0]
    assert len(own) >= 4, "the store, and a socket a group"
    assert set(own) == {"127.0.0.1"}


@pytest.mark.failure_mode("rank-lost")
def test_a_killed_rank_ends_all_answers_and_all_ranks(tiny_model_dir, tmp_path: Path) -> None:
    """SIGKILL in the middle of an answer: the other ranks exit by themselves."""
    broken: list[RankError] = []
    with Group(4, on_broken=broken.append) as group:
        with group.engine(tiny_model_dir("qwen2_5_vl"), tmp_path) as engine:
            victim = group.processes[1]
            first = Reader(4, victim.kill)
            for reader in [ask(engine, TEXT, first), ask(engine, TEXT), ask(engine, TEXT)]:
                assert reader.wait().end == "error"
                assert reader.deltas[-1].error.startswith("RankError: the tensor-parallel group is broken")
            assert 4 <= len(first.ids) < STEPS
            with pytest.raises(RankError):
                ask(engine, TEXT)
        assert broken == [group.ranks.error]
        assert group.close() == [0, -signal.SIGKILL, 0]


@pytest.mark.failure_mode("rank-lost")
@pytest.mark.invariant("deadlines")
def test_a_stalled_rank_ends_the_step(tiny_model_dir, tmp_path: Path) -> None:
    """SIGSTOP: no step waits longer than ``timeout_s`` for the rank."""
    with Group(2, timeout_s=1.0) as group:
        with group.engine(tiny_model_dir("qwen2_5_vl"), tmp_path) as engine:
            victim = group.processes[0]
            stop = psutil.Process(victim.pid).suspend
            reader = ask(engine, TEXT, Reader(4, stop))
            assert reader.wait().end == "error"
        victim.kill()
        assert group.close() == [-signal.SIGKILL]


@pytest.mark.failure_mode("rank-lost")
@pytest.mark.invariant("deadlines")
def test_nobody_is_told_of_a_step_for_ever() -> None:
    """Followers wait for a step without a deadline, but the broadcast of a step has one; here the follower is absent."""
    with Group(2, timeout_s=1.0) as group:
        with pytest.raises(RuntimeError, match="Timed out"):
            group.ranks.send(b"a step")
        group.processes[0].kill()
        assert group.close() == [-signal.SIGKILL]


def test_a_rank_without_its_arrays_ends_the_group(tiny_model_dir, tmp_path: Path) -> None:
    """Nobody may go on with another prompt than the others."""
    with Group(2) as group:
        with group.engine(tiny_model_dir("llava"), tmp_path) as engine:
            lost = AssembledPrompt(fill_ids=TEXT.fill_ids, key=(1, 1))
            assert ask(engine, lost).wait().end == "error"
        assert "1-1.npz" in group.hear()[0][0]
        assert group.close() == [0]


def test_an_error_at_rank_0_ends_the_group(tiny_model_dir, tmp_path: Path, monkeypatch) -> None:
    """With one rank the next answer is as if nothing had been; with several, caches would differ from then on."""
    with Group(2) as group:
        with group.engine(tiny_model_dir("llava"), tmp_path) as engine:
            with monkeypatch.context() as patch:
                patch.setattr(LanguageHalf, "decode", lambda *_, **__: 1 / 0)
                assert ask(engine, TEXT).wait().end == "error"
            with pytest.raises(RankError, match="division by zero"):
                ask(engine, TEXT)
        assert group.close() == [0]


def test_an_idle_rank_ends_with_rank_0(tiny_model_dir, tmp_path: Path) -> None:
    """It waits without a deadline, but for a connection, which the kernel closes whatever rank 0 died of."""
    with Group(2) as group:
        for pipe in group.pipes:
            pipe.send((tiny_model_dir("llava"), tmp_path, "float32"))
        group.ranks.wait_for_all()
        group.hear()
        group.ranks.broken_by(RuntimeError("rank 0 leaves without a word"))
        group.ranks.close()
        assert "broken, seen by rank 1" in group.hear()[0][0]
        assert group.close() == [0]


@pytest.mark.parametrize(
    ("rank", "address"),
    [(2, "127.0.0.1:1"), (-1, "127.0.0.1:1"), (2, "file:///f"), (0, "localhost"), (0, ":5"), (0, "file://f")],
)
def test_no_such_place_in_a_group(rank: int, address: str) -> None:
    with pytest.raises(ConfigurationError, match="not a rank of a group"):
        TensorParallel(rank, size=2, address=address)
