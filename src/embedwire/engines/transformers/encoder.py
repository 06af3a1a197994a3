"""The encode half of a vision-language model of transformers: its tower and its embedding table, and no layer
of text.

Owns: those weights, and the arrays of a prompt room made with them. Must not know: rooms, wires, HTTP.
``prepare`` is called from several threads, ``encode`` from one at a time (see
:class:`embedwire.encode.interface.EncoderEngine`).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import msgspec
import numpy as np
import torch
from msgspec import Struct
from torch import distributed, nn
from transformers import AutoModel

from embedwire.encode.interface import ChatPrompt, PreparedPrompt
from embedwire.engines.transformers.checkpoint import (
    build_on_meta,
    dtype_of,
    fill,
    load_config,
    read_tensors,
    resolve_model,
)
from embedwire.engines.transformers.families import deepstack_levels_of, family_of, layout_of
from embedwire.engines.transformers.image_shares import images_of, shares_of
from embedwire.engines.transformers.images import MAX_IMAGE_PIXELS
from embedwire.engines.transformers.parallel import TensorParallel
from embedwire.engines.transformers.processing import Processed, PromptProcessor
from embedwire.errors import RankError


@dataclass(frozen=True, slots=True)
class _Inputs:
    """What ``prepare`` hands to ``encode``. ``positions`` is (T, 3) int32, None for a model without mrope."""

    processed: Processed
    positions: np.ndarray | None


class _Encode(Struct, tag=True, frozen=True):
    """The prompt's arrays come with it."""

    key: tuple[int, int] | None


class _Close(Struct, tag=True, frozen=True):
    pass


_Call = _Encode | _Close


class TransformersEncoder:
    """An :class:`~embedwire.encode.interface.EncoderEngine` that runs on transformers.

    ``model`` is a directory or a Hub id, ``dtype`` that of the computation and of the embeddings. Raises
    ConfigurationError for a model of a family that is not supported, or a checkpoint that does not hold what
    its configuration says.

    With ``tensor_parallel`` each rank of that group has the whole engine. Rank 0 is called as ever; the others :meth:`follow`. The images
    of a prompt are shared out among the ranks, and all of them have all arrays in the end, equal on every rank. They are those of one rank
    but for rounding. An error on one rank breaks the group: rank 0 raises RankError from then on.
    """

    def __init__(
        self,
        model: str,
        *,
        dtype: str = "bfloat16",
        device: str = "cpu",
        max_image_pixels: int = MAX_IMAGE_PIXELS,
        tensor_parallel: TensorParallel | None = None,
    ) -> None:
        path = resolve_model(model)
        config = load_config(path)
        self.model_name = model
        self.layout = layout_of(config, dtype=dtype)
        self.max_tokens: int = config.text_config.max_position_embeddings
        self._image_token_id: int = config.image_token_id
        self._device = torch.device(device)
        self._config = config
        self._mrope = family_of(config).mrope
        self._levels = deepstack_levels_of(config)
        self._processor = PromptProcessor(
            path, config, max_tokens=self.max_tokens, max_image_pixels=max_image_pixels
        )
        self._model: Any = _load(path, config, dtype=dtype_of(dtype), device=device)
        self._ranks = tensor_parallel
        if tensor_parallel:
            tensor_parallel.wait_for_all()

    def prepare(self, prompt: ChatPrompt) -> PreparedPrompt:
        """Decode, resize and tokenize; the positions follow from the sizes of the images alone."""
        if self._ranks is not None:
            self._ranks.check()
        processed = self._processor.process(prompt)
        positions, delta = self._positions(processed) if self._mrope else (None, 0)
        return PreparedPrompt(
            len(processed.ids), delta, processed.content_hash, _Inputs(processed, positions)
        )

    def encode(self, batch: Sequence[PreparedPrompt]) -> Iterator[Mapping[str, np.ndarray]]:
        """One mapping of layout fields a prompt, bit-equal to what the undivided model merges for it alone.

        The tower runs once a prompt, when that is asked for. One run for a whole batch was up to a fifth faster on a CPU, but not
        bit-equal: its matrix products are cut up by size, and rows differed by 2e-6 in float32 (Qwen2.5-VL,
        two threads) and 0.03 in bfloat16 (CLIP), so an answer would have depended on its neighbours.
        """
        return map(self._encode_everywhere, batch)

    def follow(self, on_encoded: Callable[[tuple[int, int] | None, Mapping[str, np.ndarray]], None]) -> None:
        """On the other ranks: encode what rank 0 does until it closes. ``on_encoded`` gets each prompt's key and its arrays, owned by it,
        in the order of rank 0, on this thread. Raises RankError when the group breaks: end the process then."""
        assert self._ranks is not None
        decoder = msgspec.msgpack.Decoder(_Call)
        with self._ranks.in_step():
            while True:
                message, arrays = self._ranks.receive()
                call = decoder.decode(message)
                if isinstance(call, _Close):
                    return
                ids, positions = arrays.pop("fill_ids"), arrays.pop("mrope_positions", None)
                inputs = _Inputs(Processed(ids, b"", arrays), positions)
                on_encoded(call.key, self._encode_one(inputs))

    def close(self) -> None:
        """End what follows. Nothing to do without other ranks."""
        if self._ranks is not None and self._ranks.rank == 0:
            with suppress(RankError), self._ranks.in_step():
                self._ranks.send(msgspec.msgpack.encode(_Close()))

    def _encode_everywhere(self, prompt: PreparedPrompt) -> Mapping[str, np.ndarray]:
        inputs: _Inputs = prompt.inputs
        if self._ranks is None:
            return self._encode_one(inputs)
        arrays = {"fill_ids": inputs.processed.ids, **inputs.processed.pixels}
        if inputs.positions is not None:
            arrays["mrope_positions"] = inputs.positions
        with self._ranks.in_step():
            self._ranks.send(msgspec.msgpack.encode(_Encode(prompt.key)), arrays)
            return self._encode_one(inputs)

    def _encode_one(self, inputs: _Inputs) -> Mapping[str, np.ndarray]:
        with torch.inference_mode():
            return self._arrays(inputs)

    def _arrays(self, inputs: _Inputs) -> Mapping[str, np.ndarray]:
        processed = inputs.processed
        ids = torch.from_numpy(processed.ids).to(self._device)
        rows = self._model.get_input_embeddings()(ids)
        deepstack = rows.new_zeros(len(ids), self._levels, rows.shape[1]) if self._levels else None
        if processed.pixels:
            places = ids == self._image_token_id
            image_rows = self._image_rows(processed.pixels, like=rows)
            rows[places] = image_rows[:, 0]
            if deepstack is not None:
                deepstack[places] = image_rows[:, 1:]
        arrays = {"input_embeddings": _to_numpy(rows), "fill_ids": processed.ids.copy()}
        if inputs.positions is not None:
            arrays["mrope_positions"] = inputs.positions.copy()
        if deepstack is not None:
            arrays["deepstack_embeddings"] = _to_numpy(deepstack)
        return arrays

    def _image_rows(self, pixels: Mapping[str, np.ndarray], *, like: torch.Tensor) -> torch.Tensor:
        """(rows of all images in order, 1 + deepstack levels, hidden). Each rank's share comes from that rank."""
        if self._ranks is None:
            return self._run_tower(pixels, dtype=like.dtype)
        shard = self._ranks.shard
        counts = family_of(self._config).count_rows(self._config, _as_tensors(pixels))
        shares = shares_of(counts, shard.size)
        ends = np.cumsum([0, *counts])
        rows = like.new_empty(int(ends[-1]), 1 + self._levels, like.shape[1])
        parts = [rows[ends[images.start] : ends[images.stop]] for images in shares]
        if len(parts[shard.rank]):
            own = self._run_tower(images_of(pixels, shares[shard.rank]), dtype=like.dtype)
            parts[shard.rank].copy_(own)
        for rank, part in enumerate(parts):
            if len(part):
                distributed.broadcast(part, rank, group=shard.group)
        return rows

    def _run_tower(self, pixels: Mapping[str, np.ndarray], *, dtype: torch.dtype) -> torch.Tensor:
        """(rows of these images in order, 1 + deepstack levels, hidden)"""
        tensors = {name: tensor.to(self._device) for name, tensor in _as_tensors(pixels).items()}
        features = self._model.get_image_features(**tensors, return_dict=True)
        levels = [features.pooler_output, *(features.deepstack_features if self._levels else ())]
        return torch.stack([torch.cat(list(images)).to(dtype) for images in levels], 1)

    def _positions(self, processed: Processed) -> tuple[np.ndarray, int]:
        """Rotary positions (T, 3) int32 in time, height and width, and the delta of the tokens that follow."""
        if not processed.pixels:
            line = np.arange(len(processed.ids), dtype=np.int32)
            return np.repeat(line[:, None], 3, axis=1), 0
        ids = torch.from_numpy(processed.ids)[None]
        positions, delta = self._model.get_rope_index(
            ids,
            mm_token_type_ids=(ids == self._image_token_id).int(),
            image_grid_thw=torch.from_numpy(processed.pixels["image_grid_thw"]),
        )
        return np.ascontiguousarray(positions[:, 0].T.numpy(), np.int32), int(delta)


def _load(path: Path, config: Any, *, dtype: torch.dtype, device: str) -> nn.Module:
    """The model without its layers of text, their weights never read."""
    family = family_of(config)
    config = copy.deepcopy(config)
    config.text_config.num_hidden_layers = 0
    if getattr(config.text_config, "layer_types", None) is not None:
        config.text_config.layer_types = []
    model: Any = build_on_meta(lambda: AutoModel.from_config(config))
    model.language_model.norm = model.language_model.rotary_emb = None

    def wanted(name: str) -> str | None:
        canonical = family.canonical(name)
        return canonical.removeprefix("model.") if family.is_encode_key(canonical) else None

    return fill(model, read_tensors(path, wanted, dtype=dtype), device=device)


def _as_tensors(pixels: Mapping[str, np.ndarray]) -> dict[str, torch.Tensor]:
    return {name: torch.from_numpy(array) for name, array in pixels.items()}


def _to_numpy(tensor: torch.Tensor) -> np.ndarray:
    """The tensor's memory as an array, copied only when it lies on another device."""
    tensor = tensor.cpu()
    if tensor.dtype == torch.bfloat16:  # numpy has no such type of its own
        bits: np.ndarray = tensor.view(torch.int16).numpy()
        return bits.view(ml_dtypes.bfloat16)
    array: np.ndarray = tensor.numpy()
    return array
