"""A stream of events in any pieces: looked into, marked once, and otherwise left as it came."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence

import httpx
import msgspec
import pytest

from embedwire.serve.metrics import AppMetrics
from embedwire.serve.vllm_answer import ItemsPassage, VllmAnswer

pytestmark = pytest.mark.anyio
FIRST = b'data: {"id":"c","choices":[{"index":0,"delta":{"content":""},"finish_reason":null}]}\n\n'
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

    response = httpx.Response(200, content=body())
    return VllmAnswer(response, ItemsPassage(items=1), began_s=0.0, metrics=AppMetrics())


@pytest.mark.parametrize("size", [1, 7, 10**6])
async def test_a_stream_in_pieces(size: int) -> None:
    stream = FIRST + QUOTING + LAST + USAGE + DONE
    answer = answer_in([stream[i : i + size] for i in range(0, len(stream), size)])
    assert await answer.begin(who="it") is None
    found = b"".join([part async for part in answer.aiter_raw()])
    assert found.startswith(FIRST + QUOTING)
    assert found.endswith(DONE)
    last, usage = found.removeprefix(FIRST + QUOTING).removesuffix(DONE).strip().split(b"\n\n")
    for marked, original in ((last, LAST), (usage, USAGE)):
        fields = msgspec.json.decode(marked.removeprefix(b"data: "))
        assert fields.pop("embedwire")["items"] == 1
        assert fields == msgspec.json.decode(original.removeprefix(b"data: "))
    assert b'"odd":1e2' in last, "numbers stay as they were written"


@pytest.mark.parametrize("size", [1, 10**6])
async def test_a_stream_that_begins_with_an_error(size: int) -> None:
    stream = ERROR + DONE
    fault = await answer_in([stream[i : i + size] for i in range(0, len(stream), size)]).begin(who="it")
    assert fault is not None
    assert (fault.status, fault.code, fault.message) == (500, "internal_server_error", "no")


async def test_a_stream_without_an_event() -> None:
    fault = await answer_in([b"data: {"]).begin(who="it")
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
