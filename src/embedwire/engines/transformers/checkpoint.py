"""Reads the part of a checkpoint that one half of a model needs, and nothing else.

Owns: finding a model on disk, its configuration, tensors out of safetensors shards, and modules that are
built on the meta device and then given those tensors. Must not know: families, prompts. Called once an
engine, while it starts.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import AutoConfig

from embedwire.errors import ConfigurationError

DTYPES: Mapping[str, torch.dtype] = {
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float32": torch.float32,
}
_FILES_NEEDED = ["*.json", "*.jinja", "*.txt", "*.model", "*.safetensors"]


def dtype_of(name: str) -> torch.dtype:
    """The torch dtype of that name. Raises ConfigurationError for one that no engine computes in."""
    try:
        return DTYPES[name]
    except KeyError:
        raise ConfigurationError(f"dtype {name!r} is not one of {', '.join(DTYPES)}") from None


def resolve_model(model: str) -> Path:
    """The directory of a checkpoint: ``model`` itself, or a snapshot of that Hub repository (downloaded when
    it is not in the local cache). Raises ConfigurationError when there is neither."""
    path = Path(model).expanduser()
    if model and path.is_dir():
        return path
    try:
        return Path(snapshot_download(model, allow_patterns=_FILES_NEEDED))
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise ConfigurationError(
            f"{model!r} is neither a directory nor a model that the Hub gives: {error}"
        ) from error


def load_config(path: Path) -> Any:
    """The transformers configuration of the checkpoint in ``path``; no code that a checkpoint brings is run.

    The undivided model looks for ``tie_word_embeddings`` in the outer configuration, a text model of its own
    in the text configuration. Both say the same afterwards: a language half that missed it would have a
    random head, silently. Raises ConfigurationError when there is no configuration, or one of a type that
    transformers does not know.
    """
    try:
        config = AutoConfig.from_pretrained(path, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise ConfigurationError(f"no usable model configuration in {path}: {error}") from error
    config.get_text_config().tie_word_embeddings = config.tie_word_embeddings
    return config


def read_tensors(
    path: Path,
    wanted: Callable[[str], str | None],
    *,
    dtype: torch.dtype,
    cuts: Mapping[str, tuple[slice, ...]] | None = None,
) -> dict[str, torch.Tensor]:
    """Only the wanted tensors of a checkpoint, by the names that ``wanted`` gives them.

    ``wanted`` gets every name in the checkpoint and returns the name under which the tensor is to be had, or
    None to leave it on disk. Of a tensor whose new name is in ``cuts`` only that part is read. Tensors that
    have ``dtype`` already and lie in one piece stay memory-mapped and take memory page by page as they are
    used; others are copied. Raises ConfigurationError for a checkpoint without safetensors, a file of it that can not be read, and two
    tensors of one new name.
    """
    tensors: dict[str, torch.Tensor] = {}
    for shard, names in _shards(path).items():
        chosen = [(name, new) for name in names if (new := wanted(name)) is not None]
        if not chosen:
            continue
        with _opened(path / shard) as file:
            for name, new in chosen:
                if new in tensors:
                    raise ConfigurationError(
                        f"checkpoint {path}: more than one tensor is {new!r}, {name!r} is the second"
                    )
                cut = cuts.get(new) if cuts else None
                tensor = file.get_tensor(name) if cut is None else file.get_slice(name)[cut].contiguous()
                tensors[new] = tensor.to(dtype) if tensor.is_floating_point() else tensor
    return tensors


def _shards(path: Path) -> dict[str, list[str]]:
    """Names of tensors by the file that holds them. As for transformers, one file is the checkpoint, whatever lies beside it."""
    single, index = path / "model.safetensors", path / "model.safetensors.index.json"
    if single.exists():
        with _opened(single) as file:
            return {single.name: list(file.keys())}
    if not index.exists():
        raise ConfigurationError(f"{path} holds no safetensors checkpoint")
    shards: dict[str, list[str]] = {}
    try:
        for name, shard in json.loads(index.read_text())["weight_map"].items():
            shards.setdefault(shard, []).append(name)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigurationError(f"{index} is no index of a checkpoint: {error!r}") from error
    return shards


@contextmanager
def _opened(shard: Path) -> Iterator[Any]:
    try:
        with safe_open(shard, framework="pt") as file:
            yield file
    except (OSError, SafetensorError) as error:
        raise ConfigurationError(f"{shard} can not be read: {error}") from error


def build_on_meta(build: Callable[[], nn.Module]) -> nn.Module:
    """Run a module's constructor without giving its parameters memory; fill it with :func:`fill`."""
    with torch.device("meta"):
        return build()


def fill(module: nn.Module, tensors: Mapping[str, torch.Tensor], *, device: str = "cpu") -> nn.Module:
    """Give a module on the meta device its tensors (assigned, not copied), move it to ``device``, and set it
    to evaluation.

    Buffers that no checkpoint holds, such as rotary frequencies, are computed again by the constructor of
    their owner. Raises ConfigurationError when the names differ, or anything would stay without memory.
    """
    try:
        module.load_state_dict(tensors, strict=True, assign=True)
    except RuntimeError as error:
        raise ConfigurationError(f"checkpoint does not fit {type(module).__name__}: {error}") from error
    for owner in module.modules():
        _restore_buffers(owner)
    refuse_meta(module.named_parameters())
    refuse_meta(module.named_buffers())
    return module.requires_grad_(False).eval().to(device)


def _restore_buffers(owner: nn.Module) -> None:
    """Compute a module's own non-persistent buffers once more, off the meta device."""
    missing = [name for name, buffer in owner.named_buffers(recurse=False) if buffer.is_meta]
    if not missing:
        return
    config = getattr(owner, "config", None)
    if config is None:
        raise ConfigurationError(f"no way known to compute the buffers {missing} of {type(owner).__name__}")
    with torch.device("cpu"):
        fresh = type(owner)(config)
    for name in missing:
        owner.register_buffer(name, fresh.get_buffer(name), persistent=False)


def refuse_meta(named: Iterable[tuple[str, torch.Tensor]]) -> None:
    """Raise ConfigurationError when any of these tensors has no memory."""
    if left := [name for name, tensor in named if tensor.is_meta]:
        raise ConfigurationError(f"the checkpoint lacks {', '.join(left)}")
