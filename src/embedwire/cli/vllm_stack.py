"""A serving stack of vLLM servers on this machine: a router, encoders and language servers, as children. Knows which depends on which."""

from __future__ import annotations

import errno
import random
import socket
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path

from embedwire.cli.cluster import Child, Cluster
from embedwire.cli.settings import PREFIX
from embedwire.cli.stack import INSIDE, READY_S, Stack, wait_known
from embedwire.registry import Role

SYSTEMS_PORTS = Path("/proc/sys/net/ipv4/ip_local_port_range")
"""A file: the first and the last port that the system gives out to whoever asks for any."""
LOWEST_PORT = 10_000
"""Well-known servers listen below."""


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
    """Start everything and wait until the router can send requests to every server. Raises ChildFailed with the cause.

    The router comes first: language servers are told its URL, to report causes to. It is told the others' before they are there.
    """
    ports = free_ports(2 * encoders + languages)
    encoder_ports, items_ports = ports[:encoders], ports[encoders : 2 * encoders]
    language_ports = ports[2 * encoders :]

    def urls(scheme: str, ports: Sequence[int]) -> list[str]:
        return [f"{scheme}://{INSIDE}:{port}" for port in ports]

    on_step("starting the router")
    known = {
        f"{PREFIX}ENGINE": "vllm",
        f"{PREFIX}PORT": str(router_port),
        f"{PREFIX}ENCODER": ",".join(urls("http", encoder_ports)),
        f"{PREFIX}LANGUAGE": ",".join(urls("http", language_ports)),
    }
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
            variables={f"{PREFIX}HOST": INSIDE, f"{PREFIX}PORT": str(port)},
        )

    encoding = [
        start(Role.ENCODER, number, port, "--items-port", str(items_port))
        for number, (port, items_port) in enumerate(zip(encoder_ports, items_ports, strict=True), 1)
    ]
    # what one alone reads it may as well fetch ahead; of several, each would fetch everything
    ahead = urls("tcp", items_ports) if languages == 1 else []
    items_from = [word for address in ahead for word in ("--items-from", address)]
    reading = [
        start(Role.LANGUAGE, number, port, *items_from) for number, port in enumerate(language_ports, 1)
    ]
    cluster.wait_ready([*encoding, *reading], timeout_s=READY_S)
    on_step("waiting until the router knows all servers")
    wait_known(cluster, router.url, {"encoder": encoders, "language": languages})
    return Stack(None, router, encoding, reading)


def free_ports(count: int) -> list[int]:
    """Ports that nobody has at this moment: vLLM can not say which one it took. Who comes in between makes its server fail to start, so
    they are drawn from those that the system gives out to nobody, where there are any."""
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
