"""How soon does the first token come, and how many requests a second, beside another stack: vLLM's own file-based connector, or a router?

Owns the requests and the clock; the servers are the caller's: of each stack either a router with servers behind it, or an encoder and a
language server, which are then asked one after the other from here. Both stacks get the same requests in turns, each with pictures that
neither has seen, after a rest, and have to give the same answers. An answer without a token is lost: it is counted, and what was measured
with it is not. One thread a request.
"""

from __future__ import annotations

import base64
import io
import json
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import httpx
import numpy as np

from embedwire.errors import ConfigurationError, EmbedwireError
from embedwire.serve.calls import KEPT_IDLE_S
from embedwire.serve.openai import read_events

WARM_UP = 2
"""Requests to each stack before the clock runs."""
REST_S = 1.5
"""Between the two stacks' turns. A vLLM process that waits for work keeps a core busy for a second after its last piece (``SpinCondition``
in its ``shm_broadcast.py``), which the other stack's turn would pay for where cores are few."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Stack:
    """Where its servers are: URLs without a path, either of a router, or of an encoder and a language server."""

    router: str = ""
    encoder: str = ""
    language: str = ""

    def __post_init__(self) -> None:
        if (bool(self.encoder), bool(self.language)) != (not self.router,) * 2:
            raise ConfigurationError("a stack is either a router, or an encoder and a language server")

    @property
    def kind(self) -> str:
        """In words."""
        return "router" if self.router else "connector"

    @property
    def urls(self) -> tuple[str, ...]:
        """Of all that is asked."""
        return (self.router,) if self.router else (self.encoder, self.language)

    def ask(self, client: httpx.Client, body: Mapping[str, Any]) -> tuple[float, str]:
        """Seconds to the first token, and the text. Without a router: a request a picture to the encoder, all at once, then the whole
        request to the language server, with what the encoder said of each."""
        began = time.monotonic()
        if self.router:
            return _stream(client, self.router, body, began=began)
        pictures = [part for part in body["messages"][0]["content"] if part["type"] == "image_url"]
        with ThreadPoolExecutor(len(pictures)) as pool:
            told = list(pool.map(lambda part: self._encode(client, body["model"], part), pictures))
        if items := {name: entry for each in told for name, entry in each.items()}:
            body = {**body, "ec_transfer_params": {"embedwire": {"items": items}}}
        return _stream(client, self.language, body, began=began)

    def _encode(self, client: httpx.Client, model: str, part: Mapping[str, Any]) -> dict[str, Any]:
        request = {"model": model, "messages": [{"role": "user", "content": [part]}], "max_tokens": 1}
        answer = _checked(client.post(f"{self.encoder}/v1/chat/completions", json=request))
        return answer.json().get("ec_transfer_params") or {}


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """What is asked: ``images`` pictures of ``side`` × ``side`` pixels a request, ``tokens`` tokens of answer. ``repeat`` requests one at a
    time, then ``repeat`` times ``concurrency`` at once."""

    images: int = 1
    side: int = 448
    tokens: int = 8
    repeat: int = 9
    concurrency: int = 8


@dataclass(frozen=True, slots=True)
class Case:
    """Medians. A ratio above 1 says that ours is better: sooner, or more."""

    images: int
    side: int
    tokens: int
    repeat: int
    concurrency: int
    ours: str
    baseline: str
    ttft_median_s: float
    baseline_ttft_median_s: float
    ttft_ratio: float
    requests_per_s: float
    baseline_requests_per_s: float
    rate_ratio: float
    equal_answers: int
    lost_answers: int
    baseline_lost_answers: int


@dataclass(slots=True)
class _Figures:
    ttft_s: list[float] = field(default_factory=list)
    per_s: list[float] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)

    def add(self, ttft_s: float, text: str) -> None:
        """One request by itself."""
        self.texts.append(text)
        if text:
            self.ttft_s.append(ttft_s)

    def add_batch(self, texts: list[str], took_s: float) -> None:
        """Requests that were sent at once."""
        self.texts += texts
        if all(texts):
            self.per_s.append(len(texts) / took_s)

    @property
    def lost(self) -> int:
        return self.texts.count("")


def measure(
    ours: Stack,
    baseline: Stack,
    load: Load,
    *,
    timeout_s: float = 120.0,
    on_progress: Callable[[], object] = lambda: None,
) -> Case:
    """Ask both in turns; both serve one model under one name. Raises EmbedwireError for an error, when the two stacks answer differently,
    and when one of them loses so much that nothing is left to measure."""
    stacks, figures = (ours, baseline), (_Figures(), _Figures())
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=None, keepalive_expiry=KEPT_IDLE_S)
    with (
        httpx.Client(timeout=timeout_s, limits=limits, trust_env=False) as client,
        ThreadPoolExecutor(load.concurrency) as pool,
    ):
        bodies = _bodies(_model(client, stacks), load)
        for number in range(WARM_UP + load.repeat):
            body = next(bodies)
            for which in _turns(number):
                answer = stacks[which].ask(client, body)
                if number >= WARM_UP:
                    figures[which].add(*answer)
            on_progress()
        for number in range(load.repeat):
            batch = [next(bodies) for _ in range(load.concurrency)]
            for which in _turns(number):
                began = time.monotonic()
                answers = list(pool.map(partial(stacks[which].ask, client), batch))
                took_s = time.monotonic() - began
                figures[which].add_batch([text for _, text in answers], took_s)
            on_progress()
    return _case(load, *figures, kinds=(ours.kind, baseline.kind))


def _turns(number: int) -> Iterator[int]:
    """Whose turn it is: each stack is first as often as the other, and finds the machine at rest."""
    for which in (0, 1) if number % 2 else (1, 0):
        time.sleep(REST_S)
        yield which


def steps(load: Load) -> int:
    """How often ``on_progress`` is called."""
    return WARM_UP + 2 * load.repeat


def _case(load: Load, ours: _Figures, theirs: _Figures, *, kinds: tuple[str, str]) -> Case:
    both = [pair for pair in zip(ours.texts, theirs.texts, strict=True) if all(pair)]
    if differ := sum(a != b for a, b in both):
        raise EmbedwireError(f"{differ} of {len(both)} answers differ between the two stacks")
    for kind, figures in zip(("ours", "the baseline"), (ours, theirs), strict=True):
        if not figures.ttft_s or not figures.per_s:
            raise EmbedwireError(f"{kind} lost {figures.lost} of {len(figures.texts)} answers")
    ttft_s, baseline_s = statistics.median(ours.ttft_s), statistics.median(theirs.ttft_s)
    per_s, baseline_per_s = statistics.median(ours.per_s), statistics.median(theirs.per_s)
    return Case(
        images=load.images,
        side=load.side,
        tokens=load.tokens,
        repeat=load.repeat,
        concurrency=load.concurrency,
        ours=kinds[0],
        baseline=kinds[1],
        ttft_median_s=ttft_s,
        baseline_ttft_median_s=baseline_s,
        ttft_ratio=baseline_s / ttft_s,
        requests_per_s=per_s,
        baseline_requests_per_s=baseline_per_s,
        rate_ratio=per_s / baseline_per_s,
        equal_answers=len(both),
        lost_answers=ours.lost,
        baseline_lost_answers=theirs.lost,
    )


def _stream(client: httpx.Client, url: str, body: Mapping[str, Any], *, began: float) -> tuple[float, str]:
    first_s, text = 0.0, ""
    with client.stream("POST", f"{url}/v1/chat/completions", json=body) as answer:
        if answer.status_code != 200:
            answer.read()
        _checked(answer)
        for data in read_events(answer.iter_bytes()):
            event = json.loads(data)
            if "error" in event:
                raise EmbedwireError(f"{url}: {event['error']}")
            said = "".join(choice["delta"].get("content") or "" for choice in event["choices"])
            first_s = first_s or (time.monotonic() - began if said else 0.0)
            text += said
    return first_s or time.monotonic() - began, text


def _checked(answer: httpx.Response) -> httpx.Response:
    if answer.status_code != 200:
        raise EmbedwireError(f"{answer.url}: {answer.status_code} {answer.text[:300]}")
    return answer


def _model(client: httpx.Client, stacks: Iterable[Stack]) -> str:
    answers = [_checked(client.get(f"{url}/v1/models")) for stack in stacks for url in stack.urls]
    names = {str(answer.json()["data"][0]["id"]) for answer in answers}
    if len(names) > 1:
        raise ConfigurationError(f"the servers serve several models: {', '.join(sorted(names))}")
    return names.pop()


def _bodies(model: str, load: Load) -> Iterator[dict[str, Any]]:
    noise = np.random.default_rng()
    while True:
        pictures = [_picture(noise, load.side) for _ in range(load.images)]
        yield {
            "model": model,
            "messages": [
                {"role": "user", "content": [*pictures, {"type": "text", "text": "What is in the picture?"}]}
            ],
            "max_tokens": load.tokens,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
        }


def _picture(noise: np.random.Generator, side: int) -> dict[str, Any]:
    try:
        from PIL import Image
    except ImportError:
        raise ConfigurationError("pictures are drawn with pillow, which is not installed here") from None
    file = io.BytesIO()
    Image.fromarray(noise.integers(0, 256, (side, side, 3), dtype=np.uint8)).save(file, "PNG")
    url = f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"
    return {"type": "image_url", "image_url": {"url": url}}
