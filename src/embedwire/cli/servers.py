"""``embedwire registry``, ``router``, ``encoder`` and ``language``: one server each, in this process, until it is stopped. And the hidden
commands that run a part of something larger: a rank of an encoder or language server, and a vLLM server of a stack.

``build.py`` creates the apps; the app runs on the main thread, engines and endpoints bring threads of their own. vLLM neither reports that
it is ready nor ends with the process that started it: ``vllm-server`` owns vLLM's process and command line, and does both for it.
"""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import Annotated, Any

import httpx
import typer

from embedwire.cli import build
from embedwire.cli.build import Built
from embedwire.cli.options import IsChild, Loaded, Model, Name, ReadyFile, takes
from embedwire.cli.processes import SIGNAL_WAIT_S, Voice, begin, serve
from embedwire.cli.ranks import Membership, report_error, serve_group
from embedwire.cli.settings import (
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
    Settings,
    Vllm,
    VllmServers,
    VllmUrls,
    Wire,
)
from embedwire.errors import ConfigurationError, EmbedwireError, RankError
from embedwire.registry import WILDCARDS, Role
from embedwire.serve.signals import end_signals

GivenName = Annotated[str, typer.Option("--name")]
Rank = Annotated[int, typer.Option("--rank")]
Directory = Annotated[Path, typer.Option("--group-dir")]
TheRole = Annotated[Role, typer.Option("--role")]
ReportTo = Annotated[str | None, typer.Option("--report-to")]
ItemsPort = Annotated[int, typer.Option("--items-port")]
ItemsFrom = Annotated[list[str] | None, typer.Option("--items-from")]

API_SERVER = "vllm.entrypoints.openai.api_server"
"""As a module: the ``vllm`` command looks for a distribution of that name, which builds for CPU are not."""
CONNECTOR = {
    "ec_connector": "EmbedwireECConnector",
    "ec_connector_module_path": "embedwire.engines.vllm.connector",
}
HEALTH_POLL_S = 0.25
KILL_WAIT_S = 2.0


@takes(Server, Checks)
def registry(loaded: Loaded, *, ready_file: ReadyFile = None, child: IsChild = False) -> None:
    """Run the registry: the table of workers, where encoders and language servers enter themselves and routers look them up.

    Exit code 0: stopped by SIGTERM or Ctrl-C; 2: an error, whose cause is the last line.
    """
    begin(loaded.settings, is_child=child)
    app, facts = build.build_registry(loaded.settings)
    serve(app, loaded.settings, facts, voice=Voice(ready_file, child))


@takes(Server, Member, Router, Vllm, VllmUrls, Media, Checks)
def router(loaded: Loaded, *, ready_file: ReadyFile = None, child: IsChild = False) -> None:
    """Run the router: the public OpenAI-compatible API in front of encoders and language servers.

    It finds them through --registry-url, or they are listed with --worker-urls. With --engine vllm they are stock vLLM servers, listed
    with --encoder and --language. Exit code 0: stopped by SIGTERM or Ctrl-C; 2: an error, whose cause is the last line.
    """
    begin(loaded.settings, is_child=child)
    app, facts = build.build_router(loaded.settings)
    serve(app, loaded.settings, facts, voice=Voice(ready_file, child), port=loaded.public_port)


@takes(Server, Member, Engine, Wire, Encoder, Media, Ranks, Bounds)
def encoder(
    loaded: Loaded, *, model: Model, name: Name = None, ready_file: ReadyFile = None, child: IsChild = False
) -> None:
    """Run an encoder server: the half of MODEL that turns images into embeddings, and sends them.

    With --tensor-parallel-size above 1 it is that many processes, which share out the images of each prompt; this one watches them.
    Exit code 0: stopped by SIGTERM or Ctrl-C; 2: an error, whose cause is the last line.
    """
    name, voice = name or model, Voice(ready_file, child)
    _begin_worker(loaded, ("encoder-rank", model, "--name", name), voice=voice)
    _serve_built(build.built_encoder(model, loaded.settings, name=name), loaded.settings, voice=voice)


@takes(Server, Member, Engine, Wire, Language, Ranks, Bounds)
def language(
    loaded: Loaded, *, model: Model, name: Name = None, ready_file: ReadyFile = None, child: IsChild = False
) -> None:
    """Run a language server: the half of MODEL that reads embeddings and text, and answers.

    With --tensor-parallel-size above 1 it is that many processes, which end and start together; this one watches them. Exit code 0:
    stopped by SIGTERM or Ctrl-C; 2: an error, whose cause is the last line.
    """
    name, voice = name or model, Voice(ready_file, child)
    _begin_worker(loaded, ("language-rank", model, "--name", name), voice=voice)
    _serve_built(build.built_language(model, loaded.settings, name=name), loaded.settings, voice=voice)


def _begin_worker(loaded: Loaded, rank_command: Sequence[str], *, voice: Voice) -> None:
    """Returns for a server of one process; one of several ranks is served until it is stopped."""
    begin(loaded.settings, is_child=voice.is_child)
    if loaded.settings.host in WILDCARDS:
        raise ConfigurationError(
            f"host {loaded.settings.host} is no address that others can be told; name one of this machine's"
        )
    if loaded.settings.tensor_parallel_size > 1:
        serve_group(loaded, rank_command, voice=voice)


def _serve_built(building: AbstractContextManager[Built], settings: Settings, *, voice: Voice) -> None:
    with building as (app, facts):
        serve(app, settings, facts, voice=voice)


@takes(Server, Member, Engine, Wire, Encoder, Media, Ranks, Bounds)
def encoder_rank(
    loaded: Loaded, *, model: Model, name: GivenName, rank: Rank, group_dir: Directory, child: IsChild = False
) -> None:
    """Run one rank of an encoder server. Exit code 0: stopped; 2: an error, which the supervisor reports."""
    with _member(loaded.settings, rank=rank, directory=group_dir, is_child=child) as membership:
        if rank:
            _follow(build.following_encoder(model, loaded.settings, membership), rank=rank, is_child=child)
        else:
            leading = build.built_encoder(model, loaded.settings, name=name, membership=membership)
            _serve_built(leading, loaded.settings, voice=Voice(None, child))


@takes(Server, Member, Engine, Wire, Language, Ranks, Bounds)
def language_rank(
    loaded: Loaded, *, model: Model, name: GivenName, rank: Rank, group_dir: Directory, child: IsChild = False
) -> None:
    """Run one rank of a language server. Exit code 0: stopped; 2: an error, which the supervisor reports."""
    with _member(loaded.settings, rank=rank, directory=group_dir, is_child=child) as membership:
        if rank:
            _follow(build.following_language(model, loaded.settings, membership), rank=rank, is_child=child)
        else:
            leading = build.built_language(model, loaded.settings, name=name, membership=membership)
            _serve_built(leading, loaded.settings, voice=Voice(None, child))


@contextmanager
def _member(settings: Settings, *, rank: int, directory: Path, is_child: bool) -> Iterator[Membership]:
    begin(settings, is_child=is_child)
    try:
        with Membership(settings, rank=rank, directory=directory) as membership:
            yield membership
    except EmbedwireError as error:
        report_error(str(error))
        sys.exit(2)


def _follow(building: AbstractContextManager[Callable[[], None]], *, rank: int, is_child: bool) -> None:
    with building as run:
        for number in end_signals():
            signal.signal(number, signal.SIG_IGN)  # it ends with rank 0
        Voice(None, is_child).say({"role": "rank", "rank": rank})
        try:
            run()
        except RankError:
            # the cause is reported already; leaving the turns in order would look like the cause
            os._exit(2)


@takes(Server, Engine, Wire, Encoder, Language, Ranks, Vllm, VllmServers)
def vllm_server(
    loaded: Loaded,
    *,
    model: Model,
    role: TheRole,
    name: Name = None,
    report_to: ReportTo = None,
    items_port: ItemsPort = 0,
    items_from: ItemsFrom = None,
    child: IsChild = False,
) -> None:
    """Run a vLLM server of one role. Exit code 0: stopped; 2: it could not start, or has ended by itself."""
    begin(loaded.settings, is_child=child)
    settings = loaded.settings
    command = vllm_command(
        loaded,
        model,
        role=role,
        name=name,
        report_to=report_to,
        items_port=items_port,
        items_from=items_from or (),
    )
    url = f"http://{settings.host}:{settings.port}"
    with _running(command, end_within_s=settings.shutdown_s) as process:
        _wait_healthy(process, url)
        facts = {"role": role, "url": url, "model": name or model, "engine": "vllm"}
        Voice(None, child).say(facts | {"rank_pids": [process.pid]})
        raise EmbedwireError(f"vLLM has ended: exit code {_wait_end(process)}")


def vllm_command(
    loaded: Loaded,
    model: str,
    *,
    role: Role,
    name: str | None = None,
    report_to: str | None = None,
    items_port: int = 0,
    items_from: Sequence[str] = (),
) -> list[str]:
    """vLLM's command line: an encoder offers items at ``items_port``, a language server prefetches them from the control addresses
    ``items_from``. The user's arguments come last, so that they override."""
    settings = loaded.settings
    config = {
        **CONNECTOR,
        "ec_role": "ec_producer" if role == Role.ENCODER else "ec_consumer",
        "ec_connector_extra_config": _connector_settings(loaded, role, report_to, items_port, items_from),
    }
    command = [settings.vllm_python or sys.executable, "-m", API_SERVER, "--model", model]
    command += ["--host", settings.host, "--port", str(settings.port)]
    command += ["--ec-transfer-config", json.dumps(config)]
    command += ["--served-model-name", name] if name else []
    command += ["--dtype", settings.dtype] if loaded.origins["dtype"] != "default" else []
    if role == Role.ENCODER:
        command += ["--enforce-eager", "--no-enable-prefix-caching"]
        own = settings.vllm_encoder_args
    else:
        command += ["--language-model-only"] if settings.media == "metadata" else []
        command += ["--tensor-parallel-size", str(settings.tensor_parallel_size)]
        own = settings.vllm_language_args
    return [*command, *shlex.split(settings.vllm_args), *shlex.split(own)]


def _connector_settings(
    loaded: Loaded, role: Role, report_to: str | None, items_port: int, items_from: Sequence[str]
) -> dict[str, Any]:
    """Only what is set: the connector has defaults of its own."""
    settings = loaded.settings
    made: dict[str, Any] = {"transport": settings.transport}
    if role == Role.ENCODER:
        made |= {"host": settings.host, "port": items_port}
        names = {"source_memory": "items_bytes"}
    else:
        made["item_deadline_s"] = settings.item_deadline_s
        made |= {"report_to": [report_to]} if report_to else {}
        made |= {"encoders": list(items_from), "prefetch": True} if items_from else {}
        names = {"num_blocks": "num_blocks", "block_size": "block_size", "assembly_memory": "staging_bytes"}
    given = {key: name for name, key in names.items() if loaded.origins[name] != "default"}
    made |= {key: int(getattr(settings, name)) for key, name in given.items()}
    return made | users_connector_settings(settings.vllm_connector)


def users_connector_settings(text: str) -> dict[str, Any]:
    """The user's additions to ``ec_connector_extra_config``. Raises ConfigurationError unless they are a JSON object of known settings."""
    from embedwire.engines.vllm.settings import read_settings

    if not text:
        return {}
    try:
        found = json.loads(text)
        if not isinstance(found, dict):
            raise ValueError("it is no object")
    except ValueError as error:
        raise ConfigurationError(f"vllm_connector has to be a JSON object: {error}") from None
    read_settings(found)
    return found


@contextmanager
def _running(command: Sequence[str], *, end_within_s: float) -> Iterator[subprocess.Popen[bytes]]:
    """vLLM in a process group of its own; no process of it is left after the block. Its output goes to the log."""
    try:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=sys.stderr.fileno(), start_new_session=True
        )
    except OSError as error:
        raise EmbedwireError(f"vLLM cannot be started: {error}") from None
    try:
        yield process
    finally:
        for number in end_signals():
            signal.signal(number, signal.SIG_IGN)  # a second signal must not interrupt this
        process.terminate()
        with suppress(subprocess.TimeoutExpired):
            process.wait(end_within_s)
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        with suppress(subprocess.TimeoutExpired):
            process.wait(KILL_WAIT_S)


def _wait_end(process: subprocess.Popen[bytes]) -> int:
    """Its exit code. Waits in steps: see SIGNAL_WAIT_S."""
    while (status := process.poll()) is None:
        time.sleep(SIGNAL_WAIT_S)
    return status


def _wait_healthy(process: subprocess.Popen[bytes], url: str) -> None:
    """Wait until its engine runs; the parent of this process has a deadline. Raises EmbedwireError when vLLM has ended."""
    with httpx.Client(trust_env=False, timeout=2.0) as client:
        while True:
            with suppress(httpx.HTTPError):
                if client.get(f"{url}/health").status_code == 200:
                    return
            if (status := process.poll()) is not None:
                raise EmbedwireError(f"vLLM has ended before it was ready: exit code {status}")
            time.sleep(HEALTH_POLL_S)
