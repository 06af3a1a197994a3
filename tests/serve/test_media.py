"""Fetching media: what is refused before a connection, what on the way, and what arrives."""

from __future__ import annotations

import base64
from collections.abc import AsyncIterator, Callable
from typing import Any

import anyio
import httpx
import pytest

from embedwire.errors import ConfigurationError
from embedwire.serve.media import MediaError, MediaFetcher, MediaLimits

pytestmark = pytest.mark.anyio
PUBLIC = "93.184.216.34"


class Net:
    """A network of one resolver and one server; keeps what was asked of both."""

    def __init__(
        self, answer: Callable[[httpx.Request], Any], names: dict[str, list[str]] | None = None
    ) -> None:
        self.answer, self.names = answer, names or {}
        self.looked_up: list[str] = []
        self.requests: list[httpx.Request] = []

    async def resolve(self, host: str, _port: int) -> list[str]:
        self.looked_up.append(host)
        return self.names.get(host, [PUBLIC])

    async def serve(self, request: httpx.Request) -> httpx.Response:
        self.requests.append(request)
        answer = self.answer(request)
        return await answer if hasattr(answer, "__await__") else answer

    def fetcher(self, **limits: Any) -> MediaFetcher:
        return MediaFetcher(
            MediaLimits(**limits), resolve=self.resolve, inner=httpx.MockTransport(self.serve)
        )


def body(content: bytes | AsyncIterator[bytes], status: int = 200, **headers: str) -> httpx.Response:
    # A stream, since bytes would set the content-length.
    stream = content if not isinstance(content, bytes) else _once(content)
    return httpx.Response(
        status, content=stream, headers={k.replace("_", "-"): v for k, v in headers.items()}
    )


async def _once(content: bytes) -> AsyncIterator[bytes]:
    yield content


async def endless() -> AsyncIterator[bytes]:
    while True:
        yield b"x" * 1000


async def fetch(net: Net, *urls: str, **limits: Any) -> list[bytes]:
    async with net.fetcher(**limits) as fetcher:
        return await fetcher.fetch_all({f"place {i}": url for i, url in enumerate(urls)})


async def refusal(net: Net, *urls: str, **limits: Any) -> MediaError:
    with pytest.raises(MediaError) as caught:
        await fetch(net, *urls, **limits)
    assert caught.value.param
    return caught.value


async def test_connects_to_the_checked_address_and_keeps_the_name() -> None:
    """One look-up a hop: a name that changes its address after the check gains nothing."""
    net = Net(lambda _: body(b"image"))
    assert await fetch(net, "https://images.example:8443/a?b#c") == [b"image"]
    (request,) = net.requests
    assert net.looked_up == ["images.example"]
    assert str(request.url) == f"https://{PUBLIC}:8443/a?b"
    assert request.headers["host"] == "images.example:8443"
    assert request.extensions["sni_hostname"] == "images.example"


@pytest.mark.parametrize(
    "host",
    ["127.0.0.1", "2130706433", "0x7f000001", "0177.0.0.1", "127.1", "0", "0.0.0.0", "localhost", "[::1]",
     "[::ffff:127.0.0.1]", "[64:ff9b::7f00:1]", "169.254.169.254", "10.0.0.1", "[fe80::1]", "[fc00::1]",
     "①②⑦.⓪.⓪.①", "127.0.0.1."],
)  # fmt: skip
async def test_private_hosts_are_refused_before_a_connection(host: str) -> None:
    """With the system's own resolver, which reads the odd forms too."""
    net = Net(lambda _: body(b"secret"))
    fetcher = MediaFetcher(inner=httpx.MockTransport(net.serve))
    with pytest.raises(MediaError) as caught:
        await fetcher.fetch_all({"messages[0]": f"http://{host}/latest/meta-data"})
    assert caught.value.code in ("invalid_media_url", "media_unreachable")
    assert net.requests == []


async def test_one_private_address_among_public_ones_is_enough() -> None:
    net = Net(lambda _: body(b"secret"), {"two.example": [PUBLIC, "10.0.0.1"]})
    assert (await refusal(net, "http://two.example/")).code == "invalid_media_url"
    assert net.requests == []


async def test_media_that_came_with_the_request_do_not_come_too_late() -> None:
    """A server that is busy does not blame its user: the time-out is for hosts that are slow."""
    assert await fetch(Net(lambda _: body(b"")), "data:;base64,aW1hZ2U=", timeout_s=1e-9) == [b"image"]


async def test_a_redirect_is_checked_again() -> None:
    def answer(request: httpx.Request) -> httpx.Response:
        return body(b"", 302, location="http://inside.example/secret")

    net = Net(answer, {"inside.example": ["192.168.0.1"]})
    assert (await refusal(net, "http://images.example/")).code == "invalid_media_url"
    assert [r.headers["host"] for r in net.requests] == ["images.example"]


async def test_redirects_are_followed_relative_ones_too() -> None:
    def answer(request: httpx.Request) -> httpx.Response:
        if request.url.path == "/a":
            return body(b"", 301, location="b/c")
        if request.url.path == "/b/c":
            return body(b"", 307, location="//other.example/d")
        return body(request.headers["host"].encode() + request.url.raw_path)

    assert await fetch(Net(answer), "http://images.example/a") == [b"other.example/d"]


async def test_redirects_are_counted() -> None:
    net = Net(lambda _: body(b"", 302, location="/again"))
    error = await refusal(net, "http://images.example/", redirects_max=2)
    assert error.code == "invalid_media_url"
    assert len(net.requests) == 3


async def test_a_redirect_with_an_endless_body_is_not_read() -> None:
    def answer(request: httpx.Request) -> httpx.Response:
        return body(b"ok") if request.url.path == "/b" else body(endless(), 302, location="/b")

    assert await fetch(Net(answer), "http://images.example/a") == [b"ok"]


@pytest.mark.parametrize(
    "url",
    [
        "file:///etc/passwd",
        "ftp://images.example/a",
        "gopher://images.example/",
        "images.example/a",
        "http://",
        "http:///a",
        "http://user@images.example/",
        "http://user:password@images.example/",
        "http://images.example:99999/",
        "http://images.example\r\nx: y/",
        "data:image/png,abc",
        "data:image/png;base64",
        "data:image/png;base64,@@@@",
        "data:image/png;base64,abc",
        "",
        "x" * 100_000,
        "http://xn--i-7iq.ws/",  # a heart, which the standard for names does not allow
    ],
)
async def test_urls_that_are_no_media_urls(url: str) -> None:
    net = Net(lambda _: body(b"image"))
    assert (await refusal(net, url)).code == "invalid_media_url"
    assert net.requests == []


@pytest.mark.parametrize(
    "location",
    [
        "file:///etc/passwd",
        "http://user:pw@images.example/",
        "http://images.example:port/",
        "http://xn--a/",
    ],
)
async def test_a_redirect_must_lead_to_a_media_url(location: str) -> None:
    net = Net(lambda _: body(b"", 302, location=location))
    assert (await refusal(net, "http://images.example/")).code in ("invalid_media_url", "media_unreachable")
    assert len(net.requests) == 1


@pytest.mark.parametrize(
    ("status", "code"),
    [
        (204, "media_unreachable"),
        (302, "media_unreachable"),
        (403, "media_unreachable"),
        (404, "media_not_found"),
        (410, "media_not_found"),
        (500, "media_unreachable"),
    ],
)
async def test_an_answer_that_is_no_image(status: int, code: str) -> None:
    error = await refusal(Net(lambda _: body(b"", status)), "http://images.example/")
    assert (error.code, error.status) == (code, 400)
    assert str(status) in str(error)


async def test_too_large_by_what_it_says_is_not_read() -> None:
    net = Net(lambda _: body(endless(), content_length="1001"))
    error = await refusal(net, "http://images.example/", item_bytes_max=1000)
    assert (error.code, error.status, error.param) == ("media_too_large", 413, "place 0")


async def test_too_large_without_saying_so() -> None:
    error = await refusal(Net(lambda _: body(endless())), "http://images.example/", item_bytes_max=10_000)
    assert (error.code, error.status) == ("media_too_large", 413)
    assert "10000 bytes" in str(error)


async def test_too_large_in_a_data_url() -> None:
    url = "data:;base64," + base64.b64encode(bytes(1001)).decode()
    assert (await refusal(Net(lambda _: body(b"")), url, item_bytes_max=1000)).code == "media_too_large"
    assert await fetch(Net(lambda _: body(b"")), url, item_bytes_max=1001) == [bytes(1001)]


async def test_too_large_together() -> None:
    net = Net(lambda _: body(bytes(600)))
    limits = {"item_bytes_max": 1000, "total_bytes_max": 1000}
    assert (await refusal(net, "http://a.example/", "http://b.example/", **limits)).code == "media_too_large"


async def test_what_would_unpack_is_refused() -> None:
    net = Net(lambda _: body(b"bomb", content_encoding="gzip"))
    assert (await refusal(net, "http://images.example/")).code == "media_unreachable"
    assert net.requests[0].headers["accept-encoding"] == "identity"


async def test_slow_media() -> None:
    async def slow(_request: httpx.Request) -> httpx.Response:
        await anyio.sleep_forever()
        raise AssertionError

    error = await refusal(Net(slow), "data:;base64,aaaa", "http://images.example/", timeout_s=0.05)
    assert (error.code, error.status, error.param) == ("media_timeout", 400, "place 1")


async def test_many_keep_their_order_and_are_counted() -> None:
    net = Net(lambda request: body(request.headers["host"].encode()))
    urls = [f"http://{i}.example/" for i in range(20)]
    assert await fetch(net, *urls) == [f"{i}.example".encode() for i in range(20)]
    with pytest.raises(MediaError, match="over the limit of 19"):
        await fetch(net, *urls, items_max=19)
    assert await fetch(net) == []


async def test_no_cookies_between_requests() -> None:
    net = Net(lambda _: body(b"", set_cookie="who=me"), {PUBLIC: [PUBLIC]})
    async with net.fetcher() as fetcher:
        for _ in range(2):
            await fetcher.fetch_all({"p": f"http://{PUBLIC}/"})
    assert ["cookie" in r.headers for r in net.requests] == [False, False]


async def test_a_connection_that_fails_says_which_kind() -> None:
    def answer(request: httpx.Request) -> httpx.Response:
        raise httpx.ConnectError("refused")

    assert (await refusal(Net(answer), "http://images.example/")).code == "media_unreachable"
    net = Net(lambda _: body(b""), {"nowhere.example": []})
    assert (await refusal(net, "http://nowhere.example/")).code == "media_unreachable"


async def test_a_real_server_with_private_media_allowed(cluster: Any) -> None:
    """The whole way, by name: the connection goes where the look-up said."""
    _, server = cluster.add_language()
    port = server.url.rpartition(":")[2]
    looked_up = []

    async def resolve(host: str, _port: int) -> list[str]:
        looked_up.append(host)
        return ["127.0.0.1"]

    async with MediaFetcher(MediaLimits(allow_private_media=True), resolve=resolve) as fetcher:
        (found,) = await fetcher.fetch_all({"p": f"http://images.invalid:{port}/v1/models"})
        assert b"tiny" in found
        with pytest.raises(MediaError, match="404"):
            await fetcher.fetch_all({"p": f"http://images.invalid:{port}/none"})
    assert looked_up == ["images.invalid"] * 2


async def test_limits_are_checked() -> None:
    with pytest.raises(ConfigurationError, match="items_max is 0"):
        MediaLimits(items_max=0)
