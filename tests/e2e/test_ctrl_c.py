"""``embedwire up`` and Ctrl-C while requests are under way: they end, and nothing is left."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import psutil
import pytest

pytestmark = [pytest.mark.e2e, pytest.mark.model, pytest.mark.timeout(240)]
READY_S = 90
ENDED_S = 30

Chat = Callable[..., dict[str, Any]]


class Up:
    """A running ``embedwire up``. ``servers`` are its children's facts by name."""

    def __init__(self, model: Path, directory: Path) -> None:
        self.file = directory / "up.json"
        options = (
            "--name tiny --port 0 --dtype float32 --threads 1 --num-blocks 4 --block-size 16 --shutdown-s 2"
        )
        self.process = subprocess.Popen(
            [
                sys.executable,
                "-m",
                "embedwire.cli",
                "up",
                str(model),
                "--json",
                str(self.file),
                *options.split(),
            ],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.servers: dict[str, dict[str, Any]] = {}

    def is_ready(self) -> bool:
        """Whether it has said where its servers are."""
        assert self.process.poll() is None, self.process.communicate()
        if self.file.exists() and (text := self.file.read_text()).endswith("}\n"):
            self.servers = json.loads(text)
        return bool(self.servers)

    def held(self) -> dict[str, set[str]]:
        """What is there of it now: processes, ports that are listened on, shared-memory files."""
        pids = {str(facts["pid"]) for facts in self.servers.values()}
        ports = {
            urlsplit(facts[key]).port
            for facts in self.servers.values()
            for key in ("url", "rooms_at")
            if key in facts
        }
        maps = "".join(Path(f"/proc/{pid}/maps").read_text() for pid in pids)
        segments = set(re.findall(r"/dev/shm/embedwire-\w+", maps))
        return {"processes": pids, "ports": {str(port) for port in ports}, "segments": segments}


def left_of(held: dict[str, set[str]]) -> dict[str, set[str]]:
    """What of that is still there."""
    listening = {str(c.laddr.port) for c in psutil.net_connections("tcp") if c.status == psutil.CONN_LISTEN}
    return {
        "processes": {pid for pid in held["processes"] if psutil.pid_exists(int(pid))},
        "ports": held["ports"] & listening,
        "segments": {path for path in held["segments"] if os.path.exists(path)},
    }


@pytest.fixture
def up(tiny_model_dir: Callable[[str], Path], tmp_path: Path, wait_until: Any) -> Iterator[Up]:
    running = Up(tiny_model_dir("qwen2_5_vl"), tmp_path)
    try:
        wait_until(running.is_ready, within_s=READY_S)
        yield running
    finally:
        running.process.kill()  # and its children end by themselves
        running.process.communicate()


@pytest.mark.failure_mode("leak-at-shutdown")
def test_ctrl_c_with_requests_under_way(
    up: Up, chat: Chat, picture: Callable[..., bytes], wait_until: Any
) -> None:
    """Ctrl-C ends running answers and transfers in bounded time; no process, port or shared memory is left."""
    held = up.held()
    assert left_of(held) == held
    assert [len(held[kind]) for kind in ("processes", "ports", "segments")] == [4, 5, 1]
    router = up.servers["router"]["url"]
    url = f"{router}/v1/chat/completions"
    endless = chat("What is this?", picture(), stream=True, max_tokens=100_000)
    long = chat("all work and no play " * 2000, picture())
    client = httpx.Client(timeout=120, trust_env=False)
    with ThreadPoolExecutor(4) as pool, client, client.stream("POST", url, json=endless) as stream:
        lines = stream.iter_lines()
        assert next(lines).startswith("data: ")
        others = [pool.submit(client.post, url, json=long) for _ in range(4)]
        wait_until(lambda: client.get(f"{router}/health").json()["under_way"] == 5)
        up.process.send_signal(signal.SIGINT)
        out, err = up.process.communicate(timeout=ENDED_S)
        assert (up.process.returncode, err) == (0, ""), out + err
        ends: list[Callable[[], object]] = [lambda: list(lines), *(other.result for other in others)]
        for ended in ends:
            with suppress(httpx.TransportError):  # cut off
                ended()
    assert left_of(held) == {"processes": set(), "ports": set(), "segments": set()}
