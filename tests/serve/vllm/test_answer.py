"""A stream of events in any pieces: looked into, marked once, and otherwise left as it came."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence

import httpx
import msgspec
import pytest

from embedwire.serve.faults import Fault
from embedwire.serve.metrics import AppMetrics
from embedwire.serve.vllm.answer import HELD_BYTES_MAX, ItemsPassage, VllmAnswer

pytestmark = pytest.mark.anyio
ROLE = b'data: {"choices":[{"index":0,"delta":{"role":"assistant","content":""},"finish_reason":null}],"prompt_token_ids":[1]}\n\n'
FIRST = b'data: {"id":"c","choices":[{"index":0,"delta":{"content":"a"},"finish_reason":null}]}\n\n'
QUOTING = (
    rb'data: {"choices":[{"delta":{"content":"\"finish_reason\":\"stop\""},"finish_reason":null}]}' + b"\n\n"
)
LAST = b'data: {"odd":1e2,"choices":[{"index":0,"delta":{},"finish_reason":"stop"}]}\n\n'
USAGE = b'data: {"choices":[],"usage":{"prompt_tokens":7}}\n\n'
DONE = b"data: [DONE]\n\n"
ERROR = b'data: {"error": {"message": "no", "type": "InternalServerError", "param": null, "code": 500}}\n\n'


def answer_in(pieces: Sequence[bytes]) -> VllmAnswer:
    async def body() -> AsyncIterator[bytes]:
        for piece in pieces:
            yield piece

    return answer_of(body())


def answer_of(content: AsyncIterator[bytes]) -> VllmAnswer:
    response = httpx.Response(200, content=content)
    return VllmAnswer(
        response, ItemsPassage(items=1), who="it", explain=explained, began_s=0.0, metrics=AppMetrics()
    )


async def explained(said: Fault) -> Fault:
    return Fault(status=502, type="transfer_error", code="peer_lost", message=f"behind {said.message!r}")


@pytest.mark.parametrize("size", [1, 7, 10**6])
async def test_a_stream_in_pieces(size: int) -> None:
    stream = ROLE + FIRST + QUOTING + LAST + USAGE + DONE
    answer = answer_in([stream[i : i + size] for i in range(0, len(stream), size)])
    assert await answer.begin() is None
    found = b"".join([part async for part in answer.aiter_raw()])
    assert found.startswith(ROLE + FIRST + QUOTING)
    assert found.endswith(DONE)
    last, usage = found.removeprefix(ROLE + FIRST + QUOTING).removesuffix(DONE).strip().split(b"\n\n")
    for marked, original in ((last, LAST), (usage, USAGE)):
        fields = msgspec.json.decode(marked.removeprefix(b"data: "))
        assert fields.pop("embedwire")["items"] == 1
        assert fields == msgspec.json.decode(original.removeprefix(b"data: "))
    assert b'"odd":1e2' in last, "numbers stay as they were written"


@pytest.mark.parametrize("size", [1, 10**6])
@pytest.mark.parametrize("before", [b"", ROLE, ROLE + b": ping\n\n" + ROLE])
async def test_a_stream_that_fails_before_any_content(size: int, before: bytes) -> None:
    """vLLM sends the role chunk before anything can fail."""
    stream = before + ERROR + DONE
    fault = await answer_in([stream[i : i + size] for i in range(0, len(stream), size)]).begin()
    assert fault is not None
    assert (fault.status, fault.code, fault.message) == (500, "internal_server_error", "no")


CONTENT = [
    {"delta": {"content": "a"}},
    {"delta": {"reasoning": "a"}},
    {"delta": {"reasoning_content": "a"}},
    {"delta": {"tool_calls": [{"index": 0}]}},
    {"delta": {"content": ""}, "token_ids": [7]},
    {"delta": {"content": ""}, "logprobs": {"content": [{"token": ""}]}},
    {"delta": {}, "finish_reason": "length"},
]


@pytest.mark.parametrize("choice", CONTENT, ids=str)
async def test_what_counts_as_content(choice: dict[str, object]) -> None:
    """From then on the answer is passed on as it comes; the error behind it ends it, with its cause."""
    content = b"data: " + msgspec.json.encode({"choices": [{"index": 0, **choice}]}) + b"\n\n"
    answer = answer_in([ROLE + content, ERROR, DONE])
    assert await answer.begin() is None
    *events, last, done = [
        part for whole in [p async for p in answer.aiter_raw()] for part in whole.split(b"\n\n") if part
    ]
    assert events[0] + b"\n\n" == ROLE
    assert len(events) == 2
    assert msgspec.json.decode(last.removeprefix(b"data: "))["error"]["message"] == "behind 'no'"
    assert done + b"\n\n" == DONE


async def test_a_stream_of_many_chunks_without_content() -> None:
    """Chunks arrive one by one, and each is looked at once. Past the bound they are passed on, as they came."""
    few = answer_in([ROLE] * 5000 + [FIRST, DONE])
    assert await few.begin() is None
    assert b"".join([part async for part in few.aiter_raw()]) == ROLE * 5000 + FIRST + DONE
    count = HELD_BYTES_MAX // len(ROLE) + 1
    pulled = 0

    async def endless() -> AsyncIterator[bytes]:
        nonlocal pulled
        while True:
            pulled += 1
            yield ROLE

    many = answer_of(endless())
    assert await many.begin() is None
    assert pulled == count


@pytest.mark.parametrize("error", [None, False, 0, []])
async def test_an_error_that_is_none(error: object) -> None:
    event = (
        b"data: " + msgspec.json.encode({"error": error, "choices": [{"delta": {"content": "a"}}]}) + b"\n\n"
    )
    answer = answer_in([ROLE + event + DONE])
    assert await answer.begin() is None
    assert b"".join([part async for part in answer.aiter_raw()]) == ROLE + event + DONE


@pytest.mark.parametrize("stream", [b"data: {", ROLE, b": ping\n\n"])
async def test_a_stream_that_ends_without_content(stream: bytes) -> None:
    fault = await answer_in([stream]).begin()
    assert fault is not None
    assert (fault.status, fault.code) == (502, "bad_upstream_answer")


async def test_how_items_came_is_told_in_our_words() -> None:
    """vLLM's own field for it is not for users; one that is of another form, or null, is left out."""
    came = b'{"embedwire":{"items":{"a":{"tokens":9,"rounds":[8,1],"bytes":36,"transport":"shm","transfer_ms":0.5}}}}'
    for params, transfers in ((came, {"a": [8, 1]}), (b"null", {}), (b'{"a": 3}', {})):
        answer = answer_in([b'{"id":"c","ec_transfer_params":' + params + b"}"])
        fields = msgspec.json.decode(await answer.aread())
        assert fields.keys() == {"id", "embedwire"}
        assert {name: item["rounds"] for name, item in fields["embedwire"]["transfers"].items()} == transfers
