"""The shapes of students: which of the teacher's layers they have, and how wide these are."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ad2kit.campaigns.records import Grid, Shape
from ad2kit.exporting.fuse import fuse, to_fp16
from ad2kit.exporting.int8 import Way, quantize
from ad2kit.exporting.steady import make_steady
from ad2kit.models.layers import LAYER_PARTS, layers_of
from ad2kit.run.errors import ModelError, RecipeError
from ad2kit.run.sections import StudentRecipe
from ad2kit.training import students
from ad2kit.training.students import build_student, check_layers

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from ad2kit.models.text_model import TextModel
    from ad2kit.run.sections import Variant

# Shares of the teacher's layers, and of its heads and neurons, unless the user names numbers.
_DEPTHS = (1 / 6, 1 / 4, 1 / 3, 1 / 2, 2 / 3)
_WIDTHS = (1, 1 / 2)


def whole(teacher: TextModel) -> Shape:
    """Return the shape of the teacher itself."""
    heads, neurons = students.widths(teacher)
    depth = teacher.module.config.num_hidden_layers
    return Shape(layers=tuple(range(depth)), attention_heads=heads, feed_forward=neurons)


def shapes(teacher: TextModel, recipe: StudentRecipe, grid: Grid) -> list[Shape]:
    """Return the shapes of a grid that can be cut from the teacher, without its own shape.

    A shape of n layers has the recipe's layers if the recipe names n, else the n lowest: the upper
    layers are specialised in the teacher's own task of pre-training.

    Raises:
        RecipeError: the recipe's student is not cut from the teacher, or no shape is left.
        ModelError: the teacher has fewer layers, heads or neurons, or they cannot be cut.
    """
    if recipe.model is not None:
        raise RecipeError(
            "fit makes students from the layers of the teacher, but student.model is "
            f"'{recipe.model}'",
            hint="leave student.model out, and give student.layers",
        )
    full = whole(teacher)
    depth = len(full.layers)
    recipe_layers = recipe.layers or ()
    for option, numbers, most in (
        ("--layers", grid.layers, depth),
        ("--heads", grid.attention_heads, full.attention_heads),
        ("--feed-forward", grid.feed_forward, full.feed_forward),
    ):
        if max(numbers, default=0) > most:
            raise ModelError(
                f"{option}: expected at most the teacher's {most}, found {max(numbers)}",
                hint=f"choose from 1 to {most}",
            )

    def parts(number: int, shares: Sequence[float]) -> list[int]:
        return sorted({max(1, round(number * share)) for share in shares})

    names = LAYER_PARTS.get(teacher.module.config.model_type)
    cuttable = {"attention_heads": names and names.heads_out, "feed_forward": names}
    widths = {
        key: getattr(grid, key) or parts(getattr(full, key), _WIDTHS if can_be_cut else (1,))
        for key, can_be_cut in cuttable.items()
    }
    candidates = [
        Shape(
            layers=recipe_layers if len(recipe_layers) == count else tuple(range(count)),
            attention_heads=heads,
            feed_forward=neurons,
        )
        for count in grid.layers or parts(depth, _DEPTHS)
        for heads in widths["attention_heads"]
        for neurons in widths["feed_forward"]
    ]
    for shape in candidates:
        check_layers(teacher, shape.layers)
        students.check_widths(teacher, section(shape, full))
    candidates = [shape for shape in dict.fromkeys(candidates) if shape != full]
    if not candidates:
        raise RecipeError(
            f"the only shape to try is the teacher's own ({full})",
            hint="give fewer --layers, --heads or --feed-forward",
        )
    return candidates


def section(shape: Shape, full: Shape) -> StudentRecipe:
    """Return the student section of a recipe for a shape; a width that is not cut is null."""

    def cut(key: str) -> int | None:
        width: int = getattr(shape, key)
        return None if width == getattr(full, key) else width

    return StudentRecipe(
        layers=shape.layers,
        attention_heads=cut("attention_heads"),
        feed_forward=cut("feed_forward"),
    )


def untrained(teacher: TextModel, shape: Shape) -> TextModel:
    """Return an untrained student of a shape, as fast as a trained one; it has the first units."""
    student = build_student(teacher, shape.layers)
    full = whole(teacher)
    layers = len(layers_of(student.module))
    if shape.attention_heads < full.attention_heads:
        students.keep_heads(student, [range(shape.attention_heads)] * layers)
    if shape.feed_forward < full.feed_forward:
        students.keep_neurons(student, [range(shape.feed_forward)] * layers)
    return student


def graphs(fp32: Path, variants: Sequence[Variant]) -> dict[str, Path]:
    """Write the variants of a graph beside it; int8 in a fixed way, without a search for the best.

    Args:
        fp32: the exported graph.
        variants: the variants of the recipe.

    Returns:
        The file of each variant, with fp32.
    """
    paths: dict[str, Path] = {"fp32": fp32}
    writers: dict[str, Any] = {
        "fused": lambda target: fuse(fp32, target),
        "fp16": lambda target: to_fp16(paths["fused"], target),
        "steady": lambda target: make_steady(fp32, target),
        "int8": lambda target: quantize(
            paths.get("fused", fp32), target, Way(fused="fused" in paths)
        ),
    }
    for variant, write in writers.items():  # each after the variants that it is made from
        if variant in variants:
            target = fp32.with_name(f"{variant}.onnx")
            write(target)
            paths[variant] = target
    return paths
