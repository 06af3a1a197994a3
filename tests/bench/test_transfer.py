"""The measurement counts what it says it counts. No time is asserted."""

from __future__ import annotations

import os
import secrets
import subprocess
import sys
from collections import Counter
from typing import Any

import numpy as np
import pytest

from embedwire.bench import transfer
from embedwire.bench.payload import Payload
from embedwire.bench.transfer import Subject, measure, steps
from embedwire.errors import ConfigurationError, TransferError


@pytest.mark.parametrize("wire", ["shm", "tcp"])
def test_rounds_and_bytes_are_those_of_the_pool(wire: str) -> None:
    subject = Subject(
        transport=wire, tokens=40, token_bytes=64, pools_tokens=(16, 5), block_size=4, window_rounds=1
    )
    ticks: Counter[str] = Counter()
    cases = measure(subject, repeat=1, on_progress=lambda: ticks.update(["tick"]))
    assert [(c.pool_tokens, c.rounds) for c in cases] == [(40, 1), (16, 3), (8, 5)]
    assert {c.bytes for c in cases} == {40 * 64}
    assert [c.resume_cost is None for c in cases] == [True, False, False]
    assert ticks["tick"] == steps(subject, repeat=1) == 3 * 4
    for case in cases:
        assert case.ratio == case.baseline_median_s / case.median_s
        assert case.one_round_median_s == cases[0].median_s


@pytest.mark.failure_mode("bytes-of-another-room")
def test_a_wrong_byte_ends_the_measurement(monkeypatch: pytest.MonkeyPatch) -> None:
    """The benchmark fills every payload with its room number and fails on a wrong byte."""
    monkeypatch.setattr(transfer._Bench, "_copies", lambda bench, room: 0.0)
    with pytest.raises(TransferError, match="arrived with a wrong byte"):
        measure(Subject(transport="shm", tokens=8, token_bytes=64, pools_tokens=()), repeat=1)


@pytest.mark.parametrize("delivery", ["share", "replicate"])
def test_ranks_are_measured_beside_one(delivery: Any) -> None:
    """Every rank's bytes are looked at; a group of ranks stands beside one rank, in the same run."""
    subject = Subject(
        transport="shm",
        tokens=40,
        token_bytes=64,
        pools_tokens=(16,),
        block_size=4,
        ranks=2,
        delivery=delivery,
    )
    ticks: Counter[str] = Counter()
    cases = measure(subject, repeat=1, on_progress=lambda: ticks.update(["tick"]))
    assert ticks["tick"] == steps(subject, repeat=1) == 3 * (1 + 2 * 2)
    for case in cases:
        assert (case.ranks, case.delivery, case.bytes) == (2, delivery, 40 * 64)
        assert case.one_rank_median_s is not None
        assert case.ranks_ratio == case.one_rank_median_s / case.median_s
    assert [case.rounds for case in cases] == [1, 5]


def test_one_rank_needs_no_torch() -> None:
    """Where there is no group, no model library is loaded."""
    code = (
        "import sys; from embedwire.bench.transfer import Subject, measure;"
        "measure(Subject(transport='shm', tokens=8, token_bytes=64, pools_tokens=()), repeat=1);"
        "sys.exit('torch' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], timeout=60, check=True)


def test_payloads_of_rooms_differ_in_every_word() -> None:
    payload = Payload(4, 64)
    first = payload.fill(1).copy()
    assert payload.equals(first)
    second = payload.fill(2)
    assert not np.any(first.view(np.uint64) == second.view(np.uint64))
    assert not payload.equals(first)


@pytest.mark.parametrize(
    "wrong",
    [
        {"transport": "pigeon"},
        {"tokens": 0},
        {"token_bytes": 12},
        {"pools_tokens": (0,)},
        {"block_size": 0},
        {"ranks": 0},
    ],
)
def test_a_subject_that_can_not_be_measured_is_refused(wrong: dict[str, object]) -> None:
    fine: dict[str, object] = {"transport": "shm", "tokens": 8, "token_bytes": 64, "pools_tokens": ()}
    with pytest.raises(ConfigurationError):
        Subject(**fine | wrong)  # type: ignore[arg-type]


def test_the_child_is_gone_afterwards(monkeypatch: pytest.MonkeyPatch) -> None:
    """And so are the segments: their names are random, and other tests may have some of their own at the same time."""
    drawn: list[str] = []
    token_hex = secrets.token_hex
    monkeypatch.setattr(secrets, "token_hex", lambda *nbytes: drawn.append(token_hex(*nbytes)) or drawn[-1])
    measure(Subject(transport="shm", tokens=8, token_bytes=64, pools_tokens=()), repeat=1)
    from multiprocessing import active_children

    assert active_children() == []
    assert drawn
    assert not {f"embedwire-{name}" for name in drawn}.intersection(os.listdir("/dev/shm"))
