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
from embedwire.cli.process import begin
from embedwire.cli.settings import load
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
