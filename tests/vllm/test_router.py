"""The router in front of real vLLM servers: answers, an encoder that dies under load, causes that reach the client."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed here: make test-vllm")

from servers import Router, chat, free_port, ids_of, post

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(900)]

FAMILY = "qwen2_5_vl"
Prompts = list[list[dict[str, Any]]]


@pytest.fixture(scope="module")
def stack(servers: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """Two encoders and a language server behind a router; one language server without a tower behind another; an undivided one."""
    port, metadata_port = free_port(), free_port()
    report_to = [f"http://127.0.0.1:{port}", f"http://127.0.0.1:{metadata_port}"]
    made = SimpleNamespace(
        whole=servers.start("whole", FAMILY),
        encoders=[servers.encoder(f"encoder {n}", FAMILY) for n in (1, 2)],
        language=servers.language("language", FAMILY, report_to=report_to, item_deadline_s=10.0),
        towerless=servers.language("towerless", FAMILY, "--language-model-only", report_to=report_to),
    )
    for server in (made.whole, *made.encoders, made.language, made.towerless):
        server.wait_ready()
    logs = tmp_path_factory.mktemp("routers")
    urls = [flag for encoder in made.encoders for flag in ("--encoder", encoder.url)]
    with ExitStack() as stop:
        made.router = Router(port, *urls, "--language", made.language.url, log=logs / "router.log")
        stop.callback(made.router.stop)
        flags = ("--language", made.towerless.url, "--media", "metadata")
        made.metadata = Router(metadata_port, *urls, *flags, log=logs / "metadata.log")
        stop.callback(made.metadata.stop)
        for router in (made.router, made.metadata):
            router.wait_knows(encoder=2, language=1)
        made.logs = logs
        made.urls = urls
        yield made


@pytest.fixture(scope="module")
def expected(stack: Any, prompts: Prompts) -> list[list[int]]:
    """What the undivided server answers."""
    return [ids_of(post(stack.whole.url, chat(parts, f"q{n}"))) for n, parts in enumerate(prompts)]


def test_answers(stack: Any, prompts: Prompts, expected: list[list[int]]) -> None:
    """20 prompts, one at a time; every item came in rounds through the pool of 16 rows, and none was encoded twice."""
    rounds: list[int] = []
    for number, parts in enumerate(prompts):
        answer = post(stack.router.url, chat(parts, f"q{number}"))
        assert ids_of(answer) == expected[number], f"prompt {number}"
        passage = answer.json()["embedwire"]
        assert passage["items"] == len(parts)
        rounds += [len(item["rounds"]) for item in passage["transfers"].values()]
    assert max(rounds) >= 256 / 16


def test_metadata(stack: Any, prompts: Prompts, expected: list[list[int]]) -> None:
    """The language server never sees a picture, and has no tower."""
    for number, parts in enumerate(prompts):
        answer = post(stack.metadata.url, chat(parts, f"q{number}"))
        assert ids_of(answer) == expected[number], f"prompt {number}"


def test_streaming(stack: Any, prompts: Prompts) -> None:
    """The same text as at once."""
    import httpx

    body = chat(prompts[1], "streamed")
    whole = post(stack.router.url, body).json()["choices"][0]["message"]["content"]
    with httpx.stream(
        "POST", f"{stack.router.url}/v1/chat/completions", json={**body, "stream": True}
    ) as answer:
        lines = [line.removeprefix("data: ") for line in answer.iter_lines() if line]
    assert lines[-1] == "[DONE]"
    import json

    events = [json.loads(line) for line in lines[:-1]]
    assert "".join(c["delta"].get("content") or "" for e in events for c in e["choices"]) == whole


def test_the_cause_reaches_the_client(
    stack: Any, servers: Any, image: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    """Of a room that ended for a reason that vLLM itself passes on to nobody: here models that differ, both named."""
    port = free_port()
    other = servers.language(
        "other",
        FAMILY,
        "--mm-processor-kwargs",
        '{"max_pixels": 50176}',
        report_to=[f"http://127.0.0.1:{port}"],
    ).wait_ready()
    router = Router(port, *stack.urls, "--language", other.url, log=tmp_path / "router.log")
    try:
        router.wait_knows(encoder=2, language=1)
        answer = post(router.url, chat([image(seed=70)]))
        error = answer.json()["error"]
        assert (answer.status_code, error["code"]) == (502, "handshake"), error
        assert "max_pixels" in error["message"]
        assert other.is_healthy()
    finally:
        router.stop()
        other.stop()


def test_an_encoder_is_killed_under_load(stack: Any, image: Callable[..., dict[str, Any]]) -> None:
    """24 requests with fresh pictures, half way through one encoder dies: every one is answered, and rightly."""
    parts = [[image(112, 112, seed=200 + n)] for n in range(24)]
    right = [ids_of(post(stack.whole.url, chat(p, "load"))) for p in parts]
    answered, half = threading.Semaphore(0), 6

    def ask(p: list[dict[str, Any]]) -> Any:
        answer = post(stack.router.url, chat(p, "load"), timeout_s=120.0)
        answered.release()
        return answer

    with ThreadPoolExecutor(8) as pool:
        asked = [pool.submit(ask, p) for p in parts]
        for _ in range(half):
            assert answered.acquire(timeout=120.0)
        stack.encoders[0].kill()
        answers = [future.result() for future in asked]
    assert [answer.status_code for answer in answers] == [200] * 24
    assert sum(ids_of(a) == r for a, r in zip(answers, right, strict=True)) == 24
