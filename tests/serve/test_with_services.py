"""The servers around the real services and endpoints: only the models are doubles, and they say what they
read."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import msgspec
import numpy as np
import pytest

from embedwire.encode.interface import ChatPrompt, PreparedPrompt
from embedwire.encode.service import EncodeService
from embedwire.endpoint import ReceiverEndpoint, SenderEndpoint
from embedwire.language.interface import AssembledPrompt, Delta, SamplingParams
from embedwire.language.service import LanguageService
from embedwire.limits import Limits
from embedwire.memory.layout import multimodal
from embedwire.serve.encoder_app import encoder_app
from embedwire.serve.language_app import language_app
from embedwire.serve.metrics import AppMetrics

WAIT_S = 20.0
LAYOUT = multimodal(8, dtype="float32")
TOKENS = 300


class EncoderDouble:
    """Every token of a prompt is its image's number."""

    model_name, layout, max_tokens = "tiny", LAYOUT, 100_000

    def __init__(self) -> None:
        self.gate: threading.Event | None = None
        self.encoding = threading.Event()

    def prepare(self, prompt: ChatPrompt) -> PreparedPrompt:
        return PreparedPrompt(TOKENS, -7, prompt.media[0].ljust(16), int(prompt.media[0]))

    def encode(self, batch: Sequence[PreparedPrompt]) -> list[dict[str, np.ndarray]]:
        self.encoding.set()
        if self.gate:
            assert self.gate.wait(WAIT_S)
        made = [LAYOUT.empty(p.total_tokens) for p in batch]
        for prepared, arrays in zip(batch, made, strict=True):
            for array in arrays.values():
                array[...] = prepared.inputs
        return made


class LanguageDouble:
    """Answers with the numbers it finds in the prompt."""

    model_name, layout, max_tokens = "tiny", LAYOUT, 100_000

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1)

    def tokenize(self, messages: Sequence[Mapping[str, Any]]) -> np.ndarray:
        return np.arange(5, dtype=np.int32)

    def submit(
        self, prompt: AssembledPrompt, sampling: SamplingParams, *, on_delta: Callable[[Delta], None]
    ) -> Any:
        self._thread.submit(self._answer, prompt, on_delta)
        return self

    def _answer(self, prompt: AssembledPrompt, on_delta: Callable[[Delta], None]) -> None:
        arrays = [prompt.fill_ids, prompt.input_embeddings, prompt.mrope_positions]
        found = {int(n) for a in arrays if a is not None for n in np.unique(a)}
        on_delta(Delta((1,), f"{sorted(found)} {len(prompt.fill_ids)} {prompt.mrope_position_delta}"))
        on_delta(Delta(finish_reason="stop"))

    def cancel(self) -> None:
        """Too late: the answer is one step."""

    def close(self) -> None:
        self._thread.shutdown()


class Served:
    """An encoder, a language server and a router; ``post`` asks for an image by its number."""

    def __init__(self, cluster: Any, **receiver: Any) -> None:
        stack = cluster.stack
        self.sender = stack.enter_context(SenderEndpoint(LAYOUT, memory_bytes=2**20))
        self.receiver = stack.enter_context(ReceiverEndpoint(LAYOUT, **receiver))
        self.encoder, self.language = EncoderDouble(), LanguageDouble()
        encode, answer = (
            EncodeService(self.encoder, self.sender),
            LanguageService(self.language, self.receiver),
        )
        for close in (self.language.close, answer.close, encode.close):
            stack.callback(close)
        common: dict[str, Any] = {"model": "tiny", "layout": LAYOUT}
        stats = {"sender": self.sender.stats, "encode": encode.stats}
        self.a = cluster.run(
            encoder_app(encode, control_addresses=[self.sender.address], metrics=AppMetrics(stats), **common)
        )
        stats = {"receiver": self.receiver.stats, "language": answer.stats}
        self.b = cluster.run(language_app(answer, metrics=AppMetrics(stats), **common))
        self.url = cluster.add_router(self.a, self.b).url + "/v1/chat/completions"

    def assert_all_given_back(self) -> None:
        """The last word of a room may still be on its way when its answer is out."""
        give_up_s = time.monotonic() + WAIT_S
        while any(self.sender.stats().rooms.values()) or any(self.receiver.stats().rooms.values()):
            assert time.monotonic() < give_up_s
        stats = self.receiver.stats()
        assert (stats.blocks_free, stats.blocks_granted) == (stats.blocks_total, 0)
        assert self.sender.stats().memory_reserved_bytes == 0


@pytest.fixture
def served(cluster: Any) -> Served:
    limits = Limits(window_rounds=1)
    return Served(cluster, num_blocks=4, block_size=32, default_allocate_tokens=128, limits=limits)


def test_an_image_arrives_whole_and_the_answer_says_how(served: Served, chat: Any) -> None:
    answer = httpx.post(served.url, json=chat("what?", b"42"), timeout=WAIT_S).json()
    assert answer["choices"][0]["message"]["content"] == "[42] 300 -7"
    passage = answer["embedwire"]
    assert (passage["rounds"], passage["total_tokens"]) == ([128, 128, 44], 300)
    assert passage["bytes"] == 300 * LAYOUT.token_bytes
    assert (passage["transport"], passage["encoder"]) == ("shm", served.a.url)
    assert answer["usage"]["prompt_tokens"] == 300
    metrics = httpx.get(f"{served.b.url}/metrics").text
    assert "embedwire_receiver_rounds_total 3.0" in metrics
    assert 'embedwire_receiver_rooms_ended_total{cause="done"} 1.0' in metrics
    assert "embedwire_transfer_seconds_count 1.0" in metrics
    assert "embedwire_encode_encoded_total 1.0" in httpx.get(f"{served.a.url}/metrics").text


@pytest.mark.failure_mode("no-media")
def test_text(served: Served, chat: Any) -> None:
    """A text-only request."""
    answer = httpx.post(served.url, json=chat("hello"), timeout=WAIT_S).json()
    assert answer["choices"][0]["message"]["content"] == "[0, 1, 2, 3, 4] 5 0"
    assert answer["usage"]["prompt_tokens"] == 5


@pytest.mark.failure_mode("pool-held-by-partial-rooms", "burst-of-requests", "bytes-of-another-room")
@pytest.mark.anyio
async def test_a_crowd_with_a_pool_of_four_blocks(served: Served, chat: Any) -> None:
    """All requests are answered, each according to its own image, and every block is freed."""
    async with httpx.AsyncClient(timeout=60, limits=httpx.Limits(max_connections=None)) as client:

        async def ask(number: int) -> str:
            content = msgspec.json.encode(chat("what?", str(number).encode(), stream=number % 2 == 0))
            answer = await client.post(served.url, content=content)
            assert answer.status_code == 200, answer.text
            return answer.text

        answers = await asyncio.gather(*map(ask, range(40)))
    assert all(f"[{number}] 300 -7" in text for number, text in enumerate(answers))
    served.assert_all_given_back()


@pytest.mark.failure_mode("abort-not-propagated")
def test_a_disconnect_gives_everything_back(served: Served, chat: Any, hang_up_after: Any) -> None:
    """While the tower runs: the room ends on both sides, and the next request is served."""
    served.encoder.gate = threading.Event()
    with hang_up_after(served.url, chat("what?", b"1")):
        assert served.encoder.encoding.wait(WAIT_S)
    give_up_s = time.monotonic() + WAIT_S
    while not served.sender.stats().ended.get("aborted"):
        assert time.monotonic() < give_up_s, "the sender did not hear of it"
    served.encoder.gate.set()
    assert httpx.post(served.url, json=chat("what?", b"2"), timeout=WAIT_S).status_code == 200
    served.assert_all_given_back()


@pytest.mark.failure_mode("request-never-fits")
def test_larger_than_all_there_is(cluster: Any, chat: Any) -> None:
    """Refused at once, with the cause."""
    served = Served(cluster, assembly_bytes=1000)
    answer = httpx.post(served.url, json=chat("what?", b"1"), timeout=WAIT_S)
    assert (answer.status_code, answer.json()["error"]["code"]) == (413, "never_fits")
