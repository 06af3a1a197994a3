"""One room on its way out, as its owner holds it: a future with three orders. Any thread; the endpoint does the work through callbacks."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass

import numpy as np

from embedwire.endpoint.room_log import ended_as, log_end, progress_of
from embedwire.endpoint.stats import SendReport
from embedwire.errors import TransferError, UsageError
from embedwire.memory.checksum import FieldDigests
from embedwire.memory.layout import Layout
from embedwire.memory.source import Source
from embedwire.protocol.actions import Address, Release
from embedwire.protocol.messages import Cause, RoomKey

logger = logging.getLogger(__name__)

Digests = tuple[int, ...]
OnFilled = Callable[["Offer", Source, Mapping[RoomKey, Digests], float], None]
"""Called with the room's source, the digests of each of its lanes, and how many ms it took to make the source."""
OnEnd = Callable[["Offer", Cause, str], None]


@dataclass(frozen=True, slots=True)
class Filling:
    """The arrays of a whole room, checked and checksummed once, so that any number of rooms can be filled with them."""

    source: Source
    digests: Digests

    @classmethod
    def of(cls, layout: Layout, arrays: Mapping[str, np.ndarray]) -> Filling:
        """``arrays``: field name to a C-contiguous array (T, *field.shape), which nobody may change any more. Raises UsageError when
        they do not match the layout."""
        return cls(Source(layout, arrays), _digests(layout, arrays))


class Offer(Future[SendReport]):
    """One room on its way out: a future of the receiver's confirmation that it has all of it, or of a TransferError.

    ``shares`` are the lanes that begin here, each with its tokens of the room. Callbacks run on the driver's thread, where they must not
    block.
    """

    def __init__(
        self,
        layout: Layout,
        key: RoomKey,
        total_tokens: int,
        aux: tuple[int, ...],
        *,
        address: Address,
        shares: Mapping[RoomKey, range],
        on_filled: OnFilled,
        on_end: OnEnd,
    ) -> None:
        super().__init__()
        self.set_running_or_notify_cancel()
        self.key = key
        self.total_tokens = total_tokens
        self.aux = aux
        self.address = address
        self.shares = shares
        self.landed: dict[tuple[RoomKey, int], int] = {}
        """Tokens that have landed, for each round of each lane."""
        self.source: Source | None = None
        self.withdrawn: set[RoomKey] = set()
        self._layout = layout
        self._on_filled = on_filled
        self._on_end = on_end
        self._offered_at = time.monotonic()
        self._is_filled = False

    @property
    def progress(self) -> str:
        """Of what this rank sends, to all ranks of the receiver."""
        return progress_of(sum(self.landed.values()), sum(map(len, self.shares.values())), len(self.landed))

    def __repr__(self) -> str:
        if self.done():
            state = ended_as(self.exception())
        elif self.landed:
            state = "sending"
        else:
            state = "filled" if self._is_filled else "offered"
        return f"<Offer room={self.key.room} attempt={self.key.attempt} {state} {self.progress} at={self.address}>"

    def fill(self, arrays: Mapping[str, np.ndarray]) -> None:
        """The source is ready: field name to a C-contiguous array (total_tokens, *field.shape).

        The checksums are computed here, on the caller's thread; nobody may change the arrays until the offer has ended. Raises
        UsageError when they do not match the layout, and the second time; harmless after the end."""
        if self.done():
            return
        source = Source(self._layout, arrays)
        self._check(source.tokens)
        digests = {share: _digests(self._layout, arrays, share) for share in set(self.shares.values())}
        self._fill(source, {key: digests[share] for key, share in self.shares.items()})

    def filled_with(self, filling: Filling) -> None:
        """What was checksummed before is the source of a room of one lane from the start. On the driver's thread."""
        self._check(filling.source.tokens)
        self.source = filling.source

    def _check(self, tokens: int) -> None:
        if tokens != self.total_tokens:
            raise UsageError(f"arrays of {tokens} tokens for a room of {self.total_tokens}")
        if self._is_filled:
            raise UsageError(f"room {self.key.room} attempt {self.key.attempt} was filled before")
        self._is_filled = True

    def _fill(self, source: Source, digests: Mapping[RoomKey, Digests]) -> None:
        self._on_filled(self, source, digests, (time.monotonic() - self._offered_at) * 1000)

    def outcome(self, release: Release, *, token_bytes: int) -> SendReport | TransferError:
        """How the room has ended."""
        if release.cause is not Cause.DONE:
            return TransferError(release.cause.value, release.detail)
        rounds = tuple(tokens for lane in release.lanes for tokens in lane.rounds)
        return SendReport(self.total_tokens, rounds, sum(rounds) * token_bytes)

    def log_end(self, cause: Cause, detail: str) -> None:
        """Log how the room has ended."""
        log_end(logger, self.key, cause, detail, progress=self.progress, began_at=self._offered_at)

    def fail(self, detail: str) -> None:
        """The source cannot be made: the room ends with cause ``encoder_failed`` on both sides."""
        self.end(Cause.ENCODER_FAILED, detail)

    def abort(self, detail: str = "") -> None:
        """The room is no longer needed: it ends with cause ``aborted`` on both sides."""
        self.end(Cause.ABORTED, detail)

    def end(self, cause: Cause, detail: str) -> None:
        """The room ends without its embedding on both sides, as another part of it has. Harmless when it has ended."""
        self._on_end(self, cause, detail)

    def cancel(self) -> bool:
        """The same as :meth:`abort`; False when it has ended already."""
        if self.done():
            return False
        self.abort("cancelled")
        return True


def _digests(layout: Layout, arrays: Mapping[str, np.ndarray], share: range | None = None) -> Digests:
    """One XXH3-64 a field, over the tokens of ``share``, or all."""
    digests = FieldDigests(layout)
    rows = share or range(len(next(iter(arrays.values()))))
    digests.update({name: array[rows.start : rows.stop] for name, array in arrays.items()})
    return digests.digest()
