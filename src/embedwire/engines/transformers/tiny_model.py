"""Writes small random checkpoints that plain transformers can load: for tests, examples and measurements.

Owns: the sizes, the tokenizer and the weights of those checkpoints. The weights are drawn so that a greedy
answer has many different tokens and depends on the picture, which default initialisation does not give.
Called from tests and the command line.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import nn
from transformers import AutoConfig, AutoModelForImageTextToText, GenerationConfig, PreTrainedTokenizerFast

from embedwire.engines.transformers.checkpoint import dtype_of
from embedwire.errors import ConfigurationError

_CORPUS = (
    "A small model reads a picture and says what it sees: a red square, a blue circle, two green lines.",
    "Describe the image. What is in the image? How many are there, and which colour has the first one?",
    "The answer is yes. The answer is no. There are three images, and the second one is the largest.",
    "user assistant system: you are a helpful assistant.",
)
_QWEN_TOKENS = (
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>",
    "<|image_pad|>", "<|video_pad|>",
)  # fmt: skip
_LLAVA_TOKENS = ("<unk>", "<s>", "</s>", "<image>", "<pad>")

_QWEN_TEMPLATE = """\
{%- for message in messages -%}
<|im_start|>{{ message.role }}
{% if message.content is string %}{{ message.content }}{% else %}{% for part in message.content -%}
{% if part.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ part.text }}{% endif %}
{%- endfor %}{% endif %}<|im_end|>
{% endfor %}
{%- if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
_LLAVA_TEMPLATE = """\
{%- for message in messages %}{{ message.role.upper() }}: {% for part in message.content -%}
{% if part.type == 'image' %}<image>
{% else %}{{ part.text }}{% endif %}
{%- endfor %}{{ ' ' }}{% endfor %}
{%- if add_generation_prompt %}ASSISTANT:{% endif %}"""

_CLIP_NORM = {
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
}

Sizes = Mapping[str, int]
_TEXT_SIZES: Mapping[str, Sizes] = {
    "tiny": {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3,
             "num_attention_heads": 8, "num_key_value_heads": 4},
    "small": {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 3,
              "num_attention_heads": 4, "num_key_value_heads": 2},
    "400m": {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 16,
             "num_attention_heads": 16, "num_key_value_heads": 4, "vocab_size": 32768},
}  # fmt: skip
_TOWER_SIZES: Mapping[str, Sizes] = {
    "tiny": {"depth": 4, "hidden_size": 32, "intermediate_size": 64, "heads": 2},
    "small": {"depth": 4, "hidden_size": 64, "intermediate_size": 128, "heads": 2},
    "400m": {"depth": 12, "hidden_size": 768, "intermediate_size": 2048, "heads": 12},
}


def write_tiny_model(
    directory: Path,
    family: str,
    *,
    scale: str = "tiny",
    seed: int = 0,
    dtype: str = "float32",
    max_position: int = 131072,
    tied: bool = False,
) -> Path:
    """Write a checkpoint with random weights and return its directory.

    ``family`` is ``"qwen2_vl"``, ``"qwen2_5_vl"``, ``"qwen3_vl"`` or ``"llava"``. ``scale`` is ``"tiny"``
    (some 200,000 parameters), ``"small"`` (some 700,000, with heads of 32, the narrowest that vLLM's attention for CPUs takes) or
    ``"400m"`` (about 400 million). ``max_position`` is the context in tokens;
    ``tied`` makes the head the embedding table. Equal arguments give equal weights. Raises ConfigurationError
    for a family or scale that it does not know.
    """
    if family not in _TOWER_CONFIGS or scale not in _TEXT_SIZES:
        raise ConfigurationError(
            f"no such tiny model: family {family!r} of {', '.join(_TOWER_CONFIGS)}, "
            f"scale {scale!r} of {', '.join(_TEXT_SIZES)}"
        )
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer = _tokenizer(_LLAVA_TOKENS if family == "llava" else _QWEN_TOKENS)
    tokenizer.chat_template = _LLAVA_TEMPLATE if family == "llava" else _QWEN_TEMPLATE
    config = _config(family, scale, tokenizer, max_position)
    config.tie_word_embeddings = tied
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForImageTextToText.from_config(config, dtype=dtype_of(dtype))
        with torch.no_grad():
            _draw(model)
    shard_bytes = sum(p.nbytes for p in model.parameters()) // 3
    model.generation_config = GenerationConfig(eos_token_id=[tokenizer.eos_token_id], do_sample=False)
    model.save_pretrained(directory, max_shard_size=shard_bytes)
    tokenizer.save_pretrained(directory)
    (directory / "preprocessor_config.json").write_text(json.dumps(_preprocessor(family, config), indent=1))
    return directory


def _draw(model: nn.Module) -> None:
    """Draw every weight so that each layer keeps the variance of its input.

    Then attention and MLP weigh as much in the residual stream as the last token, so the answer wanders, and
    the rows of the tower are as large as those of the embedding table, so the picture matters.
    """
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1:
            fan_in = 1 if "embed" in name and "patch_embed" not in name else parameter[0].numel()
            parameter.normal_(0.0, (4.0 if "q_proj" in name else 1.0) * fan_in**-0.5)
        elif name.endswith("bias"):
            parameter.normal_(0.0, 0.1)
        elif name.endswith("class_embedding"):
            parameter.normal_(0.0, 1.0)
        else:
            parameter.fill_(1.0)


def _tokenizer(special: tuple[str, ...]) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer: every string has ids, every id has bytes."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400, initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()), show_progress=False
    )
    backend.train_from_iterator(_CORPUS, trainer)
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    if "<s>" in special:
        begin = ("<s>", backend.token_to_id("<s>"))
        backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[begin])
        names = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
    else:
        names = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
    rest = [token for token in special if token not in names.values()]
    return PreTrainedTokenizerFast(tokenizer_object=backend, additional_special_tokens=rest, **names)


def _config(family: str, scale: str, tokenizer: PreTrainedTokenizerFast, max_position: int) -> Any:
    text = {
        "vocab_size": len(tokenizer),
        "max_position_embeddings": max_position,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        **_TEXT_SIZES[scale],
    }
    head_width = text["hidden_size"] // text["num_attention_heads"]
    if family == "llava":
        text |= {"model_type": "llama"}
    else:
        rope = {"rope_type": "default", "rope_theta": 1e6}
        if family == "qwen3_vl":
            head_width *= 2  # these heads are free to be wider than hidden_size allows
            rope |= {"mrope_interleaved": True}
            text |= {"head_dim": head_width}
        rope |= {"mrope_section": _mrope_section(head_width // 2)}
        text |= {"rope_parameters": rope}
    tower = _TOWER_CONFIGS[family](_TOWER_SIZES[scale], text["hidden_size"])
    return AutoConfig.for_model(
        family, text_config=text, vision_config=tower, **_token_ids(family, tokenizer)
    )


def _mrope_section(half_width: int) -> list[int]:
    """How many rotary frequencies go to time, height and width; the real models halve and share alike."""
    side = half_width * 3 // 8
    return [half_width - 2 * side, side, side]


def _token_ids(family: str, tokenizer: PreTrainedTokenizerFast) -> dict[str, int]:
    if family == "llava":
        return {"image_token_index": tokenizer.convert_tokens_to_ids("<image>"), "image_seq_length": 16}
    names = {
        "image_token_id": "<|image_pad|>",
        "video_token_id": "<|video_pad|>",
        "vision_start_token_id": "<|vision_start|>",
        "vision_end_token_id": "<|vision_end|>",
    }
    return {key: tokenizer.convert_tokens_to_ids(token) for key, token in names.items()}


def _qwen2_tower(sizes: Sizes, hidden_size: int) -> dict[str, Any]:
    return {"depth": sizes["depth"], "embed_dim": sizes["hidden_size"], "num_heads": sizes["heads"],
            "hidden_size": hidden_size, "mlp_ratio": 2}  # fmt: skip


def _qwen2_5_tower(sizes: Sizes, hidden_size: int) -> dict[str, Any]:
    return {"depth": sizes["depth"], "hidden_size": sizes["hidden_size"], "num_heads": sizes["heads"],
            "intermediate_size": sizes["intermediate_size"], "out_hidden_size": hidden_size,
            "window_size": 112, "fullatt_block_indexes": [sizes["depth"] - 1]}  # fmt: skip


def _qwen3_tower(sizes: Sizes, hidden_size: int) -> dict[str, Any]:
    return {"depth": sizes["depth"], "hidden_size": sizes["hidden_size"], "num_heads": sizes["heads"],
            "intermediate_size": sizes["intermediate_size"], "out_hidden_size": hidden_size,
            "num_position_embeddings": 144, "deepstack_visual_indexes": [0, 1, 2]}  # fmt: skip


def _clip_tower(sizes: Sizes, hidden_size: int) -> dict[str, Any]:
    return {"model_type": "clip_vision_model", "num_hidden_layers": sizes["depth"],
            "hidden_size": sizes["hidden_size"], "num_attention_heads": sizes["heads"],
            "intermediate_size": sizes["intermediate_size"], "image_size": 56, "patch_size": 14}  # fmt: skip


_TOWER_CONFIGS: Mapping[str, Callable[[Sizes, int], dict[str, Any]]] = {
    "qwen2_vl": _qwen2_tower,
    "qwen2_5_vl": _qwen2_5_tower,
    "qwen3_vl": _qwen3_tower,
    "llava": _clip_tower,
}


def _preprocessor(family: str, config: Any) -> dict[str, Any]:
    if family == "llava":
        side = config.vision_config.image_size
        return {
            "image_processor_type": "CLIPImageProcessor",
            "size": {"shortest_edge": side},
            "crop_size": {"height": side, "width": side},
            **_CLIP_NORM,
        }
    vision = config.vision_config
    return {
        "image_processor_type": "Qwen2VLImageProcessor",
        "patch_size": vision.patch_size,
        "merge_size": vision.spatial_merge_size,
        "temporal_patch_size": vision.temporal_patch_size,
        "size": {"shortest_edge": 56 * 56, "longest_edge": 16384 * 28 * 28},
        **_CLIP_NORM,
    }
