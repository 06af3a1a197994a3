"""Lets a language server without a vision tower take in the deepstack levels of an item.

vLLM 0.32 makes a Qwen3-VL that was started with ``--language-model-only`` as if the model had no deepstack: its rows are then wider than it
expects, and the engine dies with the first one. What the class's ``__init__`` leaves out is added behind it. Called in a worker, before it
makes the model.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import torch

from embedwire.engines.vllm.items import deepstack_levels

if TYPE_CHECKING:
    from vllm.config import VllmConfig


def keep_deepstack(vllm_config: VllmConfig) -> None:
    """Do it for this model, if it needs it."""
    model = vllm_config.model_config
    if not model.get_multimodal_config().language_model_only or not deepstack_levels(model.hf_config):
        return
    from vllm.model_executor.model_loader.utils import get_model_cls

    made = get_model_cls(model)
    init = made.__init__

    @functools.wraps(init)
    def init_with_deepstack(self: Any, *args: Any, **kwargs: Any) -> None:
        init(self, *args, **kwargs)
        if getattr(self, "use_deepstack", True) is False:
            _add(self, vllm_config)

    made.__init__ = init_with_deepstack


def _add(model: Any, vllm_config: VllmConfig) -> None:
    config = vllm_config.model_config.hf_config
    whole = getattr(config, "thinker_config", config)
    levels, tokens = deepstack_levels(config), vllm_config.scheduler_config.max_num_batched_tokens
    model.use_deepstack = True
    model.deepstack_num_level = levels
    model.multiscale_dim = model.visual_dim * levels
    model.deepstack_input_embeds = [torch.zeros(tokens, whole.text_config.hidden_size) for _ in range(levels)]
    model.deepstack_input_embeds_num_tokens = 0
