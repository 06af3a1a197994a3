"""What a user sets in ``ec_connector_extra_config``: names, ranges and defaults, checked before anything is held.

Knows no vLLM. Read once, by each half of the connector.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta, Struct

from embedwire import limits
from embedwire.errors import ConfigurationError

Count = Annotated[int, Meta(ge=1)]
Port = Annotated[int, Meta(ge=0, lt=2**16)]
Seconds = Annotated[float, Meta(gt=0)]


class ConnectorSettings(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Settings of the connector. Bytes and tokens are counts, times are in seconds."""

    transport: Literal["auto", "shm", "tcp", "mooncake", "nixl"] = "auto"
    """How embeddings travel. auto: shared memory where both sides are on one host, else tcp."""
    host: str = "127.0.0.1"
    """This server's address, as the other side reaches it."""
    port: Port = 0
    """Producer: where items are asked for; 0 takes a free one."""
    items_bytes: Count = 2 * 2**30
    """Producer: memory for items, fetched or not. The oldest go first when it is full."""
    num_blocks: Annotated[int, Meta(ge=1, le=limits.BLOCKS_MAX)] = limits.DEFAULT_NUM_BLOCKS
    """Consumer: blocks of the receive pool. An item that does not fit comes in several rounds."""
    block_size: Count = limits.DEFAULT_BLOCK_SIZE
    """Consumer: rows of one block."""
    staging_bytes: Count = 2 * 2**30
    """Consumer: memory for items that are coming, or that requests still need. The items of one request have to fit."""
    item_deadline_s: Seconds = 30.0
    """Consumer: how long a request waits for its items before it fails."""
    peer_silence_s: Seconds = 3.0
    """Consumer: an encoder that has said nothing for this long, although it was asked, is lost."""
    encoders: tuple[str, ...] = ()
    """Consumer: addresses (``tcp://host:port``) of encoders to greet at start. One whose rows, dtype, model or options differ stops it."""
    prefetch: bool = False
    """Consumer: fetch each item as soon as one of ``encoders`` has made it, before a request names it. For language servers that get to
    serve most of what these encode: each of them fetches all of it."""
    local_encode: bool = False
    """Consumer: encode here what no encoder was named for, where the request brought the media and the tower is loaded."""
    report_to: tuple[str, ...] = ()
    """Consumer: URLs of routers, which are told why a request failed."""

    @property
    def transports(self) -> tuple[str, ...]:
        """The wires to offer, best first."""
        return ("shm", "tcp") if self.transport == "auto" else (self.transport,)

    @property
    def limits(self) -> limits.Limits:
        """Bounds of the protocol under these settings."""
        return limits.Limits(peer_silence_s=self.peer_silence_s, retry_s=min(0.25, self.peer_silence_s / 4))


def read_settings(extra_config: Mapping[str, Any]) -> ConnectorSettings:
    """Raises ConfigurationError for an unknown name, a wrong type or a value out of range."""
    try:
        return msgspec.convert(extra_config, ConnectorSettings)
    except msgspec.ValidationError as error:
        raise ConfigurationError(f"ec_connector_extra_config: {error}") from None
