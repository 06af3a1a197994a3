"""The commands by name. Imports only what ``--help`` shows."""

from __future__ import annotations

import typer

from embedwire.cli import ask, bench, demo, doctor, ranks, servers, show, tiny, up, vllm_server

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
app.command("tiny-model", rich_help_panel=TRY)(tiny.tiny_model)
app.command(rich_help_panel=SERVE)(up.up)
app.command(rich_help_panel=SERVE)(servers.registry)
app.command(rich_help_panel=SERVE)(servers.router)
app.command(rich_help_panel=SERVE)(servers.encoder)
app.command(rich_help_panel=SERVE)(servers.language)
app.command("encoder-rank", hidden=True)(ranks.encoder_rank)
app.command("language-rank", hidden=True)(ranks.language_rank)
app.command("vllm-server", hidden=True)(vllm_server.vllm_server)
app.command(rich_help_panel=LOOK)(doctor.doctor)
app.command(rich_help_panel=LOOK)(show.settings)
app.add_typer(bench.app, name="bench", rich_help_panel=LOOK)
