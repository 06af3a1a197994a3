"""The process groups of one language server's tensor-parallel ranks.

Owns the rendezvous, the groups, their time-outs and their end. Must not know models, prompts or what is said over the groups. Made and
closed by the main thread of each rank; used by the thread that runs the model.
"""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import msgspec
import numpy as np
import torch
from torch import distributed

from embedwire.engines.transformers.sharding import Shard
from embedwire.errors import ConfigurationError, RankError
from embedwire.limits import RANK_START_S, RANK_STEP_S
from embedwire.memory.layout import DTYPES

_log = logging.getLogger(__name__)
_FOR_EVER = timedelta(days=3650)
_LOOPBACK = ("127.0.0.1", "localhost")
_NO_ARRAYS: Mapping[str, np.ndarray] = {}
_ENCODER = msgspec.msgpack.Encoder()
_DECODER = msgspec.msgpack.Decoder(tuple[bytes, list[tuple[str, str, tuple[int, ...]]]])


class TensorParallel:
    """This process as rank ``rank`` of ``size``. A process has one at a time, since torch has one default group.

    ``address`` is where they find each other: ``host:port``, where rank 0 listens, or ``file:///path`` of a file that is not there yet.
    With a file or the loopback address all their connections stay on this host.
    ``backend`` carries the sums of the model: ``gloo`` for CPU, ``nccl`` for CUDA, one device a rank. The constructor returns when all
    ranks are there, and raises RankError when they are not after ``start_timeout_s``. Within a step no rank waits longer than
    ``timeout_s`` for another; between steps an idle group waits without end and without work. ``on_broken`` is called once, when the group
    can not go on, on the thread that found it out; it must not block. Nothing repairs a group: end its processes.
    """

    def __init__(
        self,
        rank: int,
        *,
        size: int,
        address: str,
        backend: str = "gloo",
        timeout_s: float = RANK_STEP_S,
        start_timeout_s: float = RANK_START_S,
        on_broken: Callable[[RankError], None] | None = None,
    ) -> None:
        host, _, port = address.rpartition(":")
        is_file = address.startswith("file:///")
        if not 0 <= rank < size or not (is_file or (host and port.isdecimal())):
            raise ConfigurationError(
                f"rank {rank} of {size} at {address!r} is not a rank of a group at host:port or file:///path"
            )
        self.rank = rank
        self.size = size
        self.error: RankError | None = None
        """Why the group can not go on; None while it can."""
        self._timeout = timedelta(seconds=timeout_s)
        self._start_timeout = timedelta(seconds=start_timeout_s)
        self._on_broken = on_broken
        if is_file or host in _LOOPBACK:
            os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
        try:
            if is_file:
                store = _file_store(address, rank=rank, size=size, timeout=self._start_timeout)
            else:
                store = _store(host, int(port), rank=rank, size=size, timeout=self._start_timeout)
            distributed.init_process_group(
                "gloo", store=store, rank=rank, world_size=size, timeout=self._timeout
            )
            # Followers wait here for the next step; rank 0 waits here for a follower that is not ready for one.
            self._signals: Any = distributed.new_group(
                backend="gloo", timeout=_FOR_EVER if rank else self._timeout
            )
            group = distributed.new_group(backend=backend, timeout=self._timeout)
        except (RuntimeError, OSError) as error:
            raise RankError(f"rank {rank} of {size} found no group at {address}: {error}") from error
        self.shard = Shard(rank, size, group)

    def new_gloo_group(self) -> Any:
        """A process group over all ranks for another use, and for another thread. All ranks ask for their groups in the same order."""
        return distributed.new_group(backend="gloo", timeout=self._timeout)

    def gather(self, text: str) -> list[str]:
        """What each rank says, in order of ranks. All ranks call this together, while no step is under way. Raises RankError."""
        said: list[str] = [""] * self.size
        with self.in_step():
            distributed.all_gather_object(said, text)
        return said

    def wait_for_all(self) -> None:
        """Return when all ranks have called this, after loading their weights. Raises RankError, also after ``start_timeout_s``."""
        with self.in_step():
            distributed.monitored_barrier(timeout=self._start_timeout, wait_all_ranks=True)

    def send(self, message: bytes, arrays: Mapping[str, np.ndarray] = _NO_ARRAYS) -> None:
        """On rank 0: hand a message, with arrays of dtypes that a layout knows, to each :meth:`receive` of the others."""
        heads = [(name, array.dtype.name, array.shape) for name, array in arrays.items()]
        body = np.frombuffer(bytearray(_ENCODER.encode((message, heads))), np.uint8)
        distributed.broadcast(torch.tensor([len(body)]), 0, group=self._signals)
        for array in (body, *arrays.values()):
            distributed.broadcast(_as_bytes(np.ascontiguousarray(array)), 0)

    def receive(self) -> tuple[bytes, dict[str, np.ndarray]]:
        """On the other ranks: the next message. Sleeps until there is one; raises when rank 0 has ended."""
        length = torch.zeros(1, dtype=torch.int64)
        distributed.broadcast(length, 0, group=self._signals)
        body = np.empty(int(length), np.uint8)
        distributed.broadcast(_as_bytes(body), 0)
        message, heads = _DECODER.decode(body.data)
        arrays = {name: np.empty(shape, DTYPES[dtype]) for name, dtype, shape in heads}
        for array in arrays.values():
            distributed.broadcast(_as_bytes(array), 0)
        return message, arrays

    def check(self) -> None:
        """Raise RankError when the group can not go on."""
        if self.error is not None:
            raise self.error

    @contextmanager
    def in_step(self) -> Iterator[None]:
        """What is said and computed by all ranks together. Any error in it breaks the group, and is raised as RankError."""
        self.check()
        try:
            yield
        except Exception as error:
            raise self.broken_by(error) from error

    def broken_by(self, error: Exception) -> RankError:
        """Remember that the group can not go on, and why. Returns what to raise."""
        if self.error is None:
            reason = str(error).partition(". ")[0]  # what torch says after that is advice
            self.error = RankError(f"the tensor-parallel group is broken, seen by rank {self.rank}: {reason}")
            _log.error("%s", self.error)
            if self._on_broken is not None:
                self._on_broken(self.error)
        return self.error

    def close(self) -> None:
        """Leave the group, after all ranks have come here, or ``timeout_s``. No group of it may be in use. Idempotent."""
        if not distributed.is_initialized():
            return
        if self.error is None:
            try:
                # A rank whose peers are gone before it has closed its connections may be aborted by them.
                distributed.monitored_barrier(timeout=self._timeout, wait_all_ranks=True)
            except RuntimeError as error:
                _log.warning("rank %d of %d leaves alone: %s", self.rank, self.size, error)
        self._signals = self.shard.group = None  # else the others would not see that this rank is gone
        distributed.destroy_process_group()


def _as_bytes(array: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(array.reshape(-1).view(np.uint8))


def _store(host: str, port: int, *, rank: int, size: int, timeout: timedelta) -> Any:
    """Where ranks leave their addresses for each other. Left to itself, torch would listen on every interface."""
    listening = socket.create_server((host, port)).detach() if rank == 0 else None
    return distributed.TCPStore(
        host, port, size, is_master=rank == 0, timeout=timeout, master_listen_fd=listening
    )


def _file_store(address: str, *, rank: int, size: int, timeout: timedelta) -> Any:
    """The same without a port that somebody else could take first. All ranks are there when it returns, as with the other one."""
    store = distributed.FileStore(address.removeprefix("file://"), size)
    store.set(f"rank {rank}", "is here")
    store.wait([f"rank {other}" for other in range(size)], timeout)
    return store
