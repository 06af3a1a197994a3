"""Failure modes and invariants on the pages against the markers of the tests, and the reader of those markers."""

from __future__ import annotations

import re
from pathlib import Path
from types import ModuleType

import pytest
from marked_tests import marked_tests, marks_of


def failure_modes(root: Path) -> dict[str, str]:
    """The text behind each id of the page."""
    _, *parts = re.split(r"^### (.+)\n", (root / "docs" / "failure-modes.md").read_text(), flags=re.MULTILINE)
    return dict(zip(parts[::2], parts[1::2], strict=True))


def ids_in_markers(root: Path, kind: str) -> set[str]:
    return {mark.id for mark in marked_tests(root) if mark.kind == kind}


def test_every_failure_mode_of_a_marker_is_on_the_page(root: Path) -> None:
    assert ids_in_markers(root, "failure_mode") - failure_modes(root).keys() == set()


def test_every_failure_mode_has_a_test_or_says_that_it_has_none(root: Path) -> None:
    marked = ids_in_markers(root, "failure_mode")
    for id, text in failure_modes(root).items():
        assert ("No test yet." in text) != (id in marked), id
        assert (f"<!-- generated: failure-mode-{id} -->" in text) == (id in marked), id


def test_ids_are_unique_and_say_what_the_system_does(root: Path) -> None:
    heads = re.findall(r"^### (.+)$", (root / "docs" / "failure-modes.md").read_text(), re.MULTILINE)
    assert len(heads) == len(set(heads)) > 50
    for id, text in failure_modes(root).items():
        assert re.fullmatch(r"[a-z]+(-[a-z]+)*", id)
        assert re.match(
            r"\n\*\*Fault\.\*\* .+\n\n\*\*Embedwire\.\*\* ", re.sub(r"(?<=\S)\n(?=\S)", " ", text)
        ), id


def test_every_invariant_has_a_test(root: Path) -> None:
    text = (root / "docs" / "protocol.md").read_text()
    stated = re.findall(r"^\*\*I(\d+) `([a-z-]+)`\.\*\* ", text, re.MULTILINE)
    assert [int(number) for number, _ in stated] == list(range(1, 11))
    assert {id for _, id in stated} == ids_in_markers(root, "invariant")


def test_a_test_that_lost_its_marker_makes_the_page_stale(generate: ModuleType, root: Path) -> None:
    """The control of the test of freshness."""
    text = (root / "docs" / "failure-modes.md").read_text()
    assert generate.rendered(text.replace("`test_resume_is_triggered`", "`test_other`")) == text


MARKED = """
import pytest

pytestmark = [pytest.mark.e2e, pytest.mark.failure_mode("of-module")]

@pytest.mark.failure_mode("first", "second")
@pytest.mark.invariant("third")
def test_function(): ...

@pytest.mark.parametrize("n", [1, pytest.param(2, marks=pytest.mark.failure_mode("of-param"))])
async def test_parametrized(n): ...

@pytest.mark.failure_mode("of-class")
class TestClass:
    pytestmark = pytest.mark.invariant("of-body")

    @pytest.mark.failure_mode("of-method", "of-class")
    def test_method(self): ...

    def helper(self): ...

TestMachine = make()
TestMachine.pytestmark = [pytest.mark.invariant("of-machine")]

def helper(): ...
"""


def test_markers_of_functions_parameters_classes_and_modules() -> None:
    found: dict[str, list[str]] = {}
    for mark in marks_of(MARKED, "tests/test_x.py"):
        assert mark.file == "tests/test_x.py"
        found.setdefault(mark.name, []).append(f"{mark.kind} {mark.id}")
    assert found == {
        "test_function": [
            "failure_mode of-module", "failure_mode first", "failure_mode second", "invariant third",
        ],
        "test_parametrized": ["failure_mode of-module", "failure_mode of-param"],
        "TestClass.test_method": [
            "failure_mode of-module", "failure_mode of-class", "invariant of-body", "failure_mode of-method",
        ],
        "TestMachine": ["invariant of-machine"],
    }  # fmt: skip


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("@pytest.mark.failure_mode(NAME)\ndef test_a(): ...", "a marker takes literal ids"),
        ("@pytest.mark.failure_mode()\ndef test_a(): ...", "a marker takes literal ids"),
        ("@pytest.mark.failure_mode(id='a')\ndef test_a(): ...", "a marker takes literal ids"),
        ("@pytest.mark.invariant('a')\ndef helper(): ...", "a marker that belongs to no test"),
        ("shows = pytest.mark.failure_mode('a')", "a marker that belongs to no test"),
    ],
)
def test_a_marker_that_would_be_missed_is_an_error(source: str, words: str) -> None:
    with pytest.raises(ValueError, match=rf"tests/test_x\.py:1: {words}"):
        marks_of(source, "tests/test_x.py")
