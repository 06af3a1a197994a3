"""One room on its way in, as whoever opened it holds it, and what it becomes. Any thread; the endpoint does the work."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from embedwire.endpoint.stats import ReceiveReport
from embedwire.memory.checksum import FieldDigests
from embedwire.memory.layout import Rows
from embedwire.protocol.messages import RoomKey

if TYPE_CHECKING:
    from embedwire.endpoint.receiver import ReceiverEndpoint

Arrays = Mapping[str, np.ndarray]
MakeAssembly = Callable[[int], Arrays]
"""Called with total_tokens, on the driver's thread: one C-contiguous array (total_tokens, *field.shape) a field."""


@dataclass(frozen=True)
class Received:
    """A whole embedding. ``arrays``: field name to array (total_tokens, *field.shape); ``aux``: sixteen int32, the first is the total.

    The memory stays reserved until :meth:`release`, or until nobody holds the arrays any more.
    """

    room: int
    attempt: int
    arrays: Arrays = field(repr=False)
    aux: tuple[int, ...]
    report: ReceiveReport
    _release: Callable[[], None] = field(repr=False, compare=False)

    def release(self) -> None:
        """Say that the arrays are no longer needed. Idempotent."""
        self._release()


class Reception(Future[Received]):
    """One room on its way in: a future of the whole embedding, or of a TransferError with the cause.

    Callbacks run on the driver's thread, where they must not block.
    """

    def __init__(self, endpoint: ReceiverEndpoint, key: RoomKey, make_assembly: MakeAssembly) -> None:
        super().__init__()
        self.set_running_or_notify_cancel()
        self.key = key
        self._endpoint = endpoint
        self.make_assembly = make_assembly
        self.arrays: Arrays = {}
        self.rows: tuple[Rows, ...] = ()  # the same as bytes, checked
        self.sums: defaultdict[RoomKey, FieldDigests] = defaultdict(partial(FieldDigests, endpoint.layout))

    def cancel(self, detail: str = "the client no longer wants it") -> bool:
        """End the room on both sides, with cause ``aborted``; False when it has ended already."""
        if self.done():
            return False
        self._endpoint._cancel(self.key, detail)
        return True
