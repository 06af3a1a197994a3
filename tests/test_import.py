"""What an import brings along, seen in a fresh interpreter each."""

from __future__ import annotations

import subprocess
import sys

import pytest

HEAVY = ("torch", "transformers", "fastapi", "uvicorn", "starlette", "vllm", "mooncake", "nixl", "PIL")


def loaded_after(statement: str) -> set[str]:
    """The top-level modules that are loaded after a statement."""
    code = f"{statement}; import sys; print(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True
    )
    return {name.partition(".")[0] for name in done.stdout.split()}


@pytest.mark.parametrize(
    "module",
    [
        "embedwire",
        "embedwire.endpoint",
        "embedwire.registry",
        "embedwire.transports",
        "embedwire.encode.interface",
        "embedwire.language.interface",
    ],
)
def test_floors_below_the_engines_load_no_engine(module: str) -> None:
    """A process that only moves embeddings pays for neither a model library nor a web server."""
    assert not loaded_after(f"import {module}") & set(HEAVY)


def test_the_package_itself_is_light() -> None:
    """``import embedwire`` loads no socket library and no arrays either."""
    assert not loaded_after("import embedwire") & {"zmq", "numpy", "ml_dtypes", "asyncio"}


def test_the_protocol_needs_neither_clock_nor_arrays() -> None:
    """Floor 0: the standard library and msgspec."""
    loaded = loaded_after("import embedwire.protocol.sender_core, embedwire.protocol.receiver_core")
    assert not loaded & {"zmq", "numpy", "xxhash", "socket", "asyncio"}
