"""What the undivided model answers: the proof that dividing it changes nothing. Prints JSON.

    python -m embedwire.engines.transformers.reference MODEL [--dtype bfloat16] [--device cuda] < prompt.json

``prompt.json`` is ``{"messages": [...], "media": [base64, ...], "max_tokens": n}``, with messages as in
:class:`~embedwire.encode.interface.ChatPrompt`. Plain transformers does the rest, with nothing of ours but the prompt's
processing: one model, one ``generate``, always the likeliest token, no stop token. A process of its own, since it holds the whole
model.
"""

from __future__ import annotations

import argparse
import base64
import json
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from transformers import AutoModelForImageTextToText

from embedwire.encode.interface import ChatPrompt
from embedwire.engines.transformers.checkpoint import dtype_of, load_config, resolve_model
from embedwire.engines.transformers.families import family_of
from embedwire.engines.transformers.processing import PromptProcessor


def greedy_ids(
    model: str,
    prompt: ChatPrompt,
    *,
    max_tokens: int,
    dtype: str,
    device: str = "cpu",
    threads: int | None = None,
) -> list[int]:
    """The first ``max_tokens`` token ids of the undivided model's greedy answer; it does not stop at its end-of-text token."""
    if threads is not None:
        torch.set_num_threads(threads)
    path = resolve_model(model)
    config = load_config(path)
    processor = PromptProcessor(path, config, max_tokens=config.text_config.max_position_embeddings)
    processed = processor.process(prompt)
    whole = AutoModelForImageTextToText.from_pretrained(path, dtype=dtype_of(dtype), local_files_only=True)
    whole.to(device)
    ids = torch.from_numpy(processed.ids).long()[None]
    inputs: dict[str, Any] = {name: torch.from_numpy(array) for name, array in processed.pixels.items()}
    if family_of(config).mrope:
        inputs["mm_token_type_ids"] = (ids == config.image_token_id).int()
    inputs |= {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    whole.generation_config.eos_token_id = None
    with torch.inference_mode():
        answer = whole.generate(
            max_new_tokens=max_tokens,
            do_sample=False,
            **{name: tensor.to(device) for name, tensor in inputs.items()},
        )
    return [int(token) for token in answer[0, ids.shape[1] :]]


def prompt_of(content: Mapping[str, Any]) -> ChatPrompt:
    """A prompt from its JSON form."""
    media: Sequence[str] = content["media"]
    return ChatPrompt(content["messages"], [base64.b64decode(data) for data in media])


def main() -> None:
    """Read a prompt from stdin, print ``{"token_ids": [...]}``."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int)
    options = parser.parse_args()
    content = json.load(sys.stdin)
    ids = greedy_ids(
        options.model,
        prompt_of(content),
        max_tokens=content["max_tokens"],
        dtype=options.dtype,
        device=options.device,
        threads=options.threads,
    )
    print(json.dumps({"token_ids": ids}))


if __name__ == "__main__":
    main()
