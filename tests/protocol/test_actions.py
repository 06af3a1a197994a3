"""Actions: a round as a log line shows it."""

from __future__ import annotations

from embedwire.protocol.actions import Round


def test_a_round_is_one_short_line_however_many_blocks_it_has() -> None:
    assert repr(Round(1, 512, 100, (4, 2), 9)) == "<Round 1 tokens=512..612 blocks=4,2 ticket=9>"
    many = Round(0, 0, 4096 * 128, tuple(range(4096)), 9)
    assert repr(many) == "<Round 0 tokens=0..524288 blocks=0,1,2,3,… (4096) ticket=9>"
