"""The plan of the house: who may import whom, and what must not be imported at all."""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import ad2kit

PACKAGE = Path(ad2kit.__file__).parent
CHECKOUT = PACKAGE.parent


def lint_imports(checkout: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [Path(sys.executable).with_name("lint-imports"), "--no-cache"],
        cwd=checkout,
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": str(checkout)},
    )


@pytest.mark.parametrize(
    ("module", "statement", "contract"),
    [
        ("run/errors.py", "import ad2kit.cli.app", "A subpackage imports from those below it"),
        (
            "data/splits.py",
            "from ad2kit.gate import parity",
            "A subpackage imports from those below it",
        ),
        (
            "service/errors.py",
            "import ad2kit.scoring.score",
            "A subpackage imports from those below it",
        ),
        ("tables/text_files.py", "from ad2kit.tables import formats", "No circles"),
        ("spare.py", "", "A subpackage imports from those below it"),
    ],
)
def test_an_import_upwards_breaks_the_contract(
    module: str, statement: str, contract: str, tmp_path: Path
) -> None:
    shutil.copytree(PACKAGE, tmp_path / "ad2kit", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(CHECKOUT / "pyproject.toml", tmp_path)
    assert lint_imports(tmp_path).returncode == 0
    with (tmp_path / "ad2kit" / module).open("a") as file:
        file.write(f"\n{statement}\n")
    broken = lint_imports(tmp_path)
    assert broken.returncode == 1
    assert f"{contract} BROKEN" in broken.stdout


def loaded_after(code: str) -> set[str]:
    """The top-level modules that a fresh interpreter holds after some code."""
    script = f"{code}\nimport sys\nprint(*sorted({{m.split('.')[0] for m in sys.modules}}))"
    result = subprocess.run(
        [sys.executable, "-c", script], cwd=CHECKOUT, capture_output=True, text=True, check=True
    )
    return set(result.stdout.splitlines()[-1].split())


HEAVY = {"torch", "transformers", "optimum", "datasets", "accelerate", "sklearn", "scipy"}


# What `ad2kit predict` and a service need: the results of a run, a classifier, HTTP.
PRINTED = "import ad2kit.cli.show, ad2kit.exporting.classifier, ad2kit.service.http"


def test_the_control_sees_torch() -> None:
    assert "torch" in loaded_after("import ad2kit.training.loop")


@pytest.mark.parametrize(
    "code",
    [
        "import ad2kit",
        "import ad2kit.service.batcher, ad2kit.exporting.classifier",
        "import ad2kit.campaigns.fit.records, ad2kit.campaigns.sweep.report",
        "import ad2kit.scoring.score, ad2kit.scoring.arrow_blocks, ray.data",
        "import ad2kit.run.recipe; ad2kit.run.recipe.load_recipe('demo')",
        PRINTED,
    ],
)
def test_the_serving_path_imports_no_training_library(code: str) -> None:
    assert not loaded_after(code) & HEAVY


def test_what_predicts_and_serves_imports_no_arrow() -> None:
    """The extra `serve` does not install it."""
    assert "pyarrow" not in loaded_after(PRINTED)
    assert "pyarrow" in loaded_after("import ad2kit.data.splits")


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
    lengths = {path: len(path.read_text().splitlines()) for path in PACKAGE.rglob("*.py")}
    assert {path: n for path, n in lengths.items() if n > 600} == {}


def long_functions(tree: ast.AST, most: int = 60) -> dict[str, int]:
    """The functions with more lines of code than that, signature and docstring left out."""
    found = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            first = node.body[1 if ast.get_docstring(node) and len(node.body) > 1 else 0]
            lines = (node.end_lineno or 0) - first.lineno + 1
            if lines > most:
                found[node.name] = lines
    return found


def test_the_control_sees_a_long_function() -> None:
    body = "    pass\n" * 3
    assert long_functions(ast.parse(f"def f():\n    'doc'\n{body}"), most=2) == {"f": 3}


def test_no_function_is_too_long_to_read() -> None:
    for path in (*PACKAGE.rglob("*.py"), *(CHECKOUT / "serving").rglob("*.py")):
        assert long_functions(ast.parse(path.read_text())) == {}, path


def test_no_line_is_packed_by_hand() -> None:
    mark = "fmt: " + "skip"
    for place in ("ad2kit", "serving", "bench", "tests"):
        for path in (CHECKOUT / place).rglob("*.py"):
            assert mark not in path.read_text(), path
