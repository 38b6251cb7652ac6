"""The report stage: all results of a run as one page of HTML that needs no other file."""

from __future__ import annotations

from importlib import resources
from typing import TYPE_CHECKING, Any

import numpy as np

from ad2kit.gate import summary
from ad2kit.gate.records import BentoRecord, LatencyReport, ParityReport, RowAnswers
from ad2kit.gate.shipping import campaign_of, passed_variants
from ad2kit.run.errors import MissingExtra, RunError
from ad2kit.run.files import read_lines, sha256_of, write_text
from ad2kit.run.folder import exclusive
from ad2kit.statistics import metrics
from ad2kit.statistics.logits import answers, scores, softmax
from ad2kit.training.records import DistillReport, overrun, read_curve

try:
    from jinja2 import Environment, StrictUndefined

    from ad2kit.gate import plots
except ModuleNotFoundError as error:
    raise MissingExtra(error.name or "jinja2", extra="cpu") from error

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from pathlib import Path

    from ad2kit.gate.records import LengthSlice, VariantParity
    from ad2kit.run.folder import RunDir
    from ad2kit.run.sections import Task

    Context = dict[str, Any]

TEACHER = "teacher"
# Limits for readable tables; all texts are in answers.jsonl.
_TEXTS = 12
_TEXT_CHARACTERS = 400
_MATRIX_CLASSES = 12


@exclusive
def report(run: RunDir) -> Path:
    """Write ``report.html`` of a run and return its path.

    Raises:
        RunError: parity has not been judged yet, or its answers are gone.
    """
    run.require(run.parity_report, command="parity")
    parity = ParityReport.read(run.parity_report)
    if not run.answers.is_file() or sha256_of(run.answers) != parity.answers_sha256:
        raise RunError(
            f"{run.answers} is missing, or not the file that belongs to {run.parity_report}",
            hint=f"run `ad2kit parity {run.path}`, which writes both",
        )
    template = resources.files("ad2kit.gate").joinpath("report.html").read_text(encoding="utf-8")
    # Texts and labels come from the user, so markup in them is escaped.
    environment = Environment(autoescape=True, undefined=StrictUndefined)
    write_text(run.report, environment.from_string(template).render(_context(run)))
    return run.report


def _context(run: RunDir) -> Context:
    parity = ParityReport.read(run.parity_report)
    distilled = DistillReport.read(run.distill_report)
    recipe = run.recipe
    variant = _shown_variant(run, parity)
    rows = [RowAnswers.model_validate_json(line) for line in read_lines(run.answers)]
    latency = summary.measured_latency(run)
    campaign = campaign_of(run)
    teacher = summary.teacher_report(run)
    refusals = []
    if campaign is not None:
        refusals = campaign.refusals(variant.variant, variant.manifest_sha256)
    return {
        "run": recipe,
        "verdict": "refused" if refusals and parity.passed else parity.verdict,
        "summary": [*_summary(parity, variant, latency), *refusals],
        "models": {
            "header": summary.HEADER,
            "rows": summary.model_rows(run),
            "caption": summary.caption(run),
        },
        "latency_plot": _latency_plot(parity, latency),
        "gate": [(*_checks(v), v.reasons(), _recall(v)) for v in parity.variants],
        "teacher": None if teacher is None else summary.teacher_table(teacher),
        "labels": distilled.labels,
        "differ": _differences(rows, distilled.task, distilled.labels, variant.variant),
        "slices": [_slice(piece) for piece in variant.slices],
        "agreement": _agreement(variant),
        "calibration": _calibration(rows, parity, variant) if variant.ece is not None else None,
        "training": _training(run, distilled),
        "search": summary.int8_search(run),
        "splits": [
            (
                name,
                str(facts.rows),
                str(facts.truncated),
                ", ".join(f"{label} {count}" for label, count in facts.class_counts.items()),
                facts.sha256[:12],
            )
            for name, facts in distilled.splits.items()
        ],
        "bento": _bento(run),
        "provenance": [
            *distilled.environment.items(),
            ("teacher sha256", distilled.teacher_sha256),
            ("student sha256", distilled.student_sha256),
            *((f"{v.variant} sha256", v.manifest_sha256) for v in parity.variants),
        ],
        "recipe": recipe.model_dump_json(indent=2),
    }


def _training(run: RunDir, distilled: DistillReport) -> Context:
    selection = distilled.selection.reason if distilled.selection else "nothing was trained"
    memory = ", ".join(f"{name} {mb:,.0f} MB" for name, mb in distilled.peak_memory_mb.items())
    metric = " and ".join(distilled.metrics)
    return {
        "words": f"{distilled.steps} updates in {distilled.train_seconds:.0f} s "
        f"({distilled.examples_per_s:.0f} examples/s); {selection}. "
        f"{distilled.verdict}. Peak memory: {memory}{_plan(run)}",
        "plot": _markup(plots.training(read_curve(run.curve("student")))),
        "select": _markup(plots.selection(distilled.selection, metric)),
    }


def _slice(piece: LengthSlice) -> tuple[str, ...]:
    return (
        f"{piece.tokens[0]} to {piece.tokens[1]}",
        str(piece.rows),
        f"{piece.teacher_score:.4f}",
        f"{piece.score:.4f}",
        f"{100 * (piece.score - piece.teacher_score):+.1f}",
    )


def _agreement(variant: VariantParity) -> Context | None:
    """Return tables of the agreement with the teacher, by class and by length."""
    agreement = variant.agreement
    if agreement is None:
        return None
    by_class = sorted(agreement.by_class.items(), key=lambda item: item[1].agreement)
    return {
        "classes": [(name, str(each.rows), f"{each.agreement:.3f}") for name, each in by_class],
        "slices": [
            (f"{each.tokens[0]} to {each.tokens[1]}", str(each.rows), f"{each.agreement:.3f}")
            for each in agreement.slices
        ],
    }


def _markup(svg: str) -> Any:
    from markupsafe import Markup

    return Markup(svg)  # noqa: S704  (drawn here, with labels that matplotlib escapes)


def _shown_variant(run: RunDir, parity: ParityReport) -> VariantParity:
    """Return the variant that the page describes: the one to ship, or the last if none passed."""
    passed = passed_variants(run)
    name = passed[0].name if passed else parity.variants[-1].variant
    return next(variant for variant in parity.variants if variant.variant == name)


def _summary(
    parity: ParityReport, variant: VariantParity, latency: LatencyReport | None
) -> list[str]:
    low, high = variant.retained_interval
    retained = f"{variant.variant} keeps {variant.retained:.2%} of its teacher"
    lines = [f"Judged against {parity.judged_against}."]
    if variant.agreement is not None:
        lines.append(f"{variant.variant} {variant.words}.")
    if parity.labelled_rows != 0:
        lines.append(f"{retained} (95 % interval {low:.2%} to {high:.2%}).")
    if latency is not None and variant.variant in latency.sizes_bytes:
        student = summary.smallest_and_largest(latency, variant.variant)
        if "teacher (PyTorch)" not in latency.sizes_bytes:
            lines.append(
                f"It answers one text in {student[0].p50_ms:.2f} ms, and "
                f"{student[1].texts_per_s:,.0f} texts/s in batches of {student[1].batch_size}. The "
                f"teacher is given by its answers, and is not measured."
                f"{summary.busy_words(latency)}"
            )
            return lines
        teacher = summary.smallest_and_largest(latency, "teacher (PyTorch)")
        share = latency.sizes_bytes[variant.variant] / latency.sizes_bytes["teacher (PyTorch)"]
        lines.append(
            f"It has {share:.0%} of the teacher's bytes, answers one text "
            f"{summary.times_as_fast(student[0], teacher[0])} as fast, and a batch of "
            f"{student[1].batch_size} {summary.times_as_fast(student[1], teacher[1])} as fast."
            f"{summary.busy_words(latency)}"
        )
    return lines


def _latency_plot(parity: ParityReport, latency: LatencyReport | None) -> Any:
    if latency is None:
        return ""
    score_by_system = {
        "teacher (PyTorch)": parity.teacher_score,
        "student (PyTorch)": parity.student_score,
        **{variant.variant: variant.score for variant in parity.variants},
    }
    points = {
        name: (summary.smallest_and_largest(latency, name)[0].p50_ms, score)
        for name, score in score_by_system.items()
        if name in latency.sizes_bytes
    }
    return _markup(plots.latency(points, " and ".join(parity.teacher_metrics)))


def _checks(variant: VariantParity) -> tuple[str, str, list[tuple[str, ...]]]:
    lines: list[tuple[str, ...]] = [
        (
            check.question,
            check.name,
            f"{check.value:.4g}",
            f"{check.interval[0]:.4g} to {check.interval[1]:.4g}" if check.interval else "",
            check.expected,
            check.verdict,
        )
        for check in variant.checks
    ]
    if variant.mcnemar_p is not None:
        p = f"{variant.mcnemar_p:.3g}"
        lines.append(("distillation quality", "McNemar's test, p", p, "", "not a check", ""))
    return variant.variant, variant.verdict, lines


def _recall(variant: VariantParity) -> list[tuple[str, ...]]:
    """Return a row for each class, the classes with the largest loss of recall first."""
    classes = sorted(
        variant.recall_by_class.items(), key=lambda item: item[1].variant - item[1].teacher
    )
    return [
        (
            name,
            str(recall.rows),
            f"{recall.teacher:.3f}",
            f"{recall.variant:.3f}",
            f"{100 * (recall.variant - recall.teacher):+.1f}",
        )
        for name, recall in classes
    ]


def _differences(
    rows: Sequence[RowAnswers], task: Task, names: tuple[str, ...], variant: str
) -> Context:
    """Return the texts on which teacher and variant differ most, and a confusion matrix of each."""
    logits = {name: np.array([row.logits[name] for row in rows]) for name in (TEACHER, variant)}
    outputs = {name: scores(task, values) for name, values in logits.items()}
    predictions = {name: answers(task, values) for name, values in logits.items()}
    distances = np.abs(outputs[TEACHER] - outputs[variant]).max(axis=1)
    furthest = np.argsort(-distances, kind="stable")[:_TEXTS]

    def answer_text(name: str, row: int) -> str:
        answer = predictions[name][row]
        if task == "regression":
            return f"{answer:.2f}"
        if task == "multi_label":
            return _set_labels(names, answer)
        return f"{names[int(answer)]} {outputs[name][row, int(answer)]:.2f}"

    def label_text(label: float | tuple[int, ...] | None) -> str:
        if label is None:
            return ""
        if isinstance(label, tuple):
            return _set_labels(names, label)
        return f"{label:.2f}" if task == "regression" else names[int(label)]

    is_different = predictions[TEACHER] != predictions[variant]
    different = is_different.reshape(len(rows), -1).any(axis=1)
    if task == "regression":
        words = f"The {len(furthest)} texts whose answers are furthest apart."
    else:
        words = (
            f"{variant} and teacher differ on {different.sum()} of {len(rows)} texts. "
            f"Here are the {len(furthest)} texts whose probabilities are furthest apart."
        )
    matrices = []
    if task == "single_label" and len(names) <= _MATRIX_CLASSES:
        own = np.array([-1 if row.label is None else row.label for row in rows], dtype=int)
        labels = np.where(own < 0, predictions[TEACHER], own)
        matrices = [(name, _matrix(predictions[name], labels, names)) for name in predictions]
    return {
        "words": words,
        "matrices": matrices,
        "header": ("text", "label", TEACHER, variant),
        "texts": [
            (
                _cut(" | ".join(rows[row].texts)),
                label_text(rows[row].label),
                answer_text(TEACHER, row),
                answer_text(variant, row),
            )
            for row in furthest.tolist()
        ],
    }


def _set_labels(names: Sequence[str], indicators: Iterable[Any]) -> str:
    """Return the names of the labels whose indicator is set, or "none"."""
    return ", ".join(name for name, on in zip(names, indicators, strict=True) if on) or "none"


def _matrix(
    predictions: np.ndarray[Any, Any], labels: np.ndarray[Any, Any], names: Sequence[str]
) -> list[tuple[str, list[tuple[int, str]]]]:
    """Return the confusion matrix: the name of each label, and its counts with their shares."""
    counts = np.zeros((len(names), len(names)), dtype=int)
    np.add.at(counts, (labels, predictions), 1)
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    return [
        (name, [(int(count), f"{share:.3f}") for count, share in zip(*cells, strict=True)])
        for name, *cells in zip(names, counts, shares, strict=True)
    ]


def _cut(text: str) -> str:
    return text if len(text) <= _TEXT_CHARACTERS else f"{text[:_TEXT_CHARACTERS]}…"


def _calibration(
    rows: Sequence[RowAnswers], parity: ParityReport, variant: VariantParity
) -> Context:
    rows = [row for row in rows if row.label is not None]
    labels = np.array([row.label for row in rows], dtype=int)
    temperatures = ((TEACHER, 1.0), (variant.variant, variant.temperature))
    bins = {
        name: metrics.reliability(
            softmax(np.array([row.logits[name] for row in rows]) / temperature), labels
        )
        for name, temperature in temperatures
    }
    unscaled = ""
    if variant.temperature != 1.0:
        unscaled = (
            f", before the temperature of {variant.temperature:.2f} {variant.ece_unscaled:.3f}"
        )
    return {
        "words": f"Expected calibration error: teacher {parity.teacher_ece:.3f}, "
        f"{variant.variant} {variant.ece:.3f}{unscaled}. Above the diagonal a model is too modest, "
        "below it too sure.",
        "plot": _markup(plots.calibration(bins)),
    }


def _plan(run: RunDir) -> str:
    plan = run.recipe.plan
    if plan is None:
        return ""
    updates = " and ".join(
        f"{count:,} updates of the {name} at {plan.seconds_per_update[name]:.3f} s"
        for name, count in plan.updates.items()
    )
    words = (
        f". Planned for at most {plan.max_minutes:g} min: {plan.rows:,} rows, {updates}"
        f", {plan.minutes:.1f} min"
    )
    delay = overrun(run, plan)
    return f"{words}; {delay}" if delay else words


def _bento(run: RunDir) -> str:
    if not run.bento_record.is_file():
        return ""
    record = BentoRecord.read(run.bento_record)
    return (
        f"{record.tag}: {record.service_texts} answers over HTTP, "
        f"{record.service_label_flips} flips."
    )
