"""What of a language half is divided, and what is refused."""

from __future__ import annotations

import pytest

from embedwire.engines.transformers import sharding
from embedwire.engines.transformers.language import load_language_half
from embedwire.engines.transformers.sharding import Shard
from embedwire.errors import ConfigurationError

pytestmark = pytest.mark.model


def test_a_model_that_does_not_divide_is_refused(tiny_model_dir) -> None:
    for family in ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "llava"):
        with pytest.raises(ConfigurationError, match=r"3 .* evenly: its num_key_value_heads is 4"):
            load_language_half(tiny_model_dir(family), dtype="float32", shard=Shard(0, 3, None))


@pytest.mark.parametrize("known", [{"q_proj"}, set()])
def test_what_can_not_be_divided_is_refused_and_not_left_whole(
    known: set[str], tiny_model_dir, monkeypatch
) -> None:
    """A plan of which nothing applies once cut nothing, in silence, and looked right."""
    monkeypatch.setattr(sharding, "_ROWS", known)
    with pytest.raises(
        ConfigurationError, match=r"not known how to divide .*layers\.0\.self_attn\.k_proj\.weight"
    ):
        load_language_half(tiny_model_dir("qwen3_vl"), dtype="float32", shard=Shard(0, 2, None))
