"""The wires by name. A wire's module is imported when it is asked for, so that an absent vendor library costs
nothing.

Called by ``embedwire.endpoint`` when it is built. A further wire is one more line in ``_WIRES``.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from typing import cast

from embedwire.errors import ConfigurationError
from embedwire.transports.contract import Inbound, Outbound

_WIRES: Mapping[str, tuple[str, str, str]] = {
    # name: (module, its receiving half, its sending half); both halves take host=
    "shm": ("embedwire.transports.shm", "ShmInbound", "ShmOutbound"),
    "tcp": ("embedwire.transports.tcp", "TcpInbound", "TcpOutbound"),
    "mooncake": ("embedwire.transports.mooncake", "MooncakeInbound", "MooncakeOutbound"),
    "nixl": ("embedwire.transports.nixl", "NixlInbound", "NixlOutbound"),
}
_BUILT_IN = ("shm", "tcp")


def names() -> tuple[str, ...]:
    """Every wire there is."""
    return tuple(_WIRES)


def built_in() -> tuple[str, ...]:
    """Those that need no library of others, best first: what is offered unless told otherwise."""
    return _BUILT_IN


def open_inbound(name: str, *, host: str) -> Inbound:
    """The receiving half of wire ``name``; ``host`` is the address at which senders reach this process.

    Raises ConfigurationError for an unknown name, or when the wire's library is not installed.
    """
    return cast(Inbound, _half(name, 1)(host=host))


def open_outbound(name: str, *, host: str) -> Outbound:
    """The sending half of wire ``name``; arguments and errors as in :func:`open_inbound`."""
    return cast(Outbound, _half(name, 2)(host=host))


def _half(name: str, part: int) -> type:
    if name not in _WIRES:
        raise ConfigurationError(f"transport {name!r} is not one of {', '.join(_WIRES)}")
    try:
        return cast(type, getattr(import_module(_WIRES[name][0]), _WIRES[name][part]))
    except ImportError as error:
        raise ConfigurationError(f"transport {name!r} can not be used here: {error}") from error
