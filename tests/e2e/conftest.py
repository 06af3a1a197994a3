"""Whole stacks of real servers: each a process, started through the command line, spoken to over HTTP.

Owns processes (and ends only those that it started), their metrics, and how tests ask them. Models in tests run on one thread: the machine
is small, and so are they.
"""

from __future__ import annotations

import asyncio
import base64
import json
import os
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

MODEL = "tiny"
READY_S = 90.0
WITHIN_S = 30.0
"""Whatever is waited for comes within this, or the test fails. Nothing is asserted about how fast it comes."""
LOOK_AGAIN_S = 0.02
POOL = {"NUM_BLOCKS": 4, "BLOCK_SIZE": 16}
SENDER_HOLDS = (
    "sender_rooms", "sender_memory_reserved_bytes", "encode_waiting_for_memory", "encode_waiting_for_tower",
)  # fmt: skip
RECEIVER_HOLDS = (
    "receiver_rooms", "receiver_memory_reserved_bytes", "receiver_waiting", "receiver_blocks_granted",
    "receiver_blocks_quarantined", "language_transferring", "language_generating",
)  # fmt: skip
"""Metrics that are 0 when nothing is under way."""


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    import torch

    torch.set_num_threads(1)


def until(holds: Callable[[], Any], *, within_s: float = WITHIN_S, what: Callable[[], object] = str) -> Any:
    """The first true value of ``holds``. Fails with what ``what`` says when there is none in time."""
    deadline_s, pause = time.monotonic() + within_s, threading.Event()
    while not (value := holds()):
        assert time.monotonic() < deadline_s, f"not within {within_s:g} s: {what()}"
        pause.wait(LOOK_AGAIN_S)
    return value


@pytest.fixture(scope="session")
def wait_until() -> Callable[..., Any]:
    """:func:`until`"""
    return until


class Metrics(dict[tuple[str, frozenset[tuple[str, str]]], float]):
    """One look at a server's GET /metrics: (name, labels) to value."""

    def total(self, name: str, **labels: str) -> float:
        """The sum of all samples of that name which carry these labels; 0 without any."""
        return sum(
            v for (n, found), v in self.items() if n == f"embedwire_{name}" and found >= labels.items()
        )


class Server:
    """One server process. ``facts`` is what it said when it was ready."""

    def __init__(self, *arguments: str, variables: Mapping[str, Any], log: Path) -> None:
        self.arguments = arguments
        self.log = log
        self._variables = {f"EMBEDWIRE_{name}": str(value) for name, value in variables.items()}
        self.facts: dict[str, Any] = {}
        self.start()

    def start(self) -> None:
        """Start it; one that ran before gets its ports again."""
        if self.facts:
            self._variables["EMBEDWIRE_PORT"] = str(urlsplit(self.facts["url"]).port)
            control = urlsplit(self.facts.get("rooms_at", "tcp://any:0"))
            self._variables["EMBEDWIRE_CONTROL_PORT"] = str(control.port)
        kept = {name: value for name, value in os.environ.items() if not name.startswith("EMBEDWIRE_")}
        with self.log.open("ab") as stderr:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "embedwire.cli", *self.arguments, "--child"],
                env=kept | {"OMP_NUM_THREADS": "1", "EMBEDWIRE_PORT": "0"} | self._variables,
                stdin=subprocess.PIPE,  # closes with this process, and then they end too
                stdout=subprocess.PIPE,
                stderr=stderr,
            )

    def restart(self) -> None:
        """Start it again at its old ports, and wait until it answers."""
        self.start()
        self.wait_ready()

    def wait_ready(self) -> None:
        """Until it answers requests."""
        assert self.process.stdout is not None
        readable, _, _ = select.select([self.process.stdout], [], [], READY_S)
        line = self.process.stdout.readline() if readable else b""
        assert line, f"{self.arguments} is not ready: {self.last_words()}"
        self.facts = json.loads(line)

    def last_words(self) -> str:
        """The end of its log."""
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-20:])

    @property
    def url(self) -> str:
        return str(self.facts["url"])

    @property
    def is_alive(self) -> bool:
        return self.process.poll() is None

    def freeze(self) -> None:
        """Stop it in its tracks; it keeps what it holds. Returns when none of its threads runs any more."""
        self.process.send_signal(signal.SIGSTOP)
        status = Path(f"/proc/{self.process.pid}/status")
        until(lambda: "State:\tT" in status.read_text())

    def thaw(self) -> None:
        """Let it go on."""
        self.process.send_signal(signal.SIGCONT)

    def ask_to_stop(self) -> None:
        """SIGTERM, also to a frozen one."""
        self.process.terminate()
        self.thaw()

    def kill(self) -> None:
        """SIGKILL: it has no time for anything."""
        self.process.kill()
        self.process.wait(WITHIN_S)

    def stop(self) -> int:
        """SIGTERM, and its exit code. Killed when it does not end in time."""
        self.ask_to_stop()
        return self.wait_stopped()

    def wait_stopped(self) -> int:
        """The exit code of one that was asked to stop."""
        try:
            return self.process.wait(WITHIN_S)
        except subprocess.TimeoutExpired:
            self.kill()
            raise
        finally:
            for pipe in (self.process.stdin, self.process.stdout):
                assert pipe is not None
                pipe.close()

    def metrics(self) -> Metrics:
        """What it counts."""
        answer = httpx.get(f"{self.url}/metrics", timeout=WITHIN_S, trust_env=False).raise_for_status()
        samples = [s for family in text_string_to_metric_families(answer.text) for s in family.samples]
        return Metrics({(s.name, frozenset(s.labels.items())): s.value for s in samples})


@dataclass
class Stack:
    """Registry, router, encoders and one language server, and the ways in which tests ask them."""

    registry: Server
    router: Server
    encoders: list[Server]
    language: Server
    client: httpx.Client = field(
        default_factory=lambda: httpx.Client(timeout=httpx.Timeout(120), trust_env=False)
    )

    @property
    def url(self) -> str:
        """Of the completions."""
        return f"{self.router.url}/v1/chat/completions"

    def ask(self, body: Mapping[str, Any]) -> httpx.Response:
        """One request, and its whole answer."""
        return self.client.post(self.url, json=body)

    def ids(self, body: Mapping[str, Any]) -> list[int]:
        """The token ids of an answer that has to be one."""
        answer = self.ask(body)
        assert answer.status_code == 200, answer.text
        return self.ids_of(answer)

    @staticmethod
    def ids_of(answer: httpx.Response) -> list[int]:
        """The token ids of an answer that was not streamed."""
        ids: list[int] = answer.json()["choices"][0]["token_ids"]
        return ids

    def ask_all(self, bodies: Sequence[Mapping[str, Any]]) -> list[httpx.Response]:
        """All at the same moment, each over a connection of its own; every answer comes in time."""

        async def ask() -> list[httpx.Response]:
            limits = httpx.Limits(max_connections=None, max_keepalive_connections=0)
            async with httpx.AsyncClient(timeout=120, trust_env=False, limits=limits) as client:
                return await asyncio.gather(*(client.post(self.url, json=body) for body in bodies))

        return asyncio.run(ask())

    def known(self) -> Mapping[str, int]:
        """How many workers of each role the router would send requests to."""
        return self.client.get(f"{self.router.url}/health").raise_for_status().json()["workers"]

    def wait_known(self, *, encoder: int, language: int = 1) -> None:
        """Until the router would send requests to so many."""
        until(lambda: self.known() == {"encoder": encoder, "language": language}, what=self.known)

    def wait_whole(self) -> None:
        """Until the router knows every worker."""
        self.wait_known(encoder=len(self.encoders))

    def mend(self) -> None:
        """Start everybody again who is not there."""
        for server in (*self.encoders, self.language):
            if not server.is_alive:
                server.restart()
        self.wait_whole()

    def leaks(self) -> dict[str, float]:
        """What is still held anywhere, by server and name. Empty when the stack is at rest."""
        found: dict[str, float] = {}
        for server, names in ((self.language, RECEIVER_HOLDS), *((e, SENDER_HOLDS) for e in self.encoders)):
            metrics = server.metrics()
            found |= {f"{server.url} {name}": metrics.total(name) for name in names}
        return {name: value for name, value in found.items() if value}

    def wait_at_rest(self) -> None:
        """Until nothing is held on either side: no room, no block, no byte."""
        until(lambda: not self.leaks(), what=self.leaks)
        pool = self.language.metrics()
        assert pool.total("receiver_blocks_free") == pool.total("receiver_blocks") == POOL["NUM_BLOCKS"]


def data_url(image: bytes) -> str:
    """As the OpenAI API takes a picture."""
    return "data:image/png;base64," + base64.b64encode(image).decode()


@pytest.fixture(scope="session")
def chat() -> Callable[..., dict[str, Any]]:
    """``chat(text, image or URL, …, **options)``: the body of a greedy request whose answer tells its token ids."""

    def body(text: str, *images: bytes | str, **options: Any) -> dict[str, Any]:
        urls = [image if isinstance(image, str) else data_url(image) for image in images]
        parts: list[dict[str, Any]] = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
        greedy = {"temperature": 0, "max_tokens": 8, "ignore_eos": True, "return_token_ids": True}
        content = [*parts, {"type": "text", "text": text}]
        return {"model": MODEL, "messages": [{"role": "user", "content": content}], **greedy, **options}

    return body


@pytest.fixture(scope="session")
def start_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Server]]:
    """``start_server("language", "DIRECTORY", SETTING=value, …)``: one server, not yet ready, with settings of the command line. It lives
    until the session ends, and has to end well."""
    started: list[Server] = []

    def start(*arguments: str, **settings: Any) -> Server:
        log = tmp_path_factory.mktemp("log") / f"{arguments[0]}.log"
        variables = {"DTYPE": "float32", "THREADS": 1, "SHUTDOWN_S": 2, **POOL, **settings}
        started.append(Server(*arguments, variables=variables, log=log))
        return started[-1]

    yield start
    for one in started:
        one.ask_to_stop()
    codes = [(one.arguments[0], one.wait_stopped()) for one in started]
    assert not any(code for _, code in codes), codes


@pytest.fixture(scope="session")
def start_stack(
    tiny_model_dir: Callable[[str], Path], start_server: Callable[..., Server]
) -> Callable[..., Stack]:
    """``start_stack(encoders=1, SETTING=value, …)``: a stack whose pool is smaller than any prompt with a picture. Settings are those of
    the command line, for all of its servers. It lives until the session ends."""

    def start(*, encoders: int = 1, **settings: Any) -> Stack:
        registry = start_server("registry", **settings)
        registry.wait_ready()
        settings["REGISTRY_URL"] = registry.url
        model = [str(tiny_model_dir("qwen2_5_vl")), "--name", MODEL]
        stack = Stack(
            registry=registry,
            router=start_server("router", **settings),
            encoders=[start_server("encoder", *model, **settings) for _ in range(encoders)],
            language=start_server("language", *model, **settings),
        )
        for one in (stack.router, *stack.encoders, stack.language):
            one.wait_ready()
        stack.wait_whole()
        return stack

    return start


@pytest.fixture(scope="session")
def shared_stack(start_stack: Callable[..., Stack]) -> Stack:
    """For tests that leave it as they found it: one encoder; media may be private, and have one second to come."""
    return start_stack(ALLOW_PRIVATE_MEDIA=True, MEDIA_TIMEOUT_S=1, REQUESTS_MAX=160, MAX_WAITING=64)


@pytest.fixture
def stack(shared_stack: Stack) -> Iterator[Stack]:
    """The shared stack, at rest before the test and after it."""
    shared_stack.wait_at_rest()
    yield shared_stack
    shared_stack.wait_at_rest()
