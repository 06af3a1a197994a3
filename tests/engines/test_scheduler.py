"""What runs when, and who suffers from an error: counted step by step, without a thread."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from embedwire.engines.transformers.answer import Answer
from embedwire.engines.transformers.detokenize import Vocabulary
from embedwire.engines.transformers.language import LanguageHalf, load_language_half
from embedwire.engines.transformers.processing import ChatTokenizer
from embedwire.engines.transformers.runner import ModelRunner
from embedwire.engines.transformers.scheduler import Scheduler
from embedwire.language.interface import AssembledPrompt, Delta, SamplingParams

pytestmark = pytest.mark.model
LENGTHS = (5, 40, 12, 3, 29, 40, 8, 17)
BUDGETS = (30, 4, 18, 40, 9, 25, 1, 33)


@pytest.fixture(scope="module")
def half(tiny_model_dir: Callable[[str], Path]) -> Callable[[str], LanguageHalf]:
    return cache(lambda family: load_language_half(tiny_model_dir(family), dtype="float32"))


@pytest.fixture(scope="module")
def vocabulary(tiny_model_dir: Callable[[str], Path]) -> Vocabulary:
    return Vocabulary(ChatTokenizer(tiny_model_dir("qwen2_5_vl")).backend)


def make_prompt(half: LanguageHalf, tokens: int) -> AssembledPrompt:
    """A prompt of random embeddings, positions and deepstack rows; every third token stands for a picture."""
    random = np.random.default_rng(tokens)
    ids = random.integers(0, 200, tokens).astype(np.int32)
    ids[::3] = half.media_ids[0]
    fields: dict[str, Any] = {"fill_ids": ids}
    for layout_field in half.layout:
        shape = (tokens, *layout_field.shape)
        if layout_field.name == "mrope_positions":
            fields[layout_field.name] = random.integers(0, tokens, shape).astype(np.int32)
            fields["mrope_position_delta"] = -tokens // 2
        elif layout_field.name != "fill_ids":
            fields[layout_field.name] = random.standard_normal(shape, np.float32)
    return AssembledPrompt(**fields)


@dataclass
class Reader:
    """Who waits for an answer."""

    deltas: list[Delta] = field(default_factory=list)

    @property
    def ids(self) -> list[int]:
        return [token for delta in self.deltas for token in delta.token_ids]

    @property
    def end(self) -> str | None:
        return self.deltas[-1].finish_reason if self.deltas else None


class Bench:
    """A scheduler with its readers, and a record of the half's forwards."""

    def __init__(
        self, half: LanguageHalf, vocabulary: Vocabulary, monkeypatch: pytest.MonkeyPatch, **settings: Any
    ) -> None:
        self.half = half
        self.forwards: list[Any] = []
        self.broken: Callable[[Any], bool] = lambda _: False
        self._vocabulary = vocabulary
        defaults = {"max_batch": 8, "max_cache_tokens": 10**6, "prefill_chunk_tokens": None}
        self.scheduler = Scheduler(ModelRunner(half), **defaults | settings)
        prefill, decode = half.prefill, half.decode

        def recorded_prefill(prompt: AssembledPrompt, *args: Any, start: int, end: int) -> Any:
            self._record((start, end))
            return prefill(prompt, *args, start=start, end=end)

        def recorded_decode(tokens: Any, *args: Any, **kwargs: Any) -> Any:
            self._record(len(tokens))
            return decode(tokens, *args, **kwargs)

        monkeypatch.setattr(half, "prefill", recorded_prefill)
        monkeypatch.setattr(half, "decode", recorded_decode)

    def _record(self, forward: Any) -> None:
        self.forwards.append(forward)
        if self.broken(forward):
            raise RuntimeError(f"the test breaks {forward}")

    def answer(
        self, tokens: int, budget: int, on_delta: Any = None, **sampling: Any
    ) -> tuple[Answer, Reader]:
        reader = Reader()
        answer = Answer(
            SamplingParams(**sampling),
            prompt_tokens=tokens,
            position_delta=make_prompt(self.half, tokens).mrope_position_delta,
            budget_tokens=budget,
            end_ids=frozenset(),
            vocabulary=self._vocabulary,
            on_delta=on_delta or reader.deltas.append,
        )
        return answer, reader

    def admit(self, tokens: int, budget: int, *args: Any, **sampling: Any) -> Reader:
        answer, reader = self.answer(tokens, budget, *args, **sampling)
        assert self.scheduler.can_admit(answer)
        self.scheduler.admit(answer, make_prompt(self.half, tokens))
        return reader

    def run(self) -> None:
        while not self.scheduler.is_idle:
            self.scheduler.turn()


@pytest.fixture
def bench(half: Any, vocabulary: Vocabulary, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Bench]:
    def make(family: str = "qwen2_5_vl", **settings: Any) -> Bench:
        return Bench(half(family), vocabulary, monkeypatch, **settings)

    return make


def run_together(bench: Bench, gap_turns: int = 0, **sampling: Any) -> list[Reader]:
    """Eight answers of mixed lengths, one more every ``gap_turns`` turns; they leave when they are done."""
    readers = []
    for n, (tokens, budget) in enumerate(zip(LENGTHS, BUDGETS, strict=True)):
        readers.append(bench.admit(tokens, budget, seed=n, **sampling))
        for _ in range(gap_turns + 1):
            bench.scheduler.turn()
    bench.run()
    return readers


def run_alone(bench: Bench, n: int, **sampling: Any) -> Reader:
    reader = bench.admit(LENGTHS[n], BUDGETS[n], seed=n, **sampling)
    bench.run()
    return reader


@pytest.mark.failure_mode("bytes-of-another-room")
@pytest.mark.parametrize("gap_turns", [0, 5])
@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl", "llava"])
def test_answers_are_the_same_together_and_alone(family: str, gap_turns: int, bench) -> None:
    """Eight requests of mixed lengths join and leave at different steps; each has its own ids."""
    together = run_together(bench(family), gap_turns)
    alone = [run_alone(bench(family), n) for n in range(8)]
    assert [reader.ids for reader in together] == [reader.ids for reader in alone]
    assert [len(reader.ids) for reader in together] == list(BUDGETS)
    assert len({tuple(reader.ids[:4]) for reader in alone}) > 4, (
        "the answers are too much alike to tell apart"
    )


def test_a_seed_says_the_same_whoever_is_beside_it(bench) -> None:
    together = run_together(bench(), temperature=1.0, top_p=0.9)
    alone = [run_alone(bench(), n, temperature=1.0, top_p=0.9) for n in range(8)]
    greedy = run_alone(bench(), 0)
    assert [reader.ids for reader in together] == [reader.ids for reader in alone]
    assert alone[0].ids != greedy.ids


def test_decoding_is_one_forward_for_all(bench) -> None:
    """Eight answers of 20 tokens that begin one after the other take 20 + 7 forwards, not 152."""
    own = bench()
    readers = []
    for tokens in LENGTHS:
        readers.append(own.admit(tokens, 20))
        own.scheduler.turn()
    own.run()
    decodes = [forward for forward in own.forwards if isinstance(forward, int)]
    assert decodes == [1, 2, 3, 4, 5, 6, 7, *[8] * 12, 7, 6, 5, 4, 3, 2, 1]
    assert all(len(reader.ids) == 20 for reader in readers)


def test_a_long_prompt_runs_in_fixed_chunks_between_the_steps_of_others(bench) -> None:
    own = bench(prefill_chunk_tokens=16)
    own.admit(5, 6)
    own.scheduler.turn()
    own.admit(40, 2)
    own.run()
    assert own.forwards == [(0, 5), 1, (0, 16), 1, (16, 32), 1, (32, 40), 2, 1]


def test_an_error_in_a_prompt_fails_that_one_alone(bench) -> None:
    own = bench()
    first = own.admit(5, 6)
    own.scheduler.turn()
    own.broken = lambda forward: forward == (0, 9)
    broken = own.admit(9, 6)
    own.run()
    assert broken.deltas == [Delta(finish_reason="error", error="RuntimeError: the test breaks (0, 9)")]
    assert (len(first.ids), first.end) == (6, "length")


@pytest.mark.failure_mode("exception-ends-thread")
def test_an_error_in_a_step_fails_its_members_and_nobody_after_them(bench) -> None:
    """An exception in a step does not affect later requests."""
    own = bench()
    members = [own.admit(5, 9)]
    own.scheduler.turn()
    members.append(own.admit(7, 9))
    own.broken = lambda forward: forward == 2
    own.scheduler.turn()
    own.broken = lambda _: False
    assert [(reader.end, reader.deltas[-1].error) for reader in members] == [
        ("error", "RuntimeError: the test breaks 2")
    ] * 2
    assert own.scheduler.is_idle
    assert run_alone(own, 0).ids == run_alone(bench(), 0).ids


def test_logits_that_say_nothing_fail_their_row_alone(bench) -> None:
    own = bench()
    decode = own.half.decode
    readers = [own.admit(5, 6)]
    own.scheduler.turn()
    readers.append(own.admit(7, 6))

    def poisoned(tokens: Any, *args: Any, **kwargs: Any) -> Any:
        logits = decode(tokens, *args, **kwargs).clone()
        logits[1:] = float("nan")
        return logits

    own.half.decode = poisoned
    own.run()
    assert (readers[0].end, len(readers[0].ids)) == ("length", 6)
    assert readers[1].end == "error"
    assert "not finite" in readers[1].deltas[-1].error


def test_a_reader_that_raises_loses_its_answer_and_no_other(bench) -> None:
    calls: list[Delta] = []

    def broken(delta: Delta) -> None:
        calls.append(delta)
        raise RuntimeError("the reader is gone")

    own = bench()
    own.admit(5, 9, broken)
    own.scheduler.turn()
    other = own.admit(7, 9)
    own.run()
    assert len(calls) == 1
    assert (other.end, len(other.ids)) == ("length", 9)


@pytest.mark.failure_mode("abort-not-propagated")
def test_cancelled_answers_leave_at_once_wherever_they_are(bench) -> None:
    """Cancelled during the prompt, between two chunks, and in a step."""
    own = bench(prefill_chunk_tokens=8)
    answers, readers = [], []
    for tokens in (5, 6, 30):
        answer, reader = own.answer(tokens, 20)
        own.scheduler.admit(answer, make_prompt(own.half, tokens))
        own.scheduler.turn()
        answers.append(answer)
        readers.append(reader)
    answers[0].cancel()
    answers[2].cancel()
    own.scheduler.turn()
    assert own.forwards[-1] == 1, "only the second is left"
    assert [reader.end for reader in readers] == ["cancelled", None, "cancelled"]
    own.run()
    answers[0].cancel()
    assert readers[1].ids == run_budget(bench(prefill_chunk_tokens=8), 6, 20)
    assert [len([d for d in reader.deltas if d.finish_reason]) for reader in readers] == [1, 1, 1]


def run_budget(bench: Bench, tokens: int, budget: int) -> Sequence[int]:
    reader = bench.admit(tokens, budget)
    bench.run()
    return reader.ids


def test_room_is_rows_and_memory_of_the_merged_cache(bench) -> None:
    """Three answers of 10 tokens take 30 tokens of cache, and so do two of which one is 15 long."""
    own = bench(max_batch=4, max_cache_tokens=30)
    own.admit(90, 10)
    assert not own.scheduler.can_admit(own.answer(1, 1)[0]), "one prompt at a time"
    own.run()
    own.admit(6, 4)
    own.scheduler.turn()
    assert own.scheduler.can_admit(own.answer(9, 6)[0])
    assert not own.scheduler.can_admit(own.answer(10, 6)[0])
    own.admit(6, 4)
    own.scheduler.turn()
    assert own.scheduler.can_admit(own.answer(6, 4)[0])
    assert not own.scheduler.can_admit(own.answer(6, 5)[0])


def test_rows_are_bounded(bench) -> None:
    own = bench(max_batch=2)
    for _ in range(2):
        own.admit(3, 9)
        own.scheduler.turn()
    assert not own.scheduler.can_admit(own.answer(3, 9)[0])


def test_a_prompt_that_fills_the_context_has_no_answer(bench) -> None:
    own = bench()
    reader = own.admit(5, 0)
    assert own.scheduler.is_idle
    assert reader.deltas == [Delta(finish_reason="length")]
    assert own.forwards == []
