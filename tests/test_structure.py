"""What import-linter does not see: no circle of imports, and nothing outside a core reads inside it."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import grimp
import pytest

import embedwire
from embedwire.protocol import actions

SOURCE = Path(embedwire.__file__).parent
DRIVERS = [path for package in ("endpoint", "group") for path in sorted((SOURCE / package).glob("*.py"))]
CORES = ("core", "_core", "coordinator", "_coordinator")
ORDERS = (*actions.SenderAction.__args__, *actions.ReceiverAction.__args__)


def circles(imports: dict[str, set[str]]) -> set[str]:
    """The modules from which a chain of imports leads back to themselves, and those that lie between such."""
    left = dict(imports)
    while True:
        imported = set().union(*left.values()) if left else set()
        ends = {name for name, targets in left.items() if not targets & left.keys() or name not in imported}
        if not ends:
            return set(left)
        left = {name: targets for name, targets in left.items() if name not in ends}


def reads_inside_a_core(code: str) -> Iterator[str]:
    """Each use of an attribute of a core or coordinator that is no call of a public method."""
    tree = ast.parse(code)
    calls = {id(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and ast.unparse(node.value).split(".")[-1] in CORES:
            is_method = id(node) in calls and not node.attr.startswith("_")
            if not is_method:
                yield f"line {node.lineno}: {ast.unparse(node)}"


def test_no_circle_of_imports() -> None:
    """Imports for types alone count too: two files that need each other's types are one."""
    graph = grimp.build_graph("embedwire", exclude_type_checking_imports=False)
    imports = {name: graph.find_modules_directly_imported_by(name) for name in graph.modules}
    assert len(imports) > 100
    assert circles(imports) == set()


@pytest.mark.parametrize("path", DRIVERS, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_a_core_is_used_through_its_methods(path: Path) -> None:
    assert list(reads_inside_a_core(path.read_text())) == []


@pytest.mark.parametrize("order", ORDERS, ids=lambda order: order.__name__)
def test_an_order_can_not_be_changed(order: type) -> None:
    """Neither the core nor its driver."""
    assert order.__dataclass_params__.frozen  # type: ignore[attr-defined]


def test_the_checks_see_what_they_are_for() -> None:
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": {"a"}}) == {"b", "c"}
    assert circles({"a": {"b"}, "b": {"c"}, "c": set()}) == set()
    assert {path.parent.name for path in DRIVERS} == {"endpoint", "group"}
    code = "self._core.rooms[key]\ncore._fail(room)\nx = member.core.lanes.open(1)\nself.coordinator.queue.clear()\nself._core.on_tick(now)"
    assert len(list(reads_inside_a_core(code))) == 4
