"""Several ranks answer as one: real processes over Gloo, against the undivided model of the same checkpoint."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from embedwire.encode.interface import ChatPrompt
from embedwire.engines.transformers.encoder import TransformersEncoder
from embedwire.engines.transformers.language import load_language_half
from embedwire.engines.transformers.ranks import LeadingRunner
from embedwire.engines.transformers.reference import greedy_ids
from embedwire.errors import InvalidRequestError
from embedwire.language.interface import AssembledPrompt

sys.path.insert(0, str(Path(__file__).parent))  # so that the other processes can import it by its name
from rank_worker import STEPS, TIMEOUT_S, Group, Reader, ask, save_prompt, weights_of

pytestmark = [pytest.mark.model, pytest.mark.e2e]
FAMILIES = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "llava")
BY_ROWS = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")
BY_COLUMNS = ("o_proj", "down_proj")


@pytest.fixture(scope="module", params=[2, 4])
def group(request: pytest.FixtureRequest) -> Iterator[Group]:
    with Group(request.param) as group:
        yield group
        assert group.close() == [0] * (request.param - 1), "a clean stop leaves no process, and none aborts"


@pytest.fixture(scope="module")
def case(tiny_model_dir, picture) -> Callable[[str], tuple[list[AssembledPrompt], list[list[int]]]]:
    """``case(family)``: a prompt with an image and one of text alone, and what the undivided model says to each."""

    @cache
    def make(family: str) -> tuple[list[AssembledPrompt], list[list[int]]]:
        model = str(tiny_model_dir(family))
        encoder = TransformersEncoder(model, dtype="float32")
        prompts, answers = [], []
        for parts, media in (([{"type": "image"}], [picture(84, 56, 1)]), ([], [])):
            content = [*parts, {"type": "text", "text": "What is in the image?"}]
            chat = ChatPrompt([{"role": "user", "content": content}], media)
            prepared = encoder.prepare(chat)
            arrays: Any
            (arrays,) = encoder.encode([prepared])
            if not media:
                arrays = {"fill_ids": arrays["fill_ids"]}
            prompts.append(AssembledPrompt(**arrays, mrope_position_delta=prepared.mrope_position_delta))
            answers.append(greedy_ids(model, chat, max_tokens=STEPS, dtype="float32"))
        return prompts, answers

    return make


@pytest.mark.parametrize("family", FAMILIES)
def test_ranks_say_what_the_undivided_model_says(
    family: str, group, case, tiny_model_dir, tmp_path: Path
) -> None:
    """Rows of an image of which each rank has a copy, the same rows sent by rank 0, and text alone; alone and merged."""
    (image, text), (image_ids, text_ids) = case(family)
    own = replace(image, key=(7, 1))
    save_prompt(tmp_path, own)
    with group.engine(tiny_model_dir(family), tmp_path) as engine:
        alone = ask(engine, own).wait().ids
        merged = [ask(engine, prompt) for prompt in (text, own, image)]
        assert [reader.wait().ids for reader in merged] == [text_ids, image_ids, image_ids]
        shares = [weights_of(engine._half), *group.weights]
    assert alone == image_ids != text_ids
    assert len(set(image_ids)) > 8, "the answer has too few different tokens to prove anything"
    assert group.hear() == [(None, [(7, 1), (7, 1)])] * (group.ranks.size - 1)
    check_shares(weights_of(load_language_half(tiny_model_dir(family), dtype="float32")), shares)


def check_shares(whole: dict[str, tuple[int, int]], shares: list[dict[str, tuple[int, int]]]) -> None:
    """Each rank holds 1/N of every matrix of every layer, in memory too, and all of what is small."""
    cut = 0
    for name, (numbers, _) in whole.items():
        kind = name.split(".")[-2] if name.startswith("layers.") else name
        size = len(shares)
        is_cut = kind in BY_ROWS or (kind in BY_COLUMNS and name.endswith("weight"))
        is_cut |= name == "head" and numbers // 64 % size == 0
        cut += is_cut
        for share in shares:
            assert share[name][0] * (size if is_cut else 1) == numbers, name
            if kind in BY_COLUMNS:  # parts by rows lie in one piece in the file, and stay mapped
                assert share[name][1] == share[name][0] * 4, name
    assert cut >= 3 * len(BY_ROWS + BY_COLUMNS)


@pytest.mark.failure_mode("abort-not-propagated", "block-freed-twice")
def test_answers_come_and_go_and_every_copy_is_let_go_once(
    group, case, tiny_model_dir, tmp_path: Path, monkeypatch
) -> None:
    """Cancelled in the prompt, in the queue and in a step; refused; ended with the first token."""
    (image, text), (image_ids, text_ids) = case("qwen2_5_vl")
    keyed = [replace(image, key=(room, 0)) for room in range(6)]
    for prompt in keyed:
        save_prompt(tmp_path, prompt)
    with group.engine(tiny_model_dir("qwen2_5_vl"), tmp_path, max_batch=4, prefill_chunk_tokens=8) as engine:
        others: list[Any] = []

        def crowd() -> None:
            others.extend(ask(engine, prompt) for prompt in (keyed[1], keyed[2], text))
            others[1].answer.cancel()

        first = ask(engine, keyed[0], Reader(3, crowd))
        stopped: Any = Reader(5, lambda: stopped.answer.cancel())
        ask(engine, text, stopped)
        assert first.wait().ids == image_ids
        assert [reader.wait().end for reader in others] == ["length", "cancelled", "length"]
        assert [others[0].ids, others[2].ids] == [image_ids, text_ids]
        assert (stopped.wait().end, stopped.ids) == ("cancelled", text_ids[:5])
        with pytest.raises(InvalidRequestError):
            ask(engine, keyed[3], top_p=2.0)
        assert ask(engine, keyed[4], max_tokens=1).wait().ids == image_ids[:1]
        in_its_prompt: Any = Reader()
        with monkeypatch.context() as patched:
            asked, read = threading.Event(), LeadingRunner.prefill

            def cancelled_after_its_first_chunk(*arguments: Any, **part: Any) -> Any:
                logits = read(*arguments, **part)
                assert asked.wait(TIMEOUT_S)
                in_its_prompt.answer.cancel()
                return logits

            patched.setattr(LeadingRunner, "prefill", cancelled_after_its_first_chunk)
            ask(engine, keyed[5], in_its_prompt)
            asked.set()
            assert in_its_prompt.wait().end == "cancelled"
        assert in_its_prompt.ids == []
        assert ask(engine, text).wait().ids == text_ids
    for error, read in group.hear():
        assert error is None
        assert sorted(read) == [(room, 0) for room in range(6)]


def test_bfloat16_crosses_the_ranks(group, case, tiny_model_dir, tmp_path: Path) -> None:
    """Sums in another order round otherwise, so ids may differ from the undivided model's; they are the same every time."""
    (_, text), _ = case("qwen3_vl")
    with group.engine(tiny_model_dir("qwen3_vl"), tmp_path, dtype="bfloat16") as engine:
        ids = ask(engine, text).wait().ids
        assert ask(engine, text).wait().ids == ids
        assert len(ids) == STEPS
    group.hear()
