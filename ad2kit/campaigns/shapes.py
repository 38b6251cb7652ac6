"""The shapes that a student can have: how many of the teacher's layers, and how wide they are."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ad2kit.exporting.fuse import fuse, to_fp16
from ad2kit.exporting.int8 import Way, quantize
from ad2kit.run.errors import ModelError, RecipeError
from ad2kit.run.records import Part
from ad2kit.run.sections import StudentRecipe
from ad2kit.training import students
from ad2kit.training.students import build_student, check_layers

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from ad2kit.models.text_model import TextModel
    from ad2kit.run.sections import Variant

# Of the teacher's layers, heads and neurons, unless the user names numbers.
_DEPTHS = (1 / 6, 1 / 4, 1 / 3, 1 / 2, 2 / 3)
_WIDTHS = (1, 1 / 2)


class Shape(Part):
    """Some layers of the teacher, and of each so many heads and feed-forward neurons."""

    layers: tuple[int, ...]
    attention_heads: int
    feed_forward: int

    def __str__(self) -> str:
        layers = f"{len(self.layers)} layer" + "s" * (len(self.layers) > 1)
        return f"{layers}, {self.attention_heads} heads, feed-forward {self.feed_forward}"


class Grid(Part):
    """Which numbers of layers, heads and feed-forward neurons to combine; empty: the usual."""

    layers: tuple[int, ...] = ()
    attention_heads: tuple[int, ...] = ()
    feed_forward: tuple[int, ...] = ()


def whole(teacher: TextModel) -> Shape:
    """Return the shape of the teacher itself."""
    heads, neurons = students.widths(teacher)
    depth = teacher.module.config.num_hidden_layers
    return Shape(layers=tuple(range(depth)), attention_heads=heads, feed_forward=neurons)


def shapes(teacher: TextModel, recipe: StudentRecipe, grid: Grid) -> list[Shape]:
    """Return the shapes of a grid that the teacher's layers can take.

    Of so many layers they have the recipe's if it names that many, else the lowest: upper layers
    have turned to the teacher's own task of pre-training.

    Raises:
        RecipeError: the recipe's student is no part of the teacher.
        ModelError: the teacher has fewer layers, heads or neurons, or they cannot be cut.
    """
    if recipe.model is not None:
        raise RecipeError(
            "fit makes students from the layers of the teacher, but student.model is "
            f"'{recipe.model}'",
            hint="leave student.model out, and give student.layers",
        )
    full = whole(teacher)
    depth, usual = len(full.layers), recipe.layers or ()
    for option, asked, most in (
        ("--layers", grid.layers, depth),
        ("--heads", grid.attention_heads, full.attention_heads),
        ("--feed-forward", grid.feed_forward, full.feed_forward),
    ):
        if max(asked, default=0) > most:
            raise ModelError(
                f"{option}: expected at most the teacher's {most}, found {max(asked)}",
                hint=f"choose from 1 to {most}",
            )

    def parts(number: int, shares: Sequence[float]) -> list[int]:
        return sorted({max(1, round(number * share)) for share in shares})

    names = students.FAMILIES.get(teacher.module.config.model_type)
    cuttable = {"attention_heads": names and names.heads_out, "feed_forward": names}
    widths = {
        key: getattr(grid, key) or parts(getattr(full, key), _WIDTHS if can else (1,))
        for key, can in cuttable.items()
    }
    found = [
        Shape(
            layers=usual if len(usual) == count else tuple(range(count)),
            attention_heads=heads,
            feed_forward=neurons,
        )
        for count in grid.layers or parts(depth, _DEPTHS)
        for heads in widths["attention_heads"]
        for neurons in widths["feed_forward"]
    ]
    for shape in found:
        check_layers(teacher, shape.layers)
        students.check_widths(teacher, section(shape, full))
    found = [shape for shape in dict.fromkeys(found) if shape != full]
    if not found:
        raise RecipeError(
            f"the only shape to try is the teacher's own ({full})",
            hint="give fewer --layers, --heads or --feed-forward",
        )
    return found


def section(shape: Shape, full: Shape) -> StudentRecipe:
    """Return the student section of a recipe for a shape: what is not cut stays null."""

    def cut(key: str) -> int | None:
        width: int = getattr(shape, key)
        return None if width == getattr(full, key) else width

    return StudentRecipe(
        layers=shape.layers,
        attention_heads=cut("attention_heads"),
        feed_forward=cut("feed_forward"),
    )


def untrained(teacher: TextModel, shape: Shape) -> TextModel:
    """Return a student of a shape that is as fast as a trained one: its first units are kept."""
    student, full = build_student(teacher, shape.layers), whole(teacher)
    layers = len(students.layers_of(student))
    if shape.attention_heads < full.attention_heads:
        students.keep_heads(student, [range(shape.attention_heads)] * layers)
    if shape.feed_forward < full.feed_forward:
        students.keep_neurons(student, [range(shape.feed_forward)] * layers)
    return student


def graphs(fp32: Path, variants: Sequence[Variant]) -> dict[str, Path]:
    """Write the variants of a graph beside it; int8 in one fixed way, not the best for its weights.

    Args:
        fp32: the graph as it was exported.
        variants: of the recipe.
    """
    found: dict[str, Path] = {"fp32": fp32}
    make: dict[str, Any] = {
        "fused": lambda target: fuse(fp32, target),
        "fp16": lambda target: to_fp16(found["fused"], target),
        "int8": lambda target: quantize(
            found.get("fused", fp32), target, Way(fused="fused" in found)
        ),
    }
    for variant, write in make.items():  # in the order in which they are made from one another
        if variant in variants:
            target = fp32.with_name(f"{variant}.onnx")
            write(target)
            found[variant] = target
    return found
