"""``embedwire up``: a whole serving stack on this machine, until Ctrl-C: a router, encoders, language servers and, unless they are vLLM
servers, a registry. Each is a child process; this module defines which depends on which. Main thread.
"""

from __future__ import annotations

import errno
import random
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated

import httpx
import typer

from embedwire.cli.options import Loaded, Name, takes
from embedwire.cli.processes import Child, ChildFailed, Cluster, check_can_listen, end_in_order
from embedwire.cli.screen import JsonFile, check_writable, err, out, table, write_json
from embedwire.cli.servers import users_connector_settings
from embedwire.cli.settings import (
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
    variables,
)
from embedwire.errors import ConfigurationError
from embedwire.limits import RANKS_MAX
from embedwire.registry import Role

READY_S = 600.0
"""Loading a large model takes minutes."""
HEALTH_POLL_S = 0.1
INSIDE = "127.0.0.1"
"""Where all but the router listen: no other machine has to reach them."""
SYSTEMS_PORTS = Path("/proc/sys/net/ipv4/ip_local_port_range")
"""A file: the first and the last port that the system assigns when a process binds port 0."""
LOWEST_PORT = 10_000
"""Well-known servers listen below."""


@dataclass(frozen=True, slots=True)
class Stack:
    """The children by what they do. All are ready, and the router knows all workers, with or without a registry."""

    registry: Child | None
    router: Child
    encoders: Sequence[Child]
    languages: Sequence[Child]

    @property
    def children(self) -> tuple[Child, ...]:
        """All of them, the router first."""
        registry = () if self.registry is None else (self.registry,)
        return (self.router, *self.encoders, *self.languages, *registry)


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
            _print_stack(stack)
            write_json(json, {child.name: dict(child.facts) for child in stack.children})
            while True:
                cluster.watch()
    except KeyboardInterrupt:
        out.print("stopped")


def _print_stack(stack: Stack) -> None:
    made = table("server", "url", "pid", "")
    for child in stack.children:
        made.add_row(child.name, child.url, str(child.facts["pid"]), child.in_words)
    out.print(made)
    hint = f"Ask with: embedwire ask --url {stack.router.url} 'What is this?' IMAGE"
    out.print(hint, soft_wrap=True, markup=False)
    out.print("Ctrl-C ends everything.")


def _starter(loaded: Loaded, *, encoder_ranks: int) -> Callable[..., Stack]:
    """The function that starts a stack of the engine in the settings."""
    if loaded.settings.engine == "vllm":
        users_connector_settings(loaded.settings.vllm_connector)
        if encoder_ranks > 1:
            raise ConfigurationError(
                "vLLM encoders are divided with --vllm-encoder-args '--tensor-parallel-size N'"
            )
        return start_vllm_stack
    return partial(start_stack, encoder_ranks=encoder_ranks)


def start_stack(
    cluster: Cluster,
    model: str,
    *,
    name: str | None = None,
    encoders: int = 1,
    languages: int = 1,
    encoder_ranks: int = 1,
    language_variables: Mapping[str, str] | None = None,
    router_port: int = 0,
    on_step: Callable[[str], None] = lambda step: None,
) -> Stack:
    """Start everything and wait until the router can send requests to every worker. Each encoder is ``encoder_ranks`` processes; the
    settings say how many a language server is. Raises ChildFailed with the cause.
    """
    # a port can be had by one process only
    anywhere = variables(host=INSIDE, port=0, control_port=0)
    on_step("starting the registry")
    registry = cluster.start("registry", "registry", variables=anywhere)
    cluster.wait_ready([registry], timeout_s=READY_S)
    registered = variables(registry_url=registry.url)
    member = anywhere | registered
    named = ["--name", name] if name else []
    on_step(f"loading the model: {encoders} × its encode half, {languages} × its language half")
    ranks = variables(tensor_parallel_size=encoder_ranks)
    encoding = [
        cluster.start(f"encoder {i + 1}", "encoder", model, *named, variables=member | ranks)
        for i in range(encoders)
    ]
    reading = [
        cluster.start(
            f"language {i + 1}", "language", model, *named, variables=member | dict(language_variables or {})
        )
        for i in range(languages)
    ]
    router = cluster.start("router", "router", variables=registered | variables(port=router_port))
    cluster.wait_ready([*encoding, *reading, router], timeout_s=READY_S)
    on_step("waiting until the router knows all workers")
    wait_known(cluster, router.url, {"encoder": encoders, "language": languages})
    return Stack(registry, router, encoding, reading)


def start_vllm_stack(
    cluster: Cluster,
    model: str,
    *,
    name: str | None = None,
    encoders: int = 1,
    languages: int = 1,
    router_port: int = 0,
    on_step: Callable[[str], None] = lambda step: None,
) -> Stack:
    """As :func:`start_stack`, of vLLM servers.

    The router starts first: language servers get its URL, to report causes to. It gets the URLs of the others before they listen.
    """
    ports = free_ports(2 * encoders + languages)
    encoder_ports, items_ports = ports[:encoders], ports[encoders : 2 * encoders]
    language_ports = ports[2 * encoders :]

    def urls(scheme: str, ports: Sequence[int]) -> list[str]:
        return [f"{scheme}://{INSIDE}:{port}" for port in ports]

    on_step("starting the router")
    known = variables(
        engine="vllm",
        port=router_port,
        encoder=urls("http", encoder_ports),
        language=urls("http", language_ports),
    )
    router = cluster.start("router", "router", variables=known)
    cluster.wait_ready([router], timeout_s=READY_S)
    on_step(f"starting vLLM: {encoders} × encoder, {languages} × language server")

    def start(role: Role, number: int, port: int, *more: str) -> Child:
        arguments = [model, "--role", role.value, "--report-to", router.url, *more]
        arguments += ["--name", name] if name else []
        return cluster.start(
            f"{role} {number}",
            "vllm-server",
            *arguments,
            variables=variables(host=INSIDE, port=port),
        )

    encoding = [
        start(Role.ENCODER, number, port, "--items-port", str(items_port))
        for number, (port, items_port) in enumerate(zip(encoder_ports, items_ports, strict=True), 1)
    ]
    # a single language server prefetches; each of several would fetch everything
    prefetched = urls("tcp", items_ports) if languages == 1 else []
    items_from = [word for address in prefetched for word in ("--items-from", address)]
    reading = [
        start(Role.LANGUAGE, number, port, *items_from) for number, port in enumerate(language_ports, 1)
    ]
    cluster.wait_ready([*encoding, *reading], timeout_s=READY_S)
    on_step("waiting until the router knows all servers")
    wait_known(cluster, router.url, {"encoder": encoders, "language": languages})
    return Stack(None, router, encoding, reading)


def wait_known(
    cluster: Cluster, router_url: str, wanted: Mapping[str, int], *, timeout_s: float = 60.0
) -> None:
    """Wait until the router can send requests to this many workers of each role. Raises ChildFailed at the deadline."""
    deadline_s = time.monotonic() + timeout_s
    with httpx.Client(trust_env=False, timeout=5.0) as client:
        while True:
            known: Mapping[str, int] = client.get(f"{router_url}/health").raise_for_status().json()["workers"]
            if all(known.get(role, 0) >= count for role, count in wanted.items()):
                return
            if time.monotonic() >= deadline_s:
                raise ChildFailed(f"the router knows {known} after {timeout_s:g} s, not {dict(wanted)}")
            cluster.watch(timeout_s=HEALTH_POLL_S)


def free_ports(count: int) -> list[int]:
    """Ports that are free now: vLLM cannot report which one it took. A process that binds one before vLLM makes that server fail to start,
    so they are drawn from those that the system does not assign by itself, where there are any."""
    first, last = map(int, SYSTEMS_PORTS.read_text().split())
    others = [*range(LOWEST_PORT, first), *range(last + 1, 2**16)]
    drawn = iter([*random.sample(others, len(others)), *[0] * count])
    ports: list[int] = []
    with ExitStack() as held:
        while len(ports) < count:
            one = held.enter_context(socket.socket())
            try:
                one.bind((INSIDE, next(drawn)))
            except OSError as error:
                if error.errno != errno.EADDRINUSE:
                    raise
                one.close()
            else:
                ports.append(one.getsockname()[1])
    return ports
