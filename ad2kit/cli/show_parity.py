"""`ad2kit parity`: chooses what to judge, and prints the verdict."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

import ad2kit
from ad2kit.cli.show import print_json, print_table
from ad2kit.gate.records import ParityReport, check_passed
from ad2kit.gate.shipping import choose_variant, passed_variants
from ad2kit.gate.summary import teacher_report, untested_words
from ad2kit.packaging import check
from ad2kit.run.errors import UserError
from ad2kit.run.recipe import load_recipe
from ad2kit.service.settings import client_key

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from ad2kit.run.folder import RunDir


def judge_run(run: RunDir, *, as_json: bool) -> None:
    """Judge the variants of a run, print the verdict, and stop if none passed."""
    verdict = ad2kit.judge(run)
    if as_json:
        print_json(verdict.model_dump(mode="json"))
    else:
        print_table(run)
    check_passed(verdict, run.path, report=run.parity_report, teacher=teacher_report(run))
    choose_variant(run, None)  # raises if a campaign has refused all variants that passed the gate
    shipped, *others = (folder.name for folder in passed_variants(run))
    choice = f" (or --variant {' or '.join(others)})" if others else ""
    # A run that a campaign has made is served only by its name.
    serve = "" if run.campaign_record.is_file() else ", or serve it now: bentoml serve"
    _say(
        f"parity: passed; {shipped} can be shipped; next: ad2kit package {run.path}{choice}{serve}"
    )


def judge_service(run: RunDir, address: str, api_keys_file: Path | None, *, as_json: bool) -> None:
    """Compare a running service with its run, print the result, and stop if they differ."""
    key = client_key(api_keys_file, os.environ)
    comparison = check.judge_service(run, address.rstrip("/"), key)
    if as_json:
        print_json(
            {
                "texts": comparison.texts,
                "label_flips": comparison.flips,
                "score_gap": comparison.gap,
            }
        )
    comparison.check_same(f"it is at {address}")
    _say(
        f"service: {comparison.texts} answers equal the artefact's, score gap "
        f"{comparison.gap:.1e}, expected at most {check.MAX_SCORE_GAP:.0e}"
    )


def judge_model(
    model: Path,
    teacher: str | None,
    data: Path | None,
    recipe: str | None,
    overrides: Sequence[str],
    *,
    as_json: bool,
) -> None:
    """Judge an ONNX folder of any origin, print every check, and stop if a check did not pass.

    Raises:
        UserError: the teacher or the data are missing.
        GateFailed: a check did not pass.
    """
    if teacher is None or data is None:
        raise UserError(
            f"expected --teacher and --data beside --model, found --teacher {teacher} and --data "
            f"{data}",
            hint="ad2kit parity --model DIR --teacher DIR --data FILE",
        )
    from ad2kit.gate import foreign

    verdict = foreign.judge_model(model, teacher, data, load_recipe(recipe or "custom", overrides))
    _print(verdict, as_json=as_json)
    check_passed(verdict, model)


def one_run(arguments: Sequence[str] | None, only_for_a_model: Mapping[str, object]) -> Path | None:
    """Return the run that `ad2kit parity` was given, if any.

    Raises:
        UserError: there are arguments or options that only --model reads.
    """
    positional = list(arguments or ())
    unread = [name for name, value in only_for_a_model.items() if value is not None]
    unread += [argument for argument in positional if "=" in argument or len(positional) > 1]
    if unread:
        raise UserError(
            f"expected at most one run folder, found {' '.join(unread)}, which only --model reads",
            hint="to judge another model: ad2kit parity --model DIR --teacher DIR --data FILE",
        )
    return Path(positional[0]) if positional else None


def _print(report: ParityReport, *, as_json: bool) -> None:
    """Print every check of a report on stdout: as JSON, or as a table."""
    if as_json:
        print_json(report.model_dump(mode="json"))
        return
    table = Table("question", "check", "value", "expected", "verdict", box=box.SIMPLE_HEAD)
    for verdict in report.variants:
        for row in verdict.checks:
            table.add_row(row.question, row.name, escape(row.measured), row.expected, row.verdict)
    console = Console(width=None if sys.stdout.isatty() else 120)
    console.print(table)
    (verdict,) = report.variants
    console.print(
        f"score {verdict.score:.4f}, teacher {report.teacher_score:.4f}, {report.rows} rows; "
        f"differences below {100 * verdict.smallest_detectable_difference:.1f} points are noise",
        highlight=False,
    )
    if untested := untested_words(report):
        console.print(escape(untested), highlight=False)


def _say(text: str) -> None:
    print(text, file=sys.stderr)  # noqa: T201  (this module prints for the user)
