"""The encoder's internal API, through real sockets."""

from __future__ import annotations

import threading
from typing import Any

import httpx
import msgspec
import pytest

from embedwire.errors import InvalidRequestError, NeverFitsError, OverloadedError
from embedwire.serve.media import MediaLimits

WAIT_S = 20.0


def encode(url: str, body: Any) -> httpx.Response:
    return httpx.post(f"{url}/encode", content=msgspec.json.encode(body), timeout=WAIT_S)


def room(chat: Any, number: int, *images: Any, attempt: int = 0) -> dict[str, Any]:
    return {"room": number, "attempt": attempt, "messages": chat("what?", *images)["messages"]}


def test_takes_up_a_prompt(cluster: Any, chat: Any) -> None:
    double, server = cluster.add_encoder()
    answer = encode(server.url, room(chat, 2**63 - 1, b"one", b"two", attempt=3))
    assert answer.status_code == 200
    taken = double.rooms[2**63 - 1, 3]
    assert answer.json() == {
        "total_tokens": 2000,
        "control_addresses": [double.address],
        "content_hash": taken.content_hash.hex(),
    }
    (prompt,) = double.prompts
    assert prompt.media == [b"one", b"two"]
    assert prompt.messages == [
        {"role": "user", "content": [{"type": "image"}, {"type": "image"}, {"type": "text", "text": "what?"}]}
    ]


def test_fetches_over_http_from_this_host(cluster: Any, chat: Any) -> None:
    double, server = cluster.add_encoder()
    assert encode(server.url, room(chat, 1, f"{server.url}/health")).status_code == 200
    assert b'"status":"ok"' in double.prompts[0].media[0]


def test_a_media_error_names_its_place(cluster: Any, chat: Any) -> None:
    double, server = cluster.add_encoder(media=MediaLimits())
    answer = encode(server.url, room(chat, 1, b"fine", f"{server.url}/health"))
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert (error["code"], error["param"]) == ("invalid_media_url", "messages[0].content[1].image_url")
    assert not double.prompts


@pytest.mark.failure_mode("request-never-fits")
@pytest.mark.parametrize(
    ("error", "status", "code"),
    [
        (InvalidRequestError("broken", code="invalid_image", param="messages"), 400, "invalid_image"),
        (OverloadedError("full"), 503, "overloaded"),
        (NeverFitsError("8 GiB"), 413, "never_fits"),
    ],
)
def test_refusals(cluster: Any, chat: Any, error: Exception, status: int, code: str) -> None:
    """ "Never fits" and "not enough room now" are different answers."""
    _, server = cluster.add_encoder(fails=error)
    answer = encode(server.url, room(chat, 1, b"x"))
    assert answer.status_code == status
    assert answer.json()["error"]["code"] == code
    assert ("retry-after" in answer.headers) == (status == 503)


def test_a_wrong_field_is_named(cluster: Any, chat: Any) -> None:
    _, server = cluster.add_encoder()
    changes: list[dict[str, Any]] = [
        {"room": 0},
        {"room": 2**63},
        {"room": "1"},
        {"attempt": -1},
        {"messages": []},
    ]
    for change in changes:
        answer = encode(server.url, room(chat, 1) | change)
        assert answer.status_code == 400
        assert answer.json()["error"]["param"] == next(iter(change))


@pytest.mark.failure_mode("abort-not-propagated")
def test_a_router_that_goes_away_leaves_no_room(cluster: Any, chat: Any, hang_up_after: Any) -> None:
    """The router disconnects before the room exists; the room must not be created afterwards."""
    gate = threading.Event()
    double, server = cluster.add_encoder(gate=gate)
    with hang_up_after(f"{server.url}/encode", room(chat, 5, b"x", attempt=2)):
        assert double.entered.get(timeout=WAIT_S) == 5
    assert httpx.get(f"{server.url}/health").status_code == 200
    assert double.aborted.empty()
    gate.set()
    assert double.aborted.get(timeout=WAIT_S) == (5, 2)
    assert not double.rooms


@pytest.mark.failure_mode("burst-of-requests")
@pytest.mark.invariant("backpressure")
def test_one_more_than_the_limit_is_refused_at_once(cluster: Any, chat: Any, hang_up_after: Any) -> None:
    """The refusal does not wait for requests under way."""
    gate = threading.Event()
    double, server = cluster.add_encoder(gate=gate, requests_max=1)
    with hang_up_after(f"{server.url}/encode", room(chat, 5, b"x")) as connection:
        double.entered.get(timeout=WAIT_S)
        answer = encode(server.url, room(chat, 6, b"x"))
        assert (answer.status_code, answer.headers["retry-after"]) == (503, "1")
        gate.set()
        assert b"200 OK" in connection.recv(4096)
    assert encode(server.url, room(chat, 6, b"x")).status_code == 200


def test_delete_ends_a_room(cluster: Any) -> None:
    double, server = cluster.add_encoder()
    assert httpx.delete(f"{server.url}/rooms/77", params={"attempt": 1}).status_code == 200
    assert double.aborted.get(timeout=WAIT_S) == (77, 1)
    assert httpx.delete(f"{server.url}/rooms/seven").status_code == 400


def test_body_limit(cluster: Any) -> None:
    _, server = cluster.add_language()
    big = b" " * (16 * 2**20 + 1)
    answer = httpx.post(f"{server.url}/v1/chat/completions", content=big)
    assert answer.status_code == 413
    chunked = httpx.post(f"{server.url}/v1/chat/completions", content=iter([big[: 2**20]] * 17))
    assert chunked.json()["error"]["code"] == "request_too_large"
