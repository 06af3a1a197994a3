"""The table of workers: who is there, who answers, and who is to serve the next request.

Owns addresses and counts only. It must not know HTTP, sockets or clocks (``now`` is an argument, in seconds
of any monotonic clock), and it is not thread-safe: the event loop of the app that owns it is its only caller
(``embedwire.serve``).

A registration says what a worker is; only a check says that it can be reached. So a heartbeat keeps an entry
from being forgotten, but does not bring back a worker whose checks fail; a check that succeeds does, and so
does a new incarnation.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from enum import StrEnum
from typing import Annotated, Literal
from urllib.parse import urlsplit

import msgspec

from embedwire.errors import ConfigurationError, OverloadedError
from embedwire.limits import INCARNATION_MAX, RANKS_MAX

Text = Annotated[str, msgspec.Meta(min_length=1, max_length=1024)]

WILDCARDS = frozenset({"0.0.0.0", "::"})
"""Where a server may listen, and nobody can be told to reach it."""


class Role(StrEnum):
    """The half of a model that a worker serves."""

    ENCODER = "encoder"
    LANGUAGE = "language"


class Worker(msgspec.Struct, frozen=True, kw_only=True):
    """What a worker says of itself. ``url`` names it; ``incarnation`` names one life of its process.

    ``control_addresses`` are where an encoder's rooms are opened, one a rank; a language server has none. ``readers`` is how many of a
    language server's ranks receive from the wire. Two workers can
    serve a request together when ``model`` and ``fingerprint`` (of the layout) are equal. ``engine`` is what answers at ``url``: a server
    of this package, or a stock vLLM server, which somebody else enters here and only a router for vLLM uses.
    """

    role: Role
    url: Annotated[str, msgspec.Meta(pattern=r"^https?://[^/\s?#]+$", max_length=1024)]
    model: Text
    fingerprint: Text
    incarnation: Annotated[int, msgspec.Meta(ge=1, le=INCARNATION_MAX)]
    control_addresses: Annotated[tuple[Text, ...], msgspec.Meta(max_length=RANKS_MAX)] = ()
    readers: Annotated[int, msgspec.Meta(ge=1, le=RANKS_MAX)] = 1
    engine: Literal["embedwire", "vllm"] = "embedwire"

    def __post_init__(self) -> None:
        try:
            _ = urlsplit(self.url).port
        except ValueError as error:
            raise ValueError(f"url: {error}") from None


@dataclass(slots=True)
class Entry:
    """A worker and what is known of it here. ``missed`` counts failed checks in a row, ``is_silent`` says that the last of them was no
    refusal; ``seen_s`` is when it was last heard."""

    worker: Worker
    seen_s: float
    missed: int = 0
    is_silent: bool = False
    turn: int = 0


class Registry:
    """Workers by URL. ``misses_to_evict`` failed checks in a row take a worker out of the candidates; a
    silence of ``forget_after_s`` takes it off the table, which holds ``workers_max`` at most."""

    def __init__(
        self, *, misses_to_evict: int = 3, forget_after_s: float = 600.0, workers_max: int = 4096
    ) -> None:
        if misses_to_evict < 1 or forget_after_s <= 0 or workers_max < 1:
            raise ConfigurationError(
                f"misses_to_evict ({misses_to_evict}), forget_after_s ({forget_after_s}) and"
                f" workers_max ({workers_max}) have to be above 0"
            )
        self._misses_to_evict = misses_to_evict
        self._forget_after_s = forget_after_s
        self._workers_max = workers_max
        self._entries: dict[str, Entry] = {}
        self._load: Counter[str] = Counter()
        self._turns = 0

    def __iter__(self) -> Iterator[Entry]:
        return iter(tuple(self._entries.values()))

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, url: str) -> bool:
        return url in self._entries

    def register(self, worker: Worker, *, now: float) -> None:
        """Enter a worker, or hear from it again: the same words twice change nothing. Raises OverloadedError
        when full."""
        entry = self._entries.get(worker.url)
        if entry is None:
            if len(self._entries) >= self._workers_max:
                raise OverloadedError(f"the registry holds {self._workers_max} workers already")
            self._entries[worker.url] = Entry(worker, now)
            return
        if entry.worker.incarnation != worker.incarnation:
            entry.missed = 0
        entry.worker, entry.seen_s = worker, now

    def answered(self, url: str, *, now: float) -> None:
        """A check succeeded: the worker is a candidate, whatever was before."""
        if entry := self._entries.get(url):
            entry.missed, entry.seen_s = 0, now

    def missed(self, url: str, *, is_silent: bool = True) -> None:
        """A check failed, or a request could not reach the worker. Not silent is one whose host says that nobody listens there."""
        if entry := self._entries.get(url):
            entry.missed += 1
            entry.is_silent = is_silent

    def evicted(self, url: str, *, is_silent: bool) -> None:
        """Somebody else's checks have failed often enough."""
        if entry := self._entries.get(url):
            entry.missed = max(entry.missed, self._misses_to_evict)
            entry.is_silent = is_silent

    def remove(self, url: str, *, incarnation: int | None = None) -> bool:
        """Take a worker off the table; with ``incarnation``, only that life of it. True when it was there."""
        entry = self._entries.get(url)
        if entry is None or incarnation not in (None, entry.worker.incarnation):
            return False
        del self._entries[url]
        return True

    def forget_silent(self, *, now: float) -> None:
        """Take those off the table that were not heard of for ``forget_after_s``."""
        for url, entry in tuple(self._entries.items()):
            if now - entry.seen_s > self._forget_after_s:
                del self._entries[url]

    def is_candidate(self, entry: Entry) -> bool:
        """Whether requests may be sent to it."""
        return entry.missed < self._misses_to_evict

    def has_candidate(self, url: str) -> bool:
        """Whether the worker at a URL is here and may be sent requests."""
        entry = self._entries.get(url)
        return entry is not None and self.is_candidate(entry)

    def is_silent(self, url: str) -> bool:
        """Whether it is here and fails its checks, and may be frozen. Who said good-bye is not here. Whose host refuses connections is no
        reason to wait no longer: it lets its answers end, or is dead, and its connections with it."""
        entry = self._entries.get(url)
        return entry is not None and entry.is_silent and not self.is_candidate(entry)

    def is_replaced(self, worker: Worker) -> bool:
        """Whether another life of it is at its URL. Stock vLLM servers tell no lives apart."""
        entry = self._entries.get(worker.url)
        is_other = entry is not None and entry.worker.incarnation != worker.incarnation
        return is_other and worker.engine == "embedwire"

    def candidates(
        self, role: Role, *, model: str | None = None, fingerprint: str | None = None
    ) -> list[Worker]:
        """Workers that may be picked. None stands for any."""
        return [
            e.worker
            for e in self._entries.values()
            if self.is_candidate(e)
            and e.worker.role == role
            and model in (None, e.worker.model)
            and fingerprint in (None, e.worker.fingerprint)
        ]

    def models(self) -> list[str]:
        """Models that some language server serves, whether or not it answers at this moment; sorted."""
        return sorted({e.worker.model for e in self._entries.values() if e.worker.role == Role.LANGUAGE})

    def pick(
        self,
        role: Role,
        *,
        model: str | None = None,
        fingerprint: str | None = None,
        avoid: Collection[str] = (),
    ) -> Worker | None:
        """The candidate with the least load outside ``avoid`` (URLs); among equals, the one picked longest
        ago."""
        found = [w for w in self.candidates(role, model=model, fingerprint=fingerprint) if w.url not in avoid]
        if not found:
            return None
        best = min(found, key=lambda w: (self._load[w.url], self._entries[w.url].turn))
        self._turns += 1
        self._entries[best.url].turn = self._turns
        return best

    def load(self, url: str) -> int:
        """What is outstanding at a worker, in the caller's unit."""
        return self._load[url]

    @contextmanager
    def loaded(self, url: str, amount: int) -> Iterator[None]:
        """Count ``amount`` (tokens, media items) as outstanding at a worker while the block runs."""
        self._load[url] += amount
        try:
            yield
        finally:
            self._load[url] -= amount
            if not self._load[url]:
                del self._load[url]
