"""The public API in front of encoders and language servers, all of them on real sockets."""

from __future__ import annotations

import asyncio
import hashlib
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import httpx
import msgspec
import openai
import pytest
from fastapi import FastAPI, HTTPException
from starlette.requests import Request

from embedwire.errors import (
    ConfigurationError,
    InvalidRequestError,
    NeverFitsError,
    OverloadedError,
    TransferError,
)
from embedwire.serve.dispatch import DispatchLimits, Way
from embedwire.serve.front import relay_events
from embedwire.serve.registration import RegistrationTimes
from embedwire.serve.router_app import RouterSettings
from embedwire.serve.watch import WatchTimes
from embedwire.serve.worker_app import RegistryLink

WAIT_S = 20.0


def post(url: str, body: Any, **how: Any) -> httpx.Response:
    content = body if isinstance(body, bytes) else msgspec.json.encode(body)
    return httpx.post(f"{url}/v1/chat/completions", content=content, timeout=WAIT_S, **how)


def text_of(answer: httpx.Response) -> str:
    assert answer.status_code == 200, answer.text
    text: str = answer.json()["choices"][0]["message"]["content"]
    return text


@pytest.mark.failure_mode("no-media")
def test_text_goes_to_a_language_server_alone(cluster: Any, chat: Any) -> None:
    """A text-only request does not reach an encoder."""
    encoder, a = cluster.add_encoder()
    _, b = cluster.add_language()
    router = cluster.add_router(a, b)
    answer = post(router.url, chat("hello there"))
    assert text_of(answer) == "hello there"
    assert answer.json()["embedwire"]["room"] is None
    assert encoder.entered.empty()


def test_an_image_goes_through_a_room(cluster: Any, chat: Any) -> None:
    encoder, a = cluster.add_encoder()
    language, b = cluster.add_language()
    router = cluster.add_router(a, b)
    answer = post(router.url, chat("what?", b"one", b"two", max_tokens=5, temperature=0))
    assert text_of(answer).startswith("saw 2 ")
    passage = answer.json()["embedwire"]
    assert passage.pop("ttft_ms") > 0
    assert passage.pop("room") in range(1, 2**63)
    assert passage == {
        "encoder": a.url,
        "transport": "shm",
        "total_tokens": 2000,
        "rounds": [1024, 976],
        "bytes": 64000,
        "wire_bytes": 64000,
        "ranks": 1,
        "delivery": None,
        "encode_ms": 12.5,
        "transfer_ms": 3.25,
    }
    assert answer.json()["usage"]["prompt_tokens"] == 2000
    assert encoder.prompts[0].media == [b"one", b"two"]
    assert language.samplings[0].max_tokens == 5
    assert encoder.aborted.empty()


@pytest.mark.failure_mode("rank-counts-differ")
def test_the_encoder_hears_how_many_ranks_read(cluster: Any, chat: Any) -> None:
    """One router serves a server of one rank and one whose four ranks each receive a copy."""
    encoder, a = cluster.add_encoder()
    languages = {
        server.url: readers for readers in (1, 4) for _, server in [cluster.add_language(readers=readers)]
    }
    for url, readers in languages.items():
        assert httpx.get(f"{url}/health").json()["worker"]["readers"] == readers
    router = cluster.add_router(a, *(SimpleNamespace(url=url) for url in languages))
    answers = [post(router.url, chat("what?", b"one")) for _ in range(4)]
    rooms = [answer.json()["embedwire"]["room"] for answer in answers]
    assert sorted(encoder.readers[room] for room in rooms) == [1, 1, 4, 4]


def test_the_official_client_streams(cluster: Any, chat: Any) -> None:
    workers = [cluster.add_encoder()[1], cluster.add_language()[1]]
    router = cluster.add_router(*workers)
    client = openai.OpenAI(base_url=f"{router.url}/v1", api_key="none", max_retries=0)
    stream = list(client.chat.completions.create(**chat("what?", b"one"), stream=True))
    assert "".join(c.choices[0].delta.content or "" for c in stream).startswith("saw 1 ")
    assert stream[-1].choices[0].finish_reason == "stop"
    assert stream[-1].to_dict()["embedwire"]["rounds"] == [1024, 976]
    assert client.chat.completions.create(**chat("a b")).choices[0].message.content == "a b"
    assert [m.id for m in client.models.list()] == ["tiny"]
    with pytest.raises(openai.NotFoundError, match="there is tiny"):
        client.chat.completions.create(**chat("a") | {"model": "other"})
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(**chat("a"), n=2)
    assert caught.value.param == "n"


@pytest.mark.failure_mode("burst-of-requests", "bytes-of-another-room")
@pytest.mark.anyio
async def test_two_hundred_images_at_once(cluster: Any, chat: Any) -> None:
    """All requests are answered, each with what belongs to its own image."""
    encoders = [cluster.add_encoder() for _ in range(2)]
    languages = [cluster.add_language() for _ in range(2)]
    router = cluster.add_router(*(server for _, server in [*encoders, *languages]))
    images = [str(i).encode() for i in range(200)]
    async with httpx.AsyncClient(timeout=60, limits=httpx.Limits(max_connections=None)) as client:

        async def ask(image: bytes) -> httpx.Response:
            content = msgspec.json.encode(chat("what?", image))
            return await client.post(f"{router.url}/v1/chat/completions", content=content)

        answers = await asyncio.gather(*map(ask, images))
    seen = {p.media[0]: p for e, _ in encoders for p in e.prompts}
    assert set(seen) == set(images)
    expected = {image: _expected(image) for image in images}
    assert {i: text_of(a) for i, a in zip(images, answers, strict=True)} == expected
    assert len({a.json()["embedwire"]["room"] for a in answers}) == 200
    assert min(len(e.prompts) for e, _ in encoders) > 50


def _expected(image: bytes) -> str:
    return f"saw 1 {hashlib.sha256(image).hexdigest()[:12]}"


@pytest.mark.failure_mode("encoder-killed")
@pytest.mark.parametrize(
    "failure",
    [
        {"fails": OverloadedError("full")},
        {"breaks": TransferError("peer_lost", "no answer for 5 s")},
        {"breaks": TransferError("encoder_failed")},
    ],
)
@pytest.mark.parametrize("stream", [True, False])
def test_another_encoder_takes_over(cluster: Any, chat: Any, failure: Any, stream: bool) -> None:
    """Before the first token, a failed encoder costs the client nothing."""
    bad, a = cluster.add_encoder(**failure)
    good, b = cluster.add_encoder()
    _, c = cluster.add_language()
    router = cluster.add_router(a, b, c)
    for _ in range(2):
        answer = post(router.url, chat("what?", b"x", stream=stream))
        assert answer.status_code == 200
        assert b.url in answer.text
    assert len(good.prompts) == 2
    room, attempt = bad.aborted.get(timeout=WAIT_S)
    assert attempt == 0
    assert f'"room":{room}' in answer.text or bad.entered.qsize() == 2
    assert 'embedwire_retries_total{code="' in httpx.get(f"{router.url}/metrics").text


def test_an_encoder_that_is_gone(cluster: Any, chat: Any) -> None:
    _, a = cluster.add_encoder()
    good, b = cluster.add_encoder()
    _, c = cluster.add_language()
    router = cluster.add_router(a, b, c, watch=WatchTimes(interval_s=3600), misses_to_evict=1)
    a.stop()
    assert a.wait_stopped(WAIT_S)
    assert [post(router.url, chat("what?", b"x")).status_code for _ in range(3)] == [200] * 3
    assert len(good.prompts) == 3
    assert httpx.get(f"{router.url}/health").json()["workers"] == {"encoder": 1, "language": 1}


def frozen_app(worker: dict[str, Any]) -> FastAPI:
    """An encoder that stands still from its first request on: connections come to it, answers do not come from it."""
    app = FastAPI()
    asked = threading.Event()

    @app.get("/health")
    async def health() -> dict[str, Any]:
        if asked.is_set():
            raise HTTPException(500)
        return {"status": "ok", "worker": worker}

    @app.post("/encode")
    async def encode(request: Request) -> None:
        asked.set()
        while (await request.receive())["type"] != "http.disconnect":
            pass

    return app


@pytest.mark.failure_mode("frozen-peer-holds-blocks")
def test_an_encoder_that_stands_still(cluster: Any, chat: Any) -> None:
    """Once a stopped encoder counts as lost, its requests go to another one."""
    good, a = cluster.add_encoder()
    _, b = cluster.add_language()
    frozen = cluster.run(frozen_app(httpx.get(f"{a.url}/health").json()["worker"]))
    watch = WatchTimes(interval_s=0.05)
    router = cluster.add_router(frozen, a, b, watch=watch, misses_to_evict=1)
    assert [post(router.url, chat("what?", b"x")).status_code for _ in range(2)] == [200] * 2
    assert len(good.prompts) == 2
    retries = httpx.get(f"{router.url}/metrics").text
    assert 'embedwire_retries_total{code="upstream_unreachable"} 1.0' in retries


def test_when_nobody_is_left_the_last_cause_is_told(cluster: Any, chat: Any) -> None:
    one, a = cluster.add_encoder(breaks=TransferError("peer_lost", "no answer for 5 s"))
    _, b = cluster.add_language()
    router = cluster.add_router(a, b)
    answer = post(router.url, chat("what?", b"x"))
    assert answer.status_code == 502
    error = answer.json()["error"]
    assert (error["type"], error["code"]) == ("transfer_error", "peer_lost")
    assert "no answer for 5 s" in error["message"]
    one.breaks = TransferError("deadline")
    assert post(router.url, chat("what?", b"x")).status_code == 504


def test_that_another_one_can_not_be_reached_hides_no_cause(cluster: Any, chat: Any) -> None:
    """It was asked last, so the one that loses transfers is asked first."""
    _, a = cluster.add_encoder(breaks=TransferError("peer_lost", "no answer for 5 s"))
    gone, (_, c) = cluster.add_encoder()[1], cluster.add_language()
    router = cluster.add_router(a, gone, c, watch=WatchTimes(interval_s=3600), misses_to_evict=9)
    assert post(router.url, chat("what?", b"x")).status_code == 200
    gone.stop()
    assert gone.wait_stopped(WAIT_S)
    codes = [post(router.url, chat("what?", b"x")).json()["error"]["code"] for _ in range(4)]
    assert codes == ["peer_lost"] * 4
    retries = httpx.get(f"{router.url}/metrics").text
    assert 'embedwire_retries_total{code="upstream_unreachable"} 4.0' in retries


def test_attempts_are_bounded(cluster: Any, chat: Any) -> None:
    encoders = [cluster.add_encoder(fails=OverloadedError("full", retry_after_s=7)) for _ in range(3)]
    _, language = cluster.add_language()
    router = cluster.add_router(*(s for _, s in encoders), language, limits=DispatchLimits(attempts_max=2))
    answer = post(router.url, chat("what?", b"x"))
    assert (answer.status_code, answer.headers["retry-after"]) == (503, "7")
    assert sum(e.entered.qsize() for e, _ in encoders) == 2


def test_another_language_server_takes_over(cluster: Any, chat: Any) -> None:
    """The encoder is asked again, for the next attempt of the same room, once it has let go of the first."""
    encoder, a = cluster.add_encoder()
    _, b = cluster.add_language(fails=OverloadedError("full"))
    _, c = cluster.add_language()
    router = cluster.add_router(a, b, c)
    assert post(router.url, chat("text")).status_code == 200
    for _ in range(2):
        assert text_of(post(router.url, chat("what?", b"x"))).startswith("saw 1")
    room, attempt = encoder.aborted.get(timeout=WAIT_S)
    rooms = [encoder.entered.get(timeout=WAIT_S) for _ in range(3)]
    assert (rooms.count(room), attempt) == (2, 0)


@pytest.mark.failure_mode("request-never-fits")
@pytest.mark.parametrize(
    ("error", "status", "code"),
    [
        (InvalidRequestError("broken", code="invalid_image", param="messages"), 400, "invalid_image"),
        (NeverFitsError("8 GiB"), 413, "never_fits"),
    ],
)
def test_what_no_other_encoder_would_change_is_not_tried_again(
    cluster: Any, chat: Any, error: Exception, status: int, code: str
) -> None:
    """A refusal that every encoder would repeat is returned without another attempt."""
    encoders = [cluster.add_encoder(fails=error) for _ in range(2)]
    _, language = cluster.add_language()
    router = cluster.add_router(*(s for _, s in encoders), language)
    answer = post(router.url, chat("what?", b"x"))
    assert (answer.status_code, answer.json()["error"]["code"]) == (status, code)
    assert sum(e.entered.qsize() for e, _ in encoders) == 1


@pytest.mark.failure_mode("abort-not-propagated")
@pytest.mark.parametrize("stream", [True, False])
def test_a_disconnect_ends_the_job_and_the_room(
    cluster: Any, chat: Any, hang_up_after: Any, stream: bool
) -> None:
    """The job on the language server and the room on the encoder both end."""
    encoder, a = cluster.add_encoder()
    language, b = cluster.add_language(steps=threading.Semaphore(1))
    router = cluster.add_router(a, b)
    with hang_up_after(f"{router.url}/v1/chat/completions", chat("what?", b"x", stream=stream)) as connection:
        job = language.jobs.get(timeout=WAIT_S)
        if stream:
            assert b"200 OK" in connection.recv(4096)
        assert not job.cancelled.is_set()
    assert job.cancelled.wait(WAIT_S)
    assert encoder.aborted.get(timeout=WAIT_S) == (encoder.entered.get(), 0)
    assert httpx.get(f"{router.url}/health").json()["under_way"] == 0


@pytest.mark.failure_mode("abort-not-propagated")
def test_a_disconnect_while_the_encoder_prepares(cluster: Any, chat: Any, hang_up_after: Any) -> None:
    """The room must not be created after its request has ended."""
    gate = threading.Event()
    encoder, a = cluster.add_encoder(gate=gate)
    router = cluster.add_router(a, cluster.add_language()[1])
    with hang_up_after(f"{router.url}/v1/chat/completions", chat("what?", b"x")):
        room = encoder.entered.get(timeout=WAIT_S)
    assert encoder.aborted.get(timeout=WAIT_S) == (room, 0), "the router's DELETE, which came too early"
    gate.set()
    assert encoder.aborted.get(timeout=WAIT_S) == (room, 0), "the encoder's own, once it had the room"
    assert not encoder.rooms


def test_requests_that_are_being_encoded_count_at_their_language_server(
    cluster: Any, chat: Any, hang_up_after: Any
) -> None:
    """Else all that come while the encoders are busy would go to the one that looks idle."""
    gate = threading.Event()
    encoder, a = cluster.add_encoder(gate=gate)
    languages, workers = zip(
        *(cluster.add_language(steps=threading.Semaphore(0)) for _ in range(2)), strict=True
    )
    router = cluster.add_router(a, *workers)
    with hang_up_after(f"{router.url}/v1/chat/completions", chat("held", max_tokens=16)):
        held, idle = who_works(languages)
        for language in languages:
            language.steps.release(1000)
        with ThreadPoolExecutor(6) as pool:
            answers = [pool.submit(post, router.url, chat("what?", b"x")) for _ in range(6)]
            for _ in answers:
                encoder.entered.get(timeout=WAIT_S)
            gate.set()
            assert all(text_of(answer.result()) for answer in answers)
    assert {len(held.samplings) - 1, len(idle.samplings)} <= {2, 3, 4}


def test_an_encoder_is_free_when_its_room_is_over(cluster: Any, chat: Any) -> None:
    """However long the answer goes on."""
    encoders, workers = zip(*(cluster.add_encoder() for _ in range(2)), strict=True)
    languages, more = zip(
        *(cluster.add_language(steps=threading.Semaphore(1)) for _ in range(2)), strict=True
    )
    router = cluster.add_router(*workers, *more)
    url, body = f"{router.url}/v1/chat/completions", chat("what?", b"x", stream=True)
    with httpx.stream("POST", url, json=body, timeout=WAIT_S) as answer:
        assert answer.status_code == 200
        _, idle = who_works(languages)
        idle.steps.release(1000)
        for _ in range(4):
            text_of(post(router.url, chat("what?", b"x")))
    assert sorted(len(encoder.prompts) for encoder in encoders) == [2, 3]


def who_works(languages: Sequence[Any]) -> list[Any]:
    """The one of two that has a job, and the other: which the first is, is not ours to say."""
    deadline = time.monotonic() + WAIT_S
    while not any(language.samplings for language in languages):
        assert time.monotonic() < deadline
        time.sleep(0.005)
    return sorted(languages, key=lambda language: not language.samplings)


@pytest.mark.failure_mode("burst-of-requests")
@pytest.mark.invariant("backpressure")
def test_one_more_than_the_limit_is_refused_at_once(cluster: Any, chat: Any, hang_up_after: Any) -> None:
    """One request above the limit gets 503 without waiting."""
    language, a = cluster.add_language(steps=threading.Semaphore(0))
    router = cluster.add_router(a, requests_max=1)
    with hang_up_after(f"{router.url}/v1/chat/completions", chat("held")):
        job = language.jobs.get(timeout=WAIT_S)
        answer = post(router.url, chat("refused"))
        assert (answer.status_code, answer.headers["retry-after"]) == (503, "1")
        assert answer.json()["error"]["code"] == "overloaded"
    assert job.cancelled.wait(WAIT_S)


@pytest.mark.invariant("deadlines")
@pytest.mark.parametrize("stream", [True, False])
def test_the_deadline_of_a_request(cluster: Any, chat: Any, stream: bool) -> None:
    """The client gets the deadline as the cause, streamed or not."""
    language, a = cluster.add_language(steps=threading.Semaphore(1 if stream else 0))
    router = cluster.add_router(a, limits=DispatchLimits(deadline_s=2.0 if stream else 0.3))
    answer = post(router.url, chat("one two", stream=stream))
    assert answer.status_code == (200 if stream else 504)
    assert '"code":"deadline"' in answer.text
    assert language.jobs.get(timeout=WAIT_S).cancelled.wait(WAIT_S)


@pytest.mark.failure_mode("language-server-killed")
def test_a_language_server_that_breaks_off() -> None:
    """Killed in the middle of an answer: complete events are passed on, then the cause."""

    async def body() -> Any:
        yield b'data: {"a": 1}\n\ndata: {"b'
        raise httpx.ReadError("reset")

    async def relayed() -> list[bytes]:
        way = Way({}, None, 0, 0.0, 1)  # type: ignore[arg-type]
        until = asyncio.get_running_loop().time() + WAIT_S
        response = httpx.Response(200, content=body())
        found = [e async for e in relay_events(response, way, until=until, deadline_s=1)]
        assert not way.finished
        return found

    first, error, done = asyncio.run(relayed())
    assert first == b'data: {"a": 1}\n\n'
    assert b"upstream_unreachable" in error
    assert done == b"data: [DONE]\n\n"


@pytest.mark.failure_mode("malformed-message")
@pytest.mark.invariant("validation")
def test_bad_bodies(cluster: Any) -> None:
    """A malformed or oversized body fails its own request."""
    router = cluster.add_router(cluster.add_language()[1], body_bytes_max=1000)
    for body, status, code in (
        (b"{", 400, "invalid_json"),
        (b"[]", 400, "invalid_json"),
        (b"{}", 400, "invalid_request"),
        (b" " * 2000, 413, "request_too_large"),
    ):
        answer = post(router.url, body)
        assert (answer.status_code, answer.json()["error"]["code"]) == (status, code)


def test_users_can_not_name_rooms(cluster: Any, chat: Any) -> None:
    """It would make a language server connect wherever a user likes."""
    router = cluster.add_router(cluster.add_language()[1])
    room = {"room": 1, "attempt": 0, "control_addresses": ["tcp://10.0.0.1:1"], "encoder": "http://e"}
    answer = post(router.url, chat("a") | {"embedwire_room": room})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "embedwire_room")


def test_no_encoder_of_the_same_layout(cluster: Any, chat: Any) -> None:
    router = cluster.add_router(cluster.add_language()[1])
    answer = post(router.url, chat("what?", b"x"))
    assert answer.status_code == 503
    assert "no encoder server" in answer.json()["error"]["message"]


def test_workers_from_a_registry(cluster: Any, chat: Any) -> None:
    fast = WatchTimes(interval_s=0.02)
    registry = cluster.add_registry(times=fast)
    router = cluster.add_router(registry_url=registry.url, watch=fast)
    answer = post(router.url, chat("a"))
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "overloaded")
    times = RegistrationTimes(interval_s=0.1, retry_min_s=0.02)
    cluster.add_encoder(registry=RegistryLink(url=registry.url, times=times))
    cluster.add_language(registry=RegistryLink(url=registry.url, times=times))
    for _ in range(1000):
        if httpx.get(f"{router.url}/health").json()["workers"] == {"encoder": 1, "language": 1}:
            break
    assert text_of(post(router.url, chat("what?", b"x"))).startswith("saw 1")


def test_settings_are_checked() -> None:
    with pytest.raises(ConfigurationError, match="either"):
        RouterSettings()
    with pytest.raises(ConfigurationError, match="either"):
        RouterSettings(registry_url="http://r", worker_urls=["http://w"])
    with pytest.raises(ConfigurationError, match="requests_max"):
        RouterSettings(registry_url="http://r", requests_max=0)
    with pytest.raises(ConfigurationError, match="attempts_max is 0"):
        DispatchLimits(attempts_max=0)
