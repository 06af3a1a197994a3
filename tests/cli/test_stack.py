"""A whole stack as children of one process: it answers, and nothing of it is left."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import psutil
import pytest

if TYPE_CHECKING:
    from tests.cli.conftest import Run

pytestmark = [pytest.mark.e2e, pytest.mark.model, pytest.mark.timeout(240)]
ENDS_WITHIN_S = 30


class Up:
    """A running ``embedwire up`` and what it says."""

    def __init__(self, model: Path, environment: dict[str, str]) -> None:
        command = [
            "up",
            str(model),
            "--port",
            "0",
            "--name",
            "tiny",
            "--dtype",
            "float32",
            "--shutdown-s",
            "5",
        ]
        self.process = subprocess.Popen(
            [sys.executable, "-m", "embedwire.cli", *command],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert self.process.stdout is not None
        lines = iter(self.process.stdout.readline, "")
        self.said = "".join(line for line in _until(lines, "Ctrl-C ends"))
        assert "Ctrl-C ends" in self.said, self.process.communicate()[1]
        found = re.findall(r"^(\w+ ?\d?) +(http://\S+) +(\d+)", self.said, re.MULTILINE)
        self.urls = {name.strip(): url for name, url, _ in found}
        self.children = {name.strip(): psutil.Process(int(pid)) for name, _, pid in found}

    def segments(self) -> set[str]:
        """Shared-memory files of the stack."""
        maps = "".join(Path(f"/proc/{child.pid}/maps").read_text() for child in self.children.values())
        return set(re.findall(r"/dev/shm/embedwire-\w+", maps))

    def left(self, segments: set[str]) -> list[str]:
        """What is still there: processes, ports, files."""
        processes = [name for name, child in self.children.items() if child.is_running()]
        ports = [url for url in self.urls.values() if _answers(url)]
        return processes + ports + [path for path in segments if os.path.exists(path)]


def _until(lines: Iterator[str], end: str) -> Iterator[str]:
    for line in lines:
        yield line
        if line.startswith(end):
            return


def _answers(url: str) -> bool:
    parts = urlsplit(url)
    with socket.socket() as probe:
        return probe.connect_ex((parts.hostname, parts.port)) == 0


@pytest.fixture
def up(tiny_model: Path, environment: dict[str, str]) -> Iterator[Up]:
    running = Up(tiny_model, environment)
    yield running
    running.process.kill()
    running.process.communicate()
    for child in psutil.wait_procs(list(running.children.values()), timeout=ENDS_WITHIN_S)[1]:
        child.kill()


def test_it_answers_and_ctrl_c_leaves_nothing_behind(up: Up, embedwire: Run, tmp_path: Path) -> None:
    from PIL import Image

    assert set(up.urls) == {"router", "encoder 1", "language 1", "registry"}, up.said
    image, file = tmp_path / "red.png", tmp_path / "answer.json"
    Image.new("RGB", (112, 56), "red").save(image)
    ended = embedwire(
        "ask", "What is this?", image, "--url", up.urls["router"], "--max-tokens", 5, "--json", file
    )
    assert ended.returncode == 0, ended.stderr
    told: dict[str, Any] = json.loads(file.read_text())
    assert told["answer"].strip() in ended.stdout
    assert told["embedwire"]["encoder"] == up.urls["encoder 1"]
    assert sum(told["embedwire"]["rounds"]) == told["embedwire"]["total_tokens"] > 8
    segments = up.segments()
    assert len(segments) == 1
    up.process.send_signal(signal.SIGINT)
    up.process.communicate(timeout=ENDS_WITHIN_S)
    assert up.process.returncode == 0
    assert up.left(segments) == []


@pytest.mark.failure_mode("orphaned-process")
def test_when_a_child_dies_it_says_which_and_ends_the_rest(up: Up) -> None:
    """A killed server is named, and the remaining servers are ended."""
    segments = up.segments()
    up.children["encoder 1"].kill()
    _, stderr = up.process.communicate(timeout=ENDS_WITHIN_S)
    assert up.process.returncode == 2
    assert "encoder 1 has ended: killed by signal 9" in stderr
    assert up.left(segments) == []


@pytest.mark.failure_mode("orphaned-process")
def test_children_end_when_their_parent_is_killed(up: Up) -> None:
    """Servers exit by themselves when their parent process is killed."""
    segments = up.segments()
    up.process.kill()
    up.process.wait()
    gone, alive = psutil.wait_procs(list(up.children.values()), timeout=ENDS_WITHIN_S)
    assert (len(gone), alive) == (4, [])
    assert up.left(segments) == []
