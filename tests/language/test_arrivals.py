"""Prompts on a rank that decides nothing: there when asked for, gone when read."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest

from embedwire.endpoint import ReceiverEndpoint, Reception, SenderEndpoint
from embedwire.errors import TransferError, UsageError
from embedwire.language.arrivals import Arrivals
from embedwire.memory.layout import multimodal

LAYOUT = multimodal(8)
TOKENS = 20
WAIT_S = 20


class Rig:
    """A rank's table over real endpoints, which here open their rooms themselves."""

    def __init__(self) -> None:
        self.sender = SenderEndpoint(LAYOUT)
        self.receiver = ReceiverEndpoint(LAYOUT, num_blocks=2, block_size=8)
        self.arrivals = Arrivals(timeout_s=WAIT_S)

    def receive(self, room: int) -> Reception:
        self.offer = self.sender.offer(room, total_tokens=TOKENS)
        reception = self.receiver.open(room, self.sender.address)
        self.arrivals.enter(reception)
        return reception

    def fill(self, room: int) -> None:
        self.offer.fill({f.name: np.full((TOKENS, *f.shape), room).astype(f.numpy_dtype) for f in LAYOUT})


@pytest.fixture
def rig() -> Iterator[Rig]:
    made = Rig()
    yield made
    made.receiver.close()
    made.sender.close()


def test_a_prompt_is_there_until_it_has_been_read(rig: Rig) -> None:
    """Its memory is free again then, and it is not known any more."""
    rig.receive(7)
    rig.fill(7)
    prompt = rig.arrivals.prompt_of((7, 0))
    assert prompt.fill_ids.tolist() == [7] * TOKENS
    assert rig.receiver.stats().memory_reserved_bytes > 0
    rig.arrivals.forget((7, 0))
    assert rig.receiver.stats().memory_reserved_bytes == len(rig.arrivals) == 0
    with pytest.raises(UsageError, match="room 7, attempt 0 is not known here"):
        rig.arrivals.prompt_of((7, 0))


def test_a_prompt_that_nobody_reads_is_let_go_of_when_it_comes(rig: Rig) -> None:
    reception = rig.receive(8)
    rig.arrivals.forget((8, 0))
    rig.fill(8)
    reception.result(WAIT_S)
    assert rig.receiver.stats().memory_reserved_bytes == len(rig.arrivals) == 0


def test_a_room_that_fails_is_forgotten(rig: Rig) -> None:
    reception = rig.receive(9)
    reception.cancel()
    with pytest.raises(TransferError):
        reception.result(WAIT_S)
    assert rig.receiver.stats().memory_reserved_bytes == len(rig.arrivals) == 0
