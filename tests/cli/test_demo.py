"""The demo as a stranger runs it."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from embedwire.cli import demo
from embedwire.cli.demo import BLOCK_SIZE, MAX_TOKENS, NUM_BLOCKS
from embedwire.limits import DEFAULT_LIMITS

if TYPE_CHECKING:
    from tests.cli.conftest import Run


@pytest.mark.failure_mode("extreme-length", "longer-than-memory")
@pytest.mark.e2e
@pytest.mark.model
@pytest.mark.timeout(240)
@pytest.mark.parametrize(
    ("family", "transport", "ranks"), [("qwen3_vl", "tcp", 1), ("llava", "shm", 1), ("qwen3_vl", "tcp", 2)]
)
def test_the_divided_model_answers_as_the_undivided_one(
    family: str, transport: str, ranks: int, embedwire: Run, tmp_path: Path
) -> None:
    """An embedding many times larger than the pool arrives whole; afterwards no block is granted."""
    file = tmp_path / "demo.json"
    options = f"--family {family} --transport {transport} --tensor-parallel-size {ranks} --delivery replicate"
    ended = embedwire("demo", *options.split(), "--json", file, timeout_s=200)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    told = json.loads(file.read_text())
    assert all(claim["holds"] for claim in told["claims"])
    assert len(told["claims"]) == (4 if ranks == 1 else 5)
    assert (told["embedwire"]["ranks"], told["embedwire"]["wire_bytes"]) == (
        ranks,
        ranks * told["embedwire"]["bytes"],
    )
    assert told["token_ids"] == told["undivided_token_ids"]
    assert len(told["token_ids"]) == MAX_TOKENS
    assert len(set(told["token_ids"])) > 3
    assert told["embedwire"]["transport"] == transport
    assert max(told["embedwire"]["rounds"]) == NUM_BLOCKS // DEFAULT_LIMITS.window_rounds * BLOCK_SIZE
    assert "Gibberish" in ended.stdout


@pytest.mark.parametrize(("number", "is_drawn"), [(signal.SIGTERM, True), (signal.SIGHUP, False)])
def test_a_demo_that_is_stopped_leaves_nothing(
    number: signal.Signals, is_drawn: bool, environment: dict[str, str], tiny_model: Path, tmp_path: Path
) -> None:
    """By ``timeout``, a job that is cancelled, or a terminal that is closed; with a model of its own, or a given one, for which it need
    not load torch."""
    command = [
        sys.executable,
        "-m",
        "embedwire.cli",
        "demo",
        *([] if is_drawn else ["--model", str(tiny_model)]),
    ]
    with subprocess.Popen(command, env=environment | {"TMPDIR": str(tmp_path)}) as process:
        try:
            deadline = time.monotonic() + 60
            while not list(tmp_path.glob("embedwire-logs-*/*.log")):
                assert time.monotonic() < deadline
                time.sleep(0.05)
            process.send_signal(number)
            assert process.wait(60) == 128 + number
        finally:
            process.kill()
    assert list(tmp_path.glob("embedwire-*")) == []


def test_other_ids_are_not_taken_for_the_same() -> None:
    ids = list(range(MAX_TOKENS))
    assert demo.same_ids(ids, ids).holds
    assert not demo.same_ids(ids, [*ids[:-1], 99]).holds
    assert not demo.same_ids(ids[:-1], ids).holds
    assert "from token 3 on" in demo.same_ids(ids, [*ids[:3], 99]).detail


def test_a_server_that_was_killed_or_a_file_left_behind_is_no_clean_end(tmp_path: Path) -> None:
    left = tmp_path / "embedwire-0"
    left.touch()
    assert demo.ended_cleanly({"router": 0}, {str(tmp_path / "gone")}).holds
    assert not demo.ended_cleanly({"router": 0}, {str(left)}).holds
    assert not demo.ended_cleanly({"router": -9}, set()).holds


@pytest.mark.model
def test_tiny_model_writes_what_transformers_loads(embedwire: Run, tmp_path: Path) -> None:
    options = ("--family", "llava", "--dtype", "bfloat16")
    ended = embedwire("tiny-model", tmp_path / "m", *options, timeout_s=120)
    assert ended.returncode == 0, ended.stderr
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    assert (config["model_type"], config["dtype"]) == ("llava", "bfloat16")
    assert "llava" in ended.stdout
