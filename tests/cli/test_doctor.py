"""``embedwire doctor``: what works is found by trying it."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from embedwire.cli import doctor

if TYPE_CHECKING:
    from tests.cli.conftest import Run


@pytest.mark.model
def test_doctor_tries_both_wires_and_the_engine(embedwire: Run, tmp_path: Path) -> None:
    file = tmp_path / "found.json"
    ended = embedwire("doctor", "--json", file, timeout_s=200)
    found = {entry["part"]: entry for entry in json.loads(file.read_text())}
    assert ended.returncode == 0, ended.stdout
    for part in ("platform", "wire shm", "wire tcp", "engine transformers"):
        assert found[part]["state"] == "works"
    assert "in 3 rounds" in found["wire tcp"]["detail"]
    for part in ("wire mooncake", "wire nixl", "vllm"):
        remedy = re.search(r"pip install 'embedwire\[\w+\]'|apt install lib\w+", found[part]["detail"])
        assert found[part]["state"] == "works" or remedy


def test_doctor_says_which_wire_is_broken(monkeypatch: pytest.MonkeyPatch) -> None:
    from embedwire.memory.pool import BlockPool

    monkeypatch.setattr(BlockPool, "get_rows", lambda *arguments, **named: None)
    found = doctor._wire("tcp")
    assert (found.state, found.is_needed) == ("broken", True)
