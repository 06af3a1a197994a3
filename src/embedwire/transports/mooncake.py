"""The mooncake wire: regions written through Mooncake's transfer engine. Its library is loaded when a half is made.

Owns what is peculiar to that engine. It addresses memory by the owner's virtual addresses. A request is followed by itself, since a batch
shows only the state of its first; and a request towards a stopped peer never ends, so nothing here waits. Mooncake's listener looks
whether it should end only once a second, and its destructor waits for that with the interpreter lock held: the time-out of its socket is
shortened. Everything else is ``onesided``'s.
"""

from __future__ import annotations

import ctypes
import os
import socket
import stat
import struct
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from importlib import import_module
from typing import Any, ClassVar

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

PACKAGE = "mooncake-transfer-engine-non-cuda"
SYSTEM_PACKAGES = "libibverbs1 librdmacm1 libnuma1"
REQUEST_BYTES_MAX = 2**20
REQUESTS_MAX = 64
"""Of one batch, under way at a time."""
_LOOK_S = 0.02
_GLOG_LEVEL, _FATAL = "_ZN3fLI17FLAGS_minloglevelE", 3
"""The variable of glog below which nothing is said, and its highest value."""
_TIMEVAL = struct.Struct("ll")


def _quiet(module: Any) -> Any:
    """It reports an error for every engine that it makes, on the user's terminal. Its own variable stops below errors, and is
    read when the library is loaded, so the level is raised in the copy of glog that it brings, unless the user has set that variable."""
    if "MC_LOG_LEVEL" not in os.environ:
        with open("/proc/self/maps") as maps:
            paths = {
                line.split(maxsplit=5)[-1].strip()
                for line in maps
                if "/mooncake" in line and "/libglog" in line
            }
        with suppress(OSError, ValueError):  # another build of it: then it talks
            for path in paths:
                ctypes.c_int.in_dll(ctypes.CDLL(path), _GLOG_LEVEL).value = _FATAL
    return module


def load() -> Any:
    """Mooncake's module. Raises ConfigurationError that says what has to be installed."""
    try:
        return _quiet(import_module("mooncake.engine"))
    except ModuleNotFoundError as error:
        raise ConfigurationError(
            f"transport 'mooncake' needs the package {PACKAGE}, or mooncake-transfer-engine"
            f" (pip install 'embedwire[mooncake]'): {error}"
        ) from error
    except (ImportError, OSError) as error:
        raise ConfigurationError(
            f"transport 'mooncake' needs libraries of the system (Debian, Ubuntu: apt install {SYSTEM_PACKAGES}): {error}"
        ) from error


def _network() -> tuple[str, str]:
    """Protocol and device, by the names that Mooncake's own users set: ``MOONCAKE_PROTOCOL`` (``tcp``, or ``rdma`` where there is a
    network card for it) and ``MOONCAKE_DEVICE``."""
    return os.environ.get("MOONCAKE_PROTOCOL", "tcp"), os.environ.get("MOONCAKE_DEVICE", "")


def _engine(host: str) -> Any:
    engine = load().TransferEngine()
    if engine.initialize(host, "P2PHANDSHAKE", *_network()):
        raise EngineError(f"Mooncake can not start an engine at {host}")
    _shorten_destructor(host, engine.get_rpc_port())
    return engine


def _register(engine: Any, address: int, nbytes: int) -> None:
    if engine.batch_register_memory([address], [nbytes]):
        raise EngineError(f"Mooncake can not register {nbytes} bytes")


def _shorten_destructor(host: str, port: int) -> None:
    """Let the engine's listener at ``port`` look more often whether it should end."""
    for name in os.listdir("/proc/self/fd"):
        try:
            fd = os.dup(int(name))
        except OSError:  # closed by another thread meanwhile
            continue
        if not stat.S_ISSOCK(os.fstat(fd).st_mode):
            os.close(fd)
            continue
        with socket.socket(fileno=fd) as sock, suppress(OSError):
            is_listener = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
            if is_listener and sock.family != socket.AF_UNIX and sock.getsockname()[1] == port:
                timeout = _TIMEVAL.pack(0, int(_LOOK_S * 1_000_000))
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, timeout)
                socket.create_connection((host, port), timeout=1.0).close()  # ends the wait that has begun


class MooncakeReceivingEngine(ReceivingEngine):
    """A segment with one buffer."""

    def __init__(self, address: int, nbytes: int, *, host: str) -> None:
        self._engine = _engine(host)
        _register(self._engine, address, nbytes)
        self._address = f"{host}:{self._engine.get_rpc_port()} {address}".encode()

    def address(self) -> bytes:
        return self._address

    def close(self) -> None:
        self._engine = None


class MooncakeFlight(Flight):
    """Requests of at most REQUEST_BYTES_MAX, of which REQUESTS_MAX are under way."""

    def __init__(self, owner: MooncakeSendingEngine, batch: Sequence[Run]) -> None:
        self._owner = owner  # not the engine itself, which would live on with this object
        self._requests = deque(
            (source + at, owner.base + offset + at, min(REQUEST_BYTES_MAX, nbytes - at))
            for source, offset, nbytes in batch
            for at in range(0, nbytes, REQUEST_BYTES_MAX)
        )
        self._under_way: list[int] = []
        self._submit()

    def poll(self) -> State:
        moving = []
        for request in self._under_way:
            status = self._owner.engine.transfer_check_status(request)
            if status < 0:
                return State.FAILED
            if status == 0:
                moving.append(request)
        self._under_way = moving
        try:
            self._submit()
        except EngineError:
            return State.FAILED
        return State.MOVING if self._under_way else State.LANDED

    def _submit(self) -> None:
        while self._requests and len(self._under_way) < REQUESTS_MAX:
            request = self._owner.engine.transfer_submit_write(self._owner.segment, *self._requests.popleft())
            if request in (0, -1, 2**64 - 1):
                raise EngineError("Mooncake did not take a request")
            self._under_way.append(request)


class MooncakeSendingEngine(SendingEngine):
    """An engine that only writes."""

    def __init__(self, *, host: str) -> None:
        self.engine: Any = _engine(host)
        self.segment, self.base = "", 0

    def register(self, address: int, nbytes: int) -> None:
        _register(self.engine, address, nbytes)

    def connect(self, address: bytes) -> None:
        """Opening the segment is done here: within a request it would block, for a minute when the peer is stopped."""
        try:
            segment, _, base = address.decode().partition(" ")
            self.segment, self.base = segment, int(base)
        except ValueError as error:
            raise EngineError(f"the receiver's address is malformed: {error}") from error
        if self.engine.get_first_buffer_address(segment) != self.base:
            raise EngineError(f"Mooncake can not reach segment {segment}")

    def begin(self, batch: Sequence[Run]) -> Flight:
        return MooncakeFlight(self, batch)

    def close(self) -> None:
        self.engine = None


class MooncakeInbound(OneSidedInbound):
    name: ClassVar[str] = "mooncake"

    def __init__(self, *, host: str) -> None:
        load()
        super().__init__(host=host)

    def _make_engine(self, address: int, nbytes: int, *, host: str) -> ReceivingEngine:
        return MooncakeReceivingEngine(address, nbytes, host=host)


class MooncakeOutbound(OneSidedOutbound):
    name: ClassVar[str] = "mooncake"

    def __init__(self, *, host: str) -> None:
        load()
        super().__init__(host=host)

    def _make_engine(self, *, host: str) -> SendingEngine:
        return MooncakeSendingEngine(host=host)
