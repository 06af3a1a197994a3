"""``embedwire registry``, ``router``, ``encoder`` and ``language``: one server each, in this process, until it is told to stop.

Owns the commands and their texts. The app runs on the main thread; engines and endpoints bring their own threads.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from embedwire.cli.groups import (
    Bounds,
    Checks,
    Encoder,
    Engine,
    Language,
    Media,
    Member,
    Ranks,
    Router,
    Server,
    Vllm,
    VllmUrls,
    Wire,
)
from embedwire.cli.options import takes
from embedwire.cli.process import Voice, begin, serve
from embedwire.cli.settings import Loaded, Settings
from embedwire.errors import ConfigurationError
from embedwire.registry import WILDCARDS

Model = Annotated[
    str, typer.Argument(metavar="MODEL", help="A directory, or a name on the Hugging Face Hub.")
]
Name = Annotated[
    str | None,
    typer.Option("--name", help="What requests call the model [MODEL as given].", show_default=False),
]
ReadyFile = Annotated[
    Path | None,
    typer.Option(
        "--ready-file",
        metavar="FILE",
        help="Write one JSON object here when the server is ready.",
        show_default=False,
    ),
]
IsChild = Annotated[bool, typer.Option("--child", hidden=True, help="Speak JSON, and end when stdin does.")]


def _begin_worker(settings: Settings, *, is_child: bool) -> None:
    begin(settings, is_child=is_child)
    if settings.host in WILDCARDS:
        raise ConfigurationError(
            f"host {settings.host} is no address that others can be told; name one of this machine's"
        )


@takes(Server, Checks)
def registry(loaded: Loaded, *, ready_file: ReadyFile = None, child: IsChild = False) -> None:
    """Run the registry: the table of workers, where encoders and language servers enter themselves and routers look them up.

    Exit code 0: stopped by SIGTERM or Ctrl-C; 2: an error, whose cause is the last line.
    """
    begin(loaded.settings, is_child=child)
    from embedwire.cli.build import build_registry

    app, facts = build_registry(loaded.settings)
    serve(app, loaded.settings, facts, voice=Voice(ready_file, child))


@takes(Server, Member, Router, Vllm, VllmUrls, Media, Checks)
def router(loaded: Loaded, *, ready_file: ReadyFile = None, child: IsChild = False) -> None:
    """Run the router: the public OpenAI-compatible API in front of encoders and language servers.

    It finds them through --registry-url, or is told of them with --worker-urls. With --engine vllm they are stock vLLM servers, told
    with --encoder and --language. Exit code 0: stopped by SIGTERM or Ctrl-C; 2: an
    error, whose cause is the last line.
    """
    begin(loaded.settings, is_child=child)
    from embedwire.cli.build import build_router

    app, facts = build_router(loaded.settings)
    serve(app, loaded.settings, facts, voice=Voice(ready_file, child), port=loaded.public_port)


@takes(Server, Member, Engine, Wire, Encoder, Media, Ranks, Bounds)
def encoder(
    loaded: Loaded, *, model: Model, name: Name = None, ready_file: ReadyFile = None, child: IsChild = False
) -> None:
    """Run an encoder server: the half of MODEL that turns images into embeddings, and sends them.

    With --tensor-parallel-size above 1 it is so many processes, which share out the images of each prompt; this one watches over them.
    Exit code 0: stopped by SIGTERM or Ctrl-C; 2: an error, whose cause is the last line.
    """
    _begin_worker(loaded.settings, is_child=child)
    voice = Voice(ready_file, child)
    if loaded.settings.tensor_parallel_size > 1:
        from embedwire.cli.supervise import serve_group

        serve_group(loaded, ("encoder-rank", model, "--name", name or model), voice=voice)
    from embedwire.cli.build import built_encoder

    with built_encoder(model, loaded.settings, name=name or model) as (app, facts):
        serve(app, loaded.settings, facts, voice=voice)


@takes(Server, Member, Engine, Wire, Language, Ranks, Bounds)
def language(
    loaded: Loaded, *, model: Model, name: Name = None, ready_file: ReadyFile = None, child: IsChild = False
) -> None:
    """Run a language server: the half of MODEL that reads embeddings and text, and answers.

    With --tensor-parallel-size above 1 it is so many processes, which end and start together; this one watches over them. Exit code 0:
    stopped by SIGTERM or Ctrl-C; 2: an error, whose cause is the last line.
    """
    _begin_worker(loaded.settings, is_child=child)
    voice = Voice(ready_file, child)
    if loaded.settings.tensor_parallel_size > 1:
        from embedwire.cli.supervise import serve_group

        serve_group(loaded, ("language-rank", model, "--name", name or model), voice=voice)
    from embedwire.cli.build import built_language

    with built_language(model, loaded.settings, name=name or model) as (app, facts):
        serve(app, loaded.settings, facts, voice=voice)
