"""The cheapest student that meets a target on this machine.

1. What every shape costs is measured on untrained students, beside the teacher's fastest variant.
2. The shapes that can meet the target are distilled, cheapest first; one that becomes hopeless on
   ``select`` is given up (:mod:`ad2kit.prospects`), one that ends too low there goes no further.
3. What is left is exported, measured as it would be shipped against the teacher's own variants, and
   judged on the validation rows, with an interval that widens with each look. The first that passes
   is the answer.

Every candidate is a run of its own, so that the same command goes on where it was stopped.
"""

from __future__ import annotations

import functools
import logging
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ad2kit import bench, models, shapes, store
from ad2kit import data as datasets
from ad2kit.classifier import MODEL_FILE, OnnxClassifier, open_session
from ad2kit.curve import read_curve
from ad2kit.distill import distill
from ad2kit.errors import RecipeError
from ad2kit.export import export, export_fp32
from ad2kit.files import fingerprint, sha256_of, write_record, write_text
from ad2kit.fit_report import Candidate, Cost, FitReport, Target, markdown, plot, shortfalls
from ad2kit.metrics import paired_bootstrap, retained_interval, score
from ad2kit.parity import parity
from ad2kit.prospects import error_of, hopeless
from ad2kit.recipe import from_data
from ad2kit.records import DistillReport, OnnxArtifact
from ad2kit.run_dir import RunDir, open_run
from ad2kit.stopwatch import Stopwatch
from ad2kit.tasks import answers
from ad2kit.training import predict_logits
from ad2kit.verdicts import ParityReport, RowAnswers

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from ad2kit.data import Data
    from ad2kit.models import TextModel
    from ad2kit.recipe import Recipe
    from ad2kit.records import StepRecord
    from ad2kit.shapes import Grid, Shape
    from ad2kit.stopwatch import System

logger = logging.getLogger(__name__)


class _GivenUp(Exception):
    """A candidate in training has become hopeless."""


def fit(
    recipe: Recipe, target: Target, grid: Grid, runs_dir: Path, *,
    on_step: Callable[[StepRecord], None] = lambda _record: None, allow_inexact: bool = False,
) -> tuple[FitReport, Path]:  # fmt: skip
    """Find the cheapest student that meets a target, and write the report.

    What is trained, judged or measured already on this machine is not done again.

    Args:
        recipe: data, teacher and budget of every candidate.
        target: what to keep, and what it may cost.
        grid: the shapes to try.
        runs_dir: where the runs lie.
        on_step: called after each update.
        allow_inexact: see :func:`ad2kit.distill.distill`.

    Returns:
        The report, whether or not there is such a student, and the folder that it was written to,
        with a table and a plot.

    Raises:
        RecipeError: a target without a bound on latency, size or speed, or a student that is not
            made from the teacher.
        UserError: see the stages.
    """
    if (target.p99_ms, target.max_mb, target.speedup) == (None, None, None):
        raise RecipeError(
            "a target without a bound on latency, size or speed is met by the teacher itself",
            hint="add --p99-ms, --max-mb or --speedup",
        )
    recipe = _aimed(recipe, target)
    data = datasets.load_data(recipe.data, recipe.seed)
    teacher = models.load_reference(
        recipe.teacher.model, data, seed=recipe.seed, finished=recipe.teacher.finetune is None,
        key="teacher.model",
    )  # fmt: skip
    models.check_length(teacher, target.length_tokens, key="--length")
    wanted = shapes.shapes(teacher, recipe.student, grid)
    inputs = fingerprint(
        recipe.model_dump(mode="json"), target.model_dump(mode="json"), grid.model_dump(mode="json")
    )
    folder = runs_dir / f"fit-{recipe.name}-{inputs[:8]}"
    folder.mkdir(parents=True, exist_ok=True)
    vocabulary = teacher.module.config.vocab_size
    stopwatch = Stopwatch(recipe, target, folder / "measured.json", bench.measure, vocabulary)
    search = _Search(
        recipe, target, data, teacher, runs_dir, folder, stopwatch, on_step, allow_inexact
    )
    untrained_teacher, candidates = search.measure(wanted)
    for place, candidate in enumerate(candidates):
        if candidate.outcome != "too costly" and search.package is None:
            candidates[place] = search.judge(candidate)
            logger.info("%s: %s", candidate.shape, candidates[place].outcome)
    report = FitReport(
        recipe=recipe.name,
        inputs=inputs,
        target=target,
        grid=grid,
        metrics=recipe.data.judged_by,
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


def _aimed(recipe: Recipe, target: Target) -> Recipe:
    """Return the recipe with the target as the gate's threshold and as the bench's shape."""
    plain = recipe.model_dump(mode="json")
    plain["parity"] |= {
        "min_retained": target.retain,
        "min_retained_lower": max(0.0, target.retain - target.margin),
    }
    plain["bench"] |= {
        "batch_sizes": [target.batch_size], "lengths_tokens": [target.length_tokens],
    }  # fmt: skip
    return from_data(plain, where=f"the recipe for the target ({target})")


@dataclass
class _Search:
    """What the steps of the search share, and what it has found so far."""

    recipe: Recipe
    target: Target
    data: Data
    teacher: TextModel  # before its fine-tuning, if there is any
    runs_dir: Path
    folder: Path
    stopwatch: Stopwatch
    on_step: Callable[[StepRecord], None]
    allow_inexact: bool
    looks: int = 0
    needed: float | None = None
    trained: tuple[Cost, ...] = ()
    package: tuple[str, str] | None = None

    def measure(self, wanted: Sequence[Shape]) -> tuple[tuple[Cost, ...], list[Candidate]]:
        """Return what the untrained teacher costs, and what each shape does, the cheapest first.

        The teacher's fastest variant is measured again beside each shape, because a machine is not
        equally fast all the time.
        """
        full, found = shapes.whole(self.teacher), list[Candidate]()
        with tempfile.TemporaryDirectory(prefix="ad2kit-fit-") as scratch:
            teachers = functools.cache(lambda: self._untrained(full, Path(scratch) / "teacher"))
            teacher = self.stopwatch.measure(str(full), teachers)
            fastest = min(teacher, key=lambda cost: cost.p50_ms).variant

            def beside(shape: Shape) -> dict[str, System]:
                return {"teacher": teachers()[fastest]} | self._untrained(
                    shape, Path(scratch) / "student"
                )

            for number, shape in enumerate(wanted, start=1):
                make = functools.partial(beside, shape)
                _, *costs = self.stopwatch.measure([str(full), str(shape)], make, ("teacher",))
                found.append(Candidate.measured(shape, tuple(costs), self.target))
                best = found[-1].best(self.target)
                logger.info(
                    "%d of %d, %s: %s takes %.2f ms, %.2f times the teacher's speed",
                    number, len(wanted), shape, best.variant, best.p50_ms, best.speedup,
                )  # fmt: skip
        return teacher, sorted(found, key=lambda each: each.best(self.target).p50_ms)

    def _untrained(self, shape: Shape, folder: Path) -> dict[str, System]:
        """Return the variants of an untrained student."""
        models.save(shapes.untrained(self.teacher, shape), folder / "model", inputs="")
        shutil.rmtree(folder / "onnx", ignore_errors=True)
        export_fp32(folder / "model", folder / "onnx")
        graphs = shapes.graphs(folder / "onnx" / MODEL_FILE, self.recipe.export.variants)
        threads, provider = self.stopwatch.threads, self.recipe.export.provider
        return {
            name: (bench.session_call(open_session(path, threads, provider)), path.stat().st_size)
            for name, path in graphs.items()
        }

    def judge(self, candidate: Candidate) -> Candidate:
        """Distil a candidate, judge it, each as far as it is worth it; say what became of it."""
        run = open_run(self._recipe_for(candidate.shape), self.runs_dir)
        candidate = candidate.model_copy(update={"run": run.path.name})
        logger.info("%s: %s", candidate.shape, run.path)
        try:
            distilled = self._distill(run)
        except _GivenUp:
            scores = _scores(run)
            return candidate.ended(
                "given up", f"{scores[-1]:.4f} on select after {len(scores)} epochs",
                select_score=scores[-1],
            )  # fmt: skip
        facts: dict[str, Any] = {
            "select_score": distilled.student_select_score,
            "train_seconds": distilled.train_seconds,
        }
        needed = self.target.retain * distilled.teacher_select_score
        if distilled.student_select_score < needed:
            reason = f"{distilled.student_select_score:.4f} on select, needed {needed:.4f}"
            return candidate.ended("below on select", reason, **facts)
        export(run)
        costs = self._trained_costs(run)
        affordable = [cost for cost in costs if not shortfalls(cost, self.target)]
        if not affordable:
            missed = Candidate.measured(candidate.shape, costs, self.target).reason
            return candidate.ended("missed when trained", missed, **facts)
        return self._gate(candidate, run, affordable, facts)

    def _gate(
        self, candidate: Candidate, run: RunDir, affordable: list[Cost], facts: dict[str, Any]
    ) -> Candidate:
        """Judge the variants that are cheap enough on the validation rows."""
        self.looks += 1
        verdicts = {verdict.variant: verdict for verdict in parity(run).variants}
        least, failures = run.recipe.parity.min_retained_lower, list[str]()
        for cost in sorted(affordable, key=lambda cost: cost.p50_ms):
            verdict, interval = verdicts[cost.variant], self._interval(run, cost.variant)
            facts |= {
                "look": self.looks, "variant": cost.variant, "retained": verdict.retained,
                "retained_interval": interval,
            }  # fmt: skip
            if verdict.passed and interval[0] >= least:
                bench.bench(run, again=False)
                self.package = run.path.name, cost.variant
                return candidate.ended("found", "", **facts)
            failures += ParityReport.read(run.parity_report).failures(cost.variant) or [
                f"{cost.variant}: retained, lower bound at look {self.looks} is {interval[0]:.4g}, "
                f"expected at least {least:g}"
            ]
        return candidate.ended("failed the gate", "; ".join(failures), **facts)

    def _recipe_for(self, shape: Shape) -> Recipe:
        student = shapes.section(shape, shapes.whole(self.teacher))
        return self.recipe.model_copy(update={"student": student})

    def _distill(self, run: RunDir) -> DistillReport:
        """Distil a candidate, unless and until it is hopeless."""

        def watch(record: StepRecord) -> None:
            self.on_step(record)
            judged = record.phase == "student" and record.select_score is not None
            if judged and record.step < record.total_steps and self._hopeless(run):
                raise _GivenUp

        if not run.distill_report.is_file() and self._hopeless(run):
            raise _GivenUp
        try:
            return distill(run, on_step=watch, allow_inexact=self.allow_inexact)
        except _GivenUp:
            shutil.rmtree(run.checkpoint("student"), ignore_errors=True)
            raise

    def _hopeless(self, run: RunDir) -> bool:
        scores, select = _scores(run), self.data.select
        if not scores:
            return False
        if self.needed is None:
            teacher = models.load(run.teacher, self.data.labels, self.data.task)
            length = self.recipe.data.max_length_tokens
            encoded = datasets.encode(select, teacher.tokenizer, length)
            logits = predict_logits(teacher, encoded, torch.device("cpu")).numpy()
            found = answers(self.data.task, logits)
            self.needed = self.target.retain * score(
                self.recipe.data.judged_by, found, select.labels
            )
        return hopeless(scores, len(select), self.needed)

    def _trained_costs(self, run: RunDir) -> tuple[Cost, ...]:
        """Return the costs of a run's variants; speeds are over the teacher's best that passed."""
        teacher = self._teacher_run(run)
        export(teacher)
        passed = [verdict.variant for verdict in parity(teacher).variants if verdict.passed]
        variants, threads = self.recipe.export.variants, self.stopwatch.threads
        folders = {f"teacher {variant}": teacher.onnx(variant) for variant in passed}
        folders |= {variant: run.onnx(variant) for variant in variants}

        def make() -> dict[str, System]:
            found = {name: OnnxClassifier(path, threads=threads) for name, path in folders.items()}
            return {
                name: (bench.onnx_call(classifier), classifier.artifact.model_bytes)
                for name, classifier in found.items()
            }

        what = [sha256_of(path / OnnxArtifact.file_name) for path in folders.values()]
        self.trained = self.stopwatch.measure(what, make, [f"teacher {name}" for name in passed])
        return self.trained[len(passed) :]

    def _teacher_run(self, run: RunDir) -> RunDir:
        """Return the teacher as a run: its own student, with nothing to learn."""
        found = open_run(
            self._recipe_for(shapes.whole(self.teacher)), self.runs_dir, self.folder / "teacher"
        )
        distilled = DistillReport.read(run.distill_report)
        if found.distill_report.is_file():
            if DistillReport.read(found.distill_report).teacher_sha256 == distilled.teacher_sha256:
                return found
        for copy in (found.teacher, found.student):
            store.link_folder(run.teacher, copy)
        untrained = {
            "student_sha256": sha256_of(found.student / models.MANIFEST),
            "student_parameters": distilled.teacher_parameters,
            "student_select_score": distilled.teacher_select_score,
            "best_step": 0, "steps": 0, "train_seconds": 0.0, "examples_per_s": 0.0,
            "mean_clean_kl": 0.0, "mean_adversarial_gain": None, "verdict": "the teacher itself",
        }  # fmt: skip
        write_record(found.distill_report, distilled.model_copy(update=untrained))
        return found

    def _interval(self, run: RunDir, variant: str) -> tuple[float, float]:
        """Return the interval of what a variant retains, as wide as this look demands."""
        lines = run.answers.read_text(encoding="utf-8").splitlines()
        rows = [RowAnswers.model_validate_json(line) for line in lines]
        found = [
            answers(self.data.task, np.array([row.logits[name] for row in rows], np.float32))
            for name in (variant, "teacher")
        ]
        draws = paired_bootstrap(
            self.recipe.data.judged_by, found, self.data.validation.labels,
            self.recipe.parity.bootstrap_samples, self.recipe.seed,
        )  # fmt: skip
        return retained_interval(draws, error_of(self.looks))


def _scores(run: RunDir) -> list[float]:
    """Return the scores on ``select`` of a student's training so far."""
    curve = read_curve(run.curve("student"))
    return [record.select_score for record in curve if record.select_score is not None]
