"""Several processes train one student together: as one would, and what is done once is done once.

On the CPU (gloo) with torchrun, which `accelerate launch` calls on GPUs; on CPUs that starts one.
"""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import load_file

from ad2kit.data.splits import load_data
from ad2kit.models import text_model
from ad2kit.models.pretrained import RANDOM
from ad2kit.run.errors import RunError
from ad2kit.run.files import sha256_of
from ad2kit.run.folder import RunDir, open_run
from ad2kit.run.recipe import load_recipe
from ad2kit.training.checkpoint import CheckpointFacts
from ad2kit.training.distill import distill

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.slow

# 129 training rows in batches of 32: the last batch has one row, fewer than there are processes.
SETTINGS = (
    "data.max_train_rows=161",
    "teacher.finetune.epochs=2",
    "distill.accumulation_steps=2",
    "student.attention_heads=3",
    "student.feed_forward=100",
)
LONGER = (*SETTINGS, "distill.epochs=8", "distill.checkpoint_every_steps=100")


def start(runs_dir: Path, *settings: str) -> subprocess.Popen[str]:
    launcher = ["torch.distributed.run", "--standalone", "--local-addr=127.0.0.1"]
    command = ["distill", "smoke", *settings, "--runs-dir", str(runs_dir), "--json"]
    return subprocess.Popen(
        [sys.executable, "-m", *launcher, "--nproc-per-node=2", "-m", "ad2kit", *command],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def two_processes(runs_dir: Path, *settings: str) -> tuple[RunDir, str]:
    """Train with two processes; return the run and what was on stdout."""
    process = start(runs_dir, *settings)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    return only_run(runs_dir), out


def only_run(runs_dir: Path) -> RunDir:
    (folder,) = runs_dir.glob("smoke-*")
    return RunDir(folder)


def curve(run: RunDir, phase: str) -> list[dict[str, Any]]:
    """The step records without the one thing in them that differs from run to run."""
    records = [json.loads(line) for line in run.curve(phase).read_text().splitlines()]
    return [{key: value for key, value in r.items() if key != "seconds"} for r in records]


def numbers(record: dict[str, Any]) -> dict[str, float]:
    flat = record | record["terms"]
    return {key: value for key, value in flat.items() if isinstance(value, int | float)}


def files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def no_dropout(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The setting of a teacher without dropout, of which each process would draw its own."""
    recipe = load_recipe("smoke", SETTINGS)
    data = load_data(recipe.data, recipe.seed)
    model = text_model.load_reference(RANDOM, data, seed=5, finished=False, key="teacher.model")
    model.module.config.update({"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0})
    folder = tmp_path_factory.mktemp("model") / "no-dropout"
    text_model.save(model, folder, inputs="")
    return f"teacher.model={folder}"


@pytest.fixture(scope="module")
def together(tmp_path_factory: pytest.TempPathFactory, no_dropout: str) -> tuple[RunDir, str]:
    return two_processes(tmp_path_factory.mktemp("two"), *SETTINGS, no_dropout)


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory, no_dropout: str) -> RunDir:
    run = open_run(load_recipe("smoke", [*SETTINGS, no_dropout]), tmp_path_factory.mktemp("one"))
    distill(run)
    return run


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    """A run, with dropout, whose launcher got a Ctrl-C while the student was training."""
    runs_dir = tmp_path_factory.mktemp("stopped")
    process = start(runs_dir, *LONGER)
    deadline = time.monotonic() + 120
    while process.poll() is None and time.monotonic() < deadline:
        # In the third of its eight epochs.
        if any(len(p.read_text().splitlines()) > 11 for p in runs_dir.glob("*/training.jsonl")):
            break
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=120)
    assert process.returncode != 0, "it had ended already"
    assert "the same command goes on where this one stopped" in err
    return only_run(runs_dir)


def test_two_processes_train_what_one_trains(together: tuple[RunDir, str], alone: RunDir) -> None:
    run, _ = together
    for phase in ("teacher", "student"):
        found, expected = curve(run, phase), curve(alone, phase)
        assert [record["step"] for record in found] == list(range(1, len(expected) + 1))
        assert {record["examples"] for record in found} == {32, 1}
        for ours, theirs in zip(found, expected, strict=True):
            # Adam forgives gradients of another scale: losses and norms do not.
            assert numbers(ours) == pytest.approx(numbers(theirs), rel=1e-3, abs=1e-6)
        weights, reference = (load_file(r.path / phase / "model.safetensors") for r in (run, alone))
        assert weights.keys() == reference.keys()
        for name, value in weights.items():
            torch.testing.assert_close(
                value, reference[name], rtol=1e-3, atol=2e-4, msg=f"{phase} {name}"
            )


def test_the_first_process_alone_writes_and_speaks(
    together: tuple[RunDir, str], alone: RunDir
) -> None:
    run, out = together
    assert files(run.path) == files(alone.path)
    assert len(files(run.shared)) == len(files(alone.shared))
    assert not list(run.path.parent.rglob(".tmp-*"))
    report = json.loads(out)  # one document and nothing beside it
    assert report == json.loads(run.distill_report.read_text())
    assert report["environment"]["processes"] == "2"


def test_one_process_does_not_go_on_where_two_stopped(stopped: RunDir, tmp_path: Path) -> None:
    folder = tmp_path / "runs" / stopped.path.name
    shutil.copytree(stopped.path, folder)
    with pytest.raises(RunError, match="processes: 2 then, 1 now") as caught:
        distill(RunDir(folder))
    assert "--allow-inexact" in caught.value.hint
    assert distill(RunDir(folder), allow_inexact=True).steps == 40


def test_two_processes_go_on_where_they_stopped_bit_for_bit(
    stopped: RunDir, tmp_path: Path
) -> None:
    facts = CheckpointFacts.read(stopped.checkpoint("student") / "checkpoint.json")
    assert 0 < facts.step < 40
    straight, _ = two_processes(tmp_path, *LONGER)
    resumed, _ = two_processes(stopped.path.parent, *LONGER)
    for phase in ("teacher", "student"):
        assert curve(resumed, phase) == curve(straight, phase)
        ours, theirs = (r.path / phase / "model.safetensors" for r in (resumed, straight))
        assert sha256_of(ours) == sha256_of(theirs)
    assert files(resumed.path) == files(straight.path)
