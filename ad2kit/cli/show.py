"""Output and input of the commands: progress, tables, messages, and the texts that users type.

Progress and messages go to stderr: a bar on a terminal, plain lines elsewhere. Only results go to
stdout.
"""

from __future__ import annotations

import itertools
import json
import logging
import os
import shlex
import shutil
import sys
import time
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from ad2kit.gate.records import RowAnswers
from ad2kit.gate.shipping import latest_passed_run
from ad2kit.gate.summary import HEADER, caption, judged_against, model_rows
from ad2kit.run import files
from ad2kit.run.errors import UserError, reading
from ad2kit.run.folder import find_run, named_folder, open_run
from ad2kit.run.machine import is_first_process
from ad2kit.run.recipe import load_recipe
from ad2kit.tables import formats, text_files
from ad2kit.tables.rows import Place
from ad2kit.tables.texts import Text, is_text, text_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from pydantic import BaseModel
    from rich.progress import TaskID

    from ad2kit.campaigns.compare_report import CompareReport
    from ad2kit.campaigns.fit.records import FitReport
    from ad2kit.campaigns.sweep.report import SweepReport
    from ad2kit.exporting.classifier import OnnxClassifier
    from ad2kit.run.folder import RunDir
    from ad2kit.tables.text_files import Quotes
    from ad2kit.training.records import StepRecord

_SECONDS_BETWEEN_LINES = 15.0
# Lines of texts that are classified together.
_LINES_AT_ONCE = 256
# The most characters of the text in an example command.
_EXAMPLE_CHARACTERS = 80
# The most lines that a message names.
_NAMED = 10


@contextmanager
def training_progress() -> Iterator[Callable[[StepRecord], None]]:
    """Yield the function to call with each :class:`~ad2kit.training.records.StepRecord`."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield _Lines(console)
        return
    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.completed}/{task.total}"),
        TextColumn("{task.fields[facts]}"),
        TimeRemainingColumn(),
        console=console,
    )
    tasks: dict[str, TaskID] = {}
    pace = _Pace()
    metric = ""

    def show(record: StepRecord) -> None:
        nonlocal metric
        if pace.begins(record):
            if record.phase in tasks:
                bar.remove_task(tasks[record.phase])
            tasks[record.phase] = bar.add_task(
                record.phase, total=record.total_steps, completed=record.step - 1, facts=""
            )
            metric = ""
        if record.select_score is not None:
            metric = f"select {record.select_score:.4f}"
        facts = f"loss {record.loss:.4f}  {pace.examples_per_s:.0f} examples/s  {metric}"
        bar.update(tasks[record.phase], completed=record.step, facts=facts)

    with bar:
        yield show


def show_messages() -> None:
    """Send ad2kit's own messages to stderr as plain lines, and turn vendors' telemetry off.

    Of several processes (`accelerate launch`) only the first prints.
    """
    logging.basicConfig(format="%(message)s", level=logging.WARNING, stream=sys.stderr)
    logging.getLogger("ad2kit").setLevel(logging.INFO if is_first_process() else logging.ERROR)
    if not is_first_process():
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: PTH123, SIM115  (to its end)
    os.environ.setdefault("BENTOML_DO_NOT_TRACK", "true")
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")


def start_run(
    recipe_name: str,
    overrides: list[str] | None,
    runs_dir: Path,
    folder: Path | None,
    max_minutes: float | None = None,
) -> RunDir:
    """Create or find the run of a recipe, and print its folder.

    With ``max_minutes`` the recipe is planned first.
    """
    show_messages()
    recipe = load_recipe(recipe_name, overrides or ())
    if max_minutes is not None:
        from ad2kit.planning.budget import planned

        recipe = planned(recipe, max_minutes, runs_dir)
    run = open_run(recipe, runs_dir, folder)
    _note(f"run: {run.path}")
    return run


def use_run(runs_dir: Path, folder: Path | None) -> RunDir:
    """Return the named run, or the most recent run, whose folder is then printed.

    Raises:
        UserError: a setting was given in place of a run.
    """
    show_messages()
    if folder is not None and "=" in folder.name and not folder.exists():
        raise UserError(
            f"'{folder}' is a setting, and this command takes a run folder",
            hint=f"settings go with the recipe that made the run: ad2kit run RECIPE {folder}; "
            "what is done for the same settings is kept",
        )
    run = find_run(runs_dir, folder)
    if folder is None:
        _note(f"run: {run.path} (the most recent)")
    return run


def use_servable(runs_dir: Path, folder: Path | None) -> Path:
    """Return the named run or variant, or the last run that passed, which is then printed."""
    if folder is not None:
        return named_folder(runs_dir, folder)
    run = latest_passed_run(runs_dir)
    _note(f"run: {run.path} (the most recent that passed its gate)")
    return run.path


def print_result(result: BaseModel, text: str, *, as_json: bool) -> None:
    """Print the result of a command on stdout: as JSON, or as words."""
    if as_json:
        print_json(result.model_dump(mode="json"))
    else:
        print(text)  # noqa: T201


def print_json(value: Any) -> None:
    """Print plain data on stdout."""
    print(json.dumps(value, indent=2, ensure_ascii=False))  # noqa: T201


def _note(text: str) -> None:
    if is_first_process():
        print(text, file=sys.stderr)  # noqa: T201  (this module prints for the user)


def print_table(folder: RunDir) -> None:
    """Print the table of a run, what it was judged against, and the path of its report."""
    print(f"judged against {judged_against(folder)}")  # noqa: T201
    table = Table(*HEADER, box=box.SIMPLE_HEAD)
    for row in model_rows(folder):
        table.add_row(*row)
    console = Console(width=None if sys.stdout.isatty() else 120)
    console.print(table)
    console.print(caption(folder), highlight=False, markup=False)
    if folder.report.is_file():
        console.print(f"report: {folder.report}", highlight=False)


def print_comparison(report: CompareReport, folder: Path, *, as_json: bool) -> None:
    """Print a comparison on stdout: as JSON, or its tables and the path of its report."""
    from ad2kit.campaigns.compare_report import DIFFERENCES, HEADER, caption, tables

    parts = dict(zip((HEADER, DIFFERENCES), tables(report), strict=True))
    _print_report(report, parts, caption(report), folder / "compare.md", as_json=as_json)


def print_fit(report: FitReport, folder: Path, *, as_json: bool) -> None:
    """Print the result of `fit` on stdout: as JSON, or its tables and the next command."""
    from ad2kit.campaigns.fit.report import caption, tables

    page = folder / "fit.md"
    _print_report(report, tables(report), caption(report), page, as_json=as_json)
    if report.package and not as_json:
        run, variant = report.package
        print(f"next: ad2kit package {folder.parent / run} --variant {variant}")  # noqa: T201


def print_sweep(report: SweepReport, folder: Path, *, as_json: bool) -> None:
    """Print a sweep on stdout: as JSON, or its tables and the path of its report."""
    from ad2kit.campaigns.sweep.report import HEADER, SELECTED, caption, tables

    parts = dict(zip((HEADER, SELECTED), tables(report), strict=True))
    _print_report(report, parts, caption(report), folder / "sweep.md", as_json=as_json)


def _print_report(
    report: BaseModel,
    parts: Mapping[tuple[str, ...], Sequence[tuple[str, ...]]],
    caption: str,
    page: Path,
    *,
    as_json: bool,
) -> None:
    """Print a report on stdout: as JSON, or its tables by header, its caption and its path."""
    if as_json:
        print_json(report.model_dump(mode="json"))
        return
    console = Console(width=None if sys.stdout.isatty() else 120)
    for header, lines in parts.items():
        table = Table(*header, box=box.SIMPLE_HEAD)
        for row in lines:
            table.add_row(*row)
        console.print(table)
    console.print(caption, highlight=False)
    console.print(f"report: {page}", highlight=False)


def next_steps(tag: str, folder: RunDir) -> str:
    """Return the commands to type after the Bento of a run is published."""
    texts = _example(folder)
    body = json.dumps({"texts": [text_of(texts)]}, ensure_ascii=False)
    key_variables = {"AD2KIT_API_KEYS", "AD2KIT_API_KEYS_FILE"} & set(os.environ)
    key_header = "-H 'Authorization: Bearer KEY' " if key_variables else ""
    curl = (
        f"curl -s localhost:3000/classify {key_header}-H 'Content-Type: application/json' "
        f"-d {shlex.quote(body)}"
    )
    # `make` does not activate the environment, so its programs may not be on the path.
    program = Path(sys.executable).with_name("bentoml")
    on_path = shutil.which("bentoml")
    bentoml = "bentoml" if on_path or not program.is_file() else str(program)
    return f"next:\n  {bentoml} serve {tag}\n  {curl}"


def _example(folder: RunDir) -> tuple[str, ...]:
    """Return the first validation text that fits into a line; if none does, the shortest."""
    rows = [RowAnswers.model_validate_json(line).texts for line in files.read_lines(folder.answers)]
    short = [texts for texts in rows if sum(map(len, texts)) <= _EXAMPLE_CHARACTERS]
    return short[0] if short else min(rows, key=lambda texts: sum(map(len, texts)))


def typed_texts(
    file: Path | None, settings: Callable[[], tuple[tuple[str, ...], Quotes]]
) -> Iterator[Text]:
    """Yield the texts of a table, or of a file or stdin with one text a line.

    Rows without a visible character are left out, and a message at the end names them.

    Args:
        file: the file; the ending of its name tells whether it is a table. None for stdin.
        settings: returns the text columns of a table, and how CSV writes quotation marks.

    Raises:
        UserError: no such file, a bad row, or a line that is not UTF-8.
    """
    empty: dict[tuple[str, str], list[str]] = {}
    rows = _stdin_lines() if file is None else _rows_of(file, settings)
    for place, texts in rows:
        if all(map(is_text, texts)):
            yield text_of(texts)
        else:
            key = (place.file, "lines" if place.line else "rows")
            empty.setdefault(key, []).append(str(place.line or place.row))
    for (name, unit), numbers in empty.items():
        rest = f" and {len(numbers) - _NAMED} more" if len(numbers) > _NAMED else ""
        some = ", ".join(numbers[:_NAMED])
        _note(f"{name}: left out {len(numbers)} empty {unit}: {some}{rest}")


def _stdin_lines() -> Iterator[tuple[Place, tuple[str]]]:
    for number, text in text_files.text_lines(sys.stdin.buffer, "stdin"):
        yield Place("stdin", number, number), (text,)


def _rows_of(
    file: Path, settings: Callable[[], tuple[tuple[str, ...], Quotes]]
) -> Iterator[tuple[Place, tuple[Any, ...]]]:
    """Yield the texts of each row of a table, or the lines of another file."""
    if file.is_file() and not formats.is_table(file.name):
        with reading(str(file)), file.open("rb") as stream:
            for number, text in formats.text_lines(stream, str(file)):
                yield Place(str(file), number, number), (text,)
        return
    columns, csv_quotes = settings()
    for place, cells in formats.read_rows(file, columns, csv_quotes):
        yield place, tuple([cells.get(column) for column in columns])


def answer_lines(classifier: OnnxClassifier, texts: Iterator[Text]) -> Iterator[str]:
    """Yield one line of JSON for each text; a line of a pair has a tab between its texts."""
    pair = classifier.artifact.text_columns == 2
    while chunk := list(itertools.islice(texts, _LINES_AT_ONCE)):
        items: list[Any] = [
            tuple(text.split("\t")) if pair and isinstance(text, str) else text for text in chunk
        ]
        for text, prediction in zip(chunk, classifier.predict(items), strict=True):
            answer = {"text": text, **prediction.as_dict()}
            yield json.dumps(answer, ensure_ascii=False)


class _Pace:
    """The speed of a training, without its first update.

    `compare` and `fit` train one student after the other. An update that does not follow the last
    one begins another training.
    """

    def __init__(self) -> None:
        self.last: tuple[str, int, int] | None = None
        self.start = 0.0  # time of the first update
        self.first_step = 0
        self.examples = 0  # since the first update

    def begins(self, record: StepRecord) -> bool:
        """Count an update; tell whether it begins a training."""
        previous = self.last
        self.last = (record.phase, record.total_steps, record.step)
        if previous is not None and previous[:2] == self.last[:2] and previous[2] < record.step:
            self.examples += record.examples
            return False
        self.start = time.monotonic()
        self.first_step = record.step
        self.examples = 0
        return True

    @property
    def examples_per_s(self) -> float:
        return self.examples / max(time.monotonic() - self.start, 1e-9)

    def seconds_left(self, record: StepRecord) -> float:
        seconds_per_step = (time.monotonic() - self.start) / max(record.step - self.first_step, 1)
        return seconds_per_step * (record.total_steps - record.step)


class _Lines:
    """Prints a line after each evaluation, and every few seconds between evaluations."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.pace = _Pace()
        self.last_s = time.monotonic()

    def __call__(self, record: StepRecord) -> None:
        self.pace.begins(record)
        now = time.monotonic()
        if record.select_score is None and now - self.last_s < _SECONDS_BETWEEN_LINES:
            return
        self.last_s = now
        metric = "" if record.select_score is None else f"  select {record.select_score:.4f}"
        self.console.print(
            f"{record.phase} {record.step}/{record.total_steps}  loss {record.loss:.4f}  "
            f"{self.pace.examples_per_s:.0f} examples/s  "
            f"{self.pace.seconds_left(record):.0f} s left{metric}",
            highlight=False,
        )
