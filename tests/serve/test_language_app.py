"""The language server's API, through real sockets."""

from __future__ import annotations

import threading
from typing import Any

import httpx
import msgspec
import openai
import pytest

from embedwire.errors import InvalidRequestError, OverloadedError
from embedwire.language.interface import Delta

WAIT_S = 20.0


def events(response: httpx.Response) -> list[Any]:
    found = [part.removeprefix("data: ") for part in response.text.split("\n\n") if part]
    assert found[-1] == "[DONE]"
    return [msgspec.json.decode(part) for part in found[:-1]]


def post(url: str, body: Any, **how: Any) -> httpx.Response:
    content = body if isinstance(body, bytes) else msgspec.json.encode(body)
    return httpx.post(f"{url}/v1/chat/completions", content=content, timeout=WAIT_S, **how)


@pytest.mark.failure_mode("no-media")
def test_a_whole_answer(cluster: Any, chat: Any) -> None:
    """A text-only request."""
    double, server = cluster.add_language()
    asked = chat(
        "one two three", max_tokens=9, temperature=0, seed=5, stop="x", return_token_ids=True, top_k=4
    )
    answer = post(server.url, asked)
    assert answer.status_code == 200
    body = answer.json()
    (choice,) = body["choices"]
    assert choice["message"]["content"] == "one two three"
    assert choice["finish_reason"] == "stop"
    assert choice["token_ids"] == [100, 101, 102]
    assert body["usage"] == {"prompt_tokens": 7, "completion_tokens": 3, "total_tokens": 10}
    assert body["object"] == "chat.completion"
    assert body["embedwire"].pop("ttft_ms") > 0
    assert set(body["embedwire"].values()) == {None}
    (sampling,) = double.samplings
    assert (sampling.max_tokens, sampling.temperature, sampling.seed, sampling.stop) == (9, 0, 5, ("x",))


def test_a_streamed_answer(cluster: Any, chat: Any) -> None:
    _, server = cluster.add_language()
    answer = post(server.url, chat("one two", stream=True, stream_options={"include_usage": True}))
    assert answer.headers["content-type"].startswith("text/event-stream")
    *chunks, last, usage = events(answer)
    assert [c["choices"][0]["delta"] for c in chunks] == [
        {"role": "assistant", "content": "one"},
        {"content": " two"},
    ]
    assert (last["choices"][0]["finish_reason"], last["choices"][0]["delta"]) == ("stop", {})
    assert "embedwire" not in last
    assert usage["choices"] == []
    assert usage["usage"]["completion_tokens"] == 2
    assert usage["embedwire"]["ttft_ms"] > 0
    assert len({e["id"] for e in [*chunks, last, usage]}) == 1


def test_without_usage_the_last_chunk_carries_the_passage(cluster: Any, chat: Any) -> None:
    _, server = cluster.add_language()
    found = events(post(server.url, chat("one two", stream=True, max_tokens=2, return_token_ids=True)))
    assert found[-1]["choices"][0]["finish_reason"] == "length"
    assert "embedwire" in found[-1]
    assert "usage" not in found[-1]
    assert [i for e in found for i in e["choices"][0]["token_ids"]] == [100, 101]


def test_the_official_client(cluster: Any, chat: Any) -> None:
    _, server = cluster.add_language()
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
    assert client.chat.completions.create(**chat("a b")).choices[0].message.content == "a b"
    stream = client.chat.completions.create(**chat("a b"), stream=True)
    assert "".join(c.choices[0].delta.content or "" for c in stream) == "a b"
    assert [m.id for m in client.models.list()] == ["tiny"]
    with pytest.raises(openai.NotFoundError) as caught:
        client.chat.completions.create(**chat("a") | {"model": "other"})
    assert caught.value.code == "model_not_found"


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"n": 2}, "n"),
        ({"tools": [{"type": "function"}]}, "tools"),
        ({"logprobs": True}, "logprobs"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"temperature": 3}, "temperature"),
        ({"temperature": "hot"}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"stop": ["a", "b", "c", "d", "e"]}, "stop"),
        ({"stop": ""}, "stop"),
        ({"seed": 2**64}, "seed"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": "user", "content": [{"type": "video_url"}]}]}, "messages[0].content[0].type"),
        ({"messages": [{"role": "user"}]}, "messages[0]"),
        ({"model": None}, "model"),
    ],
)
def test_a_wrong_field_is_named(language_url: str, chat: Any, change: dict[str, Any], param: str) -> None:
    answer = post(language_url, chat("a") | change)
    error = answer.json()["error"]
    assert answer.status_code == 400
    assert (error["type"], error["param"]) == ("invalid_request_error", param)


def test_fields_that_ask_for_nothing_special_are_tolerated(cluster: Any, chat: Any) -> None:
    _, server = cluster.add_language()
    neutral = {
        "n": 1,
        "tools": [],
        "logprobs": False,
        "response_format": {"type": "text"},
        "stop": None,
        "user": "u",
    }
    assert post(server.url, chat("a") | neutral | {"top_k": 5, "presence_penalty": 1}).status_code == 200


@pytest.mark.failure_mode("malformed-message")
@pytest.mark.invariant("validation")
@pytest.mark.parametrize(
    "body", [b"", b"{", b"[]", b"nothing", b'{"a": "\xff"}', b'{"a": ' + b"[" * 100_000, b'{"a": "\\ud800"}']
)
def test_broken_json(language_url: str, body: bytes) -> None:
    """A malformed body fails its own request, and the server goes on."""
    answer = post(language_url, body)
    assert answer.status_code == 400
    assert answer.json()["error"]["code"] == "invalid_json"
    assert httpx.get(f"{language_url}/health").status_code == 200


def test_unknown_routes_answer_in_the_same_form(cluster: Any) -> None:
    _, server = cluster.add_language()
    assert httpx.get(f"{server.url}/v2").json()["error"]["code"] == "not_found"
    assert httpx.get(f"{server.url}/v1/chat/completions").status_code == 405


def test_media_are_refused(cluster: Any, chat: Any) -> None:
    _, server = cluster.add_language()
    error = post(server.url, chat("a", b"image")).json()["error"]
    assert (error["code"], error["param"]) == ("media_not_served", "messages[0].content[0].image_url")


@pytest.mark.failure_mode("burst-of-requests")
@pytest.mark.invariant("backpressure")
def test_a_full_queue_is_503(cluster: Any, chat: Any) -> None:
    """A request above the limit is refused at once."""
    _, server = cluster.add_language(fails=OverloadedError("256 wait", retry_after_s=2.2))
    answer = post(server.url, chat("a", stream=True))
    assert (answer.status_code, answer.headers["retry-after"]) == (503, "3")
    assert answer.json()["error"]["code"] == "overloaded"


def test_what_the_engine_refuses_reaches_the_client(cluster: Any, chat: Any) -> None:
    refused = InvalidRequestError("70000 tokens", code="context_length_exceeded", param="messages")
    _, server = cluster.add_language(fails=refused)
    answer = post(server.url, chat("a"))
    assert answer.status_code == 400
    assert answer.json()["error"] == {
        "message": "70000 tokens",
        "type": "invalid_request_error",
        "param": "messages",
        "code": "context_length_exceeded",
    }


@pytest.mark.failure_mode("exception-ends-thread")
def test_an_unexpected_error_is_a_bare_500(cluster: Any, chat: Any) -> None:
    """An exception ends one request, and the client gets no internal detail."""
    double, server = cluster.add_language()
    double.fails = RuntimeError("secret")
    answer = post(server.url, chat("a"))
    assert answer.status_code == 500
    assert "secret" not in answer.text
    double.fails = None
    assert post(server.url, chat("a")).status_code == 200


def test_a_failing_generation(cluster: Any, chat: Any) -> None:
    _, server = cluster.add_language(ends=Delta(finish_reason="error", error="no memory"))
    whole = post(server.url, chat("a b"))
    assert whole.status_code == 500
    assert "no memory" in whole.json()["error"]["message"]
    *_, last = events(post(server.url, chat("a b", stream=True)))
    assert last["error"]["code"] == "generation_failed"


@pytest.mark.failure_mode("abort-not-propagated")
@pytest.mark.parametrize("stream", [True, False])
def test_a_disconnect_cancels_the_job(cluster: Any, chat: Any, hang_up_after: Any, stream: bool) -> None:
    """The client disconnects in the middle of an answer."""
    double, server = cluster.add_language(steps=threading.Semaphore(1))
    with hang_up_after(
        f"{server.url}/v1/chat/completions", chat("one two three", stream=stream)
    ) as connection:
        job = double.jobs.get(timeout=WAIT_S)
        if stream:
            assert b"200 OK" in connection.recv(4096)
        assert not job.cancelled.is_set()
    assert job.cancelled.wait(WAIT_S)
    double.steps = None
    assert post(server.url, chat("next")).status_code == 200


def test_a_finished_job_is_not_cancelled(cluster: Any, chat: Any) -> None:
    double, server = cluster.add_language()
    post(server.url, chat("a"))
    post(server.url, chat("a", stream=True))
    assert [double.jobs.get(timeout=WAIT_S).cancelled.is_set() for _ in range(2)] == [False, False]


def test_metrics_and_info(cluster: Any, chat: Any, app_metrics: Any) -> None:
    _, server = cluster.add_language(metrics=app_metrics)
    post(server.url, chat("a"))
    text = httpx.get(f"{server.url}/metrics").text
    assert 'embedwire_requests_total{route="/v1/chat/completions",status="200"} 1.0' in text
    assert "embedwire_ttft_seconds_count 1.0" in text
    info = httpx.get(f"{server.url}/info").json()
    assert info["worker"]["role"] == "language"
    assert info["layout"]["fields"][0] == "input_embeddings bfloat16[8]"
