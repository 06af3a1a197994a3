"""``embedwire vllm-server``: a stock vLLM server that starts, speaks and ends as our own servers do. Started by ``vllm_stack.py`` alone.

Owns vLLM's process and its command line; it must not know what it serves. Main thread. vLLM neither says that it is ready nor ends with
who started it, so this process does both for it.
"""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Annotated, Any

import httpx
import typer

from embedwire.cli.cluster import SIGNAL_WAIT_S
from embedwire.cli.groups import Encoder, Engine, Language, Ranks, Server, Vllm, VllmServers, Wire
from embedwire.cli.options import takes
from embedwire.cli.process import Voice, begin
from embedwire.cli.servers import IsChild, Model, Name
from embedwire.cli.settings import Loaded
from embedwire.errors import ConfigurationError, EmbedwireError
from embedwire.registry import Role
from embedwire.serve.signals import end_signals

API_SERVER = "vllm.entrypoints.openai.api_server"
"""As a module: the ``vllm`` command looks for a distribution of that name, which builds for CPU are not."""
CONNECTOR = {
    "ec_connector": "EmbedwireECConnector",
    "ec_connector_module_path": "embedwire.engines.vllm.connector",
}
HEALTH_POLL_S = 0.25
KILL_WAIT_S = 2.0

TheRole = Annotated[Role, typer.Option("--role")]
ReportTo = Annotated[str | None, typer.Option("--report-to")]
ItemsPort = Annotated[int, typer.Option("--items-port")]
ItemsFrom = Annotated[list[str] | None, typer.Option("--items-from")]


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
    """How vLLM is started: an encoder gives out items at ``items_port``, a language server fetches them ahead from the control addresses
    ``items_from``. What the user adds comes last, so that it holds."""
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
    """The connector has defaults of its own for what nobody has set."""
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
    told = {key: name for name, key in names.items() if loaded.origins[name] != "default"}
    made |= {key: int(getattr(settings, name)) for key, name in told.items()}
    return made | users_connector_settings(settings.vllm_connector)


def users_connector_settings(text: str) -> dict[str, Any]:
    """What the user adds to ``ec_connector_extra_config``. Raises ConfigurationError for what is no JSON object of settings that exist."""
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
    """vLLM in a process group of its own, of which nothing is left when the block has ended. All that it prints goes to the log."""
    try:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=sys.stderr.fileno(), start_new_session=True
        )
    except OSError as error:
        raise EmbedwireError(f"vLLM can not be started: {error}") from None
    try:
        yield process
    finally:
        for number in end_signals():
            signal.signal(number, signal.SIG_IGN)  # what is being ended is ended to the end
        process.terminate()
        with suppress(subprocess.TimeoutExpired):
            process.wait(end_within_s)
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        with suppress(subprocess.TimeoutExpired):
            process.wait(KILL_WAIT_S)


def _wait_end(process: subprocess.Popen[bytes]) -> int:
    """Its exit code, waited for in steps: see SIGNAL_WAIT_S."""
    while (status := process.poll()) is None:
        time.sleep(SIGNAL_WAIT_S)
    return status


def _wait_healthy(process: subprocess.Popen[bytes], url: str) -> None:
    """Until its engine runs. Who started this process sets the deadline. Raises EmbedwireError when it has ended."""
    with httpx.Client(trust_env=False, timeout=2.0) as client:
        while True:
            with suppress(httpx.HTTPError):
                if client.get(f"{url}/health").status_code == 200:
                    return
            if (status := process.poll()) is not None:
                raise EmbedwireError(f"vLLM has ended before it was ready: exit code {status}")
            time.sleep(HEALTH_POLL_S)
