"""Turns groups of settings into flags of a command, so that a setting is written down once.

Knows settings and Typer; no command. Called at import of the commands.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

import typer
from pydantic import ByteSize
from pydantic.fields import FieldInfo
from rich.markup import escape

from embedwire.cli.groups import Group
from embedwire.cli.settings import CONFIG_VARIABLE, PREFIX, load

Command = Callable[..., Any]

Config = Annotated[
    Path | None,
    typer.Option(
        "--config", metavar="FILE", help=f"Settings as TOML; also {CONFIG_VARIABLE}.", show_default=False
    ),
]
JsonFile = Annotated[
    Path | None,
    typer.Option("--json", metavar="FILE", help="Also write the results here, as JSON.", show_default=False),
]


def takes(*groups: type[Group]) -> Callable[[Command], Command]:
    """The command gets a flag for each setting of these groups, and ``--config``; its first argument becomes what :func:`load` returned."""
    names = {name: (field, group) for group in groups for name, field in group.model_fields.items()}

    def decorate(command: Command) -> Command:
        signature = inspect.signature(command, eval_str=True)
        own = list(signature.parameters.values())[1:]
        flags = [
            _flag(name, field, panel=inspect.getdoc(group) or "") for name, (field, group) in names.items()
        ]
        config = inspect.Parameter("config", inspect.Parameter.KEYWORD_ONLY, annotation=Config, default=None)

        @functools.wraps(command)
        def run(**values: Any) -> Any:
            path = values.pop("config")
            given = {name: values.pop(name) for name in names}
            return command(load(given, config=path), **values)

        del run.__wrapped__  # Typer would look at the signature behind it
        run.__signature__ = signature.replace(  # type: ignore[attr-defined]
            parameters=[p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in own] + [config, *flags]
        )
        run.__annotations__ = {p.name: p.annotation for p in [*own, config, *flags]}
        return run

    return decorate


def _flag(name: str, field: FieldInfo, *, panel: str) -> inspect.Parameter:
    kind, metavar = _kind(field.annotation)
    option = typer.Option(
        "--" + name.replace("_", "-") + (f"/--no-{name.replace('_', '-')}" if kind is bool else ""),
        help=f"{field.description} {_default(field)}".strip(),
        rich_help_panel=panel,
        show_default=False,
        metavar=metavar,
    )
    annotation = Annotated[kind | None, option]  # type: ignore[valid-type]
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, annotation=annotation, default=None)


def _kind(annotation: Any) -> tuple[Any, str | None]:
    """What Typer parses it as, and how ``--help`` calls a value. Ranges are the settings' to check."""
    choices = {a for a in get_args(annotation) if a is not type(None)}
    if type(None) in get_args(annotation):
        annotation = choices.pop()
    if get_origin(annotation) is Annotated:
        annotation = get_args(annotation)[0]
    if annotation is ByteSize:
        return str, "SIZE"
    if get_origin(annotation) is Literal or annotation in (bool, int, float, str):
        return annotation, None
    return list[str], "URL[,URL…]"


def _default(field: FieldInfo) -> str:
    if field.default in (None, (), False, ""):
        return ""
    return f"[dim]{escape(f'[{shown(field.default)}]')}[/]"


def shown(value: Any) -> str:
    """A setting's value as people write it."""
    if isinstance(value, ByteSize):
        return value.human_readable(separator=" ")
    if isinstance(value, tuple):
        return ", ".join(value)
    return f"{value:g}" if isinstance(value, float) else str(value)


def variable(name: str) -> str:
    """The environment variable of a setting."""
    return PREFIX + name.upper()
