"""What a client sees of an answer: streamed or not, with the official client, with and without pictures; and what operators see."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import openai
import pytest
from prometheus_client.parser import text_string_to_metric_families

if TYPE_CHECKING:
    from tests.e2e.conftest import Stack

pytestmark = [pytest.mark.e2e, pytest.mark.model, pytest.mark.timeout(240)]
KEYS = {
    "room", "encoder", "transport", "total_tokens", "rounds", "bytes", "wire_bytes", "ranks", "delivery", "encode_ms", "transfer_ms",
    "ttft_ms",
}  # fmt: skip

Chat = Callable[..., dict[str, Any]]
Picture = Callable[..., bytes]


@pytest.fixture
def client(stack: Stack) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(
        base_url=f"{stack.router.url}/v1", api_key="none", max_retries=0, timeout=60
    ) as client:
        yield client


def events(stack: Stack, body: dict[str, Any]) -> list[dict[str, Any]]:
    """The chunks of a streamed answer, which has to end with the mark of its end."""
    with stack.client.stream("POST", stack.url, json=body | {"stream": True}) as answer:
        assert answer.status_code == 200
        assert answer.headers["content-type"].startswith("text/event-stream")
        lines = [line.removeprefix("data: ") for line in answer.iter_lines() if line]
    assert lines.pop() == "[DONE]"
    return [json.loads(line) for line in lines]


def test_a_streamed_answer_is_the_same_answer(stack: Stack, chat: Chat, picture: Picture) -> None:
    """Text, ids, finish reason and usage; and both tell how the embedding came."""
    body = chat("What is this?", picture(280, 224), max_tokens=24)
    whole = stack.ask(body).json()
    chunks = events(stack, body | {"stream_options": {"include_usage": True}})
    choice = whole["choices"][0]
    parts = [chunk["choices"][0] for chunk in chunks if chunk["choices"]]
    assert "".join(part["delta"].get("content", "") for part in parts) == choice["message"]["content"] != ""
    assert [i for part in parts for i in part["token_ids"]] == choice["token_ids"]
    assert len(choice["token_ids"]) == 24
    assert [part["finish_reason"] for part in parts] == [None] * (len(parts) - 1) + ["length"]
    assert choice["finish_reason"] == "length"
    usage = {"completion_tokens": 24, "prompt_tokens": whole["embedwire"]["total_tokens"]}
    assert whole["usage"] == chunks[-1]["usage"] == usage | {"total_tokens": sum(usage.values())}
    assert len({chunk["id"] for chunk in chunks}) == 1
    for passage in (whole["embedwire"], chunks[-1]["embedwire"]):
        assert passage.keys() == KEYS
        assert passage["encoder"] == stack.encoders[0].url
        assert passage["transport"] == "shm"
        whole_rounds, rest = divmod(passage["total_tokens"], 32)  # two rounds at a time share the pool of 64
        assert passage["rounds"] == [32] * whole_rounds + [rest] * (rest > 0)
        assert passage["bytes"] % passage["total_tokens"] == 0
        assert (passage["ranks"], passage["delivery"], passage["wire_bytes"]) == (1, None, passage["bytes"])
        assert min(passage[ms] for ms in ("encode_ms", "transfer_ms", "ttft_ms")) > 0
    assert whole["embedwire"]["room"] != chunks[-1]["embedwire"]["room"]


def test_it_is_the_answer_of_the_undivided_model(
    stack: Stack, chat: Chat, picture: Picture, tiny_model_dir: Callable[[str], Path]
) -> None:
    """Plain transformers, with the whole model in one process, says the same."""
    from embedwire.encode import ChatPrompt
    from embedwire.engines.transformers.reference import greedy_ids

    pictures = [picture(280, 224, seed=1), picture(140, 112, seed=2)]
    parts = [*({"type": "image"} for _ in pictures), {"type": "text", "text": "What are these?"}]
    prompt = ChatPrompt([{"role": "user", "content": parts}], pictures)
    expected = greedy_ids(str(tiny_model_dir("qwen2_5_vl")), prompt, max_tokens=32, dtype="float32")
    assert stack.ids(chat("What are these?", *pictures, max_tokens=32)) == expected
    assert len(set(expected)) > 3


def test_the_official_client_reads_both(client: openai.OpenAI, chat: Chat, picture: Picture) -> None:
    body = chat("What is this?", picture(140, 140))
    extra = {name: body.pop(name) for name in ("ignore_eos", "return_token_ids")}
    whole = client.chat.completions.create(**body, extra_body=extra)
    with client.chat.completions.create(**body, stream=True, extra_body=extra) as stream:
        chunks = list(stream)
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert text == whole.choices[0].message.content != ""
    assert whole.usage is not None
    assert whole.usage.completion_tokens == 8
    assert whole.model_extra is not None
    assert set(whole.model_extra["embedwire"]) == KEYS
    assert [model.id for model in client.models.list()] == ["tiny"]
    with pytest.raises(openai.NotFoundError, match="there is tiny") as refused:
        client.chat.completions.create(**body | {"model": "large"})
    assert (refused.value.code, refused.value.param) == ("model_not_found", "model")


@pytest.mark.failure_mode("no-media")
def test_text_alone_goes_past_the_encoder(stack: Stack, chat: Chat) -> None:
    """A text-only request opens no room and leaves the counters of the encoder unchanged."""
    before = stack.encoders[0].metrics()
    answer = stack.ask(chat("Say something.")).json()
    assert len(answer["choices"][0]["token_ids"]) == 8
    assert {name for name, value in answer["embedwire"].items() if value is not None} == {"ttft_ms"}
    after = stack.encoders[0].metrics()
    for name in ("encode_encoded_total", "sender_rooms_ended_total", "sender_bytes_total"):
        assert after.total(name) == before.total(name)
    assert after.total("requests_total", route="/encode") == before.total("requests_total", route="/encode")


def test_the_order_of_pictures_matters(stack: Stack, chat: Chat, picture: Picture) -> None:
    """And whose turn they stand in: the first picture is the first one of the prompt."""
    one, other = picture(112, 112, seed=1), picture(112, 112, seed=2)
    ids = stack.ids(chat("Which is larger?", one, other))
    assert ids == stack.ids(chat("Which is larger?", one, other))
    assert ids != stack.ids(chat("Which is larger?", other, one))
    assert ids != stack.ids(chat("Which is larger?", one, one))


def test_stop_ends_the_answer_before_its_string(stack: Stack, chat: Chat, picture: Picture) -> None:
    body = chat("What is this?", picture(112, 112), max_tokens=32)
    text = stack.ask(body).json()["choices"][0]["message"]["content"]
    stop = text[5:8]
    choice = stack.ask(body | {"stop": ["\x00never", stop]}).json()["choices"][0]
    assert choice["message"]["content"] == text[: text.index(stop)]
    assert choice["finish_reason"] == "stop"
    chunks = events(stack, body | {"stop": stop})
    assert "".join(c["choices"][0]["delta"].get("content", "") for c in chunks) == text[: text.index(stop)]


def test_a_seed_makes_chance_repeatable(stack: Stack, chat: Chat, picture: Picture) -> None:
    body = chat("What is this?", picture(112, 112), temperature=2, max_tokens=16)
    one, again, other = (stack.ids(body | {"seed": seed}) for seed in (7, 7, 8))
    assert one == again != other


def test_the_router_tells_its_models_and_its_health(stack: Stack) -> None:
    models = httpx.get(f"{stack.router.url}/v1/models", trust_env=False).json()
    assert [(model["id"], model["object"]) for model in models["data"]] == [("tiny", "model")]
    health = httpx.get(f"{stack.router.url}/health", trust_env=False).json()
    assert health == {"status": "ok", "workers": {"encoder": 1, "language": 1}, "under_way": 0}
    for server, role in ((stack.encoders[0], "encoder"), (stack.language, "language")):
        worker = httpx.get(f"{server.url}/health", trust_env=False).json()["worker"]
        assert (worker["role"], worker["url"], worker["model"]) == (role, server.url, "tiny")


def test_what_is_counted(stack: Stack, chat: Chat, picture: Picture) -> None:
    """One request with a picture moves every count by what its answer says, on both sides."""
    before = [server.metrics() for server in (stack.router, stack.encoders[0], stack.language)]
    passage = stack.ask(chat("What is this?", picture(280, 224))).json()["embedwire"]
    stack.wait_at_rest()
    after = [server.metrics() for server in (stack.router, stack.encoders[0], stack.language)]
    router, encoder, language = (
        lambda name, b=b, a=a, **labels: a.total(name, **labels) - b.total(name, **labels)
        for b, a in zip(before, after, strict=True)
    )
    assert router("requests_total", route="/v1/chat/completions", status="200") == 1
    assert encoder("encode_encoded_total") == encoder("sender_rooms_ended_total", cause="done") == 1
    assert language("receiver_rooms_ended_total", cause="done") == 1
    for side in (encoder("sender_rounds_total"), language("receiver_rounds_total")):
        assert side == len(passage["rounds"])
    for side in (encoder("sender_bytes_total"), language("receiver_bytes_total")):
        assert side == passage["bytes"]
    assert language("language_wire_bytes_total") == passage["wire_bytes"]
    for stage in ("encode", "transfer", "ttft"):
        assert language(f"{stage}_seconds_count") == 1
    assert after[1].total("sender_sessions") == after[2].total("receiver_sessions") == 1
    for name in ("receiver_blocks", "receiver_blocks_free"):
        assert after[2].total(name) == 4


def test_every_metric_is_documented(stack: Stack) -> None:
    """And every documented one is there."""
    page = (Path(__file__).parents[2] / "docs/reference/metrics.md").read_text()
    documented = {
        name.removesuffix("_total") for name in re.findall(r"^\| `(embedwire_\w+)`", page, re.MULTILINE)
    }
    exposed = set()
    for server in (stack.router, stack.encoders[0], stack.language):
        text = httpx.get(f"{server.url}/metrics", trust_env=False).text
        exposed |= {family.name for family in text_string_to_metric_families(text)}
    assert {name for name in exposed if not name.endswith("_created")} == documented
    assert len(documented) > 25
