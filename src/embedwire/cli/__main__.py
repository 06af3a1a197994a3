"""The commands by name; ``python -m embedwire.cli`` runs them, which is how one command starts another as a child."""

from __future__ import annotations

import sys

import typer

from embedwire.cli import ask, bench, demo, doctor, options, servers, stack
from embedwire.cli.screen import err
from embedwire.errors import EmbedwireError

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.callback()
def callback() -> None:
    """Multimodal embeddings from encoder servers to language-model servers, through memory of a fixed size."""


TRY, SERVE, LOOK = "Try it", "Serve", "Look and measure"
app.command(rich_help_panel=TRY)(demo.demo)
app.command(rich_help_panel=TRY)(ask.ask)
app.command("tiny-model", rich_help_panel=TRY)(demo.tiny_model)
app.command(rich_help_panel=SERVE)(stack.up)
app.command(rich_help_panel=SERVE)(servers.registry)
app.command(rich_help_panel=SERVE)(servers.router)
app.command(rich_help_panel=SERVE)(servers.encoder)
app.command(rich_help_panel=SERVE)(servers.language)
app.command("encoder-rank", hidden=True)(servers.encoder_rank)
app.command("language-rank", hidden=True)(servers.language_rank)
app.command("vllm-server", hidden=True)(servers.vllm_server)
app.command(rich_help_panel=LOOK)(doctor.doctor)
app.command(rich_help_panel=LOOK)(options.settings)
app.add_typer(bench.app, name="bench", rich_help_panel=LOOK)


def run() -> None:
    """Run a command. Exit codes: 0 done; 1 a check failed; 2 an error, whose cause is the last line; 130 interrupted."""
    try:
        app()
    except EmbedwireError as error:
        err.print(f"embedwire: {error}", markup=False, soft_wrap=True)
        sys.exit(2)


if __name__ == "__main__":
    run()
