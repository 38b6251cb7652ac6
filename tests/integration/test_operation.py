"""The service for those who operate it: log, stage times, a shadow teacher, traces."""

from __future__ import annotations

import dataclasses
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING, Any

import pytest
from bentoml.exceptions import InvalidArgument

from ad2kit.campaigns.run import export_teacher
from ad2kit.data.splits import load_data
from ad2kit.exporting.classifier import OnnxClassifier
from ad2kit.exporting.records import OnnxArtifact
from ad2kit.gate.records import ParityReport
from ad2kit.run.errors import ModelError
from ad2kit.run.files import write_record
from ad2kit.service.monitoring import Shadow, tracing
from tests.http_client import (
    JSON,
    call,
    check_error,
    classify,
    log_of,
    metrics_of,
    serving,
    wait_for,
)

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from ad2kit.run.folder import RunDir

pytestmark = pytest.mark.slow

SECRET = "a rather unmistakable confession"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("operation")


@pytest.fixture(scope="module")
def operated(finished_run: RunDir, folder: Path) -> Iterator[str]:
    """One worker, with an access log, and the fp32 variant as its own shadow teacher."""
    fp32 = finished_run.onnx("fp32")
    given = (f"model={fp32}", f"shadow={fp32}", "shadow_share=1", "access_log=true", "workers=1")
    with serving(folder, *given) as address:
        yield address


def test_scores_come_when_they_are_asked_for(operated: str) -> None:
    def fields(**more: Any) -> set[str]:
        body = json.dumps({"texts": ["fine"], **more}).encode()
        return set(call(operated, "POST", "/classify", body, JSON).predictions[0])

    assert fields() == fields(scores=False) == {"label", "score", "tokens", "truncated"}
    assert fields(scores=True) == fields() | {"scores"}
    body = b'{"texts": ["fine"], "scores": 1}'
    assert (
        "scores"
        in check_error(call(operated, "POST", "/classify", body, JSON), 422, "invalid_input")[
            "message"
        ]
    )


def test_stage_times_come_on_request_and_add_up(operated: str) -> None:
    body = json.dumps({"texts": ["fine", "not bad at all"]}).encode()
    assert "server-timing" not in call(operated, "POST", "/classify", body, JSON).headers
    reply = call(operated, "POST", "/classify", body, {**JSON, "X-Server-Timing": "1"})
    stages = dict(re.findall(r"(\w+);dur=([\d.]+)", reply.headers["server-timing"]))
    assert list(stages) == ["tokenise", "queue", "inference", "total"]
    ms = {name: float(value) for name, value in stages.items()}
    assert all(value > 0 for value in ms.values())
    assert ms["tokenise"] + ms["queue"] + ms["inference"] <= ms["total"] + 0.01


def test_the_log_is_json_and_holds_numbers_and_no_texts(operated: str, folder: Path) -> None:
    assert classify(operated, [SECRET, "word " * 500]).status == 200
    assert classify(operated, [SECRET, ""]).status == 422
    wait_for(lambda: any(each.get("status") == 422 for each in log_of(folder)))
    records = log_of(folder)
    (ready,) = [each for each in records if each["message"] == "ready"]
    assert (ready["variant"], ready["golden_answers"], ready["level"]) == ("fp32", 3, "INFO")
    answered = [each for each in records if each["message"] == "answered"][-1]
    assert (answered["status"], answered["texts"], answered["truncated"]) == (200, 2, 1)
    assert answered["total_ms"] >= answered["inference_ms"] > 0
    refused = [each for each in records if each["message"] == "refused"][-1]
    assert (refused["status"], refused["reason"]) == (422, "invalid_input")
    classified, refusal = (
        call(operated, "POST", "/classify", body, {**JSON, "X-Request-ID": "mine"})
        for body in (b'{"texts": ["fine"]}', b"{}")
    )
    assert classified.headers["x-request-id"] == refusal.headers["x-request-id"] == "mine"
    wait_for(lambda: sum(each.get("request_id") == "mine" for each in log_of(folder)) == 2)
    assert SECRET not in (folder / "server.log").read_text()


def test_the_shadow_agrees_with_itself_and_counts(operated: str) -> None:
    def compared() -> dict[str, float]:
        found = metrics_of(operated)
        return {
            result: found.get(f'ad2kit_shadow_texts_total{{result="{result}"}}', 0.0)
            for result in ("agreed", "disagreed")
        }

    before = compared()["agreed"]
    assert len(classify(operated, ["fine", "dull", "not dull"]).predictions) == 3
    wait_for(lambda: compared()["agreed"] >= before + 3)
    assert compared()["disagreed"] == 0


def test_the_teacher_is_exported_and_shadows_its_student(
    copied_run: RunDir,
) -> None:
    teacher = export_teacher(copied_run)
    assert teacher.path.parent == copied_run.path
    depth = json.loads((copied_run.teacher / "config.json").read_text())["num_hidden_layers"]
    exported = json.loads((teacher.onnx("fp32") / "config.json").read_text())
    assert exported["num_hidden_layers"] == depth == 4
    verdict = ParityReport.read(teacher.parity_report)
    assert verdict.variants[0].retained == 1.0  # it is its own teacher
    int8 = OnnxArtifact.read(teacher.onnx("int8") / OnnxArtifact.file_name)
    student = OnnxClassifier(copied_run.onnx("fp32"), threads=1)
    found = list[bool | None]()
    shadow = Shadow(
        OnnxClassifier(teacher.onnx(int8.variant), threads=1), student, 1.0, found.append
    )
    texts = [text[0] for text in load_data(copied_run.recipe.data, 0).validation.texts[:50]]
    shadow.offer(texts, student.predict(texts))
    wait_for(lambda: len(found) == len(texts))
    shadow.close()
    assert found.count(True) > found.count(False)
    assert None not in found


class Contrary(OnnxClassifier):
    """A teacher of another opinion, which takes its time."""

    opinion = threading.Event()

    def predict(self, texts: Any, batch_size: int = 32) -> Any:
        assert self.opinion.wait(20)
        first, second = self.labels
        return [
            dataclasses.replace(each, label=second if each.label == first else first)
            for each in super().predict(texts, batch_size)
        ]


def test_a_shadow_counts_what_disagrees_and_leaves_out_what_it_has_no_time_for(
    finished_run: RunDir,
) -> None:
    fp32 = finished_run.onnx("fp32")
    student, found = OnnxClassifier(fp32, threads=1), list[bool | None]()
    texts = ["fine", "not dull"] * 40
    answers = student.predict(texts)
    shadow = Shadow(Contrary(fp32, threads=1), student, 1.0, found.append)
    shadow.offer(texts, answers)  # does not wait for the teacher, which waits for us
    assert found == [None] * len(found)
    assert len(found) in (15, 16)  # 64 wait, and one may be under way
    left_out = len(found)
    Contrary.opinion.set()
    wait_for(lambda: len(found) == len(texts))
    shadow.close()
    assert (found.count(None), found.count(False)) == (left_out, len(texts) - left_out)


def test_a_shadow_that_is_closed_keeps_nobody_waiting(finished_run: RunDir) -> None:
    student, found = OnnxClassifier(finished_run.onnx("fp32"), threads=1), list[bool | None]()
    slow = Contrary(student.folder, threads=1)
    slow.opinion = threading.Event()
    shadow = Shadow(slow, student, 1.0, found.append)
    shadow.offer(["fine"] * 10, student.predict(["fine"] * 10))
    wait_for(lambda: shadow._waiting.qsize() == 9)  # one is under way
    threading.Timer(0.2, slow.opinion.set).start()
    shadow.close()
    assert found == [None] * 9 + [found[-1]]
    assert found[-1] is False


def test_a_shadow_of_some_texts_takes_about_that_share(finished_run: RunDir) -> None:
    student, found = OnnxClassifier(finished_run.onnx("fp32"), threads=1), list[bool | None]()
    shadow = Shadow(student, student, 0.25, found.append)
    answers = student.predict(["fine"])
    for _ in range(400):
        shadow.offer(["fine"], answers)
    wait_for(shadow._waiting.empty)
    shadow.close()
    assert 50 < len(found) < 150  # 5.8 standard deviations


def test_a_shadow_for_another_question_is_refused(copied_run: RunDir) -> None:
    student = OnnxClassifier(copied_run.onnx("fp32"), threads=1)
    manifest = copied_run.onnx("fused") / OnnxArtifact.file_name
    artifact = OnnxArtifact.read(manifest)
    write_record(manifest, artifact.model_copy(update={"labels": ("bad", "good")}))
    teacher = OnnxClassifier(manifest.parent, threads=1)
    with pytest.raises(ModelError, match="'bad', 'good'") as refused:
        Shadow(teacher, student, 1.0, lambda _agreed: None)
    assert "the student's own teacher" in refused.value.hint


@pytest.fixture
def collector() -> Iterator[tuple[str, list[bytes]]]:
    """An OpenTelemetry collector that keeps the bodies of what it is sent."""
    received = list[bytes]()

    class Collector(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            assert self.path == "/v1/traces"
            received.append(self.rfile.read(int(self.headers["Content-Length"])))
            self.send_response(200)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *_: object) -> None:
            """Say nothing."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Collector) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}", received
        server.shutdown()


def test_spans_go_to_the_collector_that_is_named_and_hold_no_text(
    finished_run: RunDir,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    collector: tuple[str, list[bytes]],
) -> None:
    address_of_collector, received = collector
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", address_of_collector)
    monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "100")  # ms
    with serving(tmp_path, f"model={finished_run.onnx('fp32')}", "workers=1") as address:
        assert classify(address, SECRET).status == 200
        assert call(address, "GET", f"/?text={SECRET.replace(' ', '%20')}").status == 200
        wait_for(
            lambda: all(
                any(name in body for body in received) for name in (b"POST /classify", b"GET /")
            )
        )
    spans = b"".join(received)
    assert SECRET.encode() not in spans
    assert b"unmistakable" not in spans


@pytest.mark.parametrize("share", ["2", "half"])
def test_a_share_of_traces_that_is_none_is_refused(
    share: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert tracing() == {"excluded_urls": [".*"]}
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://collector:4318/")
    assert tracing()["otlp"]["endpoint"] == "http://collector:4318/v1/traces"
    monkeypatch.setenv("OTEL_TRACES_SAMPLER_ARG", share)
    with pytest.raises(InvalidArgument, match=f"a number from 0 to 1, found '{share}'"):
        tracing()
