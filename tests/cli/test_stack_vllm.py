"""A stack of vLLM servers as children of one process, with a stand-in for vLLM: it answers, and nothing of it is left."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import psutil
import pytest

from embedwire.cli import stack
from embedwire.cli.stack import SYSTEMS_PORTS, free_ports

if TYPE_CHECKING:
    from tests.cli.conftest import Run

FAKE_VLLM = Path(__file__).parent / "fake_vllm"
ENDS_WITHIN_S = 30
IMAGE = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}


@pytest.fixture
def with_fake_vllm(environment: dict[str, str]) -> dict[str, str]:
    paths = os.pathsep.join(filter(None, [str(FAKE_VLLM), environment.get("PYTHONPATH")]))
    return environment | {"PYTHONPATH": paths}


class Up:
    """A running ``embedwire up --engine vllm``, and what it says."""

    def __init__(self, environment: dict[str, str], *arguments: str) -> None:
        command = ["up", "--engine", "vllm", "--model", "m", "--port", "0", "--shutdown-s", "5", *arguments]
        self.process = subprocess.Popen(
            [sys.executable, "-m", "embedwire.cli", *command],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert self.process.stdout is not None
        self.said = ""
        for line in iter(self.process.stdout.readline, ""):
            self.said += line
            if line.startswith("Ctrl-C ends"):
                break
        else:
            raise AssertionError(self.process.communicate()[1])
        found = re.findall(r"^(\w+ ?\d?) +(http://\S+) +(\d+)", self.said, re.MULTILINE)
        self.urls = {name.strip(): url for name, url, _ in found}
        self.children = psutil.Process(self.process.pid).children(recursive=True)

    def connectors(self, role: str) -> list[dict[str, Any]]:
        """What the connectors of all encoders or language servers were told, in their order."""
        commands = [child.cmdline() for child in self.children]
        flags = [flags_of(command) for command in commands if "vllm.entrypoints.openai.api_server" in command]
        told = {each["--port"]: json.loads(each["--ec-transfer-config"]) for each in flags}
        urls = [url for name, url in self.urls.items() if name.startswith(role)]
        return [told[url.rpartition(":")[2]]["ec_connector_extra_config"] for url in urls]

    def ask(self, *parts: Any) -> dict[str, Any]:
        body = {"model": "m", "messages": [{"role": "user", "content": [*parts]}]}
        answer = httpx.post(f"{self.urls['router']}/v1/chat/completions", json=body, timeout=20)
        assert answer.status_code == 200, answer.text
        told: dict[str, Any] = answer.json()
        return told


@pytest.fixture
def up(with_fake_vllm: dict[str, str]) -> Iterator[Up]:
    running = Up(with_fake_vllm, "--encoders", "2", "--vllm-args", "--seed '4 2'")
    yield running
    running.process.kill()
    running.process.communicate()
    for child in psutil.wait_procs(running.children, timeout=ENDS_WITHIN_S)[1]:
        child.kill()


@pytest.mark.e2e
@pytest.mark.timeout(120)
def test_it_answers_and_ctrl_c_leaves_nothing_behind(up: Up) -> None:
    assert list(up.urls) == ["router", "encoder 1", "encoder 2", "language 1"], up.said
    assert len(up.children) == 1 + 3 * 3, "a router; and of each server what watches it, vLLM, and vLLM's own"
    answer = up.ask(IMAGE, {"type": "text", "text": "what?"})
    assert answer["embedwire"]["encoders"][0] in (up.urls["encoder 1"], up.urls["encoder 2"])
    told = json.loads(answer["choices"][0]["message"]["content"])
    connector = told["config"]["ec_connector_extra_config"]
    assert connector["report_to"] == [up.urls["router"]]
    assert connector["prefetch"]
    ports = [encoder["port"] for encoder in up.connectors("encoder")]
    assert connector["encoders"] == [f"tcp://127.0.0.1:{port}" for port in ports]
    assert len(set(ports)) == 2
    assert told["argv"][-2:] == ["--seed", "4 2"]
    assert told["asked"]["ec_transfer_params"]["embedwire"]["items"].keys() == {"some-hash"}
    up.process.send_signal(signal.SIGINT)
    up.process.communicate(timeout=ENDS_WITHIN_S)
    assert up.process.returncode == 0
    assert psutil.wait_procs(up.children, timeout=ENDS_WITHIN_S)[1] == []


@pytest.mark.failure_mode("orphaned-process")
@pytest.mark.e2e
@pytest.mark.timeout(120)
def test_nothing_is_left_when_it_is_killed(up: Up) -> None:
    """The process that watches the vLLM servers ends them when ``up`` is killed."""
    up.process.kill()
    up.process.wait()
    assert psutil.wait_procs(up.children, timeout=ENDS_WITHIN_S)[1] == []


@pytest.mark.e2e
@pytest.mark.timeout(120)
def test_a_server_that_dies_is_named(up: Up) -> None:
    (dying,) = (
        c for c in up.children if "api_server" in str(c.cmdline()) and "ec_consumer" in str(c.cmdline())
    )
    dying.kill()
    _, stderr = up.process.communicate(timeout=ENDS_WITHIN_S)
    assert up.process.returncode == 2
    assert re.search(r"language 1.*has ended", stderr), stderr
    assert "vLLM has ended: exit code -9" in stderr
    assert psutil.wait_procs(up.children, timeout=ENDS_WITHIN_S)[1] == []


@pytest.mark.e2e
@pytest.mark.timeout(120)
def test_a_server_that_can_not_start_is_named_with_its_last_words(
    embedwire: Run, with_fake_vllm: dict[str, str]
) -> None:
    ended = embedwire(
        "up", "m", "--engine", "vllm", "--port", 0, "--vllm-encoder-args=--fails",
        PYTHONPATH=with_fake_vllm["PYTHONPATH"],
    )  # fmt: skip
    assert ended.returncode == 2
    assert "encoder 1 | no such model: m" in ended.stderr, ended.stderr


def test_ports_are_none_that_the_system_gives_out_meanwhile() -> None:
    """vLLM takes half a minute until it listens at all of its ports, and whoever connects somewhere takes one of the system's range."""
    first, last = map(int, SYSTEMS_PORTS.read_text().split())
    ports = free_ports(50)
    assert len(set(ports)) == 50
    assert not [port for port in ports if first <= port <= last]


def test_or_they_are_where_there_are_no_others(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    everything = tmp_path / "range"
    everything.write_text("1024\t65535\n")
    monkeypatch.setattr(stack, "SYSTEMS_PORTS", everything)
    assert len(set(free_ports(5))) == 5


def flags_of(command: list[str]) -> dict[str, str]:
    return {a: b for a, b in pairwise(command) if a.startswith("--")}


@pytest.mark.e2e
@pytest.mark.timeout(120)
def test_several_language_servers_fetch_only_what_they_are_asked_for(
    with_fake_vllm: dict[str, str],
) -> None:
    """Ahead of that, each would fetch everything that the encoders make."""
    running = Up(with_fake_vllm, "--languages", "2")
    try:
        told = running.connectors("language")
        assert len(told) == 2
        assert not any({"encoders", "prefetch"} & each.keys() for each in told)
    finally:
        running.process.send_signal(signal.SIGINT)
        running.process.communicate(timeout=ENDS_WITHIN_S)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("up", "--engine", "vllm"), "give the model once"),
        (("up", "a", "--model", "b"), "give the model once"),
        (("router", "--engine", "vllm"), "registry_url or the URLs of language servers"),
        (("router", "--engine", "vllm", "--worker-urls", "http://a"), "encoder and language"),
        (("up", "a", "--engine", "vllm", "--host", "203.0.113.1"), "cannot listen on 203.0.113.1"),
        (("up", "a", "--engine", "vllm", "--vllm-connector", "[1]"), "JSON object: it is no object"),
        (("up", "a", "--engine", "vllm", "--vllm-connector", '{"a": 1}'), "unknown field `a`"),
        (("up", "a", "--engine", "vllm", "--encoder-tensor-parallel-size", "2"), "--vllm-encoder-args"),
    ],
)
def test_what_can_not_be_is_said_in_one_line(embedwire: Run, arguments: tuple[str, ...], said: str) -> None:
    ended = embedwire(*arguments)
    assert ended.returncode == 2
    assert said in ended.stderr
    assert len(ended.stderr.splitlines()) == 1, ended.stderr
