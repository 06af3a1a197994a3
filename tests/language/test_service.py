"""The language service over real endpoints, with an engine whose steps the test takes."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

from embedwire.endpoint import ReceiverEndpoint, SenderEndpoint
from embedwire.errors import InvalidRequestError, OverloadedError, RankError
from embedwire.language import AssembledPrompt, Delta, Job, LanguageService, SamplingParams, TransferReport
from embedwire.limits import Limits
from embedwire.memory.layout import multimodal

LAYOUT = multimodal(8, dtype="bfloat16", deepstack_levels=2)
DEADLINE_S = 30
SAMPLING = SamplingParams(max_tokens=3)


class SteppedGeneration:
    """What the engine was given, and its way to answer."""

    def __init__(self, prompt: AssembledPrompt, on_delta: Callable[[Delta], None]) -> None:
        self.prompt: AssembledPrompt | None = prompt
        self.on_delta = on_delta
        self.is_cancelled = threading.Event()

    def cancel(self) -> None:
        self.is_cancelled.set()
        self.on_delta(Delta(finish_reason="cancelled"))


class SteppedEngine:
    """Hands every prompt to the test; refuses prompts of more than 100 tokens."""

    model_name = "stepped"
    layout = LAYOUT
    max_tokens = 100

    def __init__(self) -> None:
        self.generations: list[SteppedGeneration] = []
        self.submitted = threading.Semaphore(0)

    def tokenize(self, messages: object) -> np.ndarray:
        return np.arange(5, dtype=np.int32)

    def submit(
        self, prompt: AssembledPrompt, sampling: SamplingParams, *, on_delta: Callable[[Delta], None]
    ) -> SteppedGeneration:
        if len(prompt.fill_ids) > self.max_tokens:
            raise InvalidRequestError("too long", code="context_length_exceeded")
        self.generations.append(SteppedGeneration(prompt, on_delta))
        self.submitted.release()
        return self.generations[-1]

    def close(self) -> None:
        pass


class Listener:
    """What the service told about one answer."""

    def __init__(self) -> None:
        self.reports: list[tuple[TransferReport, int]] = []
        self.deltas: list[Delta] = []
        self.errors: list[Exception] = []
        self.ended = threading.Event()

    def on_report(self, report: TransferReport, prompt_tokens: int) -> None:
        self.reports.append((report, prompt_tokens))

    def on_delta(self, delta: Delta) -> None:
        self.deltas.append(delta)
        if delta.finish_reason:
            self.ended.set()

    def on_error(self, error: Exception) -> None:
        self.errors.append(error)
        self.ended.set()


class Rig:
    """A sender, a receiver of four blocks, and the service between them and the engine."""

    def __init__(self, **more: Any) -> None:
        self.engine = SteppedEngine()
        self.sender = SenderEndpoint(LAYOUT)
        self.receiver = ReceiverEndpoint(LAYOUT, num_blocks=4, block_size=8, limits=Limits(window_rounds=1))
        self.service = LanguageService(self.engine, self.receiver, **more)

    def offer(self, room: int, tokens: int) -> dict[str, np.ndarray]:
        arrays = {f.name: np.full((tokens, *f.shape), room).astype(f.numpy_dtype) for f in LAYOUT}
        self.sender.offer(room, total_tokens=tokens, aux=[-3]).fill(arrays)
        return arrays

    def ask(self, room: int, listener: Listener) -> Job:
        return self.service.generate_room(
            room,
            self.sender.address,
            SAMPLING,
            on_report=listener.on_report,
            on_delta=listener.on_delta,
            on_error=listener.on_error,
        )

    def close(self) -> None:
        self.service.close()
        self.receiver.close()
        self.sender.close()


@pytest.fixture
def rig() -> Iterator[Rig]:
    one = Rig()
    yield one
    one.close()


def test_a_room_arrives_as_the_prompt_that_was_offered(rig: Rig) -> None:
    """More rounds than one, every field, the position delta; then the engine's deltas."""
    arrays = rig.offer(7, 50)
    listener = Listener()
    rig.ask(7, listener)
    assert rig.engine.submitted.acquire(timeout=DEADLINE_S)
    prompt = rig.engine.generations[0].prompt
    assert prompt is not None
    for name, array in arrays.items():
        assert getattr(prompt, name).tobytes() == array.tobytes()
    assert prompt.mrope_position_delta == -3
    ((report, prompt_tokens),) = listener.reports
    assert (report.room, report.rounds, prompt_tokens) == (7, (32, 18), 50)
    rig.engine.generations[0].on_delta(Delta((1,), "a", "stop"))
    assert [d.text for d in listener.deltas] == ["a"]
    assert rig.service.stats().generating == 0


def test_memory_is_given_back_once_the_prompt_was_read(rig: Rig) -> None:
    """The first delta says that the prompt is in the model's cache; the answer may go on for long."""
    rig.offer(1, 50)
    rig.ask(1, Listener())
    assert rig.engine.submitted.acquire(timeout=DEADLINE_S)
    assert rig.receiver.stats().memory_reserved_bytes == 50 * LAYOUT.token_bytes
    rig.engine.generations[0].on_delta(Delta((1,), "a"))
    assert rig.receiver.stats().memory_reserved_bytes == 0
    assert rig.service.stats().generating == 1


@pytest.mark.failure_mode("no-media")
def test_text_alone_goes_past_the_receiver(rig: Rig) -> None:
    """A text-only request opens no room."""
    listener = Listener()
    job = rig.service.generate_text([], SAMPLING, on_delta=listener.on_delta, on_error=listener.on_error)
    assert job.prompt_tokens == 5
    assert rig.engine.generations[0].prompt is not None
    assert rig.engine.generations[0].prompt.input_embeddings is None
    assert rig.receiver.stats().sessions == 0


def test_what_ends_the_room_reaches_the_client_in_words(rig: Rig) -> None:
    offer = rig.sender.offer(1, total_tokens=50)
    listener = Listener()
    rig.ask(1, listener)
    offer.fail("the tower fell")
    assert listener.ended.wait(DEADLINE_S)
    assert "encoder_failed: the tower fell" in str(listener.errors[0])
    assert rig.service.stats().transferring == 0


def test_a_prompt_that_the_engine_refuses_gives_its_memory_back(rig: Rig) -> None:
    rig.offer(1, 101)
    listener = Listener()
    rig.ask(1, listener)
    assert listener.ended.wait(DEADLINE_S)
    assert isinstance(listener.errors[0], InvalidRequestError)
    assert rig.receiver.stats().memory_reserved_bytes == 0


@pytest.mark.failure_mode("abort-not-propagated")
def test_cancel_ends_the_room_on_both_sides_or_the_generation(rig: Rig) -> None:
    """A cancelled request ends its room on both sides, or its generation."""
    offer = rig.sender.offer(1, total_tokens=50)
    listener = Listener()
    rig.ask(1, listener).cancel()
    assert listener.ended.wait(DEADLINE_S)
    assert "aborted" in str(offer.exception(DEADLINE_S))
    rig.offer(2, 50)
    job = rig.ask(2, Listener())
    assert rig.engine.submitted.acquire(timeout=DEADLINE_S)
    job.cancel()
    assert rig.engine.generations[0].is_cancelled.is_set()
    assert rig.service.stats().generating == 0


@pytest.mark.failure_mode("burst-of-requests")
@pytest.mark.invariant("backpressure")
def test_answers_under_way_are_bounded() -> None:
    """One answer above the limit is refused at once."""
    rig = Rig(max_jobs=1)
    rig.sender.offer(1, total_tokens=50)
    rig.ask(1, Listener())
    with pytest.raises(OverloadedError):
        rig.ask(2, Listener())
    rig.close()


@pytest.mark.failure_mode("rank-lost")
def test_an_answer_that_ends_because_a_rank_is_lost_says_so(rig: Rig) -> None:
    """Running and new requests, text and room, end as ``rank_lost``; an error of the engine alone keeps its own code."""
    before, during = Listener(), Listener()
    for listener in (before, during):
        rig.service.generate_text([], SAMPLING, on_delta=listener.on_delta, on_error=listener.on_error)
    first, second = rig.engine.generations
    first.on_delta(Delta(finish_reason="error", error="its own"))
    rig.service.lose("rank 2 has ended")
    rig.service.lose("rank 0 is closed")
    second.on_delta(Delta(finish_reason="error", error="a consequence"))
    assert (before.errors, before.deltas[-1].error) == ([], "its own")
    assert ([str(error) for error in during.errors], during.deltas) == (["rank 2 has ended"], [])
    assert isinstance(during.errors[0], RankError)
    with pytest.raises(RankError, match="rank 2 has ended"):
        rig.ask(1, Listener())
    assert rig.service.stats().generating == 0
