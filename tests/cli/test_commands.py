"""Every command explains itself, imports nothing heavy for that, and says one line when it fails."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from embedwire.cli.process import Voice

if TYPE_CHECKING:
    from tests.cli.conftest import Run


COMMANDS = (
    ("demo",),
    ("ask",),
    ("tiny-model",),
    ("up",),
    ("registry",),
    ("router",),
    ("encoder",),
    ("language",),
    ("doctor",),
    ("settings",),
    ("bench",),
    ("bench", "transfer"),
)


def test_help_lists_every_command(embedwire: Run) -> None:
    ended = embedwire("--help")
    assert ended.returncode == 0
    for command, *_ in COMMANDS:
        assert f" {command} " in ended.stdout


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_every_command_has_a_help_that_names_its_exit_codes(command: tuple[str, ...], embedwire: Run) -> None:
    ended = embedwire(*command, "--help")
    assert ended.returncode == 0, ended.stderr
    if command != ("bench",):
        assert "code 0" in " ".join(ended.stdout.split())
        assert "2:" in ended.stdout or command == ("doctor",)


def test_help_imports_neither_torch_nor_a_server(embedwire: Run) -> None:
    code = (
        "import sys, embedwire.cli.app;"
        "print([m for m in ('torch', 'transformers', 'numpy', 'zmq', 'fastapi', 'uvicorn') if m in sys.modules])"
    )
    ended = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True
    )
    assert ended.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("router",), "registry_url or worker_urls"),
        (("registry", "--misses-to-evict", "0"), "misses_to_evict is"),
        (
            ("router", "--worker-urls", "http://a", "--registry-url", "http://b"),
            "registry_url or worker_urls",
        ),
        (
            ("router", "--registry-url", "registry:9000"),
            "registry_url is 'registry:9000' (--registry-url): it has to begin with http://",
        ),
        (
            ("router", "--worker-urls", "http://a,b"),
            "worker_urls is 'b' (--worker-urls): it has to begin with http://",
        ),
        (("encoder", "no-model", "--host", "0.0.0.0"), "host 0.0.0.0 is no address that others can be told"),
        (("language", "no-model", "--host", "::"), "host :: is no address that others can be told"),
        (("up", "no-model", "--host", "203.0.113.1"), "can not listen on 203.0.113.1:8000"),
        (("registry", "--host", "203.0.113.1"), "can not listen on 203.0.113.1:0"),
        (("ask", "hello", "--url", "http://127.0.0.1:1"), "router http://127.0.0.1:1"),
        (("ask", "hello", "/nowhere.png", "--model", "m"), "image /nowhere.png: No such file"),
        (("bench", "transfer", "--transport", "pigeon"), "'pigeon' has no baseline"),
        (("bench", "transfer", "--token-bytes", "7"), "token_bytes is 7"),
        (("bench", "transfer", "--json", "/nowhere/x.json"), "there is no directory /nowhere"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_an_error_is_one_line_with_its_cause_and_exit_code_2(
    arguments: tuple[str, ...], said: str, embedwire: Run
) -> None:
    ended = embedwire(*arguments)
    assert ended.returncode == 2
    assert said in ended.stderr
    assert len(ended.stderr.strip().splitlines()) == 1, ended.stderr
    assert "Traceback" not in ended.stderr


@pytest.mark.model
def test_tiny_model_writes_what_transformers_loads(embedwire: Run, tmp_path: Path) -> None:
    options = ("--family", "llava", "--dtype", "bfloat16")
    ended = embedwire("tiny-model", tmp_path / "m", *options, timeout_s=120)
    assert ended.returncode == 0, ended.stderr
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    assert (config["model_type"], config["dtype"]) == ("llava", "bfloat16")
    assert "llava" in ended.stdout


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
    from embedwire.cli import doctor
    from embedwire.memory.pool import BlockPool

    monkeypatch.setattr(BlockPool, "get_rows", lambda *arguments, **named: None)
    found = doctor._wire("tcp")
    assert (found.state, found.is_needed) == ("broken", True)


def test_a_port_that_is_taken_is_said(embedwire: Run) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        ended = embedwire("registry", "--port", port)
    assert ended.returncode == 2
    assert f"can not listen on 127.0.0.1:{port}" in ended.stderr


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
