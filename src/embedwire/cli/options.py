"""Loads settings from flags, ``EMBEDWIRE_*`` variables, the file and defaults; and ``embedwire settings``, which prints them.

A flag overrides a variable, which overrides the file (TOML, named by ``--config`` or EMBEDWIRE_CONFIG), which overrides the default. An
unknown name is an error that suggests the nearest one. A command takes flags for the groups of settings that it uses
(:func:`takes`); the values of all others still apply. Any thread.
"""

from __future__ import annotations

import difflib
import functools
import inspect
import os
import tomllib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

import typer
from pydantic import ByteSize, ValidationError
from pydantic.fields import FieldInfo
from pydantic_settings import EnvSettingsSource
from rich.markup import escape

from embedwire.cli.screen import JsonFile, check_writable, out, table, write_json
from embedwire.cli.settings import CONFIG_VARIABLE, GROUPS, PREFIX, Group, Settings, variable, variables
from embedwire.errors import ConfigurationError

PUBLIC_PORT = 8000

Command = Callable[..., Any]
Config = Annotated[
    Path | None,
    typer.Option(
        "--config", metavar="FILE", help=f"Settings as TOML; also {CONFIG_VARIABLE}.", show_default=False
    ),
]

Model = Annotated[
    str, typer.Argument(metavar="MODEL", help="A directory, or a name on the Hugging Face Hub.")
]
Name = Annotated[
    str | None,
    typer.Option("--name", help="What requests call the model [MODEL as given].", show_default=False),
]
ReadyFile = Annotated[
    Path | None,
    typer.Option(
        "--ready-file",
        metavar="FILE",
        help="Write one JSON object here when the server is ready.",
        show_default=False,
    ),
]
IsChild = Annotated[
    bool, typer.Option("--child", hidden=True, help="Report in JSON, and end when stdin does.")
]


@dataclass(frozen=True, slots=True)
class Loaded:
    """Settings, and where each value came from: ``--flag``, a variable's name, a file's path, or ``default``."""

    settings: Settings
    origins: Mapping[str, str]

    @property
    def public_port(self) -> int:
        """The router's port, which users have to know."""
        return PUBLIC_PORT if self.origins["port"] == "default" else self.settings.port

    def as_variables(self) -> dict[str, str]:
        """What was set, as environment variables for a child process."""
        values = self.settings.model_dump(mode="json", include=set(self.origins))
        given = {name: value for name, value in values.items() if self.origins[name] != "default"}
        return variables(**{name: value for name, value in given.items() if value is not None})


def load(flags: Mapping[str, Any] | None = None, *, config: Path | None = None) -> Loaded:
    """Read the file and the variables, and override them with the flags (by field name; None is not given).

    Raises ConfigurationError, in one line, for an unknown name or an invalid value, with where it came from.
    """
    path = config or (Path(os.environ[CONFIG_VARIABLE]) if os.environ.get(CONFIG_VARIABLE) else None)
    given = {name: value for name, value in (flags or {}).items() if value is not None and value != []}
    sources = (
        (_file(path), lambda name: str(path)),
        (_environment(), variable),
        (given, lambda name: "--" + name.replace("_", "-")),
    )
    values: dict[str, Any] = {}
    origins = dict.fromkeys(Settings.model_fields, "default")
    for found, origin in sources:
        values |= found
        origins |= {name: origin(name) for name in found}
    try:
        settings = Settings.model_validate(values)
        _ = settings.limits
    except ValidationError as error:
        first = error.errors()[0]
        name = str(first["loc"][0])
        raise ConfigurationError(
            f"{name} is {first['input']!r} ({origins[name]}): {first['msg'].lower().removeprefix('value error, ')}"
        ) from None
    return Loaded(settings, origins)


def _file(path: Path | None) -> dict[str, Any]:
    if path is None:
        return {}
    try:
        found = tomllib.loads(path.read_text())
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ConfigurationError(f"settings file {path}: {error}") from None
    for name in found:
        if name not in Settings.model_fields:
            raise _unknown(name, Settings.model_fields, where=str(path))
    return found


def _environment() -> dict[str, Any]:
    known = {*map(variable, Settings.model_fields)}
    for name in os.environ:
        if name.upper().startswith(PREFIX) and name.upper() not in known | {CONFIG_VARIABLE}:
            raise _unknown(name, known, where="the environment")
    return EnvSettingsSource(Settings)()


def _unknown(name: str, known: Iterable[str], *, where: str) -> ConfigurationError:
    nearest = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    hint = f"; did you mean {nearest[0]}?" if nearest else "; `embedwire settings` lists all"
    return ConfigurationError(f"{where}: there is no setting {name}{hint}")


def takes(*groups: type[Group]) -> Callable[[Command], Command]:
    """Give a command a flag for each setting of these groups, and ``--config``; its first argument becomes the result of :func:`load`."""
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

        del run.__wrapped__  # else Typer reads the signature of the wrapped command
        run.__signature__ = signature.replace(  # type: ignore[attr-defined]
            parameters=[p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in own] + [config, *flags]
        )
        run.__annotations__ = {p.name: p.annotation for p in [*own, config, *flags]}
        return run

    return decorate


def _flag(name: str, field: FieldInfo, *, panel: str) -> inspect.Parameter:
    kind, metavar = _kind(field.annotation)
    flag = name.replace("_", "-")
    option = typer.Option(
        f"--{flag}/--no-{flag}" if kind is bool else f"--{flag}",
        help=f"{field.description} {_default(field)}".strip(),
        rich_help_panel=panel,
        show_default=False,
        metavar=metavar,
    )
    annotation = Annotated[kind | None, option]  # type: ignore[valid-type]
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, annotation=annotation, default=None)


def _kind(annotation: Any) -> tuple[Any, str | None]:
    """The type that Typer parses it as, and its name in ``--help``. Settings check the ranges."""
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


@takes(*GROUPS)
def settings(
    loaded: Loaded,
    *,
    changed: Annotated[
        bool, typer.Option("--changed", help="Only those that differ from their default.")
    ] = False,
    json: JsonFile = None,
) -> None:
    """Print every setting that applies here, and where its value came from.

    A flag overrides a variable (EMBEDWIRE_ and the name in capitals), which overrides the file that --config or EMBEDWIRE_CONFIG
    names (TOML), which overrides the default. Exit code 0: all are valid; 2: one is unknown or out of range.
    """
    check_writable(json)
    dumped = loaded.settings.model_dump(mode="json")
    made = table("setting", "value", "from", "variable")
    for group in GROUPS:
        for name in group.model_fields:
            origin = loaded.origins[name]
            if not (changed and origin == "default"):
                value = getattr(loaded.settings, name)
                made.add_row(name, "–" if value in (None, (), "") else shown(value), origin, variable(name))
    out.print(made)
    write_json(json, {name: {"value": dumped[name], "from": loaded.origins[name]} for name in loaded.origins})
