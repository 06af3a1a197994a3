"""How a handle shows itself, and the log record of a room's end: the same words on both sides. Any thread."""

from __future__ import annotations

import logging
import time

from embedwire.errors import TransferError
from embedwire.protocol.messages import Cause, RoomKey


def log_end(
    logger: logging.Logger, key: RoomKey, cause: Cause, detail: str, *, progress: str, began_at: float
) -> None:
    """One record for the end of a room: DEBUG for a success, WARNING for a failure."""
    # ``aborted`` is how a room ends whose client has disconnected: frequent, and no fault of any server
    level = logging.DEBUG if cause in (Cause.DONE, Cause.ABORTED) else logging.WARNING
    logger.log(
        level,
        "= room %d attempt %d: cause=%s %s ms=%.1f%s",
        key.room,
        key.attempt,
        cause.value,
        progress,
        (time.monotonic() - began_at) * 1000,
        f" ({detail})" if detail else "",
    )


def progress_of(landed_tokens: int, total_tokens: int, rounds: int) -> str:
    """``total_tokens`` is 0 as long as it is not announced."""
    return f"tokens={landed_tokens}/{total_tokens or '?'} rounds={rounds}"


def ended_as(error: BaseException | None) -> str:
    """The state of a handle that is done."""
    if error is None:
        return "done"
    return f"failed: {error.cause if isinstance(error, TransferError) else type(error).__name__}"
