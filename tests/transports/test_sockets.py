"""The sender's side of a greeting."""

from __future__ import annotations

import socket
import time

import pytest

from embedwire.testing.wires import PATIENCE_S
from embedwire.transports.sockets import receive


def test_bytes_that_trickle_in_do_not_extend_the_deadline() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        theirs.sendall(b"welcome")
        assert receive(ours, 3, deadline_s=time.monotonic() + PATIENCE_S) == b"wel"
        with pytest.raises(TimeoutError):
            receive(ours, 4, deadline_s=time.monotonic())


def test_the_end_of_the_stream_within_an_answer() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        theirs.sendall(b"wel")
        theirs.close()
        with pytest.raises(EOFError):
            receive(ours, 7, deadline_s=time.monotonic() + PATIENCE_S)
