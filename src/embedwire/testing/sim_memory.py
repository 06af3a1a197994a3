"""Memory of a simulated world: one cell a token that says whose it is, so that a wrong byte is seen. No protocol.

A cell is one int64 of (room, attempt, token); no two tokens of a world have the same one, and none is 0. One thread.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
import xxhash

from embedwire.limits import AUX_POSITION_DELTA, AUX_TOTAL_TOKENS, AUX_WORDS
from embedwire.protocol.actions import Round
from embedwire.protocol.messages import RoomKey

Cells: TypeAlias = npt.NDArray[np.int64]
Aux: TypeAlias = tuple[int, ...]

FIELDS = ("cell int64[]",)
TOKEN_BYTES = 8
ROOMS_MAX = 2**24
ATTEMPTS_MAX = 2**8


def cells(key: RoomKey, start: int, stop: int) -> Cells:
    """What the tokens ``start`` .. ``stop`` of a room hold: int64 (stop - start,)."""
    room, attempt = key.room, key.attempt
    assert 0 < room < ROOMS_MAX
    assert attempt < ATTEMPTS_MAX
    return np.arange(start, stop, dtype=np.int64) + ((room * ATTEMPTS_MAX + attempt) << 31)


def room_of(cell: int) -> RoomKey:
    """Whose cell this is."""
    return RoomKey(*divmod(int(cell) >> 31, ATTEMPTS_MAX))


def digests(held: Cells) -> tuple[int, ...]:
    """One XXH3-64 a field."""
    return (xxhash.xxh3_64_intdigest(held.tobytes()),)


def aux_of(key: RoomKey, total_tokens: int) -> Aux:
    """A room's aux row; the position delta is negative and differs from room to room."""
    aux = [0] * AUX_WORDS
    aux[AUX_TOTAL_TOKENS] = total_tokens
    aux[AUX_POSITION_DELTA] = -key[0]
    return tuple(aux)


class Memory:
    """A receiver's region: cells, an aux row a block, and the tickets under which writes may reach them."""

    def __init__(self, num_blocks: int, block_size: int) -> None:
        self.block_size = block_size
        self.permits: set[int] = set()
        self.cells: Cells = np.zeros(num_blocks * block_size, np.int64)
        self.aux: list[Aux] = [(0,) * AUX_WORDS] * num_blocks

    def _slots(self, blocks: Sequence[int], start: int, stop: int) -> npt.NDArray[np.int64]:
        tokens = np.arange(start, stop, dtype=np.int64)
        firsts = np.asarray(blocks, np.int64) * self.block_size
        slots: npt.NDArray[np.int64] = firsts[tokens // self.block_size] + tokens % self.block_size
        return slots

    def write(self, granted: Round, start: int, held: Cells) -> None:
        """Put cells into a round's blocks, from its token ``start`` on."""
        self.cells[self._slots(granted.block_indices, start, start + len(held))] = held

    def read(self, granted: Round, start: int, stop: int) -> Cells:
        """A copy of the round's tokens ``start`` .. ``stop``."""
        held: Cells = self.cells[self._slots(granted.block_indices, start, stop)]
        return held
