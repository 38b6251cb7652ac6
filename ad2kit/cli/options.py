"""The arguments and options of the commands, as types."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from ad2kit.run.errors import UserError

RecipeName = Annotated[
    str, typer.Argument(metavar="RECIPE", help="A shipped recipe, or the path of a .yaml file.")
]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="KEY.PATH=VALUE", help="E.g. distill.lr=5e-5.")
]
Verbose = Annotated[bool, typer.Option("--verbose", help="Print the resolved recipe too.")]
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
MaxMinutes = Annotated[
    float | None,
    typer.Option(
        "--max-minutes",
        help="Plan epochs, then rows, so that teacher and student train for at most so long here.",
    ),
]
RUNS = Path("runs")

Clear = Annotated[
    bool, typer.Option("--clear", help="Delete it all: it is read and computed again.")
]

# Options of `init`.
Table = Annotated[
    Path,
    typer.Argument(
        metavar="FILE",
        help="The training table (csv, tsv, jsonl, parquet ...), or a folder with train and "
        "validation tables.",
    ),
]
Validation = Annotated[
    Path | None, typer.Option(metavar="FILE", help="The validation table, if FILE has none beside.")
]
TextOfTable = Annotated[
    str | None,
    typer.Option("--text", metavar="A[,B]", help="Columns of the text; guessed if left out."),
]
LabelOfTable = Annotated[
    str | None,
    typer.Option(
        "--label",
        metavar="C[,D...]",
        help="Column of the label, or a column for each of several; guessed if left out.",
    ),
]
NewName = Annotated[
    str | None, typer.Option("--name", help="Of the recipe; default: after the table.")
]

# Options of `parity`, which judges a run or any ONNX folder.
RunOrOverrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="[RUN | KEY.PATH=VALUE ...]", help="A run; or changes of --recipe."),
]
Service = Annotated[
    str | None, typer.Option(metavar="URL", help="Compare a running service with its run.")
]
ApiKeysFile = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE",
        help="Its first line is the key for --against-service; else AD2KIT_API_KEYS[_FILE].",
    ),
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
TextFile = Annotated[
    Path | None, typer.Option(help="A table, or a UTF-8 file with one text per line.")
]

VariantName = Annotated[
    str | None, typer.Option(help="Default: of those that passed, by export.ship.")
]
Repository = Annotated[str, typer.Argument(metavar="OWNER/NAME", help="On the hub; made if new.")]
Private = Annotated[bool, typer.Option("--private", help="Make a new repository private.")]
Forced = Annotated[
    bool, typer.Option("--allow-failed-parity", help="Package it all the same, on record.")
]
OfTeacher = Annotated[
    bool,
    typer.Option("--teacher", help="Export the teacher instead, for AD2KIT_SHADOW of a service."),
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

# Options of `score`.
Input = Annotated[
    str,
    typer.Argument(
        metavar="INPUT", help="Parquet, Arrow, CSV, TSV, JSON: a file, folder, glob or URL."
    ),
]
Output = Annotated[
    str, typer.Argument(metavar="OUTPUT", help="A folder for the parts: a path or URL.")
]
TextColumns = Annotated[
    str | None,
    typer.Option(metavar="A[,B]", help="Columns to read; default: those of the run's recipe."),
]
CsvQuotes = Annotated[
    Literal["doubled", "backslash"] | None,
    typer.Option(
        help="How CSV writes a quotation mark in a quoted cell; default: as in the run's recipe, "
        "or doubled."
    ),
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

# Options of `ask`.
BaseUrl = Annotated[
    str,
    typer.Option(metavar="URL", help="An OpenAI-compatible endpoint: http://127.0.0.1:8000/v1."),
]
AskedModel = Annotated[str, typer.Option("--model", help="The model to ask, by its exact version.")]
Concurrency = Annotated[int, typer.Option(min=1, max=1000, help="Requests at once.")]
MaxRows = Annotated[
    int | None,
    typer.Option(min=1, help="Rows to ask about, drawn at random; more later takes the same."),
]
MaxCost = Annotated[
    float | None, typer.Option(min=0.0, help="Of the whole job, by the prices of the recipe.")
]
RequestsPerMinute = Annotated[float | None, typer.Option(min=0.01, help="The server's limit.")]
TokensPerMinute = Annotated[float | None, typer.Option(min=1.0, help="The server's limit.")]
Timeout = Annotated[float, typer.Option(min=0.1, help="Seconds for one request.")]
Proxy = Annotated[
    str | None, typer.Option(metavar="URL", help="A proxy; those of the environment are not used.")
]
TeacherPrefix = Annotated[
    str, typer.Option("--prefix", help="Put before the names of the columns that are added.")
]
Against = Annotated[
    Path | None,
    typer.Option(metavar="FOLDER", help="Compare with the answers of another `ad2kit ask`."),
]
DryRun = Annotated[
    bool, typer.Option("--dry-run", help="Ask nothing; estimate tokens and cost, show a request.")
]

# Options of `sweep`; `score` has the address too.
Address = Annotated[
    str | None, typer.Option(metavar="HOST:PORT", help="A Ray cluster, instead of this machine.")
]
Storage = Annotated[
    str | None,
    typer.Option(metavar="URL", help="For workers without this disk: where finished runs go."),
]

# Options of `fit`.
Retain = Annotated[
    float, typer.Option(min=0.0, max=1.0, help="Of the teacher's score, for example 0.97.")
]
P99Ms = Annotated[float | None, typer.Option(min=1e-6, help="The 99th percentile of latency.")]
MaxMb = Annotated[float | None, typer.Option(min=1e-6, help="Of the ONNX file.")]
Speedup = Annotated[
    float | None, typer.Option(min=1e-6, help="Over the teacher's own fastest variant.")
]
Margin = Annotated[
    float | None,
    typer.Option(
        min=0.0,
        max=1.0,
        help="How far the 95 % interval may reach below --retain; default: as in the recipe's "
        "parity section.",
    ),
]
Batch = Annotated[int, typer.Option(min=1, help="Texts in a call.")]
Length = Annotated[int, typer.Option(min=1, help="Tokens of a text.")]
Device = Annotated[
    str | None, typer.Option(help="What executes the student; default: export.provider.")
]
Layers = Annotated[str | None, typer.Option(metavar="N,N", help="Numbers of layers to try.")]
Heads = Annotated[str | None, typer.Option(metavar="N,N", help="Attention heads to try.")]
FeedForward = Annotated[str | None, typer.Option(metavar="N,N", help="Neurons to try.")]


def numbers(option: str, text: str | None) -> tuple[int, ...]:
    """Return the whole numbers in a list with commas; no numbers if the option was left out.

    Raises:
        UserError: a part of the list is not a whole number above 0.
    """
    parts = [] if text is None else text.replace(" ", "").split(",")
    for part in parts:
        if not (part.isdecimal() and int(part) > 0):
            raise UserError(
                f"{option}: expected whole numbers above 0, found '{part}' in '{text}'",
                hint=f"for example: {option} 2,3",
            )
    return tuple(map(int, parts))


def columns(text: str | None) -> tuple[str, ...] | None:
    """Return the names in a list with commas; None if the option was left out."""
    return tuple(map(str.strip, text.split(","))) if text else None
