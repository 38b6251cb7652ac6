"""The check command: describes a recipe's data, what its gate can prove, and what training costs.

Nothing is trained, and nothing is written but the rows of a large table (see
:mod:`ad2kit.data.reading`). Data and models are opened in the same way as in the
distill stage, so that this stage refuses the same recipes.
"""

from __future__ import annotations

import math
import time
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ad2kit.data import splits
from ad2kit.data.labels import balance, counts, has_label
from ad2kit.run.machine import available_cpus
from ad2kit.run.records import Part
from ad2kit.run.sections import LongTexts, TextLength
from ad2kit.statistics import sample_size
from ad2kit.tables.rows import bad_rows_words
from ad2kit.training.schedule import Schedule

if TYPE_CHECKING:
    from ad2kit.data.splits import Data, Split
    from ad2kit.models.text_model import TextModel
    from ad2kit.run.recipe import Recipe
    from ad2kit.run.sections import TrainRecipe

# The number of texts of a split that are tokenised.
_SAMPLE = 2_000
# Above this share of texts in quotation marks, a program has probably added the marks.
_QUOTED = 0.2
# The most labels that are named.
_NAMED = 12
# The share of texts on which either student or teacher is assumed to be right, but not both.
_DIFFER = 0.1
# Bytes of a trained parameter: itself, its gradient, and Adam's two moments, all float32.
_TRAINED_BYTES = 16
# Bytes of a parameter that is only read, float32.
_READ_BYTES = 4
# Memory of PyTorch itself.
_PYTORCH_BYTES = 600e6
# Timed forward passes.
_CALLS = 5
# Forward passes that take as long as a forward and a backward pass together.
_PASS = 3


class SplitCheck(Part):
    """Facts about a split; lengths are in tokens before cutting, of at most 2,000 of its texts.

    ``duplicates`` is the share of its rows whose text occurs in an earlier row, ``known`` the share
    of validation rows whose text is also a training text. ``unlabelled`` counts the rows without a
    label. ``cut`` is the share of texts that are
    too long. ``quoted`` is the share of texts in quotation marks, which belong to the text.
    """

    rows: int
    labels: str
    tokens_median: int
    tokens_p95: int
    tokens_longest: int
    cut: float
    duplicates: float
    known: float | None
    unlabelled: int = 0
    quoted: float
    example: tuple[str, ...]


class CheckReport(Part):
    """The result of `ad2kit check` for a recipe.

    ``half_width`` is half of the width of the 95 % interval of "retained", as a fraction.
    ``rows_to_pass`` is the number of validation rows that can show a student as good as its
    teacher. Both assume that teacher and student differ on one text of ten. ``rows_to_agree`` is
    the number of rows that can show enough agreement of a conversion that moves a label on half as
    many texts as ``parity.min_agreement`` allows. All are computed by
    :mod:`ad2kit.statistics.sample_size`, as in the gate. ``rows_to_imitate`` is the number of rows
    that can show a student that differs from its teacher on half as many texts as
    ``parity.min_teacher_agreement`` allows. Null means that no number of rows is enough.
    ``few_rows`` names the classes (or labels) with fewer than ``rows_of_a_class`` validation rows,
    for which it cannot be tested whether a student lost them. Memory and minutes are rough: they
    come from the number of parameters, and from one forward pass on this machine. ``bad_rows`` is
    the number of rows that ``data.bad_rows: skip`` leaves out, and ``bad_rows_words`` names one.
    """

    task: str
    labels: tuple[str, ...]
    ordered: bool
    splits: dict[str, SplitCheck]
    bad_rows: int
    bad_rows_words: str
    max_length_tokens: int
    long_texts: LongTexts = "cut"
    half_width: float
    rows_to_pass: int | None
    rows_to_agree: int | None
    rows_to_imitate: int | None = None
    rows_of_a_class: int
    few_rows: tuple[str, ...]
    min_retained: float
    teacher: str
    updates: dict[str, int]
    memory_mb: float
    minutes: float


def check(recipe: Recipe, data: Data, teacher: TextModel | None, student: TextModel) -> CheckReport:
    """Describe the data of a recipe, what they can prove, and what the training costs.

    Args:
        recipe: the recipe.
        data: the data of the recipe.
        teacher: the teacher of the recipe, before its training; None if it is given by its answers.
        student: the student, before its training.
    """
    reader = teacher or student
    split_checks = {
        name: _split(split, data, recipe, reader) for name, split in data.splits().items()
    }
    phases: dict[str, TrainRecipe | None] = {
        "teacher": recipe.teacher.finetune,
        "student": recipe.distill,
    }
    texts = {"teacher": len(data.train), "student": len(data.train) + len(data.unlabelled)}
    updates = {
        name: Schedule.planned(texts[name], phase).total
        for name, phase in phases.items()
        if phase is not None
    }
    return CheckReport(
        task=data.task,
        labels=data.labels,
        ordered=data.order_given,
        splits=split_checks,
        bad_rows=len(data.bad_rows),
        bad_rows_words=bad_rows_words(data.bad_rows) if data.bad_rows else "",
        max_length_tokens=recipe.data.max_length_tokens,
        long_texts=recipe.data.long_texts,
        **_evidence(recipe, data),
        teacher=recipe.teacher.title,
        updates=updates,
        memory_mb=_memory_bytes(recipe, reader, split_checks["train"]) / 1e6,
        minutes=_minutes(recipe, data, reader, updates),
    )


def check_words(report: CheckReport) -> str:
    """Return a report as text for one screen of the terminal."""
    head = ("", "rows", "tokens: median", "95 %", "longest", "cut", "repeated")
    table = [
        (
            name,
            f"{split.rows:,}",
            str(split.tokens_median),
            str(split.tokens_p95),
            str(split.tokens_longest),
            f"{split.cut:.1%}",
            f"{split.duplicates:.1%}",
        )
        for name, split in report.splits.items()
    ]
    widths = [max(map(len, cells)) for cells in zip(head, *table, strict=True)]
    lines = [
        "  ".join(
            f"{cell:<{width}}" if column == 0 else f"{cell:>{width}}"
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in (head, *table)
    ]
    train = report.splits["train"]
    validation = report.splits["validation"]
    order = "in the order that was given" if report.ordered else "in the order of the alphabet"
    if not report.ordered and all(name.removeprefix("-").isdecimal() for name in report.labels):
        order = "in the order of numbers"
    names = ", ".join(report.labels[:_NAMED])
    rest = f", and {len(report.labels) - _NAMED} more" if len(report.labels) > _NAMED else ""
    updates = " and ".join(
        f"{count:,} updates of the {model}" for model, count in report.updates.items()
    )
    if report.task != "regression":
        lines += [f"labels, {order}: {names}{rest}", f"in train: {train.labels}"]
    if train.quoted > _QUOTED:
        lines.append(
            f"{train.quoted:.0%} of the training texts stand in quotation marks, which belong to "
            "the text: TSV has no quoting; if they are not meant, write CSV"
        )
    if report.bad_rows:
        lines.append(report.bad_rows_words)
    lines += [
        f"first row: {' | '.join(_short(text) for text in train.example)}",
        f"validation texts that are also training texts: {validation.known or 0:.1%}",
        *_label_words(report),
        f"{TextLength(report.max_length_tokens, report.long_texts).words}, data.max_length_tokens",
        *_gate_words(report, validation.rows),
        (
            f"the training: {updates}, roughly {report.minutes:.0f} min and "
            f"{report.memory_mb / 1e3:.1f} GB on this machine"
        ),
        f"ok: {report.task}; teacher {report.teacher}",
    ]
    return "\n".join(lines)


def _label_words(report: CheckReport) -> list[str]:
    """Return a line on the rows that lack labels, if there are any."""
    lacking = {
        name: split.unlabelled
        for name, split in report.splits.items()
        if split.unlabelled and name != "unlabelled"
    }
    if not lacking:
        return []
    rows = ", ".join(f"{count:,} of {name}" for name, count in lacking.items())
    return [
        (
            f"rows without a label: {rows}; they are judged by the answers of the teacher "
            "(parity.min_teacher_agreement), which can be shown "
            f"{_rows_words(report.rows_to_imitate)}"
        )
    ]


def _evidence(recipe: Recipe, data: Data) -> dict[str, Any]:
    """Return the fields of the report that say what the validation rows can show.

    They are computed by the functions of the gate.
    """
    rows = len(data.validation)
    thresholds = recipe.parity
    rows_by_label = counts(data.task, data.validation.labels, data.labels)
    min_rows = sample_size.least_rows_of_a_class(len(data.labels))
    deviation = math.sqrt(_DIFFER)
    agreement = (thresholds.min_agreement, thresholds.min_agreement_lower)
    true_agreement = sample_size.supposed(math.nan, thresholds.min_agreement, 1.0)
    rows_for = (
        sample_size.rows_for_correlation
        if data.task == "regression"
        else sample_size.rows_for_share
    )
    return {
        "half_width": sample_size.half_width(deviation, rows),
        "rows_to_pass": sample_size.rows_for_mean(
            1.0, thresholds.min_retained, thresholds.min_retained_lower, deviation
        ),
        "rows_to_agree": rows_for(true_agreement, *agreement),
        "rows_to_imitate": rows_for(
            sample_size.supposed(math.nan, thresholds.min_teacher_agreement, 1.0),
            thresholds.min_teacher_agreement,
            thresholds.min_teacher_agreement_lower,
        ),
        "rows_of_a_class": min_rows,
        # Of rows without labels, the answers of the teacher decide which classes have few.
        "few_rows": tuple(
            name
            for name, count in rows_by_label.items()
            if count < min_rows and has_label(data.task, data.validation.labels).all()
        ),
        "min_retained": thresholds.min_retained,
    }


def _rows_words(needed: int | None) -> str:
    return "by no number of rows" if needed is None else f"from about {needed:,} rows on"


def _gate_words(report: CheckReport, rows: int) -> list[str]:
    """Return the lines that say what the validation rows can show."""
    interval_line = (
        f"the gate: with {rows:,} validation rows the interval of what is retained will be about "
        f"±{100 * report.half_width:.1f} points, if teacher and student differ on one text of ten; "
        f"{report.min_retained:g} can be shown {_rows_words(report.rows_to_pass)} for a student as "
        f"good as its teacher, and the agreement of a converted variant with fp32 "
        f"{_rows_words(report.rows_to_agree)}"
    )
    if not report.few_rows:
        return [interval_line]
    names = ", ".join(report.few_rows[:_NAMED])
    rest = f" and {len(report.few_rows) - _NAMED} more" if len(report.few_rows) > _NAMED else ""
    classes_line = (
        f"labels on fewer than {report.rows_of_a_class} validation rows, too few to test whether "
        f"the student lost them: {names}{rest}"
    )
    return [interval_line, classes_line]


def _short(text: str, characters: int = 70) -> str:
    """Return a text in quotation marks on one line, cut to some characters."""
    text = " ".join(text.split())
    return repr(text if len(text) <= characters else f"{text[:characters]}…")


def _split(split: Split, data: Data, recipe: Recipe, teacher: TextModel) -> SplitCheck:
    """Return the facts of a split."""
    sample = split.take(np.linspace(0, len(split) - 1, min(len(split), _SAMPLE)).astype(int))
    columns = [list(column) for column in zip(*sample.texts, strict=True)]
    lengths = np.array([len(ids) for ids in teacher.tokenizer(*columns)["input_ids"]])
    labels = ""
    labelled = 0
    if split is not data.unlabelled:
        labelled = int(has_label(data.task, split.labels).sum())
        labels = balance(counts(data.task, split.labels, data.labels), labelled)
    known_share = None
    if split is data.validation:
        known_share = float(splits.known_rows(data, recipe.data).mean())
    quoted = sum(text[:1] == text[-1:] == '"' for column in columns for text in column)
    return SplitCheck(
        rows=len(split),
        labels=labels,
        tokens_median=int(np.median(lengths)),
        tokens_p95=int(np.quantile(lengths, 0.95)),
        tokens_longest=int(lengths.max()),
        cut=float((lengths > recipe.data.max_length_tokens).mean()),
        duplicates=1 - len(np.unique(split.texts.hashes())) / len(split),
        known=known_share,
        unlabelled=len(split) - labelled,
        quoted=quoted / sum(map(len, columns)),
        example=split.texts[0],
    )


def _memory_bytes(recipe: Recipe, teacher: TextModel, train: SplitCheck) -> float:
    """Return the peak memory of a training in bytes: parameters, and the activations of a batch.

    The activations of a layer in float32 take 2 s b h (34 + 5 a s / h) bytes for s tokens, b texts,
    width h and a heads: twice the 16-bit formula of Korthikanti et al. (2022), equation 2.
    """
    config = teacher.module.config
    phase = recipe.teacher.finetune or recipe.distill
    tokens = min(train.tokens_longest, recipe.data.max_length_tokens)
    texts = phase.batch_size // phase.accumulation_steps
    if recipe.data.long_texts == "windows":  # a part of an update reads as many, or one text
        step = tokens - recipe.data.length.window_overlap_tokens
        windows = min(recipe.data.max_windows, math.ceil(train.tokens_longest / step))
        texts = max(texts, windows)
    width = config.hidden_size
    heads = config.num_attention_heads
    layer_bytes = 2 * tokens * texts * width * (34 + 5 * heads * tokens / width)
    parameter_bytes = _TRAINED_BYTES if recipe.teacher.finetune else _READ_BYTES
    parameters_bytes = parameter_bytes * teacher.parameters()
    return float(_PYTORCH_BYTES + parameters_bytes + layer_bytes * config.num_hidden_layers)


def _minutes(recipe: Recipe, data: Data, teacher: TextModel, updates: dict[str, int]) -> float:
    """Return the minutes of the training: its forward passes times their measured time.

    One teacher's forward pass of a batch is the unit; a student's pass costs its share of layers.
    The student takes the place of a teacher that is given by its answers.
    """
    torch.set_num_threads(recipe.compute.threads or available_cpus())
    rows = data.train.take(np.arange(min(len(data.train), recipe.distill.batch_size)))
    encoded = splits.encode(rows, teacher.tokenizer, recipe.data.length)
    parts = [
        splits.collate(encoded, encoded.windows_of(part), teacher.tokenizer)
        for part in encoded.batches(np.arange(len(rows)), len(rows))
    ]
    teacher.module.eval()
    with torch.inference_mode():
        seconds = math.inf
        for _ in range(_CALLS):  # the first ones warm up; the fastest is the time when idle
            start = time.perf_counter()
            for part in parts:
                teacher.module(**{name: torch.from_numpy(array) for name, array in part.items()})
            seconds = min(seconds, time.perf_counter() - start)
    depth = teacher.module.config.num_hidden_layers
    is_given = recipe.teacher.model is None
    kept_share = 1.0
    if recipe.student.layers and not is_given:
        kept_share = len(recipe.student.layers) / depth
    settings = recipe.distill
    adversarial = settings.alpha > 0
    # With a zero start the clean pass gives the gradient of the first ascent step.
    ascents = (settings.adversary.steps - (settings.adversary.start == "zero")) * adversarial
    student_passes = _PASS * (1 + adversarial) + 2 * ascents
    # The teacher reads the training texts once.
    texts = 0 if is_given else len(data.train) + len(data.unlabelled)
    reading_passes = math.ceil(texts / settings.batch_size)
    teacher_passes = updates.get("teacher", 0) * _PASS
    distillation_passes = updates["student"] * student_passes * kept_share
    passes = teacher_passes + reading_passes + distillation_passes
    return seconds * passes / 60
