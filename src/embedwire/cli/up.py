"""``embedwire up``: the whole stack on this machine, until Ctrl-C."""

from __future__ import annotations

import signal
import sys
from typing import Annotated

import typer

from embedwire.cli.groups import Bounds, Checks, Encoder, Engine, Language, Ranks, Router, Server, Wire
from embedwire.cli.options import JsonFile, takes
from embedwire.cli.screen import check_writable, err, out, table, write_json
from embedwire.cli.servers import Model, Name
from embedwire.cli.settings import Loaded
from embedwire.limits import RANKS_MAX


@takes(Server, Engine, Wire, Encoder, Language, Ranks, Router, Checks, Bounds)
def up(
    loaded: Loaded,
    *,
    model: Model,
    encoders: Annotated[int, typer.Option("--encoders", "-n", min=1, help="Encoder servers.")] = 1,
    languages: Annotated[int, typer.Option("--languages", "-m", min=1, help="Language servers.")] = 1,
    encoder_tensor_parallel_size: Annotated[
        int, typer.Option(min=1, max=RANKS_MAX, help="Processes over which an encoder is divided.")
    ] = 1,
    name: Name = None,
    json: JsonFile = None,
) -> None:
    """Run everything for MODEL on this machine: registry, router, encoders and language servers, each a process of its own.

    --port is the router's; the others take free ones. --tensor-parallel-size is that of each language server. Ctrl-C or SIGTERM
    ends all of them within --shutdown-s and a few seconds; when one ends by itself, so do the others, and its last log lines are
    shown. Exit code 0: stopped; 2: an error, or a server that ended by itself.
    """
    from embedwire.cli.cluster import Cluster
    from embedwire.cli.stack import start_stack

    check_writable(json)
    settings = loaded.settings
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(0))
    try:
        with Cluster(loaded.as_variables(), shutdown_s=settings.shutdown_s) as cluster:
            with err.status("starting") as status:
                stack = start_stack(
                    cluster,
                    model,
                    name=name,
                    encoders=encoders,
                    languages=languages,
                    encoder_ranks=encoder_tensor_parallel_size,
                    router_port=loaded.public_port,
                    on_step=lambda step: status.update(step),
                )
            made = table("server", "url", "pid", "")
            for child in stack.children:
                made.add_row(child.name, child.url, str(child.facts["pid"]), child.in_words)
            out.print(made)
            out.print(
                f"Ask with: embedwire ask --url {stack.router.url} 'What is this?' IMAGE",
                soft_wrap=True,
                markup=False,
            )
            out.print("Ctrl-C ends everything.")
            write_json(json, {child.name: dict(child.facts) for child in stack.children})
            while True:
                cluster.watch()
    except KeyboardInterrupt:
        out.print("stopped")
