"""Real servers on free loopback ports, around doubles of the two services that make real deltas on threads of
their own."""

from __future__ import annotations

import base64
import hashlib
import logging
import logging.handlers
import queue
import re
import socket
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

import msgspec
import pytest
from fastapi import FastAPI

from embedwire.encode.interface import ChatPrompt
from embedwire.errors import EmbedwireError, TransferError
from embedwire.language.interface import Delta, SamplingParams, TransferReport
from embedwire.memory.layout import multimodal
from embedwire.registry import Registry
from embedwire.serve.dispatch import DispatchLimits
from embedwire.serve.encoder_app import encoder_app
from embedwire.serve.language_app import language_app
from embedwire.serve.media import MediaFetcher, MediaLimits
from embedwire.serve.metrics import AppMetrics
from embedwire.serve.registry_app import registry_app
from embedwire.serve.router_app import RouterSettings, router_app
from embedwire.serve.run import AppServer

LAYOUT = multimodal(8)
MODEL = "tiny"
WAIT_S = 20.0
Records = queue.SimpleQueue[logging.LogRecord]


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@contextmanager
def running(app: FastAPI, port: int = 0, *, shutdown_s: float = 1.0) -> Iterator[AppServer]:
    """A server on a thread of its own."""
    ready = threading.Event()
    server = AppServer(app, port=port, shutdown_s=shutdown_s, on_ready=lambda _url: ready.set())
    thread = threading.Thread(target=server.serve, daemon=True)
    thread.start()
    try:
        assert ready.wait(WAIT_S)
        yield server
    finally:
        server.stop()
        thread.join(WAIT_S)
        assert not thread.is_alive()


@dataclass
class Taken:
    total_tokens: int
    control_addresses: tuple[str, ...]
    content_hash: bytes
    text: str


@dataclass
class EncodeDouble:
    """Takes prompts up into a dictionary that the language double reads by address. ``fails`` is raised
    instead; ``gate`` holds ``take_up`` up."""

    address: str
    fails: EmbedwireError | None = None
    breaks: TransferError | None = None
    gate: threading.Event | None = None
    entered: queue.Queue[int] = field(default_factory=queue.Queue)
    aborted: queue.Queue[tuple[int, int]] = field(default_factory=queue.Queue)
    rooms: dict[tuple[int, int], Taken] = field(default_factory=dict)
    prompts: list[ChatPrompt] = field(default_factory=list)
    readers: dict[int, int] = field(default_factory=dict)

    def take_up(self, room: int, prompt: ChatPrompt, *, attempt: int = 0, readers: int = 1) -> Taken:
        self.entered.put(room)
        self.readers[room] = readers
        if self.gate:
            assert self.gate.wait(WAIT_S)
        if self.fails:
            raise self.fails
        self.prompts.append(prompt)
        digest = hashlib.sha256(b"".join(prompt.media)).digest()
        taken = Taken(2000, (self.address,), digest, f"saw {len(prompt.media)} {digest.hex()[:12]}")
        self.rooms[room, attempt] = taken
        return taken

    def abort(self, room: int, *, attempt: int = 0, detail: str = "") -> None:
        self.rooms.pop((room, attempt), None)
        self.aborted.put((room, attempt))


class JobDouble:
    """Says one word a token, on its own thread; with ``steps``, one a permit."""

    def __init__(
        self,
        words: Sequence[str],
        sampling: SamplingParams,
        *,
        steps: threading.Semaphore | None,
        on_delta: Callable[[Delta], None],
        before: Callable[[], None] = lambda: None,
        ends: Delta | None = None,
    ) -> None:
        self.prompt_tokens = 7
        self.cancelled = threading.Event()
        self._words, self._sampling, self._steps = words, sampling, steps
        self._on_delta, self._before, self._ends = on_delta, before, ends
        threading.Thread(target=self._run, daemon=True).start()

    def cancel(self) -> None:
        self.cancelled.set()
        if self._steps:
            self._steps.release()

    def _run(self) -> None:
        self._before()
        words = self._words[: self._sampling.max_tokens]
        for number, word in enumerate(words):
            if self._steps:
                assert self._steps.acquire(timeout=WAIT_S)
            if self.cancelled.is_set():
                self._on_delta(Delta(finish_reason="cancelled"))
                return
            self._on_delta(Delta((100 + number,), word if number == 0 else f" {word}"))
        full = len(words) == self._sampling.max_tokens
        self._on_delta(self._ends or Delta(finish_reason="length" if full else "stop"))


@dataclass
class LanguageDouble:
    """Answers a text with its last message, a room with what its encoder saw. ``fails`` is raised at once."""

    encoders: Mapping[str, EncodeDouble] = field(default_factory=dict)
    fails: EmbedwireError | None = None
    ends: Delta | None = None
    steps: threading.Semaphore | None = None
    jobs: queue.Queue[JobDouble] = field(default_factory=queue.Queue)
    samplings: list[SamplingParams] = field(default_factory=list)

    def generate_text(
        self,
        messages: Sequence[Mapping[str, Any]],
        sampling: SamplingParams,
        *,
        on_delta: Callable[[Delta], None],
        on_error: Callable[[EmbedwireError], None],
    ) -> JobDouble:
        content = messages[-1]["content"]
        text = content if isinstance(content, str) else "".join(part["text"] for part in content)
        return self._start(text, sampling, on_delta=on_delta)

    def generate_room(
        self,
        room: int,
        addresses: Sequence[str],
        sampling: SamplingParams,
        *,
        attempt: int = 0,
        on_report: Callable[[TransferReport, int], None],
        on_delta: Callable[[Delta], None],
        on_error: Callable[[EmbedwireError], None],
    ) -> JobDouble:
        (address,) = addresses
        encoder = self.encoders[address]
        taken = encoder.rooms.pop((room, attempt), None)
        if encoder.breaks or taken is None:
            broken = encoder.breaks or TransferError("unknown_room")
            threading.Thread(target=on_error, args=[broken], daemon=True).start()
            return JobDouble([], sampling, steps=None, on_delta=lambda _delta: None)
        report = TransferReport(room, "shm", taken.total_tokens, (1024, 976), 64000, 12.5, 3.25, 64000)
        return self._start(
            taken.text, sampling, on_delta=on_delta, before=lambda: on_report(report, taken.total_tokens)
        )

    def _start(self, text: str, sampling: SamplingParams, **callbacks: Any) -> JobDouble:
        if self.fails:
            raise self.fails
        self.samplings.append(sampling)
        job = JobDouble(text.split(" "), sampling, steps=self.steps, ends=self.ends, **callbacks)
        self.jobs.put(job)
        return job


@dataclass
class Cluster:
    """Servers of one test. Each ``add_…`` starts one and returns it."""

    stack: ExitStack
    encoders: dict[str, EncodeDouble] = field(default_factory=dict)

    def run(self, app: FastAPI, port: int = 0, **how: Any) -> AppServer:
        return self.stack.enter_context(running(app, port, **how))

    def add_encoder(self, port: int = 0, **changes: Any) -> tuple[EncodeDouble, AppServer]:
        app_settings = {k: changes.pop(k) for k in ("requests_max", "registry", "metrics") if k in changes}
        limits = changes.pop("media", MediaLimits(allow_private_media=True))
        double = EncodeDouble(f"tcp://encoder-{len(self.encoders)}", **changes)
        self.encoders[double.address] = double
        app = encoder_app(
            double,
            model=MODEL,
            layout=LAYOUT,
            control_addresses=[double.address],
            media=MediaFetcher(limits),
            **app_settings,
        )
        return double, self.run(app, port)

    def add_language(self, port: int = 0, **changes: Any) -> tuple[LanguageDouble, AppServer]:
        app_settings = {k: changes.pop(k) for k in ("registry", "metrics", "readers") if k in changes}
        how = {k: changes.pop(k) for k in ("shutdown_s",) if k in changes}
        double = LanguageDouble(self.encoders, **changes)
        return double, self.run(language_app(double, model=MODEL, layout=LAYOUT, **app_settings), port, **how)

    def add_router(
        self, *workers: AppServer, limits: DispatchLimits | None = None, **changes: Any
    ) -> AppServer:
        urls = [w.url for w in workers]
        settings = RouterSettings(worker_urls=urls, limits=limits or DispatchLimits(), **changes)
        return self.run(router_app(settings))

    def add_registry(self, table: Registry | None = None, port: int = 0, **changes: Any) -> AppServer:
        return self.run(registry_app(Registry() if table is None else table, **changes), port)


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    with ExitStack() as stack:
        yield Cluster(stack)


@pytest.fixture(scope="module")
def language_url() -> Iterator[str]:
    """One language server for tests that leave nothing behind."""
    with ExitStack() as stack:
        yield Cluster(stack).add_language()[1].url


@pytest.fixture
def app_metrics() -> AppMetrics:
    return AppMetrics()


@pytest.fixture
def image_url() -> Callable[[bytes], str]:
    """bytes → a data: URL."""
    return lambda data: "data:image/png;base64," + base64.b64encode(data).decode()


@pytest.fixture
def chat(image_url: Callable[[bytes], str]) -> Callable[..., dict[str, Any]]:
    """A request's body: ``chat("text", b"image", …, stream=True)``."""

    def body(text: str, *images: bytes | str, **options: Any) -> dict[str, Any]:
        urls = [image if isinstance(image, str) else image_url(image) for image in images]
        parts: list[dict[str, Any]] = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
        content = [*parts, {"type": "text", "text": text}] if parts else text
        return {"model": MODEL, "messages": [{"role": "user", "content": content}], **options}

    return body


@pytest.fixture
def hang_up_after() -> Callable[[str, Any], AbstractContextManager[socket.socket]]:
    """Posts a body and closes the connection at the end of the block, whatever had been answered."""

    @contextmanager
    def post(url: str, body: Any) -> Iterator[socket.socket]:
        parts, content = urlsplit(url), msgspec.json.encode(body)
        head = f"POST {parts.path} HTTP/1.1\r\nhost: {parts.netloc}\r\ncontent-length: {len(content)}\r\n\r\n"
        with socket.create_connection((parts.hostname, parts.port), timeout=WAIT_S) as connection:
            connection.sendall(head.encode() + content)
            yield connection

    return post


@pytest.fixture
def records() -> Iterator[Records]:
    """All records of this process at DEBUG, of any logger: a request is logged when its client may have read the answer already."""
    found: queue.SimpleQueue[logging.LogRecord] = queue.SimpleQueue()
    handler, root = logging.handlers.QueueHandler(found), logging.getLogger()
    level = root.level
    root.addHandler(handler)
    root.setLevel(logging.DEBUG)
    yield found
    root.setLevel(level)
    root.removeHandler(handler)


@pytest.fixture
def next_line(records: Records) -> Callable[[], tuple[str, str]]:
    """``next_line()``: level and text of the next request's line, without its milliseconds; checks of workers are left out."""

    def get() -> tuple[str, str]:
        while True:
            record = records.get(timeout=WAIT_S)
            text = record.getMessage()
            if record.name == "embedwire.serve.requests" and record.levelno >= logging.INFO:
                assert re.search(r" ms=\d+\.\d$", text)
                return record.levelname, text.rpartition(" ms=")[0]

    return get
