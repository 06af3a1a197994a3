"""``embedwire doctor``: what works on this machine, found out by trying it."""

from __future__ import annotations

import platform
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import typer
from rich.markup import escape

from embedwire.cli.screen import JsonFile, check_writable, err, out, quieten_libraries, table, write_json

State = Literal["works", "missing", "broken"]
IMPORT_WAIT_S = 120.0
ROUND_TRIP_WAIT_S = 20.0
BUILT_IN = ("shm", "tcp")
OPTIONAL: Mapping[str, tuple[str, str]] = {
    "vllm": ("embedwire.engines.vllm.connector", "a production engine"),
}
"""name: (module, what it gives). The name is that of the package that it needs, and of the extra which installs that, too."""


@dataclass(frozen=True, slots=True)
class Finding:
    """What was tried, and how it went. ``is_needed``: without it nothing can be served here."""

    part: str
    state: State
    detail: str
    is_needed: bool = False


def doctor(*, json: JsonFile = None) -> None:
    """Find out which wires and engines work on this machine, and what is missing for the others.

    Everything is really tried: the wires carry bytes from a sender to a receiver, the engine encodes an image and generates. Exit
    code 0: all that is needed works; 1: it does not, and the table says what to do.
    """
    check_writable(json)
    quieten_libraries()
    findings: list[Finding] = []
    tests: Sequence[tuple[str, Callable[[], list[Finding]]]] = (
        ("the platform", lambda: [_platform()]),
        ("the wires", lambda: [_wire(name) for name in _wires()]),
        ("transformers", lambda: [_transformers()]),
        ("optional packages", lambda: [_optional(name) for name in OPTIONAL]),
    )
    with err.status("") as status:
        for what, find in tests:
            status.update(f"trying {what}")
            findings += find()
    made = table("", "", "")
    made.show_header = False
    colours: Mapping[State, str] = {"works": "green", "missing": "yellow", "broken": "red"}
    for found in findings:
        made.add_row(
            f"[bold]{found.part}[/]", f"[{colours[found.state]}]{found.state}[/]", escape(found.detail)
        )
    out.print(made)
    write_json(json, [asdict(found) for found in findings])
    if any(found.is_needed and found.state != "works" for found in findings):
        raise typer.Exit(1)


def _platform() -> Finding:
    name = f"{platform.system()} {platform.release()}, Python {platform.python_version()}"
    if platform.system() != "Linux":
        return Finding("platform", "broken", f"{name}; Embedwire needs Linux", is_needed=True)
    return Finding("platform", "works", name, is_needed=True)


def _wires() -> tuple[str, ...]:
    from embedwire.transports import names

    return names()


def _wire(name: str) -> Finding:
    """Carry a room of three rounds from a sender to a receiver, and look at every byte."""
    import numpy as np

    from embedwire.endpoint import ReceiverEndpoint, SenderEndpoint
    from embedwire.errors import ConfigurationError
    from embedwire.memory.layout import Field, Layout

    part, is_needed = f"wire {name}", name in BUILT_IN
    layout = Layout("DOCTOR", (Field("embeddings", "uint8", (4096,)),))
    rows = np.random.default_rng(0).integers(0, 256, (40, 4096), np.uint8)
    try:
        with (
            SenderEndpoint(layout, transports=(name,)) as sender,
            ReceiverEndpoint(layout, num_blocks=1, block_size=16, transports=(name,)) as receiver,
        ):
            sender.offer(1, total_tokens=len(rows)).fill({"embeddings": rows})
            received = receiver.open(1, sender.address).result(ROUND_TRIP_WAIT_S)
            if not np.array_equal(received.arrays["embeddings"], rows):
                return Finding(part, "broken", "a wrong byte arrived", is_needed)
            rounds = len(received.report.rounds)
            received.release()
    except Exception as error:  # whatever a vendor's library may raise
        if not is_needed and isinstance(error, ConfigurationError):
            return Finding(part, "missing", str(error))  # it says what to install
        return Finding(part, "broken", f"{_one_line(error)}{_hint(name)}", is_needed)
    return Finding(
        part, "works", f"{rows.nbytes // 1024} KiB in {rounds} rounds, every byte right", is_needed
    )


def _fix(name: str) -> str:
    return f"gives {OPTIONAL[name][1]} (pip install 'embedwire[{name}]')"


def _hint(name: str) -> str:
    return "; in a container, give it more shared memory (docker run --shm-size=8g)" if name == "shm" else ""


def _transformers() -> Finding:
    try:
        import torch
        import transformers
    except ImportError as error:
        return Finding(
            "engine transformers",
            "missing",
            f"{_one_line(error)}; pip install 'embedwire[transformers]'",
            True,
        )
    try:
        with tempfile.TemporaryDirectory(prefix="embedwire-doctor-") as directory:
            _use_both_halves(Path(directory))
    except Exception as error:
        return Finding("engine transformers", "broken", _one_line(error), is_needed=True)
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU, runs on the CPU"
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}"
    return Finding("engine transformers", "works", f"{versions}; {device}", is_needed=True)


def _use_both_halves(directory: Path) -> None:
    """Encode a prompt with an image with the one half, and answer it with the other."""
    import io
    import threading

    from PIL import Image

    from embedwire.encode.interface import ChatPrompt
    from embedwire.engines.transformers.encoder import TransformersEncoder
    from embedwire.engines.transformers.generation import TransformersLanguage
    from embedwire.engines.transformers.tiny_model import write_tiny_model
    from embedwire.language.interface import AssembledPrompt, Delta, SamplingParams

    model = str(write_tiny_model(directory, "qwen2_5_vl"))
    file = io.BytesIO()
    Image.new("RGB", (56, 56), "crimson").save(file, "PNG")
    parts = [{"type": "image"}, {"type": "text", "text": "What is this?"}]
    encoder = TransformersEncoder(model, dtype="float32")
    prepared = encoder.prepare(ChatPrompt([{"role": "user", "content": parts}], [file.getvalue()]))
    (arrays,) = encoder.encode([prepared])
    fields: dict[str, Any] = {"mrope_position_delta": prepared.mrope_position_delta, **arrays}
    prompt = AssembledPrompt(**fields)
    language = TransformersLanguage(model, dtype="float32")
    ended, last = threading.Event(), Delta()

    def on_delta(delta: Delta) -> None:
        nonlocal last
        if delta.finish_reason is not None:
            last = delta
            ended.set()

    try:
        language.submit(prompt, SamplingParams(max_tokens=2, ignore_eos=True), on_delta=on_delta)
        if not ended.wait(60) or last.finish_reason != "length":
            raise RuntimeError(last.error or "no answer within 60 s")
    finally:
        language.close()


def _optional(name: str) -> Finding:
    """Import it in a process of its own: such packages change the process that they are in."""
    module, fix = OPTIONAL[name][0], _fix(name)
    found = subprocess.run(
        [
            sys.executable,
            "-c",
            f"import importlib.util as u; raise SystemExit(u.find_spec({name!r}) is None)",
        ],
        check=False,
        capture_output=True,
    )
    if found.returncode:
        return Finding(name, "missing", fix)
    try:
        tried = subprocess.run(
            [sys.executable, "-c", f"import {module}"],
            capture_output=True,
            text=True,
            timeout=IMPORT_WAIT_S,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return Finding(name, "broken", f"importing {module} takes more than {IMPORT_WAIT_S:g} s")
    if tried.returncode:
        return Finding(name, "broken", (tried.stderr.strip().splitlines() or ["it can not be imported"])[-1])
    return Finding(name, "works", f"{module} can be loaded")


def _one_line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())
