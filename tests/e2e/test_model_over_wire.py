"""A real model in two halves with a real transfer between them, against the same model undivided: equal bits.

Everything runs in one process here, over real sockets and shared memory; the pool is so small that each embedding takes several rounds.
With ``--device cuda`` both halves and the undivided model run on a GPU.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

from embedwire.encode import ChatPrompt, EncodeService
from embedwire.endpoint import ReceiverEndpoint, SenderEndpoint
from embedwire.engines.transformers.encoder import TransformersEncoder
from embedwire.engines.transformers.generation import TransformersLanguage
from embedwire.engines.transformers.language import load_language_half
from embedwire.language import Delta, LanguageService, SamplingParams, TransferReport
from embedwire.language.assembly import assemble

pytestmark = [pytest.mark.model, pytest.mark.e2e]
FAMILIES = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "llava")
STEPS = 32
DEADLINE_S = 60
PICTURES = {"text only": [], "one image": [(84, 84)], "three images": [(56, 84), (140, 84), (84, 28)]}


@dataclass
class Answer:
    """What came back for one room."""

    ids: list[int] = field(default_factory=list)
    text: str = ""
    report: TransferReport | None = None
    error: Exception | None = None
    ended: threading.Event = field(default_factory=threading.Event)

    def on_delta(self, delta: Delta) -> None:
        self.ids.extend(delta.token_ids)
        self.text += delta.text
        if delta.finish_reason is not None:
            self.ended.set()

    def on_error(self, error: Exception) -> None:
        self.error = error
        self.ended.set()

    def on_report(self, report: TransferReport, prompt_tokens: int) -> None:
        self.report = report

    def wait(self) -> Answer:
        assert self.ended.wait(DEADLINE_S)
        assert self.error is None, self.error
        return self


class Halves:
    """Both halves of one checkpoint, their endpoints and services."""

    def __init__(self, model: Path, dtype: str, device: str, **pool: Any) -> None:
        self.encoder = TransformersEncoder(str(model), dtype=dtype, device=device)
        self.language = TransformersLanguage(str(model), dtype=dtype, device=device)
        self.sender = SenderEndpoint(self.encoder.layout)
        self.receiver = ReceiverEndpoint(self.language.layout, **pool)
        self.encode = EncodeService(self.encoder, self.sender)
        self.answers = LanguageService(self.language, self.receiver)
        self.rooms = 0

    def ask(self, prompt: ChatPrompt, max_tokens: int = STEPS) -> Answer:
        """Begin one answer."""
        self.rooms += 1
        answer = Answer()
        taken = self.encode.take_up(self.rooms, prompt)
        self.answers.generate_room(
            self.rooms,
            taken.control_addresses,
            SamplingParams(max_tokens=max_tokens, ignore_eos=True),
            on_report=answer.on_report,
            on_delta=answer.on_delta,
            on_error=answer.on_error,
        )
        return answer

    def close(self) -> None:
        """Everything is whole, and closed."""
        self.answers.close()
        self.encode.close()
        stats = self.receiver.stats()
        assert stats.blocks_free == stats.blocks_total
        assert stats.memory_reserved_bytes == 0
        self.language.close()
        self.receiver.close()
        self.sender.close()


@pytest.fixture
def halves(device: str) -> Iterator[Callable[..., Halves]]:
    made: list[Halves] = []

    def make(model: Path, dtype: str, **pool: Any) -> Halves:
        made.append(Halves(model, dtype, device, **pool))
        return made[-1]

    yield make
    for one in made:
        one.close()


def chat(pictures: list[bytes], text: str = "What is on these pictures?") -> ChatPrompt:
    parts: list[Mapping[str, Any]] = [*({"type": "image"} for _ in pictures), {"type": "text", "text": text}]
    return ChatPrompt([{"role": "user", "content": parts}], pictures)


def undivided_answer(
    model: Any, encoder: TransformersEncoder, prompt: ChatPrompt
) -> tuple[torch.Tensor, list[int]]:
    """Prefill logits (T, V) and STEPS greedy ids of the undivided model for the same ids and pixels."""
    processed = encoder.prepare(prompt).inputs.processed
    ids = torch.as_tensor(processed.ids).long()[None]
    pixels = {name: torch.as_tensor(array) for name, array in processed.pixels.items()}
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), **pixels}
    if "image_grid_thw" in inputs:
        inputs["mm_token_type_ids"] = (ids == model.config.image_token_id).int()
    endless = copy.deepcopy(model.generation_config)
    endless.eos_token_id, endless.pad_token_id = -1, 0  # no token ends it
    inputs = {name: tensor.to(model.device) for name, tensor in inputs.items()}
    with torch.inference_mode():
        logits = model(**inputs).logits[0]
        out = model.generate(**inputs, generation_config=endless, do_sample=False, max_new_tokens=STEPS)
    return logits, out[0, ids.shape[1] :].tolist()


@pytest.mark.parametrize("pictures", PICTURES.values(), ids=PICTURES.keys())
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_transfer_in_several_rounds_leaves_every_bit(
    family: str,
    dtype: str,
    pictures: list[tuple[int, int]],
    halves: Any,
    tiny_model_dir: Any,
    undivided: Any,
    picture: Any,
    device: str,
) -> None:
    """Prefill logits and 32 greedy ids equal those of the undivided model, one request at a time."""
    both = halves(tiny_model_dir(family), dtype, num_blocks=2, block_size=4)
    prompt = chat([picture(*size, seed=seed) for seed, size in enumerate(pictures)])
    logits, ids = undivided_answer(undivided(family, dtype, device), both.encoder, prompt)

    answer = both.ask(prompt).wait()
    assert answer.ids == ids
    assert answer.report is not None
    assert len(answer.report.rounds) >= 3
    assert sum(answer.report.rounds) == answer.report.total_tokens == len(logits)

    both.encode.take_up(1000, prompt)
    received = both.receiver.open(1000, both.sender.address).result(DEADLINE_S)
    half = load_language_half(tiny_model_dir(family), dtype=dtype, device=device)
    assert torch.equal(half.prefill(assemble(received), half.new_cache(), all_positions=True), logits)
    received.release()


@pytest.mark.failure_mode("extreme-length")
@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl", "llava"])
def test_a_pool_of_one_block_moves_a_prompt_of_thousands_of_tokens(
    family: str, halves: Any, tiny_model_dir: Any, undivided: Any, picture: Any, device: str
) -> None:
    """Through one block of 16 tokens the token ids are those of the undivided model."""
    both = halves(tiny_model_dir(family), "float32", num_blocks=1, block_size=16)
    prompt = chat([picture(84, 84)], text="all work and no play makes a dull boy. " * 400)
    logits, ids = undivided_answer(undivided(family, "float32", device), both.encoder, prompt)
    answer = both.ask(prompt).wait()
    assert answer.report is not None
    assert answer.report.total_tokens == len(logits) > 3000
    assert set(answer.report.rounds[:-1]) == {16}
    assert answer.ids == ids


@pytest.mark.failure_mode("pool-held-by-partial-rooms", "burst-of-requests")
def test_64_requests_at_once_through_four_blocks(
    halves: Any, tiny_model_dir: Any, undivided: Any, picture: Any, device: str
) -> None:
    """All 64 requests are answered, each according to its own images."""
    family = "qwen2_5_vl"
    both = halves(tiny_model_dir(family), "float32", num_blocks=4, block_size=16)
    prompts = [
        chat([picture(28 * (1 + n % 4), 56, seed=n) for _ in range(n % 4)], text=f"This is number {n}.")
        for n in range(16)
    ]
    expected = [
        undivided_answer(undivided(family, "float32", device), both.encoder, prompt)[1] for prompt in prompts
    ]
    answers = [both.ask(prompts[n % 16]) for n in range(64)]
    for n, answer in enumerate(answers):
        assert answer.wait().ids == expected[n % 16], f"request {n}"
