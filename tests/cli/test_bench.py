"""``embedwire bench transfer`` as scripts read it."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING

from embedwire.cli.screen import size

if TYPE_CHECKING:
    from tests.cli.conftest import Run

CASE_FIELDS = {
    "transport", "tokens", "token_bytes", "bytes", "pool_tokens", "window_rounds", "rounds", "repeat", "median_s", "best_s",
    "baseline", "baseline_median_s", "ratio", "one_round_median_s", "resume_cost",
    "ranks", "delivery", "one_rank_median_s", "ranks_ratio",
}  # fmt: skip


def test_the_command_writes_host_and_cases(embedwire: Run, tmp_path: Path) -> None:
    file = tmp_path / "bench.json"
    ended = embedwire(
        "bench", "transfer", "--tokens", 300, "--token-bytes", 64, "--pool-tokens", 128, "--transport", "shm",
        "--transport", "tcp", "--repeat", 1, "--json", file,
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr
    found = json.loads(file.read_text())
    assert found["host"]["cores"] == len(os.sched_getaffinity(0))
    assert {"cpu", "memory_bytes", "kernel", "python"} <= found["host"].keys()
    assert [(c["transport"], c["rounds"]) for c in found["cases"]] == [
        ("shm", 1),
        ("shm", 3),
        ("tcp", 1),
        ("tcp", 3),
    ]
    assert all(c.keys() == CASE_FIELDS for c in found["cases"])
    assert size(300 * 64) in ended.stdout


def test_a_row_with_ranks_is_one_line_of_80_characters(embedwire: Run) -> None:
    ended = embedwire(
        "bench", "transfer", "--tokens", 16384, "--token-bytes", 64, "--transport", "shm", "--ranks", 1, "--ranks", 2,
        "--repeat", 1,
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr
    _, head, *rows = ended.stdout.splitlines()
    assert head.split()[-1] == "ranks"
    assert [row.split()[0] for row in rows] == ["shm", "shm"]
