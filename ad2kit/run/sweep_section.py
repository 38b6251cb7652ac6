"""The section ``sweep`` of a recipe: what a search over hyperparameters tries."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Annotated, Literal, Self

from pydantic import Field, model_validator

from ad2kit.run.sections import AboveZero, NotNegative, Positive, Section

if TYPE_CHECKING:
    from ad2kit.run.sections import DistillRecipe


class Configuration(Section):
    """The hyperparameters of one student that a sweep may vary."""

    batch_size: Positive
    lr: AboveZero
    radius: NotNegative
    alpha: NotNegative

    def __str__(self) -> str:
        return (
            f"batch {self.batch_size}, lr {self.lr:.3g}, "
            f"radius {self.radius:.3g}, alpha {self.alpha:.3g}"
        )


class SweepRecipe(Section):
    """The search of `ad2kit sweep`; the defaults are the grid of the AD2 paper.

    ``grid`` trains every combination of the lists with each of ``seeds`` seeds. ``optuna`` draws
    ``trials`` configurations with a tree-structured Parzen estimator and trains each with one seed.
    It draws the batch size from its list, and the other values between the lowest and the highest
    of their lists (on a logarithmic scale, unless the lowest is 0). The best configuration is then
    trained with the other seeds. Empty ``radii`` and ``alphas`` stand for the recipe's own values.

    ``early_stopping`` is ASHA (Li et al., *A System for Massively Parallel Hyperparameter Tuning*,
    MLSys 2020): after 1, 3, 9, ... parts of the training (its epochs, or its evaluations if the
    recipe gives their number) a trial is stopped if it is not among the best third of the trials
    that have come so far.
    """

    search: Literal["grid", "optuna"] = "grid"
    batch_sizes: Annotated[tuple[Positive, ...], Field(min_length=1)] = (16, 32)
    lrs: Annotated[tuple[AboveZero, ...], Field(min_length=1)] = (
        1e-5,
        3e-5,
        5e-5,
        7e-5,
        9e-5,
        1e-4,
    )
    radii: tuple[NotNegative, ...] = ()
    alphas: tuple[NotNegative, ...] = ()
    seeds: Positive = 5
    trials: Positive = 20
    early_stopping: bool = False

    @model_validator(mode="after")
    def _spans_something(self) -> Self:
        for name in ("batch_sizes", "lrs", "radii", "alphas"):
            values = getattr(self, name)
            if len(set(values)) < len(values):
                msg = f"'{name}' has a value twice: {', '.join(map(str, values))}"
                raise ValueError(msg)
        if self.search == "optuna" and len(self.lrs) < 2:
            msg = "'optuna' draws from between the lowest and the highest of two or more 'lrs'"
            raise ValueError(msg)
        return self

    def values(self, distill: DistillRecipe) -> dict[str, tuple[float, ...]]:
        """Return the values of each field of :class:`Configuration`, for this recipe."""
        return {
            "batch_size": self.batch_sizes,
            "lr": self.lrs,
            "radius": self.radii or (distill.adversary.radius,),
            "alpha": self.alphas or (distill.alpha,),
        }

    def grid(self, distill: DistillRecipe) -> list[Configuration]:
        """Return a configuration for every combination of the values."""
        values = self.values(distill)
        return [
            Configuration.model_validate(dict(zip(values, point, strict=True)))
            for point in itertools.product(*values.values())
        ]
