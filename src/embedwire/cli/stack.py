"""A whole serving stack on this machine: registry, encoders, language servers and a router, as children. Knows which depends on which."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import httpx

from embedwire.cli.cluster import Child, ChildFailed, Cluster
from embedwire.cli.settings import PREFIX

READY_S = 600.0
"""Loading a large model takes minutes."""
HEALTH_POLL_S = 0.1
INSIDE = "127.0.0.1"
"""Where all but the router listen: nobody else has to reach them."""


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
    anywhere = {f"{PREFIX}HOST": INSIDE, f"{PREFIX}PORT": "0", f"{PREFIX}CONTROL_PORT": "0"}
    on_step("starting the registry")
    registry = cluster.start("registry", "registry", variables=anywhere)
    cluster.wait_ready([registry], timeout_s=READY_S)
    registered = {f"{PREFIX}REGISTRY_URL": registry.url}
    member = anywhere | registered
    named = ["--name", name] if name else []
    on_step(f"loading the model: {encoders} × its encode half, {languages} × its language half")
    ranks = {f"{PREFIX}TENSOR_PARALLEL_SIZE": str(encoder_ranks)}
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
    router = cluster.start("router", "router", variables=registered | {f"{PREFIX}PORT": str(router_port)})
    cluster.wait_ready([*encoding, *reading, router], timeout_s=READY_S)
    on_step("waiting until the router knows all workers")
    wait_known(cluster, router.url, {"encoder": encoders, "language": languages})
    return Stack(registry, router, encoding, reading)


def wait_known(
    cluster: Cluster, router_url: str, wanted: Mapping[str, int], *, timeout_s: float = 60.0
) -> None:
    """Until the router can send requests to so many workers of each role. Raises ChildFailed at the deadline."""
    deadline_s = time.monotonic() + timeout_s
    with httpx.Client(trust_env=False, timeout=5.0) as client:
        while True:
            known: Mapping[str, int] = client.get(f"{router_url}/health").raise_for_status().json()["workers"]
            if all(known.get(role, 0) >= count for role, count in wanted.items()):
                return
            if time.monotonic() >= deadline_s:
                raise ChildFailed(f"the router knows {known} after {timeout_s:g} s, not {dict(wanted)}")
            cluster.watch(timeout_s=HEALTH_POLL_S)
