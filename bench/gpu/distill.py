"""SST-2 in full on a CUDA card: time, memory, use of the card and accuracy; and its own checks.

    python bench/gpu/distill.py --data FOLDER [--model FOLDER] [KEY.PATH=VALUE ...]

The teacher is fine-tuned once, then students of several seeds are trained from it by the recipe
`sst2-minilm`, each a run of its own: the same command goes on where it was stopped. Before that
come the checks that only a card can answer. Prints a table and one line of JSON; exit code 1 if a
check failed. `--seeds 0` checks alone; `--device cpu` tries the script out.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import sys
import time
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

import numpy as np
import torch

from ad2kit.cli.show import show_messages, training_progress
from ad2kit.data import metrics, splits
from ad2kit.data.labels import answers
from ad2kit.data.mapped import TokenRows
from ad2kit.data.splits import Encoded
from ad2kit.models import text_model
from ad2kit.models.text_model import padded, predict_logits
from ad2kit.run.errors import DivergedError
from ad2kit.run.folder import open_run
from ad2kit.run.machine import accelerator as make_accelerator
from ad2kit.run.machine import environment
from ad2kit.run.recipe import load_recipe
from ad2kit.run.sections import ComputeRecipe
from ad2kit.training import ad2
from ad2kit.training.ad2 import Batch, distillation
from ad2kit.training.checkpoint import Evaluation
from ad2kit.training.distill import distill
from ad2kit.training.loop import new_state, prepare, train
from ad2kit.training.students import build_student, layer_stack

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from accelerate import Accelerator

    from ad2kit.data.splits import Data
    from ad2kit.models.text_model import TextModel
    from ad2kit.run.folder import RunDir
    from ad2kit.run.recipe import Recipe
    from ad2kit.run.sections import DistillRecipe, TrainRecipe
    from ad2kit.training.ad2 import Objective, StepLosses
    from ad2kit.training.checkpoint import TrainState

# Gradients of the same rows, summed in another order (and the sign of a few that are almost zero).
SAME_GRADIENT, SAME_LOSS = 1e-2, 1e-2


@dataclass(frozen=True)
class Finding:
    """What a check found; ``passed`` is None where the device cannot be asked."""

    passed: bool | None
    value: str


@dataclass(frozen=True)
class Student:
    """One student of the table. ``vram_mb`` and ``rss_mb`` are peaks; of RSS, since the start."""

    seed: int
    seconds: float
    examples_per_s: float
    vram_mb: float
    rss_mb: float
    score: float
    retained: float


class Checks:
    """The checks, on random texts and an untrained student of the recipe."""

    def __init__(self, recipe: Recipe, data: Data) -> None:
        self.recipe, self.data = recipe, data
        self.cuda = torch.cuda.is_available() and recipe.compute.device != "cpu"
        # So that halves of what the large batch takes are many times the allocator's blocks.
        self.rows, self.tokens, self.many_rows = (128, 128, 512) if self.cuda else (8, 16, 9)

    def run(self) -> dict[str, Finding]:
        """Run every check; one that raises has failed."""
        checks: dict[str, Callable[[], Finding]] = {
            "δ survives bf16": lambda: self.survives("bf16"),
            "δ survives fp16": lambda: self.survives("fp16"),
            "fp16, K=2: inner gradients": self.inner_gradients,
            "fp16: an overflow skips the update": self.overflow,
            "a batch that does not fit is split": self.split,
            "compiled layers: same loss": self.compiled,
            "compiled layers: dropout replayed": self.compiled_dropout,
            "the optimiser is fused": self.fused,
        }
        found = {}
        for name, check in checks.items():
            try:
                found[name] = check()
            except Exception as error:
                found[name] = Finding(False, f"{type(error).__name__}: {error}"[:300])
            passed = {None: "left out", True: "ok", False: "FAILED"}[found[name].passed]
            print(f"{name:<36} {passed:<9} {found[name].value}", flush=True)
        torch.compiler.reset()  # what it keeps would count as the memory of a training
        return found

    def survives(self, precision: str) -> Finding:
        """A radius that matters must raise the KL, as in fp32, and no radius must not."""
        if precision == "fp16" and not self.cuda:
            return Finding(None, "fp16 needs CUDA")
        reference = self.gain("fp32", 1e-3)
        gain, published, control = (self.gain(precision, radius) for radius in (1e-3, 1e-5, 0.0))
        text = (
            f"gain {gain:.2e} at radius 1e-3 (fp32 {reference:.2e}), {published:.1e} at 1e-5, "
            f"{control:.1e} at 0"
        )
        return Finding(gain > 0 and abs(control) <= 0.1 * gain, text)

    def inner_gradients(self) -> Finding:
        """Both steps of the ascent have a gradient: numbers, and not rounded to zero."""
        if not self.cuda:
            return Finding(None, "fp16 needs CUDA")
        seen: list[torch.Tensor] = []
        original = ad2.ascend

        def ascend(delta: torch.Tensor, gradient: torch.Tensor, *rest: Any) -> torch.Tensor:
            seen.append(gradient.detach().clone())
            return original(delta, gradient, *rest)

        with patch.object(ad2, "ascend", ascend):
            self.gain("fp16", 1e-3, steps=2)
        finite = all(bool(gradient.isfinite().all()) for gradient in seen)
        shares = [float((gradient != 0).float().mean()) for gradient in seen]
        return Finding(
            finite and len(seen) == 2 and min(shares) > 0.5,
            f"finite: {finite}; share that is not zero: {', '.join(f'{s:.3f}' for s in shares)}",
        )

    def overflow(self) -> Finding:
        """The scaler grows until a gradient overflows, by design: that must cost one update."""
        if not self.cuda:
            return Finding(None, "fp16 needs CUDA")
        notes, passed = list[str](), True
        for norm in ("linf", "l2"):
            accelerator, model = self.accelerator("fp16"), self.student(dropout=True)
            assert accelerator.scaler is not None
            accelerator.scaler.scale(torch.ones(1, device=accelerator.device))
            accelerator.scaler.update(2.0**60)
            before = {key: value.clone() for key, value in model.module.state_dict().items()}
            objective = distillation(accelerator, self.settings(norm=norm))
            try:
                self.one_update(model, self.rows, objective, accelerator)
            except DivergedError as error:
                notes, passed = [*notes, f"{norm}: {error.message}"], False
                continue
            after = model.module.state_dict()
            same = all(torch.equal(value.cpu(), before[key]) for key, value in after.items())
            scale = accelerator.scaler.get_scale()
            notes.append(f"{norm}: weights kept: {same}, scale 2^60 -> 2^{math.log2(scale):.0f}")
            passed = passed and same and scale < 2.0**60
        return Finding(passed, "; ".join(notes))

    def split(self) -> Finding:
        """An update under half the memory that it needs leaves the gradients of a whole one."""
        accelerator = self.accelerator("fp32")
        objective = distillation(accelerator, self.settings())
        limit = None if self.cuda else self.many_rows // 2
        whole, parts = list[int](), list[int]()
        before = torch.cuda.memory_allocated() if self.cuda else 0
        if self.cuda:
            torch.cuda.reset_peak_memory_stats()
        expected = self.one_update(
            self.student(), self.many_rows, counted(objective, whole), accelerator
        )
        needed = torch.cuda.max_memory_allocated() - before if self.cuda else 0
        with no_more_memory(0.7 * needed) if self.cuda else nullcontext():
            found = self.one_update(
                self.student(), self.many_rows, counted(objective, parts, limit), accelerator
            )
        difference = float((found - expected).norm() / expected.norm())
        how = f"{needed / 1e6:.0f} MB needed, 0.7 of it given" if self.cuda else "injected"
        return Finding(
            whole == [self.many_rows] and len(parts) > 2 and difference < SAME_GRADIENT,
            f"rows tried {whole}, then {parts} ({how}); gradients differ by {difference:.1e}",
        )

    def compiled(self) -> Finding:
        """Compiled layers compute what eager ones do."""
        found = {}
        for compile_layers in (False, True):
            model = self.student()
            accelerator = self.accelerator(self.recipe.compute.precision)
            prepare(model, ComputeRecipe(compile=compile_layers))
            start = time.perf_counter()
            losses = self.step(model, accelerator, self.settings())
            found[compile_layers] = losses.loss, gradients(model), time.perf_counter() - start
        (eager, reference, _), (loss, gradient, seconds) = found[False], found[True]
        difference = float((gradient - reference).norm() / reference.norm())
        # Two networks in half precision agree in their losses, in their gradients less.
        tolerance = SAME_GRADIENT if self.recipe.compute.precision == "fp32" else 0.2
        return Finding(
            abs(loss - eager) <= SAME_LOSS * abs(eager) and difference < tolerance,
            f"loss {loss:.6f}, eager {eager:.6f}; gradients differ by {difference:.1e}; first "
            f"step {seconds:.0f} s",
        )

    def compiled_dropout(self) -> Finding:
        """At radius 0 the adversarial pass is the clean one again, masks and all."""
        model = self.student(dropout=True)
        accelerator = self.accelerator(self.recipe.compute.precision)
        prepare(model, ComputeRecipe(compile=True))
        losses = self.step(model, accelerator, self.settings(radius=0.0))
        kd = losses.terms["kd"]
        gain = losses.terms["adversarial"] - kd
        return Finding(abs(gain) <= 1e-3 * kd, f"gain at radius 0 is {gain:.1e} of {kd:.3f}")

    def fused(self) -> Finding:
        """One kernel updates all parameters, and its state lies beside them."""
        model, accelerator = self.student(), self.accelerator("fp32")
        objective = distillation(accelerator, self.settings())
        optimizer = self.state_after(model, 1, objective, accelerator).optimizer
        flags = [bool(group["fused"]) for group in optimizer.param_groups]
        devices = {
            str(value.device.type)
            for moments in optimizer.state_dict()["state"].values()
            for value in moments.values()
        }
        right = devices == {accelerator.device.type}
        return Finding(all(flags) and right, f"fused: {flags}, moments on {sorted(devices)}")

    def accelerator(self, precision: str) -> Accelerator:
        """Return one of a precision; those made before it are of no use any more."""
        compute = self.recipe.compute
        return make_accelerator(
            ComputeRecipe.model_validate(
                {"device": compute.device, "threads": compute.threads, "precision": precision}
            )
        )

    def student(self, *, dropout: bool = False) -> TextModel:
        """Return a student before its first update, its answers as decided as a trained one's."""
        recipe = self.recipe
        teacher = text_model.load_reference(
            recipe.teacher.model, self.data, seed=recipe.seed, finished=False, key="teacher.model"
        )
        if not dropout:
            for key in ("hidden_dropout_prob", "attention_probs_dropout_prob"):
                setattr(teacher.module.config, key, 0.0)
        student = build_student(teacher, recipe.student.layers or ())
        head = student.module.get_submodule("classifier")
        assert isinstance(head, torch.nn.Linear)
        with torch.no_grad():
            head.weight.mul_(20)
        return student

    def settings(
        self, radius: float = 1e-3, steps: int = 1, rows: int = 1, norm: str = "linf"
    ) -> DistillRecipe:
        """Return those of the recipe for a single update, without clipping."""
        settings = self.recipe.distill
        attack = {
            "norm": norm,
            "start": "zero",
            "radius": radius,
            "steps": steps,
            "dropout": "replayed",
        }
        changes = {
            "epochs": 1,
            "batch_size": rows,
            "accumulation_steps": 1,
            "max_grad_norm": 1e9,
            "adversary": settings.adversary.model_copy(update=attack),
        }
        return settings.model_copy(update=changes)

    def texts(self, model: TextModel, rows: int) -> tuple[Encoded, torch.Tensor]:
        """Return random texts, half of them half as long, and what a decided teacher says."""
        generator = np.random.default_rng(0)
        ids = generator.integers(5, len(model.tokenizer), (rows, self.tokens)).tolist()
        ids = [row[: self.tokens // (1 + index % 2)] for index, row in enumerate(ids)]
        types = "token_type_ids" in model.tokenizer.model_input_names
        encoded = Encoded(
            TokenRows.of(ids),
            TokenRows.of([0] * len(row) for row in ids) if types else None,
            generator.integers(0, 2, rows),
            np.zeros(rows, dtype=bool),
        )
        logits = torch.from_numpy(2 * generator.standard_normal((rows, len(model.labels))))
        return encoded, logits.float()

    def step(
        self, model: TextModel, accelerator: Accelerator, settings: DistillRecipe
    ) -> StepLosses:
        """Run the objective once; the gradients stay on the parameters."""
        device = accelerator.device
        model.module.to(device).train()
        encoded, logits = self.texts(model, self.rows)
        inputs = padded(model, encoded, np.arange(self.rows), device)
        labels = torch.from_numpy(encoded.labels).to(device)
        torch.manual_seed(0)
        batch = Batch(inputs, labels, logits.to(device))
        return distillation(accelerator, settings)(model, batch, 1.0)

    def gain(self, precision: str, radius: float, steps: int = 1) -> float:
        """Return the adversarial gain of one step, with dropout on."""
        accelerator = self.accelerator(precision)
        losses = self.step(self.student(dropout=True), accelerator, self.settings(radius, steps))
        return losses.terms["adversarial"] - losses.terms["kd"]

    def state_after(
        self, model: TextModel, rows: int, objective: Objective, accelerator: Accelerator
    ) -> TrainState:
        """Make the first update of a training; return its state."""
        settings: TrainRecipe = self.settings(rows=rows)
        encoded, logits = self.texts(model, rows)
        torch.manual_seed(0)
        state = new_state(model, settings, accelerator)
        updates = train(
            state,
            encoded,
            logits,
            objective,
            settings,
            lambda _model: Evaluation(0.0, torch.zeros(1, 1)),
            accelerator,
            phase="student",
            seed=0,
        )
        next(updates)
        return state

    def one_update(
        self, model: TextModel, rows: int, objective: Objective, accelerator: Accelerator
    ) -> torch.Tensor:
        """Make the first update of a training; return its gradients."""
        self.state_after(model, rows, objective, accelerator)
        return gradients(model)


def gradients(model: TextModel) -> torch.Tensor:
    """Return all gradients in one vector, on the CPU."""
    found = [p.grad for p in model.module.parameters() if p.grad is not None]
    return torch.cat([gradient.flatten().cpu() for gradient in found])


def counted(objective: Objective, calls: list[int], limit: int | None = None) -> Objective:
    """Note the rows of each call; above ``limit`` say that they do not fit."""

    def step(model: TextModel, batch: Batch, share: float) -> StepLosses:
        calls.append(len(batch.labels))
        if limit is not None and len(batch.labels) > limit:
            raise torch.OutOfMemoryError("injected")
        return objective(model, batch, share)

    return step


@contextmanager
def no_more_memory(extra_bytes: float) -> Iterator[None]:
    """Let this process have ``extra_bytes`` of the card beside what it holds now."""
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + extra_bytes) / total)
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


def matrix_rate(device: torch.device) -> float:
    """Return the FLOP/s of a large product of matrices in bf16, the best of five bursts."""
    cuda = device.type == "cuda"
    size, products = (8192, 20) if cuda else (512, 5)
    left, right = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))

    def burst() -> float:
        if cuda:
            torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(products):
            left @ right
        if cuda:
            torch.cuda.synchronize()
        return time.perf_counter() - start

    burst()
    return 2 * size**3 * products / min(burst() for _ in range(5))


def training_work(
    model: TextModel, lengths: Sequence[int], settings: DistillRecipe, seed: int
) -> tuple[float, float]:
    """Return the FLOPs of a student's training, and the share of its positions that is padding.

    A forward pass is one unit, a backward pass two: the clean and the adversarial pass take three
    each, a further inner step two (its backward pass stops at the activations). A unit is two
    FLOPs per parameter of the layers' matrices and position, and four per position, position that
    it attends to, and width; embeddings and head are left out.
    """
    module = model.module
    depth, width = module.config.num_hidden_layers, module.config.hidden_size
    stack = layer_stack(module, depth)
    assert stack is not None
    layers = module.get_submodule(stack.rstrip("."))
    matrices = sum(p.numel() for p in layers.parameters() if p.ndim > 1)
    units = 3.0
    if settings.alpha:
        units += 3 + 2 * (settings.adversary.steps - (settings.adversary.start == "zero"))
    work, positions = 0.0, 0
    for epoch in range(settings.epochs):
        for rows in splits.epoch_batches(lengths, settings.batch_size, seed, epoch):
            longest = max(lengths[row] for row in rows)
            positions += len(rows) * longest
            work += len(rows) * longest * (2 * matrices + 4 * longest * width * depth)
    return units * work, 1 - settings.epochs * sum(lengths) / positions


def judged(folder: Path, recipe: Recipe, data: Data) -> float:
    """Return the score of a saved model on the validation set."""
    model = text_model.load_model(folder, data.labels, data.task)
    device = make_accelerator(recipe.compute.model_copy(update={"precision": "fp32"})).device
    model.module.to(device)
    encoded = splits.encode(data.validation, model.tokenizer, recipe.data.max_length_tokens)
    found = answers(data.task, predict_logits(model, encoded, device).numpy())
    return metrics.mean_metric(recipe.data.judged_by, found, data.validation.labels)


def trained(recipe: Recipe, seed: int, runs_dir: Path) -> tuple[RunDir, dict[str, float]]:
    """Train a student, or find it; return its run and its cost."""
    settings = recipe.distill.model_copy(update={"seed": seed})
    run = open_run(recipe.model_copy(update={"distill": settings}), runs_dir)
    print(f"seed {seed}: {run.path}", file=sys.stderr, flush=True)
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    with training_progress() as on_step:
        report = distill(run, on_step=on_step)
    return run, {
        "seconds": report.train_seconds,
        "examples_per_s": report.examples_per_s,
        "vram_mb": report.peak_memory_mb.get("vram", 0.0),
        "rss_mb": report.peak_memory_mb["rss"],
    }


def students(recipe: Recipe, data: Data, seeds: int, runs_dir: Path) -> dict[str, Any]:
    """Train them all, print the table, and return what it says and how the card was used."""
    found, teacher, use = list[Student](), 0.0, dict[str, float]()
    rate = matrix_rate(make_accelerator(recipe.compute).device)
    for seed in range(recipe.seed, recipe.seed + seeds):
        run, cost = trained(recipe, seed, runs_dir)
        teacher = teacher or judged(run.teacher, recipe, data)
        score = judged(run.student, recipe, data)
        found.append(Student(seed=seed, score=score, retained=score / teacher, **cost))
        if not use:
            model = text_model.load_model(run.student, data.labels, data.task)
            length = recipe.data.max_length_tokens
            encoded = splits.encode(data.distillation(), model.tokenizer, length)
            work, padding = training_work(
                model, [len(ids) for ids in encoded.input_ids], recipe.distill, seed
            )
            use = {"work_flop": work, "padding": padding}
    seconds = median(each.seconds for each in found)
    middle = {
        "seconds": seconds,
        "examples_per_s": median(each.examples_per_s for each in found),
        "score": median(each.score for each in found),
        "retained": median(each.retained for each in found),
    }
    use |= {
        "bf16_matrix_tflop_s": rate / 1e12,
        "training_tflop_s": use["work_flop"] / seconds / 1e12,
    }
    use["share"] = use["training_tflop_s"] / use["bf16_matrix_tflop_s"]
    print_table(recipe, data, found, teacher, middle)
    print(
        f"\na training is {use['work_flop']:.2e} FLOP of the model, {use['padding']:.1%} of its "
        "positions padding: "
        f"{use['training_tflop_s']:.3f} TFLOP/s, {use['share']:.2%} of the "
        f"{use['bf16_matrix_tflop_s']:.2f} TFLOP/s of a large bf16 product"
    )
    return {
        "teacher": teacher,
        "median": middle,
        "students": [asdict(each) for each in found],
        "use_of_the_device": use,
    }


def print_table(
    recipe: Recipe, data: Data, found: list[Student], teacher: float, middle: dict[str, float]
) -> None:
    """Print the students, their median and their teacher."""
    metric = " and ".join(recipe.data.judged_by)
    print(
        f"\n{len(data.train)} training rows, {recipe.distill.epochs} epochs, batches of "
        f"{recipe.distill.batch_size}, {recipe.compute.precision}; teacher: {metric} "
        f"{teacher:.4f} on {len(data.validation)} validation rows\n"
    )
    print(f"| seed | seconds | examples/s | peak VRAM MB | peak RSS MB | {metric} | retained |")
    print("|---|---|---|---|---|---|---|")
    for each in found:
        print(
            f"| {each.seed} | {each.seconds:.1f} | {each.examples_per_s:.0f} | "
            f"{each.vram_mb:.0f} | {each.rss_mb:.0f} | {each.score:.4f} | {each.retained:.2%} |"
        )
    print(
        f"| median | {middle['seconds']:.1f} | {middle['examples_per_s']:.0f} | | | "
        f"{middle['score']:.4f} | {middle['retained']:.2%} |"
    )


def recipe_of(options: argparse.Namespace) -> Recipe:
    """Return the recipe `sst2-minilm` with what the options change."""
    recipe = load_recipe("sst2-minilm")
    assert recipe.teacher.finetune is not None
    changes = {
        "data.source": options.data,
        "teacher.model": options.model,
        "data.max_train_rows": options.rows,
        "distill.epochs": options.epochs,
        "teacher.finetune.epochs": (
            options.epochs and min(options.epochs, recipe.teacher.finetune.epochs)
        ),
        "compute.device": options.device,
        "compute.precision": options.precision,
    }
    wanted = [f"{key}={value}" for key, value in changes.items() if value is not None]
    return load_recipe("sst2-minilm", [*wanted, *options.overrides])


def machine(recipe: Recipe) -> dict[str, str]:
    """Return hardware and versions."""
    device = make_accelerator(recipe.compute).device
    found = environment(torch.get_num_threads(), device.type)
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found |= {
            "card": properties.name,
            "card_memory_mb": f"{properties.total_memory / 1e6:.0f}",
            "cuda": str(torch.version.cuda),
            "cudnn": str(torch.backends.cudnn.version()),
        }
    return found


def main() -> None:
    """Check, train, judge; exit code 1 if a check failed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", required=True, help="folder of SST-2's train and validation")
    parser.add_argument("--model", help="folder of the teacher; default: the recipe's package")
    parser.add_argument("--runs-dir", type=Path, default=Path("runs"))
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--precision", choices=("bf16", "fp16", "fp32"), default="bf16")
    parser.add_argument("--rows", type=int, help="default: all 67,349")
    parser.add_argument("--epochs", type=int, help="default: the recipe's")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("overrides", nargs="*", metavar="KEY.PATH=VALUE")
    options = parser.parse_intermixed_args()
    show_messages()
    recipe = recipe_of(options)
    data = splits.load_data(recipe.data, recipe.seed)
    result: dict[str, Any] = {"rows": len(data.train) + len(data.select)}
    settings = {"data", "teacher", "student", "distill", "compute"}
    result["recipe"] = recipe.model_dump(mode="json", include=settings)
    found = Checks(recipe, data).run()
    result["checks"] = {name: asdict(finding) for name, finding in found.items()}
    if options.seeds:
        result |= students(recipe, data, options.seeds, options.runs_dir)
    result["environment"] = machine(recipe)
    for key, value in result["environment"].items():
        print(f"{key}: {value}", file=sys.stderr)
    print(json.dumps(result, ensure_ascii=False))
    sys.exit(any(finding.passed is False for finding in found.values()))


if __name__ == "__main__":
    main()
