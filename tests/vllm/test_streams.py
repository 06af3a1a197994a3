"""Streams that fail before their first token are retried, as answers in one piece are.

vLLM sends the chunk with the role of a stream before anything of the request can fail.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import httpx
import pytest

pytest.importorskip("vllm", reason="vLLM is not installed here: make test-vllm")

from servers import LOOK_AGAIN_S, WITHIN_S, Router, chat, free_port, ids_of, post, stream_of

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(900)]

FAMILY = "qwen2_5_vl"
ITEM_BYTES = 256 * 128 * 4
"""A picture of 448 x 448: 256 rows of 128 float32."""
LONG = "word " * 40
"""With a small picture two or three of the blocks of 128 tokens, and another for the answer."""


@pytest.fixture(scope="module")
def stack(servers: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """Two encoders and a language server behind a router. Both sides keep two large pictures, and the language server has 9 blocks for
    KV caches, which is enough for two requests."""
    port = free_port()
    made = SimpleNamespace(
        whole=servers.start("whole", FAMILY),
        encoders=[servers.encoder(f"encoder {n}", FAMILY, items_bytes=5 * ITEM_BYTES // 2) for n in (1, 2)],
        language=servers.language(
            "language",
            FAMILY,
            "--num-gpu-blocks-override",
            "10",
            "--max-model-len",
            "1024",
            staging_bytes=5 * ITEM_BYTES // 2,
            report_to=[f"http://127.0.0.1:{port}"],
        ),
    )
    for server in (made.whole, *made.encoders, made.language):
        server.wait_ready()
    urls = [flag for encoder in made.encoders for flag in ("--encoder", encoder.url)]
    log = tmp_path_factory.mktemp("router") / "router.log"
    made.router = Router(port, *urls, "--language", made.language.url, log=log)
    made.router.wait_knows(encoder=2, language=1)
    yield made
    made.router.stop()


def test_an_item_that_both_sides_have_evicted(stack: Any, image: Callable[..., dict[str, Any]]) -> None:
    """The router sends the reader to an encoder that has evicted the item, and has it encoded again, with no error in the stream."""
    pictures = [chat([image(448, 448, seed=600 + n)], "evicted") for n in range(6)]
    right = [ids_of(post(stack.whole.url, body)) for body in pictures]
    assert len(set(map(tuple, right))) == len(right)
    for body, ids in zip(pictures, right, strict=True):
        assert ids_of(post(stack.router.url, body)) == ids
    before = retries(stack.router, "unknown_item")
    assert [stream_of(stack.router.url, body) for body in pictures] == [(ids, []) for ids in right]
    assert retries(stack.router, "unknown_item") > before


def test_an_encoder_is_killed_while_streams_wait_for_blocks(
    stack: Any, image: Callable[..., dict[str, Any]]
) -> None:
    """Some of 8 streams have begun, others wait for KV blocks, and one of the two encoders of their items dies: all are answered."""
    bodies = [chat([image(112, 112, seed=700 + n)], f"{LONG} {n}", tokens=300) for n in range(8)]
    right = [ids_of(post(stack.whole.url, body)) for body in bodies]
    with ThreadPoolExecutor(len(bodies)) as pool:
        answers = [pool.submit(stream_of, stack.router.url, body) for body in bodies]
        wait_for_waiting(stack.language.url, 2)
        stack.encoders[0].kill()
        assert [answer.result() for answer in answers] == [(ids, []) for ids in right]


def retries(router: Router, cause: str) -> float:
    """How often the router has tried again for this cause."""
    for line in httpx.get(f"{router.url}/metrics").text.splitlines():
        if line.startswith("embedwire_retries_total") and f'"{cause}"' in line:
            return float(line.split()[-1])
    return 0.0


def wait_for_waiting(url: str, count: int) -> None:
    """Until so many requests of a vLLM server wait while others run."""
    deadline_s, pause = time.monotonic() + WITHIN_S, threading.Event()
    running = waiting = 0.0
    while not (running and waiting >= count):
        assert time.monotonic() < deadline_s, f"{running:g} run and {waiting:g} wait"
        pause.wait(LOOK_AGAIN_S / 10)
        running, waiting = metrics(url, ("num_requests_running", "num_requests_waiting"))


def metrics(url: str, names: Sequence[str]) -> list[float]:
    """The values of vLLM's metrics, all labels together."""
    lines = httpx.get(f"{url}/metrics").text.splitlines()
    return [
        sum(float(line.split()[-1]) for line in lines if line.startswith(f"vllm:{name}{{")) for name in names
    ]
