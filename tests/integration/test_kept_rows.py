"""A training that reads rows, tokens and logits from files ends with the same bits."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ad2kit.data import reading, splits
from ad2kit.run.files import sha256_of
from ad2kit.run.folder import open_run
from ad2kit.training.distill import distill

if TYPE_CHECKING:
    from pathlib import Path

    import pytest

    from ad2kit.run.folder import RunDir
    from ad2kit.run.recipe import Recipe


def test_the_weights_are_the_same(
    finished_run: RunDir, quick_recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reading, "LARGE_BYTES", 0)
    monkeypatch.setattr(splits, "LARGE_ROWS", 0)
    run = open_run(quick_recipe, tmp_path)
    report = distill(run)
    assert len(list(run.shared.glob("tables/*/train.arrow"))) == 1
    assert len(list(run.shared.glob("tokens/*/tokens.arrow"))) == 1  # one tokenizer, one split
    for name in ("teacher/model.safetensors", "student/model.safetensors"):
        assert sha256_of(run.path / name) == sha256_of(finished_run.path / name)
    assert sha256_of(run.select_logits) == sha256_of(finished_run.select_logits)
    plain = type(report).read(finished_run.distill_report)
    assert (report.inputs, report.splits) == (plain.inputs, plain.splits)
    assert [path.name for path in run.shared.glob("logits/*")] == [
        path.name for path in finished_run.shared.glob("logits/*")
    ]
