"""One rank's part in its group: where the ranks meet, what each of them takes, and whom it tells that the group can not go on.

Knows the directory that the supervisor has made for them; it must not know what the server does. Made by the main thread; a loss is heard
of on any.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from embedwire.cli.settings import Settings

if TYPE_CHECKING:
    from embedwire.endpoint import SenderEndpoint
    from embedwire.endpoint.sender_group import FollowingSender, LeadingSender
    from embedwire.endpoint.turns import Seat


def tell(detail: str) -> None:
    """Let the supervisor know why this rank can not go on. One write, so that lines of several threads do not mix."""
    os.write(sys.stdout.fileno(), json.dumps({"error": detail}).encode() + b"\n")


class Membership:
    """This process's part in the group of ranks that ``directory`` belongs to. The block around it ends when all have left."""

    def __init__(self, settings: Settings, *, rank: int, directory: Path) -> None:
        """Returns when all ranks are there. Raises RankError."""
        from embedwire.engines.transformers.parallel import TensorParallel
        from embedwire.protocol.topology import RankGroup

        size, on_cuda = settings.tensor_parallel_size, settings.device.startswith("cuda")
        self.rank = rank
        self.group = RankGroup.on_one_host(
            size, delivery="share" if settings.delivery == "auto" else settings.delivery
        )
        self.device = f"cuda:{rank}" if on_cuda else settings.device
        self.threads = max(1, (settings.threads or len(os.sched_getaffinity(0))) // size)
        self._settings = settings
        self._directory = directory
        self._on_lost: list[Callable[[str], None]] = []
        self.tensor_parallel = TensorParallel(
            rank,
            size=size,
            address=f"file://{directory}/store",
            backend="nccl" if on_cuda else "gloo",
            timeout_s=settings.rank_timeout_s,
            on_broken=lambda error: self.lose(str(error)),
        )

    def take_seat(self) -> Seat:
        """Where this rank's receiver takes part in turns. All ranks call this together."""
        from embedwire.endpoint.turns import Seat
        from embedwire.engines.gloo import GlooCollective

        collective = GlooCollective(self.tensor_parallel.new_gloo_group())
        address = f"ipc://{self._directory}/turns"
        return Seat(self.group, self.rank, address, collective, self._settings.rank_timeout_s)

    @contextmanager
    def leading(self, endpoint: SenderEndpoint) -> Iterator[LeadingSender]:
        """On rank 0: offers on all ranks. All ranks enter this or :meth:`following` together."""
        from embedwire.endpoint.sender_group import LeadingSender

        addresses = self.tensor_parallel.gather(endpoint.address)
        others = [self._rooms_of(rank) for rank in range(1, self.group.size)]
        with LeadingSender(endpoint, addresses=addresses, others=others) as sender:
            yield sender

    @contextmanager
    def following(self, endpoint: SenderEndpoint) -> Iterator[FollowingSender]:
        """On the others: offers what rank 0 offers."""
        from embedwire.endpoint.sender_group import FollowingSender

        wait_s = self._settings.memory_wait_s
        with FollowingSender(endpoint, address=self._rooms_of(self.rank), memory_wait_s=wait_s) as sender:
            self.tensor_parallel.gather(endpoint.address)
            yield sender

    def _rooms_of(self, rank: int) -> str:
        return f"ipc://{self._directory}/rooms-{rank}"

    def on_lost(self, callback: Callable[[str], None]) -> None:
        """To be called with the reason when the group can not go on, on any thread; it must not block."""
        self._on_lost.append(callback)

    def lose(self, detail: str) -> None:
        """The group can not go on: whoever waits for it hears so, and then the supervisor, which ends it."""
        for callback in self._on_lost:
            callback(detail)
        tell(detail)

    def __enter__(self) -> Membership:
        return self

    def __exit__(self, *raised: object) -> None:
        self.tensor_parallel.close()
        # The supervisor may have been killed. Each rank does it, since torch's file may come back with each that leaves.
        shutil.rmtree(self._directory, ignore_errors=True)
