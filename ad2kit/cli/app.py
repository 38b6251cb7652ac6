"""The root of the command line, and the order of its commands."""

from __future__ import annotations

from typing import Annotated

import typer

from ad2kit import __version__
from ad2kit.cli import campaigns, stages

app = typer.Typer(
    name="ad2kit",
    help="Distil a text classifier into a small student, prove it, and serve it.\n\n"
    "The whole way: ad2kit run demo. Step by step: ad2kit distill RECIPE, ad2kit export, "
    "ad2kit package, bentoml serve.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,  # plain help: with rich, help would take twice the time
    pretty_exceptions_enable=False,
)


@app.callback(invoke_without_command=True)
def _root(
    version: Annotated[bool, typer.Option("--version", help="Print the version and stop.")] = False,
) -> None:
    if version:
        typer.echo(__version__)
        raise typer.Exit


for command in (
    stages.recipes,
    stages.init,
    stages.check,
    stages.doctor,
    stages.cache,
    stages.distill,
    stages.export,
    stages.parity,
    stages.bench,
    stages.package,
    stages.push,
    stages.report,
    stages.predict,
    stages.score,
    stages.ask,
    campaigns.run,
    campaigns.compare,
    campaigns.fit,
    campaigns.sweep,
):
    app.command()(command)
