"""Both sides of a transfer between ranks as real processes without a model, for tests: what they are told, and what they tell.

Runs in the children of ``bench.ranks.Ranks`` and ``bench.remote.Remote``. Every room carries its payload (``testing.payload``), and
whatever arrives is checked byte for byte where it arrived.
"""

from __future__ import annotations

import gc
import threading
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from embedwire.bench.ranks import Place, Rank
from embedwire.endpoint import Offer, Reception, SenderEndpoint
from embedwire.endpoint.stats import ReceiverStats, SenderStats
from embedwire.endpoint.writer import WriteJob
from embedwire.engines.gloo import GlooCollective
from embedwire.errors import TransferError
from embedwire.memory.layout import Layout
from embedwire.testing.payload import differing, payload
from embedwire.transports.contract import Piece

PATIENCE_S = 45.0


@dataclass(frozen=True, slots=True)
class End:
    """How a room ended on one rank. ``cause`` is ``done``, or why it failed; ``wrong`` names fields with a wrong byte, ``digest`` is of all
    bytes of all fields, ``rounds`` in tokens, ``bytes`` those that came to this rank by wire."""

    cause: str
    detail: str = ""
    tokens: int = 0
    aux: tuple[int, ...] = ()
    digest: int = 0
    wrong: tuple[str, ...] = ()
    rounds: tuple[int, ...] = ()
    bytes: int = 0


class LanguageRank(Rank):
    """A rank that counts its collectives. ``limit_bytes`` is of its assemblies; else as its group has it."""

    def __init__(self, place: Place, layout: Layout, settings: dict[str, Any]) -> None:
        self.widths: list[int] = []
        real = GlooCollective.all_reduce_min

        def counted(collective: GlooCollective, words: Sequence[int]) -> list[int]:
            self.widths.append(len(words))
            return real(collective, words)

        GlooCollective.all_reduce_min = counted  # type: ignore[assignment,method-assign]
        super().__init__(place, layout, settings)

    def end(self, room: int, attempt: int = 0) -> End:
        """Wait for a room's end and look at it. It is kept, until :meth:`forget`."""
        try:
            received = self.reception(room, attempt).result(PATIENCE_S)
        except TransferError as error:
            return End(error.cause, error.detail)
        expected = payload(self.layout, received.report.total_tokens, room=room)
        digest = 0
        for rows in self.layout.rows(received.arrays):
            digest = zlib.crc32(rows.data, digest)
        return End(
            "done",
            tokens=received.report.total_tokens,
            aux=received.aux,
            digest=digest,
            wrong=tuple(differing(self.layout, expected, received.arrays)),
            rounds=received.report.rounds,
            bytes=received.report.bytes,
        )

    def is_done(self, room: int, attempt: int = 0) -> bool:
        """Whether this rank has a room, or its failure, by now."""
        reception: Reception = self.reception(room, attempt)
        return reception.done()

    def cancel(self, room: int, attempt: int = 0) -> bool:
        """Nobody wants it any more."""
        return self.reception(room, attempt).cancel()

    def scribble(self, room: int, attempt: int = 0) -> None:
        """Write over what was received, as an engine may."""
        for rows in self.layout.rows(self.reception(room, attempt).result().arrays):
            rows[:] = 0

    def stats(self) -> ReceiverStats:
        """Of the receiver."""
        gc.collect()
        return self.endpoint.stats()

    def is_idle(self) -> bool:
        """Whether it holds nothing: no room, no block, no byte."""
        stats = self.stats()
        held = (*stats.rooms.values(), *stats.waiting.values(), stats.memory_reserved_bytes)
        self.endpoint.loop.call(self.endpoint._landing.blocks.check)
        return not any(held) and stats.blocks_free == stats.blocks_total

    def collectives(self) -> list[int]:
        """How wide each collective of this rank was, so far."""
        return list(self.widths)

    def losses(self) -> list[str]:
        """What was said of the group's loss."""
        return list(self.lost)

    def assemblies(self) -> set[int]:
        """The shared assemblies that this process has mapped, by inode: the same one has the same number in every process of a host."""
        lines = Path("/proc/self/maps").read_text().splitlines()
        return {int(line.split()[4]) for line in lines if "memfd:embedwire-assembly" in line}


class EncoderRank:
    """A rank of an encoder, which offers rooms that are filled at once."""

    def __init__(self, rank: int, ranks: int, layout: Layout, settings: dict[str, Any]) -> None:
        self.layout = layout
        self._endpoint = SenderEndpoint(layout, rank=rank, ranks=ranks, **settings)
        self._offers: dict[tuple[int, int], Offer] = {}
        self._held: set[int] = set()
        self._reached, self._go = threading.Event(), threading.Event()
        self._brake()

    def __enter__(self) -> EncoderRank:
        return self

    def __exit__(self, *raised: object) -> None:
        self.let_go()
        self._endpoint.close()

    def _brake(self) -> None:
        """Let a write wait before any of its slices, as long as its lane is held."""
        real = WriteJob.slices

        def slices(job: WriteJob) -> Iterator[Sequence[Piece]]:
            for pieces in real(job):
                if job.write.key.lane in self._held:
                    self._reached.set()
                    self._go.wait(PATIENCE_S)
                yield pieces

        WriteJob.slices = slices  # type: ignore[assignment,method-assign]

    def address(self) -> str:
        """Where receivers ask for rooms."""
        return self._endpoint.address

    def offer(
        self, room: int, tokens: int, *, readers: int, attempt: int = 0, aux: Sequence[int] = ()
    ) -> None:
        """Offer a room with its payload."""
        offer = self._endpoint.offer(room, total_tokens=tokens, readers=readers, attempt=attempt, aux=aux)
        offer.fill(payload(self.layout, tokens, room=room))
        self._offers[room, attempt] = offer

    def end(self, room: int, attempt: int = 0) -> str:
        """Wait for a room's end: ``done``, or the cause."""
        try:
            self._offers.pop((room, attempt)).result(PATIENCE_S)
        except TransferError as error:
            return error.cause
        return "done"

    def abort(self, room: int, attempt: int = 0) -> None:
        """Nobody wants it any more."""
        self._offers[room, attempt].abort()

    def hold(self, *lanes: int) -> None:
        """From now on writes on these lanes wait."""
        self._reached.clear()
        self._go.clear()
        self._held = set(lanes)

    def wait_held(self) -> bool:
        """Wait until one does."""
        return self._reached.wait(PATIENCE_S)

    def let_go(self) -> None:
        """All writes go on."""
        self._held = set()
        self._go.set()

    def stats(self) -> SenderStats:
        """Of the sender."""
        return self._endpoint.stats()

    def is_idle(self) -> bool:
        """Whether it holds nothing: no room and no byte."""
        stats = self.stats()
        return not sum(stats.rooms.values()) and stats.memory_reserved_bytes == 0
