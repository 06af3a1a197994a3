"""``embedwire bench transfer`` as scripts read it."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING

from embedwire.bench.transfer import Case
from embedwire.cli import bench
from embedwire.cli.screen import out, size

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


def test_a_row_with_ranks_is_one_line_of_80_characters() -> None:
    case = Case(
        transport="mooncake", tokens=16384, token_bytes=4096, bytes=2**26, pool_tokens=16384, window_rounds=2, rounds=16,
        repeat=9, median_s=0.04269, best_s=0.03, baseline="", baseline_median_s=0.02232, ratio=0.62, one_round_median_s=0.04,
        resume_cost=1.05, ranks=4, delivery="replicate", one_rank_median_s=0.04, ranks_ratio=0.93,
    )  # fmt: skip
    with out.capture() as said:
        bench._show([case])
    head, row = said.get().splitlines()
    assert head.split()[-1] == "ranks"
    assert row.split()[-3:] == ["4", "replicate:", "0.93"]
