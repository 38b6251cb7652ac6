"""The results of a run so far as plain tables, for the terminal and for the report."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ad2kit.exporting.records import OnnxArtifact, QuantisationSearch
from ad2kit.gate.records import LatencyReport, ParityReport
from ad2kit.gate.shipping import campaign_of
from ad2kit.models.records import TeacherReport, is_given
from ad2kit.training.records import DistillReport

if TYPE_CHECKING:
    from collections.abc import Iterator

    from ad2kit.gate.records import LatencyCell
    from ad2kit.run.folder import RunDir

# At most this many classes are named.
_NAMED = 12
HEADER = (
    "model",
    "score",
    "retained",
    "95 % interval",
    "size MB",
    "p50 ms",
    "p99 ms",
    "texts/s",
    "gate",
)


def model_rows(run: RunDir) -> list[tuple[str, ...]]:
    """Return a row for each baseline, the teacher, the student and each variant.

    The columns are those of :data:`HEADER`. Latency is that of one text of the shortest measured
    length, throughput that of the largest batch of that length. A missing measurement is blank.

    Raises:
        RunError: parity has not been judged yet.
    """
    run.require(run.parity_report, command="parity")
    parity = ParityReport.read(run.parity_report)
    latency = measured_latency(run)
    campaign = campaign_of(run)

    def measurements(system: str) -> tuple[str, ...]:
        if latency is None or system not in latency.sizes_bytes:
            return ("", "", "", "")
        smallest_batch, largest_batch = smallest_and_largest(latency, system)
        return (
            f"{latency.sizes_bytes[system] / 1e6:.1f}",
            f"{smallest_batch.p50_ms:.2f}",
            tail(smallest_batch),
            f"{largest_batch.texts_per_s:,.0f}",
        )

    teacher, student = "teacher (PyTorch)", "student (PyTorch)"
    if is_given(run.teacher):
        teacher = "teacher (answers)"
    rows = [
        *((name, f"{score:.4f}", *[""] * 7) for name, score in baseline_scores(run).items()),
        (teacher, f"{parity.teacher_score:.4f}", "", "", *measurements(teacher), ""),
        (
            student,
            f"{parity.student_score:.4f}",
            f"{parity.student_score / max(parity.teacher_score, 1e-9):.2%}",
            "",
            *measurements(student),
            "",
        ),
    ]
    for verdict in parity.variants:
        low, high = verdict.retained_interval
        gate: str = verdict.verdict
        if verdict.passed and campaign is not None:
            refusals = campaign.refusals(verdict.variant, verdict.manifest_sha256)
            gate = "refused" if refusals else gate
        rows.append(
            (
                f"{verdict.variant} (ONNX)",
                f"{verdict.score:.4f}",
                f"{verdict.retained:.2%}",
                f"{low:.2%} to {high:.2%}",
                *measurements(verdict.variant),
                gate,
            )
        )
    return rows


def teacher_report(run: RunDir) -> TeacherReport | None:
    """Return the comparison of a run's teacher with simpler models; None without a current one."""
    if not run.teacher_report.is_file():
        return None
    report = TeacherReport.read(run.teacher_report)
    distilled = DistillReport.read(run.distill_report)
    return report if report.teacher_sha256 == distilled.teacher_sha256 else None


def baseline_scores(run: RunDir) -> dict[str, float]:
    """Return the validation scores of the baselines of :func:`teacher_report`, by their names."""
    report = teacher_report(run)
    if report is None:
        return {}
    return {baseline.name: baseline.validation_score for baseline in report.baselines}


def teacher_table(report: TeacherReport) -> dict[str, Any]:
    """Return a table of the teacher and the baselines on ``select``, with words and findings."""
    baseline_rows: list[tuple[str, ...]] = [
        (
            baseline.name,
            f"{baseline.select_score:.4f}",
            f"{100 * baseline.difference:+.1f}",
            f"{100 * baseline.standard_error:.1f}",
            "" if baseline.bar else "for information",
        )
        for baseline in report.baselines
    ]
    return {
        "words": f"{' and '.join(report.metrics)} on the {report.rows} rows of select. The "
        f"simpler models were trained on {report.train_rows} training rows. The probes are linear "
        "models on what the encoder gave before its fine-tuning: on what the head reads, and on "
        "the mean of the token vectors.",
        "header": ("model", "score", "teacher is better by, points", "standard error", ""),
        "rows": [*baseline_rows, (f"teacher {report.teacher}", f"{report.score:.4f}", "", "", "")],
        "findings": report.findings,
        "remedy": report.remedy,
    }


def measured_latency(run: RunDir) -> LatencyReport | None:
    """Return the latency report of a run; None if it lacks a passed artefact or has another one."""
    if not run.latency_report.is_file():
        return None
    latency = LatencyReport.read(run.latency_report)
    parity = ParityReport.read(run.parity_report)
    judged = {verdict.variant: verdict.manifest_sha256 for verdict in parity.variants}
    passed = {verdict.variant for verdict in parity.variants if verdict.passed}
    all_judged = latency.artifacts.items() <= judged.items()
    complete = passed <= latency.artifacts.keys()
    return latency if all_judged and complete else None


def caption(run: RunDir) -> str:
    """Return a text that says on which rows and which machine the table was measured."""
    parity = ParityReport.read(run.parity_report)
    difference = max(verdict.smallest_detectable_difference for verdict in parity.variants)
    rows = f"{parity.rows} validation texts"
    if parity.labelled_rows is not None:
        rows = f"the {parity.labelled_rows} of {rows} that have labels"
        if not parity.labelled_rows:
            rows = f"{parity.rows} validation texts, with the teacher's answers as labels"
    text = (
        f"Score: {' and '.join(parity.teacher_metrics)} on {rows}; "
        "differences below "
        f"{100 * difference:.1f} points are within their noise."
    )
    if bad_rows := DistillReport.read(run.distill_report).bad_rows:
        text += f" {bad_rows} bad rows were left out of the data ({run.bad_rows.name})."
    for variant in parity.variants:
        if variant.agreement is not None:
            text += f" {variant.variant} {variant.words}."
    if untested := untested_words(parity):
        text += f" {untested}"
    if run.recipe.data.select_from == "validation":
        text += " The checkpoint was chosen on these same texts, which flatters the student."
    teacher = teacher_report(run)
    if teacher is not None:
        encoder = "the student's encoder" if teacher.given else "its encoder"
        text += (
            f" Rows above the teacher: simpler models, trained on {teacher.train_rows} rows; the "
            f"probes read {encoder} as it was before fine-tuning."
        )
    for words in (*_words_on_8_bits(run), *_words_on_company(run)):
        text += f" {words}"
    latency = measured_latency(run)
    if latency is None:
        return text
    shortest, largest = _shortest_length_and_largest_batch(latency)
    return (
        f"{text} Latency: forward pass of 1 text of {shortest} tokens; throughput: batch "
        f"{largest}, {shortest} tokens; {latency.threads} threads of {latency.environment['cpu']}."
        f"{busy_words(latency)}"
    )


def judged_against(run: RunDir) -> str:
    """Return what the variants of a run were judged against, in words."""
    return ParityReport.read(run.parity_report).judged_against


def untested_words(parity: ParityReport) -> str:
    """Return a sentence that names the classes with too few rows; "" if there are none."""
    # The teacher's answers decide which classes these are, so all variants have the same ones.
    rows_by_class = {
        name: rows for variant in parity.variants for name, rows in variant.untested_classes.items()
    }
    if not rows_by_class:
        return ""
    named = [f"{name} ({rows})" for name, rows in list(rows_by_class.items())[:_NAMED]]
    more = f" and {len(rows_by_class) - _NAMED} more" if len(rows_by_class) > _NAMED else ""
    return (
        "The teacher gives these on too few validation texts to test whether a student lost them: "
        f"{', '.join(named)}{more}."
    )


def busy_words(latency: LatencyReport) -> str:
    """Return a warning if other programs used the machine during the measurement; else ""."""
    if not latency.busy:
        return ""
    return (
        f" The machine was busy: rounds of the same calls differ by up to {latency.spread:.1f} "
        "times. Measure again when it is idle: ad2kit bench."
    )


def tail(cell: LatencyCell) -> str:
    """Return the p99 in ms, or "max" and the slowest call if fewer than 100 calls were timed."""
    return f"{cell.p99_ms:.2f}" if cell.p99_ms is not None else f"max {cell.tail_ms:.2f}"


def times_as_fast(cell: LatencyCell, other: LatencyCell) -> str:
    """Return how many times as fast a system is as another one, with the range over the rounds."""
    ratio = other.p50_ms / cell.p50_ms
    ratios = [
        other_ms / cell_ms
        for cell_ms, other_ms in zip(cell.rounds_ms, other.rounds_ms, strict=True)
    ]
    if not ratios:
        return f"{ratio:.1f} times"
    return f"{ratio:.1f} times ({min(ratios):.1f} to {max(ratios):.1f} over {len(ratios)} rounds)"


def _words_on_8_bits(run: RunDir) -> Iterator[str]:
    """Yield a sentence on the weights of each variant that has weights of 8 bits."""
    for variant in run.recipe.export.variants:
        manifest = run.onnx(variant) / OnnxArtifact.file_name
        if not manifest.is_file():
            continue
        artifact = OnnxArtifact.read(manifest)
        if artifact.weights_in_8_bits is None:
            continue
        words = f"{variant} has {artifact.weights_in_8_bits:.0%} of its weights in 8 bits"
        # The last part of a name is the kind of the node.
        float_nodes = [name.strip("/").rpartition("/")[0] for name in artifact.in_float]
        yield f"{words}, and in float {', '.join(float_nodes)}." if float_nodes else f"{words}."


def _words_on_company(run: RunDir) -> Iterator[str]:
    """Yield a sentence on each variant whose answers depend on the texts beside them."""
    if not run.parity_report.is_file():
        return
    for verdict in ParityReport.read(run.parity_report).variants:
        company = verdict.company
        if company is None or verdict.is_steady:
            continue
        moved = f"moved a probability by {company.shift:.2g}"
        if run.recipe.data.task == "regression":
            moved = f"moved a value by {company.shift:.2g} standard deviations"
        ships = ""
        if run.recipe.export.ship == "steady":
            ships = ", so a steady variant ships before it"
        yield (
            f"{verdict.variant} {moved} and changed {company.flips:.1%} of the answers when other "
            f"texts shared a batch{ships}."
        )


def latency_lines(latency: LatencyReport) -> list[str]:
    """Return one line with the latency (ms) and the throughput of each cell."""
    return [
        f"{cell.system:<20} batch {cell.batch_size:>3} x {cell.length_tokens:>3} tokens  "
        f"p50 {cell.p50_ms:8.2f}  p90 {cell.p90_ms:8.2f}  "
        f"{'max' if cell.p99_ms is None else 'p99'} {cell.tail_ms:8.2f} ms  "
        f"{cell.texts_per_s:9,.0f} texts/s  ({cell.calls} calls)"
        for cell in latency.cells
    ]


def capacity_lines(latency: LatencyReport) -> list[str]:
    """Return one line for each system and length, with its throughput and the cost of texts."""
    lines = [f"capacity of this machine at a p99 of at most {latency.p99_target_ms:g} ms:"]
    for capacity in latency.capacity:
        line = f"{capacity.system:<20} {capacity.length_tokens:>3} tokens  "
        if capacity.texts_per_s is None:
            lines.append(f"{line}no measured batch is answered in time")
            continue
        line += f"{capacity.texts_per_s:9,.0f} texts/s in batches of {capacity.batch_size}"
        if capacity.cost_per_million_texts is not None:
            line += f"  {capacity.cost_per_million_texts:.4f} per million texts"
        lines.append(line)
    if latency.price_per_hour is not None:
        lines.append(f"at {latency.price_per_hour:g} per hour, for a machine that is never idle")
    return lines


def int8_search(run: RunDir) -> dict[str, Any] | None:
    """Return a table of the search for the current int8 graph; None if there is none."""
    if "int8" not in run.recipe.export.variants or not run.int8_search.is_file():
        return None
    search = QuantisationSearch.read(run.int8_search)
    if search.inputs != OnnxArtifact.read(run.onnx("int8") / OnnxArtifact.file_name).inputs:
        return None
    return {
        "words": f"Tried on the {search.rows} rows of select in {search.seconds:.0f} s, against "
        "fp32. Of what passes by a standard error and moves the logits little more than the best "
        "does, the fastest is taken; milliseconds are of one text.",
        "header": (
            "way",
            "agreement",
            "logits, RMS",
            "points lost",
            "MB",
            "ms, batch of 32",
            "ms, alone",
            "",
        ),
        "rows": [
            (
                trial.way,
                f"{trial.agreement:.4f}",
                f"{trial.rms_error:.3f}",
                f"{trial.points_lost:+.2f}",
                f"{trial.size_bytes / 1e6:.1f}",
                f"{trial.batch_ms:.3f}",
                f"{trial.alone_ms:.3f}",
                "taken" if trial.way == search.taken else "; ".join(trial.failures) or "passed",
            )
            for trial in search.trials
        ],
    }


def _shortest_length_and_largest_batch(latency: LatencyReport) -> tuple[int, int]:
    """Return the shortest length in tokens, and the largest batch size, that were measured."""
    return (
        min(cell.length_tokens for cell in latency.cells),
        max(cell.batch_size for cell in latency.cells),
    )


def smallest_and_largest(latency: LatencyReport, system: str) -> tuple[LatencyCell, LatencyCell]:
    """Return the cells of the smallest and the largest batch of the shortest length."""
    shortest, _ = _shortest_length_and_largest_batch(latency)
    cells = sorted(
        (
            cell
            for cell in latency.cells
            if cell.system == system and cell.length_tokens == shortest
        ),
        key=lambda cell: cell.batch_size,
    )
    return cells[0], cells[-1]
