"""From a room's number to generated tokens. Owns the bounded set of jobs; the engine owns its batch, the receiver its queues.

Callbacks come from the receiver's and the engine's threads and must not block.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

from embedwire.endpoint import Received, ReceiverEndpoint, Reception
from embedwire.errors import EmbedwireError, OverloadedError, RankError
from embedwire.language.assembly import assemble, report_of
from embedwire.language.interface import (
    AssembledPrompt,
    Delta,
    Generation,
    LanguageEngine,
    SamplingParams,
    TransferReport,
)
from embedwire.protocol.topology import ALONE, RankGroup

DEFAULT_MAX_JOBS = 512

OnDelta = Callable[[Delta], None]
OnError = Callable[[EmbedwireError], None]
OnReport = Callable[[TransferReport, int], None]


@dataclass(frozen=True, slots=True)
class LanguageStats:
    """Jobs under way: those whose embedding is still on its way, and those with the engine. ``wire_bytes_total`` of embeddings came
    over the wire since the start, to all ``readers`` among the ``ranks`` together."""

    transferring: int
    generating: int
    ranks: int
    readers: int
    wire_bytes_total: int


def _nothing() -> None:
    pass


class Job:
    """One answer, from its first byte of embedding to its last token."""

    def __init__(self, service: LanguageService, *, on_delta: OnDelta, on_error: OnError) -> None:
        self._service = service
        self._on_delta = on_delta
        self._on_error = on_error
        self._lock = threading.Lock()
        self._reception: Reception | None = None
        self._generation: Generation | None = None
        self._release: Callable[[], None] = _nothing
        self._is_cancelled = False
        self.prompt_tokens = 0

    def cancel(self) -> None:
        """Nobody wants the answer: end the room on both sides, or the generation, whichever runs. Harmless at the end."""
        with self._lock:
            self._is_cancelled = True
            reception, generation = self._reception, self._generation
        if generation is not None:
            generation.cancel()
        elif reception is not None:
            reception.cancel()

    @property
    def is_generating(self) -> bool:
        return self._generation is not None

    def _submit(
        self, prompt: AssembledPrompt, sampling: SamplingParams, *, release: Callable[[], None]
    ) -> None:
        """Hand a prompt to the engine; raises as the engine does. ``release`` gives its memory back."""
        self._release = release
        self.prompt_tokens = len(prompt.fill_ids)
        generation = self._service.engine.submit(prompt, sampling, on_delta=self._pass_on)
        with self._lock:
            self._generation = generation
            is_cancelled = self._is_cancelled
        if is_cancelled:
            generation.cancel()

    def _pass_on(self, delta: Delta) -> None:
        release, self._release = self._release, _nothing
        release()  # the first delta says that the prompt has been read, or never will be
        lost = self._service.lost
        if delta.finish_reason == "error" and lost is not None:
            self._fail(RankError(lost))
            return
        if delta.finish_reason is not None:
            self._service._forget(self)
        self._on_delta(delta)

    def _fail(self, error: EmbedwireError) -> None:
        self._release()
        self._service._forget(self)
        self._on_error(error)


class LanguageService:
    """Answers prompts with one language engine, their embeddings received at one receiver. ``max_jobs`` bounds the answers under way.
    Where engine and receiver are rank 0 of a ``group``, every rank of it gets the embeddings. Thread-safe."""

    def __init__(
        self,
        engine: LanguageEngine,
        receiver: ReceiverEndpoint,
        *,
        max_jobs: int = DEFAULT_MAX_JOBS,
        group: RankGroup = ALONE,
    ) -> None:
        self.engine = engine
        self.receiver = receiver
        self.group = group
        self.lost: str | None = None
        """Why the group can not go on; None while it can."""
        self._max_jobs = max_jobs
        self._lock = threading.Lock()
        self._jobs: set[Job] = set()
        self._wire_bytes_total = 0

    def generate_text(
        self,
        messages: Sequence[Mapping[str, Any]],
        sampling: SamplingParams,
        *,
        on_delta: OnDelta,
        on_error: OnError,
    ) -> Job:
        """Answer a chat without media. Raises InvalidRequestError, OverloadedError and RankError at once."""
        fill_ids = self.engine.tokenize(messages)
        job = self._remember(Job(self, on_delta=on_delta, on_error=on_error))
        try:
            job._submit(AssembledPrompt(fill_ids=fill_ids), sampling, release=_nothing)
        except EmbedwireError:
            self._forget(job)
            raise
        return job

    def generate_room(
        self,
        room: int,
        addresses: str | Sequence[str],
        sampling: SamplingParams,
        *,
        attempt: int = 0,
        on_report: OnReport,
        on_delta: OnDelta,
        on_error: OnError,
    ) -> Job:
        """Answer a prompt whose embedding is room ``room`` of the encoder whose ranks are at ``addresses``.

        ``on_report`` is called once, when the embedding is whole, with how it came and the prompt's tokens; then ``on_delta``; or
        ``on_error``, once, instead of what has not been called yet. Raises OverloadedError, RankError and UsageError at once.
        """
        job = self._remember(Job(self, on_delta=on_delta, on_error=on_error))
        try:
            reception = self.receiver.open(room, addresses, attempt=attempt)
        except EmbedwireError:
            self._forget(job)
            raise

        def on_received(ended: Future[Received]) -> None:
            try:
                received = ended.result()
                report = report_of(received, group=self.group)
                self._count(report)
                on_report(report, report.total_tokens)
                job._submit(assemble(received, group=self.group), sampling, release=received.release)
            except EmbedwireError as error:
                job._fail(error)
            except Exception as error:
                job._fail(EmbedwireError(f"{type(error).__name__}: {error}"))
            finally:
                job._reception = None  # else it would keep the arrays until the answer's end

        job._reception = reception
        reception.add_done_callback(on_received)
        if job._is_cancelled:
            reception.cancel()
        return job

    def lose(self, detail: str) -> None:
        """A rank of the group is lost: who asks from now on, and whose answer ends because of it, hears so. Harmless the second time."""
        self.lost = self.lost or detail

    def stats(self) -> LanguageStats:
        """A snapshot."""
        with self._lock:
            generating = sum(job.is_generating for job in self._jobs)
            return LanguageStats(
                transferring=len(self._jobs) - generating,
                generating=generating,
                ranks=self.group.size,
                readers=len(self.group.readers),
                wire_bytes_total=self._wire_bytes_total,
            )

    def close(self) -> None:
        """Cancel every job. The engine and the receiver are the caller's to close."""
        with self._lock:
            jobs = list(self._jobs)
        for job in jobs:
            job.cancel()

    def _count(self, report: TransferReport) -> None:
        with self._lock:
            self._wire_bytes_total += report.wire_bytes

    def _remember(self, job: Job) -> Job:
        if self.lost is not None:
            raise RankError(self.lost)
        with self._lock:
            if len(self._jobs) >= self._max_jobs:
                raise OverloadedError(
                    f"{len(self._jobs)} answers are under way; at most {self._max_jobs} at a time"
                )
            self._jobs.add(job)
        return job

    def _forget(self, job: Job) -> None:
        with self._lock:
            self._jobs.discard(job)
