"""``bench vllm`` against servers that behave like vLLM's."""

from __future__ import annotations

from typing import Any

import pytest

from embedwire.bench import vllm as bench
from embedwire.bench.vllm import Load, Stack, measure, steps
from embedwire.errors import ConfigurationError, EmbedwireError

LOAD = Load(images=2, side=28, tokens=3, repeat=2, concurrency=3)
EACH = 2 * bench.WARM_UP + 2 * LOAD.repeat * (1 + LOAD.concurrency)
"""Requests to both stacks together."""


@pytest.fixture(autouse=True)
def no_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "REST_S", 0.0)


def pair(servers: Any, number: int) -> Stack:
    return Stack(encoder=servers.encoder_servers[number].url, language=servers.language_servers[number].url)


def test_a_router_beside_a_pair(servers: Any) -> None:
    """The same requests to both, one a picture and then the whole; what the encoder offers comes to the language server."""
    encoder, language = servers.encoder(), servers.language()
    seen = []
    case = measure(Stack(router=servers.router()), pair(servers, 0), LOAD, on_progress=lambda: seen.append(1))
    assert (case.ours, case.baseline) == ("router", "connector")
    assert case.equal_answers == EACH // 2 - bench.WARM_UP
    assert case.ttft_ratio == case.baseline_ttft_median_s / case.ttft_median_s
    assert case.rate_ratio == case.requests_per_s / case.baseline_requests_per_s
    assert len(seen) == steps(LOAD)
    assert len(language.bodies) == EACH
    offers = [body["ec_transfer_params"]["embedwire"]["items"] for body in language.bodies]
    assert all(len(items) == LOAD.images for items in offers)
    assert {entry["addresses"][0] for items in offers for entry in items.values()} == {encoder.address}
    assert len(encoder.bodies) >= LOAD.images * EACH // 2


def test_stacks_that_answer_differently_are_no_baseline(servers: Any, monkeypatch: Any) -> None:
    for _ in range(2):
        servers.encoder()
        servers.language()
    monkeypatch.setattr(
        type(servers.languages[1]), "text", lambda self, body: f"{self is servers.languages[1]}"
    )
    with pytest.raises(EmbedwireError, match=r"8 of 8 answers differ"):
        measure(pair(servers, 0), pair(servers, 1), LOAD)


@pytest.mark.parametrize("number", [0, 1], ids=["ours", "the baseline"])
def test_a_lost_answer_is_counted_and_not_measured(servers: Any, monkeypatch: Any, number: int) -> None:
    """One of those that are asked alone, and one of the last batch."""
    for _ in range(2):
        servers.encoder()
        servers.language()
    answers = 0

    def text(self: Any, body: Any) -> str:
        nonlocal answers
        answers += self is servers.languages[number]
        is_lost = self is servers.languages[number] and answers in (bench.WARM_UP + 1, EACH // 2)
        return "" if is_lost else "an answer"

    monkeypatch.setattr(type(servers.languages[number]), "text", text)
    case = measure(pair(servers, 0), pair(servers, 1), LOAD)
    assert (case.lost_answers, case.baseline_lost_answers) == ((2, 0), (0, 2))[number]
    assert case.equal_answers == EACH // 2 - bench.WARM_UP - 2


def test_a_stack_that_loses_all_is_not_measured(servers: Any, monkeypatch: Any) -> None:
    servers.encoder()
    servers.language()
    monkeypatch.setattr(type(servers.languages[0]), "text", lambda self, body: "")
    with pytest.raises(EmbedwireError, match=r"ours lost 8 of 8 answers"):
        measure(pair(servers, 0), pair(servers, 0), LOAD)


def test_an_error_ends_it(servers: Any) -> None:
    servers.encoder(fails=(500, "no memory"))
    servers.language()
    with pytest.raises(EmbedwireError, match=r"500 .*no memory"):
        measure(pair(servers, 0), pair(servers, 0), LOAD)


@pytest.mark.parametrize(
    "urls", [{}, {"encoder": "a"}, {"language": "b"}, {"router": "c", "encoder": "a", "language": "b"}]
)
def test_a_stack_is_a_router_or_a_pair(urls: dict[str, str]) -> None:
    with pytest.raises(ConfigurationError):
        Stack(**urls)
