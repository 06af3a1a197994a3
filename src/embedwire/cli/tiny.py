"""``embedwire tiny-model``: a small random checkpoint to try things with."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from embedwire.cli.screen import out, size

Family = Literal["qwen2_5_vl", "qwen3_vl", "qwen2_vl", "llava"]
Directory = Annotated[Path, typer.Argument(metavar="DIR", help="Where to write it; made if it is not there.")]


def tiny_model(
    directory: Directory,
    *,
    family: Annotated[Family, typer.Option(help="Architecture.")] = "qwen2_5_vl",
    scale: Annotated[
        Literal["tiny", "small", "400m"],
        typer.Option(help="About 200,000 parameters; 700,000, for vLLM too; or 400 million."),
    ] = "tiny",
    dtype: Annotated[Literal["float32", "bfloat16"], typer.Option(help="Of the weights.")] = "float32",
    seed: Annotated[int, typer.Option(help="Equal seeds give equal weights.")] = 0,
) -> None:
    """Write a small checkpoint with random weights into DIR. Its answers are gibberish; everything else about it is real.

    It loads with plain transformers too. Exit code 0: written; 2: an error, whose cause is the last line.
    """
    from embedwire.cli.quiet import quieten
    from embedwire.errors import ConfigurationError

    quieten()
    from embedwire.engines.transformers.tiny_model import write_tiny_model

    try:
        write_tiny_model(directory, family, scale=scale, dtype=dtype, seed=seed)
    except OSError as error:
        raise ConfigurationError(f"{directory}: {error}") from None
    nbytes = sum(file.stat().st_size for file in directory.iterdir())
    out.print(f"{directory}: {family}, {scale}, {dtype}, {size(nbytes)}", soft_wrap=True, markup=False)
