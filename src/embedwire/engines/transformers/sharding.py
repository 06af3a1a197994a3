"""Divides the text layers of a language half among the ranks of a tensor-parallel group.

Owns which weights are cut, along which side, and the sums and the joining that this takes. Must not know prompts, caches or checkpoints.
Called while a half is loaded; its layers run on the engine's thread.

Projections into heads and into the MLP are cut by rows, those back out of them by columns, so that a rank computes whole heads, and one
sum brings it together again (Megatron-LM, arXiv:1909.08053). Attention of transformers takes the number of heads from the width of its
projections. Its own plans are not used: dense Qwen3-VL has none, and then nothing would be cut, in silence.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.nn.functional import linear

from embedwire.errors import ConfigurationError

Cuts = Mapping[str, tuple[slice, ...]]
_ROWS = {"q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"}
_COLUMNS = {"o_proj", "down_proj"}


@dataclass(slots=True)
class Shard:
    """What rank ``rank`` of ``size`` holds. ``group`` is the process group over which its layers sum, None once that is closed: its
    connections live as long as anybody refers to it."""

    rank: int
    size: int
    group: Any

    def part_of(self, length: int) -> slice:
        """This rank's part of a side of a weight. ``size`` has to divide ``length``."""
        part = length // self.size
        return slice(self.rank * part, (self.rank + 1) * part)


class _Grouped(nn.Linear):  # type: ignore[misc]  # torch's types are not read
    def __init__(self, in_features: int, out_features: int, bias: bool, *, shard: Shard) -> None:
        super().__init__(in_features, out_features, bias, device="meta")
        self._shard = shard


class _Summed(_Grouped):
    """Takes this rank's columns of the input, and returns the sum over all ranks."""

    def forward(self, inputs: Tensor) -> Tensor:
        outputs = linear(inputs, self.weight)
        distributed.all_reduce(outputs, group=self._shard.group)
        return outputs if self.bias is None else outputs + self.bias


class _Joined(_Grouped):
    """Computes this rank's columns of the output. Rank 0 returns all of them, the others their own."""

    def forward(self, inputs: Tensor) -> Tensor:
        outputs = linear(inputs, self.weight, self.bias)
        parts = None
        if self._shard.rank == 0:
            parts = [torch.empty_like(outputs) for _ in range(self._shard.size)]
        distributed.gather(outputs, parts, group=self._shard.group, group_dst=0)
        return outputs if parts is None else torch.cat(parts, -1)


def divide(modules: Any, shard: Shard) -> Cuts:
    """Replace the linear layers in ``modules`` (``text`` and ``head``, on the meta device) by this rank's parts of them.

    Returns which part of a checkpoint's tensor each parameter is, by its name; those without an entry are whole. The head is cut where
    ``size`` divides the vocabulary. Raises ConfigurationError when ``size`` does not divide the heads or the width of the MLP, or when a
    layer holds a matrix of which it is not known how it is divided.
    """
    _check_divisible(modules.text.config, shard.size)
    cuts: dict[str, tuple[slice, ...]] = {}
    for name, module in list(modules.named_modules()):
        kind = name.rpartition(".")[2]
        if not isinstance(module, nn.Linear) or (kind == "head" and module.out_features % shard.size):
            continue
        if kind in _ROWS | _COLUMNS | {"head"}:
            part, own_cuts = _part_of(module, kind, shard)
            modules.set_submodule(name, part)
            cuts |= {f"{name}.{parameter}": cut for parameter, cut in own_cuts.items()}
    layers = modules.text.layers.named_parameters(prefix="text.layers")
    matrices = [name for name, parameter in layers if parameter.ndim > 1]
    whole = [name for name in matrices if name not in cuts]
    if whole or not matrices:
        raise ConfigurationError(
            f"it is not known how to divide {', '.join(whole) or 'text layers without matrices'} among tensor-parallel ranks"
        )
    return cuts


def _check_divisible(text_config: Any, size: int) -> None:
    for name in ("num_key_value_heads", "num_attention_heads", "intermediate_size"):
        if (value := getattr(text_config, name)) % size:
            raise ConfigurationError(
                f"{size} tensor-parallel ranks can not divide the model evenly: its {name} is {value}"
            )


def _part_of(whole: nn.Linear, kind: str, shard: Shard) -> tuple[nn.Linear, dict[str, tuple[slice, ...]]]:
    """The layer that holds this rank's part of ``whole``, and which part of each parameter that is."""
    has_bias = whole.bias is not None
    if kind in _COLUMNS:
        columns = shard.part_of(whole.in_features)
        width = columns.stop - columns.start
        return _Summed(width, whole.out_features, has_bias, shard=shard), {"weight": (slice(None), columns)}
    rows = shard.part_of(whole.out_features)
    height = rows.stop - rows.start
    cuts: dict[str, tuple[slice, ...]] = {"weight": (rows,)} | ({"bias": (rows,)} if has_bias else {})
    if kind == "head":
        return _Joined(whole.in_features, height, has_bias, shard=shard), cuts
    return nn.Linear(whole.in_features, height, has_bias, device="meta"), cuts
