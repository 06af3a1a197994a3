"""Server processes from both sides: signals, readiness, and children that are started, watched and stopped."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from queue import Empty

import httpx
import pytest

from embedwire.cli.processes import SIGNAL_WAIT_S, ChildFailed, Cluster, Voice

SCRIPT = """
import os, signal
from fastapi import FastAPI
from embedwire.cli.processes import Voice, begin, serve
from embedwire.cli.options import load

class Impatient(Voice):
    def say(self, facts):
        os.kill(os.getpid(), first)

first, second = signal.{first}, signal.{second}
loaded = load()
begin(loaded.settings, is_child=False)
serve(FastAPI(), loaded.settings, {{"role": "test"}}, voice=Impatient(None, False))
os.kill(os.getpid(), second)
print("cleaned up")
"""


@pytest.mark.failure_mode("leak-at-shutdown")
@pytest.mark.parametrize(
    ("first", "second"),
    [(first, second) for first in ("SIGTERM", "SIGINT") for second in ("SIGTERM", "SIGINT")]
    + [("SIGHUP", "SIGHUP")],
)
def test_a_second_signal_does_not_interrupt_the_cleaning_up(
    first: str, second: str, environment: dict[str, str]
) -> None:
    """An interrupted cleanup would leave shared memory behind."""
    ended = subprocess.run(
        [sys.executable, "-c", SCRIPT.format(first=first, second=second)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (ended.returncode, ended.stdout) == (0, "cleaned up\n"), ended.stderr


@pytest.mark.parametrize("is_ignored", [False, True])
def test_a_terminal_that_is_closed(is_ignored: bool, environment: dict[str, str]) -> None:
    """It ends what holds memory in order, while a model is loading too; not where whoever started it wants it to go on, as nohup does."""
    script = f"""
import os, signal
from embedwire.cli.processes import begin
from embedwire.cli.options import load
if {is_ignored}:
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
begin(load().settings, is_child=False)
try:
    os.kill(os.getpid(), signal.SIGHUP)
    print("goes on")
finally:
    os.kill(os.getpid(), signal.SIGHUP)
    print("cleaned up")
"""
    ended = subprocess.run(
        [sys.executable, "-c", script],
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    said = "goes on\ncleaned up\n" if is_ignored else "cleaned up\n"
    assert (ended.returncode, ended.stdout) == (0, said), ended.stderr


def test_a_server_says_that_it_is_ready_in_a_file_and_to_people(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "ready.json"
    Voice(file, is_child=False).say({"role": "encoder", "url": "http://here:1", "rooms_at": "tcp://here:2"})
    assert json.loads(file.read_text())["url"] == "http://here:1"
    assert [path.name for path in tmp_path.iterdir()] == ["ready.json"]
    assert capsys.readouterr().out == "encoder ready at http://here:1\n  rooms at: tcp://here:2\n"
    Voice(None, is_child=True).say({"role": "encoder", "url": "http://here:1"})
    assert json.loads(capsys.readouterr().out)["pid"] == os.getpid()


@pytest.mark.e2e
@pytest.mark.model
@pytest.mark.timeout(240)
def test_a_child_that_can_not_start_is_named_with_its_last_words() -> None:
    with Cluster({}) as cluster:
        child = cluster.start("encoder", "encoder", "/nowhere/at/all")
        with pytest.raises(
            ChildFailed, match=r"(?s)encoder has ended: exit code 2.*encoder \| embedwire: .*/nowhere"
        ):
            cluster.wait_ready([child], timeout_s=120)


@pytest.mark.e2e
def test_a_child_that_is_not_ready_in_time_is_named() -> None:
    with Cluster({}) as cluster:
        child = cluster.start("registry", "registry")
        with pytest.raises(ChildFailed, match="registry was not ready within 0 s"):
            cluster.wait_ready([child], timeout_s=0)


@pytest.mark.e2e
def test_stop_gives_the_exit_code_of_each() -> None:
    with Cluster({}) as cluster:
        cluster.wait_ready([cluster.start("registry", "registry")], timeout_s=60)
        assert cluster.stop() == {"registry": 0}
        assert cluster.stop() == {}


def test_no_wait_for_a_child_keeps_signals_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that came just as the wait began is heard of when it ends, however long the whole of it is."""
    waits: list[float] = []

    class Events:
        def get(self, timeout: float | None = None) -> None:
            waits.append(math.inf if timeout is None else timeout)
            if len(waits) == 3:
                raise KeyboardInterrupt
            raise Empty

    with Cluster({}) as cluster:
        monkeypatch.setattr(cluster, "_events", Events())
        with pytest.raises(KeyboardInterrupt):
            cluster.watch()
        assert waits == [SIGNAL_WAIT_S] * 3
        waits.clear()
        cluster.watch(timeout_s=0.0)
        assert waits == [0.0]


@pytest.mark.e2e
@pytest.mark.parametrize("level", ["info", "warning"])
def test_the_log_level_decides_whether_requests_are_logged(
    level: str, tmp_path: Path, environment: dict[str, str]
) -> None:
    """One line a request, on stderr, and no second one by uvicorn."""
    ready = tmp_path / "ready.json"
    command = ["router", "--worker-urls", "http://127.0.0.1:9", "--port", "0", "--ready-file", str(ready)]
    with subprocess.Popen(
        [sys.executable, "-m", "embedwire.cli", *command, "--log-level", level],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as router:
        assert router.stdout is not None
        router.stdout.readline()  # it is ready
        url = json.loads(ready.read_text())["url"]
        assert httpx.get(f"{url}/v1/models", timeout=60, trust_env=False).status_code == 200
        router.terminate()
        _, logged = router.communicate(timeout=60)
    lines = [line for line in logged.splitlines() if "/v1/models" in line]
    assert len(lines) == (level == "info")
    assert all(" INFO embedwire.serve.requests GET /v1/models status=200 ms=" in line for line in lines)
