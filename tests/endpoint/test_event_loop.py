"""The event loop's thread: tasks, calls, failures, and its end."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import zmq

from embedwire.endpoint.event_loop import EventLoop
from embedwire.errors import ConfigurationError, UsageError

pytestmark = pytest.mark.timeout(60)


class Idle(EventLoop):
    """A loop with nothing to drive, whose every turn can be made to fail."""

    def __init__(self) -> None:
        self.faults = 0
        super().__init__(
            "embedwire-idle",
            on_frames=lambda socket, frames: None,
            on_time=self._fail,
            next_due=lambda: 0.0 if self.faults else None,
        )
        self.start()

    def _fail(self, now: float) -> None:
        if self.faults:
            self.faults -= 1
            raise RuntimeError("injected")

    def end(self) -> None:
        self.close(self.stop)


@pytest.fixture
def driver() -> Iterator[Idle]:
    made = Idle()
    yield made
    made.end()
    assert not made.is_alive


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

    def fail() -> None:
        raise ZeroDivisionError

    driver.post(fail)
    driver.faults = 3
    assert driver.call(lambda: "still here") == "still here"
    while driver.faults:
        driver.call(lambda: None)
    driver.call(lambda: None)
    assert sum("a step failed" in record.getMessage() for record in caplog.records) == 4


def test_after_the_end(driver: Idle) -> None:
    """A call is refused, a post harmless, and neither keeps what it was handed."""
    driver.end()
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
        driver.call(driver.end)
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


def test_what_was_posted_before_a_message_is_known_before_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """A peer may answer what it saw by itself: then the task that tells us of the same has to be first, also when message and
    task come in one turn."""
    order: list[str] = []
    listener = EventLoop(
        "embedwire-listener",
        on_frames=lambda socket, frames: order.extend(frame.decode() for (frame,) in frames),
        on_time=lambda now: None,
        next_due=lambda: None,
    )
    real = listener.read_all

    def read_all(socket: Any) -> list[list[bytes]]:
        frames = real(socket)
        listener.post(lambda: order.append("task"))
        return frames

    monkeypatch.setattr(listener, "read_all", read_all)
    ours, theirs = (listener.socket(zmq.PAIR) for _ in range(2))
    ours.bind("inproc://order")
    theirs.connect("inproc://order")
    listener.register(ours)
    listener.start()
    theirs.send(b"message")
    while "message" not in order:
        listener.call(lambda: None)
    listener.close(listener.stop)
    assert order == ["task", "message"]
