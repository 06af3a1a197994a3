"""The driver's thread: tasks, calls, failures, and its end."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterator
from typing import Any

import pytest

from embedwire.endpoint.driver import Driver
from embedwire.errors import ConfigurationError, UsageError

pytestmark = pytest.mark.timeout(60)


class Idle(Driver):
    """A driver with nothing to drive, whose every turn can be made to fail."""

    def __init__(self) -> None:
        super().__init__("embedwire-idle")
        self.faults = 0
        self._thread.start()

    def _on_frames(self, socket: Any, frames: Any) -> None: ...

    def _on_time(self, now: float) -> None:
        if self.faults:
            self.faults -= 1
            raise RuntimeError("injected")

    def _next_due(self) -> float | None:
        return 0.0 if self.faults else None

    def _close(self) -> None:
        self.call(self._stop)
        self._thread.join(30)


@pytest.fixture
def driver() -> Iterator[Idle]:
    made = Idle()
    yield made
    made.close()
    assert not made._thread.is_alive()


def test_tasks_run_in_order_on_the_drivers_thread(driver: Idle) -> None:
    ran: list[tuple[int, str]] = []
    for number in range(100):
        driver.post(lambda number=number: ran.append((number, threading.current_thread().name)))
    assert driver.call(lambda: len(ran)) == 100
    assert ran == [(number, "embedwire-idle") for number in range(100)]


def test_a_call_on_the_drivers_own_thread_runs_at_once(driver: Idle) -> None:
    assert driver.call(lambda: driver.call(lambda: 7)) == 7


def test_a_call_hands_back_what_was_raised(driver: Idle) -> None:
    """Also a TimeoutError, which is how a call waits."""
    for kind in (ValueError, TimeoutError, KeyboardInterrupt):

        def task(kind: type[BaseException] = kind) -> None:
            raise kind("out of the task")

        with pytest.raises(kind, match="out of the task"):
            driver.call(task)


@pytest.mark.failure_mode("exception-ends-thread")
def test_no_failure_ends_the_thread(driver: Idle, caplog: Any) -> None:
    """After an exception in a task or in the loop itself, the thread goes on and logs it."""
    driver.post(lambda: 1 // 0)
    driver.faults = 3
    assert driver.call(lambda: "still here") == "still here"
    while driver.faults:
        driver.call(lambda: None)
    driver.call(lambda: None)
    assert sum("a step failed" in record.getMessage() for record in caplog.records) == 4


def test_after_the_end(driver: Idle) -> None:
    """A call is refused, a post harmless, and neither keeps what it was handed."""
    driver.close()
    with pytest.raises(UsageError, match="embedwire-idle is closed"):
        driver.call(lambda: None)

    class Thing:
        def __call__(self) -> None: ...

    thing = Thing()
    gone = weakref.ref(thing)
    driver.post(thing)
    del thing
    assert gone() is None


def test_it_is_not_closed_by_itself(driver: Idle) -> None:
    """A callback that closes its own endpoint would wait for itself for ever."""
    with pytest.raises(UsageError, match="out of a callback"):
        driver.call(driver.close)
    assert driver.call(lambda: "still here") == "still here"


def test_a_post_may_interrupt_a_post(driver: Idle) -> None:
    """The collector may run a finalizer, which posts, at any point of a post on the same thread."""

    def post_twice() -> bool:
        with driver._gate:
            driver.post(lambda: None)
        return True

    thread = threading.Thread(target=post_twice, daemon=True)
    thread.start()
    thread.join(30)
    assert not thread.is_alive()


def test_an_endpoint_needs_a_wire(stage: Any) -> None:
    with pytest.raises(ConfigurationError, match="at least one"):
        stage.sender(transports=())
    with pytest.raises(ConfigurationError, match="carrier pigeon"):
        stage.receiver(transports=("carrier pigeon",))


def test_what_was_posted_before_a_message_is_known_before_it() -> None:
    """A peer may answer what it saw by itself: then the task that tells us of the same has to be first, also when message and
    task come in one turn."""
    import zmq

    order: list[str] = []

    class Listener(Idle):
        def __init__(self) -> None:
            Driver.__init__(self, "embedwire-listener")
            self.faults = 0
            self.ours, self.theirs = (self._context.socket(zmq.PAIR) for _ in range(2))
            self.ours.bind("inproc://order")
            self.theirs.connect("inproc://order")
            self._poller.register(self.ours, zmq.POLLIN)
            self._thread.start()

        def _read_all(self, socket: Any) -> list[list[bytes]]:  # type: ignore[override]
            frames = Driver._read_all(socket)
            self.post(lambda: order.append("task"))
            return frames

        def _on_frames(self, socket: Any, frames: Any) -> None:
            order.extend(frame.decode() for (frame,) in frames)

    listener = Listener()
    listener.theirs.send(b"message")
    while "message" not in order:
        listener.call(lambda: None)
    listener.close()
    assert order == ["task", "message"]
