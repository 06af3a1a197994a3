"""Blocks: rounding, reuse, the table of states, conservation."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from embedwire.errors import ConfigurationError, UsageError
from embedwire.memory.allocator import BlockAllocator


def counts(allocator: BlockAllocator) -> tuple[int, int, int, int]:
    allocator.check()
    return (
        allocator.blocks_free,
        allocator.blocks_granted,
        allocator.blocks_quarantined,
        allocator.blocks_total,
    )


@pytest.mark.failure_mode("grant-not-whole-blocks")
@pytest.mark.invariant("alignment")
@pytest.mark.parametrize(
    ("tokens", "blocks", "announced"),
    [
        (8000, 63, 8064),
        (976, 8, 1024),
        (1000, 8, 1024),
        (1024, 8, 1024),
        (1025, 9, 1152),
        (1, 1, 128),
        (0, 0, 0),
    ],
)
def test_a_grant_is_of_whole_blocks(tokens: int, blocks: int, announced: int) -> None:
    """A default of 8000 tokens takes 63 blocks and announces 8064; 976 and 1000 announce 1024."""
    allocator = BlockAllocator(128, 128)
    assert allocator.blocks_for(tokens) == blocks
    assert blocks * 128 == announced
    if tokens:
        granted = allocator.alloc_blocks(blocks)
        assert granted is not None
        assert len(granted) * 128 == announced


def test_alloc_is_all_or_nothing() -> None:
    allocator = BlockAllocator(4, 128)
    assert allocator.alloc_blocks(5) is None
    assert counts(allocator) == (4, 0, 0, 4)
    assert allocator.alloc_blocks(4) == (0, 1, 2, 3)
    assert allocator.alloc_blocks(1) is None


def test_blocks_come_back_in_the_order_in_which_they_were_freed() -> None:
    """So that a test can have any blocks it wants, scattered ones too."""
    allocator = BlockAllocator(6, 128)
    assert allocator.alloc_blocks(6) == (0, 1, 2, 3, 4, 5)
    allocator.free((5, 2))
    allocator.free((4,))
    assert allocator.alloc_blocks(3) == (5, 2, 4)


@pytest.mark.failure_mode("reused-indices-taken-for-same-round")
@pytest.mark.invariant("token-progress")
def test_the_same_blocks_can_be_handed_out_again() -> None:
    """[0–63] freed, then [0–63] allocated again, so indices identify no round."""
    allocator = BlockAllocator(64, 128)
    first = allocator.alloc_blocks(64)
    assert first is not None
    allocator.free(first)
    assert allocator.alloc_blocks(64) == first


@pytest.mark.failure_mode("block-freed-twice")
@pytest.mark.invariant("conservation")
@pytest.mark.parametrize("wrong", [(1, 2), (0, 1), (0, 0), (0, 4), (0, -1), (0, 3)])
def test_a_double_free_changes_nothing(wrong: tuple[int, ...]) -> None:
    """A block that is free, in quarantine, named twice or out of range, beside a valid one."""
    allocator = BlockAllocator(4, 128)
    assert allocator.alloc_blocks(4) == (0, 1, 2, 3)
    allocator.free((1,))
    allocator.quarantine((3,), peer=7)
    for call in (allocator.free, lambda indices: allocator.quarantine(indices, peer=7)):
        with pytest.raises(UsageError, match="block"):
            call(wrong)
        assert counts(allocator) == (1, 2, 1, 4)
    allocator.free((0,))
    assert allocator.alloc_blocks(2) == (1, 0)


@pytest.mark.failure_mode("block-freed-twice")
@pytest.mark.invariant("conservation")
def test_retraction_then_a_second_free() -> None:
    """Freed on retraction and again at the end, while another room has the block."""
    allocator = BlockAllocator(2, 128)
    mine = allocator.alloc_blocks(1)
    assert mine is not None
    allocator.free(mine)
    with pytest.raises(UsageError, match="block 0 has to be granted and is free"):
        allocator.free(mine)
    assert counts(allocator) == (2, 0, 0, 2)


@pytest.mark.failure_mode("reuse-during-write")
@pytest.mark.invariant("no-early-reuse")
def test_quarantine_keeps_blocks_from_reuse_until_it_is_released() -> None:
    allocator = BlockAllocator(4, 128)
    assert allocator.alloc_blocks(4) == (0, 1, 2, 3)
    allocator.quarantine((2, 0), peer=5)
    allocator.quarantine((1,), peer=0)
    assert counts(allocator) == (0, 1, 3, 4)
    assert allocator.alloc_blocks(1) is None
    with pytest.raises(UsageError, match="block 2 has to be granted and is quarantined for peer 5"):
        allocator.free((2,))
    with pytest.raises(UsageError, match="block 3 has to be quarantined and is granted"):
        allocator.release_quarantine((0, 3))
    assert counts(allocator) == (0, 1, 3, 4)
    allocator.release_quarantine((0, 2))
    assert counts(allocator) == (2, 1, 1, 4)
    with pytest.raises(UsageError, match="block 0 has to be quarantined and is free"):
        allocator.release_quarantine((0,))


def test_wrong_arguments() -> None:
    allocator = BlockAllocator(4, 128)
    for call in (
        lambda: allocator.blocks_for(-1),
        lambda: allocator.alloc_blocks(0),
        lambda: allocator.alloc_blocks(-1),
        lambda: allocator.quarantine((), peer=-1),
    ):
        with pytest.raises(UsageError):
            call()
    assert counts(allocator) == (4, 0, 0, 4)
    allocator.free(())
    assert counts(allocator) == (4, 0, 0, 4)


@pytest.mark.failure_mode("request-never-fits")
@pytest.mark.parametrize(("num_blocks", "block_size"), [(0, 128), (-1, 128), (4, 0)])
def test_zero_blocks_are_refused_at_once(num_blocks: int, block_size: int) -> None:
    """A pool that could never hold anything."""
    with pytest.raises(ConfigurationError):
        BlockAllocator(num_blocks, block_size)


class AllocatorMachine(RuleBasedStateMachine):
    """Any order of right and wrong calls, against a dictionary of block to state."""

    @initialize(num_blocks=st.integers(1, 12), block_size=st.integers(1, 5))
    def create(self, num_blocks: int, block_size: int) -> None:
        self.allocator = BlockAllocator(num_blocks, block_size)
        self.block_size = block_size
        self.model: dict[int, object] = dict.fromkeys(range(num_blocks), "free")

    @rule(tokens=st.integers(1, 40))
    def alloc(self, tokens: int) -> None:
        needed = -(-tokens // self.block_size)
        assert self.allocator.blocks_for(tokens) == needed
        granted = self.allocator.alloc_blocks(needed)
        assert (granted is not None) == (needed <= list(self.model.values()).count("free"))
        if granted is not None:
            assert len(set(granted)) == len(granted) == needed
            assert {self.model[i] for i in granted} == {"free"}
            self.model.update(dict.fromkeys(granted, "granted"))

    @rule(data=st.data(), step=st.sampled_from(["free", "quarantine", "release"]), peer=st.integers(0, 2))
    def step_legally(self, data: st.DataObject, step: str, peer: int) -> None:
        legal = [i for i, s in self.model.items() if (s == "granted") == (step != "release") and s != "free"]
        indices = data.draw(st.lists(st.sampled_from(legal), unique=True)) if legal else []
        self.call(step, indices, peer=peer)
        self.model.update(dict.fromkeys(indices, peer if step == "quarantine" else "free"))

    @precondition(lambda self: self.model)
    @rule(
        indices=st.lists(st.integers(-1, 12), min_size=1, max_size=4),
        step=st.sampled_from(["free", "quarantine", "release"]),
    )
    def step_anyhow(self, indices: list[int], step: str) -> None:
        wanted = (lambda s: isinstance(s, int)) if step == "release" else (lambda s: s == "granted")
        legal = len(set(indices)) == len(indices) and all(wanted(self.model.get(i)) for i in indices)
        if legal:
            self.call(step, indices, peer=1)
            self.model.update(dict.fromkeys(indices, 1 if step == "quarantine" else "free"))
        else:
            with pytest.raises(UsageError):
                self.call(step, indices, peer=1)

    def call(self, step: str, indices: list[int], *, peer: int) -> None:
        if step == "quarantine":
            self.allocator.quarantine(indices, peer=peer)
        elif step == "free":
            self.allocator.free(indices)
        else:
            self.allocator.release_quarantine(indices)

    @invariant()
    def conservation(self) -> None:
        if not hasattr(self, "model"):
            return
        states = list(self.model.values())
        free, granted = states.count("free"), states.count("granted")
        assert counts(self.allocator) == (free, granted, len(states) - free - granted, len(states))


TestAllocatorMachine = AllocatorMachine.TestCase
TestAllocatorMachine.pytestmark = [pytest.mark.invariant("conservation")]  # type: ignore[attr-defined]
TestAllocatorMachine.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
