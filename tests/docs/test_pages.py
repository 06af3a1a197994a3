"""Pages against the code and against each other: generated parts, links, names, the example."""

from __future__ import annotations

import ast
import importlib
import re
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import msgspec
import pytest

from embedwire.limits import PROTOCOL_VERSION
from embedwire.protocol import messages
from embedwire.protocol.messages import Cause
from embedwire.protocol.states import ReceiverState, SenderState
from embedwire.serve.faults import TRANSFER_STATUS
from embedwire.transports.tcp import frames

LINK = re.compile(r"\[[^\]]+\]\((?P<target>[^)\s]+)\)")
FENCE = re.compile(r"^```.*?^```$", re.DOTALL | re.MULTILINE)
QUOTED = re.compile(r"`((?:src|tests|docs|examples|testing|memory|protocol|transports|endpoint|encode|language|"
                    r"engines|serve|cli|bench)/[\w./-]*)(?:::(\w+))?`")  # fmt: skip


def anchors(page: Path) -> set[str]:
    """What ``#…`` may name in a page, as the usual renderers make it."""
    heads = re.findall(r"^#+ (.+)$", FENCE.sub("", page.read_text()), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}


def test_generated_parts_are_fresh(generate: ModuleType, root: Path) -> None:
    stale = [str(page.relative_to(root)) for page in generate.stale_pages()]
    assert stale == [], "run `make docs`"


def test_every_generated_part_is_used_once(generate: ModuleType, pages: list[Path]) -> None:
    found = [match["name"] for page in pages for match in generate.MARK.finditer(page.read_text())]
    assert sorted(found) == sorted(generate.REGIONS)


def test_a_stale_part_is_seen(generate: ModuleType, root: Path) -> None:
    """The control of the test above."""
    text = (root / "docs" / "states.md").read_text()
    assert generate.rendered(text.replace("offered --> announced", "offered --> done", 1)) == text


def test_the_version_of_the_protocol_is_said(root: Path) -> None:
    assert f"\nVersion {PROTOCOL_VERSION}. " in (root / "docs" / "protocol.md").read_text()
    assert f"\n- Protocol version {PROTOCOL_VERSION}: " in (root / "CHANGELOG.md").read_text()


def test_links_lead_somewhere(pages: list[Path]) -> None:
    broken = []
    for page in pages:
        for match in LINK.finditer(FENCE.sub("", page.read_text())):
            target, _, anchor = match["target"].partition("#")
            if target.startswith(("http://", "https://")):
                continue
            there = (page.parent / target).resolve() if target else page
            if not there.exists() or (anchor and anchor not in anchors(there)):
                broken.append(f"{page.name}: {match['target']}")
    assert broken == []


def test_every_page_is_linked(pages: list[Path], root: Path) -> None:
    """From README.md, over any number of pages."""
    seen: set[Path] = set()
    ahead = [root / "README.md"]
    while ahead:
        page = ahead.pop()
        if page in seen or page.suffix != ".md":
            continue
        seen.add(page)
        targets = (match["target"].partition("#")[0] for match in LINK.finditer(page.read_text()))
        ahead += [(page.parent / t).resolve() for t in targets if t and not t.startswith("http")]
    assert {page.resolve() for page in pages} - seen == set()


def test_files_and_tests_that_pages_name_exist(pages: list[Path], root: Path) -> None:
    missing = []
    for page in pages:
        for name, member in QUOTED.findall(FENCE.sub("", page.read_text())):
            found = next(
                (base / name for base in (root, root / "src" / "embedwire") if (base / name).exists()), None
            )
            if found is None or (member and f"def {member}" not in found.read_text()):
                missing.append(f"{page.name}: {name} {member}".strip())
    assert missing == []


def test_readme_shows_the_example(root: Path) -> None:
    blocks = re.findall(r"^```python\n(.*?)^```$", (root / "README.md").read_text(), re.DOTALL | re.MULTILINE)
    assert (root / "examples" / "two_processes.py").read_text() in blocks


def test_python_on_pages_parses_and_imports_what_there_is(pages: list[Path]) -> None:
    for page in pages:
        for block in re.findall(r"^```python\n(.*?)^```$", page.read_text(), re.DOTALL | re.MULTILINE):
            for node in ast.walk(ast.parse(block, filename=page.name)):
                if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("embedwire"):
                    module = importlib.import_module(node.module or "")
                    assert all(hasattr(module, alias.name) for alias in node.names), f"{page.name}: {block}"


def test_every_cause_is_explained_with_its_status(root: Path) -> None:
    rows = re.findall(r"^\| `(\w+)` \| .+ \| (\d*) ?\|$", causes_of(root), re.MULTILINE)
    expected = {c.value: str(TRANSFER_STATUS.get(c.value, 502)) for c in Cause} | {"done": ""}
    assert dict(rows) == expected


def causes_of(root: Path) -> str:
    text = (root / "docs" / "reference" / "errors.md").read_text()
    return text.partition("## Causes")[2].partition("## HTTP")[0]


def test_every_code_of_an_http_error_is_explained(root: Path) -> None:
    text = (root / "docs" / "reference" / "errors.md").read_text().partition("## HTTP")[2]
    explained = set(re.findall(r"`([a-z_]+)`", text))
    sources = (root / "src" / "embedwire").rglob("*.py")
    used = {code for source in sources for code in re.findall(r'code="([a-z_]+)"', source.read_text())}
    assert used - explained == set()


def test_states_show_every_state(root: Path) -> None:
    text = (root / "docs" / "states.md").read_text()
    for state in (*SenderState, *ReceiverState):
        assert f"| {state.value} |" in text


def hex_of(text: str, heading: str) -> bytes:
    """The bytes of the first block behind ``heading``: the columns left of the notes."""
    block = text.partition(heading)[2].partition("```text\n")[2].partition("```")[0]
    return bytes.fromhex("".join(line[:72] for line in block.splitlines()))


@pytest.mark.parametrize(
    ("heading", "decode", "tag"),
    [
        ("Message 8, `resume_transfer`", messages.decode_for_sender, "resume_transfer"),
        ("Message 7, the `status`", messages.decode_for_receiver, "status"),
    ],
)
def test_bytes_on_the_page_are_messages(
    root: Path, heading: str, decode: Callable[[bytes], messages.RoomMessage], tag: str
) -> None:
    """What the page shows decodes to the message that it names, and encodes to the same bytes again."""
    text = (root / "docs" / "protocol.md").read_text()
    shown = hex_of(text, heading)
    message = decode(shown)
    assert msgspec.to_builtins(message)["type"] == tag
    assert message.key == messages.RoomKey(7)
    assert messages.encode(message) == shown
    number = heading.partition(",")[0].removeprefix("Message ")
    assert re.search(rf"^\| {number} \| .+ \| `{tag}` \| .* \| {len(shown)} \|$", text, re.MULTILINE)


@pytest.mark.failure_mode("grant-not-whole-blocks")
@pytest.mark.invariant("alignment")
def test_the_grant_on_the_page_announces_whole_blocks(root: Path) -> None:
    """The example on the page announces 128 tokens for the remaining 44."""
    text = (root / "docs" / "protocol.md").read_text()
    grant = messages.decode_for_sender(hex_of(text, "Message 8, `resume_transfer`"))
    assert isinstance(grant, messages.ResumeTransfer)
    assert (grant.round, grant.start_token, grant.allocated_tokens) == (
        1,
        256,
        len(grant.block_indices) * 128,
    )


def test_the_tcp_frame_on_the_page_is_one(root: Path) -> None:
    shown = hex_of((root / "docs" / "protocol.md").read_text(), "A frame of two pieces, and the answer:")
    head, table = frames.HEADER_BYTES, frames.HEADER_BYTES + 2 * frames.PIECE_BYTES
    assert frames.decode_header(shown[:head]) == (2, 1, 2)
    assert frames.decode_table(shown[head:table]) == [(4096, 3), (8192, 2)]
    assert shown[table : table + 5] == b"abcde"
    assert frames.decode_ack(shown[table + 5 :]) == (2, 1, True)


def test_the_size_of_a_long_grant_is_as_the_page_says(root: Path) -> None:
    """A million tokens in blocks of 128."""
    count = -(-1_000_000 // 128)
    grant = messages.Init(
        source=1, target=2, room=3, round=0, start_token=0, allocated_tokens=count * 128,
        block_indices=tuple(range(count)), ticket=1,
    )  # fmt: skip
    text = (root / "docs" / "protocol.md").read_text()
    said = re.search(r"blocks of 128 are ([\d,]+) indices, about (\d+) KB", text)
    assert said is not None
    assert (said[1], int(said[2])) == (f"{count:,}", round(len(messages.encode(grant)) / 1000))
