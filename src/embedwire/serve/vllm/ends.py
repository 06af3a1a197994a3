"""Why a transfer ended, as the language server's connector tells the router: vLLM itself passes no cause on.

Owns the tickets of attempts under way. A ticket is random and known to the two alone, so nobody else can end a request.
On the router's event loop.

    POST /vllm/ends    an End as JSON; 204
"""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Annotated

import anyio
from msgspec import Meta, Struct

from embedwire.limits import DETAIL_CHARS_MAX

BODY_BYTES_MAX = 16 * 2**10
TICKET_BYTES = 16


class End(Struct, frozen=True, kw_only=True):
    """The end of one transfer: ``cause`` is a :class:`embedwire.protocol.messages.Cause` or ``unknown_item``, ``identifier`` the item,
    ``address`` the encoder that it was asked of."""

    ticket: Annotated[str, Meta(max_length=64)]
    cause: Annotated[str, Meta(pattern=r"^[a-z_]{1,40}$")]
    detail: str = ""
    identifier: str | None = None
    address: str | None = None

    @property
    def words(self) -> str:
        return self.detail[:DETAIL_CHARS_MAX]


@dataclass(slots=True)
class _Expected:
    told: anyio.Event = field(default_factory=anyio.Event)
    end: End | None = None


class Ends:
    """The causes of attempts under way, by ticket."""

    def __init__(self) -> None:
        self._expected: dict[str, _Expected] = {}

    @contextmanager
    def ticket(self) -> Iterator[str]:
        """A new one, known while the block runs."""
        ticket = secrets.token_hex(TICKET_BYTES)
        self._expected[ticket] = _Expected()
        try:
            yield ticket
        finally:
            del self._expected[ticket]

    def tell(self, end: End) -> None:
        """The first cause of an attempt counts. One that nobody waits for any more is dropped."""
        expected = self._expected.get(end.ticket)
        if expected and expected.end is None:
            expected.end = end
            expected.told.set()

    async def wait(self, ticket: str, *, within_s: float) -> End | None:
        """The cause, or None if it was not told in time."""
        expected = self._expected[ticket]
        with anyio.move_on_after(within_s):
            await expected.told.wait()
        return expected.end
