"""The command line: thin functions that translate options. Heavy imports sit inside them."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ad2kit import __version__
from ad2kit.errors import EXIT_BUG, EXIT_INTERRUPTED, Ad2kitError, UserError, no_room_left

if TYPE_CHECKING:
    from pydantic import BaseModel

    from ad2kit.recipe import Recipe
    from ad2kit.records import ParityReport
    from ad2kit.run_dir import RunDir

app = typer.Typer(
    name="ad2kit",
    help="Distil a text classifier into a small student, prove it, and serve it.\n\n"
    "The whole way: ad2kit run demo. Step by step: ad2kit distill RECIPE, ad2kit export, "
    "ad2kit package, bentoml serve.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,  # plain help: starting rich would double the time that it takes
    pretty_exceptions_enable=False,
)

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


def main() -> None:
    """Run the command line; every way to end has its exit code (see :mod:`ad2kit.errors`)."""
    try:
        code = app(standalone_mode=False)
    except typer.Exit as stop:
        code = stop.exit_code
    except (KeyboardInterrupt, typer.Abort):
        _complain("stopped", "the same command goes on where this one stopped")
        code = EXIT_INTERRUPTED
    except Ad2kitError as error:
        _complain(error.message, error.hint)
        code = error.exit_code
    except BrokenPipeError:
        sys.stderr.close()
        code = 0
    except Exception as error:
        show = getattr(error, "show", None)  # typer's own errors about options and arguments
        if callable(show):
            show()
            code = UserError.exit_code
        elif no_room_left(error):
            _complain(
                f"the disk is full, or a file is larger than allowed: {error}",
                "make room, then run the same command again; nothing finished was lost",
            )
            code = UserError.exit_code
        else:
            import traceback

            traceback.print_exc()
            _complain("this is a defect of ad2kit", "please report it with the lines above")
            code = EXIT_BUG
    sys.exit(code or 0)


@app.callback(invoke_without_command=True)
def _root(
    version: Annotated[bool, typer.Option("--version", help="Print the version and stop.")] = False,
) -> None:
    if version:
        typer.echo(__version__)
        raise typer.Exit


@app.command()
def recipes(as_json: Json = False) -> None:
    """List the shipped recipes."""
    from ad2kit.recipe import load, recipe_names

    found = [load(name) for name in recipe_names()]
    if as_json:
        _print_json({recipe.name: recipe.description for recipe in found})
        return
    for recipe in found:
        typer.echo(f"{recipe.name:<12} {recipe.description}")


@app.command()
def check(recipe_name: RecipeName, overrides: Overrides = None, as_json: Json = False) -> None:
    """Check a recipe, its data and its teacher; train nothing."""
    from ad2kit.data import load_data
    from ad2kit.models import find_model
    from ad2kit.recipe import load

    recipe = load(recipe_name, overrides or ())
    data = load_data(recipe.data, recipe.seed)
    if not recipe.teacher.model.startswith("random://"):
        find_model(recipe.teacher.model)
    sizes = {name: len(getattr(data, name)) for name in ("train", "select", "validation")}
    if as_json:
        _print_json({"recipe": recipe.model_dump(mode="json"), "rows": sizes})
        return
    typer.echo(recipe.model_dump_json(indent=2))
    rows = ", ".join(f"{name} {count}" for name, count in sizes.items())
    typer.echo(f"ok: labels {', '.join(data.labels)}; rows {rows}; teacher {recipe.teacher.model}")


@app.command()
def doctor(as_json: Json = False) -> None:
    """Say what this machine offers and what it lacks."""
    from ad2kit.doctor import examine

    findings = examine()
    if as_json:
        _print_json([finding.model_dump() for finding in findings])
        return
    for finding in findings:
        typer.echo(f"{finding.name}: {finding.value}")
        if finding.advice:
            typer.echo(f"  -> {finding.advice}")


@app.command()
def distill(
    recipe_name: RecipeName,
    overrides: Overrides = None,
    runs_dir: RunsDir = RUNS,
    run: RunOption = None,
    allow_inexact: Inexact = False,
    as_json: Json = False,
) -> None:
    """Fine-tune the teacher if need be; distil the student."""
    from ad2kit.terminal import training_progress

    folder = _open(recipe_name, overrides, runs_dir, run)
    stage = _needs_extra("ad2kit.distill", "distill")
    with training_progress() as on_step:
        report = stage(folder, on_step=on_step, allow_inexact=allow_inexact)
    _result(
        report, as_json,
        f"select accuracy: teacher {report.teacher_select_accuracy:.4f}, student "
        f"{report.student_select_accuracy:.4f}\nnext: ad2kit export",
    )  # fmt: skip


@app.command()
def export(
    run: RunArgument = None,
    runs_dir: RunsDir = RUNS,
    no_parity: Annotated[bool, typer.Option("--no-parity", help="Leave the gate out.")] = False,
    as_json: Json = False,
) -> None:
    """Export the student to ONNX, then ask the parity gate."""
    folder = _find(runs_dir, run)
    artifacts = _needs_extra("ad2kit.export", "export")(folder)
    if not no_parity:
        _judge(folder, as_json)
        return
    if as_json:
        _print_json([artifact.model_dump(mode="json") for artifact in artifacts])


@app.command()
def parity(run: RunArgument = None, runs_dir: RunsDir = RUNS, as_json: Json = False) -> None:
    """Judge the variants against student and teacher.

    Exit code 1 if one fails; the report is written all the same.
    """
    _judge(_find(runs_dir, run), as_json)


@app.command()
def bench(run: RunArgument = None, runs_dir: RunsDir = RUNS, as_json: Json = False) -> None:
    """Measure latency and throughput of all models.

    Anew each time, whatever the run holds already.
    """
    folder = _find(runs_dir, run)
    report = _needs_extra("ad2kit.bench", "bench")(folder)
    lines = [
        f"{cell.system:<20} batch {cell.batch_size:>3} x {cell.length_tokens:>3} tokens  "
        f"p50 {cell.p50_ms:8.2f}  p90 {cell.p90_ms:8.2f}  p99 {cell.p99_ms:8.2f} ms  "
        f"{cell.texts_per_s:9,.0f} texts/s  ({cell.calls} calls)"
        for cell in report.cells
    ]
    _result(report, as_json, "\n".join(lines))


@app.command()
def package(
    run: RunArgument = None,
    runs_dir: RunsDir = RUNS,
    variant: Annotated[str | None, typer.Option(help="Default: the smallest that passed.")] = None,
    allow_failed_parity: Annotated[
        bool, typer.Option("--allow-failed-parity", help="Package it all the same, on record.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Build a Bento, try it over HTTP, publish its tag.

    The tag is published only if the service answers what the artefact computes.
    """
    from ad2kit.terminal import next_steps

    folder = _find(runs_dir, run)
    record = _needs_extra("ad2kit.package", "package")(
        folder, variant=variant, allow_failed_parity=allow_failed_parity
    )
    _result(record, as_json, next_steps(record.tag, folder))


@app.command()
def report(run: RunArgument = None, runs_dir: RunsDir = RUNS) -> None:
    """Print the table of a run and write its report.md."""
    from ad2kit.report import report as write_report
    from ad2kit.terminal import print_table

    folder = _find(runs_dir, run)
    write_report(folder)
    print_table(folder)


@app.command()
def predict(
    texts: Annotated[list[str] | None, typer.Argument(help="Texts; else --file or stdin.")] = None,
    run: RunOption = None,
    runs_dir: RunsDir = RUNS,
    file: Annotated[Path | None, typer.Option(help="A UTF-8 file, one text per line.")] = None,
) -> None:
    """Classify texts: one JSON line each.

    The two texts of a pair are separated by a tab.
    """
    import dataclasses
    import itertools
    import json

    import ad2kit
    from ad2kit.terminal import read_lines

    named = run is not None and not (run / "manifest.json").is_file()
    classifier = ad2kit.load(_find(runs_dir, run).path if named else run or _passed(runs_dir))
    lines = iter(texts) if texts else read_lines(file)
    pair = classifier.artifact.text_columns == 2
    while chunk := list(itertools.islice(lines, 256)):
        items: list[Any] = [tuple(line.split("\t")) if pair else line for line in chunk]
        for text, prediction in zip(chunk, classifier.predict(items), strict=True):
            answer = {"text": text, **dataclasses.asdict(prediction)}
            typer.echo(json.dumps(answer, ensure_ascii=False))


@app.command()
def run(
    recipe_name: RecipeName,
    overrides: Overrides = None,
    runs_dir: RunsDir = RUNS,
    run: RunOption = None,
    allow_inexact: Inexact = False,
    as_json: Json = False,
) -> None:
    """Take a recipe all the way to a Bento.

    distill, export, parity, bench and package, each skipped where it is done.
    """
    from ad2kit.terminal import next_steps, print_table, training_progress

    folder = _open(recipe_name, overrides, runs_dir, run)
    campaign = _needs_extra("ad2kit.campaigns.run", "run_all")
    with training_progress() as on_step:
        record = campaign(folder, on_step=on_step, allow_inexact=allow_inexact)
    if not as_json:
        print_table(folder)
    _result(record, as_json, next_steps(record.tag, folder))


def _needs_extra(module: str, function: str) -> Any:
    """Import a stage; what it lacks is a missing extra and not a defect."""
    import importlib

    from ad2kit.errors import MissingExtra

    try:
        return getattr(importlib.import_module(module), function)
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("ad2kit"):
            raise
        raise MissingExtra(error.name or module, extra="cpu") from error


def _open(
    recipe_name: str, overrides: list[str] | None, runs_dir: Path, folder: Path | None
) -> RunDir:
    from ad2kit.recipe import load
    from ad2kit.run_dir import open_run
    from ad2kit.terminal import show_messages

    show_messages()
    recipe: Recipe = load(recipe_name, overrides or ())
    run = open_run(recipe, runs_dir, folder)
    typer.echo(f"run: {run.path}", err=True)
    return run


def _find(runs_dir: Path, folder: Path | None) -> RunDir:
    from ad2kit.run_dir import find_run
    from ad2kit.terminal import show_messages

    show_messages()
    run = find_run(runs_dir, folder)
    if folder is None:
        typer.echo(f"run: {run.path} (the most recent)", err=True)
    return run


def _passed(runs_dir: Path) -> Path:
    from ad2kit.run_dir import latest_passed_run

    run = latest_passed_run(runs_dir)
    typer.echo(f"run: {run.path} (the most recent that passed its gate)", err=True)
    return run.path


def _judge(folder: RunDir, as_json: bool) -> None:
    from ad2kit.terminal import print_table

    verdict: ParityReport = _needs_extra("ad2kit.parity", "parity")(folder)
    if as_json:
        _print_json(verdict.model_dump(mode="json"))
    else:
        print_table(folder)
    _needs_extra("ad2kit.parity", "insist_passed")(verdict, folder)
    typer.echo("parity: passed; next: ad2kit package, or serve it now: bentoml serve", err=True)


def _result(record: BaseModel, as_json: bool, text: str) -> None:
    if as_json:
        _print_json(record.model_dump(mode="json"))
    else:
        typer.echo(text)


def _print_json(value: Any) -> None:
    import json

    typer.echo(json.dumps(value, indent=2, ensure_ascii=False))


def _complain(message: str, hint: str) -> None:
    typer.echo(f"ad2kit: {message}\n  -> {hint}", err=True)
