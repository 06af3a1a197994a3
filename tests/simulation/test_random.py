"""Random worlds: whatever is drawn, what has to hold holds. A failing one prints the line that replays it."""

from __future__ import annotations

import os
import subprocess
import sys
from collections import Counter

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from embedwire.limits import Limits
from embedwire.testing.sim_link import Weather
from embedwire.testing.sim_random import RandomWorld, main, run_seed
from embedwire.testing.simulation import FENCED, ONE_SIDED, InvariantBroken, WireFaults, World


@pytest.mark.failure_mode(
    "message-lost",
    "message-repeated-or-late",
    "encoder-killed",
    "language-server-killed",
    "abort-not-propagated",
    "bytes-of-another-room",
)
@pytest.mark.invariant("conservation")
@pytest.mark.parametrize("first", range(0, 300, 50))
def test_random_worlds(first: int) -> None:
    """50 worlds with random sizes, link faults and process faults: every room ends, and no memory is held afterwards."""
    ends: Counter[str] = Counter()
    for seed in range(first, first + 50):
        ends += run_seed(seed)[1]
    assert ends["done"] > ends.total() / 3, ends


def test_equal_seeds_give_equal_traces() -> None:
    """A seed replays its world exactly, in another process with other hashes too."""
    here = run_seed(5)[0].world.timeline.trace_hash
    code = (
        "from embedwire.testing.sim_random import run_seed; print(run_seed(5)[0].world.timeline.trace_hash)"
    )
    for hash_seed in ("1", "2"):
        path = os.pathsep.join(p for p in sys.path if p)
        environment = {**os.environ, "PYTHONHASHSEED": hash_seed, "PYTHONPATH": path}
        there = subprocess.run(
            [sys.executable, "-c", code],
            env=environment,
            capture_output=True,
            text=True,
            check=True,
            timeout=120,
        )
        assert there.stdout.strip() == here
    assert run_seed(6)[0].world.timeline.trace_hash != here


def test_the_command_line_prints_counts(capsys: pytest.CaptureFixture[str]) -> None:
    """``python -m embedwire.testing.simulation --seed N --runs K``."""
    assert main(["--seed", "3", "--runs", "2"]) == 0
    assert "2 worlds" in capsys.readouterr().out
    assert main(["--seed", "3"]) == 0
    assert "trace" in capsys.readouterr().out


def test_a_broken_world_prints_how_to_replay_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The line is the last one of the story."""

    def broken(self: RandomWorld) -> None:
        raise InvariantBroken("for the test")

    monkeypatch.setattr(RandomWorld, "run", broken)
    with pytest.raises(InvariantBroken):
        run_seed(41)
    assert capsys.readouterr().err.splitlines()[-1] == "replay: make sim SEED=41"


@pytest.mark.failure_mode("extreme-length", "longer-than-memory")
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    rooms=st.lists(st.integers(1, 700), min_size=1, max_size=6),
    block_size=st.integers(1, 130),
    num_blocks=st.integers(1, 12),
    default=st.integers(1, 800),
    window=st.integers(1, 16),
    slice_tokens=st.integers(1, 300),
    wire=st.sampled_from([FENCED, ONE_SIDED]),
    loss=st.floats(0, 0.2),
)
def test_any_sizes_come_through(
    rooms: list[int],
    block_size: int,
    num_blocks: int,
    default: int,
    window: int,
    slice_tokens: int,
    wire: str,
    loss: float,
) -> None:
    """Any length through any pool, in rounds of any size; Hypothesis finds the smallest failing example."""
    weather = Weather(loss=loss, doubling=loss, delay_s=(0.001, 0.01))
    limits = Limits(window_rounds=window, blocks_wait_s=3600.0, peer_silence_s=10.0)
    world = World(1, limits=limits, weather=weather)
    world.add_sender(faults=WireFaults(slice_tokens=slice_tokens))
    world.add_receiver(
        block_size=block_size, num_blocks=num_blocks, default_allocate_tokens=default, wire=wire
    )
    transfers = [world.request(room, tokens) for room, tokens in enumerate(rooms, start=1)]
    world.settle()
    for transfer in transfers:
        assert transfer.is_done
        assert sum(transfer.rounds) == transfer.total_tokens
        assert all(g.allocated_tokens == len(g.block_indices) * block_size for g in transfer.grants)
