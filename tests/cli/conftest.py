"""The command line as its users start it: a process of its own, without this process's settings."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

Run = Callable[..., "subprocess.CompletedProcess[str]"]


def clean_environment(**variables: str) -> dict[str, str]:
    """This process's environment without settings of ours, in a width that wraps no line."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("EMBEDWIRE_")}
    return kept | {"COLUMNS": "200", "NO_COLOR": "1", "OMP_NUM_THREADS": "1"} | variables


@pytest.fixture
def environment() -> dict[str, str]:
    """What children of a test see."""
    return clean_environment()


@pytest.fixture
def embedwire() -> Run:
    """Runs ``embedwire ARGUMENTS`` to its end, bounded in time."""

    def run(*arguments: object, timeout_s: float = 60, **variables: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "embedwire.cli", *map(str, arguments)],
            env=clean_environment(**variables),
            capture_output=True,
            text=True,
            timeout=timeout_s,
            check=False,
        )

    return run


@pytest.fixture(autouse=True)
def no_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the caller of the tests has set does not count."""
    for name in os.environ:
        if name.startswith("EMBEDWIRE_"):
            monkeypatch.delenv(name)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random checkpoint."""
    from embedwire.engines.transformers.tiny_model import write_tiny_model

    return write_tiny_model(tmp_path_factory.mktemp("models") / "tiny", "qwen2_5_vl")
