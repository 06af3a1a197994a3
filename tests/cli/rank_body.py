"""A group without a model, for tests of what watches over it: ``rank_body.py MODE`` is the supervisor, with ``--rank`` it is a rank.

Modes: ``well`` serves; ``loads`` never becomes ready; ``refuses`` says why it can not start;
``moves`` is ready when every rank has received a room.
SIGUSR1 lets a rank say that the group is lost.
"""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import sys
import threading
from pathlib import Path
from queue import SimpleQueue
from typing import Any

from embedwire.cli import ranks
from embedwire.cli.options import load
from embedwire.cli.processes import Voice, begin
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
    if mode == "moves":
        move(rank, directory)
        return
    if mode == "loads":
        os.write(sys.stderr.fileno(), b"loading\n")  # in one piece: all ranks write to one pipe
        threading.Event().wait()
    server = socket.create_server(("127.0.0.1", settings.port if rank == 0 else 0))
    say(**facts, url=f"http://127.0.0.1:{server.getsockname()[1]}")
    threading.Event().wait()


def move(rank: int, directory: Path) -> None:
    """A rank of a language server without its model: endpoints, turns, and the groups of torch."""
    import numpy as np

    from embedwire import Field, Layout, SenderEndpoint
    from embedwire.cli.build import receiver_of
    from embedwire.cli.ranks import Membership

    settings, layout = load().settings, Layout("ITEM", (Field("embeddings", "float32", (8,)),))
    expected = np.arange(500 * 8, dtype=np.float32).reshape(500, 8)
    received: SimpleQueue[Any] = SimpleQueue()

    def segments() -> list[str]:
        return re.findall(r"/dev/shm/embedwire-\w+", Path("/proc/self/maps").read_text())

    with (
        Membership(settings, rank=rank, directory=directory) as membership,
        receiver_of(layout, settings, membership=membership, on_room=received.put) as receiver,
    ):
        if rank:
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            assert np.array_equal(received.get(timeout=30).result(30).arrays["embeddings"], expected)
            say(role="test", segments=segments())
            membership.tensor_parallel.receive()
            return
        with SenderEndpoint(layout) as sender:
            readers = len(membership.group.readers)
            sender.offer(7, total_tokens=500, readers=readers).fill({"embeddings": expected})
            room = receiver.open(7, sender.address).result(30)
            assert np.array_equal(room.arrays["embeddings"], expected)
            say(role="test", url="http://127.0.0.1:1", segments=segments())
            try:
                threading.Event().wait()
            finally:
                membership.tensor_parallel.send(b"the end")


def be_supervisor(mode: str) -> None:
    ranks.PAUSE_MIN_S = 0.0
    ranks.RANKS_MARGIN_S = 1.0
    loaded = load()
    begin(loaded.settings, is_child=False)
    try:
        ranks.serve_group(
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
