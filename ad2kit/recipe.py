"""Recipes: one YAML file says everything that a run does.

A recipe is plain data until :func:`load` has applied the overrides; then the whole of it is
checked once and becomes a frozen :class:`Recipe`. Each stage receives its own section.
"""

from __future__ import annotations

import json
from functools import reduce
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self, cast, get_args

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from ad2kit.errors import RecipeError, nearest
from ad2kit.yaml_core import parse_yaml

if TYPE_CHECKING:
    from collections.abc import Sequence

Positive = Annotated[int, Field(ge=1)]
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
NotNegative = Annotated[float, Field(ge=0.0, allow_inf_nan=False)]
AboveZero = Annotated[float, Field(gt=0.0, allow_inf_nan=False)]
Variant = Literal["fp32", "int8"]


class Section(BaseModel):
    """A part of a recipe: frozen, strictly typed, and closed to unknown keys."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class DataRecipe(Section):
    """Where the labelled texts lie and how they are read.

    ``source`` is a folder with ``train`` and ``validation`` files (tsv, csv, jsonl, parquet),
    ``hub://owner/name`` or ``hub://owner/name/config``, or ``embedded://opinions``. Single files
    are named by ``train`` and ``validation`` instead. ``labels`` lists the names in the order of
    their ids; if null they come from the source.
    """

    source: str | None = None
    train: str | None = None
    validation: str | None = None
    text_columns: Annotated[tuple[str, ...], Field(min_length=1, max_length=2)]
    label_column: str
    labels: Annotated[tuple[str, ...], Field(min_length=2)] | None = None
    max_length_tokens: Annotated[int, Field(ge=8)]
    max_train_rows: Positive | None = None

    @model_validator(mode="after")
    def _one_way_to_say_it(self) -> Self:
        files = (self.train is not None, self.validation is not None)
        if (self.source is None and not all(files)) or (self.source is not None and any(files)):
            msg = "give either 'source' or both of 'train' and 'validation'"
            raise ValueError(msg)
        return self


class TrainRecipe(Section):
    """Optimisation: AdamW, linear warm-up and decay, gradient-norm clipping."""

    epochs: Positive
    batch_size: Positive
    accumulation_steps: Positive = 1
    lr: AboveZero
    warmup_ratio: Fraction = 0.1
    weight_decay: NotNegative = 0.01
    max_grad_norm: AboveZero = 1.0
    checkpoint_every_steps: Positive = 200

    @model_validator(mode="after")
    def _micro_batches_are_whole(self) -> Self:
        if self.batch_size % self.accumulation_steps:
            msg = (
                f"batch_size {self.batch_size} is not a multiple of "
                f"accumulation_steps {self.accumulation_steps}"
            )
            raise ValueError(msg)
        return self


class TeacherRecipe(Section):
    """The model to distil: ``hub://owner/name``, ``package://module/folder``,
    ``random://bert`` (tiny, built from the seed), or a folder. ``finetune`` is null for a
    teacher that is a finished classifier.
    """  # noqa: D205

    model: str
    finetune: TrainRecipe | None


class StudentRecipe(Section):
    """The student's layers, as zero-based indices into the teacher's."""

    layers: Annotated[tuple[Annotated[int, Field(ge=0)], ...], Field(min_length=1)]


class AdversaryRecipe(Section):
    """The inner maximisation of AD2: projected gradient ascent on the word embeddings.

    ``radius`` and ``step_size`` are in units of the embeddings: per coordinate for ``linf``, of
    the Euclidean norm over an example's real tokens for ``l2``.
    """

    norm: Literal["linf", "l2"] = "linf"
    radius: NotNegative = 1e-5
    step_size: NotNegative = 1e-3
    steps: Positive = 1
    start: Literal["zero", "random"] = "zero"


class DistillRecipe(TrainRecipe):
    """Distillation: ``kd + alpha * adversarial + hard_label_weight * cross entropy``."""

    temperature: AboveZero = 1.0
    alpha: NotNegative = 1.0
    hard_label_weight: NotNegative = 0.0
    adversary: AdversaryRecipe = AdversaryRecipe()


class ExportRecipe(Section):
    """The ONNX variants to write. Every other variant is derived from fp32."""

    variants: Annotated[tuple[Variant, ...], Field(min_length=1)] = get_args(Variant)

    @model_validator(mode="after")
    def _fp32_is_the_reference(self) -> Self:
        if "fp32" not in self.variants:
            msg = "'fp32' must be among the variants: the others are compared with it"
            raise ValueError(msg)
        return self


class ParityRecipe(Section):
    """The thresholds of the parity gate; agreement and retention are fractions."""

    max_logit_gap: NotNegative = 1e-4
    max_label_flips: Annotated[int, Field(ge=0)] = 0
    min_retained: Fraction = 0.97
    min_retained_lower: Fraction = 0.95
    min_agreement: Fraction = 0.985
    max_points_lost: NotNegative = 1.0
    bootstrap_samples: Annotated[int, Field(ge=100)] = 10_000


class BenchRecipe(Section):
    """What the latency report measures."""

    batch_sizes: Annotated[tuple[Positive, ...], Field(min_length=1)] = (1, 8, 32)
    lengths_tokens: Annotated[tuple[Positive, ...], Field(min_length=1)] = (16, 32, 128)
    seconds_per_cell: AboveZero = 1.0


class ComputeRecipe(Section):
    """Hardware: ``auto`` takes the accelerator if there is one; null threads takes all cores."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    threads: Positive | None = None


class Recipe(Section):
    """Everything that a run does."""

    name: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9-]*$")]
    description: str
    seed: Annotated[int, Field(ge=0, lt=2**31)]
    data: DataRecipe
    teacher: TeacherRecipe
    student: StudentRecipe
    distill: DistillRecipe
    export: ExportRecipe = ExportRecipe()
    parity: ParityRecipe = ParityRecipe()
    bench: BenchRecipe = BenchRecipe()
    compute: ComputeRecipe = ComputeRecipe()


def recipes_folder() -> Path:
    """Return the folder of the shipped recipes, in an installed wheel or in a checkout."""
    package = Path(__file__).parent
    installed = package / "_recipes"
    return installed if installed.is_dir() else package.parent / "recipes"


def recipe_names() -> list[str]:
    """Return the names of the shipped recipes, sorted."""
    return sorted(path.stem for path in recipes_folder().glob("*.yaml"))


def load(name_or_path: str, overrides: Sequence[str] = ()) -> Recipe:
    """Load a shipped recipe by name, or any recipe by path, and apply ``key.path=value``.

    Raises:
        RecipeError: no such recipe, not YAML, an unknown key, or a value that does not fit.
    """
    is_path = name_or_path.endswith((".yaml", ".yml")) or "/" in name_or_path
    path = Path(name_or_path) if is_path else recipes_folder() / f"{name_or_path}.yaml"
    if not path.is_file():
        names = recipe_names()
        raise RecipeError(
            f"no recipe '{name_or_path}'{nearest(name_or_path, names)}; "
            f"shipped recipes: {', '.join(names)}",
            hint="run `ad2kit recipes` for the list, or give the path of a .yaml file",
        )
    try:
        data = parse_yaml(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, ValueError, TypeError, RecursionError) as error:
        raise RecipeError(f"{path} is not valid YAML: {error}", hint="correct the file") from error
    if not isinstance(data, dict):
        raise RecipeError(
            f"{path} must hold a mapping of sections, found {type(data).__name__}",
            hint=f"start from a copy of {recipes_folder() / 'demo.yaml'}",
        )
    for override in overrides:
        _apply(data, override)
    return from_data(data, where=str(path))


def from_data(data: dict[str, Any], *, where: str) -> Recipe:
    """Check plain data whole and build the recipe; ``where`` names the source in errors."""
    try:
        text = json.dumps(data)
    except (TypeError, ValueError, RecursionError) as error:
        raise RecipeError(
            f"{where} holds something that is not plain data: {error}",
            hint="use text, numbers, true, false, null, lists and mappings with text keys",
        ) from error
    try:
        # Through JSON, because pydantic's strict mode then takes a list for a tuple and a whole
        # number for a float, and still refuses "3" for 3 and true for 1.
        return Recipe.model_validate_json(text)
    except ValidationError as error:
        lines = [_explain(item) for item in error.errors()]
        raise RecipeError(
            f"{where} is not a valid recipe:\n" + "\n".join(f"  {line}" for line in lines),
            hint="correct the recipe or the override, then try it with `ad2kit check`",
        ) from error


def _apply(data: dict[str, Any], override: str) -> None:
    """Set one ``key.path=value`` in plain data, in place."""
    dotted, equals, text = override.partition("=")
    keys = dotted.split(".")
    if not equals or not all(keys):
        raise RecipeError(
            f"an override must look like key.path=value, found '{override}'",
            hint="for example: distill.lr=5e-5",
        )
    for depth, key in enumerate(keys[:-1], start=1):
        if data.get(key) is None:
            data[key] = {}
        data = data[key]
        if not isinstance(data, dict):
            raise RecipeError(
                f"override '{override}': '{'.'.join(keys[:depth])}' is a value, not a section",
                hint="run `ad2kit check RECIPE` to see the keys",
            )
    try:
        data[keys[-1]] = parse_yaml(text)
    except (yaml.YAMLError, ValueError, TypeError, RecursionError) as error:
        raise RecipeError(
            f"override '{override}': the value is not valid YAML", hint="quote the value"
        ) from error


def _explain(item: Any) -> str:
    """Turn one pydantic error into a line: where, what was expected, what was found."""
    keys = [str(key) for key in item["loc"]]
    where = ".".join(keys) or "recipe"
    if item["type"] == "extra_forbidden":
        fields = _fields_at(keys[:-1])
        return f"unknown key '{where}'{nearest(keys[-1], fields)}; known: {', '.join(fields)}"
    if item["type"] == "missing":
        return f"'{where}' is missing"
    reason = item["msg"].removeprefix("Value error, ")
    found = "" if isinstance(item["input"], dict) else f", found {item['input']!r}"
    return f"{where}: {reason}{found}"


def _fields_at(keys: list[str]) -> list[str]:
    """Return the names of the fields of the section that ``keys`` lead to."""

    def step(section: type[BaseModel], key: str) -> type[BaseModel]:
        annotation = section.model_fields[key].annotation
        options = (annotation, *get_args(annotation))
        return next(cast(type[BaseModel], o) for o in options if hasattr(o, "model_fields"))

    return list(reduce(step, keys, cast(type[BaseModel], Recipe)).model_fields)
