"""Checks that only a CUDA card can answer: half precision, memory, compilation; then students.

    python -m bench.card sst2-minilm data.source=FOLDER data.max_train_rows=60000 --seeds 5
    python -m bench.card smoke compute.device=cpu --seeds 1 --unseen 500

First come the checks, on random texts and an untrained student of the recipe. Then one teacher is
fine-tuned, and students of several seeds are trained from it and judged as in `levers.py`, each a
run of its own: the same command goes on where it was stopped. Prints a table and one line of JSON;
exit code 1 if a check failed. On the CPU the checks that need a card are left out, and the rates
say nothing. Latency on a card is printed by `ad2kit bench` for a run with `export.provider=cuda`
and `export.variants=[fp32, fused, fp16]`.
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
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

import numpy as np
import torch

from ad2kit.cli.show import show_messages
from ad2kit.data.mapped import TokenRows
from ad2kit.data.splits import Encoded
from ad2kit.models import text_model
from ad2kit.models.text_model import padded
from ad2kit.run.errors import DivergedError
from ad2kit.run.machine import accelerator as make_accelerator
from ad2kit.run.machine import environment
from ad2kit.run.sections import ComputeRecipe
from ad2kit.training import ad2
from ad2kit.training.ad2 import Batch, distillation
from ad2kit.training.checkpoint import Evaluation
from ad2kit.training.loop import new_state, prepare, train
from ad2kit.training.students import build_student
from bench.levers import Bench, set_up

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from accelerate import Accelerator

    from ad2kit.data.splits import Data
    from ad2kit.models.text_model import TextModel
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


def students(bench: Bench, seeds: int) -> list[dict[str, Any]]:
    """Train the students of all seeds, or find them; print a row of each, with its cost."""
    rows = []
    print("| seed | seconds | examples/s | peak VRAM MB | peak RSS MB | validation | retained |")
    print("|---|---|---|---|---|---|---|")
    for seed in range(bench.recipe.seed, bench.recipe.seed + seeds):
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        row = bench.student(seed)
        memory_mb = row["peak_memory_mb"]
        print(
            f"| {seed} | {row['seconds']:.1f} | {row['examples_per_s']:.0f} | "
            f"{memory_mb.get('vram', 0):.0f} | {memory_mb['rss']:.0f} | "
            f"{row['validation']:.4f} | {row['validation'] / row['teacher']['validation']:.2%} |"
        )
        rows.append(row)
    return rows


def main() -> None:
    """Check, train, judge; exit code 1 if a check failed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--check-only", action="store_true", help="train nothing")
    bench, seeds, options = set_up(parser)
    show_messages()
    recipe = bench.recipe
    result: dict[str, Any] = {"recipe": recipe.model_dump(mode="json")}
    findings = Checks(recipe, bench.data).run()
    result["checks"] = {name: asdict(finding) for name, finding in findings.items()}
    if not options.check_only:
        result["students"] = students(bench, len(seeds))
    device = make_accelerator(recipe.compute).device
    card = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    result["environment"] = environment(torch.get_num_threads(), card)
    print(json.dumps(result, ensure_ascii=False))
    sys.exit(any(finding.passed is False for finding in findings.values()))


if __name__ == "__main__":
    main()
