"""The report as a reader gets it: in a real browser, from one file, whatever the texts hold."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import pytest

from ad2kit.exporting.export import export
from ad2kit.exporting.records import QuantisationSearch
from ad2kit.gate.parity import judge
from ad2kit.gate.records import ParityReport, RowAnswers, VariantParity
from ad2kit.gate.report import report
from ad2kit.gate.summary import caption
from ad2kit.run.errors import RunError
from ad2kit.run.files import sha256_of, write_record
from ad2kit.training.records import DistillReport

if TYPE_CHECKING:
    from pathlib import Path

    from ad2kit.run.folder import RunDir

INJECTION = '<script>console.error("injected")</script><img src=x>'


def test_a_browser_shows_the_whole_report_without_a_complaint(
    browser: Any, copied_run: RunDir
) -> None:
    page = report(copied_run)
    assert page == copied_run.report
    for options in (("--force-dark-mode",), ("--window-size=360,800",)):
        assert browser(page.as_uri(), *options)[1] == []
    shown, console = browser(page.as_uri())
    assert console == []
    headings = re.findall(r"<h2>(.*?)</h2>", shown)
    assert headings == [
        "Models",
        "The teacher",
        "The gate",
        "Where teacher and student differ",
        "Calibration",
        "Training",
        "int8",
        "Where it comes from",
    ]
    assert shown.count("<svg") == 4
    judged = ParityReport.read(copied_run.parity_report)
    for verdict in judged.variants:
        assert f"{verdict.score:.4f}" in shown
        for check in verdict.checks:
            assert f"<td>{check.name}</td>" in shown
    assert QuantisationSearch.read(copied_run.int8_search).taken in shown
    assert "recall by class" in shown
    assert "http://" not in re.sub(r'xmlns(:\w+)?="[^"]*"', "", shown)
    assert "https://" not in shown


def test_the_console_is_really_listened_to(browser: Any, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    page.write_text(f"<body>{INJECTION}</body>")
    assert "injected" in str(browser(page.as_uri())[1])


def test_texts_are_shown_and_never_run(browser: Any, copied_run: RunDir) -> None:
    lines = copied_run.answers.read_text().rstrip("\n").split("\n")
    answered = RowAnswers.model_validate_json(lines[0])
    # As far apart as can be, so that it comes first.
    apart = answered.model_copy(
        update={
            "texts": (f"\u2028{INJECTION}",),
            "logits": answered.logits | {"teacher": (50.0, -50.0), "int8": (-50.0, 50.0)},
        }
    )
    copied_run.answers.write_text("\n".join([apart.model_dump_json(), *lines[1:]]) + "\n")
    judged = ParityReport.read(copied_run.parity_report)
    forged = {"answers_sha256": sha256_of(copied_run.answers)}
    write_record(copied_run.parity_report, judged.model_copy(update=forged))
    shown, console = browser(report(copied_run).as_uri())
    assert console == []
    assert "&lt;script&gt;console.error" in shown


def test_a_failed_gate_is_said_at_the_top(copied_run: RunDir) -> None:
    judged = ParityReport.read(copied_run.parity_report)
    failed = tuple(
        each.model_copy(
            update={
                "checks": tuple(
                    check.model_copy(update={"threshold": 2.0, "bound": "at least"})
                    for check in each.checks
                )
            }
        )
        for each in judged.variants
    )

    def page_of(variants: tuple[VariantParity, ...]) -> str:
        write_record(copied_run.parity_report, judged.model_copy(update={"variants": variants}))
        return report(copied_run).read_text()

    page = page_of((*judged.variants[:-1], failed[-1]))
    # A variant can be shipped: the page is about that one, and says which other cannot, and why.
    assert '<span class="good">passed</span></h1>' in page
    assert "steady keeps" in page
    assert page.count('<details open><summary>int8: <span class="bad">') == 1
    assert "label flips is 0, expected at least 2" in page
    assert '<span class="bad">FAILED</span></h1>' in page_of(failed)


def test_what_belongs_to_other_artefacts_is_not_shown(copied_run: RunDir) -> None:
    assert "<h2>int8</h2>" in report(copied_run).read_text()
    recipe = copied_run.recipe
    more = recipe.export.model_copy(update={"variants": ("fp32", "fused", "fp16")})
    write_record(copied_run.recipe_file, recipe.model_copy(update={"export": more}))
    export(copied_run)
    judge(copied_run)
    page = report(copied_run).read_text()
    assert "fp16 (ONNX)" in page
    assert "p50 latency" not in page  # fp16 was not there when the others were measured
    assert "<h2>int8</h2>" not in page


def test_rows_that_were_left_out_are_counted_below_the_table(copied_run: RunDir) -> None:
    assert "bad rows" not in caption(copied_run)
    distilled = DistillReport.read(copied_run.distill_report)
    write_record(copied_run.distill_report, distilled.model_copy(update={"bad_rows": 3}))
    assert "3 bad rows were left out of the data (bad-rows.jsonl)." in caption(copied_run)


def test_a_report_before_parity_or_bench(copied_run: RunDir) -> None:
    copied_run.latency_report.unlink()
    assert "p50 latency" not in report(copied_run).read_text()
    for damage in (copied_run.answers.unlink, lambda: copied_run.answers.write_text("{")):
        damage()
        with pytest.raises(RunError, match=r"answers\.jsonl is missing, or not the file"):
            report(copied_run)
        judge(copied_run)  # which is known, but not all that it leaves behind
        report(copied_run)
    copied_run.parity_report.unlink()
    with pytest.raises(RunError, match=r"has no parity\.json yet"):
        report(copied_run)
