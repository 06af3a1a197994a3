"""The wire within one host: a region is a file in shared memory, and a write is one copy into it.

Owns the segment files and the locks on them. The receiver sees no write, so it can not enforce a ticket:
the sender asks ``is_permitted`` before each slice, and the rest is quarantine. ``host`` plays no part here.

Proof that a sender is gone comes from the kernel. A sender locks the byte ``sender_token mod 2**62`` of the
file, far beyond its end, with a lock that belongs to the open file it maps. The kernel drops that lock when
the last descriptor *and the last mapping* of that open file are gone, and never because the process is
stopped. The receiver locks a byte too, so that a segment whose receiver was killed can be told from a live
one and removed (:func:`sweep`). ``multiprocessing.shared_memory`` is not used: its tracker removes segments
behind their owner's back.
"""

from __future__ import annotations

import fcntl
import glob
import mmap
import os
import platform
import secrets
import struct
import threading
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from typing import Annotated, ClassVar

import msgspec
import numpy as np

from embedwire.errors import TransportError, UsageError
from embedwire.transports.contract import Inbound, Outbound, Outcome, RemoteRegion, Slice
from embedwire.transports.pieces import check_sender_token, check_slice

_DIRECTORY = "/dev/shm"
_PREFIX = "embedwire-"
_NAME = _PREFIX + "[0-9a-f]" * 32
"""Of a segment: as a regular expression, and as a pattern for files."""
_NONCE_BYTES = 16
_MAGIC = b"EWshm\x00\x00\x04"
_HEADER = struct.Struct("<8s16sQ")
"""Start of the segment's first page: magic and version, nonce, bytes of the region."""
_DATA_AT = mmap.PAGESIZE + 128
"""Where the region begins: a little into a page. Arrays of numpy and torch begin 16 or 64 bytes into one, and where the target of
a copy lies closely behind its source within the page, ``rep movsb``, by which glibc 2.36 copies less than a megabyte, was seen to take
twice as long on AMD Zen."""
_MARKS, _MARKS_AT = 256, 2048
"""In the second half of that page: one word a mark, at the place that its ticket modulo _MARKS names. The upper half of a word is
the ticket's lower one, the lower half the mark: one aligned store, so it is never read torn."""
_MARK_BITS = 32
_HAS_MARKS = platform.machine() == "x86_64"
"""There one processor sees the stores of another in their order, so whoever sees a mark sees the bytes before it too."""
_OWNER_BYTE = 2**62
"""Locked by the receiver. Senders lock the bytes below."""
_FLOCK = struct.Struct("hhqqi4x")
"""struct flock of Linux on 64 bits: type, whence, start, length, pid (0 for locks of an open file)."""


class _Descriptor(msgspec.Struct, array_like=True, frozen=True, tag="shm/4"):
    name: Annotated[str, msgspec.Meta(pattern=rf"^{_NAME}\Z")]
    nonce: Annotated[bytes, msgspec.Meta(min_length=_NONCE_BYTES, max_length=_NONCE_BYTES)]
    nbytes: Annotated[int, msgspec.Meta(ge=1, le=2**62)]


class ShmInbound(Inbound):
    """A region in a shared-memory segment that this object created and will unlink."""

    name: ClassVar[str] = "shm"
    is_fenced: ClassVar[bool] = False
    has_marks: ClassVar[bool] = _HAS_MARKS

    def __init__(self, *, host: str) -> None:
        self._fd = -1
        self._path = ""
        self._descriptor = b""
        self._closed = False

    def allocate(self, nbytes: int) -> memoryview:
        """See the contract. Raises TransportError when shared memory has no room for ``nbytes``."""
        if self._descriptor or self._closed or nbytes < 1:
            raise UsageError(f"allocate({nbytes}): wants at least one byte, once, before close")
        sweep()
        nonce = secrets.token_bytes(_NONCE_BYTES)
        self._path, self._fd = _create()
        try:
            # Reserving first makes a full /dev/shm an error here, where touching the pages would be a SIGBUS.
            os.posix_fallocate(self._fd, 0, _DATA_AT + nbytes)
            os.pwrite(self._fd, _HEADER.pack(_MAGIC, nonce, nbytes), 0)
            self._map = mmap.mmap(self._fd, _DATA_AT + nbytes, mmap.MAP_SHARED | mmap.MAP_POPULATE)
        except (OSError, OverflowError) as error:
            self.close()
            raise TransportError(
                f"{_DIRECTORY} has no room for a region of {nbytes} bytes: {error}"
            ) from error
        self._marks = _marks(self._map)
        self._descriptor = msgspec.msgpack.encode(_Descriptor(os.path.basename(self._path), nonce, nbytes))
        return memoryview(self._map)[_DATA_AT:]

    def descriptor(self) -> bytes:
        if not self._descriptor:
            raise UsageError("descriptor() before allocate()")
        return self._descriptor

    def permit(self, ticket: int, spans: Sequence[tuple[int, int]]) -> None:
        """Nothing to do: this half sees no write."""

    def revoke(self, ticket: int) -> bool:
        return False

    def mark(self, ticket: int) -> int:
        word = self._marks[ticket % _MARKS]
        return word % 2**_MARK_BITS if word >> _MARK_BITS == ticket % 2**_MARK_BITS else 0

    def is_gone(self, sender_token: int) -> bool:
        check_sender_token(sender_token)
        return self._closed or not _is_locked(self._fd, sender_token % 2**62)

    def close(self) -> None:
        """Unlink the segment. The caller's views stay readable; the memory is freed with the last of them."""
        if self._closed:
            return
        self._closed = True
        if self._fd >= 0:
            with suppress(FileNotFoundError):
                os.unlink(self._path)
            _unlock(self._fd, _OWNER_BYTE)
            os.close(self._fd)
        if self._descriptor:
            self._marks = memoryview(bytes(8 * _MARKS)).cast("Q")
            with suppress(BufferError):
                self._map.close()


class ShmRegion(RemoteRegion):
    """A mapped segment of somebody else. Holds the sender's lock for as long as it is mapped."""

    has_marks: ClassVar[bool] = _HAS_MARKS

    def __init__(self, fd: int, nbytes: int, *, on_close: Callable[[ShmRegion], None]) -> None:
        self._fd = fd
        self._on_close = on_close
        self._map = mmap.mmap(fd, _DATA_AT + nbytes, mmap.MAP_SHARED | mmap.MAP_POPULATE)
        self._bytes = np.frombuffer(self._map, np.uint8, offset=_DATA_AT)
        self._marks = _marks(self._map)
        self._nbytes = nbytes
        self._closed = False
        self._copying = threading.Lock()  # close() waits for the slice that is being copied

    def write(
        self,
        ticket: int,
        slices: Iterable[Slice],
        *,
        is_permitted: Callable[[], bool],
        on_landed: Callable[[int], None],
        timeout_s: float,
    ) -> Outcome:
        """See the contract. Ends as LOST also when the receiver has closed or died. Never UNKNOWN: a copy has
        no echo."""
        for number, pieces in enumerate(slices, 1):
            check_slice(pieces, self._nbytes)
            if not is_permitted():
                return Outcome.LOST
            with self._copying:
                if self._closed or not _is_locked(self._fd, _OWNER_BYTE):
                    return Outcome.LOST
                for piece in pieces:
                    source = np.frombuffer(piece.source, np.uint8)
                    np.copyto(self._bytes[piece.offset : piece.offset + len(source)], source)
            on_landed(number)
        return Outcome.LANDED

    def set_mark(self, ticket: int, mark: int) -> None:
        with self._copying:
            if _HAS_MARKS and not self._closed:
                self._marks[ticket % _MARKS] = (ticket % 2**_MARK_BITS) << _MARK_BITS | mark

    def close(self) -> bool:
        with self._copying:
            if self._closed:
                return True
            self._closed = True
            self._bytes = np.empty(0, np.uint8)
            self._marks.release()
            self._map.close()
            os.close(self._fd)  # and with it the lock: the mapping went before
        self._on_close(self)
        return True


class ShmOutbound(Outbound):
    """Maps the segments of receivers on this host."""

    name: ClassVar[str] = "shm"

    def __init__(self, *, host: str) -> None:
        self._regions: set[ShmRegion] = set()

    def connect(self, descriptor: bytes, *, sender_token: int, timeout_s: float) -> ShmRegion:
        check_sender_token(sender_token)
        try:
            target = msgspec.msgpack.decode(descriptor, type=_Descriptor)
        except msgspec.MsgspecError as error:
            raise TransportError(f"not a descriptor of shared memory: {error}") from error
        region = _attach(target, sender_token, on_close=self._regions.discard)
        self._regions.add(region)
        return region

    def close(self) -> None:
        for region in tuple(self._regions):
            region.close()


def _attach(target: _Descriptor, sender_token: int, *, on_close: Callable[[ShmRegion], None]) -> ShmRegion:
    try:
        fd = os.open(f"{_DIRECTORY}/{target.name}", os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
    except OSError as error:
        raise TransportError(f"segment {target.name} can not be opened from here: {error}") from error
    try:
        header = os.pread(fd, _HEADER.size, 0)
        if header != _HEADER.pack(_MAGIC, target.nonce, target.nbytes):
            raise TransportError(f"segment {target.name} is not the one that was described")
        if os.fstat(fd).st_size != _DATA_AT + target.nbytes or not _is_locked(fd, _OWNER_BYTE):
            raise TransportError(f"segment {target.name} has no receiver any more")
        # The lock comes before the mapping, so there is no moment in which an unproven sender could write. It
        # is a shared lock: two sessions of one sender do not exclude each other.
        if not _try_lock(fd, fcntl.F_RDLCK, sender_token % 2**62):
            raise TransportError(f"segment {target.name}: the lock of sender {sender_token} is taken")
        return ShmRegion(fd, target.nbytes, on_close=on_close)
    except (OSError, ValueError) as error:
        os.close(fd)
        raise TransportError(f"segment {target.name} can not be mapped: {error}") from error
    except TransportError:
        os.close(fd)
        raise


def _marks(segment: mmap.mmap) -> memoryview:
    return memoryview(segment)[_MARKS_AT : _MARKS_AT + 8 * _MARKS].cast("Q")


def _create() -> tuple[str, int]:
    """A new, locked, empty segment file: its path and descriptor."""
    while True:
        path = f"{_DIRECTORY}/{_PREFIX}{secrets.token_hex(16)}"
        try:
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        except OSError as error:
            raise TransportError(f"no shared memory can be created: {error}") from error
        if _try_lock(fd, fcntl.F_WRLCK, _OWNER_BYTE) and os.fstat(fd).st_nlink:
            return path, fd
        os.close(fd)  # a sweep came between creation and lock, and has removed or will remove it


def sweep() -> None:
    """Remove segments whose receiver died without closing. Another user's, and whatever is not ours, stay."""
    for path in glob.glob(f"{_DIRECTORY}/{_NAME}"):
        with suppress(OSError):
            fd = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
            try:
                if _try_lock(fd, fcntl.F_WRLCK, _OWNER_BYTE):
                    os.unlink(path)
            finally:
                os.close(fd)


def _try_lock(fd: int, kind: int, at: int) -> bool:
    try:
        fcntl.fcntl(fd, fcntl.F_OFD_SETLK, _FLOCK.pack(kind, os.SEEK_SET, at, 1, 0))
    except (BlockingIOError, PermissionError):
        return False
    return True


def _unlock(fd: int, at: int) -> None:
    fcntl.fcntl(fd, fcntl.F_OFD_SETLK, _FLOCK.pack(fcntl.F_UNLCK, os.SEEK_SET, at, 1, 0))


def _is_locked(fd: int, at: int) -> bool:
    """Whether another open file than ``fd`` holds a lock on that byte."""
    found: bytes = fcntl.fcntl(fd, fcntl.F_OFD_GETLK, _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, at, 1, 0))
    return bool(_FLOCK.unpack(found)[0] != fcntl.F_UNLCK)
