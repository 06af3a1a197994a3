"""Shared memory: what its files and locks prove. What all wires share is in the conformance suite."""

from __future__ import annotations

import errno
import fcntl
import os
import secrets
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import msgspec
import numpy as np
import pytest

from embedwire.errors import TransportError
from embedwire.testing.wires import PATIENCE_S
from embedwire.transports import shm
from embedwire.transports.contract import Outcome, Piece, RemoteRegion
from embedwire.transports.shm import ShmInbound, ShmOutbound


@pytest.fixture
def inbound() -> Iterator[ShmInbound]:
    inbound = ShmInbound(host="127.0.0.1")
    yield inbound
    inbound.close()


def path_of(descriptor: bytes) -> Path:
    return Path("/dev/shm") / msgspec.msgpack.decode(descriptor, type=shm._Descriptor).name


def write_one(region: RemoteRegion) -> Outcome:
    slices = [[Piece(memoryview(b"data"), 3)]]
    return region.write(1, slices, is_permitted=lambda: True, on_landed=lambda _: None, timeout_s=1.0)


def connect(descriptor: bytes, *, sender_token: int = 5) -> RemoteRegion:
    return ShmOutbound(host="127.0.0.1").connect(descriptor, sender_token=sender_token, timeout_s=1.0)


def start(code: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )


def test_a_size_beyond_every_file_leaves_no_file(
    inbound: ShmInbound, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its name is random, and other tests may have segments of their own at the same time."""
    monkeypatch.setattr(secrets, "token_hex", lambda nbytes: "ab" * nbytes)
    with pytest.raises(TransportError, match="no room"):
        inbound.allocate(2**63)
    assert f"embedwire-{'ab' * 16}" not in os.listdir("/dev/shm")


@pytest.mark.parametrize("array_begins", [0, 16, 64], ids=["a page", "numpy", "torch"])
def test_no_copy_goes_to_closely_behind_its_source(inbound: ShmInbound, array_begins: int) -> None:
    """Within the page, which takes some processors twice as long. Rows are multiples of 256 bytes, as widths of models are."""
    region_begins = np.frombuffer(inbound.allocate(5000), np.uint8).ctypes.data
    assert (array_begins - region_begins) % 256 not in range(1, 64), "out of the region"
    assert (region_begins - array_begins) % 256 not in range(1, 64), "into the region"


def test_the_file_is_private_whole_and_unlinked_at_close(inbound: ShmInbound) -> None:
    memory = inbound.allocate(5000)
    path = path_of(inbound.descriptor())
    status = path.stat()
    assert status.st_mode & 0o777 == 0o600
    assert status.st_size == shm._DATA_AT + 5000
    assert status.st_blocks * 512 >= 5000, "its pages are there before the first write"
    inbound.close()
    assert not path.exists()
    assert bytes(memory) == bytes(5000), "views of the owner stay readable"


def test_a_full_shared_memory_is_an_error_and_no_signal(
    inbound: ShmInbound, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pages are reserved before any is touched: touching one that can not be had is a SIGBUS."""
    before = os.listdir("/dev/shm")

    def full(*_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(TransportError, match="no room for a region of 5000 bytes"):
        inbound.allocate(5000)
    assert not [name for name in os.listdir("/dev/shm") if name not in before and is_mine(name)]


def is_mine(name: str) -> bool:
    """Whether this process has the segment open."""
    links = (Path(f"/proc/self/fd/{fd}") for fd in os.listdir("/proc/self/fd"))
    return any(name in os.readlink(link) for link in links if link.exists())


@pytest.mark.failure_mode("lying-peer")
@pytest.mark.invariant("validation")
@pytest.mark.parametrize("name", ["../../etc/passwd", "embedwire-", "embedwire-" + "0" * 31 + "/", "x" * 42])
def test_only_names_of_segments_are_opened(inbound: ShmInbound, name: str) -> None:
    """A descriptor comes from the peer and can name no other file."""
    with pytest.raises(TransportError, match="not a descriptor"):
        connect(msgspec.msgpack.encode(shm._Descriptor(name, bytes(16), 100)))


@pytest.mark.failure_mode("restart-on-same-address", "message-from-earlier-life")
@pytest.mark.parametrize(
    ("nonce", "nbytes"), [(bytes(16), 5000), (None, 4999), (None, 2**60), (None, 0), (None, -1)]
)
def test_another_segment_of_that_name_is_not_written(
    inbound: ShmInbound, nonce: bytes | None, nbytes: int
) -> None:
    """Another host or another incarnation of the receiver may have the name, but not the nonce."""
    inbound.allocate(5000)
    true = msgspec.msgpack.decode(inbound.descriptor(), type=shm._Descriptor)
    false = shm._Descriptor(true.name, true.nonce if nonce is None else nonce, nbytes)
    with pytest.raises(TransportError):
        connect(msgspec.msgpack.encode(false))
    for nonce in (b"", true.nonce[:15], true.nonce + b"x"):
        with pytest.raises(TransportError):
            connect(msgspec.msgpack.encode(shm._Descriptor(true.name, nonce, 5000)))
    assert inbound.is_gone(5)


def test_the_largest_tokens_have_locks_of_their_own(inbound: ShmInbound) -> None:
    inbound.allocate(100)
    tokens = (1, 2, 2**62 - 1, 2**62)
    regions = [connect(inbound.descriptor(), sender_token=token) for token in tokens]
    for token, region in zip(tokens, regions, strict=True):
        assert not inbound.is_gone(token)
        region.close()
        assert inbound.is_gone(token)


@pytest.mark.failure_mode("encoder-killed")
@pytest.mark.invariant("no-early-reuse")
def test_the_lock_outlives_the_descriptor_while_the_mapping_lives(inbound: ShmInbound) -> None:
    """A forked child that has closed all descriptors can still write."""
    inbound.allocate(100)
    code = (
        "import os, sys\n"
        "from embedwire.transports.shm import ShmOutbound\n"
        f"outbound = ShmOutbound(host='')\noutbound.connect(bytes.fromhex('{inbound.descriptor().hex()}'),"
        " sender_token=5, timeout_s=1)\n"
        "print('connected', flush=True)\n"
        "os.closerange(3, 100)\n"
        "sys.stdin.readline()\n"
        "os._exit(0) if os.fork() else sys.stdin.readline()\n"
    )
    with start(code) as child:
        assert child.stdin
        assert child.stdout
        assert child.stdout.readline() == "connected\n"
        child.stdin.write("fork\n")
        child.stdin.flush()
        child.wait(PATIENCE_S)
        assert not inbound.is_gone(5), "the fork still maps the region"
        child.stdin.close()
        assert child.stdout.read() == "", "the fork has ended"
        while not inbound.is_gone(5):
            pass


@pytest.mark.failure_mode("language-server-killed", "leftovers-of-a-dead-process")
def test_a_killed_receiver_is_swept_and_a_living_one_is_not(inbound: ShmInbound) -> None:
    """The file of a killed receiver is removed when the next one starts, and its senders get LOST."""
    living = ShmInbound(host="127.0.0.1")
    living.allocate(100)
    code = (
        "import sys\n"
        "from embedwire.transports.shm import ShmInbound\n"
        "inbound = ShmInbound(host='')\ninbound.allocate(100)\n"
        "print(inbound.descriptor().hex(), flush=True)\n"
        "sys.stdin.read()\n"
    )
    with start(code) as child:
        assert child.stdout
        descriptor = bytes.fromhex(child.stdout.readline())
        region = connect(descriptor)
        assert write_one(region) is Outcome.LANDED
        child.kill()
    assert write_one(region) is Outcome.LOST
    region.close()
    path = path_of(descriptor)
    if path.exists():  # a test that runs beside this one may have swept it
        with pytest.raises(TransportError, match="no receiver"):
            connect(descriptor)
    inbound.allocate(100)
    assert not path.exists()
    assert path_of(living.descriptor()).exists()
    living.close()


def test_a_sweep_between_creation_and_lock_costs_a_second_try(
    inbound: ShmInbound, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A new file without its lock looks like one of a dead receiver: its creator has to notice."""
    honest = shm._try_lock
    paths: list[str] = []

    def swept_first(fd: int, kind: int, at: int) -> bool:
        if kind == fcntl.F_WRLCK and not paths:
            paths.append(os.readlink(f"/proc/self/fd/{fd}"))
            os.unlink(paths[0])
        return honest(fd, kind, at)

    monkeypatch.setattr(shm, "sweep", lambda: None)
    monkeypatch.setattr(shm, "_try_lock", swept_first)
    inbound.allocate(100)
    assert str(path_of(inbound.descriptor())) != paths[0]
    assert path_of(inbound.descriptor()).exists()
