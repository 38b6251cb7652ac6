"""What `ad2kit push` uploads, as a hub on this machine receives it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from huggingface_hub import ModelCard

from ad2kit.data.splits import load_data
from ad2kit.exporting.classifier import OnnxClassifier
from ad2kit.exporting.records import OnnxArtifact
from ad2kit.gate.records import ParityReport
from tests.hub import MEMBER, STRANGER, ad2kit, environment, serving_hub
from tests.unit.test_classifier import fail_parity

if TYPE_CHECKING:
    import subprocess
    from collections.abc import Iterator
    from pathlib import Path

    from ad2kit.run.folder import RunDir
    from tests.hub import Hub

REPOSITORY = "someone/reviews"


@pytest.fixture
def hub() -> Iterator[Hub]:
    with serving_hub() as served:
        yield served


def push(
    run: RunDir, *arguments: str, endpoint: str, key: str = MEMBER
) -> subprocess.CompletedProcess[str]:
    """Run the command in a process of its own."""
    env = environment(endpoint, run.path / "home", HF_TOKEN=key)
    return ad2kit("push", REPOSITORY, run.path, *arguments, env=env, cwd=run.path.parent)


def test_what_passed_is_uploaded_whole_with_a_card(
    copied_run: RunDir, hub: Hub, tmp_path: Path
) -> None:
    done = push(copied_run, "--private", endpoint=hub.address)
    page = f"{hub.address}/{REPOSITORY}"
    assert (done.returncode, done.stdout.strip()) == (0, page), done.stderr
    assert hub.created == [("someone/reviews", True)]
    repository = hub.repository("models", REPOSITORY)
    files = repository.commits[repository.refs["main"]]
    assert files.pop(".gitattributes")  # the hub's own
    folder = copied_run.onnx("steady")  # the smallest, as smoke wants it
    assert set(files) == {path.name for path in folder.iterdir()} | {"README.md", "parity.json"}
    for path in folder.iterdir():
        assert files[path.name] == path.read_bytes()
    received = tmp_path / "received"
    received.mkdir()
    for name, content in files.items():
        (received / name).write_bytes(content)
    ours, theirs = (
        OnnxClassifier(each, threads=1).predict(["fine"]) for each in (folder, received)
    )
    assert theirs == ours

    card = ModelCard.load(received / "README.md")
    assert card.data.pipeline_tag == "text-classification"
    verdict = ParityReport.read(copied_run.parity_report).variants[-2]
    assert verdict.variant == "steady"
    assert f"| steady (ONNX) | {verdict.score:.4f} | {verdict.retained:.2%} |" in card.text
    for check in verdict.checks:
        row = (check.name, check.measured, check.expected, "passed")
        assert f"| {' | '.join(row)} |" in card.text
    sha256 = OnnxArtifact.read(folder / OnnxArtifact.file_name).lineage["student_sha256"]
    assert sha256 in card.text
    everything = b"".join(files.values()).decode(errors="replace")
    rows = load_data(copied_run.recipe.data, copied_run.recipe.seed).validation.texts
    assert not [text for (text,) in rows if len(text) > 20 and text in everything]


def test_what_failed_its_gate_stays_here(copied_run: RunDir, hub: Hub) -> None:
    fail_parity(copied_run, "int8")
    refused = push(copied_run, "--variant", "int8", endpoint=hub.address)
    assert refused.returncode == 1
    assert "int8" in refused.stderr
    assert "has not passed parity" in refused.stderr
    assert not hub.created


@pytest.mark.parametrize(
    ("trouble", "said"),
    [
        ("token", "401"),
        ("rights", "don't have the rights"),
        ("network", "Connection"),
        ("quota", "Error while uploading 'model.onnx'"),
    ],
)
def test_a_hub_that_refuses_or_is_not_there(
    copied_run: RunDir, hub: Hub, trouble: str, said: str
) -> None:
    endpoint = "http://127.0.0.1:9" if trouble == "network" else hub.address
    key = {"token": "hf_wrong", "rights": STRANGER}.get(trouble, MEMBER)
    hub.full = trouble == "quota"
    refused = push(copied_run, endpoint=endpoint, key=key)
    assert refused.returncode == 2, refused.stderr
    assert f"cannot push to '{REPOSITORY}' on {endpoint}" in refused.stderr
    assert said in refused.stderr
    assert f"copy the folder {copied_run.onnx('steady')}" in refused.stderr
    assert "Traceback" not in refused.stderr
