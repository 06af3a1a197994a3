"""The greeting that opens every TCP connection of a transport, and the sender's side of it.

All numbers are little-endian. The magic names the transport's family and version; the nonce is the secret of the region's descriptor::

    HELLO    magic: 4 bytes  nonce: 16 bytes  sender_token: u64

The receiver's side is :mod:`embedwire.transports.listener`. What follows the greeting is defined by each transport.
"""

from __future__ import annotations

import socket
import struct
import time
from collections.abc import Callable

from embedwire.errors import ProtocolViolation, TransportError

NONCE_BYTES = 16
_HELLO = struct.Struct("<4s16sQ")
HELLO_BYTES = _HELLO.size
LOOK_S = 0.1
"""How often a wait for a receiver checks whether its session is being closed."""
_KEEPALIVE_IDLE_S, _KEEPALIVE_INTERVAL_S, _KEEPALIVE_PROBES = 30, 10, 3


def encode_hello(magic: bytes, nonce: bytes, sender_token: int) -> bytes:
    return _HELLO.pack(magic, nonce, sender_token)


def decode_hello(data: bytes, *, magic: bytes) -> tuple[bytes, int]:
    """(nonce, sender_token). Raises ProtocolViolation for another magic."""
    found, nonce, sender_token = _HELLO.unpack(data)
    if found != magic:
        raise ProtocolViolation(f"a connection began with {found!r}, not with a greeting {magic!r}")
    return nonce, sender_token


def tune(sock: socket.socket) -> None:
    """Send small messages at once, and detect a vanished host after a minute; a stopped process still answers these probes. Raises
    OSError for a connection that has already ended."""
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, _KEEPALIVE_IDLE_S)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, _KEEPALIVE_INTERVAL_S)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, _KEEPALIVE_PROBES)


def connect(host: str, port: int, hello: bytes, *, deadline_s: float) -> socket.socket:
    """A connection on which ``hello`` has been sent, before ``deadline_s`` of the monotonic clock. Raises TransportError."""
    try:
        sock = socket.create_connection((host, port), timeout=left_s(deadline_s))
    except (OSError, ValueError) as error:
        raise TransportError(f"cannot connect to {host}:{port}: {error}") from error
    try:
        tune(sock)
        sock.sendall(hello)
    except OSError as error:
        sock.close()
        raise TransportError(f"cannot send a greeting to {host}:{port}: {error}") from error
    return sock


def receive(
    sock: socket.socket, nbytes: int, *, deadline_s: float, is_closing: Callable[[], bool] = lambda: False
) -> bytes:
    """Exactly ``nbytes``. Raises EOFError at the end of the stream, OSError when the connection broke, ``deadline_s`` has passed, or
    ``is_closing`` returns True, which may come from another thread."""
    data = b""
    while len(data) < nbytes:
        if is_closing() or time.monotonic() >= deadline_s:  # bytes that trickle in do not extend it
            raise TimeoutError("closed" if is_closing() else "timed out")
        sock.settimeout(min(LOOK_S, left_s(deadline_s)))
        try:
            more = sock.recv(nbytes - len(data))
        except TimeoutError as error:
            if error.errno is not None:  # the kernel's: the host is out of reach
                raise
            continue
        if not more:
            raise EOFError("end of stream")
        data += more
    return data


def left_s(deadline_s: float) -> float:
    """A time-out for a socket: never 0, which would mean that it does not block."""
    return max(0.001, deadline_s - time.monotonic())
