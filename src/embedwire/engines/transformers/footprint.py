"""How much memory does each half of a model take, against the undivided one? Prints JSON.

    python -m embedwire.engines.transformers.footprint MODEL [--dtype bfloat16]

Each of the three is loaded in a fresh process and serves one prompt with an image of 448 x 448 pixels.
Numbers are resident MiB of that process: ``imports`` before the model is loaded, ``peak`` the most there ever
was. Linux only. Weights that are mapped from the file count once they are used.
"""

from __future__ import annotations

import argparse
import io
import json
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from PIL import Image
from transformers import AutoModelForImageTextToText

from embedwire.encode.interface import ChatPrompt
from embedwire.engines.transformers.checkpoint import dtype_of, load_config, resolve_model
from embedwire.engines.transformers.encoder import TransformersEncoder
from embedwire.engines.transformers.families import family_of
from embedwire.engines.transformers.language import load_language_half
from embedwire.engines.transformers.processing import Processed, PromptProcessor
from embedwire.language.interface import AssembledPrompt


def _prompt() -> ChatPrompt:
    file = io.BytesIO()
    Image.effect_noise((448, 448), 64).convert("RGB").save(file, "PNG")
    content = [{"type": "image"}, {"type": "text", "text": "What is in the image?"}]
    return ChatPrompt([{"role": "user", "content": content}], [file.getvalue()])


def _processed(path: Path) -> Processed:
    config = load_config(path)
    max_tokens = config.text_config.max_position_embeddings
    return PromptProcessor(path, config, max_tokens=max_tokens).process(_prompt())


def _undivided(path: Path, dtype: str) -> None:
    processed = _processed(path)
    model = AutoModelForImageTextToText.from_pretrained(path, dtype=dtype_of(dtype), local_files_only=True)
    ids = torch.from_numpy(processed.ids).long()[None]
    inputs = {name: torch.from_numpy(array) for name, array in processed.pixels.items()}
    if family_of(model.config).mrope:
        inputs["mm_token_type_ids"] = (ids == model.config.image_token_id).int()
    with torch.inference_mode():
        model(input_ids=ids, logits_to_keep=1, **inputs)


def _encode(path: Path, dtype: str) -> None:
    engine = TransformersEncoder(str(path), dtype=dtype)
    next(engine.encode([engine.prepare(_prompt())]))


def _language(path: Path, dtype: str) -> None:
    half = load_language_half(path, dtype=dtype)
    half.prefill(AssembledPrompt(_processed(path).ids), half.new_cache())


PARTS: Mapping[str, Callable[[Path, str], None]] = {
    "undivided": _undivided,
    "encode": _encode,
    "language": _language,
}


def _resident_mib(line: str) -> int:
    """``VmRSS`` (now) or ``VmHWM`` (at most) of this process. Unlike getrusage's, this peak is no
    parent's."""
    for entry in Path("/proc/self/status").read_text().splitlines():
        if entry.startswith(line + ":"):
            return int(entry.split()[1]) // 1024
    raise OSError(f"/proc/self/status has no {line}")


def measure(part: str, model: str, *, dtype: str) -> dict[str, int]:
    """Load and use one of ``PARTS`` in this process. Returns MiB: ``imports`` and ``peak``."""
    imports = _resident_mib("VmRSS")
    PARTS[part](resolve_model(model), dtype)
    return {"imports": imports, "peak": _resident_mib("VmHWM")}


def main(arguments: list[str] | None = None) -> None:
    """Measure every part in a process of its own, or with ``--part`` that one in this process."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--part", choices=PARTS)
    options = parser.parse_args(arguments)
    if options.part:
        print(json.dumps(measure(options.part, options.model, dtype=options.dtype)))
        return
    command = [sys.executable, "-m", __spec__.name, options.model, "--dtype", options.dtype, "--part"]
    report = {
        part: json.loads(subprocess.run([*command, part], stdout=subprocess.PIPE, check=True).stdout)
        for part in PARTS
    }
    print(json.dumps({"model": options.model, "dtype": options.dtype, "mib": report}, indent=1))


if __name__ == "__main__":
    main()
