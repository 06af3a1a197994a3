"""The encode half gives, bit for bit, what the undivided model makes of the same prompt, and reads only its
own weights."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from safetensors import safe_open

from embedwire.encode.interface import ChatPrompt, EncoderEngine, PreparedPrompt
from embedwire.engines.transformers import checkpoint
from embedwire.engines.transformers.encoder import TransformersEncoder
from embedwire.engines.transformers.families import FAMILIES
from embedwire.engines.transformers.tiny_model import write_tiny_model
from embedwire.errors import ConfigurationError, InvalidRequestError

pytestmark = pytest.mark.model

Encoders = Callable[[str, str], TransformersEncoder]
Picture = Callable[..., bytes]
SIZES = [(84, 56), (200, 120), (333, 90)]
DTYPES = ["float32", "bfloat16"]


def chat(images: int, words: str = "What is in the image?") -> list[dict[str, Any]]:
    content = [*[{"type": "image"}] * images, {"type": "text", "text": words}]
    return [{"role": "system", "content": "Be brief."}, {"role": "user", "content": content}]


@pytest.fixture(scope="session")
def encoder(tiny_model_dir: Callable[[str], Path]) -> Encoders:
    @functools.cache
    def load(family: str, dtype: str) -> TransformersEncoder:
        return TransformersEncoder(str(tiny_model_dir(family)), dtype=dtype)

    return load


@pytest.fixture
def prompt(picture: Picture) -> Callable[[int], ChatPrompt]:
    def make(images: int) -> ChatPrompt:
        return ChatPrompt(chat(images), [picture(*SIZES[i], i) for i in range(images)])

    return make


def undivided_inputs(model: Any, prepared: PreparedPrompt) -> Mapping[str, Any]:
    """What the text model inside the undivided one is called with for this prompt."""
    processed = prepared.inputs.processed
    ids = torch.from_numpy(processed.ids).long()[None]
    inputs = {name: torch.from_numpy(array) for name, array in processed.pixels.items()}
    if FAMILIES[model.config.model_type].mrope:
        inputs["mm_token_type_ids"] = (ids == model.config.image_token_id).int()
    seen: dict[str, Any] = {}
    hook = model.model.language_model.register_forward_pre_hook(
        lambda _module, _args, kwargs: seen.update(kwargs), with_kwargs=True
    )
    try:
        with torch.inference_mode():
            model(input_ids=ids, **inputs)
    finally:
        hook.remove()
    return seen


def same_bits(array: np.ndarray, tensor: torch.Tensor) -> bool:
    if tensor.dtype == torch.bfloat16:
        assert array.dtype == ml_dtypes.bfloat16
        return np.array_equal(array.view(np.int16), tensor.view(torch.int16).numpy())
    return np.array_equal(array, tensor.numpy())


@pytest.fixture(params=[(f, d, n) for f in FAMILIES for d in DTYPES for n in (0, 1, 3)], ids=str)
def case(
    request: pytest.FixtureRequest,
    encoder: Encoders,
    undivided: Callable[[str, str], Any],
    prompt: Callable[[int], ChatPrompt],
) -> tuple[PreparedPrompt, Mapping[str, np.ndarray], Mapping[str, Any]]:
    """A prompt with no image, one or three: prepared, encoded, and as the undivided model saw it."""
    family, dtype, images = request.param
    engine = encoder(family, dtype)
    prepared = engine.prepare(prompt(images))
    (arrays,) = engine.encode([prepared])
    return prepared, arrays, undivided_inputs(undivided(family, dtype), prepared)


@pytest.mark.failure_mode("no-media")
def test_bit_equal_to_the_undivided_model(
    case: tuple[PreparedPrompt, Mapping[str, np.ndarray], Mapping[str, Any]],
) -> None:
    """Embeddings, positions and deepstack rows (zero for text), also for text alone."""
    prepared, arrays, seen = case
    assert same_bits(arrays["input_embeddings"], seen["inputs_embeds"][0])
    if "mrope_positions" in arrays:
        positions = arrays["mrope_positions"]
        if seen["position_ids"] is None:  # the undivided model counts text alone later, in its text model
            expected = np.repeat(np.arange(prepared.total_tokens)[:, None], 3, axis=1)
        else:
            expected = seen["position_ids"][:, 0].T.numpy()
        assert np.array_equal(positions, expected)
        assert prepared.mrope_position_delta == positions.max() + 1 - prepared.total_tokens
    if "deepstack_embeddings" in arrays:
        deepstack = arrays["deepstack_embeddings"]
        mask = seen.get("visual_pos_masks")
        rows = np.zeros(prepared.total_tokens, bool) if mask is None else mask[0].numpy()
        assert not deepstack[~rows].view(np.uint8).any()
        for level, expected_rows in enumerate(seen.get("deepstack_visual_embeds") or ()):
            assert same_bits(np.ascontiguousarray(deepstack[rows, level]), expected_rows)


def test_arrays_are_as_the_layout_says(
    case: tuple[PreparedPrompt, Mapping[str, np.ndarray], Mapping[str, Any]],
    request: pytest.FixtureRequest,
    encoder: Encoders,
) -> None:
    prepared, arrays, _ = case
    family, dtype, _ = request.node.callspec.params["case"]
    layout = encoder(family, dtype).layout
    assert list(arrays) == [field.name for field in layout]
    for field in layout:
        array = arrays[field.name]
        assert (array.shape, array.dtype) == ((prepared.total_tokens, *field.shape), field.numpy_dtype)
        assert array.flags.c_contiguous
        assert array.flags.writeable


@pytest.mark.failure_mode("position-delta-reduced")
@pytest.mark.parametrize("family", [name for name in FAMILIES if FAMILIES[name].mrope])
def test_positions_and_delta_are_known_before_the_tower_has_run(
    family: str,
    encoder: Encoders,
    undivided: Callable[[str, str], Any],
    prompt: Callable[[int], ChatPrompt],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The delta is negative, so a default of 0 could not replace it unnoticed."""
    engine = encoder(family, "float32")
    monkeypatch.setattr(engine._model, "get_image_features", None)
    prepared = engine.prepare(prompt(3))
    processed = prepared.inputs.processed
    ids = torch.from_numpy(processed.ids).long()[None]
    model = undivided(family, "float32").model
    positions, delta = model.get_rope_index(
        ids,
        mm_token_type_ids=(ids == model.config.image_token_id).int(),
        image_grid_thw=torch.from_numpy(processed.pixels["image_grid_thw"]),
    )
    assert prepared.total_tokens == ids.shape[1]
    assert prepared.mrope_position_delta == int(delta) < -20
    assert np.array_equal(prepared.inputs.positions, positions[:, 0].T.numpy())


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_neighbours_in_a_batch_change_no_bit(
    family: str, dtype: str, encoder: Encoders, prompt: Callable[[int], ChatPrompt]
) -> None:
    engine = encoder(family, dtype)
    batch = [engine.prepare(prompt(images)) for images in (1, 0, 3)]
    together = list(engine.encode(batch))
    for prepared, arrays in zip(batch, together, strict=True):
        (alone,) = engine.encode([prepared])
        assert all(np.array_equal(alone[name].view(np.uint8), arrays[name].view(np.uint8)) for name in alone)


def test_what_the_caller_does_to_its_arrays_reaches_nobody(
    encoder: Encoders, prompt: Callable[[int], ChatPrompt]
) -> None:
    engine = encoder("qwen3_vl", "float32")
    prepared = engine.prepare(prompt(0))
    (first,) = engine.encode([prepared])
    expected = {name: array.copy() for name, array in first.items()}
    for array in first.values():
        array.fill(7)
    (second,) = engine.encode([prepared])
    assert all(np.array_equal(second[name], expected[name]) for name in expected)


@pytest.mark.failure_mode("bytes-of-another-room")
def test_the_picture_is_in_the_embedding(encoder: Encoders, picture: Picture) -> None:
    """Every image yields rows of its own."""
    engine = encoder("qwen2_5_vl", "float32")
    rows = {
        next(engine.encode([engine.prepare(ChatPrompt(chat(1), [picture(seed=seed)]))]))[
            "input_embeddings"
        ].tobytes()
        for seed in range(5)
    }
    assert len(rows) == 5


class CountingFile:
    """Stands in for ``safe_open`` and keeps the books on what is read."""

    read: dict[str, int] = {}  # noqa: RUF012

    def __init__(self, path: Path, framework: str) -> None:
        self._file = safe_open(path, framework=framework)

    def __enter__(self) -> CountingFile:
        self._file.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self._file.__exit__(*error)

    def get_tensor(self, name: str) -> torch.Tensor:
        tensor: torch.Tensor = self._file.get_tensor(name)
        self.read[name] = tensor.nbytes
        return tensor


@pytest.mark.parametrize("family", FAMILIES)
def test_only_the_weights_of_this_half_are_read(
    family: str, tiny_model_dir: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tiny_model_dir(family)
    index = json.loads((path / "model.safetensors.index.json").read_text())
    own = ("visual.", "model.visual.", "vision_tower.", "multi_modal_projector.")
    expected = {name for name in index["weight_map"] if name.startswith(own) or "embed_tokens" in name}
    monkeypatch.setattr(checkpoint, "safe_open", CountingFile)
    monkeypatch.setattr(CountingFile, "read", {})
    engine = TransformersEncoder(str(path), dtype="float32")
    assert set(CountingFile.read) == expected
    held = sum(parameter.nbytes for parameter in engine._model.parameters())
    assert sum(CountingFile.read.values()) == held < index["metadata"]["total_size"] * 0.75
    assert not any(parameter.is_meta for parameter in engine._model.parameters())


def test_weights_in_the_dtype_of_the_file_stay_in_the_file(tmp_path: Path) -> None:
    """Memory-mapped, so several servers on one host share the pages: no parameter owns resident memory of its
    own."""
    engine = TransformersEncoder(str(write_tiny_model(tmp_path, "qwen2_5_vl", dtype="bfloat16")))
    maps = [
        line.split() for line in Path("/proc/self/maps").read_text().splitlines() if str(tmp_path) in line
    ]
    spans = [tuple(int(edge, 16) for edge in line[0].split("-")) for line in maps]
    for parameter in engine._model.parameters():
        assert any(low <= parameter.data_ptr() < high for low, high in spans)


def test_it_is_an_encoder_engine(encoder: Encoders, tiny_model_dir: Callable[[str], Path]) -> None:
    engine: EncoderEngine = encoder("qwen2_5_vl", "float32")
    assert engine.model_name == str(tiny_model_dir("qwen2_5_vl"))
    assert engine.max_tokens == 131072


@pytest.mark.failure_mode("request-never-fits")
@pytest.mark.parametrize("family", FAMILIES)
def test_a_prompt_over_the_models_context_is_refused(family: str, tmp_path: Path, picture: Picture) -> None:
    """A prompt longer than the context is refused before the tower runs."""
    engine = TransformersEncoder(str(write_tiny_model(tmp_path, family, max_position=48)))
    assert engine.max_tokens == 48
    with pytest.raises(InvalidRequestError) as caught:
        engine.prepare(ChatPrompt(chat(3), [picture()] * 3))
    assert caught.value.code == "context_length_exceeded"


def test_a_checkpoint_that_lacks_a_tensor_is_refused(tmp_path: Path) -> None:
    write_tiny_model(tmp_path, "llava")
    index = tmp_path / "model.safetensors.index.json"
    names = json.loads(index.read_text())
    del names["weight_map"]["multi_modal_projector.linear_1.bias"]
    index.write_text(json.dumps(names))
    with pytest.raises(ConfigurationError, match=r"multi_modal_projector\.linear_1\.bias"):
        TransformersEncoder(str(tmp_path))
