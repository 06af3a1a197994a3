"""What can not be served is refused with its cause, and leaves nothing behind: no room, no block, no byte."""

from __future__ import annotations

import http.client
import http.server
import json
import struct
import threading
import zlib
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import pytest

if TYPE_CHECKING:
    from tests.e2e.conftest import Stack

pytestmark = [pytest.mark.e2e, pytest.mark.model, pytest.mark.timeout(240)]
BODY_BYTES_MAX = 64 * 2**20
PLACE = "messages[0].content[0].image_url"

Chat = Callable[..., dict[str, Any]]
Picture = Callable[..., bytes]


class MediaHost(http.server.BaseHTTPRequestHandler):
    """Answers ``/picture``; ``/slow`` drips bytes until the other side has enough of it; ``/loop`` redirects to itself."""

    picture: bytes

    def do_GET(self) -> None:
        if self.path == "/picture":
            self.send_response(200)
            self.end_headers()
            self.wfile.write(self.picture)
        elif self.path == "/slow":
            self._drip()
        elif self.path == "/loop":
            self.send_response(302)
            self.send_header("location", "/loop")
            self.end_headers()
        else:
            self.send_error(404)

    def log_message(self, format: str, *arguments: object) -> None:
        """Nothing."""

    def _drip(self) -> None:
        self.send_response(200)
        self.send_header("content-length", "1000000")
        self.end_headers()
        self.connection.settimeout(0.05)
        while True:
            try:
                if not self.connection.recv(1):
                    return  # hung up
            except TimeoutError:
                self.wfile.write(b"x")


@pytest.fixture(scope="module")
def media_host(picture: Picture) -> Iterator[str]:
    MediaHost.picture = picture(112, 112)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), MediaHost) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def png_of(width: int, height: int) -> bytes:
    """A picture that says it is so large, and has a few bytes of data."""
    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = {b"IHDR": head, b"IDAT": zlib.compress(bytes(1000)), b"IEND": b""}
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        for name, data in chunks.items()
    )


def refusal(stack: Stack, body: Any, status: int) -> dict[str, Any]:
    """The error object of an answer with that status. Nothing may be left of the request."""
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    answer = stack.client.post(stack.url, content=content)
    assert answer.status_code == status, answer.text
    error: dict[str, Any] = answer.json()["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert error["type"] == "invalid_request_error"
    stack.wait_at_rest()
    return error


@pytest.mark.parametrize("damage", ["no picture", "cut short", "nothing"])
def test_a_broken_picture(damage: str, stack: Stack, chat: Chat, picture: Picture) -> None:
    data = {"no picture": b"this is text", "cut short": picture(280, 224)[:-500], "nothing": b""}[damage]
    error = refusal(stack, chat("What is this?", picture(), data), 400)
    assert error["code"] == "invalid_image"
    assert "not a readable PNG" in error["message"]


def test_a_picture_of_ten_thousand_million_pixels(stack: Stack, chat: Chat) -> None:
    """It is refused by its header: nobody decodes it, or has the memory for it."""
    error = refusal(stack, chat("What is this?", png_of(100_000, 100_000)), 400)
    assert error["code"] == "invalid_image"
    assert "pixels" in error["message"]


@pytest.mark.failure_mode("request-never-fits")
@pytest.mark.parametrize("pictures", [0, 1])
def test_a_text_over_the_models_context(pictures: int, stack: Stack, chat: Chat, picture: Picture) -> None:
    """A prompt longer than the context is refused at once, with and without media."""
    error = refusal(stack, chat("all work and no play " * 20_000, *[picture()] * pictures), 400)
    assert error["code"] == "context_length_exceeded"
    assert "131072 tokens" in error["message"]


@pytest.mark.parametrize(
    ("path", "code"),
    [("/none", "media_not_found"), ("/slow", "media_timeout"), ("/loop", "invalid_media_url")],
)
def test_media_that_do_not_come(path: str, code: str, stack: Stack, chat: Chat, media_host: str) -> None:
    error = refusal(stack, chat("What is this?", media_host + path), 400)
    assert (error["code"], error["param"]) == (code, PLACE)


def test_media_that_do_come(stack: Stack, chat: Chat, media_host: str, picture: Picture) -> None:
    """The same bytes from a host and within the request: the same answer."""
    assert stack.ids(chat("What?", f"{media_host}/picture")) == stack.ids(chat("What?", picture(112, 112)))


@pytest.mark.parametrize(
    ("change", "status", "code", "param"),
    [
        ({"model": "large"}, 404, "model_not_found", "model"),
        ({"n": 2}, 400, "unsupported_parameter", "n"),
        ({"messages": []}, 400, "invalid_request", "messages"),
        ({"temperature": 3}, 400, "invalid_request", "temperature"),
        ({"embedwire_room": {}}, 400, "invalid_request", "embedwire_room"),
    ],
)
def test_a_request_that_makes_no_sense(
    change: dict[str, Any], status: int, code: str, param: str, stack: Stack, chat: Chat, picture: Picture
) -> None:
    error = refusal(stack, chat("What is this?", picture()) | change, status)
    assert (error["code"], error["param"]) == (code, param)


@pytest.mark.parametrize("body", [b"{", b"[]", b"\xff", b""])
def test_a_body_that_is_no_json_object(body: bytes, stack: Stack) -> None:
    assert refusal(stack, body, 400)["code"] == "invalid_json"


def test_a_body_that_is_too_large(stack: Stack) -> None:
    """It is refused by what it says of itself, before it has been sent."""
    connection = http.client.HTTPConnection(urlsplit(stack.url).netloc, timeout=30)
    connection.putrequest("POST", urlsplit(stack.url).path)
    connection.putheader("content-length", str(BODY_BYTES_MAX + 1))
    connection.endheaders()
    answer = connection.getresponse()
    assert (answer.status, json.load(answer)["error"]["code"]) == (413, "request_too_large")
    connection.close()
    stack.wait_at_rest()
