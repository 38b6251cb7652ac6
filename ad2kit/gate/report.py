"""The report stage: all that a run has shown, as one page of HTML that needs no other file."""

from __future__ import annotations

from importlib import resources
from typing import TYPE_CHECKING, Any

import numpy as np

from ad2kit.data import metrics
from ad2kit.data.labels import answers, scores, softmax
from ad2kit.gate import summary
from ad2kit.gate.records import BentoRecord, LatencyReport, ParityReport, RowAnswers
from ad2kit.gate.shipping import campaign_of, passed_variants
from ad2kit.run.errors import MissingExtra, RunError
from ad2kit.run.files import read_lines, sha256_of, write_text
from ad2kit.run.folder import exclusive
from ad2kit.training.records import DistillReport, overrun, read_curve

try:
    from jinja2 import Environment, StrictUndefined

    from ad2kit.gate import plots
except ModuleNotFoundError as error:
    raise MissingExtra(error.name or "jinja2", extra="cpu") from error

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from ad2kit.gate.records import LengthSlice, VariantParity
    from ad2kit.run.folder import RunDir
    from ad2kit.run.sections import Task

    Context = dict[str, Any]

TEACHER = "teacher"
# What a person can read; the rest is in answers.jsonl.
_TEXTS, _TEXT_CHARACTERS, _MATRIX_CLASSES = 12, 400, 12


@exclusive
def report(run: RunDir) -> Path:
    """Write ``report.html`` of a run and return its path.

    Raises:
        RunError: parity has not been judged yet, or its answers are gone.
    """
    run.require(run.parity_report, command="parity")
    judged = ParityReport.read(run.parity_report)
    if not run.answers.is_file() or sha256_of(run.answers) != judged.answers_sha256:
        raise RunError(
            f"{run.answers} is missing, or not the file that belongs to {run.parity_report}",
            hint=f"run `ad2kit parity {run.path}`, which writes both",
        )
    template = resources.files("ad2kit").joinpath("report.html").read_text(encoding="utf-8")
    # Texts and labels are the user's: whatever they hold is shown and not interpreted.
    environment = Environment(autoescape=True, undefined=StrictUndefined)
    write_text(run.report, environment.from_string(template).render(_context(run)))
    return run.report


def _context(run: RunDir) -> Context:
    parity, distilled = ParityReport.read(run.parity_report), DistillReport.read(run.distill_report)
    recipe, variant = run.recipe, _shown(run, parity)
    answered = [RowAnswers.model_validate_json(line) for line in read_lines(run.answers)]
    latency, campaign, looked = (
        summary.measured_latency(run),
        campaign_of(run),
        summary.teacher_report(run),
    )
    refused = (
        [] if campaign is None else campaign.refusals(variant.variant, variant.manifest_sha256)
    )
    return {
        "run": recipe,
        "verdict": "refused" if refused and parity.passed else parity.verdict,
        "summary": [*_summary(variant, latency), *refused],
        "models": {
            "header": summary.HEADER,
            "rows": summary.model_rows(run),
            "caption": summary.caption(run),
        },
        "latency_plot": _latency_plot(parity, latency),
        "gate": [(*_checks(each), each.reasons(), _recall(each)) for each in parity.variants],
        "teacher": None if looked is None else summary.teacher_table(looked),
        "labels": distilled.labels,
        "differ": _differ(answered, distilled.task, distilled.labels, variant.variant),
        "slices": [_slice(piece) for piece in variant.slices],
        "calibration": _calibration(answered, parity, variant)
        if distilled.task == "single_label"
        else None,
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
            *((f"{each.variant} sha256", each.manifest_sha256) for each in parity.variants),
        ],
        "recipe": recipe.model_dump_json(indent=2),
    }


def _training(run: RunDir, distilled: DistillReport) -> Context:
    kept = distilled.selection.reason if distilled.selection else "nothing was trained"
    memory = ", ".join(f"{name} {mb:,.0f} MB" for name, mb in distilled.peak_memory_mb.items())
    metric = " and ".join(distilled.metrics)
    return {
        "words": f"{distilled.steps} updates in {distilled.train_seconds:.0f} s "
        f"({distilled.examples_per_s:.0f} examples/s); {kept}. "
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


def _markup(svg: str) -> Any:
    from markupsafe import Markup

    return Markup(svg)  # noqa: S704  (drawn here, with labels that matplotlib escapes)


def _shown(run: RunDir, parity: ParityReport) -> VariantParity:
    """Return the variant that the page is about: the one to be served, or the last."""
    passed = passed_variants(run)
    name = passed[0].name if passed else parity.variants[-1].variant
    return next(each for each in parity.variants if each.variant == name)


def _summary(variant: VariantParity, latency: LatencyReport | None) -> list[str]:
    low, high = variant.retained_interval
    kept = f"{variant.variant} keeps {variant.retained:.2%} of its teacher"
    lines = [f"{kept} (95 % interval {low:.2%} to {high:.2%})."]
    if latency is not None and variant.variant in latency.sizes_bytes:
        teacher, ours = (
            summary.smallest_and_largest(latency, system)
            for system in ("teacher (PyTorch)", variant.variant)
        )
        share = latency.sizes_bytes[variant.variant] / latency.sizes_bytes["teacher (PyTorch)"]
        lines.append(
            f"It has {share:.0%} of the teacher's bytes, answers one text "
            f"{summary.times_as_fast(ours[0], teacher[0])} as fast, and a batch of "
            f"{ours[1].batch_size} {summary.times_as_fast(ours[1], teacher[1])} as fast."
            f"{summary.busy_words(latency)}"
        )
    return lines


def _latency_plot(parity: ParityReport, latency: LatencyReport | None) -> Any:
    if latency is None:
        return ""
    known = {
        "teacher (PyTorch)": parity.teacher_score,
        "student (PyTorch)": parity.student_score,
        **{each.variant: each.score for each in parity.variants},
    }
    points = {
        name: (summary.smallest_and_largest(latency, name)[0].p50_ms, value)
        for name, value in known.items()
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
    """Return a row for each class: those that lost most first."""
    classes = sorted(
        variant.recall_by_class.items(), key=lambda item: item[1].variant - item[1].teacher
    )
    return [
        (
            name,
            str(found.rows),
            f"{found.teacher:.3f}",
            f"{found.variant:.3f}",
            f"{100 * (found.variant - found.teacher):+.1f}",
        )
        for name, found in classes
    ]


def _differ(
    answered: Sequence[RowAnswers], task: Task, names: tuple[str, ...], variant: str
) -> Context:
    """Return the texts on which teacher and variant are furthest apart, and how each is wrong."""
    logits = {
        name: np.array([line.logits[name] for line in answered]) for name in (TEACHER, variant)
    }
    told = {name: scores(task, values) for name, values in logits.items()}
    found = {name: answers(task, values) for name, values in logits.items()}
    distance = np.abs(told[TEACHER] - told[variant]).max(axis=1)
    furthest = np.argsort(-distance, kind="stable")[:_TEXTS]

    def say(name: str, row: int) -> str:
        answer = found[name][row]
        if task == "regression":
            return f"{answer:.2f}"
        if task == "multi_label":
            return ", ".join(n for n, on in zip(names, answer, strict=True) if on) or "none"
        return f"{names[int(answer)]} {told[name][row, int(answer)]:.2f}"

    def truth(label: float | tuple[int, ...]) -> str:
        if isinstance(label, tuple):
            return ", ".join(n for n, on in zip(names, label, strict=True) if on) or "none"
        return f"{label:.2f}" if task == "regression" else names[int(label)]

    different = (found[TEACHER] != found[variant]).reshape(len(answered), -1).any(axis=1)
    words = (
        f"The {len(furthest)} texts whose answers are furthest apart."
        if task == "regression"
        else f"{variant} and teacher differ on {different.sum()} of {len(answered)} texts. "
        f"Here are the {len(furthest)} texts whose probabilities are furthest apart."
    )
    matrices = []
    if task == "single_label" and len(names) <= _MATRIX_CLASSES:
        labels = np.array([line.label for line in answered], dtype=int)
        matrices = [(name, _matrix(found[name], labels, names)) for name in found]
    return {
        "words": words,
        "matrices": matrices,
        "header": ("text", "label", TEACHER, variant),
        "texts": [
            (
                _cut(" | ".join(answered[row].texts)),
                truth(answered[row].label),
                say(TEACHER, row),
                say(variant, row),
            )
            for row in furthest.tolist()
        ],
    }


def _matrix(
    found: np.ndarray[Any, Any], labels: np.ndarray[Any, Any], names: Sequence[str]
) -> list[tuple[str, list[tuple[int, str]]]]:
    """Return the confusion matrix: for each label its name, and counts with their shares of it."""
    counts = np.zeros((len(names), len(names)), dtype=int)
    np.add.at(counts, (labels, found), 1)
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    return [
        (name, [(int(count), f"{share:.3f}") for count, share in zip(*cells, strict=True)])
        for name, *cells in zip(names, counts, shares, strict=True)
    ]


def _cut(text: str) -> str:
    return text if len(text) <= _TEXT_CHARACTERS else f"{text[:_TEXT_CHARACTERS]}…"


def _calibration(
    answered: Sequence[RowAnswers], parity: ParityReport, variant: VariantParity
) -> Context:
    labels = np.array([line.label for line in answered], dtype=int)
    bins = {
        name: metrics.reliability(
            softmax(np.array([line.logits[name] for line in answered]) / temperature), labels
        )
        for name, temperature in (
            (TEACHER, 1.0),
            (variant.variant, variant.temperature),
        )
    }
    scaled = (
        f", before the temperature of {variant.temperature:.2f} {variant.ece_unscaled:.3f}"
        if variant.temperature != 1.0
        else ""
    )
    return {
        "words": f"Expected calibration error: teacher {parity.teacher_ece:.3f}, "
        f"{variant.variant} {variant.ece:.3f}{scaled}. Above the diagonal a model is too modest, "
        "below it too sure.",
        "plot": _markup(plots.calibration(bins)),
    }


def _plan(run: RunDir) -> str:
    plan = run.recipe.plan
    if plan is None:
        return ""
    late = overrun(run, plan)
    return (
        f". Planned for at most {plan.max_minutes:g} min: {plan.rows:,} rows, "
        + " and ".join(
            f"{updates:,} updates of the {name} at {plan.seconds_per_update[name]:.3f} s"
            for name, updates in plan.updates.items()
        )
        + f", {plan.minutes:.1f} min"
        + (f"; {late}" if late else "")
    )


def _bento(run: RunDir) -> str:
    if not run.bento_record.is_file():
        return ""
    record = BentoRecord.read(run.bento_record)
    return (
        f"{record.tag}: {record.service_texts} answers over HTTP, "
        f"{record.service_label_flips} flips."
    )
