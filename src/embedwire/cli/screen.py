"""Output of commands: tables and lines on stdout, errors on stderr, results as JSON in a file.

Everything is readable without colours too. Imports no command. Main thread.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from embedwire.errors import ConfigurationError

out = Console(highlight=False)
err = Console(stderr=True, highlight=False)

JsonFile = Annotated[
    Path | None,
    typer.Option("--json", metavar="FILE", help="Also write the results here, as JSON.", show_default=False),
]


def quieten_libraries() -> None:
    """Stop model libraries from drawing progress bars over the output. Called before they are used; the user's settings override it."""
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    with suppress(ImportError):
        from transformers.utils import logging

        logging.disable_progress_bar()


def write_json(path: Path | None, value: Any) -> None:
    """Write a result to a file; None is no file. Raises ConfigurationError when it can not be written."""
    if path is None:
        return
    try:
        path.write_text(json.dumps(value, indent=2) + "\n")
    except OSError as error:
        raise ConfigurationError(f"--json {path}: {error}") from None


def check_writable(path: Path | None) -> None:
    """Find out before a long run, not after it, that the result can not be written."""
    if path is not None and not path.parent.is_dir():
        raise ConfigurationError(f"--json {path}: there is no directory {path.parent}")


def table(*columns: str, title: str | None = None, right: tuple[str, ...] = ()) -> Table:
    """An empty table in the one style of all commands. ``right`` are columns of numbers."""
    made = Table(
        title=title, title_justify="left", box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0)
    )
    for column in columns:
        made.add_column(
            column,
            justify="right" if column in right else "left",
            overflow="fold",
            no_wrap=column in ("url", "pid"),
        )
    return made


def size(nbytes: float) -> str:
    """Bytes for people: ``64 MiB``, ``1.5 KiB``."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if nbytes < 1024 or unit == "GiB":
            return f"{nbytes:.3g} {unit}" if nbytes < 1000 else f"{nbytes:.0f} {unit}"
        nbytes /= 1024
    raise AssertionError


def milliseconds(ms: float | None) -> str:
    """``12.3 ms``, or a dash for what was not measured."""
    return "–" if ms is None else f"{ms:.1f} ms"


def timeline(passage: Mapping[str, Any]) -> Table:
    """The ``embedwire`` object of an answer: how its embedding came."""
    made = table("embedding", "", title=None)
    if passage.get("items"):
        made.add_row("items", f"{passage['items']} from {', '.join(passage['encoders'])}")
        made.add_row("tokens", str(passage["total_tokens"]))
        made.add_row("encode", milliseconds(passage["encode_ms"]))
    elif passage.get("room") is None:
        made.add_row("none", "the prompt has no media")
    else:
        rounds = passage["rounds"]
        made.add_row("room", f"{passage['room']} from {passage['encoder']} over {passage['transport']}")
        made.add_row("tokens", f"{passage['total_tokens']} in {_counted(rounds)}")
        made.add_row("bytes", f"{passage['bytes']} ({size(passage['bytes'])})")
        if passage["delivery"]:
            made.add_row(
                "ranks",
                f"{passage['ranks']}, {passage['delivery']}: {passage['wire_bytes']} bytes over the wire",
            )
        made.add_row("encode", milliseconds(passage["encode_ms"]))
        made.add_row("transfer", milliseconds(passage["transfer_ms"]))
    made.add_row("first token", milliseconds(passage.get("ttft_ms")))
    return made


def _counted(rounds: list[int], most: int = 12) -> str:
    if len(rounds) == 1:
        return "one round"
    tail = f" + … ({len(rounds) - most} more)" if len(rounds) > most else ""
    return f"{len(rounds)} rounds: {' + '.join(map(str, rounds[:most]))}{tail}"
