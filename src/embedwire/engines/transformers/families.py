"""What differs between model families, as one table. Adding a family is one entry in ``FAMILIES``.

Owns: where a checkpoint keeps its tower, text model and head; how many tokens an image becomes; which fields
its tokens carry. Must not know: weights, prompts, threads. Pure functions over configurations; called by this
package only.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from embedwire.errors import ConfigurationError
from embedwire.memory import layout

TEXT_PREFIX = "model.language_model."
EMBEDDING_KEY = "model.language_model.embed_tokens.weight"
HEAD_KEY = "lm_head.weight"

Counter = Callable[[Any, Mapping[str, Any]], list[int]]


@dataclass(frozen=True, slots=True)
class Family:
    """One family of vision-language models.

    ``name`` is the ``model_type`` of its configuration. ``renames`` are pairs (prefix in a checkpoint, prefix
    in the undivided model of transformers); the first that matches wins, so both the layout on the Hub and
    the one of today are read. ``tower_prefixes`` name what turns pixels into rows. ``count_rows`` takes the
    configuration and the output of the image processor, and gives for each image the number of rows that the
    tower will make of it, and so of placeholders.
    """

    name: str
    renames: tuple[tuple[str, str], ...]
    tower_prefixes: tuple[str, ...]
    mrope: bool
    count_rows: Counter

    def canonical(self, key: str) -> str:
        """The name in the undivided model of transformers for a tensor's name in a checkpoint."""
        for old, new in self.renames:
            if key.startswith(old):
                return new + key[len(old) :]
        return key

    def is_encode_key(self, key: str) -> bool:
        """Whether the encode half needs the tensor of this canonical name: its tower, and the embedding
        table."""
        return key == EMBEDDING_KEY or key.startswith(self.tower_prefixes)

    def is_language_key(self, key: str) -> bool:
        """Whether the language half needs the tensor of this canonical name: text model, embedding table and
        head."""
        return key == HEAD_KEY or key.startswith(TEXT_PREFIX)


def _rows_of_grid(config: Any, pixels: Mapping[str, Any]) -> list[int]:
    merged: int = config.vision_config.spatial_merge_size**2
    return [int(patches) // merged for patches in pixels["image_grid_thw"].prod(-1)]


_CLASS_TOKENS = {"clip_vision_model": 1, "siglip_vision_model": 0}


def _rows_of_square(config: Any, pixels: Mapping[str, Any]) -> list[int]:
    vision = config.vision_config
    images, _, height, width = pixels["pixel_values"].shape
    dropped = 1 if config.vision_feature_select_strategy == "default" else 0
    rows = (height // vision.patch_size) * (width // vision.patch_size)
    return [rows + _CLASS_TOKENS[vision.model_type] - dropped] * images


_QWEN_RENAMES = (
    ("visual.", "model.visual."),
    ("model.visual.", "model.visual."),
    (TEXT_PREFIX, TEXT_PREFIX),
    ("model.", TEXT_PREFIX),
)
_LLAVA_RENAMES = (
    ("language_model.lm_head.", "lm_head."),
    ("language_model.model.", TEXT_PREFIX),
    ("vision_tower.vision_model.", "model.vision_tower."),
    ("model.vision_tower.vision_model.", "model.vision_tower."),
    ("vision_tower.", "model.vision_tower."),
    ("multi_modal_projector.", "model.multi_modal_projector."),
)
_LLAVA_TOWER = ("model.vision_tower.", "model.multi_modal_projector.")

FAMILIES: Mapping[str, Family] = {
    family.name: family
    for family in (
        Family("qwen2_vl", _QWEN_RENAMES, ("model.visual.",), True, _rows_of_grid),
        Family("qwen2_5_vl", _QWEN_RENAMES, ("model.visual.",), True, _rows_of_grid),
        Family("qwen3_vl", _QWEN_RENAMES, ("model.visual.",), True, _rows_of_grid),
        Family("llava", _LLAVA_RENAMES, _LLAVA_TOWER, False, _rows_of_square),
    )
}


def family_of(config: Any) -> Family:
    """The family of a transformers configuration. Raises ConfigurationError, which names the supported
    ones."""
    family = FAMILIES.get(config.model_type)
    if family is None:
        raise ConfigurationError(
            f"model type {config.model_type!r} is not supported; supported are {', '.join(FAMILIES)}"
        )
    tower = config.vision_config.model_type
    if family.count_rows is _rows_of_square and tower not in _CLASS_TOKENS:
        raise ConfigurationError(
            f"a {family.name} model with a {tower!r} tower is not supported; "
            f"supported are {', '.join(_CLASS_TOKENS)}"
        )
    return family


def deepstack_levels_of(config: Any) -> int:
    """How many layers of the text model take rows of the tower besides the first (Qwen3-VL); 0 for other
    families."""
    return len(getattr(config.vision_config, "deepstack_visual_indexes", ()))


def layout_of(config: Any, *, dtype: str) -> layout.Layout:
    """The fields of a prompt room of this model. ``dtype`` is a key of
    :data:`embedwire.memory.layout.DTYPES`."""
    return layout.multimodal(
        config.text_config.hidden_size,
        dtype=dtype,
        mrope=family_of(config).mrope,
        deepstack_levels=deepstack_levels_of(config),
    )
