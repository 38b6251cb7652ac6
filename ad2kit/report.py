"""The report stage: what a run has shown so far, as one table and one page of Markdown."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ad2kit import markdown
from ad2kit.files import write_text
from ad2kit.records import (
    BentoRecord,
    DistillReport,
    LatencyReport,
    ParityReport,
    QuantisationSearch,
)

if TYPE_CHECKING:
    from pathlib import Path

    from ad2kit.records import LatencyCell
    from ad2kit.run_dir import RunDir

HEADER = ("model", "score", "retained", "95 % interval", "size MB", "p50 ms", "p99 ms",
          "texts/s", "gate")  # fmt: skip


def rows(run: RunDir) -> list[tuple[str, ...]]:
    """Return one row for the teacher, the student and each variant, under :data:`HEADER`.

    Latency is of one text of the shortest measured length, throughput of the largest batch of
    that length. What has not been measured yet is left blank.

    Raises:
        RunError: parity has not been judged yet.
    """
    run.require(run.parity_report, command="parity")
    parity = ParityReport.read(run.parity_report)
    latency = LatencyReport.read(run.latency_report) if run.latency_report.is_file() else None

    def measured(system: str) -> tuple[str, ...]:
        if latency is None:
            return ("", "", "", "")
        one, many = _smallest_and_largest(latency, system)
        return (
            f"{latency.sizes_bytes[system] / 1e6:.1f}", f"{one.p50_ms:.2f}", f"{one.p99_ms:.2f}",
            f"{many.texts_per_s:,.0f}",
        )  # fmt: skip

    teacher, student = "teacher (PyTorch)", "student (PyTorch)"
    table = [
        (teacher, f"{parity.teacher_score:.4f}", "", "", *measured(teacher), ""),
        (
            student, f"{parity.student_score:.4f}",
            f"{parity.student_score / max(parity.teacher_score, 1e-9):.2%}", "",
            *measured(student), "",
        ),
    ]  # fmt: skip
    for verdict in parity.variants:
        low, high = verdict.retained_interval
        table.append((
            f"{verdict.variant} (ONNX)", f"{verdict.score:.4f}", f"{verdict.retained:.2%}",
            f"{low:.2%} to {high:.2%}", *measured(verdict.variant),
            "passed" if verdict.passed else "FAILED",
        ))  # fmt: skip
    return table


def caption(run: RunDir) -> str:
    """Return in words on what the table was measured."""
    parity = ParityReport.read(run.parity_report)
    difference = max(verdict.smallest_detectable_difference for verdict in parity.variants)
    text = (
        f"Score: {' and '.join(parity.teacher_metrics)} on {parity.rows} validation texts; "
        "differences below "
        f"{100 * difference:.1f} points are within their noise."
    )
    if run.recipe.data.select_from == "validation":
        text += " The checkpoint was chosen on these same texts, which flatters the student."
    if not run.latency_report.is_file():
        return text
    latency = LatencyReport.read(run.latency_report)
    shortest, largest = _shape(latency)
    return (
        f"{text} Latency: forward pass of 1 text of {shortest} tokens; throughput: batch "
        f"{largest}, {shortest} tokens; {latency.threads} threads of {latency.environment['cpu']}."
    )


def latency_lines(latency: LatencyReport) -> list[str]:
    """Return one line for each cell."""
    return [
        f"{cell.system:<20} batch {cell.batch_size:>3} x {cell.length_tokens:>3} tokens  "
        f"p50 {cell.p50_ms:8.2f}  p90 {cell.p90_ms:8.2f}  p99 {cell.p99_ms:8.2f} ms  "
        f"{cell.texts_per_s:9,.0f} texts/s  ({cell.calls} calls)"
        for cell in latency.cells
    ]


def report(run: RunDir) -> Path:
    """Write ``report.md`` of a run and return its path."""
    parity, distilled = ParityReport.read(run.parity_report), DistillReport.read(run.distill_report)
    checks = [
        (
            verdict.variant, check.question, check.name, f"{check.value:.4g}",
            f"{check.bound} {check.threshold:g}", "passed" if check.passed else "FAILED",
        )
        for verdict in parity.variants
        for check in verdict.checks
    ]  # fmt: skip
    splits = [
        (
            name, str(facts.rows), str(facts.truncated),
            ", ".join(f"{label} {count}" for label, count in facts.class_counts.items()),
        )
        for name, facts in distilled.splits.items()
    ]  # fmt: skip
    training = (
        f"{distilled.steps} updates in {distilled.train_seconds:.0f} s "
        f"({distilled.examples_per_s:.0f} examples/s), best at {distilled.best_step}; "
        f"{distilled.verdict}. Peak memory: {_memory(distilled.peak_memory_mb)}."
    )
    search = []
    if run.int8_search.is_file():
        search = _search(QuantisationSearch.read(run.int8_search))
    bento = []
    if run.bento_record.is_file():
        record = BentoRecord.read(run.bento_record)
        answers = f"{record.service_texts} answers over HTTP, {record.service_label_flips} flips"
        bento = [f"`{record.tag}`: {answers}."]
    sections = {
        f"# {run.recipe.name}: {'passed' if parity.passed else 'FAILED'}": [run.recipe.description],
        "## Result": [*markdown.table(HEADER, rows(run)), "", caption(run)],
        "## Training": [training],
        "## The gate": markdown.table(
            ("variant", "question", "check", "value", "expected", "verdict"), checks
        ),
        "## int8": search,
        "## Data": markdown.table(("split", "rows", "truncated", "classes"), splits),
        "## Bento": bento,
        "## Versions": [f"- {name} {version}" for name, version in distilled.environment.items()],
    }
    text = "\n\n".join(
        f"{title}\n\n" + "\n".join(lines) for title, lines in sections.items() if lines
    )
    write_text(run.report, f"{text}\n")
    return run.report


def _search(search: QuantisationSearch) -> list[str]:
    """Return what was tried for int8 as lines of Markdown."""
    header = ("way", "agreement", "points lost", "MB", "ms, batch of 32", "ms, alone", "verdict")
    rows = [
        (
            trial.way, f"{trial.agreement:.4f}", f"{trial.points_lost:+.2f}",
            f"{trial.size_bytes / 1e6:.1f}", f"{trial.batch_ms:.3f}", f"{trial.alone_ms:.3f}",
            "taken" if trial.way == search.taken else ", ".join(trial.failures) or "passed",
        )
        for trial in search.trials
    ]  # fmt: skip
    words = (
        f"Tried on the {search.rows} rows of select in {search.seconds:.0f} s, against fp32; "
        "milliseconds are of one text."
    )
    return [words, "", *markdown.table(header, rows)]


def _memory(peak_mb: dict[str, float]) -> str:
    return ", ".join(f"{name} {mb:,.0f} MB" for name, mb in peak_mb.items())


def _shape(latency: LatencyReport) -> tuple[int, int]:
    """Return the shortest length and the largest batch that were measured."""
    return (
        min(cell.length_tokens for cell in latency.cells),
        max(cell.batch_size for cell in latency.cells),
    )


def _smallest_and_largest(latency: LatencyReport, system: str) -> tuple[LatencyCell, LatencyCell]:
    shortest, _ = _shape(latency)
    cells = sorted(
        (c for c in latency.cells if c.system == system and c.length_tokens == shortest),
        key=lambda cell: cell.batch_size,
    )
    return cells[0], cells[-1]
