"""Checkpoints, pictures and vLLM servers. Without vLLM every test here is a skip that says so."""

from __future__ import annotations

import base64
import functools
import random
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed here: make test-vllm")

from servers import VllmServer, connector


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """``checkpoint(family)``: a directory. Nobody writes into it."""
    from embedwire.engines.transformers.tiny_model import write_tiny_model

    @functools.cache
    def write(family: str) -> Path:
        return write_tiny_model(tmp_path_factory.mktemp(family), family, scale="small")

    return write


@pytest.fixture(scope="session")
def image(picture: Callable[..., bytes]) -> Callable[..., dict[str, Any]]:
    """``image(width, height, seed)``: a picture of noise as a part of a message."""

    def part(width: int = 224, height: int = 224, seed: int = 0) -> dict[str, Any]:
        data = base64.b64encode(picture(width, height, seed)).decode()
        return {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{data}"}}

    return part


@pytest.fixture(scope="session")
def prompts(image: Callable[..., dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """The pictures of 20 prompts: none to four, of mixed sizes, some repeated."""
    sizes = [(224, 224), (100, 300), (300, 60), (448, 448), (56, 56), (120, 130), (224, 112), (84, 56)]
    pool, draw = [image(*size, seed) for seed, size in enumerate(sizes)], random.Random(11)
    made = [draw.choices(pool, k=count) for count in (0, 1, 2, 3, 4) * 4]
    made[2][1] = made[2][0]
    return made


class Servers:
    """Starts servers and ends them together."""

    def __init__(self, logs: Path, checkpoint: Callable[[str], Path]) -> None:
        self._logs = logs
        self._checkpoint = checkpoint
        self._stack = ExitStack()

    def start(
        self, name: str, family: str, *flags: str, variables: dict[str, str] | None = None
    ) -> VllmServer:
        """One more, with ``variables`` in its environment; returns at once."""
        log = self._logs / f"{name}.log"
        server = VllmServer(self._checkpoint(family), *flags, log=log, variables=variables)
        self._stack.callback(server.stop)
        return server

    def encoder(self, name: str, family: str, *flags: str, **extra: Any) -> VllmServer:
        """One that only encodes."""
        return self.start(name, family, "--mm-encoder-only", *flags, *connector("ec_producer", **extra))

    def language(
        self, name: str, family: str, *flags: str, variables: dict[str, str] | None = None, **extra: Any
    ) -> VllmServer:
        """One that gets its encoder outputs from elsewhere, through a pool that holds no whole picture unless told otherwise."""
        settings = {"num_blocks": 2, "block_size": 8, **extra}
        return self.start(name, family, *flags, *connector("ec_consumer", **settings), variables=variables)

    def close(self) -> None:
        """All of them."""
        self._stack.close()


@pytest.fixture(scope="module")
def servers(tmp_path_factory: pytest.TempPathFactory, checkpoint: Callable[[str], Path]) -> Iterator[Servers]:
    """Those of one module. Their logs are shown by whoever fails to reach one."""
    made = Servers(tmp_path_factory.mktemp("vllm"), checkpoint)
    yield made
    made.close()
