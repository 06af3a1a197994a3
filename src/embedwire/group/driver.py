"""The agreement steps of a group of ranks: when one takes place, which ranks take part, and what each concludes. A thread of its own.

Rank 0 runs a step when a rank has news: it sends the rooms that were opened since the last step, every rank opens them and replies that
it is ready, and only then all enter one collective. So an idle group sleeps, a rank that does not answer is found and named before any
other waits in a collective for it, and no rank can be in another step than the rest. A process that dies is found by its connection: the
others lose rank 0 by that, and rank 0 runs a step to find the failed rank. A process that stops is found by the steps: while rooms are
open there is one at least each *heartbeat*, with news or without, and a rank that gets none has lost rank 0. (The sockets have no
heartbeat of their own: docs/adr/0019.) Where the facts of all other ranks are neutral, as where rank 0 alone receives, rank 0's facts are
the agreed ones: they travel with ``reduce``, and there is no collective. The rooms and their memory belong to the member
(``group.member``), which works on the receiver's driver thread.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Sequence

import msgspec
import zmq

from embedwire.endpoint.event_loop import EventLoop
from embedwire.errors import TransportError
from embedwire.group.agreement import Facts, pack, unpack
from embedwire.group.contract import Collective, StepMember
from embedwire.group.messages import (
    BeginStep,
    End,
    FromLeader,
    FromRank,
    Join,
    Leave,
    Opened,
    Ready,
    Records,
    Reduce,
    RequestStep,
    decode_from_leader,
    decode_from_rank,
)

logger = logging.getLogger(__name__)

DEFAULT_TIMEOUT_S = 10.0
"""A rank that does not take part in a step for this long is lost, and the group with it."""
JOIN_TIMEOUT_S = 300.0
"""All ranks are there within this of the first step: they may still be loading a model."""
HEARTBEATS = 4
"""Steps within the timeout, at least, while rooms are open."""
MISSED_MAX = 6
"""Missed heartbeats before the leader counts as lost. Rank 0 may miss ``HEARTBEATS`` of them while another rank does not answer, and then
names that one."""


class RankLost(Exception):
    """The group cannot go on; the message names the rank, where it is known."""


class Heartbeat:
    """Counts the missed heartbeats, of ``interval_s`` seconds each, since the last step. A rank that was stopped itself has missed one,
    however long it was stopped."""

    def __init__(self, interval_s: float) -> None:
        self._interval_s = interval_s
        self.next_due = math.inf
        """When the next one is missed."""
        self._missed = 0

    def on_step(self, now: float) -> None:
        """A step took place."""
        self.next_due = now + self._interval_s
        self._missed = 0

    def miss(self, now: float) -> bool:
        """One was missed. True: that was one too many."""
        self.next_due = now + self._interval_s
        self._missed += 1
        return self._missed >= MISSED_MAX


class AgreementDriver:
    """One rank's part in the steps of its group of ``size`` ranks. Raises TransportError where ``address`` cannot be used."""

    def __init__(
        self,
        member: StepMember,
        *,
        rank: int,
        size: int,
        address: str,
        collective: Collective,
        timeout_s: float,
    ) -> None:
        self._loop = EventLoop(
            f"embedwire-agreement-{rank}",
            on_frames=self._on_frames,
            on_time=self._on_time,
            next_due=self._next_due,
        )
        self._member = member
        self._rank = rank
        self._collective = collective
        self._timeout_s = timeout_s
        self._is_leader = rank == 0
        self._others = frozenset(range(1, size))
        self._joined: set[int] = set()
        self._join_until = time.monotonic() + JOIN_TIMEOUT_S
        self._is_step_requested = False
        self._is_ended = False
        self._is_ready = False
        self._neutral_facts: Facts | None = None
        self._heartbeat = Heartbeat(timeout_s / HEARTBEATS)
        self._socket = self._loop.socket(zmq.ROUTER if self._is_leader else zmq.DEALER)
        self._disconnected = self._socket.get_monitor_socket(zmq.EVENT_DISCONNECTED)
        self._connect(address)
        self._loop.start()
        if not self._is_leader:
            self._loop.post(lambda: self._send_to_leader(Join(rank)))

    def _connect(self, address: str) -> None:
        self._socket.setsockopt(zmq.LINGER, 200)
        try:
            if self._is_leader:
                self._socket.setsockopt(zmq.ROUTER_HANDOVER, 1)
                self._socket.bind(address)
            else:
                self._socket.setsockopt(zmq.IDENTITY, _identity(self._rank))
                self._socket.connect(address)
        except zmq.ZMQError as error:
            self._loop.free()
            raise TransportError(f"agreement at {address}: {error}") from error
        for socket in (self._socket, self._disconnected):
            self._loop.register(socket)

    # ------------------------------------------------------------------ from the member; any thread

    def request_step(self) -> None:
        """This rank has news: a step begins soon."""
        self._loop.post(self._request_step)

    def _request_step(self) -> None:
        if self._is_ended:
            return
        if self._is_leader:
            self._is_step_requested = True
        else:
            self._send_to_leader(RequestStep(self._rank, self._member.step))

    def close(self) -> None:
        """Leave the group; for the others that is its end. Idempotent."""
        self._loop.close(self._shut_down)

    def _shut_down(self) -> None:
        self._loop.call(self._leave)
        self._loop.stop()

    def _leave(self) -> None:
        """After the step that this rank is ready for: the others may be in its collective already."""
        until = time.monotonic() + self._timeout_s
        while self._is_ready and not self._is_ended and (left_s := until - time.monotonic()) > 0:
            if self._socket.poll(math.ceil(left_s * 1000), zmq.POLLIN):
                self._on_frames(self._socket, self._loop.read_all(self._socket))
        self._end(f"rank {self._rank} is shutting down", is_lost=False)

    # ------------------------------------------------------------------ the thread of the steps

    def _on_frames(self, socket: zmq.Socket[bytes], frames: list[list[bytes]]) -> None:
        if socket is self._disconnected:
            self._on_disconnected()
            return
        for *_, frame in frames:
            if self._is_ended:
                return
            if self._is_leader:
                self._on_rank(decode_from_rank(frame))
            else:
                self._on_leader(decode_from_leader(frame))
                self._heartbeat.on_step(time.monotonic())

    def _on_disconnected(self) -> None:
        """A process at the other end is gone."""
        self._on_frames(self._socket, self._loop.read_all(self._socket))  # its last message may be Leave
        if self._is_leader:
            self._is_step_requested = True
        else:
            self._end("rank 0 is gone", is_lost=True)

    def _on_time(self, now: float) -> None:
        due = self._next_due()
        if due is None or now < due:
            return
        if not self._is_leader:
            if self._heartbeat.miss(now):
                self._end(f"rank 0 has begun no step for {MISSED_MAX} heartbeats", is_lost=True)
        elif self._joined == self._others:
            self._is_step_requested = False
            self._guarded(self._lead)
            self._heartbeat.on_step(time.monotonic())
        else:
            missing = sorted(self._others - self._joined)
            self._end(f"ranks {missing} have not joined within {JOIN_TIMEOUT_S:g} s", is_lost=True)

    def _next_due(self) -> float | None:
        if self._is_ended:
            return None
        if self._is_step_requested:
            return 0.0 if self._joined == self._others else self._join_until
        return self._heartbeat.next_due if self._is_ready or self._member.has_rooms else None

    def _on_rank(self, message: FromRank) -> None:
        match message:
            case Join(rank):
                if rank in self._joined:
                    self._end(f"rank {rank} was restarted", is_lost=True)
                self._joined.add(rank)
            case RequestStep(_, step) if step >= self._member.step:  # else a step has covered it meanwhile
                self._is_step_requested = True
            case Leave(_, detail):
                self._end(detail, is_lost=True)

    def _on_leader(self, message: FromLeader) -> None:
        match message:
            case BeginStep(step, opened):
                self._guarded(lambda: self._prepare(step, opened))
            case Reduce(records, words):
                self._guarded(lambda: self._on_reduce(records, words))
            case End(detail, is_lost):
                self._finish(detail, is_lost=is_lost)

    def _guarded(self, step: Callable[[], None]) -> None:
        """A step that fails on one rank ends the group."""
        try:
            step()
        except RankLost as lost:
            self._end(str(lost), is_lost=True)
        except Exception as error:
            logger.debug("the step failed", exc_info=True)
            self._end(f"rank {self._rank} lost its group: {type(error).__name__}: {error}", is_lost=True)

    def _lead(self) -> None:
        """Rank 0's step."""
        opened = self._member.open_requested()
        step = self._member.step + 1
        self._send_to_ranks(BeginStep(step, opened))
        others, are_neutral = self._await_ready(step)
        records = self._member.records() + others
        if are_neutral:
            words = pack(self._member.facts())
            self._send_to_ranks(Reduce(records, tuple(words)))
            self._member.conclude(unpack(words), records)
        else:
            self._send_to_ranks(Reduce(records))
            self._reduce(self._member.facts(), records)

    def _await_ready(self, step: int) -> tuple[Records, bool]:
        """The records of the other ranks, and whether the facts of all of them are neutral."""
        missing = set(self._others)
        records, are_neutral = Records(), True
        heartbeats = 0
        while missing:
            if not self._socket.poll(math.ceil(self._timeout_s / HEARTBEATS * 1000), zmq.POLLIN):
                heartbeats += 1
                if heartbeats >= HEARTBEATS:
                    names = ", ".join(map(str, sorted(missing)))
                    raise RankLost(f"rank {names} did not answer within {self._timeout_s:g} s")
                continue
            message = decode_from_rank(self._socket.recv_multipart()[-1])
            if isinstance(message, Ready) and message.step == step:
                missing.discard(message.rank)
                records += message.records
                are_neutral &= message.is_neutral
            else:
                self._on_rank(message)
                if self._is_ended:
                    raise RankLost("the group has ended")
        return records, are_neutral

    def _prepare(self, step: int, opened: Sequence[Opened]) -> None:
        """The step of every other rank, up to its collective."""
        self._member.open_as_leader(opened)
        if step != self._member.step + 1:
            raise RankLost(f"rank {self._rank} is at step {self._member.step + 1}, rank 0 at {step}")
        self._is_ready = True
        self._neutral_facts = self._member.neutral_facts()
        is_neutral = self._neutral_facts is not None
        self._send_to_leader(Ready(self._rank, step, self._member.records(), is_neutral))

    def _on_reduce(self, records: Records, words: Sequence[int]) -> None:
        if not self._is_ready:
            raise RankLost(f"rank {self._rank} is not ready for the step that rank 0 began")
        self._is_ready = False
        if words:
            self._member.conclude(unpack(words), records)
        else:  # facts are taken as late as possible: news since the step began then needs no further step
            self._reduce(self._neutral_facts or self._member.facts(), records)

    def _reduce(self, facts: Facts, records: Records) -> None:
        self._member.conclude(unpack(self._collective.all_reduce_min(pack(facts))), records)

    def _send_to_ranks(self, message: FromLeader) -> None:
        frame = msgspec.msgpack.encode(message)
        for rank in sorted(self._joined):
            self._socket.send_multipart([_identity(rank), frame])

    def _send_to_leader(self, message: FromRank) -> None:
        self._socket.send(msgspec.msgpack.encode(message))

    def _end(self, detail: str, *, is_lost: bool) -> None:
        """Here, and on the others."""
        if self._is_ended:
            return
        if self._is_leader:
            self._send_to_ranks(End(detail, is_lost))
        else:
            self._send_to_leader(Leave(self._rank, detail))
        self._finish(detail, is_lost=is_lost)

    def _finish(self, detail: str, *, is_lost: bool) -> None:
        if not self._is_ended:
            self._is_ended = True
            self._member.group_ended(detail, is_lost=is_lost)


def _identity(rank: int) -> bytes:
    return b"rank" + rank.to_bytes(4, "big")
