"""``embedwire bench transfer`` as scripts read it."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from embedwire.bench.transfer import Case
from embedwire.bench.wires import WireCase
from embedwire.cli import bench
from embedwire.cli.screen import out, size
from embedwire.transports.mooncake import SYSTEM_PACKAGES

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


@pytest.fixture
def without(tmp_path: Path) -> Callable[..., str]:
    """``without(*packages)``: a PYTHONPATH on which these vendor packages are present, and a system library that they need is not."""

    def make(*packages: str) -> str:
        for package in packages:
            (tmp_path / package).mkdir()
            (tmp_path / package / "__init__.py").write_text(
                f'raise ImportError("lib{package}.so.1: cannot open shared object file: No such file or directory")'
            )
        return os.pathsep.join((str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])))

    return make


SMALL = ("--tokens", 30, "--token-bytes", 64, "--repeat", 1)
REMEDY = f"apt install {SYSTEM_PACKAGES}): libmooncake.so.1: cannot open shared object file"


def test_transfer_measures_what_can_run(embedwire: Run, without: Callable[..., str], tmp_path: Path) -> None:
    """One that was named and cannot run is named in one line, after the others were measured."""
    file = tmp_path / "bench.json"
    ended = embedwire(
        "bench", "transfer", *SMALL, "--transport", "mooncake", "--transport", "shm", "--json", file,
        PYTHONPATH=without("mooncake"),
    )  # fmt: skip
    assert ended.returncode == 2, ended.stderr
    (line,) = ended.stderr.splitlines()
    assert line.startswith("embedwire: mooncake was not measured: ")
    assert REMEDY in line
    assert [case["transport"] for case in json.loads(file.read_text())["cases"]] == ["shm"]


@pytest.mark.parametrize(
    ("command", "sizes"), [("transfer", SMALL), ("wires", ("--mebibytes", 1, "--repeat", 1))]
)
def test_a_transport_that_was_named_and_cannot_run(
    embedwire: Run, without: Callable[..., str], command: str, sizes: tuple[object, ...], tmp_path: Path
) -> None:
    file = tmp_path / "bench.json"
    ended = embedwire(
        "bench", command, *sizes, "--transport", "mooncake", "--json", file, PYTHONPATH=without("mooncake")
    )
    assert ended.returncode == 2
    (line,) = ended.stderr.splitlines()
    assert line.startswith("embedwire: mooncake was not measured: ")
    assert REMEDY in line
    assert not file.exists()


def test_wires_measures_what_can_run(embedwire: Run, without: Callable[..., str], tmp_path: Path) -> None:
    """No transport was named, so one that cannot run is no failure as long as another one can."""
    file = tmp_path / "bench.json"
    paths = without("mooncake")
    ended = embedwire("bench", "wires", "--mebibytes", 1, "--repeat", 1, "--json", file, PYTHONPATH=paths)
    *_, line = ended.stderr.splitlines()
    if "nixl was not measured" in line:
        assert ended.returncode == 2
        pytest.skip("nixl is not installed")
    assert ended.returncode == 0, ended.stderr
    assert ended.stderr.startswith("embedwire: mooncake was not measured: ")
    assert REMEDY in line
    assert len(ended.stderr.splitlines()) == 1
    (case,) = json.loads(file.read_text())["cases"]
    assert case["transport"] == "nixl"
    assert case.keys() == {field.name for field in fields(WireCase)}


def test_wires_with_nothing_to_measure(embedwire: Run, without: Callable[..., str]) -> None:
    ended = embedwire("bench", "wires", PYTHONPATH=without("mooncake", "nixl"))
    assert ended.returncode == 2
    assert [line.split(" was ")[0] for line in ended.stderr.splitlines()] == [
        "embedwire: mooncake",
        "embedwire: nixl",
    ]
    assert ended.stdout == ""


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
