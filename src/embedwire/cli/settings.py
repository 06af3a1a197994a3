"""Where the value of each setting comes from.

A flag goes before an ``EMBEDWIRE_*`` variable, that before the file (TOML, named by ``--config`` or EMBEDWIRE_CONFIG), that before the
default. A name that nobody knows is an error which says the nearest one. Commands take flags for the groups of settings they use
(``options.py``); the values of all others still hold. Knows no command. Any thread.
"""

from __future__ import annotations

import difflib
import os
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, ClassVar

from pydantic import ValidationError
from pydantic_settings import BaseSettings, EnvSettingsSource, SettingsConfigDict

from embedwire.cli.groups import (
    GROUPS,
    Bounds,
    Checks,
    Encoder,
    Engine,
    Language,
    Media,
    Member,
    Ranks,
    Router,
    Server,
    Vllm,
    VllmServers,
    VllmUrls,
    Wire,
)
from embedwire.errors import ConfigurationError
from embedwire.limits import Limits

__all__ = ["CONFIG_VARIABLE", "GROUPS", "PREFIX", "Bounds", "Loaded", "Settings", "load"]

PREFIX = "EMBEDWIRE_"
CONFIG_VARIABLE = "EMBEDWIRE_CONFIG"
PUBLIC_PORT = 8000
WIRES: Mapping[str, tuple[str, ...] | None] = {
    "auto": None,
    "shm": ("shm",),
    "tcp": ("tcp",),
    "mooncake": ("mooncake",),
    "nixl": ("nixl",),
}
"""What each value of ``transport`` offers, best first; None: the built-in ones."""


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
    """All settings, checked. Made by :func:`load`."""

    model_config = SettingsConfigDict(
        env_prefix=PREFIX, extra="forbid", frozen=True, use_attribute_docstrings=True
    )
    NOT_FIELDS: ClassVar[frozenset[str]] = frozenset({CONFIG_VARIABLE})

    @property
    def transports(self) -> tuple[str, ...] | None:
        """The wires to offer; None for the built-in ones."""
        return WIRES[self.transport]

    @property
    def limits(self) -> Limits:
        """The time-outs and bounds as the endpoints take them. Raises ConfigurationError when two contradict each other."""
        return Limits(**{f.name: getattr(self, f.name) for f in fields(Limits)})


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
        told = {name: value for name, value in values.items() if self.origins[name] != "default"}
        return {PREFIX + name.upper(): _as_text(value) for name, value in told.items() if value is not None}


def _as_text(value: Any) -> str:
    return ",".join(value) if isinstance(value, list) else str(value)


def load(flags: Mapping[str, Any] | None = None, *, config: Path | None = None) -> Loaded:
    """Read the variables and the file, and put the flags (by field name; None is not given) before them.

    Raises ConfigurationError, in one line, for an unknown name or a value that does not fit, with where it came from.
    """
    path = config or (Path(os.environ[CONFIG_VARIABLE]) if os.environ.get(CONFIG_VARIABLE) else None)
    given = {name: value for name, value in (flags or {}).items() if value is not None and value != []}
    sources = (
        (_file(path), lambda name: str(path)),
        (_variables(), lambda name: PREFIX + name.upper()),
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


def _variables() -> dict[str, Any]:
    known = {PREFIX + name.upper() for name in Settings.model_fields}
    for name in os.environ:
        if name.upper().startswith(PREFIX) and name.upper() not in known | Settings.NOT_FIELDS:
            raise _unknown(name, known, where="the environment")
    return EnvSettingsSource(Settings)()


def _unknown(name: str, known: Iterable[str], *, where: str) -> ConfigurationError:
    nearest = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    hint = f"; did you mean {nearest[0]}?" if nearest else "; `embedwire settings` lists all"
    return ConfigurationError(f"{where}: there is no setting {name}{hint}")
