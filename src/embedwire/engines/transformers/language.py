"""The language half of a model: text layers, head and embedding table, and no tower.

Owns how an assembled prompt becomes the text model's arguments, for every family. Must not know: requests,
batches' members, sampling, threads. Used by ``generation`` from one thread at a time.

One sequence, unpadded and without a mask, runs the very kernels of the undivided model, to the same bits.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AutoModel, DynamicCache
from transformers.cache_utils import DynamicLayer

from embedwire.engines.transformers.checkpoint import build_on_meta, dtype_of, fill, load_config, read_tensors
from embedwire.engines.transformers.families import HEAD_KEY, TEXT_PREFIX, family_of, layout_of
from embedwire.engines.transformers.sharding import Shard, divide
from embedwire.errors import ConfigurationError, UsageError
from embedwire.language.interface import AssembledPrompt

_HEAD = "head.weight"
_EMBEDDING = "text.embed_tokens.weight"


def load_language_half(
    path: Path, *, dtype: str, device: str = "cpu", shard: Shard | None = None
) -> LanguageHalf:
    """Build the language half of the checkpoint in ``path`` from its own tensors; no other is read.

    With a ``shard`` it is one rank's part: all ranks have to run the same calls, and only rank 0's logits say anything. Raises
    ConfigurationError for a model that is not supported or can not be divided, or a checkpoint that lacks something.
    """
    config = load_config(path)
    family = family_of(config)
    _refuse_unsupported(config.text_config)

    def own_name(key: str) -> str | None:
        key = family.canonical(key)
        if not family.is_language_key(key):
            return None
        return _HEAD if key == HEAD_KEY else "text." + key.removeprefix(TEXT_PREFIX)

    modules: Any = build_on_meta(lambda: _modules(config.text_config))
    cuts = divide(modules, shard) if shard else {}
    tensors = read_tensors(path, own_name, dtype=dtype_of(dtype), cuts=cuts)
    # As transformers has it, a head in the checkpoint counts even where the configuration says "tied".
    tied = config.tie_word_embeddings and _HEAD not in tensors and _EMBEDDING in tensors
    rows = cuts.get(_HEAD, (slice(None),))
    if tied:
        tensors[_HEAD] = tensors[_EMBEDDING][rows]
    fill(modules, tensors, device=device)
    if tied:  # moving to a device has made two of them
        modules.head.weight = nn.Parameter(modules.text.embed_tokens.weight[rows], requires_grad=False)
    return LanguageHalf(modules.text, modules.head, config=config, dtype=dtype)


def _modules(text_config: Any) -> nn.Module:
    """The names in here are those that ``load_language_half`` gives the tensors."""
    head = nn.Linear(text_config.hidden_size, text_config.vocab_size, bias=False)
    return nn.ModuleDict({"text": AutoModel.from_config(text_config), "head": head})


def _refuse_unsupported(text_config: Any) -> None:
    """Refuse what would be wrong, not merely slow: caches of a sliding window, which can not be padded, and
    rotary frequencies that follow the longest sequence seen, by which one request would change another."""
    caches = {type(layer) for layer in DynamicCache(config=text_config).layers}
    if caches != {DynamicLayer}:
        names = ", ".join(sorted(cache.__name__ for cache in caches))
        raise ConfigurationError(f"a text model with caches of type {names} is not supported")
    rope = text_config.rope_parameters["rope_type"]
    if rope in ("dynamic", "longrope"):
        raise ConfigurationError(f"rotary embeddings of type {rope!r} are not supported")


class LanguageHalf:
    """A text model with its head. Tensors are of a batch of B sequences; a prompt is a batch of one.

    ``layout`` is what a prompt room of this model carries, ``max_tokens`` the model's context;
    ``media_ids`` are the token ids that stand for rows of a tower.
    """

    def __init__(self, text: nn.Module, head: nn.Module, *, config: Any, dtype: str) -> None:
        self._text = text
        self._head = head
        self._device = head.weight.device
        self.layout = layout_of(config, dtype=dtype)
        self.max_tokens: int = text.config.max_position_embeddings
        self.vocabulary_size: int = text.config.vocab_size
        self._fields = {field.name: field for field in self.layout}
        self._has_mrope = "mrope_positions" in self._fields
        media_ids = (getattr(config, name, None) for name in ("image_token_id", "video_token_id"))
        self.media_ids = [media_id for media_id in media_ids if media_id is not None]

    def new_cache(self) -> DynamicCache:
        """An empty key-value cache."""
        return DynamicCache(config=self._text.config)

    def holds_media(self, ids: np.ndarray) -> bool:
        """Whether any of these token ids (T,) stands for a row of a tower."""
        return bool(np.isin(ids, self.media_ids).any())

    def check(self, prompt: AssembledPrompt) -> None:
        """Raise UsageError unless arrays are what :attr:`layout` says and ids are in the vocabulary.

        Without ``input_embeddings`` the other fields may be missing too: it is text only.
        """
        ids = prompt.fill_ids
        for name, field in self._fields.items():
            array: np.ndarray | None = getattr(prompt, name)
            if array is None:
                if prompt.input_embeddings is not None or name == "fill_ids":
                    raise UsageError(f"the prompt has no {name}, which the layout {self.layout.name} names")
            elif array.shape != (len(ids), *field.shape) or array.dtype != field.numpy_dtype:
                raise UsageError(
                    f"{name} is {array.dtype}{list(array.shape)}, expected {field} of {len(ids)} tokens"
                )
        if len(ids) == 0 or ids.min() < 0 or ids.max() >= self.vocabulary_size:
            raise UsageError(f"fill_ids are not 1 or more ids of a vocabulary of {self.vocabulary_size}")

    def prefill(
        self,
        prompt: AssembledPrompt,
        cache: DynamicCache,
        *,
        start: int = 0,
        end: int | None = None,
        all_positions: bool = False,
    ) -> Tensor:
        """Run tokens ``start`` to ``end`` (default: all) of a prompt whose first ``start`` are in ``cache``.

        Returns logits (1, vocabulary) of the last of them, or (tokens, vocabulary) of all.
        """
        part = slice(start, end)
        with torch.inference_mode():
            hidden = self._text(
                inputs_embeds=self._embeddings(prompt, part),
                position_ids=self._positions(prompt, part),
                past_key_values=cache,
                use_cache=True,
                **self._deepstack(prompt, part),
            ).last_hidden_state
            logits: Tensor = self._head(hidden if all_positions else hidden[:, -1:])
            return logits[0]

    def decode(
        self, tokens: Tensor, positions: Tensor, *, cache: DynamicCache, mask: Tensor | None = None
    ) -> Tensor:
        """Run one more token of each of B sequences. Returns logits (B, vocabulary).

        ``tokens`` and ``positions`` are (B,) int64; ``mask`` is (B, cached + 1) bool, false where a cache is
        padding, and None where none is.
        """
        position_ids = positions[:, None].to(self._device)
        with torch.inference_mode():
            hidden = self._text(
                inputs_embeds=self._text.embed_tokens(tokens[:, None].to(self._device)),
                position_ids=position_ids.expand(3, -1, -1) if self._has_mrope else position_ids,
                past_key_values=cache,
                attention_mask=mask,
                use_cache=True,
            ).last_hidden_state
            logits: Tensor = self._head(hidden)
            return logits[:, 0]

    def _embeddings(self, prompt: AssembledPrompt, part: slice) -> Tensor:
        """(1, tokens, hidden)"""
        if prompt.input_embeddings is not None:
            return as_tensor(prompt.input_embeddings[part]).to(self._device)[None]
        embedded: Tensor = self._text.embed_tokens(as_tensor(prompt.fill_ids[part]).to(self._device)[None])
        return embedded

    def _positions(self, prompt: AssembledPrompt, part: slice) -> Tensor:
        """(3, 1, tokens) for mrope, else (1, tokens). Text alone counts up on all three axes."""
        if prompt.mrope_positions is not None:
            return as_tensor(prompt.mrope_positions[part]).to(self._device, torch.int64).T[:, None]
        counted = torch.arange(*part.indices(len(prompt.fill_ids)), device=self._device)[None]
        return counted.expand(3, 1, -1) if self._has_mrope else counted

    def _deepstack(self, prompt: AssembledPrompt, part: slice) -> dict[str, Any]:
        """As the text model takes it: which positions are media, and each level's rows for those alone."""
        if prompt.deepstack_embeddings is None:
            return {}
        media = np.isin(prompt.fill_ids[part], self.media_ids)
        if not media.any():
            return {}
        rows = as_tensor(prompt.deepstack_embeddings[part][media]).to(self._device)
        return {
            "visual_pos_masks": as_tensor(media).to(self._device)[None],
            "deepstack_visual_embeds": list(rows.unbind(1)),
        }


def as_tensor(array: np.ndarray) -> Tensor:
    """A tensor over the same memory. numpy's bfloat16 is not known to torch, so it goes by way of int16."""
    if array.dtype.name == "bfloat16":
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)
