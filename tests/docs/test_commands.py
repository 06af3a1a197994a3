"""Commands that the pages show in ``console`` blocks: those that can be are run once, page by page, in order; the rest are looked up.

A line that begins with ``$`` is a command; lines behind it are what it prints, and are compared. Each page has a directory of its own
that looks like the repository.
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import typer.main

from embedwire.cli.__main__ import app

BLOCK = re.compile(r"^```console\n(.*?)^```$", re.DOTALL | re.MULTILINE)
ROOT = Path(__file__).parents[2]
PAGES = [*ROOT.glob("*.md"), *sorted((ROOT / "docs").rglob("*.md"))]

NOT_RUN = {
    r"make \w+.*": "each verb sets up the environment first; that it is a verb is checked",
    r"pip install .*": "downloads packages",
    r"embedwire (up|registry|encoder|language|router)( .*)?": "runs until it is stopped; tests/cli does",
    r"embedwire demo .*": "loads torch in five processes and more; tests/cli does",
    r"embedwire ask .*": "needs running servers; tests/cli does",
    r"embedwire bench transfer( --repeat \d+)?": "takes a minute; a smaller one is run",
    r"embedwire bench transfer --ranks .*": "takes a minute; tests/bench measures ranks",
    r"embedwire bench wires( .*)?": "needs libraries that may be missing; tests/bench does",
    r"python -m pytest .*": "tests do not run tests; that its paths exist is checked",
    r"python -m embedwire\.engines\.transformers\.footprint .*": "loads a model three times; tests/engines does",
    r"embedwire (doctor|tiny-model .* --family .*)": "loads torch once more; tests/cli does",
}
"""Commands that are shown and not run, as regular expressions, and why. Their options are checked all the same."""


def commands(page: Path) -> list[tuple[str, str]]:
    """(command, what the page says that it prints), in order."""
    found: list[tuple[str, str]] = []
    for block in BLOCK.findall(page.read_text()):
        for line in block.splitlines():
            if line.startswith("$ "):
                found.append((line[2:], ""))
            else:
                command, printed = found[-1]
                found[-1] = (command, f"{printed}{line}\n")
    return found


def reason_not_to_run(command: str) -> str | None:
    return next((why for pattern, why in NOT_RUN.items() if re.fullmatch(pattern, command)), None)


def pages_to_run() -> list[Any]:
    """Pages with what is run for them: a command that several pages show with the same output is run for the first. Those that load torch
    are marked."""
    found, known = [], set[tuple[str, str]]()
    for page in PAGES:
        runs = [(c, printed) for c, printed in commands(page) if not reason_not_to_run(c)]
        new = [run for run in runs if run not in known]
        known.update(new)
        if new:
            loads_torch = any(command.startswith("embedwire tiny-model") for command, _ in new)
            marks = [pytest.mark.model] if loads_torch else []
            found.append(pytest.param(new, id=str(page.relative_to(ROOT)), marks=marks))
    return found


ALL = [(page, command) for page in PAGES for command, _ in commands(page)]


@pytest.mark.timeout(240)
@pytest.mark.parametrize("runs", pages_to_run())
def test_the_commands_of_a_page_run(runs: list[tuple[str, str]], tmp_path: Path) -> None:
    for name in ("docs", "examples", "src", "tests", "Makefile", "pyproject.toml"):
        (tmp_path / name).symlink_to(ROOT / name)
    paths = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    kept = {name: value for name, value in os.environ.items() if not name.startswith("EMBEDWIRE_")}
    for command, printed in runs:
        ran = subprocess.run(
            ["bash", "-c", command],
            cwd=tmp_path,
            env={**kept, "PATH": paths, "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert ran.returncode == 0, f"{command}\n{ran.stdout}{ran.stderr}"
        assert not printed or ran.stdout == printed, command


def test_every_reason_is_needed() -> None:
    for pattern in NOT_RUN:
        assert any(re.fullmatch(pattern, command) for _, command in ALL), f"no page shows {pattern}"


def test_every_verb_of_make_is_one() -> None:
    targets = set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    shown = {command.split()[1] for _, command in ALL if command.startswith("make ")}
    text = (ROOT / "CONTRIBUTING.md").read_text()
    shown |= set(re.findall(r"^\| `make (\w+)", text, re.MULTILINE))
    assert {"demo", "test", "docs"} <= shown
    assert shown - targets == set()


@pytest.mark.parametrize("command", sorted({c for _, c in ALL if c.startswith("embedwire ")}))
def test_a_command_and_its_options_exist(command: str) -> None:
    words = shlex.split(command)[1:]
    found: Any = typer.main.get_command(app)
    while hasattr(found, "commands") and words and not words[0].startswith("-"):
        assert words[0] in found.commands, f"there is no {words[0]}"
        found = found.commands[words.pop(0)]
    known = {option for parameter in found.params for option in (*parameter.opts, *parameter.secondary_opts)}
    known |= {"--help", "-h"}
    assert {word for word in words if word.startswith("-")} - known == set()


def test_paths_given_to_pytest_exist() -> None:
    for _, command in ALL:
        if command.startswith("python -m pytest"):
            paths = [word for word in shlex.split(command) if word.startswith("tests/")]
            assert all((ROOT / path).exists() for path in paths), command
