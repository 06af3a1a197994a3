"""The language engine as its callers see it: text, ends, bounds, and a thread that outlives errors."""

from __future__ import annotations

import json
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer

from embedwire.encode.interface import ChatPrompt
from embedwire.engines.transformers.answer import Answer
from embedwire.engines.transformers.encoder import TransformersEncoder
from embedwire.engines.transformers.generation import TransformersLanguage, _end_ids
from embedwire.engines.transformers.language import LanguageHalf
from embedwire.engines.transformers.scheduler import Scheduler
from embedwire.errors import ConfigurationError, InvalidRequestError, OverloadedError, UsageError
from embedwire.language.interface import AssembledPrompt, Delta, LanguageEngine, SamplingParams

pytestmark = pytest.mark.model
TIMEOUT_S = 60
CHAT = [{"role": "user", "content": "What is in the image?"}]


class Reader:
    """Collects an answer; ``wait`` returns it once its last delta has come."""

    def __init__(self) -> None:
        self.deltas: list[Delta] = []
        self._ended = threading.Event()

    def __call__(self, delta: Delta) -> None:
        assert not self._ended.is_set(), "a delta after the last"
        self.deltas.append(delta)
        if delta.finish_reason:
            self._ended.set()

    def wait(self) -> Reader:
        assert self._ended.wait(TIMEOUT_S), "the answer did not end"
        return self

    @property
    def ids(self) -> list[int]:
        return [token for delta in self.deltas for token in delta.token_ids]

    @property
    def text(self) -> str:
        return "".join(delta.text for delta in self.deltas)

    @property
    def end(self) -> str | None:
        return self.deltas[-1].finish_reason


class Brake(Reader):
    """A reader that holds the engine's thread at some of its deltas (counted from 1) until it is released."""

    def __init__(self, *holds: int) -> None:
        super().__init__()
        self._reached = {hold: threading.Event() for hold in holds}
        self._released = {hold: threading.Event() for hold in holds}

    def __call__(self, delta: Delta) -> None:
        super().__call__(delta)
        hold = len(self.deltas)
        if hold in self._reached:
            self._reached[hold].set()
            assert self._released[hold].wait(TIMEOUT_S)

    def wait_at(self, hold: int) -> None:
        assert self._reached[hold].wait(TIMEOUT_S)

    def release(self, hold: int) -> None:
        self._released[hold].set()


@pytest.fixture(scope="module")
def make_engine(tiny_model_dir: Callable[[str], Path]) -> Iterator[Callable[..., TransformersLanguage]]:
    engines: list[TransformersLanguage] = []
    before = set(threading.enumerate())

    def make(family: str = "qwen2_5_vl", *, directory: Path | None = None, **settings: Any) -> Any:
        path = directory or tiny_model_dir(family)
        engines.append(TransformersLanguage(str(path), **{"dtype": "float32"} | settings))
        return engines[-1]

    yield make
    for engine in engines:
        engine.close()
    assert not [t for t in threading.enumerate() if t.name == "language" and t not in before]


@pytest.fixture(scope="module")
def engine(make_engine: Callable[..., TransformersLanguage]) -> TransformersLanguage:
    return make_engine()


@pytest.fixture(scope="module")
def decode(tiny_model_dir: Callable[[str], Path]) -> Callable[..., str]:
    """``decode(ids, family="qwen2_5_vl")``: their text, all at once and without the special tokens."""

    def text(ids: list[int], family: str = "qwen2_5_vl") -> str:
        return str(Tokenizer.from_file(str(tiny_model_dir(family) / "tokenizer.json")).decode(ids))

    return text


def ask(engine: TransformersLanguage, tokens: int = 9, **sampling: Any) -> Reader:
    """Submit a prompt of text made from ``tokens``; 12 tokens are asked for, whatever they are."""
    reader = Reader()
    sampling = {"max_tokens": 12, "ignore_eos": True} | sampling
    engine.submit(make_prompt(tokens), SamplingParams(**sampling), on_delta=reader)
    return reader


def make_prompt(tokens: int) -> AssembledPrompt:
    return AssembledPrompt(fill_ids=np.random.default_rng(tokens).integers(0, 200, tokens).astype(np.int32))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl", "llava"])
def test_one_answer_is_what_the_undivided_model_generates(
    family: str, dtype: str, make_engine, undivided, decode
) -> None:
    """From the chat to the text; alone, so in bfloat16 too."""
    engine, model = make_engine(family, dtype=dtype), undivided(family, dtype)
    ids = engine.tokenize(CHAT)
    reader = Reader()
    engine.submit(AssembledPrompt(fill_ids=ids), SamplingParams(max_tokens=40), on_delta=reader)
    with torch.inference_mode():
        expected = model.generate(torch.tensor(ids)[None].long(), max_new_tokens=40, do_sample=False)
    assert reader.wait().ids == expected[0, len(ids) :].tolist()
    assert reader.text == decode(reader.ids, family)
    assert len(set(reader.ids)) > 4


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl", "llava"])
def test_both_halves_say_what_the_undivided_model_says(
    family: str, dtype: str, make_engine, undivided, picture, tiny_model_dir
) -> None:
    """Three pictures of different shapes through the encode half and into the engine."""
    encoder = TransformersEncoder(str(tiny_model_dir(family)), dtype=dtype)
    chat = [{"role": "user", "content": [{"type": "image"}] * 3 + [{"type": "text", "text": "Which?"}]}]
    media = [picture(84, 56, 1), picture(56, 112, 2), picture(56, 56, 3)]
    prepared = encoder.prepare(ChatPrompt(chat, media))
    arrays: Any
    (arrays,) = encoder.encode([prepared])
    prompt = AssembledPrompt(**arrays, mrope_position_delta=prepared.mrope_position_delta)
    reader, engine = Reader(), make_engine(family, dtype=dtype)
    engine.submit(prompt, SamplingParams(max_tokens=24), on_delta=reader)
    expected = undivided_ids(undivided(family, dtype), prompt.fill_ids, prepared.inputs.processed.pixels)
    assert reader.wait().ids == expected


def undivided_ids(model: Any, fill_ids: np.ndarray, pixels: Mapping[str, np.ndarray]) -> list[int]:
    ids = torch.tensor(fill_ids)[None].long()
    inputs = {name: torch.from_numpy(array) for name, array in pixels.items()}
    if "image_grid_thw" in inputs:
        inputs["mm_token_type_ids"] = (ids == model.config.image_token_id).int()
    with torch.inference_mode():
        answer = model.generate(ids, **inputs, max_new_tokens=24, do_sample=False)
    return answer[0, ids.shape[1] :].tolist()


def test_it_is_a_language_engine(engine) -> None:
    checked: LanguageEngine = engine
    assert checked.layout.describe()[0] == "input_embeddings float32[64]"
    assert checked.max_tokens == 131072


@pytest.mark.failure_mode("bytes-of-another-room")
def test_ids_and_text_of_many_are_each_ones_own(engine) -> None:
    """Sixteen answers at once on the engine's thread, each with its own ids and text."""
    sizes = [3 + 5 * n % 31 for n in range(16)]
    together = [ask(engine, tokens, max_tokens=5 + tokens) for tokens in sizes]
    for reader in together:
        reader.wait()
    for tokens, reader in zip(sizes, together, strict=True):
        alone = ask(engine, tokens, max_tokens=5 + tokens).wait()
        assert (reader.ids, reader.text, reader.end) == (alone.ids, alone.text, "length")


def test_an_end_token_ends_the_answer_and_is_not_in_its_text(
    make_engine, tiny_model_dir, tmp_path: Path, engine, decode
) -> None:
    """The generation settings may name several; ``ignore_eos`` goes past them."""
    whole = ask(engine).wait()
    end = next(n for n in range(3, 12) if whole.ids[n] not in whole.ids[:n])
    directory = shutil.copytree(tiny_model_dir("qwen2_5_vl"), tmp_path / "model")
    settings = directory / "generation_config.json"
    settings.write_text(
        json.dumps(json.loads(settings.read_text()) | {"eos_token_id": [399, whole.ids[end]]})
    )
    own = make_engine(directory=directory)
    ended = ask(own, ignore_eos=False).wait()
    assert (ended.ids, ended.end) == (whole.ids[: end + 1], "stop")
    assert ended.text == decode(whole.ids[:end])
    assert ask(own).wait().ids == whole.ids


def test_a_stop_string_across_tokens_ends_the_answer(engine, decode) -> None:
    """The stop is not in the text, in no delta; its tokens are among the ids."""
    whole = ask(engine, max_tokens=30).wait()
    stop = whole.text[9:13]
    start = whole.text.index(stop)
    stopped = ask(engine, max_tokens=30, stop=("not in the text", stop)).wait()
    assert (stopped.text, stopped.end) == (whole.text[:start], "stop")
    assert len(stopped.ids) < 30
    assert decode(stopped.ids).startswith(whole.text[:start] + stop)


def test_what_only_begins_like_a_stop_is_given_out_in_the_end(engine) -> None:
    whole = ask(engine).wait()
    held = ask(engine, stop=(whole.text[-2:] + "#",)).wait()
    assert (held.text, held.end) == (whole.text, "length")


def test_a_seed_repeats_an_answer_among_others(engine) -> None:
    params: dict[str, Any] = {"temperature": 1.0, "seed": 5}
    alone = ask(engine, **params).wait()
    beside = [ask(engine, tokens, temperature=1.0, seed=tokens) for tokens in (4, 30)]
    again = ask(engine, **params).wait()
    assert again.ids == alone.ids
    assert again.ids != ask(engine, temperature=1.0, seed=6).wait().ids
    assert [reader.wait().end for reader in beside] == ["length", "length"]


def test_an_answer_ends_at_the_context(make_engine, tiny_model_dir, tmp_path: Path) -> None:
    directory = shutil.copytree(tiny_model_dir("qwen2_5_vl"), tmp_path / "model")
    config = json.loads((directory / "config.json").read_text())
    config["text_config"]["max_position_embeddings"] = 20
    (directory / "config.json").write_text(json.dumps(config))
    own = make_engine(directory=directory)
    assert own.max_tokens == 20
    for tokens, answered in ((15, 5), (19, 1), (20, 0)):
        reader = ask(own, tokens).wait()
        assert (len(reader.ids), reader.end) == (answered, "length")
    with pytest.raises(InvalidRequestError) as caught:
        ask(own, 21)
    assert caught.value.code == "context_length_exceeded"
    with pytest.raises(InvalidRequestError) as caught:
        own.tokenize([{"role": "user", "content": "no " * 40}])
    assert caught.value.code == "context_length_exceeded"


@pytest.mark.failure_mode("burst-of-requests")
@pytest.mark.invariant("backpressure")
def test_the_queue_is_bounded_and_a_cancelled_place_is_free_at_once(make_engine) -> None:
    """One request above the limit is refused at once, and every accepted one is answered."""
    own = make_engine(max_batch=1, max_waiting=2)
    brake, waiting = Brake(1, 3), [Reader(), Reader()]
    own.submit(make_prompt(4), SamplingParams(max_tokens=4, ignore_eos=True), on_delta=brake)
    brake.wait_at(1)
    queued = [own.submit(make_prompt(5), SamplingParams(max_tokens=2), on_delta=reader) for reader in waiting]
    with pytest.raises(OverloadedError, match="2 prompts are waiting"):
        ask(own)
    queued[0].cancel()
    brake.release(1)
    brake.wait_at(3)
    assert waiting[0].deltas == [Delta(finish_reason="cancelled")], "though its turn had not come"
    late = ask(own)
    brake.release(3)
    assert [brake.wait().end, late.wait().end] == ["length", "length"]
    assert waiting[1].wait().end in ("length", "stop")


def test_a_running_answer_is_cancelled_between_two_tokens(engine) -> None:
    brake = Brake(1)
    running = engine.submit(make_prompt(4), SamplingParams(max_tokens=50, ignore_eos=True), on_delta=brake)
    brake.wait_at(1)
    running.cancel()
    brake.release(1)
    assert [delta.finish_reason for delta in brake.wait().deltas] == [None, None, "cancelled"]
    running.cancel()
    assert ask(engine).wait().end == "length"


@pytest.mark.failure_mode("exception-ends-thread")
def test_an_error_in_a_step_reaches_its_reader_and_the_thread_lives_on(engine, monkeypatch) -> None:
    """An exception in a step reaches the caller of that answer; the thread goes on."""
    before = ask(engine).wait()
    with monkeypatch.context() as broken:
        broken.setattr(LanguageHalf, "decode", lambda *_, **__: 1 / 0)
        failed = ask(engine).wait()
    assert (failed.end, failed.deltas[-1].error) == ("error", "ZeroDivisionError: division by zero")
    assert failed.ids == before.ids[:1]
    assert ask(engine).wait().ids == before.ids


def test_an_idle_thread_takes_no_turns(make_engine, monkeypatch) -> None:
    """One turn a token, however long the engine has waited before."""
    turns: list[None] = []
    turn = Scheduler.turn
    monkeypatch.setattr(Scheduler, "turn", lambda scheduler: turns.append(None) or turn(scheduler))
    own = make_engine()
    for _ in range(3):
        ask(own, max_tokens=10).wait()
    own.close()
    assert len(turns) == 3 * 9, "the first turn of an answer gives two tokens, as it joins the batch"


def test_close_cancels_what_runs_and_what_waits(make_engine) -> None:
    own = make_engine(max_batch=1, max_waiting=1)
    brake, waiting = Brake(1), Reader()
    own.submit(make_prompt(4), SamplingParams(max_tokens=50, ignore_eos=True), on_delta=brake)
    brake.wait_at(1)
    own.submit(make_prompt(4), SamplingParams(), on_delta=waiting)
    closer = threading.Thread(target=own.close)
    closer.start()
    deadline = time.monotonic() + TIMEOUT_S
    while "shutting down" not in refusal_of(own):  # until then the queue is full
        assert time.monotonic() < deadline
        os.sched_yield()
    brake.release(1)
    closer.join(TIMEOUT_S)
    assert not closer.is_alive()
    assert (brake.wait().end, waiting.wait().end) == ("cancelled", "cancelled")
    with pytest.raises(OverloadedError, match="shutting down"):
        ask(own)
    own.close()


def test_requests_that_can_not_be_served_are_refused_where_they_come_in(engine) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        ask(engine, top_p=2.0)
    assert caught.value.param == "top_p"
    with pytest.raises(UsageError, match="fill_ids"):
        ask(engine, 0)
    with pytest.raises(InvalidRequestError) as caught:
        engine.tokenize([{"role": "user", "content": [{"type": "image"}]}])
    assert caught.value.code == "invalid_messages"


@pytest.mark.parametrize(
    ("settings", "ids"),
    [({"eos_token_id": [3, 5]}, {3, 5}), ({"eos_token_id": 3}, {3}), ({}, set()), (None, {7})],
)
def test_end_tokens_are_those_of_the_generation_settings_if_there_are_any(
    settings: dict[str, Any] | None, ids: set[int], tiny_model_dir, tmp_path: Path
) -> None:
    config = json.loads((tiny_model_dir("qwen2_5_vl") / "config.json").read_text())
    config["text_config"]["eos_token_id"] = 7
    (tmp_path / "config.json").write_text(json.dumps(config))
    if settings is not None:
        (tmp_path / "generation_config.json").write_text(json.dumps(settings))
    assert _end_ids(tmp_path) == ids


@pytest.mark.parametrize(
    "name", ["max_batch", "max_waiting", "prefill_chunk_tokens", "max_cache_tokens", "threads"]
)
def test_settings_out_of_range_are_named(name: str, tiny_model_dir) -> None:
    setting: dict[str, Any] = {name: 0}
    with pytest.raises(ConfigurationError, match=f"{name} has to be at least 1, got 0"):
        TransformersLanguage(str(tiny_model_dir("qwen2_5_vl")), **setting)


def refusal_of(engine: TransformersLanguage) -> str:
    """Why it takes no other prompt."""
    with pytest.raises(OverloadedError) as caught:
        ask(engine)
    return str(caught.value)


class CancelledMeanwhile(Answer):
    """An answer that is cancelled right after the engine has looked at it once."""

    looks = 0

    @property
    def is_cancelled(self) -> bool:
        self.looks += 1
        return self.looks > 1

    @is_cancelled.setter
    def is_cancelled(self, _: bool) -> None:
        pass


def test_who_is_cancelled_while_others_are_dropped_is_dropped_next(make_engine) -> None:
    """It is cancelled on another thread, at any moment: nobody may leave the queue without an end. Here, between two looks at it while
    another leaves."""
    own = make_engine(max_batch=1)
    brake, readers = Brake(1), [Reader(), Reader()]
    own.submit(make_prompt(4), SamplingParams(max_tokens=4, ignore_eos=True), on_delta=brake)
    brake.wait_at(1)
    first, second = (own.submit(make_prompt(5), SamplingParams(), on_delta=reader) for reader in readers)
    first.cancel()
    second.__class__ = CancelledMeanwhile
    brake.release(1)
    assert [reader.wait().end for reader in readers] == ["cancelled", "cancelled"]
    assert brake.wait().end == "length"
