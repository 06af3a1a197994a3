"""The fake wire does what the test orders, and is honest about it as a real one is."""

from __future__ import annotations

import pytest

from embedwire.testing.fake_wire import FakeNetwork, FakeRegion, Fate
from embedwire.transports.contract import Outcome, Piece


class Fixture:
    """A region of ten zero bytes with ticket 1, and a session; slice n writes n at byte n."""

    def __init__(self, fates: dict[int, Fate], *, is_fenced: bool = True) -> None:
        self.network = FakeNetwork(
            is_fenced=is_fenced, fate=lambda slice_: fates.get(slice_.number, Fate.LAND)
        )
        self.inbound = self.network.inbound()
        self.memory = self.inbound.allocate(10)
        self.inbound.permit(1, [(0, 10)])
        outbound = self.network.outbound()
        self.region: FakeRegion = outbound.connect(self.inbound.descriptor(), sender_token=7, timeout_s=1)
        self.landed: list[int] = []

    def write(self, slices: int) -> Outcome:
        return self.region.write(
            1,
            [[Piece(memoryview(bytes([n])), n)] for n in range(1, slices + 1)],
            is_permitted=lambda: True,
            on_landed=self.landed.append,
            timeout_s=1,
        )


@pytest.mark.failure_mode("status-overtakes-bytes")
def test_late_slices_are_overtaken_and_reported_in_order() -> None:
    """Reported progress is never ahead of the bytes."""
    fixture = Fixture({2: Fate.LATE, 4: Fate.LATE})
    assert fixture.write(4) is Outcome.LANDED
    assert bytes(fixture.memory[:5]) == b"\0\1\2\3\4"
    assert fixture.landed == [1, 3, 4]


@pytest.mark.parametrize(
    ("fate", "outcome"),
    [(Fate.LOSE, Outcome.LOST), (Fate.VANISH, Outcome.UNKNOWN), (Fate.STRAY, Outcome.UNKNOWN)],
)
def test_a_write_ends_at_its_first_fault(fate: Fate, outcome: Outcome) -> None:
    fixture = Fixture({1: Fate.LATE, 3: fate})
    assert fixture.write(4) is outcome
    assert fixture.landed == [2]
    assert bytes(fixture.memory[:5]) == b"\0\1\2\0\0"
    assert len(fixture.network.strays) == (fate is Fate.STRAY)
    assert fixture.network.slices == 3


@pytest.mark.failure_mode("lease-shorter-than-write")
@pytest.mark.parametrize("is_fenced", [True, False])
def test_a_stray_slice_after_revoke(is_fenced: bool) -> None:
    """A late write lands in freed memory, unless the wire is fenced."""
    fixture = Fixture({1: Fate.STRAY}, is_fenced=is_fenced)
    assert fixture.write(1) is Outcome.UNKNOWN
    assert fixture.inbound.revoke(1) is is_fenced
    assert fixture.network.deliver() is not is_fenced
    assert fixture.memory[1] == (0 if is_fenced else 1)


@pytest.mark.failure_mode("encoder-killed")
def test_a_killed_sender_has_nothing_under_way() -> None:
    """Nothing of a killed sender lands later."""
    fixture = Fixture({1: Fate.STRAY})
    fixture.write(1)
    assert not fixture.inbound.is_gone(7)
    fixture.network.kill(7)
    assert fixture.inbound.is_gone(7)
    assert fixture.network.strays == []
    assert fixture.write(1) is Outcome.LOST
