"""``embedwire settings``: what holds, and where it came from."""

from __future__ import annotations

from typing import Annotated

import typer

from embedwire.cli.groups import GROUPS
from embedwire.cli.options import JsonFile, shown, takes, variable
from embedwire.cli.screen import check_writable, out, table, write_json
from embedwire.cli.settings import Loaded


@takes(*GROUPS)
def settings(
    loaded: Loaded,
    *,
    changed: Annotated[
        bool, typer.Option("--changed", help="Only those that differ from their default.")
    ] = False,
    json: JsonFile = None,
) -> None:
    """Print every setting that holds here, and where it came from.

    A flag goes before a variable (EMBEDWIRE_ and the name in capitals), that before the file that --config or EMBEDWIRE_CONFIG
    names (TOML), that before the default. Exit code 0: all are fine; 2: one is unknown or out of range.
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
