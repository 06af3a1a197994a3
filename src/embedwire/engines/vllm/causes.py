"""Tells routers why a request failed, since vLLM passes no cause on. Owns one thread; nothing waits for it."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

import httpx

logger = logging.getLogger(__name__)

TELL_TIMEOUT_S = 1.0
"""A router that does not answer within this does without the cause."""


class CauseReporter:
    """Posts to ``/vllm/ends`` of each router, in order."""

    def __init__(self, routers: Sequence[str]) -> None:
        self._urls = [f"{url.rstrip('/')}/vllm/ends" for url in routers]
        self._client = httpx.Client(timeout=TELL_TIMEOUT_S, trust_env=False) if routers else None
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="embedwire-causes")

    def tell(self, end: Mapping[str, str]) -> None:
        """Soon; returns at once."""
        if self._client is not None:
            self._thread.submit(self._post, self._client, dict(end))

    def _post(self, client: httpx.Client, end: dict[str, str]) -> None:
        for url in self._urls:
            try:
                client.post(url, json=end)
            except httpx.HTTPError as error:
                logger.warning("%s was not told that a request ended with %s: %s", url, end["cause"], error)

    def close(self) -> None:
        """After what is under way."""
        self._thread.shutdown()
        if self._client is not None:
            self._client.close()
