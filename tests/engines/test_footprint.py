"""The measurement runs, in three processes of their own."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from embedwire.engines.transformers import footprint

pytestmark = [pytest.mark.model, pytest.mark.e2e, pytest.mark.timeout(120)]


def test_all_three_are_measured(
    tiny_model_dir: Callable[[str], Path], capfd: pytest.CaptureFixture[str]
) -> None:
    footprint.main([str(tiny_model_dir("qwen3_vl")), "--dtype", "float32"])
    report = json.loads(capfd.readouterr().out)
    assert report["dtype"] == "float32"
    assert list(report["mib"]) == ["undivided", "encode", "language"]
    assert all(0 < numbers["imports"] <= numbers["peak"] for numbers in report["mib"].values())
