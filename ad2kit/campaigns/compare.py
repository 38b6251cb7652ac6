"""Several methods against each other: same teacher, same data, several seeds, one table.

Every student is a run of its own beside the others, so that a comparison goes on where it was
stopped, and what one has trained serves the next.

How sure a difference is:

- *Interval*: bootstrap over seeds and over validation rows, paired in both.
- *p*: approximate randomisation (Yeh, *More accurate tests for the statistical significance of
  result differences*, COLING 2000): the answers of the two methods are swapped row by row, for all
  seeds at once; two-sided. It asks whether these rows can tell the methods apart.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import numpy as np

from ad2kit.campaigns.compare_report import (
    CompareReport,
    Difference,
    MethodResult,
    StudentResult,
    markdown,
    plot,
)
from ad2kit.data import metrics, splits
from ad2kit.gate.summary import baseline_scores
from ad2kit.run.errors import RecipeError, nearest
from ad2kit.run.files import fingerprint, locked, write_record, write_text
from ad2kit.run.folder import open_run
from ad2kit.run.machine import is_first_process
from ad2kit.run.recipe import from_data
from ad2kit.run.records import CampaignRecord
from ad2kit.training.distill import distill
from ad2kit.training.shared import ValidationScores

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from ad2kit.run.folder import RunDir
    from ad2kit.run.recipe import Recipe
    from ad2kit.training.records import DistillReport, StepRecord
    from ad2kit.training.shared import Answers

logger = logging.getLogger(__name__)

_NO_INSIDES = {"pkd": 0.0, "hidden_states": 0.0, "attentions": 0.0, "value_relations": 0.0}
_KD = {"kd_weight": 1.0, "alpha": 0.0, "hard_label_weight": 0.0, "intermediate": _NO_INSIDES}
# What a method changes in the distill section of the recipe; the rest, budget and learning rate
# included, is the recipe's for all.
METHODS: dict[str, dict[str, Any]] = {
    "finetune": _KD | {"kd_weight": 0.0, "hard_label_weight": 1.0},
    "kd": _KD,
    "pkd": _KD | {"intermediate": _NO_INSIDES | {"pkd": 1.0}},
    "tinybert": _KD | {"intermediate": _NO_INSIDES | {"hidden_states": 1.0, "attentions": 1.0}},
    "minilm": _KD | {"intermediate": _NO_INSIDES | {"value_relations": 1.0}},
    # The recipe without its adversary: what of `ad2` is due to its other terms.
    "clean": {"alpha": 0.0},
    "ad2": {},
}


def compare(
    recipe: Recipe,
    methods: Sequence[str],
    seeds: int,
    runs_dir: Path,
    *,
    on_step: Callable[[StepRecord], None] = lambda _record: None,
    allow_inexact: bool = False,
) -> tuple[CompareReport, Path]:
    """Train every method from the same teacher with each seed, judge them, write the report.

    What is trained already is not trained again.

    Args:
        recipe: data, teacher, student and budget of all; its distill section is the method `ad2`.
        methods: of :data:`METHODS`; the last is compared with each of the others.
        seeds: how many; they draw order and dropout of the students' training.
        runs_dir: where the runs lie.
        on_step: called after each update.
        allow_inexact: see :func:`ad2kit.training.distill.distill`.

    Returns:
        The report, and the folder that it was written to, with a table and a plot.

    Raises:
        RecipeError: an unknown method, or `ad2` of a recipe without an adversary.
        UserError, GateFailed: see :func:`ad2kit.training.distill.distill`.
    """
    variants = {method: _variant(recipe, method) for method in methods}
    data = splits.load_data(recipe.data, recipe.seed)
    validation = _Comparison(recipe, data, runs_dir)
    students = list[StudentResult]()
    found: dict[str, list[Answers]] = {method: [] for method in variants}
    teacher, simpler, environment = 0.0, dict[str, float](), dict[str, str]()
    for seed in range(recipe.seed, recipe.seed + seeds):
        for method, variant in variants.items():
            run = open_run(
                _with_seed(variant, seed),
                runs_dir,
                campaign=CampaignRecord(command="ad2kit compare"),
            )
            logger.info("%s, seed %d: %s", method, seed, run.path)
            distilled = distill(run, on_step=on_step, allow_inexact=allow_inexact)
            found[method].append(validation.answers(run.student))
            teacher = validation.score(validation.answers(run.teacher))
            simpler, environment = baseline_scores(run), distilled.environment
            score = validation.score(found[method][-1])
            students.append(_result(method, seed, run, distilled, score))
    report = CompareReport(
        recipe=recipe.name,
        inputs=fingerprint(recipe.model_dump(mode="json"), list(variants), seeds),
        metrics=recipe.data.judged_by,
        rows=len(data.validation),
        teacher_score=teacher,
        baselines=simpler,
        students=tuple(students),
        methods=tuple(_summary(method, students, teacher) for method in variants),
        differences=validation.differences(found),
        environment=environment,
    )
    folder = runs_dir / f"compare-{recipe.name}-{report.inputs[:8]}"
    if is_first_process():
        folder.mkdir(exist_ok=True)
        with locked(folder):
            write_record(folder / "compare.json", report)
            write_text(folder / "compare.md", markdown(report))
            plot(report, folder / "compare.svg")
    return report, folder


def _result(
    method: str, seed: int, run: RunDir, distilled: DistillReport, score: float
) -> StudentResult:
    return StudentResult(
        method=method,
        seed=seed,
        run=run.path.name,
        teacher_sha256=distilled.teacher_sha256,
        student_sha256=distilled.student_sha256,
        score=score,
        train_seconds=distilled.train_seconds,
        examples_per_s=distilled.examples_per_s,
        verdict=distilled.verdict,
        constant=distilled.selection is not None and distilled.selection.kept.constant,
    )


class _Comparison(ValidationScores):
    """A judge that also says how sure the differences of students are."""

    def differences(self, found: dict[str, list[Answers]]) -> tuple[Difference, ...]:
        """Compare the last method with each of the others."""
        *baselines, ours = found
        samples, seed = self.recipe.parity.bootstrap_samples, self.recipe.seed
        count = len(found[ours])
        flat = [answer for method in found for answer in found[method]]
        draws = metrics.paired_bootstrap(self.metrics, flat, self.labels, samples, seed)
        # Rows were drawn; now, in every draw, the seeds, which the methods have in common.
        chosen = np.random.default_rng([seed, 1]).integers(count, size=(samples, 1, count))
        drawn = np.take_along_axis(draws.reshape(samples, len(found), count), chosen, axis=2)
        means = dict(zip(found, drawn.mean(axis=2).T, strict=True))

        def difference(baseline: str) -> Difference:
            low, high = np.percentile(means[ours] - means[baseline], [2.5, 97.5])
            mean = {name: np.mean([self.score(a) for a in found[name]]) for name in found}
            return Difference(
                method=ours,
                baseline=baseline,
                difference=float(mean[ours] - mean[baseline]),
                interval=(float(low), float(high)),
                p=metrics.randomisation_p(
                    self.metrics, found[ours], found[baseline], self.labels, samples, seed
                ),
                smallest_detectable_difference=metrics.smallest_detectable_difference(
                    np.stack([means[ours], means[baseline]], axis=1), len(self.labels)
                ),
            )

        return tuple(difference(baseline) for baseline in baselines)


def _variant(recipe: Recipe, method: str) -> Recipe:
    """Return the recipe of a method: its distill section changed as :data:`METHODS` says."""
    if method not in METHODS:
        raise RecipeError(
            f"no method '{method}'{nearest(method, METHODS)}; methods: {', '.join(METHODS)}",
            hint="for example: --methods finetune,kd,ad2",
        )
    if method == "ad2" and recipe.distill.alpha == 0:
        raise RecipeError(
            "the method ad2 is the recipe as it is, but its distill.alpha is 0: no adversary",
            hint="set distill.alpha=1, or leave ad2 out of --methods",
        )
    plain = recipe.model_dump(mode="json")
    plain["distill"] |= METHODS[method]
    return from_data(plain, where=f"the recipe for {method}")


def _with_seed(recipe: Recipe, seed: int) -> Recipe:
    return recipe.model_copy(update={"distill": recipe.distill.model_copy(update={"seed": seed})})


def _summary(method: str, students: Sequence[StudentResult], teacher: float) -> MethodResult:
    mine = [student for student in students if student.method == method]
    scores = [student.score for student in mine]
    median = float(np.median(scores))
    return MethodResult(
        method=method,
        median=median,
        lowest=min(scores),
        highest=max(scores),
        retained=median / teacher if teacher > 0 else 0.0,
        train_seconds=float(np.median([student.train_seconds for student in mine])),
        examples_per_s=float(np.median([student.examples_per_s for student in mine])),
    )
