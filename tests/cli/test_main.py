"""Every command explains itself, imports nothing heavy for that, and says one line when it fails."""

from __future__ import annotations

import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

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
        "import sys, embedwire.cli.__main__;"
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
        (("up", "no-model", "--host", "203.0.113.1"), "cannot listen on 203.0.113.1:8000"),
        (("registry", "--host", "203.0.113.1"), "cannot listen on 203.0.113.1:0"),
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
