"""Agreement: the facts of ranks, as numbers, and the minimum over them."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from embedwire.group.agreement import NEUTRAL, NO_LIMIT, WIDTH, DisagreementError, Facts, agree, pack, unpack
from embedwire.limits import SLOTS_MAX, TOKENS_MAX
from embedwire.protocol.coordinator import RoomFacts
from embedwire.protocol.messages import Cause
from embedwire.protocol.states import Poll

ROOM = st.builds(
    RoomFacts,
    poll=st.sampled_from([poll for poll in Poll if poll is not Poll.FAILED]),
    total_tokens=st.integers(0, TOKENS_MAX),
    landed_tokens=st.integers(0, TOKENS_MAX),
) | st.builds(
    RoomFacts,
    poll=st.just(Poll.FAILED),
    total_tokens=st.integers(0, TOKENS_MAX),
    landed_tokens=st.just(0),
    cause=st.sampled_from(Cause),
)
FACTS = st.builds(
    Facts,
    step=st.integers(1, 2**40),
    free_bytes=st.integers(0, NO_LIMIT),
    rooms=st.lists(ROOM, max_size=20).map(tuple),
)


def agreed(*said: Facts) -> Facts:
    return unpack(agree(map(pack, said)))


@given(FACTS)
def test_there_and_back(facts: Facts) -> None:
    """Who is alone agrees with itself, in a constant number of int64."""
    words = pack(facts)
    assert len(words) == WIDTH
    assert all(-(2**63) <= word < 2**63 for word in words)
    assert unpack(words) == facts
    assert agreed(facts, facts) == facts


@pytest.mark.failure_mode("ranks-see-different-totals")
@given(FACTS)
def test_a_dummy_changes_nothing(facts: Facts) -> None:
    """The facts of a dummy rank are the neutral element of the reduction."""
    dummy = Facts(facts.step, NO_LIMIT, (NEUTRAL,) * len(facts.rooms))
    assert agreed(facts, dummy) == agreed(dummy, facts) == facts


@pytest.mark.failure_mode("ranks-see-different-totals", "fastest-rank-decides")
@given(st.lists(ROOM, min_size=2, max_size=8))
def test_the_slowest_decides_and_one_failure_fails_all(rooms: list[RoomFacts]) -> None:
    """Poll and landed by MIN, total by MAX, one cause for all, in any order of the ranks."""
    said = [Facts(3, 100 + i, (room,)) for i, room in enumerate(rooms)]
    result = agreed(*said)
    (room,) = result.rooms
    assert result == agreed(*reversed(said))
    assert result.free_bytes == 100
    assert room.poll == min(each.poll for each in rooms)
    assert room.landed_tokens == min(each.landed_tokens for each in rooms)
    assert room.total_tokens == max(each.total_tokens for each in rooms)
    assert (room.cause is None) == (room.poll is not Poll.FAILED)
    assert room.cause in {each.cause for each in rooms}


@pytest.mark.failure_mode("ranks-see-different-totals")
def test_dummy_ranks_and_late_readers_differ() -> None:
    """Ranks 0 and 2 report (2000, 1024), ranks 1 and 3 (0, 0): as dummy ranks they change nothing, as late readers nothing has landed
    on all."""
    has = Facts(1, 50, (RoomFacts(Poll.TRANSFERRING, 2000, 1024),))
    late = Facts(1, 50, (RoomFacts(Poll.BOOTSTRAPPING, 0, 0),))
    dummy = Facts(1, NO_LIMIT, (NEUTRAL,))
    assert agreed(has, dummy, has, dummy).rooms == (RoomFacts(Poll.TRANSFERRING, 2000, 1024),)
    assert agreed(has, late, has, late).rooms == (RoomFacts(Poll.BOOTSTRAPPING, 2000, 0),)


@pytest.mark.failure_mode("ranks-admit-different-rooms")
@pytest.mark.parametrize("other", [Facts(8, 1, (NEUTRAL,)), Facts(7, 1, ()), Facts(7, 1, (NEUTRAL,) * 2)])
def test_who_is_elsewhere_is_found_out(other: Facts) -> None:
    """Ranks at different steps or with different rooms get an error, and no rank acts on the result."""
    facts = Facts(7, 1, (NEUTRAL,))
    for said in ([facts, other], [other, facts], [facts, facts, other]):
        with pytest.raises(DisagreementError, match=r"steps 7 to [78], with [012] to [12] rooms"):
            agreed(*said)


@pytest.mark.failure_mode("ranks-admit-different-rooms")
def test_a_full_step() -> None:
    """As many rooms as there are slots."""
    facts = Facts(1, 0, (replace(NEUTRAL, total_tokens=5),) * SLOTS_MAX)
    assert unpack(pack(facts)) == facts
