"""What every wire has to prove, as a suite that anyone can run over a wire of their own. Knows no test
framework.

Describe the wire with a :class:`~embedwire.testing.wires.Wire` and call :meth:`Conformance.run` with each
name of :meth:`Conformance.checks`: it returns when the check holds, raises AssertionError when it does not,
and :class:`~embedwire.testing.wires.NotApplicable` when the wire is of another kind. Every check also fails
when it leaves a descriptor, thread, mapping or file of shared memory behind.
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial

from embedwire.errors import TransportError, UsageError
from embedwire.testing.wires import (
    KIB,
    PATIENCE_S,
    NotApplicable,
    Receiver,
    Wire,
    assert_raises,
    eventually,
    held,
    mapped_files,
    piece,
    scattered,
    stop,
    write,
)
from embedwire.transports.contract import MARK_MAX, Inbound, Outbound, Outcome, Piece, RemoteRegion, Slice


class Conformance:
    """The suite over one wire. Checks are independent; each makes its own halves."""

    def __init__(self, wire: Wire) -> None:
        self._wire = wire
        probe = wire.inbound()
        self._is_fenced = probe.is_fenced
        probe.close()
        self._stack = ExitStack()
        self._files: set[str] = set()

    @classmethod
    def checks(cls) -> list[str]:
        """The names that :meth:`run` takes."""
        return [name for name in dir(cls) if name.startswith("check_")]

    def run(self, name: str) -> None:
        """Run one check, and then see that all it used has been given back."""
        before = held()
        with ExitStack() as self._stack:
            getattr(self, name)()
        assert held() == before, f"{name} left behind: {held()} instead of {before}"
        left = [path for path in self._files if os.path.exists(path)]
        assert not left, f"{name} left files behind: {left}"

    # What lands, and where

    def check_bytes_land_where_named_and_nowhere_else(self) -> None:
        receiver, region = self._pair(64 * KIB)
        spans = [(1, 1), (4097, 4095), (40_001, 0), (64 * KIB - 1, 1), (0, 1), (9001, 3), (20_000, 4097)]
        self._write_and_compare(receiver, region, [[piece(offset, n, seed=n) for offset, n in spans]])

    def check_any_order_and_size_of_pieces(self) -> None:
        rng = random.Random(20_240)
        receiver, region = self._pair(256 * KIB)
        for ticket in range(1, 9):
            slices = scattered(rng, 256 * KIB)
            self._write_and_compare(receiver, region, slices, ticket=ticket)

    def check_one_piece_of_8_mib(self) -> None:
        receiver, region = self._pair(8 * KIB * KIB + 3)
        self._write_and_compare(receiver, region, [[piece(1, 8 * KIB * KIB, seed=3)]])

    def check_slices_beyond_every_limit_of_the_wire(self) -> None:
        receiver, region = self._pair(40 * KIB * KIB)
        many = [piece(offset, 3, seed=offset) for offset in range(0, 6 * 5000, 6)]
        large = [piece(KIB * KIB + 7, 36 * KIB * KIB, seed=5)]
        self._write_and_compare(receiver, region, [many, large, [piece(30_001, 9, seed=1)]])

    def check_sources_of_any_shape_and_element(self) -> None:
        receiver, region = self._pair(4096)
        words = memoryview(bytes(range(240))).cast("i", (6, 10))
        self._write_and_compare(receiver, region, [[Piece(words, 11), Piece(words[2:], 1000)]])

    # What is reported

    def check_progress_is_in_order_and_complete(self) -> None:
        _, region = self._pair(KIB)
        landed: list[int] = []
        pulled = ahead = 0

        def slices() -> Iterator[Slice]:
            nonlocal pulled, ahead
            for pulled in range(1, 101):
                ahead = max(ahead, pulled - (landed[-1] if landed else 0))
                yield [piece(pulled, 5, seed=1)]

        outcome = write(region, 1, slices(), on_landed=landed.append)
        assert outcome is Outcome.LANDED
        assert landed[-1] == 100
        assert landed == sorted(set(landed))
        assert ahead <= 16, f"{ahead} slices were taken before the first of them had landed"

    def check_nothing_to_write_has_landed(self) -> None:
        _, region = self._pair(KIB)
        landed: list[int] = []
        assert write(region, 1, [], on_landed=landed.append) is Outcome.LANDED
        assert landed == []

    def check_permission_that_ends_midway(self) -> None:
        receiver, region = self._pair(KIB)
        slices = [[piece(100 * n, 50, seed=n)] for n in range(8)]
        answers = iter((True, True, True, False))
        landed = [0]
        outcome = write(region, 1, slices, is_permitted=lambda: next(answers), on_landed=landed.append)
        assert outcome is Outcome.LOST
        assert landed[-1] == 3
        receiver.expect(slices[:3])
        receiver.check()
        self._write_and_compare(receiver, region, [[piece(900, 9, seed=1)]], ticket=2)

    def check_a_callers_exception_propagates_and_the_session_lives(self) -> None:
        receiver, region = self._pair(KIB)

        def breaks(*_: object) -> bool:
            raise ZeroDivisionError

        def slices() -> Iterator[Slice]:
            yield [piece(0, 9, seed=1)]
            yield [piece(breaks(), 1, seed=1)]

        one = [[piece(0, 9, seed=1)]]
        receiver.expect(one)
        for attempt in (
            partial(write, region, 1, slices()),
            partial(write, region, 1, one, is_permitted=breaks),
            partial(write, region, 1, one, on_landed=breaks),
        ):
            assert_raises(ZeroDivisionError, attempt)
            receiver.check()
        self._write_and_compare(receiver, region, [[piece(17, 400, seed=2)]], ticket=2)

    def check_pieces_outside_the_region_are_the_callers_fault(self) -> None:
        receiver, region = self._pair(KIB)
        for offset, nbytes in ((-1, 1), (KIB, 1), (KIB - 1, 2), (2**62, 1), (KIB + 1, 0)):
            slices = [[piece(5, 5, seed=1)], [piece(20, 2, seed=1), piece(offset, nbytes, seed=1)]]
            receiver.expect(slices[:1])
            assert_raises(UsageError, partial(write, region, 1, slices))
            receiver.check()
        strided = memoryview(bytes(20))[::2]
        assert_raises(UsageError, partial(write, region, 1, [[Piece(strided, 0)]]))

    # Permissions

    def check_nothing_lands_under_a_revoked_ticket(self) -> None:
        receiver, region = self._pair(KIB)
        assert receiver.inbound.revoke(1) is self._is_fenced
        assert receiver.inbound.revoke(1) is self._is_fenced
        self._needs_enforcement()
        for ticket in (1, 12345):
            assert write(region, ticket, [[piece(0, 100, seed=1)]]) is Outcome.LOST
            receiver.check()
        self._write_and_compare(receiver, region, [[piece(5, 5, seed=5)]], ticket=2)

    def check_nothing_lands_outside_the_ticket(self) -> None:
        self._needs_enforcement()
        receiver = self._receiver(KIB, permits=False)
        receiver.inbound.permit(1, [(100, 50), (150, 50), (300, 10)])
        receiver.inbound.permit(2, [(0, KIB)])
        region = self._session(receiver.inbound)
        self._write_and_compare(receiver, region, [[piece(100, 100, seed=1), piece(309, 1, seed=2)]])
        for offset, nbytes in ((99, 2), (199, 2), (200, 1), (290, 30), (310, 1), (0, 1)):
            assert write(region, 1, [[piece(offset, nbytes, seed=3)]]) is not Outcome.LANDED
            receiver.check()
        self._write_and_compare(receiver, region, [[piece(290, 30, seed=1)]], ticket=2)

    def check_revoke_is_a_fence_in_the_middle_of_a_write(self) -> None:
        self._needs_enforcement()
        receiver, region = self._pair(4 * KIB * KIB)
        with self._writing(region, nbytes=4 * KIB * KIB) as (_, outcomes):
            assert receiver.inbound.revoke(1)
            fenced = bytes(receiver.memory)
        assert outcomes == [Outcome.LOST]
        assert receiver.memory == fenced, "bytes landed after revoke() had returned"

    def check_tickets_are_checked(self) -> None:
        receiver = self._receiver(KIB)
        if self._is_fenced:
            for ticket, span in ((0, (0, 1)), (2**63, (0, 1)), (9, (-1, 1)), (9, (0, KIB + 1)), (1, (0, 1))):
                assert_raises(UsageError, partial(receiver.inbound.permit, ticket, [span]))

    def check_memory_of_another_owner(self) -> None:
        memory = bytearray(KIB)
        inbound = self._wire.inbound()
        self._stack.callback(inbound.close)
        try:
            inbound.register(memoryview(memory))
        except UsageError as reason:
            raise NotApplicable(str(reason)) from None
        inbound.permit(1, [(0, KIB)])
        receiver = Receiver(inbound, memoryview(memory))
        self._write_and_compare(receiver, self._session(inbound), [[piece(5, 500, seed=1)]])
        assert_raises(UsageError, lambda: inbound.register(memoryview(memory)))

    # Marks

    def check_marks_show_what_the_sender_left(self) -> None:
        receiver, region = self._pair_with_marks()
        assert receiver.inbound.mark(1) == 0
        for mark in (1, 7, 7, 3, MARK_MAX):
            region.set_mark(1, mark)
            assert receiver.inbound.mark(1) == mark
            assert receiver.inbound.mark(2) == 0
        receiver.check()
        receiver.memory[:] = receiver.model
        assert receiver.inbound.mark(1) == MARK_MAX

    def check_a_mark_is_never_that_of_another_ticket(self) -> None:
        receiver, region = self._pair_with_marks()
        tickets = [*range(1, 2000), 2**63 - 1]
        for ticket in tickets:
            region.set_mark(ticket, ticket % MARK_MAX + 1)
            assert receiver.inbound.mark(ticket) == ticket % MARK_MAX + 1
        for ticket in tickets:
            assert receiver.inbound.mark(ticket) in (0, ticket % MARK_MAX + 1)
        assert receiver.inbound.mark(2000) == 0

    def check_a_mark_comes_behind_the_bytes(self) -> None:
        receiver, region = self._pair_with_marks()
        seen = []

        def on_landed(number: int) -> None:
            region.set_mark(1, number)
            seen.append((receiver.inbound.mark(1), bytes(receiver.memory[10 * number : 10 * number + 9])))

        slices = [[piece(10 * n, 9, seed=n)] for n in range(1, 9)]
        assert write(region, 1, slices, on_landed=on_landed) is Outcome.LANDED
        assert seen == [(n, bytes(slices[n - 1][0].source)) for n in range(1, 9)]

    def check_marks_end_with_the_session(self) -> None:
        receiver, region = self._pair_with_marks()
        region.set_mark(1, 5)
        region.close()
        region.set_mark(1, 6)
        assert receiver.inbound.mark(1) == 5
        receiver.memory.release()
        receiver.inbound.close()
        assert receiver.inbound.mark(1) == 0

    def _pair_with_marks(self) -> tuple[Receiver, RemoteRegion]:
        receiver, region = self._pair(KIB)
        assert receiver.inbound.has_marks is region.has_marks
        if not region.has_marks:
            raise NotApplicable("this wire has no marks")
        return receiver, region

    # Sessions

    def check_two_senders_share_a_region(self) -> None:
        receiver = self._receiver(512 * KIB)
        half = 256 * KIB
        slices = [[[piece(s * half + n * 4099, 4099, seed=n + s)] for n in range(60)] for s in (0, 1)]
        regions = [self._session(receiver.inbound, sender_token=token) for token in (7, 8)]
        outcomes: list[Outcome] = []
        threads = [
            threading.Thread(target=lambda s=s: outcomes.append(write(regions[s], s + 1, slices[s])))
            for s in (0, 1)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert outcomes == [Outcome.LANDED] * 2
        receiver.expect(slices[0] + slices[1])
        receiver.check()

    def check_close_ends_a_running_write(self) -> None:
        receiver, region = self._pair(KIB * KIB)
        with self._writing(region, nbytes=KIB * KIB) as (_, outcomes):
            region.close()
            after = bytes(receiver.memory)
            assert receiver.inbound.is_gone(7)
        assert outcomes[0] in (Outcome.LOST, Outcome.UNKNOWN)
        assert receiver.memory == after, "bytes landed after close() had returned"
        assert write(region, 2, [[piece(0, 1, seed=1)]]) is Outcome.LOST

    def check_connect_again_after_close(self) -> None:
        receiver = self._receiver(KIB)
        assert receiver.inbound.is_gone(7), "a sender that never connected"
        for ticket in (1, 2, 3):
            region = self._session(receiver.inbound)
            assert not receiver.inbound.is_gone(7)
            assert receiver.inbound.is_gone(8)
            self._write_and_compare(receiver, region, [[piece(ticket, 99, seed=ticket)]], ticket=ticket)
            region.close()
            region.close()
            assert receiver.inbound.is_gone(7)

    def check_one_of_two_sessions_is_not_gone(self) -> None:
        receiver = self._receiver(KIB)
        first, second = self._session(receiver.inbound), self._session(receiver.inbound)
        first.close()
        assert not receiver.inbound.is_gone(7)
        self._write_and_compare(receiver, second, [[piece(3, 3, seed=1)]])

    def check_life_of_a_receiver(self) -> None:
        inbound = self._wire.inbound()
        assert_raises(UsageError, inbound.descriptor)
        memory = inbound.allocate(5000)
        assert bytes(memory) == bytes(5000)
        assert len(inbound.descriptor()) <= 4096
        assert_raises(UsageError, lambda: inbound.allocate(1))
        memory.release()
        inbound.close()
        inbound.close()
        self._wire.inbound().close()

    def check_a_closed_receiver(self) -> None:
        receiver, region = self._pair(KIB)
        descriptor = receiver.inbound.descriptor()
        receiver.memory.release()
        receiver.inbound.close()
        assert write(region, 1, [[piece(0, 9, seed=1)]]) is not Outcome.LANDED
        outbound = self._outbound()
        assert_raises(TransportError, lambda: outbound.connect(descriptor, sender_token=7, timeout_s=1.0))

    def check_malformed_descriptors(self) -> None:
        receiver = self._receiver(KIB)
        whole, outbound = receiver.inbound.descriptor(), self._outbound()
        bad = [whole[:n] for n in range(len(whole))]
        bad += [whole + b"\0", bytes(40), b"\xff" * 40, b"\xdf\xff\xff\xff\xff", os.urandom(3000)]
        for descriptor in bad:
            assert_raises(
                TransportError, partial(outbound.connect, descriptor, sender_token=7, timeout_s=5.0)
            )
        assert receiver.inbound.is_gone(7)
        receiver.check()

    # Peers that end or stop

    def check_a_sender_that_stops_and_dies(self) -> None:
        self._needs_processes()
        receiver = self._receiver(KIB * KIB)
        child = self._peer("send", receiver.inbound.descriptor().hex(), "7", "1", str(KIB * KIB))
        assert child.stdout.readline() == "landed\n"  # type: ignore[union-attr]
        stop(child)
        assert not receiver.inbound.is_gone(7), "it is only stopped"
        child.kill()
        child.wait()
        eventually(lambda: receiver.inbound.is_gone(7))
        after = bytes(receiver.memory)
        receiver.model[:] = after
        self._write_and_compare(receiver, self._session(receiver.inbound), [[piece(0, 9, seed=1)]], ticket=2)

    def check_a_receiver_that_dies_in_mid_write(self) -> None:
        self._needs_processes()
        child, region = self._remote_receiver(KIB * KIB)

        def slices() -> Iterator[Slice]:
            for number in range(200):
                if number == 20:
                    child.kill()
                    child.wait()
                yield [piece(number, 64 * KIB, seed=number)]

        assert write(region, 1, slices()) in (Outcome.LOST, Outcome.UNKNOWN)
        assert write(region, 1, [[piece(0, 1, seed=1)]]) is Outcome.LOST

    def check_a_receiver_that_stops_hangs_nobody(self) -> None:
        self._needs_processes()
        child, region = self._remote_receiver(KIB * KIB)
        stop(child)
        slices = [[piece(n, 900 * KIB, seed=n)] for n in range(64)]
        began = time.monotonic()
        first = write(region, 1, slices, timeout_s=1.0)
        second = write(region, 1, slices[:1], timeout_s=1.0)
        assert time.monotonic() - began < PATIENCE_S
        # A wire that needs no help from the receiver's process writes on; another can not know.
        assert (first, second) in ((Outcome.LANDED, Outcome.LANDED), (Outcome.UNKNOWN, Outcome.LOST))
        child.send_signal(signal.SIGCONT)
        assert write(region, 1, slices[:3]) is Outcome.LANDED

    # What the checks are made of

    def _needs_enforcement(self) -> None:
        if not self._is_fenced:
            raise NotApplicable("the receiver of this wire can not enforce a ticket")

    def _needs_processes(self) -> None:
        if not self._wire.importable_as:
            raise NotApplicable("this wire does not leave its process")

    def _receiver(self, nbytes: int, *, permits: bool = True) -> Receiver:
        inbound = self._wire.inbound()
        self._stack.callback(inbound.close)
        memory = inbound.allocate(nbytes)
        self._stack.callback(memory.release)
        self._files |= mapped_files()
        for ticket in range(1, 9) if permits else ():
            inbound.permit(ticket, [(0, nbytes)])
        return Receiver(inbound, memory)

    def _outbound(self) -> Outbound:
        outbound = self._wire.outbound()
        self._stack.callback(outbound.close)
        return outbound

    def _session(self, inbound: Inbound, *, sender_token: int = 7) -> RemoteRegion:
        return self._outbound().connect(inbound.descriptor(), sender_token=sender_token, timeout_s=PATIENCE_S)

    def _pair(self, nbytes: int) -> tuple[Receiver, RemoteRegion]:
        receiver = self._receiver(nbytes)
        return receiver, self._session(receiver.inbound)

    def _write_and_compare(
        self, receiver: Receiver, region: RemoteRegion, slices: list[list[Piece]], *, ticket: int = 1
    ) -> None:
        landed = [0]
        assert write(region, ticket, slices, on_landed=landed.append) is Outcome.LANDED
        assert landed[-1] == len(slices)
        receiver.expect(slices)
        receiver.check()

    @contextmanager
    def _writing(
        self, region: RemoteRegion, *, nbytes: int
    ) -> Iterator[tuple[threading.Thread, list[Outcome]]]:
        """A thread that writes under ticket 1 without end; entered when a first slice has landed."""
        if not self._wire.importable_as:
            raise NotApplicable("this wire writes within the call")
        outcomes: list[Outcome] = []
        has_begun = threading.Event()
        source = [memoryview(bytes([value]) * nbytes) for value in range(2)]

        def slices() -> Iterator[Slice]:
            for number in range(1_000_000):
                yield [Piece(source[number % 2], 0)]

        def run() -> None:
            outcomes.append(write(region, 1, slices(), on_landed=lambda _: has_begun.set()))

        thread = threading.Thread(target=run)
        thread.start()
        assert has_begun.wait(PATIENCE_S)
        try:
            yield thread, outcomes
        finally:
            thread.join(PATIENCE_S)
            assert not thread.is_alive(), "the write went on"

    def _peer(self, *args: str) -> subprocess.Popen[str]:
        command = [
            sys.executable,
            "-m",
            "embedwire.testing.conformance_peer",
            self._wire.importable_as,
            *args,
        ]
        child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self._stack.enter_context(child)
        self._stack.callback(child.kill)
        return child

    def _remote_receiver(self, nbytes: int) -> tuple[subprocess.Popen[str], RemoteRegion]:
        child = self._peer("receive", str(nbytes))
        descriptor = bytes.fromhex(child.stdout.readline())  # type: ignore[union-attr]
        self._stack.callback(partial(self._tidy_after, child))
        return child, self._outbound().connect(descriptor, sender_token=7, timeout_s=PATIENCE_S)

    def _tidy_after(self, child: subprocess.Popen[str]) -> None:
        """A receiver that was killed leaves its files; the next one on this host removes them."""
        child.kill()
        child.wait()
        inbound = self._wire.inbound()
        inbound.allocate(1).release()
        inbound.close()
