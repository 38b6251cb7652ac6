"""What ad2kit 0.1.0 wrote: its runs are read, its Bentos say what to do."""

from __future__ import annotations

import json
import tarfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

import ad2kit
from ad2kit.gate.records import ParityReport
from ad2kit.packaging.bento import served
from ad2kit.run.errors import RunError

if TYPE_CHECKING:
    from collections.abc import Callable

pytestmark = pytest.mark.slow
FIXTURES = Path(__file__).parents[1] / "fixtures" / "0.1.0"


def unpacked(name: str, folder: Path) -> Path:
    with tarfile.open(FIXTURES / f"{name}.tar.xz") as archive:
        archive.extractall(folder, filter="data")
    return next(folder.iterdir())


@pytest.fixture
def old_run(tmp_path: Path) -> Path:
    """A run of `smoke`, made by `ad2kit run smoke` of 0.1.0."""
    return unpacked("run", tmp_path)


def test_the_variant_that_it_ships_answers_as_it_did(old_run: Path) -> None:
    golden = json.loads((old_run / "onnx" / "int8" / "golden.json").read_text())
    answers = ad2kit.load(old_run, threads=1).predict([line["text"] for line in golden])
    # Sums of 8-bit products differ a little between processors.
    assert [answer.scores for answer in answers] == [
        pytest.approx(line["answer"]["scores"], abs=0.02) for line in golden
    ]


def test_nothing_is_trained_again(old_run: Path, ad2kit: Callable[..., Any]) -> None:
    weights = (old_run / "student" / "model.safetensors").read_bytes()
    assert ad2kit("distill", "smoke", "--runs-dir", old_run.parent).code == 0
    assert (old_run / "student" / "model.safetensors").read_bytes() == weights
    assert [path.name for path in old_run.parent.glob("smoke-*")] == [old_run.name]


def test_the_gate_says_the_same_again(old_run: Path, ad2kit: Callable[..., Any]) -> None:
    before = ParityReport.read(old_run / "parity.json")
    (old_run / "parity.json").unlink()
    ad2kit("parity", old_run)
    after = ParityReport.read(old_run / "parity.json")
    assert [verdict.passed for verdict in after.variants] == [True, True, True]
    assert after.teacher_score == before.teacher_score
    assert [verdict.score for verdict in after.variants] == [
        verdict.score for verdict in before.variants
    ]
    assert "0.1.0" in (old_run / "distill.json").read_text()
    ad2kit("report", old_run)


def test_its_bento_says_what_to_do(tmp_path: Path) -> None:
    (bento,) = (path.parent for path in unpacked("bento", tmp_path).glob("**/bento.yaml"))
    with pytest.raises(RunError, match="package its run again: ad2kit package"):
        served(bento, tmp_path).__enter__()
