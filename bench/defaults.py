"""What does somebody get who types the default command with a table of their own?

    python bench/defaults.py --data ../shared/data
    python bench/defaults.py --data ../shared/data --sets banking77 trec mrpc --rows 500 3000 \
        compute.threads=2

Trains the teacher and the student of `custom` with nothing but the data changed, for each set and
number of rows. All columns are judged on the validation rows, by the metric of the set:

- bag: a bag of words and pairs of words, see `ad2kit/models/baselines.py`;
- probe: regression on the mean token vectors of the frozen encoder, what one would use instead;
- teacher; kept, the student; last, its last update; oracle, the evaluated update that is best on
  these very rows, which nobody can choose: for this table alone;
- retained: kept over teacher; minutes: those of the updates of teacher and student.

A bar is kept where the score is within one point, or two paired standard errors, of what it is
compared with. A cell that is done is a line of JSON in --results, and is not done again; the run of
one that was stopped goes on.
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ad2kit.cli.show import show_messages
from ad2kit.data.splits import encode, load_data
from ad2kit.models import text_model
from ad2kit.models.baselines import MEAN_PROBE, baseline_answers
from ad2kit.models.records import BAG_OF_WORDS
from ad2kit.models.text_model import predict_logits
from ad2kit.run.folder import open_run
from ad2kit.run.machine import accelerator, environment
from ad2kit.run.recipe import load_recipe
from ad2kit.statistics import metrics
from ad2kit.statistics.logits import answers
from ad2kit.training.checkpoint import Snapshots
from ad2kit.training.distill import distill
from ad2kit.training.records import read_curve

if TYPE_CHECKING:
    import numpy as np

    from ad2kit.data.splits import Data
    from ad2kit.models.text_model import TextModel
    from ad2kit.run.folder import RunDir
    from ad2kit.run.recipe import Recipe
    from ad2kit.training.records import DistillReport, StepRecord

    Answers = np.ndarray[Any, np.dtype[Any]]

ONE, PAIR = "data.text_columns=[sentence]", "data.text_columns=[sentence1, sentence2]"
SETS = {
    "banking77": [ONE],
    "clinc150": [ONE],
    "trec": [ONE],
    "sst2": [ONE],
    "cola": [ONE, "data.metrics=[matthews]"],
    "mrpc": [PAIR, "data.metrics=[f1, accuracy]"],
    "rte": [PAIR],
    "stsb": [PAIR, "data.task=regression"],
}
COLUMNS = ("bag", "probe", "teacher", "kept", "last", "oracle", "retained", "minutes")
_POINT, _ERRORS = 0.01, 2.0


class Snapped:
    """The evaluated weights of a student, kept beside its run: the run itself keeps but one."""

    def __init__(self, run: RunDir) -> None:
        self.run, self.folder = run, run.path.with_name(f"{run.path.name}-snapshots")

    def __call__(self, record: StepRecord) -> None:
        """Link the files of the snapshots that are there."""
        if record.phase != "student" or record.select_score is None:
            return
        for file in self.run.snapshots("student").glob("*/*"):
            copy = self.folder / file.parent.name / file.name
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.unlink(missing_ok=True)
            os.link(file, copy)

    def answers(self, report: DistillReport, judge: Judge) -> dict[int, Answers]:
        """Return the answers on the validation rows, by update."""
        assert report.selection is not None
        snapshots = Snapshots(self.folder, report.inputs, cure=f"delete {self.folder}")
        student = text_model.load_model(self.run.student, judge.data.labels, judge.data.task)
        found = {}
        for point in report.selection.points:
            student.module.load_state_dict(snapshots.weights(point.step), strict=True)
            found[point.step] = judge.answers(student)
        return found


class Judge:
    """Answers and scores on the validation rows."""

    def __init__(self, recipe: Recipe, data: Data) -> None:
        self.recipe, self.data, self.device = recipe, data, accelerator(recipe.compute).device
        self.labels, self.metrics = data.validation.labels, recipe.data.judged_by

    def answers(self, model: TextModel) -> Answers:
        """Return what a model answers."""
        model.module.to(self.device)
        length = self.recipe.data.length
        encoded = encode(self.data.validation, model.tokenizer, length)
        return answers(self.data.task, predict_logits(model, encoded, self.device).numpy())

    def score(self, found: Answers) -> float:
        """Return the score of some answers."""
        return metrics.mean_metric(self.metrics, found, self.labels)

    def reaches(self, found: Answers, other: Answers) -> bool:
        """Tell whether a score is within a point, or two paired standard errors, of another."""
        _, error = metrics.paired_standard_errors(self.metrics, [found, other], self.labels, 0)
        return self.score(other) - self.score(found) <= max(_POINT, _ERRORS * float(error))


def cell(name: str, rows: int, options: argparse.Namespace) -> dict[str, Any]:
    """Train and judge one set with so many rows."""
    source = [f"data.source={options.data / name}", f"data.max_train_rows={rows}", *SETS[name]]
    recipe = load_recipe("custom", [*source, *options.overrides])
    data = load_data(recipe.data, recipe.seed)
    judge = Judge(recipe, data)
    run = open_run(recipe, options.runs_dir)
    print(f"{name}, {rows} rows: {run.path}", flush=True)
    snapped = Snapped(run)
    report = distill(run, on_step=snapped)
    assert report.selection is not None
    students = snapped.answers(report, judge)
    kept, last = students[report.selection.kept_step], students[report.steps]
    best = max(students, key=lambda step: judge.score(students[step]))
    encoder = text_model.load_reference(
        recipe.teacher.model, data, seed=recipe.seed, finished=False, key="teacher.model"
    )
    simple = baseline_answers(recipe, data, encoder, judge.device)
    baselines = {"bag": simple[BAG_OF_WORDS][1], "probe": simple[MEAN_PROBE][1]}
    better = max(baselines.values(), key=judge.score)
    teacher = judge.answers(text_model.load_model(run.teacher, data.labels, data.task))
    seconds = sum(
        record.seconds
        for phase in ("teacher", "student")
        for record in read_curve(run.curve(phase))
    )
    return {
        "set": name,
        "rows": rows,
        "metrics": recipe.data.judged_by,
        "classes": len(data.labels),
        **{column: judge.score(found) for column, found in baselines.items()},
        "teacher": judge.score(teacher),
        "kept": judge.score(kept),
        "last": judge.score(last),
        "oracle": judge.score(students[best]),
        "retained": judge.score(kept) / judge.score(teacher),
        "minutes": seconds / 60,
        "teacher_reaches_baselines": judge.reaches(teacher, better),
        "kept_reaches_oracle": judge.reaches(kept, students[best]),
        "updates": {"kept": report.selection.kept_step, "last": report.steps, "oracle": best},
        "learning_rates": report.learning_rates,
        "overrides": options.overrides,
        "environment": environment(torch.get_num_threads()),
    }


def show(found: dict[str, Any]) -> str:
    """Return a cell as a line of the table."""
    numbers = "".join(
        f"{found[column]:>9.1f}" if column == "minutes" else f"{found[column]:>9.3f}"
        for column in COLUMNS
    )
    missed = [bar for bar in ("teacher_reaches_baselines", "kept_reaches_oracle") if not found[bar]]
    return f"{found['set']:<10}{found['rows']:>7}{numbers}  {'misses ' if missed else ''}" + (
        ", ".join(missed)
    )


def main() -> None:
    """Do the cells that are not done, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="of all cells")
    parser.add_argument("--data", type=Path, required=True, help="folder of the sets")
    parser.add_argument("--sets", nargs="+", choices=SETS, default=list(SETS))
    parser.add_argument("--rows", nargs="+", type=int, default=[500, 3_000, 10_000])
    parser.add_argument("--runs-dir", type=Path, default=Path("runs/defaults"))
    parser.add_argument("--results", type=Path, default=Path("bench/results/defaults.jsonl"))
    options = parser.parse_intermixed_args()
    show_messages()
    lines = options.results.read_text().splitlines() if options.results.is_file() else []
    cells = [json.loads(line) for line in lines]
    done = {(each["set"], each["rows"], *each["overrides"]): each for each in cells}
    for rows in options.rows:
        for name in options.sets:
            if (name, rows, *options.overrides) not in done:
                found = cell(name, rows, options)
                done[name, rows, *options.overrides] = found
                options.results.parent.mkdir(parents=True, exist_ok=True)
                with options.results.open("a") as file:
                    file.write(f"{json.dumps(found)}\n")
                print(show(found), flush=True)
    print(f"\n{'set':<10}{'rows':>7}" + "".join(f"{column:>9}" for column in COLUMNS))
    print("\n".join(show(each) for each in done.values()))


if __name__ == "__main__":
    main()
