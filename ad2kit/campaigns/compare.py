"""Compares several methods with the same teacher, the same data and several seeds, in one table.

Every student is a run of its own beside the others. So a stopped comparison can go on, and a later
comparison uses the runs that are there.

The uncertainty of a difference has two measures:

- *Interval*: bootstrap over seeds and over validation rows, paired in both.
- *p*: approximate randomisation (Yeh, *More accurate tests for the statistical significance of
  result differences*, COLING 2000), two-sided. It swaps the answers of the two methods row by row,
  for all seeds at once. It tests whether these rows can tell the methods apart.
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
from ad2kit.data import splits
from ad2kit.gate.summary import baseline_scores
from ad2kit.run.errors import RecipeError, nearest
from ad2kit.run.files import fingerprint, locked, write_record, write_text
from ad2kit.run.folder import open_run
from ad2kit.run.machine import is_first_process
from ad2kit.run.recipe import from_data
from ad2kit.run.records import CampaignRecord
from ad2kit.statistics import metrics
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

_NO_INTERMEDIATE = {"pkd": 0.0, "hidden_states": 0.0, "attentions": 0.0, "value_relations": 0.0}
_KD = {"kd_weight": 1.0, "alpha": 0.0, "hard_label_weight": 0.0, "intermediate": _NO_INTERMEDIATE}
# The changes of each method in the recipe's distill section. All methods share the rest of the
# recipe, with its budget and learning rate.
METHODS: dict[str, dict[str, Any]] = {
    "finetune": _KD | {"kd_weight": 0.0, "hard_label_weight": 1.0},
    "kd": _KD,
    "pkd": _KD | {"intermediate": _NO_INTERMEDIATE | {"pkd": 1.0}},
    "tinybert": _KD
    | {"intermediate": _NO_INTERMEDIATE | {"hidden_states": 1.0, "attentions": 1.0}},
    "minilm": _KD | {"intermediate": _NO_INTERMEDIATE | {"value_relations": 1.0}},
    # The recipe without its adversary: it shows the effect of the other terms of `ad2`.
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

    Students that are trained already are not trained again.

    Args:
        recipe: data, teacher, student and budget of all methods; its distill section is the method
            `ad2`.
        methods: names in :data:`METHODS`; the last is compared with each of the others.
        seeds: number of seeds, which determine order and dropout of the students' training.
        runs_dir: the folder of the runs.
        on_step: called after each update.
        allow_inexact: see :func:`ad2kit.training.distill.distill`.

    Returns:
        The report, and its folder, which also holds a table and a plot.

    Raises:
        RecipeError: an unknown method, or `ad2` with a recipe without an adversary.
        UserError, GateFailed: see :func:`ad2kit.training.distill.distill`.
    """
    variants = {method: _variant(recipe, method) for method in methods}
    data = splits.load_data(recipe.data, recipe.seed, runs_dir / ".shared")
    splits.check_labelled(data, "compare")
    validation = _Comparison(recipe, data, runs_dir)
    students = list[StudentResult]()
    answers: dict[str, list[Answers]] = {method: [] for method in variants}
    teacher_score = 0.0
    baselines = dict[str, float]()
    environment = dict[str, str]()
    for seed in range(recipe.seed, recipe.seed + seeds):
        for method, variant in variants.items():
            run = open_run(
                _with_seed(variant, seed),
                runs_dir,
                campaign=CampaignRecord(command="ad2kit compare"),
            )
            logger.info("%s, seed %d: %s", method, seed, run.path)
            distilled = distill(run, on_step=on_step, allow_inexact=allow_inexact)
            answers[method].append(validation.answers(run.student))
            teacher_score = validation.score(validation.answers(run.teacher))
            baselines = baseline_scores(run)
            environment = distilled.environment
            score = validation.score(answers[method][-1])
            students.append(_result(method, seed, run, distilled, score))
    report = CompareReport(
        recipe=recipe.name,
        inputs=fingerprint(recipe.model_dump(mode="json"), list(variants), seeds),
        metrics=recipe.data.judged_by,
        rows=len(data.validation),
        teacher_score=teacher_score,
        baselines=baselines,
        students=tuple(students),
        methods=tuple(_summary(method, students, teacher_score) for method in variants),
        differences=validation.differences(answers),
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
    """Return the result of one student from its run and its score on the validation rows."""
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
    """Validation scores that also measure the uncertainty of the students' differences."""

    def differences(self, answers: dict[str, list[Answers]]) -> tuple[Difference, ...]:
        """Compare the last method with each of the others.

        Args:
            answers: of each method, the answers of its students, in the same order of seeds.
        """
        *baselines, method = answers
        samples = self.recipe.parity.bootstrap_samples
        seed = self.recipe.seed
        students = len(answers[method])
        flat = [student for name in answers for student in answers[name]]
        draws = metrics.paired_bootstrap(self.metrics, flat, self.labels, samples, seed)
        # `draws` are over rows. Each draw now also draws seeds, the same for all methods.
        seeds = np.random.default_rng([seed, 1]).integers(students, size=(samples, 1, students))
        scores = np.take_along_axis(draws.reshape(samples, len(answers), students), seeds, axis=2)
        mean_draws = dict(zip(answers, scores.mean(axis=2).T, strict=True))

        def difference(baseline: str) -> Difference:
            low, high = np.percentile(mean_draws[method] - mean_draws[baseline], [2.5, 97.5])
            means = {
                name: np.mean([self.score(student) for student in answers[name]])
                for name in answers
            }
            return Difference(
                method=method,
                baseline=baseline,
                difference=float(means[method] - means[baseline]),
                interval=(float(low), float(high)),
                p=metrics.randomisation_p(
                    self.metrics, answers[method], answers[baseline], self.labels, samples, seed
                ),
                smallest_detectable_difference=metrics.smallest_detectable_difference(
                    np.stack([mean_draws[method], mean_draws[baseline]], axis=1), len(self.labels)
                ),
            )

        return tuple(difference(baseline) for baseline in baselines)


def _variant(recipe: Recipe, method: str) -> Recipe:
    """Return the recipe of a method: its distill section with the changes in :data:`METHODS`.

    Raises:
        RecipeError: an unknown method, or `ad2` with a recipe without an adversary.
    """
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
    """Return the recipe with another seed of its distillation."""
    return recipe.model_copy(update={"distill": recipe.distill.model_copy(update={"seed": seed})})


def _summary(method: str, students: Sequence[StudentResult], teacher_score: float) -> MethodResult:
    """Return the result of one method over its students."""
    results = [student for student in students if student.method == method]
    scores = [student.score for student in results]
    median = float(np.median(scores))
    return MethodResult(
        method=method,
        median=median,
        lowest=min(scores),
        highest=max(scores),
        retained=median / teacher_score if teacher_score > 0 else 0.0,
        train_seconds=float(np.median([student.train_seconds for student in results])),
        examples_per_s=float(np.median([student.examples_per_s for student in results])),
    )
