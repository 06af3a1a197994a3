"""Embedwire moves multimodal embeddings from encoder servers to language-model servers, through memory of a fixed size.

The names below are the library for those who bring their own model. They are imported when first used, so that
``import embedwire`` is cheap.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from embedwire.endpoint import Offer, Received, ReceiverEndpoint, Reception, SenderEndpoint
    from embedwire.errors import EmbedwireError, TransferError
    from embedwire.limits import Limits
    from embedwire.memory.layout import Field, Layout

__version__ = "0.1.0"

_HOME = {
    "EmbedwireError": "errors",
    "Field": "memory.layout",
    "Layout": "memory.layout",
    "Limits": "limits",
    "Offer": "endpoint",
    "Received": "endpoint",
    "ReceiverEndpoint": "endpoint",
    "Reception": "endpoint",
    "SenderEndpoint": "endpoint",
    "TransferError": "errors",
}

__all__ = [
    "EmbedwireError",
    "Field",
    "Layout",
    "Limits",
    "Offer",
    "Received",
    "ReceiverEndpoint",
    "Reception",
    "SenderEndpoint",
    "TransferError",
]


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
    globals()[name] = value
    return value
