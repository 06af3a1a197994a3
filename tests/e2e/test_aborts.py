"""A client that goes away takes its room with it, on both sides, whatever it was at."""

from __future__ import annotations

import json
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import pytest

if TYPE_CHECKING:
    from tests.e2e.conftest import Stack

pytestmark = [pytest.mark.e2e, pytest.mark.model, pytest.mark.timeout(240)]

Chat = Callable[..., dict[str, Any]]
Picture = Callable[..., bytes]


@pytest.fixture
def hang_up(stack: Stack) -> Callable[[dict[str, Any]], Any]:
    """``with hang_up(body):`` asks, and closes the connection at the end of the block, whatever has come by then."""

    @contextmanager
    def ask(body: dict[str, Any]) -> Iterator[socket.socket]:
        parts, content = urlsplit(stack.url), json.dumps(body).encode()
        head = f"POST {parts.path} HTTP/1.1\r\nhost: {parts.netloc}\r\ncontent-length: {len(content)}\r\n\r\n"
        with socket.create_connection((parts.hostname, parts.port), timeout=30) as connection:
            connection.sendall(head.encode() + content)
            yield connection

    return ask


def ended(stack: Stack, cause: str) -> tuple[float, float]:
    """Rooms ended with that cause, at the encoder and at the language server."""
    return (
        stack.encoders[0].metrics().total("sender_rooms_ended_total", cause=cause),
        stack.language.metrics().total("receiver_rooms_ended_total", cause=cause),
    )


@pytest.mark.failure_mode("abort-not-propagated")
def test_while_the_answer_streams(
    stack: Stack, chat: Chat, picture: Picture, hang_up: Any, wait_until: Any
) -> None:
    """After a client disconnects, generation of its 100,000 tokens stops."""
    body = chat("What is this?", picture(), max_tokens=100_000, stream=True)
    with hang_up(body) as connection:
        assert connection.recv(65536).startswith(b"HTTP/1.1 200 ")
        assert stack.language.metrics().total("language_generating") == 1
    stack.wait_at_rest()


@pytest.mark.failure_mode("abort-not-propagated")
def test_while_the_answer_is_awaited(
    stack: Stack, chat: Chat, picture: Picture, hang_up: Any, wait_until: Any
) -> None:
    """The same without streaming: the client has not read a byte when it disconnects."""
    with hang_up(chat("What is this?", picture(), max_tokens=100_000)):
        wait_until(lambda: stack.language.metrics().total("language_generating"))
    stack.wait_at_rest()


@pytest.mark.failure_mode("abort-not-propagated")
def test_while_the_encoder_works(
    stack: Stack, chat: Chat, picture: Picture, hang_up: Any, wait_until: Any
) -> None:
    """The encoder is frozen before its source is ready; after SIGCONT it receives the abort."""
    before, encoder = ended(stack, "aborted"), stack.encoders[0]
    try:
        with hang_up(chat("What is this?", picture(2240, 2240))):
            wait_until(lambda: stack.language.metrics().total("receiver_rooms", state="waiting"))
            encoder.freeze()
        wait_until(
            lambda: stack.language.metrics().total("receiver_rooms_ended_total", cause="aborted") > before[1]
        )
        assert stack.language.metrics().total("receiver_blocks_free") == 4
    finally:
        encoder.thaw()
    stack.wait_at_rest()
    assert ended(stack, "aborted") == (before[0] + 1, before[1] + 1)


@pytest.mark.failure_mode("abort-not-propagated", "reuse-during-write")
@pytest.mark.invariant("no-early-reuse")
def test_while_the_embedding_is_on_its_way(
    stack: Stack, chat: Chat, picture: Picture, hang_up: Any, wait_until: Any
) -> None:
    """A frozen encoder holds a grant when the client disconnects: the blocks stay in quarantine until the encoder confirms."""
    before, encoder = ended(stack, "aborted"), stack.encoders[0]
    body = chat("all work and no play " * 4000, picture())
    try:
        with hang_up(body):
            wait_until(lambda: stack.language.metrics().total("receiver_rooms", state="filling"))
            encoder.freeze()
            wait_until(lambda: stack.language.metrics().total("receiver_blocks_granted") == 4)
        wait_until(
            lambda: stack.language.metrics().total("receiver_rooms_ended_total", cause="aborted") > before[1]
        )
        assert stack.language.metrics().total("receiver_blocks_quarantined") == 4
        assert len(stack.ids(chat("Text is still served."))) == 8
    finally:
        encoder.thaw()
    stack.wait_at_rest()
    assert ended(stack, "aborted") == (before[0] + 1, before[1] + 1)


@pytest.mark.failure_mode("abort-not-propagated")
def test_while_media_are_fetched(stack: Stack, chat: Chat, hang_up: Any, wait_until: Any) -> None:
    """The client disconnects before there is a room; the encoder stops for the disconnect, not for slow media."""

    def given_up() -> float:
        return stack.encoders[0].metrics().total("requests_total", route="/encode", status="499")

    before = given_up()
    with socket.create_server(("127.0.0.1", 0)) as silent:
        silent.settimeout(30)
        with hang_up(chat("What is this?", f"http://127.0.0.1:{silent.getsockname()[1]}/")):
            fetching, _ = silent.accept()
            assert fetching.recv(65536).startswith(b"GET / ")
        with fetching:
            wait_until(lambda: given_up() == before + 1)
    stack.wait_at_rest()
