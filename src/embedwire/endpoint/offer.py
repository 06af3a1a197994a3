"""One room on its way out, as whoever offered it holds it: a future with three orders. Any thread; the endpoint does the work."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from embedwire.endpoint.stats import SendReport
from embedwire.errors import TransferError, UsageError
from embedwire.memory.checksum import FieldDigests
from embedwire.memory.layout import Layout
from embedwire.memory.source import Source
from embedwire.protocol.actions import Release
from embedwire.protocol.messages import Cause, RoomKey
from embedwire.protocol.topology import Lane

if TYPE_CHECKING:
    from embedwire.endpoint.sender import SenderEndpoint


@dataclass(frozen=True, slots=True)
class Filling:
    """The arrays of a whole room, checked and summed up once, so that any number of rooms can be filled with them."""

    source: Source
    digests: tuple[int, ...]

    @classmethod
    def of(cls, layout: Layout, arrays: Mapping[str, np.ndarray]) -> Filling:
        """``arrays``: field name to a C-contiguous array (T, *field.shape), which nobody may change any more. Raises UsageError when
        they do not match the layout."""
        source, sums = Source(layout, arrays), FieldDigests(layout)
        sums.update(arrays)
        return cls(source, sums.digest())


class Offer(Future[SendReport]):
    """One room on its way out: a future of the receiver's word that it has all of it, or of a TransferError.

    Callbacks run on the driver's thread, where they must not block.
    """

    def __init__(
        self,
        endpoint: SenderEndpoint,
        key: RoomKey,
        total_tokens: int,
        aux: tuple[int, ...],
        lanes: Sequence[Lane],
    ) -> None:
        super().__init__()
        self.set_running_or_notify_cancel()
        self.key = key
        self.total_tokens = total_tokens
        self.aux = aux
        self.shares = {key._replace(lane=lane.number): lane.share(total_tokens) for lane in lanes}
        self.sources: dict[RoomKey, Source] = {}
        self._releases: dict[RoomKey, Release] = {}
        self.withdrawn: set[RoomKey] = set()
        self._endpoint = endpoint
        self._offered_at = time.monotonic()
        self._is_filled = False

    def fill(self, arrays: Mapping[str, np.ndarray]) -> None:
        """The source is ready: field name to a C-contiguous array (total_tokens, *field.shape).

        It is summed up here, on the caller's thread; nobody may change it until the offer has ended. Raises
        UsageError when they do not match the layout, and the second time; harmless after the end."""
        if self.done():
            return
        self._check(len(self._endpoint.layout.rows(arrays)[0]))
        parts = {share: self._part(arrays, share) for share in set(self.shares.values())}
        self._fill({key: parts[share] for key, share in self.shares.items()})

    def filled_with(self, filling: Filling) -> None:
        """What has been summed up before is the source of a room of one lane from the start. On the driver's thread."""
        (key,) = self.shares
        self._check(filling.source.tokens)
        self.sources[key] = filling.source

    def _check(self, tokens: int) -> None:
        if tokens != self.total_tokens:
            raise UsageError(f"arrays of {tokens} tokens for a room of {self.total_tokens}")
        if self._is_filled:
            raise UsageError(f"room {self.key.room} attempt {self.key.attempt} was filled before")
        self._is_filled = True

    def _fill(self, parts: Mapping[RoomKey, Filling]) -> None:
        self._endpoint._fill(self, parts, source_ms=(time.monotonic() - self._offered_at) * 1000)

    def _part(self, arrays: Mapping[str, np.ndarray], share: range) -> Filling:
        rows = {name: array[share.start : share.stop] for name, array in arrays.items()}
        return Filling.of(self._endpoint.layout, rows)

    def end_lane(self, release: Release) -> list[RoomKey]:
        """One lane is over. Returns those that are not. On the driver's thread."""
        self._releases[release.key] = release
        self.sources.pop(release.key, None)
        return [key for key in self.shares if key not in self._releases]

    def outcome(self, *, token_bytes: int) -> SendReport | TransferError:
        """All lanes are over, and so is the room: as its first lane that failed, or well."""
        ends = self._releases.values()
        failed = next((end for end in ends if end.cause is not Cause.DONE), None)
        if failed is not None:
            return TransferError(failed.cause.value, failed.detail)
        rounds = tuple(tokens for end in ends for tokens in end.rounds)
        nbytes = sum(map(len, self.shares.values())) * token_bytes
        return SendReport(self.total_tokens, rounds, nbytes)

    def fail(self, detail: str) -> None:
        """The source can not be made: the room ends with cause ``encoder_failed`` on both sides."""
        self.end(Cause.ENCODER_FAILED, detail)

    def abort(self, detail: str = "") -> None:
        """Nobody wants it any more: the room ends with cause ``aborted`` on both sides."""
        self.end(Cause.ABORTED, detail)

    def end(self, cause: Cause, detail: str) -> None:
        """The room ends without its embedding on both sides, as another part of it has. Harmless when it has ended."""
        self._endpoint._end(self, cause, detail)

    def cancel(self) -> bool:
        """The same as :meth:`abort`; False when it has ended already."""
        if self.done():
            return False
        self.abort("cancelled")
        return True
