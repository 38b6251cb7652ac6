"""What `ad2kit push` uploads, as a hub on this machine receives it."""

from __future__ import annotations

import base64
import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING, Any

import pytest
from huggingface_hub import ModelCard

from ad2kit.data.splits import load_data
from ad2kit.exporting.classifier import OnnxClassifier
from ad2kit.exporting.records import OnnxArtifact
from ad2kit.gate.records import ParityReport
from tests.unit.test_classifier import fail_parity

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from ad2kit.run.folder import RunDir

REPOSITORY, RIGHT = "someone/reviews", "right"


class Hub(BaseHTTPRequestHandler):
    """As much of the hub's interface as an upload of small files needs."""

    received: dict[str, bytes]
    created: list[dict[str, Any]]

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        address = f"http://{self.headers['Host']}/{REPOSITORY}"
        if self.headers["Authorization"] != f"Bearer {RIGHT}":
            self.answer(401, {"error": "Invalid token"})
        elif self.path == "/api/repos/create":
            self.created.append(json.loads(body))
            self.answer(200, {"url": address})
        elif self.path == "/api/validate-yaml":
            self.answer(200, {"errors": [], "warnings": []})
        elif self.path.startswith(f"/api/models/{REPOSITORY}/preupload/"):
            files = [
                {"path": file["path"], "uploadMode": "regular", "shouldIgnore": False}
                for file in json.loads(body)["files"]
            ]
            self.answer(200, {"files": files})
        elif self.path.startswith(f"/api/models/{REPOSITORY}/commit/"):
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    content = base64.b64decode(line["value"]["content"])
                    self.received[line["value"]["path"]] = content
            commit = {"commitUrl": f"{address}/commit/0", "commitOid": "0", "pullRequestUrl": None}
            self.answer(200, commit)
        else:
            self.answer(404, {"error": self.path})

    def do_GET(self) -> None:
        self.answer(404, {"error": self.path})

    def answer(self, status: int, content: dict[str, Any]) -> None:
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        """Say nothing."""


@pytest.fixture
def hub() -> Iterator[tuple[str, type[Hub]]]:
    class Fresh(Hub):
        pass

    Fresh.received, Fresh.created = {}, []
    server = ThreadingHTTPServer(("127.0.0.1", 0), Fresh)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}", Fresh
    server.shutdown()
    server.server_close()


def push(
    run: RunDir, *arguments: str, endpoint: str, key: str = RIGHT
) -> subprocess.CompletedProcess[str]:
    """Run the command in a process of its own: the hub's library reads its address on import."""
    return subprocess.run(
        [sys.executable, "-m", "ad2kit", "push", REPOSITORY, str(run.path), *arguments],
        env={
            **os.environ,
            "HF_ENDPOINT": endpoint,
            "HF_TOKEN": key,
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        },
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )


def test_what_passed_is_uploaded_whole_with_a_card(
    finished_run: RunDir, hub: tuple[str, type[Hub]], tmp_path: Path
) -> None:
    endpoint, received = hub
    done = push(finished_run, "--private", endpoint=endpoint)
    assert (done.returncode, done.stdout.strip()) == (0, f"{endpoint}/{REPOSITORY}"), done.stderr
    assert received.created == [{"name": "reviews", "organization": "someone", "private": True}]
    files = received.received
    folder = finished_run.onnx("int8")  # the smallest, as smoke wants it
    assert set(files) == {path.name for path in folder.iterdir()} | {"README.md", "parity.json"}
    for path in folder.iterdir():
        assert files[path.name] == path.read_bytes()
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    ours, theirs = (
        OnnxClassifier(each, threads=1).predict(["fine"]) for each in (folder, tmp_path)
    )
    assert theirs == ours

    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.pipeline_tag == "text-classification"
    verdict = ParityReport.read(finished_run.parity_report).variants[-1]
    assert verdict.variant == "int8"
    assert f"| int8 (ONNX) | {verdict.score:.4f} | {verdict.retained:.2%} |" in card.text
    for check in verdict.checks:
        row = (check.name, check.measured, check.expected, "passed")
        assert f"| {' | '.join(row)} |" in card.text
    sha256 = OnnxArtifact.read(folder / OnnxArtifact.file_name).lineage["student_sha256"]
    assert sha256 in card.text
    everything = b"".join(files.values()).decode(errors="replace")
    rows = load_data(finished_run.recipe.data, finished_run.recipe.seed).validation.texts
    assert not [text for (text,) in rows if len(text) > 20 and text in everything]


def test_what_failed_its_gate_stays_here(copied_run: RunDir, hub: tuple[str, type[Hub]]) -> None:
    endpoint, received = hub
    fail_parity(copied_run, "int8")
    refused = push(copied_run, "--variant", "int8", endpoint=endpoint)
    assert refused.returncode == 1
    assert "int8" in refused.stderr
    assert "has not passed parity" in refused.stderr
    assert not received.created


@pytest.mark.parametrize("trouble", ["token", "network"])
def test_a_hub_that_refuses_or_is_not_there(
    finished_run: RunDir, hub: tuple[str, type[Hub]], trouble: str
) -> None:
    endpoint = hub[0] if trouble == "token" else "http://127.0.0.1:9"
    refused = push(finished_run, endpoint=endpoint, key="wrong")
    assert refused.returncode == 2
    assert f"cannot push to '{REPOSITORY}' on {endpoint}" in refused.stderr
    assert f"copy the folder {finished_run.onnx('int8')}" in refused.stderr
    assert "Traceback" not in refused.stderr
