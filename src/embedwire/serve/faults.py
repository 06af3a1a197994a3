"""How an error becomes an HTTP answer: the one place that knows status codes.

Owns the mapping from this package's errors to OpenAI's ``{"error": {"message", "type", "param", "code"}}``.
It must not know what the apps do. Called on the event loop.
"""

from __future__ import annotations

import http
import logging
import math
from typing import Any

import msgspec
from fastapi import FastAPI
from msgspec import Struct
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from embedwire.errors import (
    EmbedwireError,
    InvalidRequestError,
    NeverFitsError,
    OverloadedError,
    RankError,
    TransferError,
)
from embedwire.protocol.messages import Cause
from embedwire.serve.openai import event

log = logging.getLogger(__name__)

TRANSFER_STATUS = {"deadline": 504, "overloaded": 503, "never_fits": 413}
"""HTTP status by the cause of a room's end; any other is 502: a server behind this one failed."""
TELL_LITTLE = frozenset({"upstream_unreachable", "overloaded"})
"""Codes of faults that may be no more than what follows from an earlier one."""


class Fault(Struct, frozen=True, kw_only=True):
    """An error as a client sees it. ``retry_after_s`` is whole seconds, for the header of that name."""

    status: int
    type: str
    code: str
    message: str
    param: str | None = None
    retry_after_s: int | None = None

    def body(self) -> dict[str, Any]:
        """OpenAI's error object."""
        return {"error": {"message": self.message, "type": self.type, "param": self.param, "code": self.code}}

    def response(self) -> Response:
        headers = {} if self.retry_after_s is None else {"retry-after": str(self.retry_after_s)}
        return json_response(self.body(), status=self.status, headers=headers)

    def as_event(self) -> bytes:
        """For a stream whose status has gone out already."""
        return event(self.body())


class FaultError(EmbedwireError):
    """An error that knows already how it is to be answered: another server's, or one of serving itself."""

    def __init__(self, fault: Fault) -> None:
        super().__init__(fault.message)
        self.fault = fault


class ClientGone(EmbedwireError):
    """The client closed its connection. Nobody reads the answer."""


def json_response(data: Any, *, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    return Response(
        msgspec.json.encode(data), status_code=status, headers=headers, media_type="application/json"
    )


def fault_of(error: BaseException) -> Fault:
    """The answer to an error. What is not one of ours is logged, and says no more than that it happened."""
    match error:
        case FaultError():
            return error.fault
        case InvalidRequestError():
            return Fault(
                status=error.status,
                type="invalid_request_error",
                code=error.code,
                message=str(error),
                param=error.param,
            )
        case OverloadedError():
            return overloaded(str(error), retry_after_s=error.retry_after_s)
        case RankError() | TransferError(cause=Cause.RANK_LOST):
            message = f"a rank of the server was lost: {error}"
            return Fault(status=502, type="server_error", code=Cause.RANK_LOST.value, message=message)
        case NeverFitsError():
            return Fault(status=413, type="invalid_request_error", code="never_fits", message=str(error))
        case TransferError():
            return Fault(
                status=TRANSFER_STATUS.get(error.cause, 502),
                type="transfer_error",
                code=error.cause,
                message=f"the embedding did not arrive: {error}",
                retry_after_s=1 if error.cause == "overloaded" else None,
            )
    log.error("unexpected error while serving a request", exc_info=error)
    return Fault(status=500, type="server_error", code="internal_error", message="an internal error occurred")


def overloaded(message: str, *, retry_after_s: float = 1.0) -> Fault:
    """503: no room now."""
    return Fault(
        status=503,
        type="overloaded_error",
        code="overloaded",
        message=message,
        retry_after_s=max(1, math.ceil(retry_after_s)),
    )


def unreachable(what: str, error: Exception) -> Fault:
    """502: a server behind this one does not answer."""
    detail = str(error) or type(error).__name__
    return Fault(status=502, type="upstream_error", code="upstream_unreachable", message=f"{what}: {detail}")


def more_telling(earlier: Fault | None, later: Fault) -> Fault:
    """Which of the faults of a request's attempts its client should hear: the last one, unless that only says that nobody is left."""
    is_echo = earlier is not None and later.code in TELL_LITTLE and earlier.code not in TELL_LITTLE
    return earlier if earlier is not None and is_echo else later


def deadline_passed(deadline_s: float) -> Fault:
    """504: the request took longer than it may."""
    message = f"the request was not answered within its {deadline_s:g} s"
    return Fault(status=504, type="timeout_error", code="deadline", message=message)


def fault_from(response_status: int, body: bytes, *, retry_after: str | None, who: str) -> Fault:
    """The fault that another of our servers answered with; ``who`` names it if the body does not explain
    itself."""
    try:
        error = msgspec.json.decode(body)["error"]
        if isinstance(error["code"], int):  # vLLM repeats the status here
            error["code"] = _code_of(response_status)
        return msgspec.convert(
            error | {"status": response_status, "retry_after_s": int(retry_after) if retry_after else None},
            Fault,
        )
    except (msgspec.MsgspecError, KeyError, TypeError, ValueError):
        message = f"{who} answered {response_status} without an explanation"
        return Fault(status=502, type="upstream_error", code="bad_upstream_answer", message=message)


def answer_faults(app: FastAPI) -> None:
    """Let ``app`` answer every error in OpenAI's form."""

    async def ours(_request: Request, error: Exception) -> Response:
        return fault_of(error).response()

    async def gone(_request: Request, _error: Exception) -> Response:
        return Response(status_code=499)

    async def by_framework(_request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        return Fault(
            status=error.status_code,
            type="invalid_request_error",
            code=_code_of(error.status_code),
            message=error.detail,
        ).response()

    async def unexpected(_request: Request, _error: Exception) -> Response:
        # The server logs it: Starlette raises it again once this answer is out.
        return Fault(
            status=500, type="server_error", code="internal_error", message="an internal error occurred"
        ).response()

    app.add_exception_handler(EmbedwireError, ours)
    app.add_exception_handler(ClientGone, gone)
    app.add_exception_handler(HTTPException, by_framework)
    app.add_exception_handler(Exception, unexpected)


def _code_of(status: int) -> str:
    return http.HTTPStatus(status).phrase.lower().replace(" ", "_")
