"""What a student loses if only a part of its teacher's answers is known.

    python -m bench.answers sst2-minilm data.source=FOLDER data.max_train_rows=2000 --seeds 3
    python -m bench.answers smoke --seeds 1 --unseen 500

A teacher is trained (or found again). Its answers to the texts of the recipe are written into
tables, as another system would give them: whole distributions, the three most probable labels, a
label with its confidence, and a label alone. Students of each table start from the encoder that the
teacher started from, and learn from the answers alone (no hard labels), with the adversary of the
recipe (`ad2`) and without it (`kd`). They are judged on labelled rows that no training has seen, as
in `levers.py`; `agreement` is with the teacher itself on these rows. It resumes.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ad2kit.data import splits
from ad2kit.models import text_model
from ad2kit.models.text_model import predict_logits
from ad2kit.run import recipe as recipes
from ad2kit.run.files import write_text
from ad2kit.run.folder import open_run
from ad2kit.statistics.logits import softmax
from ad2kit.training.distill import distill, teach
from bench.levers import Bench

if TYPE_CHECKING:
    from ad2kit.run.folder import RunDir

FORMS = {
    "whole": "probabilities: [p]",
    "top 3": "probabilities: [top]",
    "label and confidence": "label: said, confidence: sure",
    "label": "label: said",
}


def write_table(bench: Bench, teacher: RunDir, path: Path) -> None:
    """Write the teacher's answers to all texts of the recipe, in every form, as JSON lines."""
    data = bench.data
    if data.task != "single_label":
        message = f"expected a recipe of single_label, found {data.task}"
        raise SystemExit(message)
    model = text_model.load_model(teacher.teacher, data.labels, data.task)
    lines = {}
    for split in data.splits().values():
        encoded = splits.encode(split, model.tokenizer, bench.recipe.data.length)
        logits = predict_logits(model, encoded, torch.device("cpu")).numpy()
        for texts, p in zip(split.texts, softmax(logits), strict=True):
            top = np.argsort(-p, kind="stable")
            lines[texts] = json.dumps(
                {
                    **dict(zip(bench.recipe.data.text_columns, texts, strict=True)),
                    "p": p.tolist(),
                    "top": {data.labels[label]: p[label] for label in top[:3]},
                    "said": data.labels[top[0]],
                    "sure": p[top[0]],
                }
            )
    write_text(path, "".join(f"{line}\n" for line in lines.values()))


def main() -> None:
    """Print a line for each student, and the means of each form of answers as JSON."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("recipe")
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--forms", nargs="+", choices=FORMS, default=list(FORMS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--unseen", type=int, default=20_000)
    parser.add_argument("--runs-dir", type=Path, default=Path("runs/answers"))
    arguments = parser.parse_args()
    bench = Bench(arguments.recipe, arguments.overrides, arguments.unseen, arguments.runs_dir)
    encoder = bench.recipe.student.model or bench.recipe.teacher.model
    start = f"student.model={encoder}"
    teacher = open_run(bench.recipe, arguments.runs_dir)
    teach(teacher)
    table = arguments.runs_dir / "answers.jsonl"
    write_table(bench, teacher, table)
    said = bench.answers(teacher.teacher)["unseen"]
    print(f"teacher: unseen {(said == bench.unseen.labels).mean():.4f}")
    means: dict[str, dict[str, Any]] = {}
    for form in arguments.forms:
        given = (
            "teacher={model: null, finetune: null, accept: true, "
            f"answers: [{{files: ['{table}'], {FORMS[form]}}}]}}"
        )
        for method, alpha in (("kd", ("distill.alpha=0",)), ("ad2", ())):
            scores = []
            for seed in range(arguments.seeds):
                changes = (given, start, "distill.hard_label_weight=0", f"distill.seed={seed}")
                recipe = recipes.load_recipe(
                    arguments.recipe, [*arguments.overrides, *changes, *alpha]
                )
                run = open_run(recipe, arguments.runs_dir)
                distill(run)
                found = bench.answers(run.student)["unseen"]
                score = float((found == bench.unseen.labels).mean())
                agreement = float((found == said).mean())
                scores.append((score, agreement))
                print(f"{form}, {method}, seed {seed}: {score:.4f}, agreement {agreement:.4f}")
            unseen, agreed = np.mean(scores, axis=0).tolist()
            means[f"{form}, {method}"] = {"unseen": unseen, "agreement": agreed}
    print(json.dumps({"recipe": arguments.recipe, "rows": len(bench.unseen), "means": means}))


if __name__ == "__main__":
    main()
