"""Which tests show a failure mode or an invariant, by their markers ``failure_mode`` and ``invariant``.

Reads the test files as syntax trees and imports none of them, so it needs neither torch nor vLLM. Used by ``generate.py``.
A marker may decorate a function, a class or one ``pytest.param`` of a function, and may be in ``pytestmark`` of a module or class.
Its arguments are literal ids.
"""

from __future__ import annotations

import ast
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

KINDS = ("failure_mode", "invariant")


@dataclass(frozen=True, slots=True, order=True)
class MarkedTest:
    """One test (``name``, with its class) in ``file`` that shows what ``kind`` and ``id`` name."""

    kind: str
    id: str
    file: str
    name: str


def marked_tests(root: Path) -> list[MarkedTest]:
    """All marks of the tests in ``root/tests``: files in alphabetical order, tests in the order of the file."""
    files = sorted((root / "tests").rglob("test_*.py"))
    return [mark for file in files for mark in marks_of(file.read_text(), str(file.relative_to(root)))]


def marks_of(source: str, file: str) -> list[MarkedTest]:
    """The marks of one file. Raises ValueError for a marker with an argument that is no literal, or where this module does not look."""
    tree = ast.parse(source, filename=file)
    calls = {call for call in ast.walk(tree) if isinstance(call, ast.Call) and kind_of(call)}
    for call in calls:
        if not ids_of(call):
            raise ValueError(f"{file}:{call.lineno}: a marker takes literal ids")
    found = list(in_body(tree.body, prefix="", inherited=[]))
    for call in calls - {call for call, _ in found}:
        raise ValueError(
            f"{file}:{call.lineno}: a marker that belongs to no test; use a decorator or pytestmark"
        )
    marks = (MarkedTest(kind_of(call), id, file, name) for call, name in found for id in ids_of(call))
    return list(dict.fromkeys(marks))


def in_body(
    body: list[ast.stmt], *, prefix: str, inherited: list[ast.Call]
) -> Iterator[tuple[ast.Call, str]]:
    """Pairs of a marker and the name of a test of a module or class that has it."""
    inherited = inherited + [call for node in body for call in pytestmark_of(node, "")]
    for node in body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.name.startswith("test"):
            for call in inherited + calls_in(node.decorator_list):
                yield call, prefix + node.name
        elif isinstance(node, ast.ClassDef) and node.name.startswith("Test"):
            below = inherited + calls_in(node.decorator_list)
            yield from in_body(node.body, prefix=f"{prefix}{node.name}.", inherited=below)
        elif isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Attribute):
            owner = ast.unparse(node.targets[0].value)
            for call in pytestmark_of(node, f"{owner}."):
                yield call, prefix + owner


def pytestmark_of(node: ast.stmt, owner: str) -> list[ast.Call]:
    """The markers in ``pytestmark = …``, or in ``Owner.pytestmark = …`` of a class that a library made."""
    if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == f"{owner}pytestmark":
        return calls_in([node.value])
    return []


def calls_in(nodes: Iterable[ast.expr]) -> list[ast.Call]:
    return [call for node in nodes for call in ast.walk(node) if isinstance(call, ast.Call) and kind_of(call)]


def kind_of(node: ast.AST) -> str:
    """``failure_mode`` for a call of ``pytest.mark.failure_mode``; empty for anything else."""
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in KINDS:
        return node.func.attr if ast.unparse(node.func.value).endswith("mark") else ""
    return ""


def ids_of(call: ast.Call) -> list[str]:
    """The ids of a marker; empty where one of them is no literal."""
    ids = [arg.value for arg in call.args if isinstance(arg, ast.Constant) and isinstance(arg.value, str)]
    return ids if len(ids) == len(call.args) and not call.keywords else []


def listing(marks: Iterable[MarkedTest]) -> str:
    """A Markdown list of tests, one item a file."""
    files: dict[str, list[str]] = {}
    for mark in marks:
        files.setdefault(mark.file, []).append(f"`{mark.name}`")
    return "\n".join(f"- `{file}`: {', '.join(names)}" for file, names in files.items())
