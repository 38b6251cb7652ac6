"""Students of one teacher, judged on many labelled rows that no training has seen.

    python bench/levers.py custom data.source=FOLDER data.max_train_rows=2000 \
      --change distill.alpha=0 --change "distill.alpha=0 student.layers=[1,3,5]"

What else than the adversary makes a student better? Each `--change` is a list of overrides between
blanks; the recipe as it is comes first. The teacher stays the same unless a change trains another,
and `retained` is then of that one.

`unseen` is the accuracy on training rows that `data.max_train_rows` left out (many, so that a point
is not noise, and free to choose settings by), `validation` that on the official rows (few, not to
be chosen by). `gain` is the mean KL that the adversary added, as a fraction of the clean KL, and
`agreement` the share of unseen texts on which student and teacher give the same label. It resumes:
what is distilled already is only judged.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ad2kit.data import splits
from ad2kit.models import text_model
from ad2kit.models.text_model import predict_logits
from ad2kit.run import recipe as recipes
from ad2kit.run.folder import open_run
from ad2kit.training.distill import distill

Answers = dict[str, Any]


class Bench:
    """The rows that students are judged on, and the answers of their teachers to them."""

    def __init__(self, name: str, overrides: list[str], unseen: int, runs_dir: Path) -> None:
        self.name, self.overrides, self.runs_dir = name, overrides, runs_dir
        self.recipe = recipes.load_recipe(name, overrides)
        self.data = splits.load_data(self.recipe.data, self.recipe.seed)
        whole = self.recipe.data.model_copy(update={"max_train_rows": None})
        everything = splits.load_data(whole, self.recipe.seed).train
        seen = {*self.data.train.texts, *self.data.select.texts, *self.data.validation.texts}
        pool = [row for row, text in enumerate(everything.texts) if text not in seen]
        self.unseen = everything.take(np.array(pool[:unseen]))
        self.teachers: dict[str, Answers] = {}
        self.right: dict[str, list[np.ndarray[Any, Any]]] = {}

    def answers(self, folder: Path) -> Answers:
        """Return the class ids that a model gives to the rows of both sets."""
        model = text_model.load_model(folder, self.data.labels)
        length, cpu = self.recipe.data.length, torch.device("cpu")
        return {
            name: predict_logits(model, splits.encode(split, model.tokenizer, length), cpu)
            .argmax(1)
            .numpy()
            for name, split in (("unseen", self.unseen), ("validation", self.data.validation))
        }

    def accuracy(self, found: Answers) -> dict[str, float]:
        """Return the accuracy on both sets."""
        return {
            "unseen": float((found["unseen"] == self.unseen.labels).mean()),
            "validation": float((found["validation"] == self.data.validation.labels).mean()),
        }

    def student(self, seed: int, *changes: str) -> dict[str, Any]:
        """Distil (or find again) and judge the student of a changed recipe."""
        overrides = [*self.overrides, f"distill.seed={seed}", *changes]
        run = open_run(recipes.load_recipe(self.name, overrides), self.runs_dir)
        report = distill(run)
        if report.teacher_sha256 not in self.teachers:
            self.teachers[report.teacher_sha256] = self.answers(run.teacher)
        teacher, found = self.teachers[report.teacher_sha256], self.answers(run.student)
        gain, scores = report.mean_adversarial_gain, self.accuracy(found)
        self.right.setdefault(" ".join(changes), []).append(found["unseen"] == self.unseen.labels)
        row = {
            "changes": " ".join(changes),
            "seed": seed,
            "gain": None if gain is None else gain / report.mean_clean_kl,
            "seconds": report.train_seconds,
            "examples_per_s": report.examples_per_s,
            "peak_memory_mb": report.peak_memory_mb,
            **scores,
            "teacher": self.accuracy(teacher),
            "retained": scores["unseen"] / self.accuracy(teacher)["unseen"],
            "agreement": float((found["unseen"] == teacher["unseen"]).mean()),
        }
        print(json.dumps(row), flush=True)
        return row

    def difference(self, change: str, samples: int = 2_000) -> dict[str, Any]:
        """Return how far the recipe is above a change of it on the unseen rows, over the seeds.

        The interval is a bootstrap over rows and seeds, paired in both.
        """
        gap = np.stack(self.right[""]).astype(float) - np.stack(self.right[change])
        generator, draws = np.random.default_rng(self.recipe.seed), []
        for _ in range(samples):
            seeds = generator.integers(len(gap), size=len(gap))
            draws.append(gap[seeds][:, generator.integers(gap.shape[1], size=gap.shape[1])].mean())
        return {
            "recipe minus": change,
            "points": 100 * gap.mean(),
            "interval": (100 * np.percentile(draws, [2.5, 97.5])).tolist(),
        }


def set_up(parser: argparse.ArgumentParser) -> tuple[Bench, range, argparse.Namespace]:
    """Read the command line; load the data."""
    parser.add_argument("recipe")
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--unseen", type=int, default=8000, help="unseen rows to judge on")
    parser.add_argument("--runs-dir", type=Path, default=Path("runs/bench"))
    options = parser.parse_intermixed_args()
    bench = Bench(options.recipe, options.overrides, options.unseen, options.runs_dir)
    return bench, range(bench.recipe.seed, bench.recipe.seed + options.seeds), options


def main() -> None:
    """Print a row for each student and a last line of JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--change", action="append", default=[], metavar="'KEY=VALUE KEY=VALUE'")
    bench, seeds, options = set_up(parser)
    changes = [(), *(change.split() for change in options.change)]
    rows = [bench.student(seed, *change) for change in changes for seed in seeds]
    differences = [bench.difference(" ".join(change)) for change in changes[1:]]
    for each in differences:
        print(json.dumps(each))
    print(json.dumps({"unseen": len(bench.unseen), "rows": rows, "differences": differences}))


if __name__ == "__main__":
    main()
