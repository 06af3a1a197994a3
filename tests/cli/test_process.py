"""One server's process: what a signal does to it."""

from __future__ import annotations

import subprocess
import sys

import pytest

SCRIPT = """
import os, signal
from fastapi import FastAPI
from embedwire.cli.process import Voice, begin, serve
from embedwire.cli.settings import load

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


@pytest.mark.parametrize("first", ["SIGTERM", "SIGINT"])
@pytest.mark.parametrize("second", ["SIGTERM", "SIGINT"])
def test_a_second_signal_does_not_interrupt_the_cleaning_up(
    first: str, second: str, environment: dict[str, str]
) -> None:
    """Scenario 27: what it would leave behind is shared memory."""
    ended = subprocess.run(
        [sys.executable, "-c", SCRIPT.format(first=first, second=second)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (ended.returncode, ended.stdout) == (0, "cleaned up\n"), ended.stderr
