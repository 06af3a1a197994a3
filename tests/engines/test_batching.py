"""Merged caches: what a row says must not depend on the rows beside it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from embedwire.engines.transformers.batching import DecodeBatch
from embedwire.engines.transformers.language import LanguageHalf, load_language_half
from embedwire.language.interface import AssembledPrompt

pytestmark = pytest.mark.model


@pytest.fixture(scope="module")
def half(tiny_model_dir: Callable[[str], Path]) -> LanguageHalf:
    return load_language_half(tiny_model_dir("qwen2_5_vl"), dtype="float32")


class Row:
    """A sequence with greedy choices, alone or as a row of a batch."""

    def __init__(self, half: LanguageHalf, *, tokens: int, seed: int) -> None:
        ids = np.random.default_rng(seed).integers(0, 256, tokens).astype(np.int32)
        self.cache = half.new_cache()
        self.logits = [half.prefill(AssembledPrompt(fill_ids=ids), self.cache)[0]]
        self._tokens = tokens

    @property
    def last(self) -> int:
        return int(self.logits[-1].argmax())

    @property
    def position(self) -> int:
        return self._tokens + len(self.logits) - 1


def step(half: LanguageHalf, batch: DecodeBatch, rows: list[Row]) -> None:
    logits = batch.decode(half, [row.last for row in rows], positions=[row.position for row in rows])
    for row, own in zip(rows, logits, strict=True):
        row.logits.append(own)


def alone(half: LanguageHalf, *, tokens: int, seed: int, steps: int) -> list[torch.Tensor]:
    row, batch = Row(half, tokens=tokens, seed=seed), DecodeBatch()
    batch.join(row.cache)
    for _ in range(steps):
        step(half, batch, [row])
    return row.logits


def test_rows_that_join_and_leave_at_any_step(half: LanguageHalf) -> None:
    """Longer and shorter rows join, the longest, the shortest and the middle one leave."""
    sizes = {"a": 9, "b": 30, "c": 3, "d": 30, "e": 17}
    plan = ["+a", "+b", "", "+c", "-b", "", "+d", "-a", "+e", "", "-d", "", "-c", "", "-e"]
    batch, rows, done = DecodeBatch(), {}, {}
    for action in plan:
        if action.startswith("+"):
            rows[action[1]] = Row(half, tokens=sizes[action[1]], seed=sizes[action[1]])
            batch.join(rows[action[1]].cache)
        elif action:
            batch.keep([n for n, name in enumerate(rows) if name != action[1]])
            done[action[1]] = rows.pop(action[1])
        assert len(batch) == len(rows)
        if rows:
            step(half, batch, list(rows.values()))
    assert batch.width == 0
    for name, row in done.items():
        expected = alone(half, tokens=sizes[name], seed=sizes[name], steps=len(row.logits) - 1)
        torch.testing.assert_close(torch.stack(row.logits), torch.stack(expected), atol=1e-4, rtol=0)
        assert [int(own.argmax()) for own in row.logits] == [int(own.argmax()) for own in expected]


def test_what_is_left_alone_is_as_if_it_had_always_been(half: LanguageHalf) -> None:
    """The padding that a longer row forced on it is gone with that row, to the last bit."""
    short, long, batch = Row(half, tokens=5, seed=1), Row(half, tokens=40, seed=2), DecodeBatch()
    batch.join(short.cache)
    batch.join(long.cache)
    assert batch.width == 40
    batch.keep([0])
    assert batch.width == 5
    for _ in range(8):
        step(half, batch, [short])
    assert torch.equal(torch.stack(short.logits), torch.stack(alone(half, tokens=5, seed=1, steps=8)))


def test_a_mask_only_where_there_is_padding(half: LanguageHalf, monkeypatch: pytest.MonkeyPatch) -> None:
    """A mask makes torch take another kernel, so a batch of one and one of equal lengths have none."""
    masks: list[Any] = []
    decode = half.decode
    monkeypatch.setattr(
        half, "decode", lambda *args, mask, **kwargs: masks.append(mask) or decode(*args, mask=mask, **kwargs)
    )
    rows = [Row(half, tokens=tokens, seed=n) for n, tokens in enumerate((4, 5, 9))]
    batch = DecodeBatch()
    for count, row in enumerate(rows, start=1):
        batch.join(row.cache)
        step(half, batch, rows[:count])
    padded, whole = [False] * 3 + [True] * 7, [True] * 10
    assert masks[:2] == [None, None]
    assert masks[2].tolist() == [padded, padded, whole]
