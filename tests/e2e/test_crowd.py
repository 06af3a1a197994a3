"""Many requests at the same moment, through a pool of four blocks of 16 tokens: each gets its own answer."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from tests.e2e.conftest import Stack

pytestmark = [pytest.mark.e2e, pytest.mark.model, pytest.mark.timeout(240)]
POOL_TOKENS = 64

Bodies = list[dict[str, Any]]


@pytest.fixture(scope="session")
def questions(chat: Callable[..., dict[str, Any]], picture: Callable[..., bytes]) -> Bodies:
    """Sixteen requests with one to three pictures of their own. None fits into the pool at once, and many are of equal length, so that
    only their content tells them apart."""
    counts = (1, 1, 2, 3)
    return [
        chat(f"This is number {n:02}.", *(picture(280, 224, seed=10 * n + i) for i in range(counts[n % 4])))
        for n in range(16)
    ]


def one_at_a_time(stack: Stack, questions: Bodies) -> list[list[int]]:
    """The ids of each; no two are the same, so that nobody's answer can pass for another's."""
    expected = [stack.ids(body) for body in questions]
    assert len({tuple(ids) for ids in expected}) == len(questions)
    return expected


@pytest.mark.failure_mode("pool-held-by-partial-rooms", "longer-than-memory", "burst-of-requests")
@pytest.mark.invariant("no-hold-and-wait")
def test_64_requests_at_once_are_answered_as_one_at_a_time(stack: Stack, questions: Bodies) -> None:
    """64 requests share a pool smaller than each embedding; every answer is that of a request alone."""
    expected = one_at_a_time(stack, questions)
    answers = stack.ask_all([questions[n % 16] for n in range(64)])
    assert [answer.status_code for answer in answers] == [200] * 64
    for n, answer in enumerate(answers):
        assert stack.ids_of(answer) == expected[n % 16], f"request {n}"
        passage = answer.json()["embedwire"]
        assert passage["transport"] == "shm"
        assert sum(passage["rounds"]) == passage["total_tokens"]
        assert len(passage["rounds"]) >= 2
        assert max(passage["rounds"]) <= POOL_TOKENS
    assert len({answer.json()["embedwire"]["room"] for answer in answers}) == 64


@pytest.mark.failure_mode("burst-of-requests")
@pytest.mark.invariant("backpressure")
def test_200_requests_at_once_are_answered_or_refused(stack: Stack, questions: Bodies) -> None:
    """Each of 200 requests is answered correctly, or refused with 503 and Retry-After."""
    expected = one_at_a_time(stack, questions)
    answers = stack.ask_all([questions[n % 16] for n in range(200)])
    assert len(answers) == 200
    answered = [(n, answer) for n, answer in enumerate(answers) if answer.status_code == 200]
    for n, answer in answered:
        assert stack.ids_of(answer) == expected[n % 16], f"request {n}"
    for answer in answers:
        if answer.status_code != 200:
            assert answer.status_code == 503, answer.text
            assert int(answer.headers["retry-after"]) >= 1
            assert answer.json()["error"]["code"] == "overloaded"
    assert len(answered) >= 64  # as many as the engine lets wait; and more are refused than none:
    assert len(answered) < 200  # the router was told to take 160 at a time


@pytest.fixture(scope="module")
def tcp_stack(start_stack: Callable[..., Stack]) -> Stack:
    return start_stack(TRANSPORT="tcp")


@pytest.mark.failure_mode("pool-held-by-partial-rooms", "longer-than-memory", "burst-of-requests")
def test_the_same_over_tcp(tcp_stack: Stack, questions: Bodies) -> None:
    """The same burst over tcp."""
    expected = one_at_a_time(tcp_stack, questions)
    answers = tcp_stack.ask_all([questions[n % 16] for n in range(32)])
    assert [answer.status_code for answer in answers] == [200] * 32
    for n, answer in enumerate(answers):
        assert tcp_stack.ids_of(answer) == expected[n % 16], f"request {n}"
        assert answer.json()["embedwire"]["transport"] == "tcp"
    tcp_stack.wait_at_rest()


def test_private_media_are_refused_unless_they_are_allowed(
    tcp_stack: Stack, chat: Callable[..., dict[str, Any]]
) -> None:
    """A user can not make the encoder fetch from where only it can reach: here its own registry."""
    answer = tcp_stack.ask(chat("What is this?", f"{tcp_stack.registry.url}/workers"))
    assert answer.status_code == 400
    assert answer.json()["error"]["code"] == "invalid_media_url"
    assert answer.json()["error"]["param"] == "messages[0].content[0].image_url"
    tcp_stack.wait_at_rest()
