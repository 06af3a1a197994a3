"""From a prompt to an offered room. Owns the queue for source memory and the queue for the tower.

A prompt is *prepared* on the caller's thread (so its length is known), waits in line for source memory, is announced, and then waits for
the tower, which runs on a thread of its own over as many prompts as fit into a batch. Memory comes first: nothing that waits for the tower
still needs an allocation.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from functools import partial

from embedwire.encode.interface import ChatPrompt, EncoderEngine, PreparedPrompt
from embedwire.endpoint import Offer, SenderEndpoint, SendReport
from embedwire.errors import OverloadedError
from embedwire.group import LeadingSender
from embedwire.limits import AUX_POSITION_DELTA, AUX_WORDS
from embedwire.protocol.messages import RoomKey

logger = logging.getLogger(__name__)

DEFAULT_MAX_WAITING = 256
DEFAULT_BATCH_TOKENS = 16384
DEFAULT_MEMORY_WAIT_S = 30.0


@dataclass(frozen=True, slots=True)
class TakenUp:
    """A room that will be there: its length, where to ask for it (one address a rank), and what it is made of."""

    total_tokens: int
    control_addresses: tuple[str, ...]
    content_hash: bytes


@dataclass(frozen=True, slots=True)
class EncodeStats:
    """Prompts in line for source memory, in line for the tower, and encoded or failed since the start."""

    waiting_for_memory: int
    waiting_for_tower: int
    encoded_total: int
    failed_total: int


@dataclass(frozen=True, slots=True)
class _Work:
    offer: Offer
    prepared: PreparedPrompt


class EncodeService:
    """Takes up prompts for one encoder engine and offers their rooms at one sender, or at those of all its ranks.

    ``max_waiting`` bounds how many callers may be in line for memory, ``memory_wait_s`` how long each is; ``batch_tokens``
    bounds the tokens of one tower run (one prompt always runs, however long). Thread-safe.
    """

    def __init__(
        self,
        engine: EncoderEngine,
        sender: SenderEndpoint | LeadingSender,
        *,
        max_waiting: int = DEFAULT_MAX_WAITING,
        batch_tokens: int = DEFAULT_BATCH_TOKENS,
        memory_wait_s: float = DEFAULT_MEMORY_WAIT_S,
    ) -> None:
        self.engine = engine
        self.sender = sender
        self._max_waiting = max_waiting
        self._batch_tokens = batch_tokens
        self._memory_wait_s = memory_wait_s
        self._changed = threading.Condition()
        self._line: deque[object] = deque()
        self._work: deque[_Work] = deque()
        self._offers: dict[RoomKey, Offer] = {}
        self._ended_total = self._encoded_total = self._failed_total = 0
        self._is_closed = False
        self._tower = threading.Thread(target=self._run, name="embedwire-tower", daemon=True)
        self._tower.start()

    def take_up(self, room: int, prompt: ChatPrompt, *, attempt: int = 0, readers: int = 1) -> TakenUp:
        """Prepare a prompt, reserve its memory and announce its room to so many ``readers``; the tower runs later. Blocks the calling
        thread.

        Raises InvalidRequestError for a prompt that can not be served, NeverFitsError when it is larger than all source memory,
        OverloadedError when the line is full or memory did not come free in time, UsageError for a room that was taken up before.
        """
        prepared = self.engine.prepare(prompt)
        offer = self._reserve(partial(self._offer, RoomKey(room, attempt), prepared, readers))
        with self._changed:
            self._offers[offer.key] = offer
            self._work.append(_Work(offer, replace(prepared, key=(room, attempt))))
            self._changed.notify_all()
        offer.add_done_callback(partial(self._on_offer_ended, offer.key))
        return TakenUp(prepared.total_tokens, self.sender.addresses, prepared.content_hash)

    def _reserve(self, try_offer: Callable[[], Offer]) -> Offer:
        """First come, first served: only the head of the line tries, whenever a room has ended."""
        deadline = time.monotonic() + self._memory_wait_s
        me = object()
        with self._changed:
            if len(self._line) >= self._max_waiting:
                raise OverloadedError(f"{len(self._line)} prompts wait for source memory already")
            self._line.append(me)
        try:
            while True:
                with self._changed:
                    is_turn = self._changed.wait_for(
                        lambda: self._line[0] is me or self._is_closed, deadline - time.monotonic()
                    )
                    ended_before = self._ended_total
                if self._is_closed or not is_turn:
                    raise OverloadedError(f"no source memory came free within {self._memory_wait_s:g} s")
                try:
                    return try_offer()
                except OverloadedError:
                    self._wait_for_an_end(ended_before, deadline)
        finally:
            with self._changed:
                self._line.remove(me)
                self._changed.notify_all()

    def _offer(self, key: RoomKey, prepared: PreparedPrompt, readers: int) -> Offer:
        aux = [0] * (AUX_WORDS - 1)
        aux[AUX_POSITION_DELTA - 1] = prepared.mrope_position_delta
        return self.sender.offer(
            key.room,
            attempt=key.attempt,
            total_tokens=prepared.total_tokens,
            aux=aux,
            content_hash=prepared.content_hash,
            readers=readers,
        )

    def _wait_for_an_end(self, ended_before: int, deadline: float) -> None:
        with self._changed:
            ended = self._changed.wait_for(
                lambda: self._ended_total != ended_before or self._is_closed, deadline - time.monotonic()
            )
        if not ended:
            raise OverloadedError(f"no source memory came free within {self._memory_wait_s:g} s")

    def abort(self, room: int, *, attempt: int = 0, detail: str = "the client no longer wants it") -> None:
        """End a room on both sides. Harmless when it is not known, or has ended."""
        with self._changed:
            offer = self._offers.get(RoomKey(room, attempt))
        if offer is not None:
            offer.abort(detail)

    def stats(self) -> EncodeStats:
        """A snapshot."""
        with self._changed:
            return EncodeStats(len(self._line), len(self._work), self._encoded_total, self._failed_total)

    def close(self) -> None:
        """End the tower's thread after the batch that runs; rooms that it did not reach fail. The sender is the caller's to close."""
        with self._changed:
            self._is_closed = True
            left, self._work = list(self._work), deque()
            self._changed.notify_all()
        for work in left:
            work.offer.fail("the encoder is shutting down")
        self._tower.join()

    def _on_offer_ended(self, key: RoomKey, _: Future[SendReport]) -> None:
        with self._changed:
            del self._offers[key]
            self._ended_total += 1
            self._changed.notify_all()

    # ------------------------------------------------------------------ the tower's thread

    def _run(self) -> None:
        while not self._is_closed:
            if batch := self._next_batch():
                self._encode(batch)

    def _next_batch(self) -> list[_Work]:
        """As many prompts as fit, in order; none when their clients have gone, or at the end."""
        with self._changed:
            self._changed.wait_for(lambda: self._work or self._is_closed)
            batch: list[_Work] = []
            tokens = 0
            while self._work and (
                not batch or tokens + self._work[0].prepared.total_tokens <= self._batch_tokens
            ):
                work = self._work.popleft()
                if not work.offer.done():  # its client may have gone
                    batch.append(work)
                    tokens += work.prepared.total_tokens
            return batch

    def _encode(self, batch: Sequence[_Work]) -> None:
        left = deque(batch)
        try:
            outputs = self.engine.encode([work.prepared for work in batch])
            for work, arrays in zip(batch, outputs, strict=True):
                work.offer.fill(arrays)
                left.popleft()
                self._count(encoded=1)
        except Exception as error:
            if len(left) != 1:  # one prompt's fault is not its neighbours'
                for work in left:
                    self._encode([work])
                return
            logger.exception("the tower failed for room %d", left[0].offer.key.room)
            left[0].offer.fail(f"{type(error).__name__}: {error}")
            self._count(failed=1)

    def _count(self, *, encoded: int = 0, failed: int = 0) -> None:
        with self._changed:
            self._encoded_total += encoded
            self._failed_total += failed
