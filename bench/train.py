"""What does AD2 cost beside fine-tuning, and beside AD2 written around a Hugging Face Trainer?

    python bench/train.py sst2-minilm data.source=../shared/data/sst2 student.layers=[1,3,5]
    python bench/train.py sst2-minilm data.source=FOLDER teacher.model=FOLDER teacher.finetune=null

Step times. An update of fine-tuning is a forward and a backward pass; if the backward pass counts
as two forward ones, that is 3. AD2 adds the same again for the perturbed text: a floor of 2.0, if
the first ascent step from zero costs no pass of its own. A random start needs one, a forward pass
and that half of a backward pass that goes to δ and not to the weights: 8/3; and so does each
further step. Measured is the whole update, with the teacher's answers stored; what it does but once
for any system (clipping, AdamW) pulls a ratio below its floor. The systems take turns update by
update, on the same batches and in an order that rotates, so that a noisy machine is as noisy to all
of them. A ratio is the median over the updates of a system's time over fine-tuning's.

Epochs. The same AD2 (ℓ∞, one step from zero) trains the same student under the same teacher with
the same optimiser, rates, batch size and clipping, in ad2kit and in `hf_trainer.py`, in turns epoch
by epoch. ad2kit's time holds one reading of the rows by the teacher, spread over the epochs that
are run here (a recipe has more); neither holds tokenising. The peer pads to the maximum length,
which the requirement means, and then to the longest text of the batch, to show how much is padding
alone. Both keep their last weights. Times do not depend on the layers, but MiniLM's [0, 1, 2] have
learned nothing yet after so few updates, and their scores say nothing.

Scores. They are of the validation rows, or with `--unseen` of so many training rows that neither
the teacher nor the students have seen. With `--seeds` each pair is trained so often; the bootstrap
draws seeds and rows, both in pairs. Ends with JSON.

    python bench/train.py sst2-minilm data.source=FOLDER student.layers=[1,3,5] --steps 0 \
      --padding longest --rows 2048 --seeds 3 --unseen 4000
"""

from __future__ import annotations

import argparse
import itertools
import json
import tempfile
import time
from collections import deque
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ad2kit.data.splits import Data, Split, encode, load_data
from ad2kit.models.text_model import TextModel, load_reference, predict_logits
from ad2kit.run import machine
from ad2kit.run.recipe import Recipe, load_recipe
from ad2kit.run.sections import AdversaryRecipe, DistillRecipe, IntermediateRecipe
from ad2kit.statistics.logits import answers
from ad2kit.statistics.metrics import mean_metric, paired_bootstrap, smallest_detectable_difference
from ad2kit.training.ad2 import distillation, finetuning
from ad2kit.training.checkpoint import Evaluation
from ad2kit.training.loop import new_state, train
from ad2kit.training.students import build_student
from bench import hf_trainer as peer

if TYPE_CHECKING:
    from collections.abc import Iterator

    from accelerate import Accelerator

    from ad2kit.run.sections import TrainRecipe
    from ad2kit.training.ad2 import Objective
    from ad2kit.training.records import StepRecord

WARM_UP = 3
ATTACKS: dict[str, dict[str, Any]] = {
    "ad2": {},
    "ad2_random_start": {"start": "random"},
    "ad2_two_steps": {"steps": 2},
}
FLOORS = {"finetune": 1, "kd": 1, "ad2": 2, "ad2_random_start": 8 / 3, "ad2_two_steps": 8 / 3}
PADDINGS = ["max_length", "longest"]
AT_MOST, PEER_AT_LEAST = {"ad2": 2.3, "ad2_random_start": 2.9}, 3.0  # required


@dataclass(frozen=True)
class Workbench:
    """A recipe with its data, its finished teacher, and a place to run them."""

    recipe: Recipe
    data: Data
    accelerator: Accelerator
    teacher: TextModel
    judged: Split

    def student(self) -> TextModel:
        """Return the untrained student, each time the same."""
        layers = self.recipe.student.layers or range(self.teacher.module.config.num_hidden_layers)
        return build_student(self.teacher, layers)

    def rows(self, count: int) -> Split:
        """Return training rows, which the recipe's seed has shuffled."""
        return self.data.train.take(np.arange(min(count, len(self.data.train))))

    def logits(self, model: TextModel, split: Split) -> tuple[torch.Tensor, float]:
        """Return a model's logits, and how many seconds it read for them."""
        encoded = encode(split, model.tokenizer, self.recipe.data.length)
        start = time.perf_counter()
        logits = predict_logits(model, encoded, self.accelerator.device)
        return logits, time.perf_counter() - start

    def judged_on(self, trained: int, count: int) -> Workbench:
        """Return one that judges on training rows behind the first, which have been trained on."""
        rows = np.arange(trained, trained + count)
        if rows[-1] >= len(self.data.train):
            raise SystemExit(
                f"--unseen {count}: train has {len(self.data.train)} rows, and the "
                f"first {trained} are trained on"
            )
        found = replace(self, judged=self.data.train.take(rows))
        print(f"teacher: {found.score(found.answers(self.teacher)):.4f} on {count} unseen rows")
        return found

    def answers(self, model: TextModel) -> np.ndarray:
        """Return a model's answers to the judged rows."""
        return answers(self.data.task, self.logits(model, self.judged)[0].numpy())

    def score(self, found: np.ndarray) -> float:
        """Return what answers to the judged rows are worth."""
        return mean_metric(self.recipe.data.judged_by, found, self.judged.labels)

    def updates(
        self,
        model: TextModel,
        split: Split,
        logits: torch.Tensor | None,
        objective: Objective,
        settings: TrainRecipe,
        seed: int | None = None,
    ) -> Iterator[StepRecord]:
        """Return the updates of a training, none of them done yet."""
        return train(
            new_state(model, settings, self.accelerator),
            encode(split, model.tokenizer, self.recipe.data.length),
            logits,
            objective,
            settings,
            lambda _model: Evaluation(0.0, torch.zeros(1, 1)),
            self.accelerator,
            phase="teacher" if logits is None else "student",
            seed=self.recipe.seed if seed is None else seed,
        )


def set_up(parser: argparse.ArgumentParser) -> tuple[argparse.Namespace, Workbench]:
    """Read the command line; load the data, and load or briefly fine-tune the teacher."""
    parser.add_argument("recipe", help="name or path")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE")
    parser.add_argument("--threads", type=int, help="of torch; default: the recipe's")
    parser.add_argument("--teacher-rows", type=int, default=2048, help="to fine-tune the teacher")
    options = parser.parse_intermixed_args()
    threads = [f"compute.threads={options.threads}"] if options.threads else []
    recipe = load_recipe(options.recipe, [*options.overrides, *threads, "compute.device=cpu"])
    if recipe.student.model is not None or recipe.data.task != "single_label":
        parser.error("needs a student made of the teacher's layers, and a single_label task")
    settings, data = recipe.teacher.finetune, load_data(recipe.data, recipe.seed)
    teacher = load_reference(
        recipe.teacher.model, data, seed=recipe.seed, finished=settings is None, key="teacher.model"
    )
    accelerator = machine.accelerator(recipe.compute)
    bench = Workbench(recipe, data, accelerator, teacher, data.validation)
    if settings is not None:
        torch.manual_seed(recipe.seed)
        rows, objective = bench.rows(options.teacher_rows), finetuning(bench.accelerator)
        run(bench.updates(teacher, rows, None, objective, settings))
    print(f"teacher: {bench.score(bench.answers(teacher)):.4f} on the validation rows", flush=True)
    return options, bench


def plain_ad2(
    recipe: Recipe, attack: dict[str, Any] | None = None, **changes: Any
) -> DistillRecipe:
    """Return the recipe's distillation as AD2 alone: an ℓ∞ ball, one step from zero if no other."""
    radius, step_size = recipe.distill.adversary.radius, recipe.distill.adversary.step_size
    adversary = AdversaryRecipe(radius=radius, step_size=step_size, **(attack or {}))
    alone = {"kd_weight": 1.0, "hard_label_weight": 0.0, "intermediate": IntermediateRecipe()}
    return recipe.distill.model_copy(update={"adversary": adversary, **alone, **changes})


def run(updates: Iterator[StepRecord], count: int | None = None) -> float:
    """Do some updates, or all that are left, and return the seconds."""
    start = time.perf_counter()
    deque(itertools.islice(updates, count), maxlen=0)
    return time.perf_counter() - start


def step_times(bench: Workbench, steps: int) -> dict[str, float]:
    """Print a table of step times; return each system's median ratio over fine-tuning."""
    accelerator, total, batch = bench.accelerator, WARM_UP + steps, bench.recipe.distill.batch_size
    split = bench.rows(total * batch)
    (logits, _), ad2 = bench.logits(bench.teacher, split), plain_ad2(bench.recipe)
    plain = distillation(accelerator, plain_ad2(bench.recipe, alpha=0.0))
    objectives = {"finetune": finetuning(accelerator), "kd": plain}
    for name, changes in ATTACKS.items():
        objectives[name] = distillation(accelerator, plain_ad2(bench.recipe, changes))
    enough = ad2.model_copy(update={"epochs": -(-total // -(-len(split) // batch))})
    systems = {
        name: bench.updates(bench.student(), split, logits, objective, enough)
        for name, objective in objectives.items()
    }
    names, times = list(systems), {name: np.zeros(total) for name in systems}
    for step in range(total):
        shift = step % len(names)
        for name in names[shift:] + names[:shift]:
            times[name][step] = run(systems[name], 1)
    print(f"\n{'step time':<18}{'ms':>8}{'ratio':>8}{'middle half':>15}{'floor':>7}{'at most':>9}")
    medians = {}
    for name in names:
        ratios, most = times[name][WARM_UP:] / times["finetune"][WARM_UP:], AT_MOST.get(name)
        low, medians[name], high = np.percentile(ratios, (25, 50, 75)).tolist()
        missed = "  missed" if most and medians[name] > most else ""
        print(
            f"{name:<18}{1e3 * np.median(times[name][WARM_UP:]):>8.1f}{medians[name]:>8.2f}"
            f"{f'{low:.2f} to {high:.2f}':>15}{FLOORS[name]:>7.2f}{most or '':>9}{missed}",
            flush=True,
        )
    return medians


@dataclass(frozen=True)
class Pair:
    """One student trained in both ways from one seed."""

    ours: np.ndarray
    theirs: np.ndarray
    ours_s: float
    theirs_s: float
    reading_s: float


def pair(bench: Workbench, rows: int, count: int, padding: str, seed: int) -> Pair:
    """Train the student in both ways, each with random draws of its own; time them."""
    recipe, split, settings = bench.recipe, bench.rows(rows), plain_ad2(bench.recipe, epochs=count)
    logits, reading_s = bench.logits(bench.teacher, split)
    ours, theirs = bench.student(), bench.student()
    objective = distillation(bench.accelerator, settings)
    updates = bench.updates(ours, split, logits, objective, settings, seed)

    def our_epoch(epoch: int) -> float:
        with machine.seeded(seed + epoch):
            return run(updates, -(-len(split) // settings.batch_size))

    values = (
        settings.model_dump()
        | settings.adversary.model_dump()
        | {
            "seed": seed,
            "padding": padding,
            "max_length": recipe.data.max_length_tokens,
        }
    )
    same = peer.Settings(**{field.name: values[field.name] for field in fields(peer.Settings)})
    turns, teacher = peer.Turns(our_epoch), bench.teacher.module
    with tempfile.TemporaryDirectory() as folder:
        peer.train(
            theirs.module, teacher, theirs.tokenizer, tuple(split.texts), same, turns, folder
        )
    found = Pair(
        bench.answers(ours), bench.answers(theirs), sum(turns.others), sum(turns.own), reading_s
    )
    scores = [bench.score(one) for one in (found.ours, found.theirs)]
    print(f"seed {seed}, {padding}: ad2kit {scores[0]:.4f}, peer {scores[1]:.4f}", flush=True)
    return found


def epochs(bench: Workbench, rows: int, count: int, padding: str, seeds: int) -> dict[str, float]:
    """Train a pair of students from each seed; return their times and scores."""
    first = bench.recipe.seed
    pairs = [pair(bench, rows, count, padding, first + more) for more in range(seeds)]
    models = [one for found in pairs for one in (found.ours, found.theirs)]
    samples, labels = bench.recipe.parity.bootstrap_samples, bench.judged.labels
    draws = paired_bootstrap(bench.recipe.data.judged_by, models, labels, samples, first)
    # Seeds are drawn as rows are: a difference between two trainings is chance in both.
    drawn = np.random.default_rng(first).integers(seeds, size=(samples, seeds))
    by_seed = np.take_along_axis(draws.reshape(samples, seeds, 2), drawn[:, :, None], axis=1)
    means = by_seed.mean(axis=1)
    low, high = np.percentile(means[:, 0] - means[:, 1], [2.5, 97.5]).tolist()
    ours_s, theirs_s = (
        sum(times) / seeds
        for times in zip(*((found.ours_s, found.theirs_s) for found in pairs), strict=True)
    )
    reading_s = sum(found.reading_s for found in pairs) / seeds
    return {
        "ad2kit_s": ours_s / count,
        "teacher_s": reading_s / count,
        "peer_s": theirs_s / count,
        "ratio": theirs_s / (ours_s + reading_s),
        "ad2kit_score": float(np.mean([bench.score(found.ours) for found in pairs])),
        "peer_score": float(np.mean([bench.score(found.theirs) for found in pairs])),
        "difference_low": low,
        "difference_high": high,
        "learned": min(len(np.unique(answers)) for answers in models) > 1,
        "smallest_detectable": smallest_detectable_difference(means, len(labels)),
    }


def main() -> None:
    """Print both tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=20, help="timed updates of each system")
    parser.add_argument("--rows", type=int, default=512, help="of an epoch")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--seeds", type=int, default=1, help="trainings in each way")
    parser.add_argument("--unseen", type=int, default=0, help="judge on so many rows of train")
    parser.add_argument("--padding", choices=PADDINGS, nargs="+", default=PADDINGS)
    options, bench = set_up(parser)
    if options.unseen:
        bench = bench.judged_on(max(options.rows, options.teacher_rows), options.unseen)
    ratios = step_times(bench, options.steps) if options.steps else {}
    print(
        f"\n{'peer pads to':<13}{'ad2kit s/epoch':>15}{'+ teacher':>10}{'peer s/epoch':>14}"
        f"{'ratio':>7}{'scores':>15}{'difference, 95 %':>20}{'detectable':>12}"
    )
    found = {}
    for padding in options.padding:
        found[padding] = one = epochs(bench, options.rows, options.epochs, padding, options.seeds)
        interval = f"{one['difference_low']:+.4f} to {one['difference_high']:+.4f}"
        print(
            f"{padding:<13}{one['ad2kit_s']:>15.2f}{one['teacher_s']:>10.2f}"
            f"{one['peer_s']:>14.2f}{one['ratio']:>7.2f}{one['ad2kit_score']:>8.4f}"
            f"{one['peer_score']:>7.4f}{interval:>20}{one['smallest_detectable']:>12.4f}",
            flush=True,
        )
        if not one["learned"]:
            print("one of them gives all texts the same answer: raise --rows or --epochs")
    if "max_length" in found:
        print(f"required of max_length: a ratio of at least {PEER_AT_LEAST}")
    print(
        json.dumps(
            {
                **vars(options),
                "rows": len(bench.rows(options.rows)),
                **{
                    f"{name}_over_finetune": value
                    for name, value in ratios.items()
                    if name != "finetune"
                },
                "peer_over_ad2kit": {padding: one["ratio"] for padding, one in found.items()},
                "peer_pads_to": found,
                "environment": machine.environment(torch.get_num_threads()),
            }
        )
    )


if __name__ == "__main__":
    main()
