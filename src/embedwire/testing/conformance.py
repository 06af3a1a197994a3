"""What every wire has to prove, as a suite that anyone can run over a wire of their own. Knows no test
framework.

Describe the wire with a :class:`Wire` and call :meth:`Conformance.run` with each name of
:meth:`Conformance.checks`: it returns when the check holds, raises AssertionError when it does not, and
:class:`NotApplicable` when the wire is of another kind. Every check also fails when it leaves a descriptor,
thread, mapping or file of shared memory behind.
"""

from __future__ import annotations

import gc
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial

from embedwire.errors import TransportError, UsageError
from embedwire.testing.fake_wire import FakeNetwork
from embedwire.transports import open_inbound, open_outbound
from embedwire.transports.contract import Inbound, Outbound, Outcome, Piece, RemoteRegion, Slice

PATIENCE_S = 20.0
_KIB = 1024


class NotApplicable(Exception):
    """The wire makes no promise of this kind. The message says which."""


@dataclass(frozen=True, slots=True)
class Wire:
    """A wire under test. ``importable_as`` is the ``module:function`` that returns this object in another
    process, or "" when no other process can reach a region."""

    inbound: Callable[[], Inbound]
    outbound: Callable[[], Outbound]
    importable_as: str = ""


def shm() -> Wire:
    return _registered("shm")


def tcp() -> Wire:
    return _registered("tcp")


def fake() -> Wire:
    network = FakeNetwork()
    return Wire(network.inbound, network.outbound)


def fake_one_sided() -> Wire:
    network = FakeNetwork(is_fenced=False)
    return Wire(network.inbound, network.outbound)


def _registered(name: str) -> Wire:
    return Wire(
        partial(open_inbound, name, host="127.0.0.1"),
        partial(open_outbound, name, host="127.0.0.1"),
        importable_as=f"{__name__}:{name}",
    )


@dataclass(slots=True)
class Receiver:
    """A region of one byte value, 0xEE, and a model of what should be in it."""

    inbound: Inbound
    memory: memoryview
    model: bytearray = field(init=False)

    def __post_init__(self) -> None:
        self.model = bytearray(b"\xee" * len(self.memory))
        self.memory[:] = self.model

    def expect(self, slices: Iterable[Slice]) -> None:
        for pieces in slices:
            for piece in pieces:
                self.model[piece.offset : piece.offset + piece.source.nbytes] = piece.source

    def check(self) -> None:
        assert self.memory == self.model, f"{_first_difference(self.memory, self.model)}"


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
        before = _held()
        with ExitStack() as self._stack:
            getattr(self, name)()
        gc.collect()
        assert _held() == before, f"{name} left behind: {_held()} instead of {before}"
        left = [path for path in self._files if os.path.exists(path)]
        assert not left, f"{name} left files behind: {left}"

    # What lands, and where

    def check_bytes_land_where_named_and_nowhere_else(self) -> None:
        receiver, region = self._pair(64 * _KIB)
        spans = [(1, 1), (4097, 4095), (40_001, 0), (64 * _KIB - 1, 1), (0, 1), (9001, 3), (20_000, 4097)]
        self._write_and_compare(receiver, region, [[_piece(offset, n, seed=n) for offset, n in spans]])

    def check_any_order_and_size_of_pieces(self) -> None:
        rng = random.Random(20_240)
        receiver, region = self._pair(256 * _KIB)
        for ticket in range(1, 9):
            slices = _scattered(rng, 256 * _KIB)
            self._write_and_compare(receiver, region, slices, ticket=ticket)

    def check_one_piece_of_8_mib(self) -> None:
        receiver, region = self._pair(8 * _KIB * _KIB + 3)
        self._write_and_compare(receiver, region, [[_piece(1, 8 * _KIB * _KIB, seed=3)]])

    def check_slices_beyond_every_limit_of_the_wire(self) -> None:
        receiver, region = self._pair(40 * _KIB * _KIB)
        many = [_piece(offset, 3, seed=offset) for offset in range(0, 6 * 5000, 6)]
        large = [_piece(_KIB * _KIB + 7, 36 * _KIB * _KIB, seed=5)]
        self._write_and_compare(receiver, region, [many, large, [_piece(30_001, 9, seed=1)]])

    def check_sources_of_any_shape_and_element(self) -> None:
        receiver, region = self._pair(4096)
        words = memoryview(bytes(range(240))).cast("i", (6, 10))
        self._write_and_compare(receiver, region, [[Piece(words, 11), Piece(words[2:], 1000)]])

    # What is reported

    def check_progress_is_in_order_and_complete(self) -> None:
        _, region = self._pair(_KIB)
        landed: list[int] = []
        pulled = ahead = 0

        def slices() -> Iterator[Slice]:
            nonlocal pulled, ahead
            for pulled in range(1, 101):
                ahead = max(ahead, pulled - (landed[-1] if landed else 0))
                yield [_piece(pulled, 5, seed=1)]

        outcome = _write(region, 1, slices(), on_landed=landed.append)
        assert outcome is Outcome.LANDED
        assert landed[-1] == 100
        assert landed == sorted(set(landed))
        assert ahead <= 16, f"{ahead} slices were taken before the first of them had landed"

    def check_nothing_to_write_has_landed(self) -> None:
        _, region = self._pair(_KIB)
        landed: list[int] = []
        assert _write(region, 1, [], on_landed=landed.append) is Outcome.LANDED
        assert landed == []

    def check_permission_that_ends_midway(self) -> None:
        receiver, region = self._pair(_KIB)
        slices = [[_piece(100 * n, 50, seed=n)] for n in range(8)]
        answers = iter((True, True, True, False))
        landed = [0]
        outcome = _write(region, 1, slices, is_permitted=lambda: next(answers), on_landed=landed.append)
        assert outcome is Outcome.LOST
        assert landed[-1] == 3
        receiver.expect(slices[:3])
        receiver.check()
        self._write_and_compare(receiver, region, [[_piece(900, 9, seed=1)]], ticket=2)

    def check_a_callers_exception_propagates_and_the_session_lives(self) -> None:
        receiver, region = self._pair(_KIB)

        def breaks(*_: object) -> bool:
            raise ZeroDivisionError

        def slices() -> Iterator[Slice]:
            yield [_piece(0, 9, seed=1)]
            yield [_piece(breaks(), 1, seed=1)]

        one = [[_piece(0, 9, seed=1)]]
        receiver.expect(one)
        for attempt in (
            partial(_write, region, 1, slices()),
            partial(_write, region, 1, one, is_permitted=breaks),
            partial(_write, region, 1, one, on_landed=breaks),
        ):
            _assert_raises(ZeroDivisionError, attempt)
            receiver.check()
        self._write_and_compare(receiver, region, [[_piece(17, 400, seed=2)]], ticket=2)

    def check_pieces_outside_the_region_are_the_callers_fault(self) -> None:
        receiver, region = self._pair(_KIB)
        for offset, nbytes in ((-1, 1), (_KIB, 1), (_KIB - 1, 2), (2**62, 1), (_KIB + 1, 0)):
            slices = [[_piece(5, 5, seed=1)], [_piece(20, 2, seed=1), _piece(offset, nbytes, seed=1)]]
            receiver.expect(slices[:1])
            _assert_raises(UsageError, partial(_write, region, 1, slices))
            receiver.check()
        strided = memoryview(bytes(20))[::2]
        _assert_raises(UsageError, partial(_write, region, 1, [[Piece(strided, 0)]]))

    # Permissions

    def check_nothing_lands_under_a_revoked_ticket(self) -> None:
        receiver, region = self._pair(_KIB)
        assert receiver.inbound.revoke(1) is self._is_fenced
        assert receiver.inbound.revoke(1) is self._is_fenced
        self._needs_enforcement()
        for ticket in (1, 12345):
            assert _write(region, ticket, [[_piece(0, 100, seed=1)]]) is Outcome.LOST
            receiver.check()
        self._write_and_compare(receiver, region, [[_piece(5, 5, seed=5)]], ticket=2)

    def check_nothing_lands_outside_the_ticket(self) -> None:
        self._needs_enforcement()
        receiver = self._receiver(_KIB, permits=False)
        receiver.inbound.permit(1, [(100, 50), (150, 50), (300, 10)])
        receiver.inbound.permit(2, [(0, _KIB)])
        region = self._session(receiver.inbound)
        self._write_and_compare(receiver, region, [[_piece(100, 100, seed=1), _piece(309, 1, seed=2)]])
        for offset, nbytes in ((99, 2), (199, 2), (200, 1), (290, 30), (310, 1), (0, 1)):
            assert _write(region, 1, [[_piece(offset, nbytes, seed=3)]]) is not Outcome.LANDED
            receiver.check()
        self._write_and_compare(receiver, region, [[_piece(290, 30, seed=1)]], ticket=2)

    def check_revoke_is_a_fence_in_the_middle_of_a_write(self) -> None:
        self._needs_enforcement()
        receiver, region = self._pair(4 * _KIB * _KIB)
        with self._writing(region, nbytes=4 * _KIB * _KIB) as (_, outcomes):
            assert receiver.inbound.revoke(1)
            fenced = bytes(receiver.memory)
        assert outcomes == [Outcome.LOST]
        assert receiver.memory == fenced, "bytes landed after revoke() had returned"

    def check_tickets_are_checked(self) -> None:
        receiver = self._receiver(_KIB)
        if self._is_fenced:
            for ticket, span in ((0, (0, 1)), (2**63, (0, 1)), (9, (-1, 1)), (9, (0, _KIB + 1)), (1, (0, 1))):
                _assert_raises(UsageError, partial(receiver.inbound.permit, ticket, [span]))

    def check_memory_of_another_owner(self) -> None:
        memory = bytearray(_KIB)
        inbound = self._wire.inbound()
        self._stack.callback(inbound.close)
        try:
            inbound.register(memoryview(memory))
        except UsageError as reason:
            raise NotApplicable(str(reason)) from None
        inbound.permit(1, [(0, _KIB)])
        receiver = Receiver(inbound, memoryview(memory))
        self._write_and_compare(receiver, self._session(inbound), [[_piece(5, 500, seed=1)]])
        _assert_raises(UsageError, lambda: inbound.register(memoryview(memory)))

    # Sessions

    def check_two_senders_share_a_region(self) -> None:
        receiver = self._receiver(512 * _KIB)
        half = 256 * _KIB
        slices = [[[_piece(s * half + n * 4099, 4099, seed=n + s)] for n in range(60)] for s in (0, 1)]
        regions = [self._session(receiver.inbound, sender_token=token) for token in (7, 8)]
        outcomes: list[Outcome] = []
        threads = [
            threading.Thread(target=lambda s=s: outcomes.append(_write(regions[s], s + 1, slices[s])))
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
        receiver, region = self._pair(_KIB * _KIB)
        with self._writing(region, nbytes=_KIB * _KIB) as (_, outcomes):
            region.close()
            after = bytes(receiver.memory)
            assert receiver.inbound.is_gone(7)
        assert outcomes[0] in (Outcome.LOST, Outcome.UNKNOWN)
        assert receiver.memory == after, "bytes landed after close() had returned"
        assert _write(region, 2, [[_piece(0, 1, seed=1)]]) is Outcome.LOST

    def check_connect_again_after_close(self) -> None:
        receiver = self._receiver(_KIB)
        assert receiver.inbound.is_gone(7), "a sender that never connected"
        for ticket in (1, 2, 3):
            region = self._session(receiver.inbound)
            assert not receiver.inbound.is_gone(7)
            assert receiver.inbound.is_gone(8)
            self._write_and_compare(receiver, region, [[_piece(ticket, 99, seed=ticket)]], ticket=ticket)
            region.close()
            region.close()
            assert receiver.inbound.is_gone(7)

    def check_one_of_two_sessions_is_not_gone(self) -> None:
        receiver = self._receiver(_KIB)
        first, second = self._session(receiver.inbound), self._session(receiver.inbound)
        first.close()
        assert not receiver.inbound.is_gone(7)
        self._write_and_compare(receiver, second, [[_piece(3, 3, seed=1)]])

    def check_life_of_a_receiver(self) -> None:
        inbound = self._wire.inbound()
        _assert_raises(UsageError, inbound.descriptor)
        memory = inbound.allocate(5000)
        assert bytes(memory) == bytes(5000)
        assert len(inbound.descriptor()) <= 4096
        _assert_raises(UsageError, lambda: inbound.allocate(1))
        memory.release()
        inbound.close()
        inbound.close()
        self._wire.inbound().close()

    def check_a_closed_receiver(self) -> None:
        receiver, region = self._pair(_KIB)
        descriptor = receiver.inbound.descriptor()
        receiver.memory.release()
        receiver.inbound.close()
        assert _write(region, 1, [[_piece(0, 9, seed=1)]]) is not Outcome.LANDED
        outbound = self._outbound()
        _assert_raises(TransportError, lambda: outbound.connect(descriptor, sender_token=7, timeout_s=1.0))

    def check_malformed_descriptors(self) -> None:
        receiver = self._receiver(_KIB)
        whole, outbound = receiver.inbound.descriptor(), self._outbound()
        bad = [whole[:n] for n in range(len(whole))]
        bad += [whole + b"\0", bytes(40), b"\xff" * 40, b"\xdf\xff\xff\xff\xff", os.urandom(3000)]
        for descriptor in bad:
            _assert_raises(
                TransportError, partial(outbound.connect, descriptor, sender_token=7, timeout_s=5.0)
            )
        assert receiver.inbound.is_gone(7)
        receiver.check()

    # Peers that end or stop

    def check_a_sender_that_stops_and_dies(self) -> None:
        self._needs_processes()
        receiver = self._receiver(_KIB * _KIB)
        child = self._peer("send", receiver.inbound.descriptor().hex(), "7", "1", str(_KIB * _KIB))
        assert child.stdout.readline() == "landed\n"  # type: ignore[union-attr]
        _stop(child)
        assert not receiver.inbound.is_gone(7), "it is only stopped"
        child.kill()
        child.wait()
        _eventually(lambda: receiver.inbound.is_gone(7))
        after = bytes(receiver.memory)
        receiver.model[:] = after
        self._write_and_compare(receiver, self._session(receiver.inbound), [[_piece(0, 9, seed=1)]], ticket=2)

    def check_a_receiver_that_dies_in_mid_write(self) -> None:
        self._needs_processes()
        child, region = self._remote_receiver(_KIB * _KIB)

        def slices() -> Iterator[Slice]:
            for number in range(200):
                if number == 20:
                    child.kill()
                    child.wait()
                yield [_piece(number, 64 * _KIB, seed=number)]

        assert _write(region, 1, slices()) in (Outcome.LOST, Outcome.UNKNOWN)
        assert _write(region, 1, [[_piece(0, 1, seed=1)]]) is Outcome.LOST

    def check_a_receiver_that_stops_hangs_nobody(self) -> None:
        self._needs_processes()
        child, region = self._remote_receiver(_KIB * _KIB)
        _stop(child)
        slices = [[_piece(n, 900 * _KIB, seed=n)] for n in range(64)]
        began = time.monotonic()
        first = _write(region, 1, slices, timeout_s=0.3)
        second = _write(region, 1, slices[:1], timeout_s=0.3)
        assert time.monotonic() - began < PATIENCE_S
        # A wire that needs no help from the receiver's process writes on; another can not know.
        assert (first, second) in ((Outcome.LANDED, Outcome.LANDED), (Outcome.UNKNOWN, Outcome.LOST))
        child.send_signal(signal.SIGCONT)
        assert _write(region, 1, slices[:3]) is Outcome.LANDED

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
        self._files |= _mapped_files()
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
        assert _write(region, ticket, slices, on_landed=landed.append) is Outcome.LANDED
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
            outcomes.append(_write(region, 1, slices(), on_landed=lambda _: has_begun.set()))

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


def _write(
    region: RemoteRegion,
    ticket: int,
    slices: Iterable[Slice],
    *,
    is_permitted: Callable[[], bool] = lambda: True,
    on_landed: Callable[[int], object] = lambda _: None,
    timeout_s: float = PATIENCE_S,
) -> Outcome:
    def report(landed: int) -> None:
        on_landed(landed)

    return region.write(ticket, slices, is_permitted=is_permitted, on_landed=report, timeout_s=timeout_s)


def _piece(offset: int, nbytes: int, *, seed: int) -> Piece:
    pattern = bytes((seed * 31 + n * 7) % 251 for n in range(min(nbytes, 251)))
    return Piece(memoryview((pattern * (nbytes // 251 + 1))[:nbytes]), offset)


def _scattered(rng: random.Random, region_bytes: int) -> list[list[Piece]]:
    """Slices of pieces that do not overlap, some of them empty, in no order."""
    cuts = sorted(rng.sample(range(region_bytes), 2 * rng.choice((1, 30, 300))))
    pieces = [
        _piece(start, end - start, seed=start) for start, end in zip(cuts[::2], cuts[1::2], strict=True)
    ]
    pieces += [_piece(rng.randrange(region_bytes), 0, seed=1) for _ in range(9)]
    rng.shuffle(pieces)
    width = rng.choice((1, 7, 100))
    return [pieces[at : at + width] for at in range(0, len(pieces), width)]


def _first_difference(found: memoryview, wanted: bytearray) -> str:
    at = next(n for n, (a, b) in enumerate(zip(found, wanted, strict=True)) if a != b)
    return f"byte {at} of {len(wanted)} is {found[at]}, not {wanted[at]}"


def _assert_raises(kind: type[Exception], call: Callable[[], object]) -> None:
    try:
        call()
    except kind:
        return
    raise AssertionError(f"{kind.__name__} was not raised")


def _stop(child: subprocess.Popen[str]) -> None:
    child.send_signal(signal.SIGSTOP)
    os.waitpid(child.pid, os.WUNTRACED)  # returns when it has stopped


def _eventually(holds: Callable[[], bool]) -> None:
    deadline_s = time.monotonic() + PATIENCE_S
    while not holds():
        assert time.monotonic() < deadline_s, f"did not become true within {PATIENCE_S} s"
        os.sched_yield()


def _mapped_files() -> set[str]:
    with open("/proc/self/maps") as maps:
        return {line.split()[-1] for line in maps if "/dev/shm/" in line and "(deleted)" not in line}


def _held() -> tuple[int, int, int]:
    """How many descriptors, threads and mapped files of shared memory this process holds."""
    with suppress(FileNotFoundError):
        return len(os.listdir("/proc/self/fd")), threading.active_count(), len(_mapped_files())
    return 0, threading.active_count(), 0
