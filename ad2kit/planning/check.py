"""The check stage: what a recipe reads, what its gate can prove, and what it will cost.

Nothing is trained and nothing is written. Data and models are opened as the distill stage opens
them, so that what it refuses is refused here.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ad2kit.data import sample_size, splits
from ad2kit.data.labels import balance, counts
from ad2kit.run.machine import available_cpus
from ad2kit.run.records import Part
from ad2kit.training.schedule import Schedule

if TYPE_CHECKING:
    from ad2kit.data.splits import Data, Split
    from ad2kit.models.text_model import TextModel
    from ad2kit.run.recipe import Recipe
    from ad2kit.run.sections import TrainRecipe

# So many texts of a split are tokenised.
_SAMPLE = 2_000
# Of more texts in quotation marks, something is likely to have put them there.
_QUOTED = 0.2
# So many labels are named.
_NAMED = 12
# The share of texts on which student and teacher are assumed to differ in being right.
_DIFFER = 0.1
# Bytes of a parameter that is trained: itself, its gradient, and Adam's two moments, float32.
_TRAINED_BYTES, _READ_BYTES = 16, 4
_PYTORCH_BYTES = 600e6
_CALLS = 5
# A backward pass costs two forward passes.
_PASS = 3


class SplitCheck(Part):
    """What a split holds; lengths are of at most 2,000 of its texts, in tokens before cutting.

    ``duplicates`` and ``known`` are shares of its rows: texts that occur in it before, and
    validation texts that are also training texts. ``quoted`` is the share of its texts that stand
    in quotation marks, which belong to the text.
    """

    rows: int
    labels: str
    tokens_median: int
    tokens_p95: int
    tokens_longest: int
    cut: float
    duplicates: float
    known: float | None
    quoted: float
    example: tuple[str, ...]


class CheckReport(Part):
    """What `ad2kit check` says of a recipe.

    ``half_width`` is what the 95 % interval of "retained" will reach to either side, as a
    fraction, and ``rows_to_pass`` how many validation rows show a student that is as good as its
    teacher: both if teacher and student differ on one text of ten. ``rows_to_agree`` show that a
    conversion which moves a label on half as many texts as ``parity.min_agreement`` allows agrees
    enough. By :mod:`ad2kit.data.sample_size`, as in the gate; null is no number of rows.
    ``few_rows`` names the classes (or labels) with fewer than ``rows_of_a_class`` validation rows:
    whether a student lost them cannot be tested. Memory and minutes are rough: from the number of
    parameters, and from one forward pass on this machine.
    """

    task: str
    labels: tuple[str, ...]
    ordered: bool
    splits: dict[str, SplitCheck]
    max_length_tokens: int
    half_width: float
    rows_to_pass: int | None
    rows_to_agree: int | None
    rows_of_a_class: int
    few_rows: tuple[str, ...]
    min_retained: float
    teacher: str
    updates: dict[str, int]
    memory_mb: float
    minutes: float


def check(recipe: Recipe, data: Data, teacher: TextModel) -> CheckReport:
    """Return what the data of a recipe are, what they can prove, and what the training costs.

    Args:
        recipe: the recipe.
        data: of the recipe.
        teacher: of the recipe, before its training.
    """
    trained = {*data.train.texts, *data.unlabelled.texts}
    if recipe.data.select_from == "train":
        trained |= {*data.select.texts}
    splits = {
        name: _split(split, data, recipe, teacher, trained if name == "validation" else None)
        for name, split in data.splits().items()
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
        splits=splits,
        max_length_tokens=recipe.data.max_length_tokens,
        **_evidence(recipe, data),
        teacher=recipe.teacher.model,
        updates=updates,
        memory_mb=_memory_bytes(recipe, teacher, splits["train"]) / 1e6,
        minutes=_minutes(recipe, data, teacher, updates),
    )


def check_words(report: CheckReport) -> str:
    """Return a report as one screen."""
    head = ("", "rows", "tokens: median", "95 %", "longest", "cut", "repeated")
    table = [
        (
            name,
            f"{found.rows:,}",
            str(found.tokens_median),
            str(found.tokens_p95),
            str(found.tokens_longest),
            f"{found.cut:.1%}",
            f"{found.duplicates:.1%}",
        )
        for name, found in report.splits.items()
    ]
    widths = [max(map(len, column)) for column in zip(head, *table, strict=True)]
    lines = [
        "  ".join(
            f"{cell:<{width}}" if place == 0 else f"{cell:>{width}}"
            for place, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in (head, *table)
    ]
    train, validation = report.splits["train"], report.splits["validation"]
    order = "in the order that was given" if report.ordered else "in the order of the alphabet"
    if not report.ordered and all(name.removeprefix("-").isdecimal() for name in report.labels):
        order = "in the order of numbers"
    names = ", ".join(report.labels[:_NAMED])
    more = f", and {len(report.labels) - _NAMED} more" if len(report.labels) > _NAMED else ""
    updates = " and ".join(f"{n:,} updates of the {model}" for model, n in report.updates.items())
    if report.task != "regression":
        lines += [f"labels, {order}: {names}{more}", f"in train: {train.labels}"]
    if train.quoted > _QUOTED:
        lines.append(
            f"{train.quoted:.0%} of the training texts stand in quotation marks, which belong to "
            "the text: TSV has no quoting; if they are not meant, write CSV"
        )
    lines += [
        f"first row: {' | '.join(_short(text) for text in train.example)}",
        f"validation texts that are also training texts: {validation.known or 0:.1%}",
        f"texts are cut to {report.max_length_tokens} tokens, data.max_length_tokens",
        *_gate_words(report, validation.rows),
        (
            f"the training: {updates}, roughly {report.minutes:.0f} min and "
            f"{report.memory_mb / 1e3:.1f} GB on this machine"
        ),
        f"ok: {report.task}; teacher {report.teacher}",
    ]
    return "\n".join(lines)


def _evidence(recipe: Recipe, data: Data) -> dict[str, Any]:
    """Return what so many validation rows will show, by the functions of the gate."""
    rows, thresholds, classes = len(data.validation), recipe.parity, len(data.labels)
    found = counts(data.task, data.validation.labels, data.labels)
    least = sample_size.least_rows_of_a_class(classes)
    deviation, agreement = (
        math.sqrt(_DIFFER),
        (thresholds.min_agreement, thresholds.min_agreement_lower),
    )
    truth = sample_size.supposed(math.nan, agreement[0], 1.0)
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
        "rows_to_agree": rows_for(truth, *agreement),
        "rows_of_a_class": least,
        "few_rows": tuple(name for name, n in found.items() if n < least),
        "min_retained": thresholds.min_retained,
    }


def _gate_words(report: CheckReport, rows: int) -> list[str]:
    """Return the lines that say what so many validation rows will show."""

    def shown(needed: int | None) -> str:
        return "by no number of rows" if needed is None else f"from about {needed:,} rows on"

    first = (
        f"the gate: with {rows:,} validation rows the interval of what is retained will be about "
        f"±{100 * report.half_width:.1f} points, if teacher and student differ on one text of ten; "
        f"{report.min_retained:g} can be shown {shown(report.rows_to_pass)} for a student as good "
        f"as its teacher, and the agreement of int8 or fp16 with fp32 {shown(report.rows_to_agree)}"
    )
    if not report.few_rows:
        return [first]
    named = ", ".join(report.few_rows[:_NAMED])
    more = f" and {len(report.few_rows) - _NAMED} more" if len(report.few_rows) > _NAMED else ""
    second = (
        f"labels on fewer than {report.rows_of_a_class} validation rows, too few to test whether "
        f"the student lost them: {named}{more}"
    )
    return [first, second]


def _short(text: str, characters: int = 70) -> str:
    text = " ".join(text.split())
    return repr(text if len(text) <= characters else f"{text[:characters]}…")


def _split(
    split: Split,
    data: Data,
    recipe: Recipe,
    teacher: TextModel,
    trained: set[tuple[str, ...]] | None,
) -> SplitCheck:
    sample = split.take(np.linspace(0, len(split) - 1, min(len(split), _SAMPLE)).astype(int))
    columns = [list(column) for column in zip(*sample.texts, strict=True)]
    lengths = np.array([len(ids) for ids in teacher.tokenizer(*columns)["input_ids"]])
    unlabelled = split is data.unlabelled
    return SplitCheck(
        rows=len(split),
        labels=""
        if unlabelled
        else balance(counts(data.task, split.labels, data.labels), len(split)),
        tokens_median=int(np.median(lengths)),
        tokens_p95=int(np.quantile(lengths, 0.95)),
        tokens_longest=int(lengths.max()),
        cut=float((lengths > recipe.data.max_length_tokens).mean()),
        duplicates=1 - len(Counter(split.texts)) / len(split),
        known=None if trained is None else sum(t in trained for t in split.texts) / len(split),
        quoted=sum(text[:1] == text[-1:] == '"' for column in columns for text in column)
        / sum(map(len, columns)),
        example=split.texts[0],
    )


def _memory_bytes(recipe: Recipe, teacher: TextModel, train: SplitCheck) -> float:
    """Return the peak of a training: parameters, and the activations of a batch.

    Activations of a layer in float32 are 2 s b h (34 + 5 a s / h) bytes (Korthikanti et al., 2022,
    equation 2, for 16 bits) for s tokens, b texts, width h and a heads.
    """
    config, phase = teacher.module.config, recipe.teacher.finetune or recipe.distill
    tokens = min(train.tokens_longest, recipe.data.max_length_tokens)
    texts = phase.batch_size // phase.accumulation_steps
    width, heads = config.hidden_size, config.num_attention_heads
    layer = 2 * tokens * texts * width * (34 + 5 * heads * tokens / width)
    trained = _TRAINED_BYTES if recipe.teacher.finetune else _READ_BYTES
    return float(_PYTORCH_BYTES + trained * teacher.parameters() + layer * config.num_hidden_layers)


def _minutes(recipe: Recipe, data: Data, teacher: TextModel, updates: dict[str, int]) -> float:
    """Return how long the training takes: forward passes of a teacher's batch, and their time."""
    torch.set_num_threads(recipe.compute.threads or available_cpus())
    rows = data.train.take(np.arange(min(len(data.train), recipe.distill.batch_size)))
    encoded = splits.encode(rows, teacher.tokenizer, recipe.data.max_length_tokens)
    batch = splits.collate(encoded, range(len(rows)), teacher.tokenizer)
    inputs = {name: torch.from_numpy(array) for name, array in batch.items()}
    teacher.module.eval()
    with torch.inference_mode():
        seconds = math.inf
        for _ in range(_CALLS):  # the first ones warm up; the fastest is what it takes when idle
            start = time.perf_counter()
            teacher.module(**inputs)
            seconds = min(seconds, time.perf_counter() - start)
    depth = teacher.module.config.num_hidden_layers
    kept = len(recipe.student.layers) / depth if recipe.student.layers else 1.0
    settings = recipe.distill
    adversarial = settings.alpha > 0
    # From a zero start the first ascent step comes free with the clean pass.
    ascents = (settings.adversary.steps - (settings.adversary.start == "zero")) * adversarial
    passes = _PASS * (1 + adversarial) + 2 * ascents
    # The teacher reads the training texts once.
    answers = math.ceil((len(data.train) + len(data.unlabelled)) / settings.batch_size)
    forward = updates.get("teacher", 0) * _PASS + answers + updates["student"] * passes * kept
    return seconds * forward / 60
