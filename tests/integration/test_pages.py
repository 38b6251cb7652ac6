"""Every command and every Python block of README and docs runs, page by page, as a reader types it.

Only the size is another: trainings start from a small teacher and take a few updates. A block that
does not run has the comment ``<!-- not run: REASON -->`` on the line above it.
"""

from __future__ import annotations

import csv
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import psutil
import pytest

from ad2kit.data.demo_reviews import LABELS, opinions
from ad2kit.run.recipe import load_recipe
from tests import warm as warm_commands
from tests.http_client import free_port

if TYPE_CHECKING:
    from ad2kit.gate.records import BentoRecord
    from ad2kit.run.folder import RunDir
    from tests.warm import Warm

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
# Pages whose blocks are run elsewhere, or are not to be run by a test; they say so themselves.
LEFT_OUT = {
    "docs/measurements": "each command takes minutes to days",
    "docs/reference/python.md": "made from the docstrings that tests/integration/test_api.py runs",
}
BLOCK = re.compile(r"(?ms)(?:^ *<!-- not run: ([^\n]+) -->\n)?^( *)```(sh|python)\n(.*?)^\2```")

SMALL_GATE = (
    "parity.min_retained=0.5",
    "parity.min_retained_lower=0.3",
    "parity.min_agreement=0.5",
    "parity.min_agreement_lower=0.3",
    "parity.max_points_lost=50",
    "parity.max_points_lost_upper=60",
)
SMALL = (
    *SMALL_GATE,
    "data.max_train_rows=400",
    "teacher.accept=true",
    "student.layers=[0,1]",
    "distill.epochs=1",
    "distill.min_updates=40",
    "distill.evaluations=2",
    "distill.lr=1e-3",
    "export.search_seconds=0",
    "bench.seconds_per_cell=0.02",
    "bench.lengths_tokens=[16]",
    "compute.threads=1",
)
SMALL_TEACHER = (
    "teacher.model=my/classifier",
    "teacher.finetune.epochs=1",
    "teacher.finetune.min_updates=8",
    "teacher.finetune.evaluations=2",
    "teacher.finetune.lr=1e-4",
)
SMALL_GRID = ("--layers", "1,2", "--heads", "4", "--feed-forward", "64,128")

# The commands of a block, made small, in forks of a warm process; a server goes to the background,
# and is there when its line ends.
SHELL = r"""
set -euo pipefail
warm() { "$PYTHON" -S "$WARM_SCRIPT" "$WARM" "$@"; }
small_arguments() {
  case " $* " in *" teacher.finetune=null "*) ;; *) echo "$SMALL_TEACHER" ;; esac
  echo "$SMALL"
}
ad2kit() {
  case "$1" in
    check | run | distill | compare) warm "$@" $(small_arguments "$@") ;;
    # So small a student seldom meets the target. Exit code 1 is a verdict, and no mistake.
    fit) warm "$@" $(small_arguments "$@") $SMALL_GRID || [ $? = 1 ] ;;
    parity) case " $* " in *" --model "*) set -- "$@" $SMALL_GATE ;; esac; warm "$@" ;;
    *) warm "$@" ;;
  esac
}
bentoml() {
  if [ "$1" != serve ]; then command bentoml "$@"; return; fi
  if [ -e server.pid ]; then kill "$(<server.pid)"; tail --pid="$(<server.pid)" -f /dev/null; fi
  command bentoml "$@" >server.log 2>&1 &
  echo $! >server.pid
  for _ in $(seq 300); do
    if curl --silent --fail --output /dev/null "localhost:$BENTOML_PORT/readyz"; then return; fi
    sleep 0.2
  done
  cat server.log; return 1
}
"""
# `open_run` as in the shell: the recipe of the page, made small.
PYTHON = """
import functools, os
import ad2kit
small = [*os.environ["SMALL"].split(), *os.environ["SMALL_TEACHER"].split()]
ad2kit.open_run = functools.partial(ad2kit.open_run, overrides=small)
"""


class Block(NamedTuple):
    """A block of code of a page: why it is not run ("" if it is), its language, and the code."""

    reason: str
    language: str
    code: str


def blocks(text: str) -> list[Block]:
    """Return the blocks of shell and Python of a page, in order."""
    return [Block(*found) for found in ((m[1] or "", m[3], m[4]) for m in BLOCK.finditer(text))]


def page_paths() -> list[str]:
    """Return the pages that have blocks to run, relative to the checkout."""
    pages = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
    names = [page.relative_to(ROOT).as_posix() for page in pages]
    return [
        name
        for name in names
        if not name.startswith(tuple(LEFT_OUT))
        and any(not block.reason for block in blocks((ROOT / name).read_text()))
    ]


@pytest.fixture
def desk(packaged: tuple[RunDir, BentoRecord], tmp_path: Path) -> Path:
    """The folder of a reader: a checkout, tables, a teacher and a finished run."""
    run, _ = packaged
    (tmp_path / ".venv/bin").mkdir(parents=True)
    (tmp_path / ".venv/bin/activate").touch()
    for name in ("serving", "recipes", "pyproject.toml"):
        (tmp_path / name).symlink_to(ROOT / name)
    shutil.copytree(run.path, tmp_path / "runs" / run.path.name)
    shutil.copytree(run.teacher, tmp_path / "my/classifier")
    texts = opinions(0, train_rows=400, validation_rows=300)
    for name, rows in (("train", texts.train), ("validation", texts.validation)):
        _write_table(tmp_path / f"my/folder/{name}.csv", rows, ("sentence", "title", "body"))
    for name in ("my/train.csv", "reviews.csv", "train.csv"):
        _write_table(tmp_path / name, texts.train)
    for name in ("my/held-out.csv", "held-out.csv"):
        _write_table(tmp_path / name, texts.validation)
    _write_parquet(tmp_path / "reviews", texts.validation)
    others = opinions(1, train_rows=100, validation_rows=2).train
    for name in ("texts.txt", "more.txt"):
        (tmp_path / name).write_text("".join(f"{text}\n" for text, _ in others))
    (tmp_path / "keys.txt").write_text("key\n")
    return tmp_path


def _write_table(
    path: Path, rows: list[tuple[str, int]], more_columns: tuple[str, ...] = ()
) -> None:
    """Write texts and labels, and copies of the texts in other columns."""
    path.parent.mkdir(exist_ok=True)
    with path.open("w", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(["text", "label", *more_columns])
        writer.writerows(
            (text, LABELS[label], *(text for _ in more_columns)) for text, label in rows
        )


def _write_parquet(folder: Path, rows: list[tuple[str, int]]) -> None:
    from pyarrow import Table, parquet

    folder.mkdir()
    texts = [text for text, _ in rows]
    for part in range(2):
        parquet.write_table(Table.from_pydict({"text": texts[part::2]}), folder / f"{part}.parquet")


def filled_in(code: str, packaged: tuple[RunDir, BentoRecord], port: int) -> str:
    """Return code with real names in place of those that a reader fills in."""
    run, bento = packaged
    for name, value in {
        "localhost:3000": f"localhost:{port}",
        "ad2kit-demo:TAG": bento.tag,
        "runs/demo-FINGERPRINT": f"runs/{run.path.name}",
        "RUN": f"runs/{run.path.name}",
        "ONNX-FOLDER": f"runs/{run.path.name}/onnx/int8",
        "--seeds 5": "--seeds 2",  # of four methods
        "--teacher FOLDER": f"--teacher runs/{run.path.name}/teacher",
        "rows.tsv": "my/folder/validation.csv",
        "FILE": "keys.txt",
    }.items():
        code = re.sub(rf"(?<![\w-]){re.escape(name)}(?![\w-])", value, code)
    return code


def run_block(block: Block, desk: Path, environment: dict[str, str]) -> str:
    """Run one block on the desk; return what went wrong, or "". Servers go on."""
    if block.language == "python":
        (desk / "block.py").write_text(PYTHON + block.code)
        command = [sys.executable, "block.py"]
    else:
        command = ["bash", "-c", SHELL + block.code]
    log = desk / "block.log"
    with log.open("w") as stream:
        # Not through a pipe: a server that goes on would keep it open.
        done = subprocess.run(
            command, cwd=desk, env=environment, stdout=stream, stderr=stream, check=False
        )
    return "" if done.returncode == 0 else f"{block.code}\n{log.read_text()}"


def _environment(warm: Warm, port: int) -> dict[str, str]:
    """Return the variables of the blocks; their servers listen on ``port``."""
    return os.environ | {
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "SMALL": " ".join(SMALL),
        "SMALL_TEACHER": " ".join(SMALL_TEACHER),
        "SMALL_GATE": " ".join(SMALL_GATE),
        "SMALL_GRID": " ".join(SMALL_GRID),
        "BENTOML_PORT": str(port),
        "PYTHON": sys.executable,
        "WARM_SCRIPT": warm_commands.__file__,
        "WARM": warm.address,
    }


@pytest.mark.parametrize("page", page_paths())
def test_the_blocks_of_a_page_run(
    page: str, desk: Path, packaged: tuple[RunDir, BentoRecord], warm: Warm
) -> None:
    port = free_port()
    environment = _environment(warm, port)
    try:
        for block in blocks((ROOT / page).read_text()):
            if block.reason:
                continue
            code = filled_in(block.code, packaged, port)
            assert run_block(block._replace(code=code), desk, environment) == ""
    finally:
        _stop_servers(port)


def _stop_servers(port: int) -> None:
    """Stop the servers of a page, and wait for them."""
    servers = [
        process
        for process in psutil.process_iter(["environ"])
        if (process.info["environ"] or {}).get("BENTOML_PORT") == str(port)
    ]
    for server in servers:
        server.terminate()
    psutil.wait_procs(servers, timeout=30)


def test_what_is_not_run_has_a_reason_and_what_fails_is_seen(desk: Path, warm: Warm) -> None:
    text = "<!-- not run: needs a GPU -->\n```sh\nfalse\n```\n```python\n1 / 0\n```\n"
    assert [(block.reason, block.language) for block in blocks(text)] == [
        ("needs a GPU", "sh"),
        ("", "python"),
    ]
    environment = _environment(warm, 0) | {"SMALL": "", "SMALL_TEACHER": ""}
    assert "ZeroDivisionError" in run_block(blocks(text)[1], desk, environment)
    assert run_block(Block("", "sh", "false | true\n"), desk, environment)
    missing = Block("", "sh", "ad2kit predict --file missing.txt\ntrue\n")
    assert "missing.txt" in run_block(missing, desk, environment)


def test_the_small_recipe_is_one() -> None:
    """The overrides that make a training small still name keys of the recipe."""
    recipe = load_recipe("custom", [*SMALL, *SMALL_TEACHER])
    assert json.loads(recipe.model_dump_json())["distill"]["min_updates"] == 40
