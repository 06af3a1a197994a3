"""Who sends what to whom: nobody is left out, and no token is."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from embedwire.errors import ConfigurationError
from embedwire.limits import LANES_MAX
from embedwire.protocol.topology import (
    ALONE,
    ONLY_LANE,
    RankGroup,
    delivery_table,
    lanes,
    lanes_of_reader,
    lanes_of_sender,
)

SIZES = st.integers(1, 64)
PAIRS = [(1, 1), (1, 4), (2, 8), (4, 4), (4, 2), (8, 2), (4, 6), (6, 4), (3, 2)]


@pytest.mark.failure_mode("rank-counts-differ", "part-taken-for-whole-room")
@given(senders=SIZES, readers=SIZES, total=st.integers(1, 10_000))
def test_every_token_reaches_every_reader(senders: int, readers: int, total: int) -> None:
    """The parts of a reader are contiguous, ordered and not empty; together they are the room, once where there are enough tokens."""
    for reader in range(readers):
        mine = lanes_of_reader(reader, senders=senders, readers=readers)
        shares = [lane.share(total) for lane in mine]
        assert [(lane.part, lane.parts) for lane in mine] == [(i, len(mine)) for i in range(len(mine))]
        assert all(shares)
        assert {token for share in shares for token in share} == set(range(total))
        if total >= len(mine):
            assert sum(map(len, shares)) == total
        assert [lane.sender for lane in mine] == sorted({lane.sender for lane in mine})


@pytest.mark.failure_mode("rank-counts-differ")
@given(senders=SIZES, readers=SIZES)
def test_nobody_is_spare(senders: int, readers: int) -> None:
    """Every encoder rank has a reader, whichever number is larger; both sides compute the same parts with unique numbers."""
    everything = list(lanes(senders=senders, readers=readers))
    by_sender = [lanes_of_sender(sender, senders=senders, readers=readers) for sender in range(senders)]
    assert all(by_sender)
    assert {lane for some in by_sender for lane in some} == set(everything)
    assert len({lane.number for lane in everything}) == len(everything)
    assert all(0 <= lane.number < LANES_MAX for lane in everything)
    assert len(everything) <= senders + readers - 1


@pytest.mark.failure_mode("rank-counts-differ")
@pytest.mark.parametrize(("senders", "readers"), PAIRS)
def test_the_load_is_even(senders: int, readers: int) -> None:
    """No encoder rank has more than one reader above the minimum."""
    per_sender = [len(lanes_of_sender(s, senders=senders, readers=readers)) for s in range(senders)]
    assert max(per_sender) <= -(-readers // senders) + 1
    rows = delivery_table([(senders, readers)])
    assert rows[0][0] == f"{senders} → {readers}"
    assert rows[0][2] == str(max(per_sender))


def test_one_to_one_is_the_only_lane() -> None:
    """Where each side is a single rank, nothing is different from a world without ranks."""
    assert list(lanes(senders=1, readers=1)) == [ONLY_LANE]
    assert ALONE.lanes_to(0, senders=1) == (ONLY_LANE,)
    assert ONLY_LANE.share(77) == range(77)


@pytest.mark.parametrize(("senders", "readers"), [(0, 1), (1, 0), (LANES_MAX, 2)])
def test_numbers_that_make_no_sense(senders: int, readers: int) -> None:
    with pytest.raises(ConfigurationError, match=f"{senders} encoder ranks and {readers} readers"):
        list(lanes(senders=senders, readers=readers))


@pytest.mark.failure_mode("ranks-see-different-totals")
def test_who_is_a_dummy() -> None:
    """By topology alone: with ``share`` the first rank of each host reads, with ``replicate`` every rank."""
    shared = RankGroup(tuple("aabb"))
    assert shared.readers == (0, 2)
    assert [shared.is_dummy(rank) for rank in range(4)] == [False, True, False, True]
    assert [shared.source_of(rank) for rank in range(4)] == [0, 0, 2, 2]
    assert shared.lanes_to(1, senders=2) == ()
    assert [lane.sender for lane in shared.lanes_to(2, senders=2)] == [1]
    assert RankGroup(tuple("aabb"), "replicate").readers == (0, 1, 2, 3)
    assert RankGroup(tuple("abab")).readers == (0, 1)


@given(hosts=st.lists(st.sampled_from("abc"), min_size=1, max_size=16))
def test_rank_0_always_reads(hosts: list[str]) -> None:
    """Whom clients talk to is never a dummy, and every rank's source is a reader of its host."""
    group = RankGroup(tuple(hosts))
    assert group.readers[0] == 0
    assert all(group.source_of(rank) in group.readers for rank in range(group.size))
    assert all(hosts[group.source_of(rank)] == hosts[rank] for rank in range(group.size))
    assert len(group.readers) == len(set(hosts))


def test_a_group_of_nobody() -> None:
    with pytest.raises(ConfigurationError, match="a group of 0 ranks"):
        RankGroup.on_one_host(0)
