"""The language half against the undivided model of the same checkpoint: equal bits, not close numbers.

The prompts are what the undivided model itself hands to its text model, caught by a hook, so nothing here
depends on an encoder of ours.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import safetensors
import torch
from transformers import AutoModelForImageTextToText

from embedwire.engines.transformers.batching import DecodeBatch
from embedwire.engines.transformers.checkpoint import dtype_of, load_config
from embedwire.engines.transformers.families import family_of
from embedwire.engines.transformers.language import LanguageHalf, as_tensor, load_language_half
from embedwire.engines.transformers.tiny_model import write_tiny_model
from embedwire.errors import ConfigurationError, UsageError
from embedwire.language.interface import AssembledPrompt

pytestmark = pytest.mark.model
STEPS = 32
FAMILIES = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "llava")
DTYPES = ("float32", "bfloat16")
IMAGES = {"text only": 0, "one image": 1, "three images": 3}


@pytest.fixture(scope="module")
def half(tiny_model_dir: Callable[[str], Path]) -> Callable[[str, str], LanguageHalf]:
    return cache(lambda family, dtype: load_language_half(tiny_model_dir(family), dtype=dtype))


@dataclass(frozen=True)
class Reference:
    """What the undivided model did. ``all_logits`` (T, V) of the prompt; ``logits`` (STEPS, V) and ``ids`` of
    its greedy answer, the first of them from the prompt."""

    prompt: AssembledPrompt
    all_logits: torch.Tensor
    logits: torch.Tensor
    ids: list[int]


@pytest.fixture(scope="module")
def reference(undivided: Callable[[str, str], Any]) -> Callable[[str, str, int], Reference]:
    return cache(lambda family, dtype, images: run_undivided(undivided(family, dtype), images))


def run_undivided(model: Any, images: int) -> Reference:
    inputs = model_inputs(model.config, images)
    calls: list[dict[str, Any]] = []
    text = model.model.language_model
    hook = text.register_forward_pre_hook(lambda _, __, kwargs: calls.append(kwargs), with_kwargs=True)
    with torch.inference_mode():
        all_logits = model(**inputs).logits[0]
        answer = model.generate(
            **inputs,
            do_sample=False,
            min_new_tokens=STEPS,
            max_new_tokens=STEPS,
            output_logits=True,
            return_dict_in_generate=True,
        )
    hook.remove()
    delta = getattr(model.model, "rope_deltas", None) if images else None
    ids = inputs["input_ids"][0]
    return Reference(
        prompt=caught_prompt(calls[0], ids, delta=0 if delta is None else int(delta)),
        all_logits=all_logits,
        logits=torch.cat(answer.logits),
        ids=answer.sequences[0, len(ids) :].tolist(),
    )


def model_inputs(config: Any, images: int) -> dict[str, torch.Tensor]:
    """Random text around random pictures of different shapes."""
    generator = torch.Generator().manual_seed(images)
    grids = torch.tensor([[1, 4, 6], [1, 8, 4], [1, 2, 2]])[:images]
    is_llava = config.model_type == "llava"
    rows = [16] * images if is_llava else (grids.prod(-1) // 4).tolist()
    parts = [torch.randint(0, 256, (7,), generator=generator)]
    for count in rows:
        parts += [torch.full((count,), config.image_token_id)]
        parts += [torch.randint(0, 256, (5,), generator=generator)]
    ids = torch.cat(parts)[None]
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if is_llava and images:
        inputs["pixel_values"] = torch.randn(images, 3, 56, 56, generator=generator)
    elif images:
        width = 3 * config.vision_config.temporal_patch_size * config.vision_config.patch_size**2
        inputs["pixel_values"] = torch.randn(int(grids.prod(-1).sum()), width, generator=generator)
        inputs["image_grid_thw"] = grids
        inputs["mm_token_type_ids"] = (ids == config.image_token_id).int()
    return inputs


def caught_prompt(kwargs: dict[str, Any], ids: torch.Tensor, *, delta: int) -> AssembledPrompt:
    """The arguments of the undivided model's text model, as a room would have brought them."""
    positions, rows = kwargs.get("position_ids"), kwargs.get("deepstack_visual_embeds")
    embeddings, deepstack = kwargs["inputs_embeds"][0], None
    if rows is not None:
        deepstack = embeddings.new_zeros(len(ids), len(rows), embeddings.shape[1])
        deepstack[kwargs["visual_pos_masks"][0]] = torch.stack(rows, 1)
    has_mrope = positions is not None and positions.ndim == 3
    return AssembledPrompt(
        fill_ids=ids.int().numpy(),
        input_embeddings=as_array(embeddings),
        mrope_positions=None
        if positions is None or not has_mrope
        else positions[-3:, 0].T.int().contiguous().numpy(),
        mrope_position_delta=delta,
        deepstack_embeddings=None if deepstack is None else as_array(deepstack),
    )


def as_array(tensor: torch.Tensor) -> np.ndarray:
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return tensor.numpy()


def answer_logits(
    half: LanguageHalf, prompt: AssembledPrompt, ids: list[int], chunk: int = 10**6
) -> torch.Tensor:
    """Logits of each step when the answer is ``ids``, by way of a batch of one."""
    cache, tokens = half.new_cache(), len(prompt.fill_ids)
    for start in range(0, tokens, chunk):
        logits = half.prefill(prompt, cache, start=start, end=min(tokens, start + chunk))
    steps, batch = [logits], DecodeBatch()
    batch.join(cache)
    for step, token in enumerate(ids[:-1]):
        position = tokens + prompt.mrope_position_delta + step
        steps.append(batch.decode(half, [token], positions=[position]))
    return torch.cat(steps)


@pytest.mark.parametrize("images", IMAGES.values(), ids=IMAGES.keys())
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_logit_equals_the_undivided_model(
    family: str, dtype: str, images: int, half, reference
) -> None:
    """All positions of the prompt and 32 steps of decoding, to the last bit."""
    expected, own = reference(family, dtype, images), half(family, dtype)
    prompt = own_layout(own, expected.prompt)
    assert torch.equal(own.prefill(prompt, own.new_cache(), all_positions=True), expected.all_logits)
    assert torch.equal(answer_logits(own, prompt, expected.ids).float(), expected.logits)
    assert len(set(expected.ids)) > 8, "the answer has too few different tokens to prove anything"


def own_layout(half: LanguageHalf, prompt: AssembledPrompt) -> AssembledPrompt:
    """A text-only prompt reaches the undivided text model without what the layout names: fill it up."""
    missing: dict[str, Any] = {
        field.name: np.zeros((len(prompt.fill_ids), *field.shape), field.numpy_dtype)
        for field in half.layout
        if getattr(prompt, field.name) is None
    }
    if "mrope_positions" in missing:
        missing["mrope_positions"] += np.arange(len(prompt.fill_ids), dtype=np.int32)[:, None]
    prompt = replace(prompt, **missing)
    half.check(prompt)
    return prompt


@pytest.mark.failure_mode("no-media")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("family", FAMILIES)
def test_text_without_embeddings_is_embedded_here(family: str, dtype: str, half, reference) -> None:
    """A prompt of ids only."""
    expected, own = reference(family, dtype, 0), half(family, dtype)
    prompt = AssembledPrompt(fill_ids=expected.prompt.fill_ids)
    own.check(prompt)
    assert torch.equal(answer_logits(own, prompt, expected.ids).float(), expected.logits)


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"])
def test_positions_matter(family: str, half, reference) -> None:
    """The control: positions that only count up, or a lost delta, give other logits."""
    expected, own = reference(family, "float32", 3), half(family, "float32")
    assert expected.prompt.mrope_position_delta < 0
    counted = np.arange(len(expected.prompt.fill_ids), dtype=np.int32)[:, None].repeat(3, 1)
    for wrong in ({"mrope_positions": counted}, {"mrope_position_delta": 0}):
        logits = answer_logits(own, replace(expected.prompt, **wrong), expected.ids)
        assert (logits - expected.logits).abs().max() > 0.1


def test_deepstack_matters(half, reference) -> None:
    """The control: without its deepstack rows Qwen3-VL says something else."""
    expected, own = reference("qwen3_vl", "float32", 1), half("qwen3_vl", "float32")
    lost = replace(expected.prompt, deepstack_embeddings=np.zeros_like(expected.prompt.deepstack_embeddings))
    assert (answer_logits(own, lost, expected.ids) - expected.logits).abs().max() > 0.1


@pytest.mark.parametrize("chunk", [1, 7, 16])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_prompt_in_chunks_says_the_same(family: str, chunk: int, half, reference) -> None:
    """Cuts inside and between images; a chunk without any."""
    expected, own = reference(family, "float32", 3), half(family, "float32")
    logits = answer_logits(own, expected.prompt, expected.ids, chunk)
    torch.testing.assert_close(logits, expected.logits, atol=1e-3, rtol=0)


@pytest.mark.parametrize("family", FAMILIES)
def test_only_its_own_tensors_are_read(family: str, tiny_model_dir, monkeypatch: pytest.MonkeyPatch) -> None:
    """Text model, embedding table and head: counted tensor by tensor, and in bytes."""
    read: dict[str, int] = {}
    every: dict[str, int] = {}
    for shard in tiny_model_dir(family).glob("*.safetensors"):
        every |= {name: t.nbytes for name, t in safetensors.torch.load_file(shard).items()}
    original = safetensors.safe_open

    class Counting:
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            self._file = original(*args, **kwargs)

        def __enter__(self) -> Counting:
            return self

        def __exit__(self, *_: object) -> None:
            return None

        def keys(self) -> list[str]:
            return list(self._file.keys())

        def get_tensor(self, name: str) -> torch.Tensor:
            tensor = self._file.get_tensor(name)
            read[name] = tensor.nbytes
            return tensor

    monkeypatch.setattr("embedwire.engines.transformers.checkpoint.safe_open", Counting)
    load_language_half(tiny_model_dir(family), dtype="float32")
    canonical = family_of(load_config(tiny_model_dir(family))).canonical
    expected = {name: n for name, n in every.items() if "tower" not in name and "visual" not in name}
    expected = {name: n for name, n in expected.items() if "projector" not in name}
    assert read == expected
    assert {canonical(name).split(".")[0] for name in read} == {"model", "lm_head"}
    assert sum(read.values()) < sum(every.values())


def test_a_tied_head_is_the_embedding_table(tmp_path: Path) -> None:
    """``tie_word_embeddings`` stands in the outer configuration; a half that misses it has a random head."""
    path = write_tiny_model(tmp_path, "qwen2_5_vl", tied=True)
    undivided = AutoModelForImageTextToText.from_pretrained(path, dtype=torch.float32).eval()
    expected = run_undivided(undivided, 1)
    own = load_language_half(path, dtype="float32")
    assert torch.equal(answer_logits(own, expected.prompt, expected.ids), expected.logits)


def test_a_head_in_the_checkpoint_counts_though_the_configuration_says_tied(tmp_path: Path) -> None:
    """As transformers reads such a checkpoint."""
    path = write_tiny_model(tmp_path, "qwen2_5_vl")
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    undivided = AutoModelForImageTextToText.from_pretrained(path, dtype=torch.float32).eval()
    expected = run_undivided(undivided, 1)
    own = load_language_half(path, dtype="float32")
    assert torch.equal(answer_logits(own, expected.prompt, expected.ids), expected.logits)


@pytest.mark.parametrize("dtype", DTYPES)
def test_arrays_become_tensors_over_the_same_memory(dtype: str) -> None:
    array = np.arange(6).reshape(2, 3).astype(ml_dtypes.bfloat16 if dtype == "bfloat16" else np.float32)
    tensor = as_tensor(array)
    assert tensor.dtype == dtype_of(dtype)
    assert tensor.data_ptr() == array.ctypes.data
    assert tensor.tolist() == [[0, 1, 2], [3, 4, 5]]


@pytest.mark.failure_mode("layouts-differ")
def test_prompts_of_another_layout_are_refused(half, reference) -> None:
    """The error names each wrong field."""
    own, good = half("qwen3_vl", "float32"), reference("qwen3_vl", "float32", 1).prompt
    own.check(good)
    wrong: list[tuple[str, dict[str, Any]]] = [
        ("input_embeddings", {"input_embeddings": good.input_embeddings[:-1]}),
        ("input_embeddings", {"input_embeddings": good.input_embeddings.astype(ml_dtypes.bfloat16)}),
        ("deepstack_embeddings", {"deepstack_embeddings": None}),
        ("mrope_positions", {"mrope_positions": good.mrope_positions.T}),
        ("fill_ids", {"fill_ids": good.fill_ids.astype(np.int64)}),
        ("fill_ids", {"fill_ids": good.fill_ids + 10**6}),
        ("fill_ids", {"fill_ids": good.fill_ids - 10**6}),
    ]
    for name, change in wrong:
        with pytest.raises(UsageError, match=name):
            own.check(replace(good, **change))
    with pytest.raises(UsageError, match="fill_ids"):
        own.check(AssembledPrompt(fill_ids=np.empty(0, np.int32)))


@pytest.mark.parametrize(
    ("setting", "value"),
    [("sliding_window", 16), ("rope_type", "dynamic")],
)
def test_what_would_be_wrong_is_refused(setting: str, value: Any, tiny_model_dir, monkeypatch) -> None:
    config = load_config(tiny_model_dir("llava"))
    if setting == "rope_type":
        config.text_config.rope_parameters["rope_type"] = value
    else:
        setattr(config.text_config, setting, value)
    monkeypatch.setattr("embedwire.engines.transformers.language.load_config", lambda _: config)
    with pytest.raises(ConfigurationError, match="not supported"):
        load_language_half(tiny_model_dir("llava"), dtype="float32")
