"""The plan of the house: who may import whom, and what must not be imported at all."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

import ad2kit

PACKAGE = Path(ad2kit.__file__).parent
CHECKOUT = PACKAGE.parent

LAYERS = {
    0: {"errors", "markdown", "texts", "yaml_core"},
    1: {
        "cluster", "files", "recipe", "records", "run_dir", "runtime", "score_records",
        "search_space", "sections", "shipping", "verdicts",
    },
    2: {
        "adversary", "baseline", "batcher", "blocks", "bundle", "checkpoint", "classifier",
        "compare_report", "connections", "corpus", "curve", "data", "error_contract", "evidence",
        "first_token", "fit_records", "fit_report", "fuse", "gate", "golden", "head", "http_api",
        "int8_search",
        "intermediate", "judge", "label_order", "labels", "losses", "metrics", "mirror", "models",
        "objectives", "observability", "openapi", "parquet_blocks", "parquet_rows",
        "parts", "plots", "pretrained",
        "prospects", "prune", "quantize", "random_bert", "ray_workers", "references", "resumable",
        "schedule", "scoring", "selection",
        "service_arguments", "service_check", "service_metrics", "service_process", "shadow",
        "shapes", "snapshots", "sources", "stopwatch", "store", "students", "sweep_report",
        "tables", "tasks", "text_blocks", "text_rows", "tokenise", "training", "tuning", "workers",
        "baselines", "probe",
    },
    3: {
        "bench", "check", "distill", "doctor", "export", "init", "model_parity", "package",
        "parity", "push", "report", "score",
    },
    3.5: {"campaigns.trial"},  # what a campaign hands to a worker
    4: {
        "campaigns", "campaigns.compare", "campaigns.fit", "campaigns.plan", "campaigns.run",
        "campaigns.sweep",
        "campaigns.teacher",
    },
    5: {
        "__main__", "campaign_commands", "cli", "options", "parity_terminal", "score_terminal",
        "stage_commands", "terminal",
    },
}  # fmt: skip
LAYER_OF = {module: layer for layer, modules in LAYERS.items() for module in modules}


def modules() -> dict[str, Path]:
    return {
        ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__"): path
        for path in PACKAGE.rglob("*.py")
        if path != PACKAGE / "__init__.py"
    }


def imported(path: Path) -> set[str]:
    """The modules of ad2kit that a file imports anywhere, type checking included."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("ad2kit"):
            base = (node.module or "").removeprefix("ad2kit").lstrip(".")
            found |= {base} if base else {alias.name for alias in node.names}
        elif isinstance(node, ast.Import):
            found |= {
                alias.name.removeprefix("ad2kit.")
                for alias in node.names
                if alias.name.startswith("ad2kit.")
            }
    return found & set(LAYER_OF)


def test_every_module_has_a_layer() -> None:
    assert set(modules()) == set(LAYER_OF)


@pytest.mark.parametrize("module", sorted(LAYER_OF))
def test_a_module_imports_from_below_only(module: str) -> None:
    layer = LAYER_OF[module]
    for other in imported(modules()[module]):
        # The small modules of layers 1 and 2 may use each other; a stage never knows a stage.
        allowed = LAYER_OF[other] < layer or (LAYER_OF[other] == layer and layer in (1, 2, 5))
        assert allowed, f"{module} (layer {layer}) imports {other} (layer {LAYER_OF[other]})"


def test_modules_of_one_layer_do_not_import_each_other_in_circles() -> None:
    graph = {module: imported(path) for module, path in modules().items()}
    done: set[str] = set()
    while len(done) < len(graph):
        ready = {module for module, needs in graph.items() if module not in done and needs <= done}
        assert ready, f"a circle among {sorted(set(graph) - done)}"
        done |= ready


def loaded_after(code: str) -> set[str]:
    """The top-level modules that a fresh interpreter holds after some code."""
    script = f"{code}\nimport sys\nprint(*sorted({{m.split('.')[0] for m in sys.modules}}))"
    result = subprocess.run(
        [sys.executable, "-c", script], cwd=CHECKOUT, capture_output=True, text=True, check=True
    )
    return set(result.stdout.splitlines()[-1].split())


HEAVY = {"torch", "transformers", "optimum", "datasets", "accelerate", "sklearn", "scipy"}


def test_the_control_sees_torch() -> None:
    assert "torch" in loaded_after("import ad2kit.training.loop")


@pytest.mark.parametrize(
    "code",
    [
        "import ad2kit",
        "import ad2kit.service.batcher, ad2kit.exporting.classifier",
        "import ad2kit.scoring.score, ad2kit.scoring.parquet_blocks, ad2kit.scoring.workers, ray.data",
        "import ad2kit.run.recipe; ad2kit.run.recipe.load('demo')",
    ],
)
def test_the_serving_path_imports_no_training_library(code: str) -> None:
    assert not loaded_after(code) & HEAVY


def test_help_imports_only_what_it_prints_with() -> None:
    code = (
        "import sys; sys.argv = ['ad2kit', '--help']\n"
        "from ad2kit.__main__ import main\n"
        "try: main()\nexcept SystemExit: pass"
    )
    assert not loaded_after(code) & (
        HEAVY | {"pydantic", "numpy", "onnxruntime", "bentoml", "rich"}
    )


# What opens a folder of others, and asks on the terminal whether to run its code if nobody says no.
OPENERS = re.compile(r"(transformers\.)?(Auto|ORTModel)\w*\.from_pretrained|main_export")


def opened_without_a_word_on_code(tree: ast.AST) -> list[int]:
    """The lines that open a model of others and do not say ``trust_remote_code=False``."""
    return [
        node.lineno
        for node in ast.walk(tree)
        if isinstance(node, ast.Call)
        and OPENERS.fullmatch(ast.unparse(node.func))
        and "trust_remote_code=False" not in map(ast.unparse, node.keywords)
    ]


def test_the_control_sees_an_open_door() -> None:
    assert opened_without_a_word_on_code(ast.parse("AutoConfig.from_pretrained(folder)")) == [1]


@pytest.mark.parametrize("place", ["ad2kit", "serving", "bench", "tests"])
def test_no_call_leaves_open_whether_a_folder_may_run_code(place: str) -> None:
    for path in (CHECKOUT / place).rglob("*.py"):
        assert opened_without_a_word_on_code(ast.parse(path.read_text())) == [], path


def test_no_module_is_too_long_to_read() -> None:
    lengths = {name: len(path.read_text().splitlines()) for name, path in modules().items()}
    assert {name: n for name, n in lengths.items() if n > 600} == {}
