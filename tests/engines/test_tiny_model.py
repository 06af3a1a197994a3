"""The tiny checkpoints are what other tests lean on: they load, they wander, they look."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from transformers import AutoTokenizer, GenerationConfig

from embedwire.encode.interface import ChatPrompt
from embedwire.engines.transformers.checkpoint import load_config, read_tensors
from embedwire.engines.transformers.families import FAMILIES
from embedwire.engines.transformers.processing import PromptProcessor
from embedwire.engines.transformers.tiny_model import write_tiny_model
from embedwire.errors import ConfigurationError

pytestmark = pytest.mark.model

MESSAGES = [
    {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is in the image?"}]}
]


def everything(path: Path) -> dict[str, torch.Tensor]:
    return read_tensors(path, lambda name: name, dtype=torch.float32)


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_answers_wander_and_depend_on_the_picture(
    family: str,
    tiny_model_dir: Callable[[str], Path],
    undivided: Callable[[str, str], Any],
    picture: Callable[..., bytes],
) -> None:
    model = undivided(family, "float32")
    processor = PromptProcessor(tiny_model_dir(family), model.config, max_tokens=1000)
    red = io.BytesIO()
    Image.new("RGB", (84, 56), "red").save(red, "PNG")
    answers = []
    for data in (picture(seed=1), picture(seed=2), red.getvalue()):
        processed = processor.process(ChatPrompt(MESSAGES, [data]))
        ids = torch.from_numpy(processed.ids).long()[None]
        inputs = {name: torch.from_numpy(array) for name, array in processed.pixels.items()}
        if FAMILIES[family].mrope:
            inputs["mm_token_type_ids"] = (ids == model.config.image_token_id).int()
        output = model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), **inputs, min_new_tokens=32, max_new_tokens=32
        )
        answers.append(tuple(output[0, ids.shape[1] :].tolist()))
    assert len(set(answers)) == 3
    assert all(len(set(answer)) >= 12 for answer in answers), answers


@pytest.mark.parametrize("family", FAMILIES)
def test_the_context_is_long_and_the_weights_lie_in_several_shards(
    family: str, tiny_model_dir: Callable[[str], Path]
) -> None:
    path = tiny_model_dir(family)
    shards = set(json.loads((path / "model.safetensors.index.json").read_text())["weight_map"].values())
    config = load_config(path)
    assert len(shards) >= 2
    assert config.text_config.max_position_embeddings >= 32768
    assert config.text_config.vocab_size == len(AutoTokenizer.from_pretrained(path))


def test_equal_arguments_give_equal_weights(tmp_path: Path, tiny_model_dir: Callable[[str], Path]) -> None:
    torch.manual_seed(999)
    before = torch.get_rng_state()
    first = everything(tiny_model_dir("llava"))
    again = everything(write_tiny_model(tmp_path / "again", "llava"))
    other = everything(write_tiny_model(tmp_path / "other", "llava", seed=1))
    assert first.keys() == again.keys() == other.keys()
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["language_model.lm_head.weight"], other["language_model.lm_head.weight"])
    assert torch.equal(before, torch.get_rng_state())


def test_a_tied_model_has_no_head(tmp_path: Path) -> None:
    tensors = everything(write_tiny_model(tmp_path, "qwen3_vl", tied=True))
    assert "lm_head.weight" not in tensors
    assert load_config(tmp_path).text_config.tie_word_embeddings


def test_dtype_and_context_are_as_asked(tmp_path: Path) -> None:
    write_tiny_model(tmp_path, "qwen2_5_vl", dtype="bfloat16", max_position=77)
    config = load_config(tmp_path)
    assert (config.dtype, config.text_config.max_position_embeddings) == (torch.bfloat16, 77)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_id_is_text_and_every_text_has_ids(family: str, tiny_model_dir: Callable[[str], Path]) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir(family))
    text = "Grüße, 世界! 🙂\n\tdef f(x): return x"
    assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) == text
    assert all(tokenizer.decode([id_]) for id_ in range(len(tokenizer)))
    assert GenerationConfig.from_pretrained(tiny_model_dir(family)).eos_token_id == [tokenizer.eos_token_id]


@pytest.mark.parametrize(("family", "scale"), [("gpt2", "tiny"), ("llava", "huge")])
def test_an_unknown_model_is_refused(family: str, scale: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"qwen2_vl, qwen2_5_vl, qwen3_vl, llava.*tiny, small, 400m"):
        write_tiny_model(tmp_path / "none", family, scale=scale)
    assert not (tmp_path / "none").exists()
