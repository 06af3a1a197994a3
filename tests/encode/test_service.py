"""The encode service over a real sender, with an engine that counts what it is asked for."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pytest

from embedwire.encode import ChatPrompt, EncodeService, PreparedPrompt
from embedwire.endpoint import ReceiverEndpoint, SenderEndpoint
from embedwire.errors import InvalidRequestError, NeverFitsError, OverloadedError, TransferError, UsageError
from embedwire.limits import AUX_POSITION_DELTA
from embedwire.memory.layout import Field, Layout

LAYOUT = Layout("TEST", (Field("x", "int32", (4,)),))
DEADLINE_S = 30


class CountingEncoder:
    """A prompt of n letters is a room of n tokens, each filled with n. ``gate`` holds the tower back."""

    model_name = "counting"
    layout = LAYOUT
    max_tokens = 10_000

    def __init__(self) -> None:
        self.batches: list[list[int]] = []
        self.keys: list[tuple[int, ...] | None] = []
        self.gate = threading.Event()
        self.gate.set()
        self.entered = threading.Semaphore(0)
        self.encoded: list[int] = []
        self.answers = threading.Semaphore(0)

    def prepare(self, prompt: ChatPrompt) -> PreparedPrompt:
        text = prompt.messages[0]["content"]
        if not text:
            raise InvalidRequestError("empty", code="invalid_messages")
        return PreparedPrompt(len(text), -7, b"hash", text)

    def encode(self, batch: Sequence[PreparedPrompt]) -> Iterable[Mapping[str, np.ndarray]]:
        self.batches.append([p.total_tokens for p in batch])
        self.keys += [p.key for p in batch]
        self.entered.release()
        assert self.gate.wait(DEADLINE_S)
        if any("!" in p.inputs for p in batch):
            raise ValueError("a word too loud")
        return map(self.encode_one, batch)

    def encode_one(self, prompt: PreparedPrompt) -> Mapping[str, np.ndarray]:
        self.encoded.append(prompt.total_tokens)
        if "?" in prompt.inputs:
            assert self.answers.acquire(timeout=DEADLINE_S)
        if "&" in prompt.inputs:
            raise ValueError("a word too much")
        return {"x": np.full((prompt.total_tokens, 4), prompt.total_tokens, np.int32)}


def prompt(tokens: int, letter: str = "a") -> ChatPrompt:
    return ChatPrompt([{"role": "user", "content": letter * tokens}])


@pytest.fixture
def engine() -> CountingEncoder:
    return CountingEncoder()


@pytest.fixture
def receiver() -> Iterator[ReceiverEndpoint]:
    with ReceiverEndpoint(LAYOUT, num_blocks=4, block_size=16, transports=("shm",)) as receiver:
        yield receiver


def sender_of(service: EncodeService) -> SenderEndpoint:
    assert isinstance(service.sender, SenderEndpoint)
    return service.sender


@pytest.fixture
def service(engine: CountingEncoder) -> Iterator[Callable[..., EncodeService]]:
    made: list[EncodeService] = []

    def make(*, memory_tokens: int = 1000, **more: Any) -> EncodeService:
        sender = SenderEndpoint(LAYOUT, memory_bytes=memory_tokens * LAYOUT.token_bytes)
        made.append(EncodeService(engine, sender, **more))
        return made[-1]

    yield make
    engine.gate.set()
    for one in made:
        one.close()
        sender_of(one).close()


def test_a_prompt_becomes_a_room_with_its_position_delta(
    service: Callable[..., EncodeService], receiver: ReceiverEndpoint
) -> None:
    taken = service().take_up(1, prompt(100))
    assert (taken.total_tokens, taken.content_hash) == (100, b"hash")
    received = receiver.open(1, taken.control_addresses).result(DEADLINE_S)
    assert (received.arrays["x"] == 100).all()
    assert received.aux[AUX_POSITION_DELTA] == -7


def test_a_bad_prompt_reserves_nothing(service: Callable[..., EncodeService]) -> None:
    one = service()
    with pytest.raises(InvalidRequestError):
        one.take_up(1, prompt(0))
    assert sender_of(one).stats().memory_reserved_bytes == 0


@pytest.mark.failure_mode("request-never-fits")
def test_a_prompt_larger_than_all_memory_is_refused_at_once(service: Callable[..., EncodeService]) -> None:
    """A prompt that needs more than all source memory is refused without waiting."""
    with pytest.raises(NeverFitsError):
        service(memory_tokens=99).take_up(1, prompt(100))


def test_a_room_is_taken_up_once(service: Callable[..., EncodeService]) -> None:
    one = service()
    one.take_up(1, prompt(10))
    with pytest.raises(UsageError):
        one.take_up(1, prompt(10))


def hold_tower(one: EncodeService, engine: CountingEncoder) -> None:
    """The tower works on room 1, of ten tokens, until its gate opens."""
    engine.gate.clear()
    one.take_up(1, prompt(10))
    assert engine.entered.acquire(timeout=DEADLINE_S)


def test_prompts_that_wait_for_the_tower_run_in_one_batch(
    service: Callable[..., EncodeService], engine: CountingEncoder
) -> None:
    """As many as fit: 60 + 60 fit into 128 tokens, the third does not."""
    one = service(batch_tokens=128)
    hold_tower(one, engine)
    for room in (2, 3, 4):
        one.take_up(room, prompt(60))
    engine.gate.set()
    for _ in range(2):
        assert engine.entered.acquire(timeout=DEADLINE_S)
    assert engine.batches == [[10], [60, 60], [60]]
    assert [len(key or ()) for key in engine.keys] == [2] * 4, (
        "room and attempt, by which other ranks know the prompt"
    )


@pytest.mark.parametrize("last", ["?", "?&"])
def test_the_first_of_a_batch_does_not_wait_for_the_last(
    service: Callable[..., EncodeService], engine: CountingEncoder, receiver: ReceiverEndpoint, last: str
) -> None:
    """Its room is whole while the other is still being encoded; and it is not encoded again for a fault of that one."""
    one = service()
    hold_tower(one, engine)
    one.take_up(2, prompt(20))
    address = one.take_up(3, prompt(30 // len(last), last)).control_addresses
    engine.gate.set()
    assert (receiver.open(2, address).result(DEADLINE_S).arrays["x"] == 20).all()
    reception = receiver.open(3, address)
    assert not reception.done()
    engine.answers.release(2)
    if last == "?":
        assert (reception.result(DEADLINE_S).arrays["x"] == 30).all()
    else:
        with pytest.raises(TransferError, match="a word too much"):
            reception.result(DEADLINE_S)
    assert engine.batches[:2] == [[10], [20, 30]]
    assert engine.encoded.count(20) == 1


@pytest.mark.failure_mode("exception-ends-thread")
def test_a_fault_of_one_prompt_is_not_its_neighbours(
    service: Callable[..., EncodeService], engine: CountingEncoder, receiver: ReceiverEndpoint
) -> None:
    """A failed batch is repeated prompt by prompt, and only the faulty prompt fails."""
    one = service()
    hold_tower(one, engine)
    one.take_up(2, prompt(20))
    address = one.take_up(3, prompt(30, "!")).control_addresses
    engine.gate.set()
    assert (receiver.open(2, address).result(DEADLINE_S).arrays["x"] == 20).all()
    with pytest.raises(TransferError, match="a word too loud") as failed:
        receiver.open(3, address).result(DEADLINE_S)
    assert failed.value.cause == "encoder_failed"
    assert one.stats().failed_total == 1


def test_the_line_for_memory_is_first_come_first_served_and_bounded(
    service: Callable[..., EncodeService], engine: CountingEncoder, receiver: ReceiverEndpoint
) -> None:
    """Three rooms of 60 tokens in memory of 100: each next one starts when the one before it is done."""
    one = service(memory_tokens=100, max_waiting=2)
    address = one.take_up(1, prompt(60)).control_addresses
    threads = [threading.Thread(target=one.take_up, args=(room, prompt(60))) for room in (2, 3)]
    for waiting, thread in enumerate(threads, 1):
        thread.start()
        wait_until(lambda waiting=waiting: one.stats().waiting_for_memory == waiting)
    with pytest.raises(OverloadedError):
        one.take_up(4, prompt(60))
    for room in (1, 2, 3):
        assert (receiver.open(room, address).result(DEADLINE_S).arrays["x"] == 60).all()
    for thread in threads:
        thread.join(DEADLINE_S)
    wait_until(lambda: sender_of(one).stats().memory_reserved_bytes == 0)


def test_memory_that_does_not_come_free_in_time_is_an_overload(service: Callable[..., EncodeService]) -> None:
    one = service(memory_tokens=100, memory_wait_s=0.05)
    one.take_up(1, prompt(60))
    with pytest.raises(OverloadedError, match=r"within 0\.05 s"):
        one.take_up(2, prompt(60))
    assert one.stats().waiting_for_memory == 0


@pytest.mark.failure_mode("abort-not-propagated")
def test_an_abort_gives_the_memory_back_and_skips_the_tower(
    service: Callable[..., EncodeService], engine: CountingEncoder
) -> None:
    """The client disconnects while its prompt waits for the vision tower."""
    one = service()
    hold_tower(one, engine)
    one.take_up(2, prompt(20))
    one.abort(2)
    one.abort(99)
    wait_until(lambda: sender_of(one).stats().ended == {"aborted": 1})
    engine.gate.set()
    one.take_up(3, prompt(30))
    assert engine.entered.acquire(timeout=DEADLINE_S)
    assert engine.batches == [[10], [30]]


def wait_until(holds: Callable[[], bool]) -> None:
    """Ask again and again, bounded by the test's own time-out."""
    pause = threading.Event()
    while not holds():
        pause.wait(0.001)
