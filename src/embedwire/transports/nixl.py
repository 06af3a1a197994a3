"""The nixl wire: regions written through a NIXL agent and its UCX backend. Its library is loaded when a half is made.

Owns what is peculiar to that agent. It addresses memory by the owner's virtual addresses. Within a host UCX may copy from process to
process in the kernel, so that a stopped receiver gets its bytes, and within the call that begins a batch; over sockets a batch towards a
stopped peer never ends, so nothing here waits. A handle keeps its agent alive, so an engine lets go of all handles when it is closed.
Everything else is ``onesided``'s.
"""

from __future__ import annotations

import glob
import os
import secrets
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import cache
from importlib import import_module
from typing import Any, ClassVar, TypeVar

from embedwire.errors import ConfigurationError
from embedwire.transports.onesided import OneSidedInbound, OneSidedOutbound
from embedwire.transports.onesided.engine import (
    EngineError,
    Flight,
    ReceivingEngine,
    Run,
    SendingEngine,
    State,
)

PACKAGE = "nixl"
_MEMORY = "DRAM"
_THREAD_LOOKS_US = 1000
"""The thread of a receiving agent looks this often, besides whenever something has come. 0 would make it spin."""
T = TypeVar("T")


def load() -> Any:
    """NIXL's module, with all that an agent needs. Raises ConfigurationError that says what has to be installed."""
    # UCX says on standard output what also comes back as an error.
    os.environ.setdefault("UCX_LOG_LEVEL", "FATAL")
    os.environ.setdefault("NIXL_LOG_LEVEL", "ERROR")
    if not glob.glob("/sys/class/infiniband/*"):
        # Of no use here, and it brings libibverbs and libnl-route in a second copy: beside the system's own, the
        # process would end with a fault in their destructors.
        os.environ.setdefault("UCX_MODULES", "^ib")
    try:
        return _ready(import_module("nixl._api"))
    except ModuleNotFoundError as error:
        raise ConfigurationError(
            f"transport 'nixl' needs the package {PACKAGE} (pip install 'embedwire[nixl]'): {error}"
        ) from error
    except (ImportError, OSError) as error:
        raise ConfigurationError(
            f"transport 'nixl' needs a shared library that package {PACKAGE} does not bring: {error}"
        ) from error
    except EngineError as error:
        raise ConfigurationError(f"transport 'nixl' does not work here: {error}") from error


@cache
def _ready(api: Any) -> Any:
    """Once a process: the first agent takes half a second to load UCX, which would come out of the first session's time-out."""
    _said(lambda: _make_agent(api, has_thread=False))
    return api


def _said(call: Callable[..., T], *args: Any) -> T:
    """Call the library; what it raises becomes EngineError. Its own exceptions have no root but Exception."""
    try:
        return call(*args)
    except Exception as error:
        raise EngineError(f"NIXL: {type(error).__name__}: {error}") from error


def _agent(*, has_thread: bool) -> Any:
    """An agent with UCX. ``has_thread``: a thread of the library moves what comes in; without it, work moves on when a handle is
    looked at."""
    return _said(lambda: _make_agent(load(), has_thread=has_thread))


def _make_agent(api: Any, *, has_thread: bool) -> Any:
    # The library's own constructor makes that thread spin on a core for as long as the agent lives. So the agent
    # begins without a back end, and gets another inner one, whose thread sleeps until something comes.
    name = f"embedwire-{secrets.token_hex(8)}"
    agent = api.nixl_agent(name, api.nixl_agent_config(backends=[]))
    config = api.nixlBind.nixlAgentConfig()
    config.useProgThread = has_thread
    config.pthrDelay = _THREAD_LOOKS_US
    agent.agent = api.nixlBind.nixlAgent(name, config)
    agent.create_backend("UCX", {})
    return agent


class NixlReceivingEngine(ReceivingEngine):
    """An agent with one registration."""

    def __init__(self, address: int, nbytes: int) -> None:
        self._agent = _agent(has_thread=True)
        self._registration = _said(self._agent.register_memory, [(address, nbytes, 0, "")], _MEMORY)
        metadata: bytes = _said(self._agent.get_agent_metadata)
        self._address = address.to_bytes(8, "little") + metadata

    def address(self) -> bytes:
        return self._address

    def close(self) -> None:
        with suppress(Exception):
            self._agent.deregister_memory(self._registration)
        self._registration = self._agent = None


class NixlFlight(Flight):
    """A transfer request."""

    def __init__(self, owner: NixlSendingEngine, handle: Any, state: str) -> None:
        self.handle = handle
        self._owner = owner
        self._state = state

    def poll(self) -> State:
        try:
            if self._state == "PROC":
                self._state = self._owner.agent.check_xfer_state(self.handle)
            if self._state == "PROC":
                return State.MOVING
            self._owner.agent.release_xfer_handle(self.handle)
        except Exception:  # the library's, whose kinds have no root: the batch is not whole
            return State.FAILED
        self._owner.drop(self)
        return State.LANDED if self._state == "DONE" else State.FAILED


class NixlSendingEngine(SendingEngine):
    """An agent that only writes."""

    def __init__(self) -> None:
        self.agent: Any = _agent(has_thread=False)  # only moves when it is looked at, and then at once
        self._registrations: list[Any] = []
        self._flights: set[NixlFlight] = set()
        self.peer: Any = None
        self.base = 0

    def register(self, address: int, nbytes: int) -> None:
        self._registrations.append(_said(self.agent.register_memory, [(address, nbytes, 0, "")], _MEMORY))

    def connect(self, address: bytes) -> None:
        self.base = int.from_bytes(address[:8], "little")
        self.peer = _said(self.agent.add_remote_agent, address[8:])

    def begin(self, batch: Sequence[Run]) -> Flight:
        return _said(self._begin, batch)

    def _begin(self, batch: Sequence[Run]) -> Flight:
        ours = self.agent.get_xfer_descs([(source, nbytes, 0) for source, _, nbytes in batch], _MEMORY)
        theirs = self.agent.get_xfer_descs(
            [(self.base + offset, nbytes, 0) for _, offset, nbytes in batch], _MEMORY
        )
        handle = self.agent.initialize_xfer("WRITE", ours, theirs, self.peer)
        flight = NixlFlight(self, handle, "PROC")
        self._flights.add(flight)
        flight._state = self.agent.transfer(handle)
        return flight

    def drop(self, flight: NixlFlight) -> None:
        """That one has ended."""
        self._flights.discard(flight)
        flight.handle = None

    def close(self) -> None:
        for flight in tuple(self._flights):
            with suppress(Exception):  # one that can not be cancelled ends with its agent
                self.agent.release_xfer_handle(flight.handle)
            self.drop(flight)
        with suppress(Exception):
            self.agent.remove_remote_agent(self.peer)
        for registration in self._registrations:
            with suppress(Exception):
                self.agent.deregister_memory(registration)
        self._registrations.clear()
        self.agent = None


class NixlInbound(OneSidedInbound):
    name: ClassVar[str] = "nixl"

    def __init__(self, *, host: str) -> None:
        load()
        super().__init__(host=host)

    def _make_engine(self, address: int, nbytes: int, *, host: str) -> ReceivingEngine:
        return NixlReceivingEngine(address, nbytes)


class NixlOutbound(OneSidedOutbound):
    name: ClassVar[str] = "nixl"

    def __init__(self, *, host: str) -> None:
        load()
        super().__init__(host=host)

    def _make_engine(self, *, host: str) -> SendingEngine:
        return NixlSendingEngine()
