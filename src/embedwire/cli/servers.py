"""``embedwire registry``, ``router``, ``encoder`` and ``language``: one server each, in this process, until it is told to stop.

Owns how the pieces of a server are put together from settings, and taken apart in the right order. The app runs on the main thread; engines
and endpoints bring their own threads.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
import threading
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from embedwire.cli.options import takes
from embedwire.cli.screen import out, size
from embedwire.cli.settings import (
    Bounds,
    Encoder,
    Engine,
    Language,
    Loaded,
    Member,
    Router,
    Server,
    Settings,
    Wire,
)

if TYPE_CHECKING:
    from fastapi import FastAPI

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


@dataclass(frozen=True, slots=True)
class Voice:
    """How a server says that it is ready: a line for people, or JSON for whoever started it."""

    ready_file: Path | None
    is_child: bool

    def say(self, facts: dict[str, Any]) -> None:
        """Once, when requests are answered."""
        text = json.dumps(facts | {"pid": os.getpid()})
        if self.ready_file is not None:
            part = self.ready_file.with_name(self.ready_file.name + ".part")
            part.write_text(text + "\n")
            part.replace(self.ready_file)  # whoever waits for it never sees half of it
        if self.is_child:
            print(text, flush=True)
            return
        out.print(f"[bold]{facts['role']}[/] ready at {facts['url']}", soft_wrap=True)
        for name, fact in facts.items():
            if name not in ("role", "url"):
                out.print(f"  {name.replace('_', ' ')}: {fact}", soft_wrap=True, markup=False)


@takes(Server)
def registry(loaded: Loaded, *, ready_file: ReadyFile = None, child: IsChild = False) -> None:
    """Run the registry: the table of workers, where encoders and language servers enter themselves and routers look them up.

    Exit code 0: stopped by SIGTERM or Ctrl-C; 2: an error, whose cause is the last line.
    """
    from embedwire.registry import Registry
    from embedwire.serve.registry_app import registry_app

    _begin(loaded.settings, is_child=child)
    _serve(registry_app(Registry()), loaded.settings, {"role": "registry"}, Voice(ready_file, child))


@takes(Server, Member, Router)
def router(loaded: Loaded, *, ready_file: ReadyFile = None, child: IsChild = False) -> None:
    """Run the router: the public OpenAI-compatible API in front of encoders and language servers.

    It finds them through --registry-url, or is told of them with --worker-urls. Exit code 0: stopped by SIGTERM or Ctrl-C; 2: an
    error, whose cause is the last line.
    """
    from embedwire.serve.dispatch import DispatchLimits
    from embedwire.serve.router_app import RouterSettings, router_app
    from embedwire.serve.watch import WatchTimes

    settings = loaded.settings
    _begin(settings, is_child=child)
    app = router_app(
        RouterSettings(
            registry_url=settings.registry_url,
            worker_urls=settings.worker_urls,
            requests_max=settings.requests_max,
            misses_to_evict=settings.misses_to_evict,
            watch=WatchTimes(interval_s=settings.check_interval_s),
            limits=DispatchLimits(
                attempts_max=settings.attempts_max,
                deadline_s=settings.deadline_s,
                default_max_tokens=settings.default_max_tokens,
            ),
        )
    )
    _serve(app, settings, {"role": "router"}, Voice(ready_file, child), port=loaded.public_port)


@takes(Server, Member, Engine, Wire, Encoder, Bounds)
def encoder(
    loaded: Loaded, *, model: Model, name: Name = None, ready_file: ReadyFile = None, child: IsChild = False
) -> None:
    """Run an encoder server: the half of MODEL that turns images into embeddings, and sends them.

    Exit code 0: stopped by SIGTERM or Ctrl-C; 2: an error, whose cause is the last line.
    """
    _begin(loaded.settings, is_child=child)
    import torch

    from embedwire.encode import EncodeService
    from embedwire.endpoint import SenderEndpoint
    from embedwire.engines.transformers.encoder import TransformersEncoder
    from embedwire.serve.encoder_app import encoder_app
    from embedwire.serve.media import MediaFetcher, MediaLimits
    from embedwire.serve.metrics import AppMetrics

    settings = loaded.settings
    if settings.threads:
        torch.set_num_threads(settings.threads)
    engine = TransformersEncoder(
        model, dtype=settings.dtype, device=settings.device, max_image_pixels=settings.max_pixels
    )
    with ExitStack() as stack:
        sender = stack.enter_context(
            SenderEndpoint(
                engine.layout,
                host=settings.host,
                port=settings.control_port,
                memory_bytes=settings.source_memory,
                transports=settings.transports,
                limits=settings.limits,
            )
        )
        service = EncodeService(
            engine, sender, batch_tokens=settings.batch_tokens, memory_wait_s=settings.memory_wait_s
        )
        stack.callback(service.close)
        media = MediaLimits(
            items_max=settings.media_items_max,
            item_bytes_max=settings.media_item_size,
            timeout_s=settings.media_timeout_s,
            allow_private_media=settings.allow_private_media,
        )
        app = encoder_app(
            service,
            model=name or model,
            layout=engine.layout,
            control_address=sender.address,
            media=MediaFetcher(media),
            metrics=AppMetrics({"sender": sender.stats, "encode": service.stats}),
            registry=_link(settings),
        )
        facts = {
            "role": "encoder",
            "model": name or model,
            "rooms_at": sender.address,
            "memory": size(settings.source_memory),
        }
        _serve(app, settings, facts, Voice(ready_file, child))


@takes(Server, Member, Engine, Wire, Language, Bounds)
def language(
    loaded: Loaded, *, model: Model, name: Name = None, ready_file: ReadyFile = None, child: IsChild = False
) -> None:
    """Run a language server: the half of MODEL that reads embeddings and text, and answers.

    Exit code 0: stopped by SIGTERM or Ctrl-C; 2: an error, whose cause is the last line.
    """
    _begin(loaded.settings, is_child=child)
    from embedwire.endpoint import ReceiverEndpoint
    from embedwire.engines.transformers.generation import TransformersLanguage
    from embedwire.language.service import LanguageService
    from embedwire.serve.language_app import language_app
    from embedwire.serve.metrics import AppMetrics

    settings = loaded.settings
    with ExitStack() as stack:
        engine = TransformersLanguage(
            model,
            dtype=settings.dtype,
            device=settings.device,
            max_batch=settings.max_batch,
            max_waiting=settings.max_waiting,
            prefill_chunk_tokens=settings.prefill_chunk_tokens,
            max_cache_tokens=settings.max_cache_tokens,
            threads=settings.threads,
        )
        stack.callback(engine.close)
        receiver = stack.enter_context(
            ReceiverEndpoint(
                engine.layout,
                num_blocks=settings.num_blocks,
                block_size=settings.block_size,
                default_allocate_tokens=settings.default_allocate_tokens,
                assembly_bytes=settings.assembly_memory,
                host=settings.host,
                transports=settings.transports,
                limits=settings.limits,
            )
        )
        service = LanguageService(engine, receiver)
        stack.callback(service.close)
        app = language_app(
            service,
            model=name or model,
            layout=engine.layout,
            metrics=AppMetrics({"receiver": receiver.stats, "language": service.stats}),
            registry=_link(settings),
            default_max_tokens=settings.default_max_tokens,
        )
        pool = f"{settings.num_blocks} blocks of {settings.block_size} tokens"
        facts = {
            "role": "language",
            "model": name or model,
            "pool": pool,
            "memory": size(settings.assembly_memory),
        }
        _serve(app, settings, facts, Voice(ready_file, child))


def _link(settings: Settings) -> Any:
    from embedwire.serve.worker_app import RegistryLink

    return RegistryLink(url=settings.registry_url)


def _begin(settings: Settings, *, is_child: bool) -> None:
    """Before anything is held: from now on SIGTERM ends this process through its cleaning up, also while a model is loading."""
    logging.basicConfig(
        level=settings.log_level.upper(),
        stream=sys.stderr,
        format="%(asctime)s %(levelname)s %(name)s %(message)s",
    )
    logging.getLogger("httpx").setLevel(max(logging.WARNING, logging.getLogger().level))
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(0))
    if is_child:
        threading.Thread(target=_end_with_stdin, name="embedwire-stdin", daemon=True).start()


def _end_with_stdin() -> None:
    """The parent holds the other end: however it dies, its children end."""
    while os.read(sys.stdin.fileno(), 4096):
        pass
    os.kill(os.getpid(), signal.SIGTERM)


def _serve(
    app: FastAPI, settings: Settings, facts: dict[str, Any], voice: Voice, *, port: int | None = None
) -> None:
    port = settings.port if port is None else port
    from embedwire.errors import ConfigurationError
    from embedwire.serve.run import AppServer

    on_ready: Callable[[str], None] = lambda url: voice.say({"url": url} | facts)  # noqa: E731
    try:
        server = AppServer(
            app, host=settings.host, port=port, shutdown_s=settings.shutdown_s, on_ready=on_ready
        )
    except OSError as error:
        raise ConfigurationError(f"can not listen on {settings.host}:{port}: {error}") from None
    server.serve()
