"""Every setting: its name, type, range, default and description, in groups that commands take as flags.

``options.py`` loads the values. Imports no command. Immutable; any thread.
"""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Mapping
from dataclasses import fields
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from pydantic import AfterValidator, BaseModel, BeforeValidator, ByteSize, ConfigDict, Field, create_model
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from embedwire import limits
from embedwire.limits import Limits

Count = Annotated[int, Field(ge=1)]
Port = Annotated[int, Field(ge=0, lt=2**16)]
Seconds = Annotated[float, Field(gt=0)]
Size = Annotated[ByteSize, Field(ge=1)]


def _checked_url(text: str) -> str:
    parts = urlsplit(text)
    _ = parts.port  # raises when there can be none of that number
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError("it has to begin with http:// or https://, and name a host")
    return text


Url = Annotated[str, AfterValidator(_checked_url)]
Urls = Annotated[
    tuple[Url, ...],
    NoDecode,
    BeforeValidator(lambda v: " ".join([v] if isinstance(v, str) else v).replace(",", " ").split()),
]


class Group(BaseModel):
    """Settings that are used together. The first line of a group's docstring is its title in ``--help``."""

    model_config = ConfigDict(use_attribute_docstrings=True)


class Server(Group):
    """Server"""

    host: str = "127.0.0.1"
    """Address to listen on. It has to be one that the other processes can reach: it is also what they are told."""
    port: Port = 0
    """HTTP port; 0 takes a free one. The router's is 8000 unless told, that of others a free one."""
    shutdown_s: Seconds = 10.0
    """How long answers under way may go on after SIGTERM or Ctrl-C."""
    log_level: Literal["debug", "info", "warning", "error"] = "warning"
    """What is logged to stderr: rooms that failed at warning, one line a request at info, messages of the protocol at debug."""


class Member(Group):
    """Registry"""

    registry_url: Url | None = None
    """The registry to belong to, or to ask who is there."""


class Engine(Group):
    """Model"""

    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    """Of the weights, the computation and the embeddings. Both halves need the same."""
    device: str = "cpu"
    """Where the model runs: cpu, cuda, cuda:1."""
    threads: Count | None = None
    """CPU threads that the model takes (default: all cores)."""


class Wire(Group):
    """Transfer"""

    transport: Literal["auto", "shm", "tcp", "mooncake", "nixl"] = "auto"
    """How embeddings travel. auto: shared memory where both sides are on one host, else tcp. mooncake and nixl need their libraries."""


class Encoder(Group):
    """Encoder"""

    control_port: Port = 0
    """Port at which receivers ask for rooms, and of several ranks the first; 0 takes free ones."""
    source_memory: Size = ByteSize(limits.DEFAULT_SOURCE_BYTES)
    """Memory for embeddings that nobody has fetched yet."""
    max_pixels: Count = 64 * 2**20
    """Largest image that is decoded, in pixels."""
    batch_tokens: Count = 16384
    """Tokens of one run of the tower."""
    memory_wait_s: Seconds = 30.0
    """How long a request waits for source memory before it is refused."""


class Media(Group):
    """Media"""

    media_items_max: Count = 64
    """Images and other media of one request."""
    media_item_size: Size = ByteSize(32 * 2**20)
    """Largest file."""
    media_timeout_s: Seconds = 20.0
    """For fetching all media of a request."""
    allow_private_media: bool = False
    """Fetch media from private and loopback addresses too. Only where every user may reach what this host reaches."""


class Language(Group):
    """Language server"""

    num_blocks: Annotated[int, Field(ge=1, le=limits.BLOCKS_MAX)] = limits.DEFAULT_NUM_BLOCKS
    """Blocks of the receive pool. An embedding that does not fit comes in several rounds."""
    block_size: Count = limits.DEFAULT_BLOCK_SIZE
    """Tokens of one block."""
    default_allocate_tokens: Count = limits.DEFAULT_ALLOCATE_TOKENS
    """Most tokens of the first round of an embedding."""
    assembly_memory: Size = ByteSize(limits.DEFAULT_ASSEMBLY_BYTES)
    """Memory for embeddings being received, and received but not yet read by the model."""
    max_batch: Count = 32
    """Answers that are generated at the same time."""
    max_waiting: Count = 256
    """Prompts that wait for their turn; one more is refused."""
    max_cache_tokens: Count = 262_144
    """Bound of the merged key-value cache: answers under way times tokens of the longest."""
    prefill_chunk_tokens: Count | None = None
    """A longer prompt is read in chunks of this many tokens (default: never)."""
    default_max_tokens: Count = 256
    """Longest answer to a request that names no limit."""


class Ranks(Group):
    """Ranks"""

    tensor_parallel_size: Annotated[int, Field(ge=1, le=limits.RANKS_MAX)] = 1
    """Processes of one server, each on a device of its own: the weights of a language server are divided over them, or the images of a
    prompt at an encoder."""
    delivery: Literal["auto", "share", "replicate"] = "auto"
    """How an embedding gets to all ranks of a language server. share: once over the wire, and the ranks of a host read the same memory;
    replicate: each rank receives a copy of its own; auto: share."""
    rank_timeout_s: Seconds = 10.0
    """How long the ranks wait for one of them before they give it up."""
    on_rank_failure: Literal["restart", "exit"] = "restart"
    """What becomes of the other ranks when one is lost: all are started anew, or the server ends."""


class Router(Group):
    """Router"""

    worker_urls: Urls = ()
    """Workers to use without a registry: URLs, separated by commas."""
    requests_max: Count = 1024
    """Requests under way; one more is refused with 503."""
    attempts_max: Count = 3
    """Attempts of a request, each on workers that have not failed it."""
    deadline_s: Seconds = 600.0
    """From the first byte of a request to the last one of its answer."""


class Vllm(Group):
    """vLLM"""

    engine: Literal["transformers", "vllm"] = "transformers"
    """What runs the model: servers of this package, or stock vLLM servers with its connector."""
    media: Literal["bytes", "metadata"] = "bytes"
    """What a vLLM language server gets of a media item: its bytes, or only the shape of its embedding, so that it needs no vision tower."""
    item_deadline_s: Seconds = 30.0
    """How long a media item may take to be encoded, and as long again to arrive at a vLLM language server."""
    remembered_items: Annotated[int, Field(ge=0)] = 4096
    """Recent media items of which the router remembers where they are encoded, so that they are not encoded again."""


class VllmUrls(Group):
    """vLLM servers by URL"""

    encoder: Urls = ()
    """vLLM encoder servers to use without a registry. May be given several times."""
    language: Urls = ()
    """vLLM language servers to use without a registry. May be given several times."""


class VllmServers(Group):
    """vLLM servers to start"""

    vllm_python: str | None = None
    """The Python in whose environment vLLM and this package are installed (default: this one)."""
    vllm_args: str = ""
    """Further arguments of every vLLM server, as on a command line."""
    vllm_encoder_args: str = ""
    """Further arguments of the encoders only."""
    vllm_language_args: str = ""
    """Further arguments of the language servers only."""
    vllm_connector: str = ""
    """Further settings of the connector in every vLLM server, as a JSON object: --vllm-connector '{"peer_silence_s": 1.5}'."""


class Checks(Group):
    """Checks of workers"""

    misses_to_evict: Count = 3
    """Failed checks in a row after which a worker gets no requests."""
    check_interval_s: Seconds = 2.0
    """Time between two checks of a worker, and between two looks at the registry."""


def attribute_docs(cls: type) -> dict[str, str]:
    """The docstrings under a class's attributes, which Python itself does not keep."""
    body = ast.parse(textwrap.dedent(inspect.getsource(cls))).body[0]
    assert isinstance(body, ast.ClassDef)
    found: dict[str, str] = {}
    for field, text in zip(body.body, body.body[1:], strict=False):
        if (
            isinstance(field, ast.AnnAssign)
            and isinstance(field.target, ast.Name)
            and isinstance(text, ast.Expr)
        ):
            found[field.target.id] = inspect.cleandoc(ast.literal_eval(text.value))
    return found


def _bounds() -> type[Group]:
    texts = attribute_docs(Limits)
    kinds: Mapping[str, Any] = {"float": Seconds, "int": Count}
    made = {
        f.name: (kinds[str(f.type)], Field(f.default, description=texts.get(f.name))) for f in fields(Limits)
    }
    return create_model("Bounds", __base__=Group, __doc__="Time-outs and bounds", **made)  # type: ignore[call-overload,no-any-return]


Bounds = _bounds()
"""The fields of :class:`embedwire.limits.Limits`, with its defaults and texts."""

GROUPS: tuple[type[Group], ...] = (
    Server, Member, Engine, Wire, Encoder, Media, Language, Ranks, Router, Vllm, VllmUrls, VllmServers, Checks, Bounds,
)  # fmt: skip

PREFIX = "EMBEDWIRE_"
CONFIG_VARIABLE = "EMBEDWIRE_CONFIG"


class Settings(
    Bounds,  # type: ignore[misc,valid-type]
    Checks,
    VllmServers,
    VllmUrls,
    Vllm,
    Router,
    Ranks,
    Language,
    Media,
    Encoder,
    Wire,
    Engine,
    Member,
    Server,
    BaseSettings,
):
    """All settings, checked. Created by :func:`embedwire.cli.options.load`."""

    model_config = SettingsConfigDict(
        env_prefix=PREFIX, extra="forbid", frozen=True, use_attribute_docstrings=True
    )

    @property
    def transports(self) -> tuple[str, ...] | None:
        """The transports to offer; None for the built-in ones."""
        return None if self.transport == "auto" else (self.transport,)

    @property
    def limits(self) -> Limits:
        """The timeouts and limits for the endpoints. Raises ConfigurationError when two contradict each other."""
        return Limits(**{f.name: getattr(self, f.name) for f in fields(Limits)})


def variable(name: str) -> str:
    """The environment variable of a setting."""
    return PREFIX + name.upper()


def variables(**values: object) -> dict[str, str]:
    """Settings for the environment of a child process: ``variables(port=0)`` is ``{"EMBEDWIRE_PORT": "0"}``."""
    return {variable(name): _as_text(value) for name, value in values.items()}


def _as_text(value: object) -> str:
    return ",".join(value) if isinstance(value, list | tuple) else str(value)
