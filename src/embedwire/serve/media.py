"""Fetches the media that a request names, without letting the user reach what he should not.

Owns URLs and their bytes; it must not know what the bytes mean, nor who asks. On the event loop of the
app that asks; base64 is decoded on a worker thread.

The address is looked up once and the connection goes to the address that was checked, so that a name which
changes its address in between gains nothing. Every redirect is a new URL and goes the same way.
"""

from __future__ import annotations

import binascii
import socket
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from http.cookiejar import CookieJar, DefaultCookiePolicy
from types import TracebackType

import anyio
import anyio.to_thread
import httpx
import pybase64

from embedwire.errors import ConfigurationError, InvalidRequestError
from embedwire.serve.addresses import is_public

REDIRECTS = frozenset({301, 302, 303, 307, 308})
GONE = frozenset({404, 410})

Resolve = Callable[[str, int], Awaitable[list[str]]]
"""(host, port) → addresses. Raises OSError."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MediaLimits:
    """Bounds on the media of one request."""

    items_max: int = 64
    item_bytes_max: int = 32 * 2**20
    total_bytes_max: int = 64 * 2**20
    redirects_max: int = 3
    timeout_s: float = 20.0
    """For all media of the request that are fetched together, from the first look-up to the last byte."""
    parallel_fetches_max: int = 8
    allow_private_media: bool = False
    """Let URLs lead to private addresses. Only where every user may reach what this host reaches."""

    def __post_init__(self) -> None:
        for name in ("items_max", "item_bytes_max", "total_bytes_max", "timeout_s", "parallel_fetches_max"):
            if getattr(self, name) <= 0:
                raise ConfigurationError(f"{name} is {getattr(self, name)}; it has to be above 0")
        if self.redirects_max < 0:
            raise ConfigurationError(f"redirects_max is {self.redirects_max}; it can not be below 0")


class MediaError(InvalidRequestError):
    """A media URL can not be used. Its text never carries more of the URL than the host."""


class PinnedTransport(httpx.AsyncBaseTransport):
    """Looks a host up, checks every address it has, and connects to the first of them; ``Host`` and SNI keep
    the name."""

    def __init__(self, inner: httpx.AsyncBaseTransport, *, resolve: Resolve, allow_private: bool) -> None:
        self._inner = inner
        self._resolve = resolve
        self._allow_private = allow_private

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        host = request.url.raw_host.decode("ascii")
        address = await self._checked_address(host, request.url.port or _default_port(request.url))
        request.extensions = {**request.extensions, "sni_hostname": host}
        request.url = request.url.copy_with(host=address)
        return await self._inner.handle_async_request(request)

    async def aclose(self) -> None:
        await self._inner.aclose()

    async def _checked_address(self, host: str, port: int) -> str:
        try:
            addresses = await self._resolve(host, port)
        except (OSError, UnicodeError):
            addresses = []
        if not addresses:
            raise MediaError(f"the media host {host!r} has no address", code="media_unreachable")
        if not self._allow_private and not all(is_public(a) for a in addresses):
            raise MediaError(f"the media host {host!r} is not a public one", code="invalid_media_url")
        return addresses[0]


class MediaFetcher:
    """Fetches data:, http: and https: URLs. An asynchronous context manager; one for the life of an app."""

    def __init__(
        self,
        limits: MediaLimits | None = None,
        *,
        resolve: Resolve | None = None,
        inner: httpx.AsyncBaseTransport | None = None,
        accept: str = "image/*",
    ) -> None:
        self.limits = limits or MediaLimits()
        # A kept connection would be found by its address and serve another name than its certificate's.
        pool = httpx.Limits(max_connections=256, max_keepalive_connections=0)
        wire = inner or httpx.AsyncHTTPTransport(trust_env=False, limits=pool)
        self._client = httpx.AsyncClient(
            transport=PinnedTransport(
                wire, resolve=resolve or look_up, allow_private=self.limits.allow_private_media
            ),
            headers={"accept": accept, "accept-encoding": "identity", "user-agent": "embedwire"},
            cookies=CookieJar(DefaultCookiePolicy(allowed_domains=[])),  # users share this client
            follow_redirects=False,
            trust_env=False,
            timeout=self.limits.timeout_s,
        )

    async def __aenter__(self) -> MediaFetcher:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self._client.aclose()

    async def fetch_all(self, urls: Mapping[str, str]) -> list[bytes]:
        """The bytes of every URL, in order. ``urls`` maps the place in the request, for errors, to the URL.

        Raises MediaError with ``param`` set to that place and a code: ``invalid_media_url``,
        ``media_not_found``, ``media_unreachable``, ``media_timeout`` (status 400), ``media_too_large`` (413).
        """
        if len(urls) > self.limits.items_max:
            raise MediaError(
                f"{len(urls)} media items, over the limit of {self.limits.items_max}", code="too_many_media"
            )
        budget = _Budget(self.limits.total_bytes_max)
        found: dict[str, bytes] = {}
        failed: list[MediaError] = []
        slots = anyio.CapacityLimiter(self.limits.parallel_fetches_max)

        async def get_all(get: Callable[[str, _Budget], Awaitable[bytes]], places: Sequence[str]) -> None:
            async def get_one(place: str) -> None:
                try:
                    async with slots:
                        found[place] = await get(urls[place], budget)
                except MediaError as error:
                    error.param = place
                    failed.append(error)
                    group.cancel_scope.cancel()

            async with anyio.create_task_group() as group:
                for place in places:
                    group.start_soon(get_one, place)

        await get_all(self._decode, [place for place, url in urls.items() if _is_inline(url)])
        if not failed:  # what came with the request is not late, however busy this server is
            with anyio.move_on_after(self.limits.timeout_s):
                await get_all(self._fetch, [place for place in urls if place not in found])
        if failed:
            raise failed[0]
        missing = [place for place in urls if place not in found]
        if missing:
            raise MediaError(
                f"the media did not arrive within {self.limits.timeout_s:g} s",
                code="media_timeout",
                param=missing[0],
            )
        return [found[place] for place in urls]

    async def _decode(self, url: str, budget: _Budget) -> bytes:
        data = await anyio.to_thread.run_sync(self._decode_data_url, url)
        budget.spend(len(data))
        return data

    async def _fetch(self, url: str, budget: _Budget) -> bytes:
        hop = _checked_url(url)
        for _ in range(self.limits.redirects_max + 1):
            request = self._client.build_request("GET", hop)
            try:
                answer = await self._get(request, budget)
            except httpx.TimeoutException:
                raise MediaError("the media host did not answer in time", code="media_timeout") from None
            # the last: httpx reads at once where an answer redirects to
            except (httpx.HTTPError, httpx.InvalidURL, UnicodeError) as error:
                why = type(error).__name__
                raise MediaError(f"the media could not be fetched: {why}", code="media_unreachable") from None
            if isinstance(answer, bytes):
                return answer
            hop = _checked_url(answer, base=hop)
        raise MediaError(
            f"the media URL leads through more than {self.limits.redirects_max} redirects",
            code="invalid_media_url",
        )

    async def _get(self, request: httpx.Request, budget: _Budget) -> bytes | str:
        """The body, or where the answer redirects to."""
        response = await self._client.send(request, stream=True)
        try:
            if response.status_code in REDIRECTS and "location" in response.headers:
                return response.headers["location"]
            _check_answer(response)
            declared = response.headers.get("content-length", "")
            if declared.isdecimal():
                self._check_size(int(declared))
            body = bytearray()
            async for chunk in response.aiter_raw():
                body += chunk
                self._check_size(len(body))
                budget.spend(len(chunk))
            return bytes(body)
        finally:
            await response.aclose()

    def _decode_data_url(self, url: str) -> bytes:
        head, comma, text = url.partition(",")
        if not comma or not head.lower().endswith(";base64"):
            raise MediaError("a data: URL has to hold base64", code="invalid_media_url")
        self._check_size(len(text) // 4 * 3 - text[-2:].count("="))
        try:
            return pybase64.b64decode(text, validate=True)
        except (binascii.Error, ValueError) as error:
            raise MediaError(f"a data: URL is not base64: {error}", code="invalid_media_url") from None

    def _check_size(self, size_bytes: int) -> None:
        if size_bytes > self.limits.item_bytes_max:
            raise MediaError(
                f"a media item is over the limit of {self.limits.item_bytes_max} bytes",
                code="media_too_large",
                status=413,
            )


class _Budget:
    """What all media of one request may take together."""

    def __init__(self, total_bytes: int) -> None:
        self._total_bytes = total_bytes
        self._left_bytes = total_bytes

    def spend(self, size_bytes: int) -> None:
        self._left_bytes -= size_bytes
        if self._left_bytes < 0:
            raise MediaError(
                f"the request's media are over the limit of {self._total_bytes} bytes together",
                code="media_too_large",
                status=413,
            )


async def look_up(host: str, port: int) -> list[str]:
    """The system's resolver, which also reads the odd forms of an IPv4 address (decimal, octal,
    hexadecimal)."""
    found = await anyio.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return [address[0] for *_, address in found]


def _is_inline(url: str) -> bool:
    return url[:5].lower() == "data:"


def _checked_url(text: str, *, base: httpx.URL | None = None) -> httpx.URL:
    try:
        url = base.join(text) if base else httpx.URL(text)
        host = url.host  # decoded, which fails for some names
    except (httpx.InvalidURL, ValueError) as error:
        raise MediaError(f"the media URL is malformed: {error}", code="invalid_media_url") from None
    if url.scheme not in ("http", "https"):
        raise MediaError(
            f"the media URL has the scheme {url.scheme[:16]!r}; only http, https and data are served",
            code="invalid_media_url",
        )
    if not host or (url.port or 1) > 65535:
        raise MediaError("the media URL names no host, or no port there is", code="invalid_media_url")
    if url.userinfo:
        raise MediaError("the media URL holds credentials", code="invalid_media_url")
    return url.copy_with(fragment=None)


def _check_answer(response: httpx.Response) -> None:
    status = response.status_code
    if status in GONE:
        raise MediaError(f"the media host answered {status}: no such media", code="media_not_found")
    if status != 200:
        raise MediaError(f"the media host answered {status}", code="media_unreachable")
    # What was not asked for could also unpack to any size.
    if response.headers.get("content-encoding", "identity").lower() != "identity":
        raise MediaError("the media host answered with an encoding", code="media_unreachable")


def _default_port(url: httpx.URL) -> int:
    return 443 if url.scheme == "https" else 80
