"""The sending half of a one-sided wire: regions, each with a session that is begun anew when it broke.

A write whose engine failed ends its session: if the receiver confirms that, the write is LOST, and otherwise UNKNOWN until the receiver
does, which ``close`` tells whenever it is asked. Closing also ends a running write.
"""

from __future__ import annotations

import threading
from abc import abstractmethod
from collections.abc import Callable, Iterable

from embedwire.errors import TransportError
from embedwire.transports.contract import Outbound, Outcome, RemoteRegion, Slice
from embedwire.transports.onesided import greeting
from embedwire.transports.onesided.batches import Registered, Staging
from embedwire.transports.onesided.engine import EngineError, SendingEngine
from embedwire.transports.onesided.session import Presence, Session
from embedwire.transports.onesided.writing import Broken, Write
from embedwire.transports.pieces import check_sender_token, check_ticket


class OneSidedRegion(RemoteRegion):
    """A region, its current session, and the ends of former ones that the receiver has not confirmed."""

    def __init__(
        self,
        target: greeting.Descriptor,
        *,
        sender_token: int,
        make_engine: Callable[[], SendingEngine],
        registered: Registered,
        timeout_s: float,
        on_close: Callable[[OneSidedRegion], None],
    ) -> None:
        self._target = target
        self._sender_token = sender_token
        self._make_engine = make_engine
        self._registered = registered
        self._readable: list[tuple[int, int]] = []  # what the session's engine has registered
        self._on_close = on_close
        self._staging = Staging()
        self._session: Session | None = None
        self._unconfirmed: list[Presence] = []
        self._busy = threading.Lock()  # held by a write, and by the end of close()
        self._is_closing = threading.Event()
        self._begin_session(timeout_s)

    def write(
        self,
        ticket: int,
        slices: Iterable[Slice],
        *,
        is_permitted: Callable[[], bool],
        on_landed: Callable[[int], None],
        timeout_s: float,
    ) -> Outcome:
        """See the contract. LOST also when no session could be had, and when the receiver confirmed the end of a broken one."""
        check_ticket(ticket)
        with self._busy:
            if self._is_closing.is_set() or not self._has_session(timeout_s):
                return Outcome.LOST
            assert self._session is not None
            write = Write(
                self._session,
                self._staging,
                self._registered,
                region_bytes=self._target.nbytes,
                on_landed=on_landed,
                is_closing=self._is_closing,
                timeout_s=timeout_s,
            )
            try:
                return write.run(slices, is_permitted=is_permitted)
            except Broken:
                has_ended = self._end_session()
                if write.error:
                    raise write.error from None
                return Outcome.LOST if has_ended else Outcome.UNKNOWN

    def close(self) -> bool:
        self._is_closing.set()
        with self._busy:
            if self._session is not None:
                self._end_session()
            self._confirm()
            if not self._unconfirmed:
                self._on_close(self)
            return not self._unconfirmed

    def forget(self) -> None:
        """Wait for no confirmation any more."""
        while self._unconfirmed:
            self._unconfirmed.pop().close()

    def _has_session(self, timeout_s: float) -> bool:
        self._confirm()
        if self._session is not None and self._session.presence.is_over():
            self._end_session()
        try:
            if self._session is None:
                self._begin_session(timeout_s)
            self._register_more()
        except (TransportError, EngineError):
            return False
        return True

    def _begin_session(self, timeout_s: float) -> None:
        readable = self._registered.ranges()

        def make_engine() -> SendingEngine:
            engine = self._make_engine()
            try:
                engine.register(self._staging.address, self._staging.nbytes)
                for start, end in readable:
                    engine.register(start, end - start)
            except BaseException:
                engine.close()
                raise
            return engine

        self._session = Session(
            self._target,
            sender_token=self._sender_token,
            make_engine=make_engine,
            timeout_s=timeout_s,
            is_closing=self._is_closing.is_set,
        )
        self._readable = readable

    def _register_more(self) -> None:
        """Memory that was registered after the session had begun."""
        assert self._session is not None
        for start, end in self._registered.ranges():
            if (start, end) not in self._readable:
                self._session.engine.register(start, end - start)
                self._readable.append((start, end))

    def _end_session(self) -> bool:
        assert self._session is not None
        session, self._session = self._session, None
        has_ended = session.end()
        self._staging.reset()
        if has_ended:
            session.presence.close()
        else:
            self._unconfirmed.append(session.presence)
        return has_ended

    def _confirm(self) -> None:
        for presence in [one for one in self._unconfirmed if one.has_ended()]:
            presence.close()
            self._unconfirmed.remove(presence)


class OneSidedOutbound(Outbound):
    """Connects to the session listeners of receivers. An adapter says how an engine is made."""

    def __init__(self, *, host: str) -> None:
        self._host = host
        self._registered = Registered()
        self._regions: set[OneSidedRegion] = set()

    @abstractmethod
    def _make_engine(self, *, host: str) -> SendingEngine:
        """A new engine. Raises EngineError."""

    def register(self, memory: memoryview) -> None:
        self._registered.add(memory)

    def connect(self, descriptor: bytes, *, sender_token: int, timeout_s: float) -> OneSidedRegion:
        check_sender_token(sender_token)
        region = OneSidedRegion(
            greeting.decode_descriptor(descriptor, wire=self.name),
            sender_token=sender_token,
            make_engine=lambda: self._make_engine(host=self._host),
            registered=self._registered,
            timeout_s=timeout_s,
            on_close=self._regions.discard,
        )
        self._regions.add(region)
        return region

    def close(self) -> None:
        for region in tuple(self._regions):
            region.close()
            region.forget()
        self._regions.clear()
