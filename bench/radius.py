"""How much does the adversary matter, and at which radius?

    python bench/radius.py sst2-minilm data.source=FOLDER data.max_train_rows=2000

One teacher, and students of the same recipe and seed that differ in the adversary alone: plain
distillation, then six decades of the radius in both norms with one ascent step from zero, then
two and three steps at the best radius. Each student is judged on labelled training rows that no
training has seen (many, so that a point is not noise; this is what the best radius is chosen by)
and on the validation set (few, official). It resumes: what is distilled already is only judged.

`gain` is the mean KL that the adversary added, as a fraction of the clean KL. `agreement` is the
share of unseen texts on which student and teacher give the same label.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ad2kit import data as datasets
from ad2kit import models
from ad2kit import recipe as recipes
from ad2kit.distill import distill
from ad2kit.run_dir import open_run
from ad2kit.training import predict_logits

RADII = {
    "linf": (1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1),
    "l2": (1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0),
}


Answers = dict[str, Any]


class Bench:
    """One teacher, what all are judged on, and the students so far."""

    def __init__(self, name: str, overrides: list[str], unseen: int, runs_dir: Path) -> None:
        self.name, self.overrides, self.runs_dir = name, overrides, runs_dir
        self.recipe = recipes.load(name, overrides)
        self.data = datasets.load_data(self.recipe.data, self.recipe.seed)
        whole = self.recipe.data.model_copy(update={"max_train_rows": None})
        everything = datasets.load_data(whole, self.recipe.seed).train
        seen = {*self.data.train.texts, *self.data.select.texts, *self.data.validation.texts}
        pool = [row for row, text in enumerate(everything.texts) if text not in seen]
        self.unseen = everything.take(np.array(pool[:unseen]))
        self.teacher: Answers = {}

    def answers(self, folder: Path) -> Answers:
        """Return the class ids that a model gives to the rows of both sets."""
        model = models.load(folder, self.data.labels)
        length, cpu = self.recipe.data.max_length_tokens, torch.device("cpu")
        return {
            name: predict_logits(model, datasets.encode(split, model.tokenizer, length), cpu)
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

    def student(self, seed: int, **settings: Any) -> dict[str, Any]:
        """Distil (or find again) and judge the student of some settings of the distill section."""
        changes = [f"distill.{key}={value}" for key, value in settings.items()]
        overrides = [*self.overrides, f"distill.seed={seed}", *changes]
        run = open_run(recipes.load(self.name, overrides), self.runs_dir)
        report = distill(run)
        self.teacher = self.teacher or self.answers(run.teacher)
        found, gain = self.answers(run.student), report.mean_adversarial_gain
        row = {
            **{key.rpartition(".")[2]: value for key, value in settings.items()},
            "seed": seed,
            "gain": None if gain is None else gain / report.mean_clean_kl,
            **self.accuracy(found),
            "agreement": float((found["unseen"] == self.teacher["unseen"]).mean()),
        }
        print(json.dumps(row), flush=True)
        return row


def attack(norm: str, radius: float, steps: int = 1) -> dict[str, Any]:
    """Return settings that reach the border of the ball, with half a ball to spare for turns."""
    return {
        "adversary.norm": norm,
        "adversary.radius": radius,
        "adversary.step_size": radius if steps == 1 else 1.5 * radius / steps,
        "adversary.steps": steps,
    }


def main() -> None:
    """Sweep, and print a row for each student and a last line of JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("recipe")
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--unseen", type=int, default=8000, help="unseen rows to judge on")
    parser.add_argument("--runs-dir", type=Path, default=Path("runs/radius"))
    arguments = parser.parse_args()
    bench = Bench(arguments.recipe, arguments.overrides, arguments.unseen, arguments.runs_dir)
    seeds = range(bench.recipe.seed, bench.recipe.seed + arguments.seeds)
    rows = [bench.student(seed, alpha=0.0) for seed in seeds]
    balls = [(norm, radius) for norm, radii in RADII.items() for radius in radii]
    found = {ball: [bench.student(seed, **attack(*ball)) for seed in seeds] for ball in balls}
    best = max(balls, key=lambda ball: np.mean([row["unseen"] for row in found[ball]]))
    rows += [row for each in found.values() for row in each]
    rows += [bench.student(s, **attack(*best, steps=steps)) for steps in (2, 3) for s in seeds]
    teacher = bench.accuracy(bench.teacher)
    print(json.dumps({"teacher": teacher, "unseen_rows": len(bench.unseen), "rows": rows}))


if __name__ == "__main__":
    main()
