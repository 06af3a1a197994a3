"""What docs/exactness.md says of prompts that are read in chunks: the same bits as the undivided model with the same chunks."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytestmark = [pytest.mark.model, pytest.mark.timeout(120)]
FAMILIES = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "llava")
TOKENS, CHUNK = 40, 16


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_same_chunks_give_the_same_bits(
    family: str, dtype: str, tiny_model_dir: Callable[[str], Path], undivided: Callable[[str, str], Any]
) -> None:
    """Logits of every position of a prompt of 40 tokens in chunks of 16."""
    import numpy as np
    import torch
    from transformers import DynamicCache

    from embedwire.engines.transformers.language import load_language_half
    from embedwire.language.interface import AssembledPrompt

    half, whole = load_language_half(tiny_model_dir(family), dtype=dtype), undivided(family, dtype)
    ids = np.random.default_rng(1).integers(0, 200, TOKENS).astype(np.int32)
    own_cache, their_cache = half.new_cache(), DynamicCache(config=whole.config.get_text_config())
    for start in range(0, TOKENS, CHUNK):
        part = slice(start, min(start + CHUNK, TOKENS))
        own = half.prefill(
            AssembledPrompt(ids), own_cache, start=part.start, end=part.stop, all_positions=True
        )
        with torch.inference_mode():
            theirs = whole(
                input_ids=torch.from_numpy(ids[part]).long()[None],
                past_key_values=their_cache,
                use_cache=True,
            ).logits[0]
        assert torch.equal(own, theirs), f"tokens {part.start} to {part.stop}"
