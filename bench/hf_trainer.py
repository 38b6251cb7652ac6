"""AD2 around the Hugging Face Trainer, as one writes it without ad2kit: the peer in `train.py`.

It does what most such scripts do: batches in random order, padded to one length (or, kinder, to
their longest text), the teacher in every step, and the perturbation's gradient in a forward and a
backward pass of its own, with dropout of its own. It is not made slow on purpose: texts are
tokenised once, the words are looked up once a step, the teacher records no gradient, the gradient
of δ computes none for the weights, AdamW is the fused one. Nothing of ad2kit is imported.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch.nn import functional
from torch.optim.lr_scheduler import LambdaLR
from transformers import (
    DataCollatorWithPadding,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from transformers import PreTrainedModel, PreTrainedTokenizerFast


@dataclass(frozen=True)
class Settings:
    """The loss (an ℓ∞ ball, one ascent step from zero) and its optimisation.

    ``padding`` is "max_length", or "longest" for the longest text of each batch.
    """

    alpha: float
    temperature: float
    radius: float
    step_size: float
    epochs: int
    batch_size: int
    accumulation_steps: int
    lr: float
    warmup_ratio: float
    weight_decay: float
    max_grad_norm: float
    seed: int
    max_length: int
    padding: str


class AD2Trainer(Trainer):
    """Minimises the KL on clean and on perturbed word embeddings."""

    def __init__(self, teacher: PreTrainedModel, settings: Settings, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.teacher, self.settings = teacher.eval(), settings

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, torch.Tensor],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Return the loss of AD2; the last two arguments belong to the Trainer's interface."""
        del return_outputs, num_items_in_batch
        chosen = self.settings
        with torch.no_grad():
            teacher = (self.teacher(**inputs).logits / chosen.temperature).log_softmax(-1)
        words = model.get_input_embeddings()(inputs["input_ids"])
        others = {name: value for name, value in inputs.items() if name != "input_ids"}

        def distance(embedded: torch.Tensor) -> torch.Tensor:
            logits = model(inputs_embeds=embedded, **others).logits / chosen.temperature
            kl = functional.kl_div(
                logits.log_softmax(-1), teacher, reduction="batchmean", log_target=True
            )
            return chosen.temperature**2 * kl

        delta = torch.zeros_like(words, requires_grad=True)
        (gradient,) = torch.autograd.grad(distance(words.detach() + delta), delta)
        delta = (chosen.step_size * gradient.sign()).clamp(-chosen.radius, chosen.radius)
        return distance(words) + chosen.alpha * distance(words + delta)

    def create_scheduler(
        self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None
    ) -> LambdaLR:
        """Return a linear schedule like ad2kit's: the Trainer's own starts with a rate of 0."""
        warmup = int(self.args.get_warmup_steps(num_training_steps))

        def factor(step: int) -> float:
            if step < warmup:
                return (step + 1) / warmup
            return (num_training_steps - step) / max(1, num_training_steps - warmup)

        optimizer = optimizer or self.optimizer
        assert optimizer is not None
        self.lr_scheduler = LambdaLR(optimizer, factor)
        return self.lr_scheduler


class Turns(TrainerCallback):
    """Does an epoch of something else before each epoch of the Trainer, and times both."""

    def __init__(self, other: Callable[[int], float]) -> None:
        """Take what does epoch ``n`` of the other, and returns its seconds."""
        self.other, self.start = other, 0.0
        self.others: list[float] = []
        self.own: list[float] = []

    def on_epoch_begin(self, *_arguments: object, **_more: object) -> None:
        """Run the other, and start the clock."""
        self.others.append(self.other(len(self.others)))
        self.start = time.perf_counter()

    def on_epoch_end(self, *_arguments: object, **_more: object) -> None:
        """Stop the clock."""
        self.own.append(time.perf_counter() - self.start)


def train(
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    texts: tuple[tuple[str, ...], ...],
    settings: Settings,
    turns: Turns,
    folder: str,
) -> None:
    """Train the student in place; nothing is saved in ``folder``, but the Trainer wants one."""
    columns = [list(column) for column in zip(*texts, strict=True)]
    tokens = tokenizer(*columns, truncation=True, max_length=settings.max_length)
    arguments = TrainingArguments(
        folder,
        num_train_epochs=settings.epochs,
        seed=settings.seed,
        use_cpu=True,
        per_device_train_batch_size=settings.batch_size // settings.accumulation_steps,
        gradient_accumulation_steps=settings.accumulation_steps,
        optim="adamw_torch_fused",
        learning_rate=settings.lr,
        warmup_ratio=settings.warmup_ratio,
        weight_decay=settings.weight_decay,
        max_grad_norm=settings.max_grad_norm,
        save_strategy="no",
        logging_strategy="no",
        report_to=[],
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_pin_memory=False,
    )
    trainer = AD2Trainer(
        teacher,
        settings,
        model=student,
        args=arguments,
        train_dataset=[{name: tokens[name][row] for name in tokens} for row in range(len(texts))],
        data_collator=DataCollatorWithPadding(
            tokenizer, padding=settings.padding, max_length=settings.max_length
        ),
        callbacks=[turns],
    )
    trainer.remove_callback(PrinterCallback)  # type: ignore[no-untyped-call]
    trainer.train()
