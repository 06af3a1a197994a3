"""What each cause leads to."""

from __future__ import annotations

import pytest

from embedwire.serve.faults import Fault
from embedwire.serve.vllm.ends import End
from embedwire.serve.vllm.failures import Verdict, judge
from embedwire.serve.vllm.items import Encoded, Offered

SAID = Fault(status=502, type="upstream_error", code="language_failed", message="bare")
ANSWERS = [
    Encoded(offered={"a": Offered(("tcp://a",), 1)}, encoder="http://old", at_s=1.0),
    Encoded(offered={"b": Offered(("tcp://b",), 1)}, encoder="http://new", at_s=3.0),
]


def verdict(cause: str | None, **where: str) -> Verdict:
    end = End(ticket="t", cause=cause, **where) if cause else None
    return judge(SAID, end, ANSWERS, language_url="http://l", began_s=2.0)


def test_without_a_cause_all_is_asked_for_again() -> None:
    assert verdict(None) == Verdict(fault=SAID, lost=frozenset("ab"), doubted="http://l")


@pytest.mark.parametrize("cause", ["deadline", "never_fits", "aborted"])
def test_what_ends_the_request(cause: str) -> None:
    found = verdict(cause, identifier="a")
    assert (found.is_final, found.fault.code, found.lost) == (True, cause, frozenset())


def test_an_evicted_item_is_nobodys_fault() -> None:
    found = verdict("unknown_item", identifier="a", address="tcp://a")
    assert (found.lost, found.to_blame, found.lost_encoder) == (frozenset("a"), None, None)
    assert verdict("unknown_item").lost == frozenset("ab")


def test_a_full_language_server_is_avoided() -> None:
    assert verdict("overloaded", identifier="b").to_blame == "http://l"


def test_a_lost_encoder_is_avoided_if_its_answer_was_fresh() -> None:
    by_name, by_address = verdict("peer_lost", identifier="b"), verdict("corrupt", address="tcp://b")
    assert by_name.to_blame == by_name.lost_encoder == by_address.to_blame == "http://new"
    old = verdict("peer_lost", identifier="a")
    assert (old.to_blame, old.lost_encoder) == (None, "http://old")


def test_nobody_is_blamed_without_a_name() -> None:
    found = verdict("peer_lost")
    assert (found.to_blame, found.lost_encoder, found.lost) == (None, None, frozenset("ab"))
