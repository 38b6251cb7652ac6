"""Finds the cheapest student that meets a target on this machine.

1. The cost of every shape is measured on untrained students, beside the teacher's fastest variant.
2. The shapes that can meet the target are distilled, cheapest first. A candidate that becomes
   hopeless on ``select`` is given up (:mod:`ad2kit.campaigns.fit.looks`). A candidate that ends too
   low on ``select`` is not judged.
3. The other candidates are exported, measured like a shipped model against the teacher's own
   variants, and judged on the validation rows. The interval widens with each look at these rows.
   The first candidate that passes is the answer.

Every candidate is a run, so that the same command goes on where it was stopped.
"""

from __future__ import annotations

import functools
import logging
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ad2kit.campaigns import shapes
from ad2kit.campaigns.fit.costs import Stopwatch
from ad2kit.campaigns.fit.looks import Looks, hopeless, lost_on_select, thinned
from ad2kit.campaigns.fit.records import Candidate, Cost, FitReport, Outcome, Target, shortfalls
from ad2kit.campaigns.fit.report import markdown, plot
from ad2kit.campaigns.run import fill_with_teacher
from ad2kit.data import splits
from ad2kit.exporting.classifier import MODEL_FILE, OnnxClassifier, open_session
from ad2kit.exporting.export import export, export_fp32
from ad2kit.exporting.records import OnnxArtifact
from ad2kit.gate import latency
from ad2kit.gate.parity import judge
from ad2kit.models import text_model
from ad2kit.models.text_model import predict_logits
from ad2kit.run.errors import DivergedError, RecipeError, UserError
from ad2kit.run.files import fingerprint, sha256_of, write_record, write_text
from ad2kit.run.folder import RunDir, open_run
from ad2kit.run.machine import processes
from ad2kit.run.records import CampaignRecord
from ad2kit.statistics.logits import answers
from ad2kit.statistics.metrics import mean_metric
from ad2kit.training.distill import distill
from ad2kit.training.opening import open_teacher
from ad2kit.training.records import read_curve, select_scores

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from ad2kit.campaigns.fit.costs import System
    from ad2kit.campaigns.records import Grid, Shape
    from ad2kit.data.splits import Data
    from ad2kit.models.text_model import TextModel
    from ad2kit.run.recipe import Recipe
    from ad2kit.training.records import DistillReport, StepRecord

logger = logging.getLogger(__name__)


class _GivenUp(Exception):
    """Raised when a candidate in training has become hopeless."""


def fit(
    recipe: Recipe,
    target: Target,
    grid: Grid,
    runs_dir: Path,
    *,
    on_step: Callable[[StepRecord], None] = lambda _record: None,
    allow_inexact: bool = False,
) -> tuple[FitReport, Path]:
    """Find the cheapest student that meets a target, and write the report.

    Trainings, verdicts and measurements that exist on this machine are used again.

    Args:
        recipe: data, teacher and budget of every candidate.
        target: the score to retain, and the bounds on the costs.
        grid: the shapes to try.
        runs_dir: the folder of the runs.
        on_step: called after each update.
        allow_inexact: see :func:`ad2kit.training.distill.distill`.

    Returns:
        The report, whether or not there is such a student, and its folder, which also holds a
        table and a plot.

    Raises:
        RecipeError: a target without a bound, or a student that is not cut from the teacher.
        UserError: see the stages.
    """
    if processes() > 1:
        raise UserError(
            "`ad2kit fit` takes one process: it trains its candidates one after the other",
            hint="run it without `accelerate launch`",
        )
    recipe = target.applied_to(recipe)
    data = splits.load_data(recipe.data, recipe.seed, runs_dir / ".shared")
    splits.check_labelled(data, "fit")
    teacher = _open_teacher(recipe, data, target)
    inputs = fingerprint(
        recipe.model_dump(mode="json"), target.model_dump(mode="json"), grid.model_dump(mode="json")
    )
    folder = runs_dir / f"fit-{recipe.name}-{inputs[:8]}"
    folder.mkdir(parents=True, exist_ok=True)
    stopwatch = Stopwatch(
        recipe,
        target,
        runs_dir / ".shared" / "measured.json",
        teacher.module.config.vocab_size,
    )
    search = _ShapeSearch(
        recipe,
        target,
        data,
        teacher,
        runs_dir,
        folder,
        stopwatch,
        on_step,
        allow_inexact,
        Looks(target.retain, data.validation.labels),
    )
    untrained_teacher, candidates = search.search(shapes.shapes(teacher, recipe.student, grid))
    report = FitReport(
        recipe=recipe.name,
        inputs=inputs,
        target=target,
        grid=grid,
        metrics=recipe.data.judged_by,
        rows=len(data.validation),
        untrained_teacher=untrained_teacher,
        candidates=tuple(candidates),
        trained=search.trained,
        package=search.package,
        environment=stopwatch.surroundings,
    )
    write_record(folder / "fit.json", report)
    write_text(folder / "fit.md", markdown(report))
    plot(report, folder / "fit.svg")
    return report, folder


def _open_teacher(recipe: Recipe, data: Data, target: Target) -> TextModel:
    """Open the teacher before its fine-tuning, and check that it reads the target's length."""
    if recipe.teacher.model is None:
        raise RecipeError(
            "fit makes students from the layers of the teacher, and the teacher is given by its "
            "answers alone (teacher.answers)",
            hint="train one student: `ad2kit run`; a smaller one has fewer student.layers",
        )
    teacher = open_teacher(recipe, data)
    text_model.check_length(teacher, target.length_tokens, key="--length")
    return teacher


@dataclass
class _ShapeSearch:
    """The search: the inputs that its steps share, and its results so far."""

    recipe: Recipe
    target: Target
    data: Data
    teacher: TextModel  # before its fine-tuning, if there is any
    runs_dir: Path
    folder: Path
    stopwatch: Stopwatch
    on_step: Callable[[StepRecord], None]
    allow_inexact: bool
    looks: Looks
    teacher_score: float | None = None
    trained: tuple[Cost, ...] = ()
    package: tuple[str, str] | None = None

    @property
    def rule(self) -> CampaignRecord:
        """The record in each candidate's run: it is shipped only if it passes this target."""
        return CampaignRecord(command="ad2kit fit", rule=str(self.target))

    def search(self, grid_shapes: Sequence[Shape]) -> tuple[tuple[Cost, ...], list[Candidate]]:
        """Measure all shapes; try those that are cheap enough until one passes.

        Returns:
            The costs of the untrained teacher's variants, and the candidates with their outcomes.
        """
        untrained_teacher, candidates = self.measure(grid_shapes)
        for place, candidate in enumerate(candidates):
            if candidate.outcome != "too costly" and self.package is None:
                candidates[place] = self.trial(candidate)
                logger.info("%s: %s", candidate.shape, candidates[place].outcome)
        return untrained_teacher, candidates

    def measure(self, grid_shapes: Sequence[Shape]) -> tuple[tuple[Cost, ...], list[Candidate]]:
        """Return the costs of the untrained teacher, and of each shape, the cheapest first.

        The teacher's fastest variant is measured again beside each shape, because a machine is not
        equally fast all the time.
        """
        full = shapes.whole(self.teacher)
        candidates = list[Candidate]()
        kind = [self.teacher.module.config.to_json_string(), self.recipe.export.variants]
        with tempfile.TemporaryDirectory(prefix="ad2kit-fit-") as scratch:
            teachers = functools.cache(lambda: self._untrained(full, Path(scratch) / "teacher"))
            teacher = self.stopwatch.measure(kind, teachers)
            fastest = min(teacher, key=lambda cost: cost.p50_ms).variant

            def beside(shape: Shape) -> dict[str, System]:
                return {"teacher": teachers()[fastest]} | self._untrained(
                    shape, Path(scratch) / "student"
                )

            for number, shape in enumerate(grid_shapes, start=1):
                make = functools.partial(beside, shape)
                _, *costs = self.stopwatch.measure([*kind, str(shape)], make, ("teacher",))
                candidates.append(Candidate.measured(shape, tuple(costs), self.target))
                best = candidates[-1].best(self.target)
                logger.info(
                    "%d of %d, %s: %s takes %.2f ms, %.2f times the teacher's speed",
                    number,
                    len(grid_shapes),
                    shape,
                    best.variant,
                    best.p50_ms,
                    best.speedup,
                )
        candidates.sort(key=lambda candidate: candidate.best(self.target).p50_ms)
        return teacher, candidates

    def _untrained(self, shape: Shape, folder: Path) -> dict[str, System]:
        """Return the variants of an untrained student as systems, by name."""
        text_model.save(shapes.untrained(self.teacher, shape), folder / "model", inputs="")
        shutil.rmtree(folder / "onnx", ignore_errors=True)
        export_fp32(folder / "model", folder / "onnx")
        graphs = shapes.graphs(folder / "onnx" / MODEL_FILE, self.recipe.export.variants)
        threads = self.stopwatch.threads
        provider = self.recipe.export.provider
        return {
            name: (latency.session_call(open_session(path, threads, provider)), path.stat().st_size)
            for name, path in graphs.items()
        }

    def trial(self, candidate: Candidate) -> Candidate:
        """Distil and judge a candidate, as far as it is promising; return it with its outcome."""
        # A folder of this target's own: its gate must not replace the gate of another run.
        folder = Path(f"{self.folder}-{fingerprint(str(candidate.shape))[:8]}")
        recipe = self._recipe_for(candidate.shape)
        with open_run(recipe, self.runs_dir, folder, campaign=self.rule).locked() as run:
            write_record(run.campaign_record, self.rule)  # verdicts of an earlier search are void
            logger.info("%s: %s", candidate.shape, run.path)
            return self._trial(candidate.model_copy(update={"run": run.path.name}), run)

    def _trial(self, candidate: Candidate, run: RunDir) -> Candidate:
        """Distil, measure and judge a candidate in its run, which is locked."""
        try:
            distilled = self._distill(run)
        except _GivenUp:
            scores = select_scores(run.curve("student"))
            return candidate.ended(
                "given up",
                f"{scores[-1]:.4f} on select after {len(scores)} evaluations",
                select_score=scores[-1],
            )
        except DivergedError as error:
            return candidate.ended("diverged", error.message)
        score = distilled.student_select_score
        needed = self.looks.needed() * _positive_score(distilled.teacher_select_score)
        facts: dict[str, Any] = {
            "select_score": score,
            "train_seconds": distilled.train_seconds,
        }
        if score < needed:
            reason = f"{score:.4f} on select, needed {needed:.4f}"
            return candidate.ended("below on select", reason, **facts)
        export(run)
        costs = self._trained_costs(run)
        affordable = [cost for cost in costs if not shortfalls(cost, self.target)]
        if not affordable:
            reason = Candidate.measured(candidate.shape, costs, self.target).reason
            return candidate.ended("missed when trained", reason, **facts)
        promising = [
            cost for cost in affordable if score - lost_on_select(run, cost.variant) >= needed
        ]
        if not promising:
            reason = f"{score:.4f} on select less what int8 lost there, needed {needed:.4f}"
            return candidate.ended("below on select", reason, **facts)
        judged = self._gate(candidate, run, promising, facts)
        self.looks.learn(score / distilled.teacher_select_score, judged.retained or 0.0)
        return judged

    def _gate(
        self, candidate: Candidate, run: RunDir, promising: list[Cost], facts: dict[str, Any]
    ) -> Candidate:
        """Judge the promising variants on the validation rows: in the order of ``export.ship``.

        The verdicts are written into the run, which may ship no other variants.
        """
        report = judge(run)
        failures = list[str]()
        outcomes = set[Outcome]()
        record = self.rule
        last = set[str]()
        if self.recipe.export.ship == "steady":
            last = {each.variant for each in report.variants if not each.is_steady}
        for cost in sorted(promising, key=lambda cost: (cost.variant in last, cost.p50_ms)):
            look = self.looks.look(run, report, cost.variant)
            verdicts = (*record.verdicts, look.record())
            record = record.model_copy(update={"verdicts": verdicts})
            write_record(run.campaign_record, record)
            facts |= look.facts()
            if not look.failures:
                latency.measure(run, again=False)
                self.package = run.path.name, cost.variant
                return candidate.ended("found", "", **facts)
            failures += look.failures
            outcomes.add("not shown" if look.verdict == "not shown" else "failed the gate")
            if look.weak:
                break  # another variant would only repeat the same chance
        # A variant that is not shown may be good enough, so this outcome is nearer to an answer.
        outcome: Outcome = "not shown" if "not shown" in outcomes else "failed the gate"
        return candidate.ended(outcome, "; ".join(failures), **facts)

    def _recipe_for(self, shape: Shape) -> Recipe:
        """Return the recipe of a student of a shape."""
        student = shapes.section(shape, shapes.whole(self.teacher))
        return self.recipe.model_copy(update={"student": student})

    def _distill(self, run: RunDir) -> DistillReport:
        """Distil a candidate until it is finished or hopeless.

        Raises:
            _GivenUp: it is hopeless.
        """

        def watch(record: StepRecord) -> None:
            self.on_step(record)
            is_evaluation = record.phase == "student" and record.select_score is not None
            if is_evaluation and self._hopeless(run):
                raise _GivenUp

        if not run.distill_report.is_file() and self._hopeless(run):
            raise _GivenUp
        try:
            return distill(run, on_step=watch, allow_inexact=self.allow_inexact)
        except _GivenUp:
            for folder in (run.checkpoint("student"), run.snapshots("student")):
                shutil.rmtree(folder, ignore_errors=True)
            raise

    def _hopeless(self, run: RunDir) -> bool:
        """Tell whether the evaluations of a training so far show that it is hopeless."""
        select = self.data.select
        # The last update is left out, because the kept weights may be those of another update.
        evaluated = [
            record
            for record in read_curve(run.curve("student"))
            if record.select_score is not None and record.step < record.total_steps
        ]
        if not evaluated:
            return False
        planned = round(evaluated[-1].total_steps / evaluated[0].step)
        scores = thinned([record.select_score or 0.0 for record in evaluated], planned)
        if not scores:
            return False
        if self.teacher_score is None:
            teacher = text_model.load_model(run.teacher, self.data.labels, self.data.task)
            encoded = splits.encode(select, teacher.tokenizer, self.recipe.data.length)
            logits = predict_logits(teacher, encoded, torch.device("cpu")).numpy()
            teacher_answers = answers(self.data.task, logits)
            self.teacher_score = _positive_score(
                mean_metric(self.recipe.data.judged_by, teacher_answers, select.labels)
            )
        return hopeless(scores, len(select), self.looks.needed() * self.teacher_score)

    def _trained_costs(self, run: RunDir) -> tuple[Cost, ...]:
        """Return the costs of a run's variants, measured beside its trained teacher's variants.

        The teacher's int8 variant is chosen on ``select`` like a student's. It counts as the
        teacher's speed even if it would not pass the gate, so that the gain of a student is not
        overstated.
        """
        teacher_recipe = self._recipe_for(shapes.whole(self.teacher))
        with open_run(teacher_recipe, self.runs_dir, self.folder / "teacher").locked() as teacher:
            fill_with_teacher(teacher, run)
            export(teacher)
        variants = self.recipe.export.variants
        threads = self.stopwatch.threads
        folders = {f"teacher {variant}": teacher.onnx(variant) for variant in variants}
        folders |= {variant: run.onnx(variant) for variant in variants}

        def make() -> dict[str, System]:
            classifiers = {
                name: OnnxClassifier(path, threads=threads) for name, path in folders.items()
            }
            return {
                name: (latency.onnx_call(classifier), classifier.artifact.model_bytes)
                for name, classifier in classifiers.items()
            }

        hashes = [sha256_of(path / OnnxArtifact.file_name) for path in folders.values()]
        self.trained = self.stopwatch.measure(hashes, make, list(folders)[: len(variants)])
        return self.trained[len(variants) :]


def _positive_score(teacher_score: float) -> float:
    """Return the score of a teacher on ``select`` if it is above 0, so that a share has a meaning.

    Raises:
        UserError: the score is 0 or less.
    """
    if teacher_score <= 0:
        raise UserError(
            f"the teacher scores {teacher_score:.4f} on `select`: there is nothing that a student "
            "could retain",
            hint="look at the order of data.labels, or train the teacher longer: "
            "`ad2kit run RECIPE` shows what it scores",
        )
    return teacher_score
