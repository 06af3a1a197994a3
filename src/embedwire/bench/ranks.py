"""A language server's ranks without a model, each a process: what a room of the group is, on every rank.

Owns how such ranks find each other; ``bench.transfer`` measures with them, tests move rooms between them. A rank that is alone needs
neither Gloo nor torch, and does not import it.
"""

from __future__ import annotations

import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

from embedwire.bench.payload import Payload
from embedwire.bench.remote import ANSWER_WAIT_S, Remote
from embedwire.endpoint import ReceiverEndpoint, Reception
from embedwire.group import RankConfig
from embedwire.group.driver import DEFAULT_TIMEOUT_S
from embedwire.memory.layout import Layout
from embedwire.protocol.messages import RoomKey
from embedwire.protocol.topology import RankGroup


@dataclass(frozen=True, slots=True)
class Place:
    """Where one rank of a group is to sit. ``directory`` is empty at first, and the group's own."""

    group: RankGroup
    rank: int
    directory: str
    timeout_s: float = DEFAULT_TIMEOUT_S


class Rank:
    """One rank: a receiver whose rooms are asked for on rank 0, and are looked at on all."""

    def __init__(self, place: Place, layout: Layout, settings: dict[str, Any]) -> None:
        self._lock = threading.Lock()
        self._rooms: dict[RoomKey, Future[Reception]] = {}
        self.place = place
        self.layout = layout
        self.lost: list[str] = []
        with ExitStack() as stack:
            config = self._rank_config(stack) if place.group.size > 1 else None
            self.endpoint = stack.enter_context(ReceiverEndpoint(layout, place=config, **settings))
            self._stack = stack.pop_all()

    def _rank_config(self, stack: ExitStack) -> RankConfig:
        import torch

        from embedwire.engines.gloo import GlooCollective
        from embedwire.engines.transformers.parallel import TensorParallel

        place = self.place
        torch.set_num_threads(1)
        joined = TensorParallel(
            place.rank,
            size=place.group.size,
            address=f"file://{place.directory}/store",
            timeout_s=place.timeout_s,
        )
        stack.callback(joined.close)
        return RankConfig(
            place.group,
            place.rank,
            address=f"ipc://{place.directory}/agreement",
            collective=GlooCollective(joined.new_gloo_group()),
            timeout_s=place.timeout_s,
            on_room=None if place.rank == 0 else self._heard,
            on_lost=self.lost.append,
        )

    def __enter__(self) -> Rank:
        return self

    def __exit__(self, *raised: object) -> None:
        self._rooms.clear()
        self._stack.close()

    def open(self, room: int, addresses: Sequence[str], attempt: int = 0) -> None:
        """On rank 0: ask for a room."""
        self._heard(self.endpoint.open(room, addresses, attempt=attempt))

    def _heard(self, reception: Reception) -> None:
        self._at(reception.key).set_result(reception)

    def _at(self, key: RoomKey) -> Future[Reception]:
        with self._lock:
            return self._rooms.setdefault(key, Future())

    def reception(self, room: int, attempt: int = 0) -> Reception:
        """This rank's end of a room, as soon as it has heard of it."""
        return self._at(RoomKey(room, attempt)).result(ANSWER_WAIT_S)

    def forget(self, room: int, attempt: int = 0) -> None:
        """Hold a room that has ended no longer."""
        with self._lock:
            del self._rooms[RoomKey(room, attempt)]


@dataclass(frozen=True, slots=True)
class Passage:
    """A room's way to one rank: when it was asked for (on rank 0) and when it was there, on the clock of all processes of this host.
    ``rounds`` are tokens a round, none on a dummy rank."""

    began_s: float
    arrived_s: float
    rounds: tuple[int, ...]


class TimedRank(Rank):
    """A rank whose rooms hold ``bench.payload``."""

    def __init__(self, place: Place, layout: Layout, tokens: int, settings: dict[str, Any]) -> None:
        self._expected = Payload(tokens, layout.token_bytes)
        super().__init__(place, layout, settings)

    def receive(self, room: int, addresses: Sequence[str]) -> Passage:
        """Ask for a room, on rank 0, and wait until it is here."""
        began_s = time.perf_counter()
        if self.place.rank == 0:
            self.open(room, addresses)
        received = self.reception(room).result(ANSWER_WAIT_S)
        return Passage(began_s, time.perf_counter(), received.report.rounds)

    def is_right(self, room: int) -> bool:
        """Whether every byte has arrived. The room is held no longer."""
        self._expected.fill(room)
        is_right = self._expected.equals(self.reception(room).result().arrays["embeddings"])
        self.forget(room)
        return is_right


class Ranks:
    """The processes of all ranks of a group, in a directory of their own. ``make(place, …)`` is a :class:`Rank` of some kind."""

    def __init__(
        self,
        group: RankGroup,
        make: Callable[..., Rank],
        *args: Any,
        timeout_s: float = DEFAULT_TIMEOUT_S,
    ) -> None:
        """Returns when all are there. Raises what any of them raised."""
        preload = ["embedwire.engines.gloo", "embedwire.engines.transformers.parallel"]
        self.group = group
        self._directory = tempfile.TemporaryDirectory(prefix="embedwire-ranks-")
        self.directory = self._directory.name
        self.remotes: list[Remote] = []
        try:
            for rank in range(group.size):
                place = Place(group, rank, self.directory, timeout_s)
                self.remotes.append(
                    Remote(make, place, *args, preload=[__name__, *(preload if group.size > 1 else ())])
                )
            for remote in self.remotes:
                remote.answer()
        except BaseException:
            self.close()
            raise

    def all(self, method: str, *args: Any, **more: Any) -> list[Any]:
        """The same call on every rank at once, and their answers."""
        for remote in self.remotes:
            remote.tell(method, *args, **more)
        return [remote.answer() for remote in self.remotes]

    def close(self) -> list[int | None]:
        """End them together. Their exit codes."""
        for remote in self.remotes:
            remote.begin_close()
        codes = [remote.close() for remote in self.remotes]
        self._directory.cleanup()
        return codes

    def __enter__(self) -> Ranks:
        return self

    def __exit__(self, *raised: object) -> None:
        self.close()
