"""Servers that are killed, frozen and started again while requests are under way."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import pytest

if TYPE_CHECKING:
    from tests.e2e.conftest import Server, Stack

pytestmark = [pytest.mark.e2e, pytest.mark.model, pytest.mark.timeout(240)]
ANSWERED_S = 120

Chat = Callable[..., dict[str, Any]]
Picture = Callable[..., bytes]
Bodies = list[dict[str, Any]]


@pytest.fixture(scope="module")
def lost_stack(start_stack: Callable[..., Stack]) -> Stack:
    return start_stack(encoders=2, PEER_SILENCE_S=3, CHECK_INTERVAL_S=0.3, MISSES_TO_EVICT=2)


@pytest.fixture
def stack(lost_stack: Stack) -> Iterator[Stack]:
    """Two encoders and a language server. Whoever is not there after the test is started again, at the same ports."""
    yield lost_stack
    lost_stack.mend()
    lost_stack.wait_at_rest()


@pytest.fixture
def at_once(stack: Stack) -> Iterator[Callable[[Bodies], Future[list[httpx.Response]]]]:
    """Asks all at the same moment, and goes on meanwhile."""
    with ThreadPoolExecutor(1) as pool:
        yield lambda bodies: pool.submit(stack.ask_all, bodies)


@pytest.fixture(scope="module")
def questions(chat: Chat, picture: Picture) -> Bodies:
    """Four prompts with a picture that take some thirty rounds each."""
    return [chat(f"This is number {n}. " + "all work and no play " * 300, picture(seed=n)) for n in range(4)]


def answer_of(answer: httpx.Response) -> tuple[list[int], str]:
    """Token ids of an answer, streamed or not, and its encoder."""
    assert answer.status_code == 200, answer.text
    if answer.headers["content-type"] == "application/json":
        chunks = [answer.json()]
    else:
        lines = answer.text.removesuffix("data: [DONE]\n\n").strip().split("\n\n")
        chunks = [json.loads(line.removeprefix("data: ")) for line in lines]
    assert all("error" not in chunk for chunk in chunks), chunks[-1]
    ids = [i for chunk in chunks for choice in chunk["choices"] for i in choice["token_ids"]]
    return ids, chunks[-1]["embedwire"]["encoder"]


def listing(stack: Stack, server: Server) -> dict[str, Any] | None:
    """What the registry holds of a worker."""
    lines = stack.client.get(f"{stack.registry.url}/workers").json()["workers"]
    return next((line for line in lines if line["worker"]["url"] == server.url), None)


def is_candidate(stack: Stack, server: Server) -> bool:
    line = listing(stack, server)
    return line is not None and line["candidate"]


def writing(server: Server) -> float:
    return server.metrics().total("sender_rooms", state="writing")


def segments_of(server: Server) -> set[str]:
    """Shared memory that a process has mapped."""
    return set(re.findall(r"/dev/shm/embedwire-\w+", Path(f"/proc/{server.process.pid}/maps").read_text()))


@pytest.mark.failure_mode("encoder-killed", "restart-on-same-address")
def test_another_encoder_takes_over_from_a_killed_one(
    stack: Stack, questions: Bodies, at_once: Any, wait_until: Any
) -> None:
    """Clients get their answers although an encoder is killed under load; it is evicted and serves again at its old address."""
    killed, other = stack.encoders
    expected = [stack.ids(body) for body in questions]
    answers = at_once([questions[n % 4] | {"stream": n % 8 > 3} for n in range(24)])
    wait_until(lambda: writing(killed))
    killed.kill()
    for n, answer in enumerate(answers.result(ANSWERED_S)):
        assert answer_of(answer)[0] == expected[n % 4], f"request {n}"
    assert stack.router.metrics().total("retries_total") > 0
    wait_until(lambda: not is_candidate(stack, killed))
    assert answer_of(stack.ask(questions[0])) == (expected[0], other.url)
    before = listing(stack, killed)
    killed.restart()
    wait_until(lambda: is_candidate(stack, killed))
    after = listing(stack, killed)
    assert before is not None
    assert after is not None
    assert before["worker"]["incarnation"] != after["worker"]["incarnation"]
    stack.wait_whole()
    found = [answer_of(stack.ask(questions[0])) for _ in range(4)]
    assert found.count((expected[0], killed.url)) == found.count((expected[0], other.url)) == 2


@pytest.mark.failure_mode("encoder-killed", "restart-on-same-address")
@pytest.mark.invariant("deadlines")
def test_the_only_encoder_is_killed(stack: Stack, questions: Bodies, at_once: Any, wait_until: Any) -> None:
    """Requests under way and later ones end with the cause; after its restart the encoder serves at once."""
    killed, stopped = stack.encoders
    expected = stack.ids(questions[0])
    assert stopped.stop() == 0
    assert listing(stack, stopped) is None  # it said good-bye
    stack.wait_known(encoder=1)
    answers = at_once([questions[n % 4] for n in range(12)])
    wait_until(lambda: writing(killed))
    killed.kill()
    faults = [answer for answer in answers.result(ANSWERED_S) if answer.status_code != 200]
    assert faults
    for fault in [*faults, stack.ask(questions[0])]:
        error = fault.json()["error"]
        assert (fault.status_code, error["code"]) in {
            (502, "peer_lost"), (502, "upstream_unreachable"), (503, "overloaded"),
        }, error  # fmt: skip
        assert killed.url in error["message"] or "encoder" in error["message"] or "sender" in error["message"]
    stack.wait_known(encoder=0)
    answer = stack.ask(questions[0])
    assert answer.status_code == 503
    assert answer.json()["error"]["message"] == "no encoder server for 'tiny' is available"
    assert len(stack.ids(text_of(questions[0]))) == 8  # text needs no encoder
    killed.restart()
    stack.wait_known(encoder=1)
    assert answer_of(stack.ask(questions[0])) == (expected, killed.url)


def text_of(body: dict[str, Any]) -> dict[str, Any]:
    """The same request without its pictures."""
    return body | {"messages": [{"role": "user", "content": "What is this?"}]}


@pytest.mark.failure_mode("language-server-killed", "restart-on-same-address")
def test_a_killed_language_server(stack: Stack, questions: Bodies, at_once: Any, wait_until: Any) -> None:
    """Clients get the cause, encoders free the source memory, and the successor serves on the same port."""
    language, encoders = stack.language, stack.encoders
    expected = [stack.ids(body) for body in questions]
    segments = segments_of(language)
    endless = questions[0] | {"stream": True, "max_tokens": 100_000}
    with stack.client.stream("POST", stack.url, json=endless) as stream:
        lines = stream.iter_lines()
        assert next(lines).startswith("data: ")
        answers = at_once([questions[n % 4] for n in range(12)])
        wait_until(lambda: any(writing(encoder) for encoder in encoders))
        language.kill()
        *_, last, mark = [line for line in lines if line]
        assert mark == "data: [DONE]"
        error = json.loads(last.removeprefix("data: "))["error"]
        assert error["code"] == "upstream_unreachable"
        assert "the language server broke off" in error["message"]
    faults = [answer for answer in answers.result(ANSWERED_S) if answer.status_code != 200]
    assert faults
    for fault in [*faults, stack.ask(questions[0])]:
        error = fault.json()["error"]
        assert (fault.status_code, error["code"]) in {(502, "upstream_unreachable"), (503, "overloaded")}, (
            error
        )
        assert "language server" in error["message"]
    reserved = "sender_memory_reserved_bytes"
    wait_until(lambda: not sum(encoder.metrics().total(reserved) for encoder in encoders))
    language.restart()
    stack.wait_whole()
    assert [stack.ids(body) for body in questions] == expected
    assert len(segments) == 1
    assert not any(os.path.exists(path) for path in segments)


@pytest.mark.failure_mode("frozen-peer-holds-blocks")
@pytest.mark.invariant("no-early-reuse")
def test_a_frozen_encoder_that_holds_a_grant(
    stack: Stack, questions: Bodies, at_once: Any, wait_until: Any
) -> None:
    """Its blocks stay in quarantine while the rest of the pool serves other requests; after SIGCONT all blocks are free again."""
    frozen, other = stack.encoders
    expected = [stack.ids(body) for body in questions]
    language = stack.language
    answers = at_once([questions[n % 4] for n in range(16)])
    wait_until(lambda: writing(frozen))
    frozen.freeze()
    try:
        for n, answer in enumerate(answers.result(ANSWERED_S)):
            assert answer_of(answer)[0] == expected[n % 4], f"request {n}"
        assert 1 <= language.metrics().total("receiver_blocks_quarantined") <= 3
        wait_until(lambda: not is_candidate(stack, frozen))
        later = at_once([questions[n % 4] for n in range(8)])
        for n, answer in enumerate(later.result(ANSWERED_S)):
            assert answer_of(answer) == (expected[n % 4], other.url), f"request {n}"
        assert 1 <= language.metrics().total("receiver_blocks_quarantined") <= 3
    finally:
        frozen.thaw()
    stack.wait_whole()
    stack.wait_at_rest()
    found = {answer_of(stack.ask(questions[0]))[1] for _ in range(2)}
    assert found == {frozen.url, other.url}


@pytest.mark.failure_mode("frozen-peer-holds-blocks")
def test_a_frozen_encoder_that_was_asked(stack: Stack, questions: Bodies, at_once: Any) -> None:
    """A frozen encoder accepts connections and answers none; its requests go to another encoder."""
    frozen, other = stack.encoders
    expected = stack.ids(questions[0])
    frozen.freeze()
    try:
        answers = at_once([questions[0]] * 4)
        found = [answer_of(answer) for answer in answers.result(ANSWERED_S)]
    finally:
        frozen.thaw()
    assert found == [(expected, other.url)] * 4
    stack.wait_whole()
