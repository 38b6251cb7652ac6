"""The arguments and options of the commands, as types."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

RecipeName = Annotated[
    str, typer.Argument(metavar="RECIPE", help="A shipped recipe, or the path of a .yaml file.")
]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="KEY.PATH=VALUE", help="E.g. distill.lr=5e-5.")
]
RunArgument = Annotated[
    Path | None,
    typer.Argument(metavar="RUN", help="A run folder; the most recent run if left out."),
]
RunsDir = Annotated[Path, typer.Option(help="Where the run folders lie.")]
RunOption = Annotated[Path | None, typer.Option("--run", help="The run folder, if not the usual.")]
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON, alone on stdout.")]
Inexact = Annotated[
    bool,
    typer.Option("--allow-inexact", help="Resume under other threads, device or versions."),
]
RUNS = Path("runs")

# Of `parity`, which judges a run or any ONNX folder.
RunOrOverrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="[RUN | KEY.PATH=VALUE ...]", help="A run; or changes of --recipe."),
]
Service = Annotated[
    str | None, typer.Option(metavar="URL", help="Compare a running service with its run.")
]
Model = Annotated[
    Path | None, typer.Option(help="Judge this ONNX folder, whoever made it, and no run.")
]
Teacher = Annotated[str | None, typer.Option(help="Teacher of --model: a folder or hub://NAME.")]
DataFile = Annotated[Path | None, typer.Option(help="A labelled file for --model.")]
RecipeOption = Annotated[
    str | None,
    typer.Option("--recipe", help="Columns, task and thresholds for --model; default: custom."),
]
TextFile = Annotated[Path | None, typer.Option(help="A UTF-8 file, one text per line.")]

VariantName = Annotated[
    str | None, typer.Option(help="Default: of those that passed, by export.ship.")
]
Repository = Annotated[str, typer.Argument(metavar="OWNER/NAME", help="On the hub; made if new.")]
Private = Annotated[bool, typer.Option("--private", help="Make a new repository private.")]
Forced = Annotated[
    bool, typer.Option("--allow-failed-parity", help="Package it all the same, on record.")
]
NoParity = Annotated[bool, typer.Option("--no-parity", help="Leave the gate out.")]
Methods = Annotated[str, typer.Option(help="Of finetune, kd, pkd, tinybert, minilm, clean, ad2.")]
Seeds = Annotated[int, typer.Option(min=1, help="Students of each method.")]

P99 = Annotated[
    float, typer.Option("--p99-ms", min=0.001, help="State the capacity for calls within this.")
]
Price = Annotated[
    float | None, typer.Option(min=0.0, help="Of this machine, for the cost of a million texts.")
]

# Of `score`.
Input = Annotated[
    str,
    typer.Argument(
        metavar="INPUT", help="Parquet, CSV, TSV or JSON lines: a file, folder, glob or URL."
    ),
]
Output = Annotated[
    str, typer.Argument(metavar="OUTPUT", help="A folder for the parts: a path or URL.")
]
TextColumns = Annotated[
    str | None,
    typer.Option(metavar="A[,B]", help="Columns to read; default: those of the run's recipe."),
]
Prefix = Annotated[str, typer.Option(help="Put before the names of the columns that are added.")]
Engine = Annotated[
    Literal["process", "ray"], typer.Option(help="Processes of this machine, or Ray Data.")
]
Workers = Annotated[
    int | None, typer.Option(min=1, help="One thread each; default: the cores of this machine.")
]
BlockRows = Annotated[int, typer.Option(min=1, help="Rows of a part; sorted by length in it.")]
BatchSize = Annotated[int, typer.Option(min=1, help="Texts that are computed at once.")]

# Of `sweep`, and the address of `score` too.
Address = Annotated[
    str | None, typer.Option(metavar="HOST:PORT", help="A Ray cluster, instead of this machine.")
]
Storage = Annotated[
    str | None,
    typer.Option(metavar="URL", help="For workers without this disk: where finished runs go."),
]
