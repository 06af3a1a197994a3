"""What an item is to both halves of a connector: its name, its layout, and the way between tensors and arrays.

Knows vLLM's configuration by its attributes only. Any thread.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Collection
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from embedwire.errors import UsageError
from embedwire.memory.layout import Layout, item

if TYPE_CHECKING:
    from vllm.config import VllmConfig

FIELD = "embeddings"
CONTENT_HASH = re.compile(r"(?:.+:)?[0-9a-f]{64,}(?:-[0-9]+)?")
"""An identifier that follows from the content: SHA-256, SHA-512 or BLAKE3 in hexadecimal digits, which is what vLLM computes and what the
router gives. vLLM puts the name of an adapter before it, and the number of a video's chunk behind it."""


def name_of(identifier: str, incarnation: str) -> str:
    """What an encoder offers an item under: its identifier, if that is a content hash, so that it is found again after a restart. Any other
    identifier (vLLM's counter, or a uuid that a client chose) may mean another item in another process, so the encoder's incarnation is
    part of the name."""
    return identifier if CONTENT_HASH.fullmatch(identifier) else f"{identifier}@{incarnation}"


def content_hash_of(identifier: str) -> bytes:
    """32 bytes for an item's name, which may be any text that a client chose: it is never a path, nor a key of another kind."""
    return hashlib.blake2b(identifier.encode("utf-8", "surrogatepass"), digest_size=32).digest()


def item_layout(vllm_config: VllmConfig) -> Layout:
    """Rows of (width,), as both halves work it out for themselves. The width is the language model's, once more for each deepstack level
    of the vision tower. vLLM hashes a picture together with the model's name, but not with the server's processor options: servers that
    differ in either are refused."""
    model = vllm_config.model_config
    width = model.get_inputs_embeds_size() * (1 + deepstack_levels(model.hf_config))
    options = getattr(model.get_multimodal_config(), "mm_processor_kwargs", None)
    name = (
        f"{model.model} {json.dumps(options, sort_keys=True, default=str)}" if options else str(model.model)
    )
    return item(width, dtype=str(model.dtype).removeprefix("torch."), model=name)


def deepstack_levels(hf_config: Any) -> int:
    """How many levels of a vision tower go past its output into the first layers of the language model."""
    whole = getattr(hf_config, "thinker_config", hf_config)
    return len(getattr(getattr(whole, "vision_config", None), "deepstack_visual_indexes", None) or ())


def without_media(data: Any, placeholder_fields: Collection[str]) -> Any:
    """A feature's data as a worker needs them that does not encode it: without what only the vision tower reads. What is left are the
    fields that size its place in the prompt, and those that vLLM keeps in host memory to work out positions. Data that are elsewhere
    already (None; the address of vLLM's shared memory, which the worker has to acknowledge) stay as they are."""
    if data is None or "address" in data:
        return data
    return type(data)(
        {name: entry for name, entry in data.items() if entry.field.keep_on_cpu or name in placeholder_fields}
    )


def arrays_of(tensor: torch.Tensor, layout: Layout) -> dict[str, np.ndarray]:
    """A tensor (rows, width) in host memory as an item, without a copy. Raises UsageError for another dtype or width."""
    (field,) = layout.fields
    dtype = str(tensor.dtype).removeprefix("torch.")
    if tensor.ndim != 2 or tensor.shape[1:] != field.shape or dtype != field.dtype:
        raise UsageError(
            f"an item of {dtype}{list(tensor.shape)}, where {field.dtype}[rows, {field.shape[0]}] was expected"
        )
    data = tensor.contiguous().view(torch.uint8).numpy()
    return {FIELD: data.view(field.numpy_dtype)}


def to_host(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor in host memory. From a GPU it goes to page-locked memory, which torch keeps for later ones: fresh pages take far longer
    than the copy."""
    if not tensor.is_cuda:
        return tensor.cpu()
    return torch.empty_like(tensor, device="cpu", pin_memory=True).copy_(tensor)


def tensor_of(arrays: Any, device: torch.device | str) -> torch.Tensor:
    """An item as a tensor (rows, width) of its own on ``device``. The arrays have been read when this returns; on a GPU the tensor is whole
    for what is queued on the current stream from then on."""
    array: np.ndarray = arrays[FIELD]
    dtype = getattr(torch, str(array.dtype))
    data = torch.from_numpy(array.view(np.uint8)).view(dtype)
    kind = torch.device(device).type
    if kind == "cpu":
        return data.clone()
    return data.pin_memory().to(device, non_blocking=True) if kind == "cuda" else data.to(device)
