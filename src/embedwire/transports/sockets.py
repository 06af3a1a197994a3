"""What the TCP connections of all wires have in common."""

from __future__ import annotations

import socket
from typing import Any

from embedwire.errors import TransportError

_KEEPALIVE_IDLE_S, _KEEPALIVE_INTERVAL_S, _KEEPALIVE_PROBES = 30, 10, 3


def tune(sock: socket.socket) -> None:
    """Small messages go at once, and a host that vanished without a word is noticed after a minute; a stopped process still answers these
    probes. Raises OSError for a connection that is gone again."""
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, _KEEPALIVE_IDLE_S)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, _KEEPALIVE_INTERVAL_S)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, _KEEPALIVE_PROBES)


def listen(host: str) -> socket.socket:
    """At a free port, without ever blocking. Raises TransportError when ``host`` can not be bound here."""
    try:
        family = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)[0][0]
        listener = socket.create_server((host, 0), family=family)
    except OSError as error:
        raise TransportError(f"can not listen at {host}: {error}") from error
    listener.setblocking(False)
    return listener


def accept(listener: socket.socket) -> tuple[socket.socket, Any] | None:
    """The next connection, tuned, and whose it is; None when it is gone again. Raises OSError when none can be had: out of descriptors,
    most likely."""
    try:
        sock, peer = listener.accept()
    except (BlockingIOError, ConnectionAbortedError):
        return None
    try:
        sock.setblocking(False)
        tune(sock)
    except OSError:
        sock.close()
        return None
    return sock, peer
