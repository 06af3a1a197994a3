"""The comparison of a wire with its engine: what it reports, and that it refuses what has no engine. Never how fast."""

from __future__ import annotations

import pytest

from embedwire.bench import wires
from embedwire.errors import ConfigurationError
from embedwire.transports import open_inbound


@pytest.mark.timeout(120)
@pytest.mark.parametrize("wire", wires.WIRES)
def test_a_batch_goes_both_ways(wire: str) -> None:
    try:
        open_inbound(wire, host=wires.HOST).close()
    except ConfigurationError as reason:
        pytest.skip(f"{wire} is not installed: {reason}")
    case = wires.measure(wire, nbytes=3 * 2**20 + 5, piece_bytes=2**20, repeat=2)
    assert (case.transport, case.bytes, case.repeats) == (wire, 3 * 2**20 + 5, 2)
    assert case.ratio == case.direct_median_s / case.median_s


def test_a_wire_without_an_engine() -> None:
    with pytest.raises(ConfigurationError, match="tcp"):
        wires.measure("tcp", nbytes=1, piece_bytes=1, repeat=1)
