"""Recipes: strict, closed to unknown keys, and the same through files and overrides."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import pytest

from ad2kit.data.splits import load_data
from ad2kit.run import recipe as recipes
from ad2kit.run.errors import RecipeError
from ad2kit.run.folder import open_run
from ad2kit.run.recipe import parse_yaml
from ad2kit.run.sweep_section import Configuration, SweepRecipe
from ad2kit.statistics import metrics

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


@pytest.mark.parametrize("name", recipes.recipe_names())
def test_every_shipped_recipe_is_valid_and_named_after_its_file(name: str) -> None:
    assert recipes.load_recipe(name).name == name


GLUE: dict[str, tuple[str, ...]] = {
    "cola": ("matthews",),
    "mnli": ("accuracy",),
    "mnli-mismatched": ("accuracy",),
    "mrpc": ("f1", "accuracy"),
    "qnli": ("accuracy",),
    "qqp": ("f1", "accuracy"),
    "rte": ("accuracy",),
    "sst2": ("accuracy",),
    "stsb": ("pearson", "spearman"),
    "wnli": ("accuracy",),
}


def test_the_recipes_that_the_guide_names_are_shipped() -> None:
    published = {f"{name}-published" for name in GLUE}
    others = {"custom", "demo", "llm", "smoke", "sst2-minilm"}
    assert set(recipes.recipe_names()) == {*GLUE, *published, *others}
    guide = (recipes.recipes_folder().parent / "docs/guides/recipes.md").read_text()
    first_cells = re.findall(r"(?m)^\| (`[^|]*`) \|", guide)
    assert set(re.findall(r"`([\w-]+)`", " ".join(first_cells))) == {*GLUE, *others}


@pytest.mark.parametrize("name", GLUE)
def test_a_published_recipe_has_the_published_hyperparameters(name: str) -> None:
    recipe = recipes.load_recipe(f"{name}-published")
    adversary = recipe.distill.adversary
    assert recipe.teacher.model == "hub://google-bert/bert-base-uncased"
    assert recipe.student.layers == (1, 3, 5, 7, 9, 11)
    assert (recipe.distill.epochs, recipe.distill.warmup_ratio) == (6, 0.1)
    assert recipe.distill.batch_size in (16, 32)
    assert recipe.distill.lr in (1e-5, 3e-5, 5e-5, 7e-5, 9e-5, 1e-4)
    assert (recipe.distill.temperature, recipe.distill.alpha) == (1.0, 1.0)
    assert recipe.distill.max_grad_norm == 1.0
    assert (adversary.radius, adversary.step_size) == (1e-5, 1e-3)
    assert recipe.data.max_length_tokens == 512
    assert recipe.data.select_from == "validation"
    assert recipe.sweep == SweepRecipe()  # whose defaults are the published grid
    assert recipe.sweep.batch_sizes == (16, 32)
    assert recipe.sweep.lrs == (1e-5, 3e-5, 5e-5, 7e-5, 9e-5, 1e-4)
    assert (recipe.sweep.search, recipe.sweep.seeds) == ("grid", 5)
    assert len(recipe.sweep.grid(recipe.distill)) == 12


@pytest.mark.parametrize("name", GLUE)
def test_our_recipe_differs_from_the_published_one_where_we_say_so(name: str) -> None:
    ours = recipes.load_recipe(name).model_dump()
    theirs = recipes.load_recipe(f"{name}-published").model_dump()
    assert ours["student"].pop("layers") == (0, 1, 2, 3, 4, 5)
    assert ours["distill"]["adversary"].pop("radius") == 1e-3
    assert ours["distill"].pop("hard_label_weight") == 1.0
    assert theirs["distill"].pop("hard_label_weight") == 0.0
    assert ours["data"].pop("select_from") == "train"
    for recipe in (ours, theirs):
        del recipe["name"], recipe["description"]
    del theirs["student"]["layers"], theirs["distill"]["adversary"]["radius"]
    del theirs["data"]["select_from"]
    assert ours == theirs


@pytest.mark.parametrize(("name", "metrics"), GLUE.items())
def test_a_glue_task_is_judged_by_its_own_metrics(name: str, metrics: tuple[str, ...]) -> None:
    recipe = recipes.load_recipe(name)
    assert recipe.data.judged_by == metrics
    assert (recipe.data.source or "").startswith("hub://nyu-mll/glue/")


@pytest.mark.parametrize("name", ["cola", "mrpc", "qnli", "rte", "sst2", "stsb"])
def test_a_glue_recipe_reads_the_real_task(shared_data: Callable[[str], Path], name: str) -> None:
    folder = shared_data(name)
    with (folder / "train.tsv").open(encoding="utf-8") as file:
        columns = file.readline().split("\t")[:-1]
    recipe = recipes.load_recipe(name, [f"data.source={folder}", f"data.text_columns={columns}"])
    data = load_data(recipe.data, recipe.seed)
    assert len(columns) == len(recipes.load_recipe(name).data.text_columns)
    assert (len(data.labels) == 1) == (name == "stsb")
    teacher = data.validation.labels
    assert metrics.mean_metric(recipe.data.judged_by, teacher, teacher) == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("5e-5", 5e-5),
        ("1.", 1.0),
        (".5", 0.5),
        ("-3", -3),
        ("012", "012"),
        ("no", "no"),
        ("on", "on"),
        ("true", True),
        ("null", None),
        ("", None),
        ("~", None),
        ("2026-01-01", "2026-01-01"),
        ("1:30", "1:30"),
        ("'5'", "5"),
        ("[1, 2]", [1, 2]),
    ],
)
def test_scalars_follow_the_yaml_core_schema(text: str, value: object) -> None:
    parsed = parse_yaml(text)
    assert parsed == value
    assert type(parsed) is type(value)


def test_an_override_reaches_the_typed_recipe() -> None:
    recipe = recipes.load_recipe(
        "smoke", ["distill.lr=5e-5", "student.layers=[0]", "distill.alpha=2"]
    )
    assert recipe.distill.lr == 5e-5
    assert recipe.student.layers == (0,)
    assert recipe.distill.alpha == 2.0


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("distil.lr=1e-4", "did you mean 'distill'"),
        ("distill.learning_rate=1e-4", "unknown key 'distill.learning_rate'"),
        ("distill.warmup=0.1", "did you mean 'warmup_ratio'"),
        ("distill.adversary.radios=1", "did you mean 'radius'"),
        ("teacher.finetune.epoch=1", "did you mean 'epochs'"),
        ("distill.lr=fast", "distill.lr"),
        ("distill.lr=-1", "greater than 0"),
        ("distill.epochs='3'", "found '3'"),
        ("distill.epochs=true", "found True"),
        ("distill.epochs=2.5", "distill.epochs"),
        ("distill.adversary.norm=l3", "'linf' or 'l2'"),
        ("export.variants=[int8]", "'fp32' must be among the variants"),
        ("distill.accumulation_steps=5", "not a multiple"),
        ("data.train=a.tsv", "an embedded source has no other splits"),
        ("data.source=null", "give 'source', or both of 'train' and 'validation'"),
        ("data.metrics=[spearman]", "'spearman' does not fit a single_label task: accuracy, f1"),
        ("student.layers=null", "give 'layers' of the teacher, or the 'model'"),
        ("distill.intermediate.pdk=1", "'distill.intermediate.pdk' (did you mean 'pkd'?)"),
        ("distill.lr", "must look like key.path=value"),
        ("distill.lr.x=1", "is a value, not a section"),
        ("student.layers=[-1]", "greater than or equal to 0"),
        ("seed=null", "seed"),
        ("sweep.lr=[1e-5]", "unknown key 'sweep.lr' (did you mean 'lrs'?)"),
        ("sweep.lrs=[1e-5, 0]", "sweep.lrs.1: Input should be greater than 0, found 0"),
        ("sweep.lrs=1e-5", "sweep.lrs"),
        ("sweep.batch_sizes=[]", "at least 1 item"),
        ("sweep.radii=[1e-3, 1e-3]", "'radii' has a value twice: 0.001, 0.001"),
        ("sweep.search=random", "'grid' or 'optuna'"),
        ("sweep={'search': 'optuna', 'lrs': [1e-5]}", "two or more 'lrs'"),
    ],
)
def test_a_wrong_override_is_an_error_that_names_it(override: str, expected: str) -> None:
    with pytest.raises(RecipeError) as caught:
        recipes.load_recipe("smoke", [override])
    assert expected in caught.value.message
    assert caught.value.hint


def test_an_unknown_recipe_names_the_nearest() -> None:
    with pytest.raises(RecipeError, match="did you mean 'sst2'"):
        recipes.load_recipe("sst3")


def test_a_path_is_a_recipe_too(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text((recipes.recipes_folder() / "smoke.yaml").read_text())
    assert recipes.load_recipe(str(path)) == recipes.load_recipe("smoke")


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("seed: 1\nseed: 2\n", "appears twice"),
        ("[1, 2]", "must hold a mapping"),
        ("a: [", "not valid YAML"),
        ("", "must hold a mapping"),
        ("name: x\n", "'data' is missing"),
        ("x: !!python/object/apply:os.system ['true']\n", "not valid YAML"),
    ],
)
def test_a_broken_file_is_an_error(tmp_path: Path, content: str, expected: str) -> None:
    path = tmp_path / "broken.yaml"
    path.write_text(content)
    with pytest.raises(RecipeError, match=expected):
        recipes.load_recipe(str(path))


def test_a_recipe_survives_its_own_json() -> None:
    recipe = recipes.load_recipe("demo", ["distill.lr=3e-5"])
    assert recipes.from_data(recipe.model_dump(mode="json"), where="test") == recipe


def test_the_sweep_section_decides_no_weights_and_spans_its_lists(tmp_path: Path) -> None:
    plain = recipes.load_recipe("smoke")
    other = recipes.load_recipe("smoke", ["sweep.lrs=[1e-4, 2e-4]", "sweep.radii=[0, 1e-2]"])
    assert open_run(plain, tmp_path) == open_run(other, tmp_path)
    alpha = plain.distill.alpha
    assert other.sweep.grid(other.distill)[:3] == [
        Configuration(batch_size=16, lr=1e-4, radius=0.0, alpha=alpha),
        Configuration(batch_size=16, lr=1e-4, radius=1e-2, alpha=alpha),
        Configuration(batch_size=16, lr=2e-4, radius=0.0, alpha=alpha),
    ]


def test_a_regression_has_no_classes_to_weigh() -> None:
    weighed = ["distill.class_weights=balanced", "data.label_column=label"]
    assert recipes.load_recipe("smoke", weighed).distill.class_weights == "balanced"
    for key in ("distill", "teacher.finetune"):
        with pytest.raises(RecipeError, match=rf"{key}\.class_weights: a regression has no"):
            recipes.load_recipe("smoke", ["data.task=regression", f"{key}.class_weights=balanced"])


def test_latency_is_of_lengths_that_occur() -> None:
    short = recipes.load_recipe("custom", ["data.max_length_tokens=64"])
    assert short.bench_lengths_tokens == (16, 32)
    assert recipes.load_recipe("custom", ["data.max_length_tokens=8"]).bench_lengths_tokens == (8,)
    wrong = ["data.max_length_tokens=64", "bench.lengths_tokens=[16,128]"]
    with pytest.raises(RecipeError, match=r"128 is longer than data\.max_length_tokens, 64"):
        recipes.load_recipe("custom", wrong)
    for key, words in (("cut", "texts are cut"), ("refuse", "refused"), ("windows", "in windows")):
        with pytest.raises(RecipeError, match=words):
            recipes.load_recipe("custom", [*wrong, f"data.long_texts={key}"])
    assert recipes.load_recipe(
        "custom", [*wrong, "bench.lengths_tokens=null"]
    ).bench_lengths_tokens == (
        16,
        32,
    )


def test_what_was_typed_is_blamed_and_not_the_file() -> None:
    with pytest.raises(RecipeError) as caught:
        recipes.load_recipe("custom", ["data.text_columns=tweet"])
    assert "custom.yaml" not in caught.value.message
    assert "expected a list, such as data.text_columns=[tweet]" in caught.value.message
    assert "(given as data.text_columns=tweet)" in caught.value.message
    assert recipes.load_recipe("custom", ["data.text_columns=[tweet]"]).data.text_columns == (
        "tweet",
    )


def test_half_a_surrogate_pair_is_refused_and_shown() -> None:
    with pytest.raises(RecipeError, match="half a surrogate pair") as caught:
        recipes.load_recipe("smoke", ['data.labels=["a", "\\ud800"]'])
    assert "labels" in caught.value.message
    caught.value.message.encode()
