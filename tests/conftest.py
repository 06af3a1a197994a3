"""Tiny checkpoints, pictures and undivided models, made once a session."""

from __future__ import annotations

import functools
import io
import signal
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest

# Who starts the tests in the background may have them ignore Ctrl-C, or the end of a terminal; the servers that they start and interrupt
# would inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)
with suppress(ImportError):  # not where vLLM is
    from hypothesis import settings

    # tests assert counts, never times: a busy machine may take any time for an example
    settings.register_profile("patient", deadline=None)
    settings.load_profile("patient")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--device", default="cpu", help="where the models of tests that can choose run: cpu, cuda"
    )


@pytest.fixture(scope="session")
def device(request: pytest.FixtureRequest) -> str:
    """Where models run, as torch names it."""
    return str(request.config.getoption("--device"))


@pytest.fixture(scope="session")
def tiny_model_dir(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """``tiny_model_dir(family)``: the directory of a tiny checkpoint. Nobody writes into it."""
    from embedwire.engines.transformers.tiny_model import write_tiny_model

    @functools.cache
    def write(family: str) -> Path:
        return write_tiny_model(tmp_path_factory.mktemp(family), family)

    return write


@pytest.fixture(scope="session")
def picture() -> Callable[..., bytes]:
    """``picture(width, height, seed)``: the PNG of a picture of noise."""
    from PIL import Image

    def draw(width: int = 84, height: int = 56, seed: int = 0) -> bytes:
        noise = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
        file = io.BytesIO()
        Image.fromarray(noise).save(file, "PNG")
        return file.getvalue()

    return draw


@pytest.fixture(scope="session")
def undivided(tiny_model_dir: Callable[[str], Path]) -> Callable[..., Any]:
    """``undivided(family, dtype, device="cpu")``: the whole tiny model, as plain transformers loads it. Of what it was asked before it
    remembers nothing."""
    import torch
    from transformers import AutoModelForImageTextToText

    @functools.cache
    def load(family: str, dtype: str, device: str) -> Any:
        whole = AutoModelForImageTextToText.from_pretrained(
            tiny_model_dir(family), dtype=getattr(torch, dtype)
        )
        return whole.eval().to(device)

    def get(family: str, dtype: str, device: str = "cpu") -> Any:
        whole = load(family, dtype, device)
        if hasattr(whole.model, "rope_deltas"):  # the position delta of its last prompt
            whole.model.rope_deltas = None
        return whole

    return get
