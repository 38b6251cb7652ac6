"""From a gated run to a published Bento, and that Bento on a machine that has nothing else."""

from __future__ import annotations

import json
import re
import shutil
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import bentoml
import pytest

from ad2kit.exporting.classifier import OnnxClassifier
from ad2kit.exporting.golden import GOLDEN_FILE
from ad2kit.exporting.records import OnnxArtifact
from ad2kit.gate.records import BentoRecord
from ad2kit.packaging import bento as stage
from ad2kit.packaging import check
from ad2kit.packaging.bento import copy_package, package, pinned_requirements, served
from ad2kit.packaging.check import ask, fetch
from ad2kit.run.errors import GateFailed, ModelError, RunError
from ad2kit.run.files import sha256_of, sha256_of_folder, write_record
from tests.http_client import wait_for

if TYPE_CHECKING:
    from collections.abc import Callable

    from ad2kit.run.folder import RunDir

pytestmark = pytest.mark.slow

HEAVY = ("torch", "transformers", "optimum", "datasets", "accelerate", "onnx", "scikit-learn")


def bento_folder(tag: str) -> Path:
    return Path(bentoml.bentos.get(tag).path)


def published() -> set[str]:
    return {str(bento.tag) for bento in bentoml.bentos.list()}


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def fail_parity(run: RunDir) -> None:
    """Write into parity.json that the first check of every variant failed."""
    report = json.loads(run.parity_report.read_text())
    for verdict in report["variants"]:
        verdict["checks"][0] |= {"value": 1.0, "passed": False}  # expected at most 0
    run.parity_report.write_text(json.dumps(report))


def test_a_run_is_published_with_everything_it_needs(
    packaged: tuple[RunDir, BentoRecord],
) -> None:
    run, record = packaged
    assert record.tag in published()
    assert record == BentoRecord.read(run.bento_record)
    assert record.tag == f"ad2kit-smoke:{record.inputs[:12]}"
    assert (record.variant, record.forced) == ("steady", False)
    assert (record.service_texts, record.service_label_flips) == (100, 0)
    assert record.service_score_gap <= 1e-5
    bento = bento_folder(record.tag)
    assert sha256_of_folder(bento / "src" / "artifact") == sha256_of_folder(run.onnx("steady"))
    lineage = json.loads((bento / "src" / "lineage.json").read_text())
    assert lineage["recipe"]["name"] == "smoke"
    assert lineage["parity"]["forced"] is False
    assert lineage["requirements"] == pinned_requirements()
    manifest = json.loads((bento / "src" / "artifact" / OnnxArtifact.file_name).read_text())
    assert manifest["lineage"]["student_sha256"] == lineage["distill"]["student_sha256"]


def test_a_worker_that_does_not_give_the_golden_answers_never_gets_ready(
    packaged: tuple[RunDir, BentoRecord], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, record = packaged
    shutil.copytree(bento_folder(record.tag), tmp_path / "bento")
    artifact = tmp_path / "bento" / "src" / "artifact"
    golden, manifest = artifact / GOLDEN_FILE, artifact / OnnxArtifact.file_name
    examples = json.loads(golden.read_text())
    expected = OnnxClassifier(run.onnx("steady"), threads=1)
    for example in examples:
        (answer,) = expected.predict([example["text"]])
        assert example["answer"] == json.loads(json.dumps(answer.as_dict()))
    scores = examples[-1]["answer"]["scores"]
    examples[-1]["answer"]["scores"] = {name: 1 - score for name, score in scores.items()}
    golden.write_text(json.dumps(examples))
    facts = OnnxArtifact.read(manifest)
    files = facts.files | {GOLDEN_FILE: sha256_of(golden)}
    write_record(manifest, facts.model_copy(update={"files": files}))

    def wait_until_refused(_process: object, _address: str, log: Path) -> None:
        wait_for(lambda: re.search(r"the golden text .* is answered", log.read_text()))

    monkeypatch.setattr(stage, "_wait_until_ready", wait_until_refused)
    with served(tmp_path / "bento", tmp_path) as address, pytest.raises(OSError):  # noqa: PT011
        fetch(f"{address}/readyz", timeout_s=2)


def test_packaging_again_builds_nothing(
    packaged: tuple[RunDir, BentoRecord], monkeypatch: pytest.MonkeyPatch
) -> None:
    run, record = packaged
    created = bentoml.bentos.get(record.tag).creation_time

    def unwanted(*_: object) -> None:
        pytest.fail("it was built again")

    monkeypatch.setattr(stage, "_build", unwanted)
    assert package(run) == record
    assert bentoml.bentos.get(record.tag).creation_time == created


def test_other_code_makes_another_bento(
    packaged: tuple[RunDir, BentoRecord], monkeypatch: pytest.MonkeyPatch
) -> None:
    run, record = packaged

    def copy_of_other_code(folder: Path) -> None:
        copy_package(folder)
        (folder / "fixed.py").touch()

    def stop(_context: Path, _store: Path, tag: str, _environment: object) -> Path:
        raise RunError(tag, hint="")

    monkeypatch.setattr(stage, "copy_package", copy_of_other_code)
    monkeypatch.setattr(stage, "_build", stop)
    with pytest.raises(RunError) as built:
        package(run)
    assert built.value.message.startswith("ad2kit-smoke:")
    assert built.value.message != record.tag


def test_a_bento_of_a_killed_run_is_replaced(
    packaged: tuple[RunDir, BentoRecord], copied_run: RunDir
) -> None:
    # The Bento is published, but the process died before it wrote bento.json.
    _, record = packaged
    created = bentoml.bentos.get(record.tag).creation_time
    assert not copied_run.bento_record.exists()
    assert package(copied_run) == record
    assert bentoml.bentos.get(record.tag).creation_time > created


def test_a_run_that_failed_its_gate_is_packaged_only_by_force_and_says_so(
    copied_run: RunDir,
) -> None:
    fail_parity(copied_run)
    before = published()
    for variant in (None, "fp32"):
        with pytest.raises(GateFailed, match="has not passed parity") as refused:
            package(copied_run, variant=variant)
        assert "--allow-failed-parity" in refused.value.hint
    assert published() == before
    assert not copied_run.bento_record.exists()

    record = package(copied_run, variant="fp32", allow_failed_parity=True)
    assert (record.variant, record.forced) == ("fp32", True)
    lineage = json.loads((bento_folder(record.tag) / "src" / "lineage.json").read_text())
    assert lineage["parity"]["forced"] is True
    checks = [verdict["checks"][0] for verdict in lineage["parity"]["variants"]]
    assert not any(check["passed"] for check in checks)


def edit_manifest(folder: Path) -> None:
    path = folder / OnnxArtifact.file_name
    path.write_text(path.read_text() + "\n")


@pytest.mark.parametrize(
    ("damage", "error", "message"),
    [
        pytest.param(
            lambda folder: flip_a_bit(folder / "model.onnx"), ModelError, "sha256", id="graph"
        ),
        pytest.param(
            lambda folder: flip_a_bit(folder / "tokenizer.json"),
            ModelError,
            "sha256",
            id="tokenizer",
        ),
        pytest.param(edit_manifest, GateFailed, "changed after it was judged", id="manifest"),
    ],
)
def test_an_artefact_that_is_not_the_one_that_was_judged_is_refused(
    copied_run: RunDir,
    damage: Callable[[Path], None],
    error: type[Exception],
    message: str,
) -> None:
    before = published()
    damage(copied_run.onnx("int8"))
    with pytest.raises(error, match=message):
        package(copied_run, variant="int8")
    assert published() == before
    assert not copied_run.bento_record.exists()


def test_what_is_set_for_another_service_does_not_reach_the_one_that_is_tried(
    copied_run: RunDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AD2KIT_API_KEYS", "of-another-service")
    monkeypatch.setenv("AD2KIT_SHADOW", "/nowhere")
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")  # nobody listens there
    monkeypatch.delenv("no_proxy", raising=False)
    record = package(copied_run)
    assert (record.service_texts, record.service_label_flips) == (100, 0)
    # BentoML makes its folder for its own user alone.
    like = copied_run.path.stat().st_mode
    bento = bento_folder(record.tag)
    for path in (bento, *bento.rglob("*")):
        mode = path.stat().st_mode
        assert (mode | like & (0o555 if path.is_dir() else 0o444)) == mode, path


def test_force_does_not_reach_a_damaged_file(copied_run: RunDir) -> None:
    fail_parity(copied_run)
    flip_a_bit(copied_run.onnx("int8") / "model.onnx")
    with pytest.raises(ModelError, match="sha256"):
        package(copied_run, variant="int8", allow_failed_parity=True)


def test_a_service_that_answers_something_else_is_not_published(
    copied_run: RunDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = 0

    def ask_another(address: str, texts: list[Any], key: str | None) -> list[dict[str, Any]]:
        nonlocal asked
        asked += 1
        (answer,) = ask(address, texts, key)
        if asked == 50:  # one score of one text out of a hundred
            answer["scores"]["negative"] += 1e-4
        return [answer]

    monkeypatch.setattr(check, "ask", ask_another)
    copied_run.recipe_file.write_text(
        copied_run.recipe_file.read_text().replace('"name": "smoke"', '"name": "unpublished"')
    )
    with pytest.raises(GateFailed, match=r"0 label flips and a score gap of 1\.0e-04 on 100 texts"):
        package(copied_run)
    assert not any(tag.startswith("ad2kit-unpublished") for tag in published())
    assert not copied_run.bento_record.exists()


def test_what_is_missing_or_unknown_is_named(copied_run: RunDir) -> None:
    with pytest.raises(RunError, match=r"no variant 'int4'.* fp32, fused, steady, int8"):
        package(copied_run, variant="int4")
    copied_run.parity_report.unlink()
    with pytest.raises(RunError, match=r"no parity\.json yet") as refused:
        package(copied_run)
    assert "ad2kit parity" in refused.value.hint


def test_the_requirements_are_pinned_and_light() -> None:
    requirements = pinned_requirements()
    pins = dict(requirement.split("==") for requirement in requirements)  # each with one ==
    assert len(pins) == len(requirements)
    assert not {*HEAVY, "ad2kit", "pytest"} & set(pins)
    assert {"bentoml", "tokenizers", "numpy", "pydantic", "uvloop", "httptools"} <= set(pins)
    assert {"onnxruntime", "onnxruntime-gpu"} & set(pins)
    for name, version in pins.items():
        assert metadata.version(name).split("+")[0] == version


def test_a_bento_answers_with_the_code_that_it_was_made_with(
    packaged: tuple[RunDir, BentoRecord], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, record = packaged
    other = tmp_path / "installed" / "ad2kit"  # another version of ad2kit where it is served
    other.mkdir(parents=True)
    (other / "__init__.py").write_text("raise ImportError('the other version was imported')")
    monkeypatch.setenv("PYTHONPATH", str(other.parent))
    with served(bento_folder(record.tag), tmp_path) as address:
        assert ask(address, ["never dull"])
