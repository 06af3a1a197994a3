"""Time-outs and bounds that contradict each other are refused when they are set."""

from __future__ import annotations

import pytest

from embedwire.errors import ConfigurationError
from embedwire.limits import DEFAULT_LIMITS, OPEN_ROUNDS_MAX, Limits


def test_the_defaults_agree() -> None:
    assert Limits() == DEFAULT_LIMITS


@pytest.mark.parametrize("name", Limits.__dataclass_fields__)
def test_nothing_is_zero(name: str) -> None:
    with pytest.raises(ConfigurationError, match=f"{name} is 0"):
        Limits(**{name: 0})


@pytest.mark.failure_mode("lease-shorter-than-write")
@pytest.mark.parametrize(
    "wrong",
    [
        {"retry_s": 2.0},  # one lost message would be a lost peer
        {"peer_silence_s": 61.0},  # a round would end before its lost peer is found
        {"write_timeout_s": 61.0},  # the lease is shorter than the write it covers
        {"window_rounds": OPEN_ROUNDS_MAX + 1},  # the sender would take the last grant for a violation
    ],
)
def test_a_contradiction_names_the_numbers(wrong: dict[str, float]) -> None:
    with pytest.raises(ConfigurationError) as refused:
        Limits(**wrong)  # type: ignore[arg-type]
    assert all(str(value) in str(refused.value) for value in wrong.values())
