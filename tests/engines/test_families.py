"""The table of families, held against what the checkpoints say."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from transformers import AutoConfig

from embedwire.engines.transformers.checkpoint import load_config
from embedwire.engines.transformers.families import FAMILIES, family_of, layout_of
from embedwire.errors import ConfigurationError

pytestmark = pytest.mark.model


@pytest.mark.parametrize("name", FAMILIES)
def test_every_tensor_of_a_checkpoint_has_the_name_that_the_undivided_model_gives_it(
    name: str, tiny_model_dir: Callable[[str], Path], undivided: Callable[[str, str], Any]
) -> None:
    index = json.loads((tiny_model_dir(name) / "model.safetensors.index.json").read_text())["weight_map"]
    assert {FAMILIES[name].canonical(key) for key in index} == set(undivided(name, "float32").state_dict())


@pytest.mark.parametrize("name", FAMILIES)
def test_names_of_today_stay_as_they_are(name: str, undivided: Callable[[str, str], Any]) -> None:
    for key in undivided(name, "float32").state_dict():
        assert FAMILIES[name].canonical(key) == key


@pytest.mark.parametrize("name", FAMILIES)
def test_the_halves_share_the_embedding_table_and_nothing_else(
    name: str, undivided: Callable[[str, str], Any]
) -> None:
    family = FAMILIES[name]
    keys = set(undivided(name, "float32").state_dict())
    encode = {key for key in keys if family.is_encode_key(key)}
    language = {key for key in keys if family.is_language_key(key)}
    assert encode | language == keys
    assert encode & language == {"model.language_model.embed_tokens.weight"}


@pytest.mark.parametrize(
    ("name", "key", "expected"),
    [
        ("qwen2_5_vl", "visual.blocks.0.norm1.weight", "model.visual.blocks.0.norm1.weight"),
        (
            "qwen2_5_vl",
            "model.layers.0.mlp.up_proj.weight",
            "model.language_model.layers.0.mlp.up_proj.weight",
        ),
        ("qwen2_5_vl", "lm_head.weight", "lm_head.weight"),
        ("llava", "language_model.model.embed_tokens.weight", "model.language_model.embed_tokens.weight"),
        ("llava", "language_model.lm_head.weight", "lm_head.weight"),
        ("llava", "vision_tower.vision_model.pre_layrnorm.bias", "model.vision_tower.pre_layrnorm.bias"),
        ("llava", "multi_modal_projector.linear_1.bias", "model.multi_modal_projector.linear_1.bias"),
    ],
)
def test_names_on_the_hub(name: str, key: str, expected: str) -> None:
    assert FAMILIES[name].canonical(key) == expected


def test_an_unknown_family_is_refused_and_the_known_ones_are_named() -> None:
    with pytest.raises(ConfigurationError, match=r"'gpt2'.*qwen2_vl, qwen2_5_vl, qwen3_vl, llava"):
        family_of(AutoConfig.for_model("gpt2"))


def test_a_tower_whose_rows_can_not_be_counted_is_refused() -> None:
    config = AutoConfig.for_model("llava", vision_config={"model_type": "pixtral"})
    with pytest.raises(ConfigurationError, match="'pixtral' tower"):
        family_of(config)


def test_layouts(tiny_model_dir: Callable[[str], Path]) -> None:
    described = {
        name: layout_of(load_config(tiny_model_dir(name)), dtype="bfloat16").describe() for name in FAMILIES
    }
    embeddings, ids, positions = (
        "input_embeddings bfloat16[64]",
        "fill_ids int32[]",
        "mrope_positions int32[3]",
    )
    assert described == {
        "qwen2_vl": (embeddings, ids, positions),
        "qwen2_5_vl": (embeddings, ids, positions),
        "qwen3_vl": (embeddings, ids, positions, "deepstack_embeddings bfloat16[3, 64]"),
        "llava": (embeddings, ids),
    }


@pytest.mark.parametrize(
    ("tower", "strategy", "rows"),
    [
        ("clip_vision_model", "default", 16),
        ("clip_vision_model", "full", 17),
        ("siglip_vision_model", "full", 16),
    ],
)
def test_rows_of_a_square_tower_follow_the_pixels(tower: str, strategy: str, rows: int) -> None:
    vision = SimpleNamespace(model_type=tower, patch_size=14)
    config = SimpleNamespace(vision_config=vision, vision_feature_select_strategy=strategy)
    pixels = {"pixel_values": np.zeros((2, 3, 56, 56), np.float32)}
    assert FAMILIES["llava"].count_rows(config, pixels) == [rows, rows]


def test_rows_of_a_grid() -> None:
    config = SimpleNamespace(vision_config=SimpleNamespace(spatial_merge_size=2))
    pixels = {"image_grid_thw": np.array([[1, 4, 6], [1, 2, 2]])}
    assert FAMILIES["qwen2_5_vl"].count_rows(config, pixels) == [6, 1]
