"""``embedwire up``: the whole stack on this machine, until Ctrl-C."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Annotated

import typer

from embedwire.cli.groups import (
    Bounds,
    Checks,
    Encoder,
    Engine,
    Language,
    Media,
    Ranks,
    Router,
    Server,
    Vllm,
    VllmServers,
    Wire,
)
from embedwire.cli.options import JsonFile, takes
from embedwire.cli.process import check_can_listen, end_in_order
from embedwire.cli.screen import check_writable, err, out, table, write_json
from embedwire.cli.servers import Name
from embedwire.cli.settings import Loaded
from embedwire.errors import ConfigurationError
from embedwire.limits import RANKS_MAX

if TYPE_CHECKING:
    from embedwire.cli.stack import Stack


@takes(Server, Engine, Wire, Encoder, Media, Language, Ranks, Router, Vllm, VllmServers, Checks, Bounds)
def up(
    loaded: Loaded,
    *,
    model: Annotated[
        str | None, typer.Argument(metavar="MODEL", help="A directory, or a name on the Hugging Face Hub.")
    ] = None,
    model_option: Annotated[
        str | None, typer.Option("--model", metavar="MODEL", help="The same.", show_default=False)
    ] = None,
    encoders: Annotated[int, typer.Option("--encoders", "-n", min=1, help="Encoder servers.")] = 1,
    languages: Annotated[int, typer.Option("--languages", "-m", min=1, help="Language servers.")] = 1,
    encoder_tensor_parallel_size: Annotated[
        int, typer.Option(min=1, max=RANKS_MAX, help="Processes over which an encoder is divided.")
    ] = 1,
    name: Name = None,
    json: JsonFile = None,
) -> None:
    """Run everything for MODEL on this machine: registry, router, encoders and language servers, each a process of its own.

    With --engine vllm the encoders and language servers are stock vLLM servers with this package's connector, and there is no registry.
    --host and --port are the router's; the others listen on 127.0.0.1, at free ports. --tensor-parallel-size is that of each language
    server. Ctrl-C or SIGTERM ends all of them within --shutdown-s and a few seconds; when one ends by itself, so do the others, and its
    last log lines are shown. Exit code 0: stopped; 2: an error, or a server that ended by itself.
    """
    from embedwire.cli.cluster import Cluster

    check_writable(json)
    settings = loaded.settings
    if (model is None) == (model_option is None):
        raise ConfigurationError("give the model once: as MODEL, or with --model")
    start = _starter(loaded, encoder_ranks=encoder_tensor_parallel_size)
    check_can_listen(settings.host, loaded.public_port)
    end_in_order()
    try:
        with Cluster(loaded.as_variables(), shutdown_s=settings.shutdown_s) as cluster:
            with err.status("starting") as status:
                stack = start(
                    cluster,
                    model or model_option or "",
                    name=name,
                    encoders=encoders,
                    languages=languages,
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


def _starter(loaded: Loaded, *, encoder_ranks: int) -> Callable[..., Stack]:
    """What starts a stack of the engine in the settings."""
    if loaded.settings.engine == "vllm":
        from embedwire.cli.vllm_server import users_connector_settings
        from embedwire.cli.vllm_stack import start_vllm_stack

        users_connector_settings(loaded.settings.vllm_connector)
        if encoder_ranks > 1:
            raise ConfigurationError(
                "vLLM encoders are divided with --vllm-encoder-args '--tensor-parallel-size N'"
            )
        return start_vllm_stack
    from embedwire.cli.stack import start_stack

    return partial(start_stack, encoder_ranks=encoder_ranks)
