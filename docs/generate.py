"""Writes the parts of the pages that follow from the code, so that they can not lag behind it.

A page marks such a part with ``<!-- generated: NAME -->`` and ``<!-- end -->``; ``REGIONS`` maps the name to what makes it. Run by
``make docs``, which rewrites the pages, and by the tests, which fail where a page is stale::

    python docs/generate.py
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import fields
from enum import Enum
from functools import cache, partial
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

import msgspec
from marked_tests import MarkedTest, listing, marked_tests
from msgspec import inspect

from embedwire import errors
from embedwire.bench.transfer import Case
from embedwire.cli.options import shown
from embedwire.cli.settings import GROUPS, Bounds, attribute_docs, variable
from embedwire.encode import EncodeStats
from embedwire.endpoint import ReceiverStats, SenderStats
from embedwire.engines.vllm.settings import ConnectorSettings
from embedwire.language import LanguageStats
from embedwire.limits import Limits
from embedwire.protocol import messages, states
from embedwire.protocol.topology import delivery_table
from embedwire.serve.faults import fault_of
from embedwire.serve.metrics import AppMetrics
from embedwire.testing.sim_link import Envelope
from embedwire.testing.simulation import World
from embedwire.transports.contract import Piece
from embedwire.transports.tcp import frames

DOCS = Path(__file__).parent
MARK = re.compile(r"(<!-- generated: (?P<name>[a-z-]+) -->\n).*?(<!-- end -->)", re.DOTALL)


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    return "\n".join("| " + " | ".join(row) + " |" for row in (head, ["---"] * len(head), *rows))


def fenced(kind: str, lines: Iterable[str]) -> str:
    """A fenced block."""
    return "\n".join([f"```{kind}", *lines, "```"])


def one_line(text: str | None) -> str:
    """A docstring in one cell of a table, its Sphinx roles as plain code."""
    text = " ".join((text or "").split()).replace("``", "`").replace("|", "\\|")
    return re.sub(r":\w+:`[~.\w]*?(\w+)`", r"`\1`", text)


# ---------------------------------------------------------------------- states


def diagram(transitions: Mapping[Any, Any], first: Enum, last: Iterable[Enum]) -> str:
    """A state table as a Mermaid diagram."""
    lines = [
        f"    {before.value} --> {after.value}: {event.value}"
        for (before, event), after in transitions.items()
    ]
    ends = [f"    {state.value} --> [*]" for state in sorted(last, key=lambda s: s.value)]
    return fenced("mermaid", ["stateDiagram-v2", f"    [*] --> {first.value}", *lines, *ends])


def sender_diagram() -> str:
    return diagram(states.SENDER_TABLE, states.SenderState.OFFERED, states.SENDER_TERMINAL)


def receiver_diagram() -> str:
    return diagram(states.RECEIVER_TABLE, states.ReceiverState.OPENING, states.RECEIVER_TERMINAL)


def sender_states() -> str:
    rows = [
        (s.value, states.POLL_OF[s].name, yes(s in states.HOLDS_SOURCE), yes(s in states.SENDER_TERMINAL))
        for s in states.SenderState
    ]
    return table(("state", "poll", "holds the source", "final"), rows)


def receiver_states() -> str:
    sets = (states.LIVE, states.HOLDS_BLOCKS, states.PEER_MAY_WRITE, states.RECEIVER_TERMINAL)
    rows = [
        (s.value, states.POLL_OF[s].name, *(yes(s in chosen) for chosen in sets))
        for s in states.ReceiverState
    ]
    return table(("state", "poll", "live", "holds blocks", "the peer may write", "final"), rows)


def polls() -> str:
    rows = [
        (str(poll.value), poll.name, ", ".join(s.value for s, p in states.POLL_OF.items() if p is poll))
        for poll in states.Poll
    ]
    return table(("value", "poll", "states of either side"), [(v, n, unique(s)) for v, n, s in rows])


def yes(holds: bool) -> str:
    return "yes" if holds else ""


def unique(names: str) -> str:
    return ", ".join(dict.fromkeys(names.split(", ")))


# ---------------------------------------------------------------------- messages


def message_list() -> str:
    """Every message with its fields, receiver's first."""
    parts = []
    for who, union in (
        ("Receiver to sender", messages.ToSender),
        ("Sender to receiver", messages.ToReceiver),
    ):
        parts += [f"### {who}", *(message(kind) for kind in get_args(union))]
    return "\n\n".join(parts)


def message(kind: type[messages.Message]) -> str:
    described = inspect.type_info(kind)
    assert isinstance(described, inspect.StructType)
    common = set(messages.RoomMessage.__struct_fields__)
    rows = [
        (f"`{field.name}`", type_in_words(field.type), default_in_words(field))
        for field in described.fields
        if field.name not in common
    ]
    belongs = " Belongs to a room." if issubclass(kind, messages.RoomMessage) else ""
    head = f"**`{described.tag}`** {one_line(kind.__doc__)}{belongs}"
    return "\n\n".join([head, table(("field", "type and range", "default"), rows)] if rows else [head])


def common_fields() -> str:
    described = inspect.type_info(messages.RoomMessage)
    assert isinstance(described, inspect.StructType)
    always = messages.Message.__struct_fields__
    rows = [
        (f"`{f.name}`", type_in_words(f.type), "every message" if f.name in always else "messages of a room")
        for f in described.fields
    ]
    return table(("field", "type and range", "in"), rows)


def type_in_words(kind: inspect.Type) -> str:
    match kind:
        case inspect.IntType():
            high = kind.le if kind.le is not None else None if kind.lt is None else kind.lt - 1
            return f"integer {power(kind.ge or 0)} … {power(2**64 - 1 if high is None else high)}"
        case inspect.FloatType():
            return "number, at least 0"
        case inspect.StrType():
            return f"text, at most {kind.max_length} characters"
        case inspect.BytesType():
            return f"at most {kind.max_length} bytes"
        case inspect.BoolType():
            return "true or false"
        case inspect.EnumType():
            return f"one of `{kind.cls.__name__}`"
        case inspect.TupleType():
            return "pair of (" + "; ".join(type_in_words(t) for t in kind.item_types) + ")"
        case inspect.VarTupleType():
            length = f"{kind.min_length or 0} … {power(kind.max_length or 0)}"
            if kind.min_length == kind.max_length:
                length = str(kind.min_length)
            return f"list of {length}: {type_in_words(kind.item_type)}"
    raise TypeError(f"no words for {kind}")


def default_in_words(field: inspect.Field) -> str:
    if field.required:
        return ""
    return "empty" if field.default in ("", ()) else f"`{msgspec.json.encode(field.default).decode()}`"


def power(number: int) -> str:
    """Large bounds as people know them."""
    size = abs(number)
    if size < 2**16:
        return str(number)
    sign = "-" if number < 0 else ""
    if size & (size - 1) == 0:
        return f"{sign}2^{size.bit_length() - 1}"
    return f"{sign}2^{(size + 1).bit_length() - 1} - 1" if size & (size + 1) == 0 else str(number)


# ---------------------------------------------------------------------- worked examples


@cache
def example() -> tuple[Envelope, ...]:
    """What the two cores really say: room 7, 300 tokens, a pool of two blocks of 128, in virtual time."""
    world = World(seed=0, limits=Limits(window_rounds=1))
    world.add_sender()
    world.add_receiver(num_blocks=2, block_size=128)
    world.request(7, 300, source_s=0.05)
    world.settle()
    return tuple(world.link.sent)


def exchange() -> str:
    rows = []
    for number, envelope in enumerate(example(), 1):
        to_sender = envelope.origin.startswith("language")
        content = msgspec.to_builtins(envelope.message)
        kind = content.pop("type")
        skipped = {
            "source",
            "target",
            "room",
            "attempt",
            "version",
            "nonce",
            "fields",
            "wires",
            "content_hash",
        }
        told = ", ".join(f"{name} {brief(v)}" for name, v in content.items() if name not in skipped)
        arrow = "receiver → sender" if to_sender else "sender → receiver"
        nbytes = str(len(messages.encode(envelope.message)))
        rows.append((str(number), arrow, f"`{kind}`", told, nbytes))
    return table(("", "way", "message", "what it says", "bytes"), rows)


def brief(value: object) -> str:
    if isinstance(value, list | tuple):
        items = list(value)
        while len(items) > 3 and items[-1] == items[-2] == 0:
            items.pop()
        more = ", …" if len(items) < len(value) else ""
        return "[" + ", ".join(map(str, items)) + more + "]"
    return str(value).lower() if isinstance(value, bool) else str(value) or "empty"


def resume_bytes() -> str:
    return in_bytes(next(e.message for e in example() if isinstance(e.message, messages.ResumeTransfer)))


def status_bytes() -> str:
    return in_bytes(next(e.message for e in example() if isinstance(e.message, messages.Status)))


def in_bytes(message: messages.Message) -> str:
    """A frame key by key; the lines together are the frame, which is checked here."""
    frame = messages.encode(message)
    content = msgspec.to_builtins(message)
    lines = [(frame[:1], f"a map of {len(content)}")]
    for name, value in content.items():
        encode = msgspec.msgpack.encode
        lines.append((encode(name) + encode(value), f"{name}: {brief(value)}"))
    assert b"".join(part for part, _ in lines) == frame
    return fenced("text", [line for part, note in lines for line in hex_lines(part, note)])


def hex_lines(part: bytes, note: str, *, width: int = 24) -> list[str]:
    chunks = [part[at : at + width].hex(" ") for at in range(0, len(part), width)]
    return [f"{chunk:<{width * 3 + 1}}{note if at == 0 else ''}".rstrip() for at, chunk in enumerate(chunks)]


def tcp_frame() -> str:
    """A frame of two pieces, five bytes, and the answer to it."""
    pieces = [Piece(memoryview(b"abc"), 4096), Piece(memoryview(b"de"), 8192)]
    (runs,) = frames.split(pieces)
    head, *payload = frames.encode_frame(2, 1, runs)
    cuts = (
        (head[:4], "magic EWf1"),
        (head[4:12], "ticket 2"),
        (head[12:16], "frame 1"),
        (head[16:20], "2 pieces"),
        *(
            (head[20 + 16 * n : 36 + 16 * n], f"offset {offset}, length {len(run)}")
            for n, (run, offset) in enumerate(runs)
        ),
        *((bytes(run), bytes(run).decode()) for run in payload),
        (frames.encode_ack(2, 1, verdict=frames.LANDED), "the answer: EWa1, ticket 2, frame 1, landed"),
    )
    return fenced("text", [line for part, note in cuts for line in hex_lines(bytes(part), note)])


# ---------------------------------------------------------------------- settings, metrics, errors


def limits_table() -> str:
    rows = [
        (f"`{name}`", shown(f.default), one_line(f.description)) for name, f in Bounds.model_fields.items()
    ]
    return table(("name", "default", "meaning"), rows)


def settings_list() -> str:
    parts = []
    for group in GROUPS:
        rows = [
            (f"`{name}`", f"`{variable(name)}`", default_of(field.default), one_line(field.description))
            for name, field in group.model_fields.items()
        ]
        parts += [f"## {group.__doc__}", table(("setting", "variable", "default", "meaning"), rows)]
    return "\n\n".join(parts)


def connector_settings() -> str:
    """What ``ec_connector_extra_config`` takes."""
    texts = attribute_docs(ConnectorSettings)
    rows = (
        (f"`{name}`", f"`{msgspec.json.encode(default).decode()}`", one_line(texts[name]))
        for name, default in msgspec.structs.asdict(ConnectorSettings()).items()
    )
    return table(("name", "default", "meaning"), rows)


def default_of(value: object) -> str:
    return "none" if value is None or value == () else shown(value)


SNAPSHOTS: Mapping[str, Mapping[str, type]] = {
    "encoder": {"sender": SenderStats, "encode": EncodeStats},
    "language": {"receiver": ReceiverStats, "language": LanguageStats},
    "router": {},
}
"""Which snapshots a server's metrics show, and their prefix."""


def metrics_list() -> str:
    common = {family.name for family in AppMetrics().registry.collect()}
    parts = ["## Every server", metrics_table(AppMetrics(), lambda name: name in common)]
    for server, snapshots in SNAPSHOTS.items():
        if snapshots:
            metrics = AppMetrics(
                {prefix: partial(empty_snapshot, kind) for prefix, kind in snapshots.items()}
            )
            parts += [f"## {server.capitalize()}", metrics_table(metrics, lambda name: name not in common)]
    return "\n\n".join(parts)


LABELS = {"embedwire_requests": ("route", "status"), "embedwire_retries": ("code",)}
"""Of metrics that have no sample before the first request."""


def metrics_table(metrics: AppMetrics, belongs: Callable[[str], bool]) -> str:
    rows = []
    for family in metrics.registry.collect():
        if belongs(family.name):
            name = family.name + ("_total" if family.type == "counter" else "")
            found = {label for sample in family.samples for label in sample.labels} - {"le"}
            labels = ", ".join(LABELS.get(family.name, sorted(found)))
            rows.append((f"`{name}`", family.type, labels, family.documentation))
    return table(("metric", "type", "labels", "meaning"), rows)


def empty_snapshot(kind: type) -> object:
    """A snapshot of zeros, with one key in each mapping so that its label shows."""
    hints = get_type_hints(kind)
    is_map = {f.name: get_origin(hints[f.name]) is Mapping for f in fields(kind)}
    return kind(**{name: {"…": 0} if mapping else 0 for name, mapping in is_map.items()})


def bench_case() -> str:
    return ", ".join(f"`{field.name}`" for field in fields(Case)) + "."


def lanes_table() -> str:
    pairs = ((1, 1), (1, 4), (2, 8), (4, 4), (4, 2), (8, 2), (4, 6), (6, 4), (3, 2))
    return table(
        ("encoder ranks → readers", "reader ← encoder ranks", "lanes of an encoder rank, at most"),
        delivery_table(pairs),
    )


def collectives_table() -> str:
    """Counted in a simulated world: one room through a pool of one block on each of so many ranks."""
    rows = [
        (str(rounds), *(str(collectives(rounds, ranks)) for ranks in (2, 4, 8)), f"{rounds} more")
        for rounds in (1, 2, 10, 50)
    ]
    return table(("rounds of a room", "2 ranks", "4 ranks", "8 ranks", "one a round besides would be"), rows)


def collectives(rounds: int, ranks: int) -> int:
    world = World(limits=Limits(window_rounds=1))
    world.add_sender()
    group = world.add_group(size=ranks, num_blocks=1)
    transfer = world.request(1, rounds * 128)
    world.settle()
    assert transfer.is_done
    assert len(transfer.rounds) == rounds
    return group.collectives


def errors_table() -> str:
    logging.getLogger("embedwire.serve.faults").disabled = True  # what it has no answer for, it logs
    rows = []
    for depth, kind in walk(errors.EmbedwireError):
        status = "its own, 4xx" if kind is errors.InvalidRequestError else str(fault_of(kind("x")).status)
        if kind is errors.TransferError:
            status = "by its cause"
        name = "&nbsp;" * 4 * depth + f"`{kind.__name__}`"
        rows.append((name, one_line(kind.__doc__), yes(kind.may_retry), status))
    return table(("error", "meaning", "may be tried again", "HTTP"), rows)


def walk(
    kind: type[errors.EmbedwireError], depth: int = 0
) -> Iterable[tuple[int, type[errors.EmbedwireError]]]:
    yield depth, kind
    for child in kind.__subclasses__():
        if child.__module__ == errors.__name__:
            yield from walk(child, depth + 1)


# ---------------------------------------------------------------------- failure modes and invariants

FAULT = re.compile(r"^(?:## (?P<part>.+)|### (?P<id>[a-z-]+))$", re.MULTILINE)


def failure_modes_table() -> str:
    """The headings of the page of failure modes, with the number of tests of each."""
    parts: dict[str, list[str]] = {}
    for found in FAULT.finditer((DOCS / "failure-modes.md").read_text()):
        if found["part"]:
            part = parts.setdefault(found["part"], [])
        else:
            count = len(set(MARKED.get(f"failure-mode-{found['id']}", ())))
            part.append(f"[{found['id']}](#{found['id']}) ({count})")
    return table(("part", "failure modes (tests)"), ((p, ", ".join(ids)) for p, ids in parts.items() if ids))


def tests_by_region() -> Mapping[str, list[MarkedTest]]:
    """Marked tests by the name of the generated part that lists them, such as ``invariant-alignment``."""
    regions: dict[str, list[MarkedTest]] = {}
    for mark in marked_tests(DOCS.parent):
        regions.setdefault(f"{mark.kind.replace('_', '-')}-{mark.id}", []).append(mark)
    return regions


MARKED = tests_by_region()


REGIONS: Mapping[str, Callable[[], str]] = {
    "sender-diagram": sender_diagram,
    "sender-states": sender_states,
    "receiver-diagram": receiver_diagram,
    "receiver-states": receiver_states,
    "polls": polls,
    "common-fields": common_fields,
    "messages": message_list,
    "exchange": exchange,
    "resume-bytes": resume_bytes,
    "status-bytes": status_bytes,
    "tcp-frame": tcp_frame,
    "limits": limits_table,
    "settings": settings_list,
    "metrics": metrics_list,
    "bench-case": bench_case,
    "connector-settings": connector_settings,
    "errors": errors_table,
    "lanes": lanes_table,
    "collectives": collectives_table,
    "failure-modes": failure_modes_table,
    **{name: partial(listing, marks) for name, marks in MARKED.items()},
}


def rendered(text: str) -> str:
    """A page with all its generated parts made anew. Raises KeyError for a part that nobody makes."""
    return MARK.sub(lambda found: f"{found[1]}\n{REGIONS[found['name']]()}\n\n{found[3]}", text)


def stale_pages() -> list[Path]:
    """Pages that differ from what the code says now."""
    return [page for page in sorted(DOCS.rglob("*.md")) if rendered(page.read_text()) != page.read_text()]


def main() -> None:
    """Rewrite every stale page."""
    for page in stale_pages():
        page.write_text(rendered(page.read_text()))
        print(f"rewrote {page.relative_to(DOCS.parent)}")


if __name__ == "__main__":
    main()
