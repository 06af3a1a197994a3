"""A group without a model, for tests of what watches over it: ``rank_body.py MODE`` is the supervisor, with ``--rank`` it is a rank.

Modes: ``well`` serves; ``loads`` never becomes ready; ``refuses`` says why it can not start; ``fickle`` loses rank 1 once it is ready.
SIGUSR1 lets a rank say that the group is lost.
"""

from __future__ import annotations

import json
import signal
import socket
import sys
import threading
from pathlib import Path
from typing import Any

from embedwire.cli import cluster, supervise
from embedwire.cli.process import Voice, begin
from embedwire.cli.settings import load
from embedwire.errors import EmbedwireError


def say(**facts: Any) -> None:
    print(json.dumps(facts), flush=True)


def be_rank(mode: str, rank: int, directory: Path) -> None:
    settings = load().settings
    begin(settings, is_child=True)
    signal.signal(signal.SIGUSR1, lambda number, frame: say(error="the group is lost"))
    (directory / f"rank-{rank}").touch()
    facts = {"role": "test", "directory": str(directory)}
    if mode == "refuses":
        say(error="there is no model")
        sys.exit(2)
    if mode == "loads":
        print("loading", file=sys.stderr, flush=True)
        threading.Event().wait()
    server = socket.create_server(("127.0.0.1", settings.port if rank == 0 else 0))
    say(**facts, url=f"http://127.0.0.1:{server.getsockname()[1]}")
    if mode == "fickle" and rank == 1:
        sys.exit(3)
    threading.Event().wait()


def be_supervisor(mode: str) -> None:
    if mode == "fickle":
        supervise.PAUSE_MIN_S = 0.0
    cluster.STOP_MARGIN_S = 1.0
    loaded = load()
    begin(loaded.settings, is_child=False)
    try:
        supervise.serve_group(
            loaded, (mode,), voice=Voice(None, is_child=True), program=(sys.executable, __file__)
        )
    except EmbedwireError as error:
        print(f"embedwire: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    if "--rank" in sys.argv:
        mode, _, rank, _, directory, _ = sys.argv[1:]
        be_rank(mode, int(rank), Path(directory))
    else:
        be_supervisor(sys.argv[1])
