"""Every error that Embedwire raises, as one tree.

Each class says whether the same call may be tried again (``may_retry``).

    EmbedwireError
    ├── UsageError                 you called it wrongly; nothing has changed
    │   └── IllegalTransition      a state machine was asked for a step its table does not have
    ├── ConfigurationError         a setting is out of range, or two settings contradict each other
    ├── InvalidRequestError        what the end user sent can not be served; HTTP 4xx
    ├── RefusedError               refused before anything began
    │   ├── OverloadedError        no room now; try again later; HTTP 503
    │   └── NeverFitsError         larger than all there is; trying again is of no use
    ├── RemoteError                the peer is at fault
    │   └── ProtocolViolation      it sent what the protocol does not allow
    ├── TransferError              a room ended without its embedding; ``cause`` says why
    ├── TransportError             a wire could not be set up or used
    └── RankError                  a tensor-parallel group has lost a rank; its answers end; HTTP 502
"""

from __future__ import annotations

from typing import ClassVar


class EmbedwireError(Exception):
    """Root of all errors of this package."""

    may_retry: ClassVar[bool] = False


class UsageError(EmbedwireError):
    """The caller broke a contract of this package. State is as before the call."""


class IllegalTransition(UsageError):
    """A state machine has no such step. The message carries the story of its last steps."""


class ConfigurationError(EmbedwireError):
    """A setting is out of its range, or contradicts another one."""


class InvalidRequestError(EmbedwireError):
    """An end user's request can not be served as it is.

    ``status`` is the HTTP status (4xx), ``code`` a stable short name (``"invalid_image"``,
    ``"context_length_exceeded"``, ``"model_not_found"``), ``param`` the part of the request at fault.
    """

    def __init__(
        self, message: str, *, code: str = "invalid_request", param: str | None = None, status: int = 400
    ) -> None:
        super().__init__(message)
        self.code = code
        self.param = param
        self.status = status


class RefusedError(EmbedwireError):
    """Refused before anything began."""


class OverloadedError(RefusedError):
    """There is no room now. ``retry_after_s`` is a hint in seconds."""

    may_retry = True

    def __init__(self, message: str, *, retry_after_s: float = 1.0) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class NeverFitsError(RefusedError):
    """The request needs more than there is in all; trying again is of no use."""


class RemoteError(EmbedwireError):
    """The peer is at fault, not the caller."""


class ProtocolViolation(RemoteError):
    """A peer sent something that the protocol does not allow."""


class TransferError(EmbedwireError):
    """A room ended without its embedding.

    ``cause`` is one of :class:`embedwire.protocol.messages.Cause`, as a string; ``detail`` is for people.
    """

    may_retry = True

    def __init__(self, cause: str, detail: str = "") -> None:
        super().__init__(f"{cause}: {detail}" if detail else cause)
        self.cause = cause
        self.detail = detail


class TransportError(EmbedwireError):
    """A wire could not be set up or used. Memory it wrote into may still be written to."""

    may_retry = True


class RankError(EmbedwireError):
    """A tensor-parallel group can not go on: a rank of it has ended, stalled, or failed in a step."""

    may_retry = True
