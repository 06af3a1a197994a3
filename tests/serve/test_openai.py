"""The schema alone: what a request becomes."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from embedwire.errors import InvalidRequestError
from embedwire.serve.openai import (
    DONE_EVENT,
    NEUTRAL,
    AnswerWriter,
    Passage,
    event,
    parse_chat,
    plain_messages,
    read_events,
)

BASE: dict[str, Any] = {"model": "m", "messages": [{"role": "user", "content": "hi"}]}


def test_defaults_are_openai_s() -> None:
    sampling = parse_chat(BASE).sampling(99)
    assert (sampling.temperature, sampling.top_p, sampling.max_tokens, sampling.stop) == (1.0, 1.0, 99, ())


def test_all_of_sampling() -> None:
    asked = {
        "max_tokens": 1,
        "max_completion_tokens": 2,
        "temperature": 0,
        "top_p": 0.5,
        "seed": -3,
        "stop": ["a", "b"],
        "ignore_eos": True,
    }
    sampling = parse_chat(BASE | asked).sampling(99)
    assert (sampling.max_tokens, sampling.temperature, sampling.top_p, sampling.seed) == (2, 0.0, 0.5, -3)
    assert (sampling.stop, sampling.ignore_eos) == (("a", "b"), True)


def test_null_is_as_good_as_absent() -> None:
    names = [*NEUTRAL, "max_tokens", "temperature", "stop", "seed", "stream", "stream_options", "ignore_eos"]
    assert parse_chat(BASE | dict.fromkeys(names)) == parse_chat(BASE)


@pytest.mark.parametrize("name", NEUTRAL)
def test_what_changes_the_meaning_is_refused_by_name(name: str) -> None:
    with pytest.raises(InvalidRequestError, match=name) as caught:
        parse_chat(BASE | {name: {"anything": 1}})
    assert (caught.value.param, caught.value.code) == (name, "unsupported_parameter")
    for neutral in NEUTRAL[name]:
        parse_chat(BASE | {name: neutral})


def test_images_leave_their_places() -> None:
    content = [
        {"type": "image_url", "image_url": {"url": "http://a/1", "detail": "high"}},
        {"type": "text", "text": "and"},
        {"type": "image_url", "image_url": {"url": "http://a/2"}},
    ]
    asked = parse_chat({"model": "m", "messages": [*BASE["messages"], {"role": "user", "content": content}]})
    plain, urls = plain_messages(asked.messages)
    assert urls == {
        "messages[1].content[0].image_url": "http://a/1",
        "messages[1].content[2].image_url": "http://a/2",
    }
    assert plain == [
        {"role": "user", "content": "hi"},
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "and"}, {"type": "image"}]},
    ]


def test_token_ids_only_when_asked_for() -> None:
    def choice(with_token_ids: bool) -> dict[str, Any]:
        writer = AnswerWriter("m", with_token_ids)
        body = writer.completion("t", finish_reason="stop", token_ids=[1], usage={}, passage=Passage())
        (found,) = msgspec.json.decode(body)["choices"]
        return dict(found)

    assert choice(True)["token_ids"] == [1]
    assert "token_ids" not in choice(False)


@pytest.mark.parametrize("size", [1, 7, 10_000])
def test_events_are_read_as_they_were_written(size: int) -> None:
    """Whatever the text holds: only a line feed ends a line."""
    texts = ["one\u2028two\u2029three\x85four\x0bfive", "", "\n\r\n", "data: [DONE]"]
    stream = b": a comment\n\n" + b"".join(map(event, texts)) + DONE_EVENT
    parts = [stream[at : at + size] for at in range(0, len(stream), size)]
    assert [msgspec.json.decode(data) for data in read_events(parts)] == texts
    windows = stream.replace(b"\n\n", b"\r\n\r\n")
    assert [msgspec.json.decode(data) for data in read_events([windows])] == texts
