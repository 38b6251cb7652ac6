"""The service over real HTTP: its answers are the artefact's, and its errors have one shape."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
import pytest

from ad2kit.data.splits import load_data
from ad2kit.exporting.classifier import OnnxClassifier
from ad2kit.exporting.records import OnnxArtifact
from ad2kit.gate.records import ParityReport
from ad2kit.packaging.bento import served
from ad2kit.packaging.check import ask, judge_service
from ad2kit.run.errors import GateFailed, RunError, UserError
from ad2kit.run.files import write_record
from tests.http_client import (
    CHECKOUT,
    JSON,
    SERVICE,
    call,
    check_error,
    classify,
    command_of,
    metrics_of,
    refused,
    server_at,
    serving,
    wait_for,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

    from ad2kit.exporting.classifier import Prediction
    from ad2kit.run.folder import RunDir

pytestmark = pytest.mark.slow

TOLERANCE = 1e-5
MEBIBYTE = 2**20
CLIENTS = 40

# The service as it is, but short of time and room, and with texts that make trouble.
STRAINED = """
import time
from pathlib import Path

from serving import service

service.settings = service.settings.model_copy(update={"deadline_s": 1.0, "max_queue_texts": 2})
honest_run = service.OnnxClassifier.run


def run(self, encodings):
    text = " ".join(self.tokenizer.decode(encoding.ids) for encoding in encodings)
    if "disaster" in text:
        raise RuntimeError("our insides")
    if "dull" in text:
        time.sleep(2.5)
    if "awkward" in text:
        Path("busy").touch()
        time.sleep(0.6)
    return honest_run(self, encodings)


service.OnnxClassifier.run = run
Ad2kitClassifier = service.Ad2kitClassifier
"""


def check_prediction(found: dict[str, Any], expected: Prediction) -> None:
    assert set(found) == {"label", "score", "scores", "tokens", "truncated"}
    assert found["label"] == expected.label
    assert found["score"] == pytest.approx(expected.score, abs=TOLERANCE)
    assert found["scores"] == pytest.approx(expected.scores, abs=TOLERANCE)
    assert (found["tokens"], found["truncated"]) == (expected.tokens, expected.truncated)


@pytest.fixture(scope="module")
def fp32(finished_run: RunDir) -> OnnxClassifier:
    return OnnxClassifier(finished_run.onnx("fp32"), threads=1)


@pytest.fixture(scope="module")
def service(finished_run: RunDir, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The fp32 variant: int8 answers hang on what else is in the batch."""
    folder, model = tmp_path_factory.mktemp("service"), finished_run.onnx("fp32")
    with serving(folder, f"model={model}") as address:
        yield address


@pytest.fixture(scope="module")
def strained_folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("strained")
    (folder / "strained.py").write_text(STRAINED)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(CHECKOUT))
        yield folder


@pytest.fixture(scope="module")
def strained(strained_folder: Path, finished_run: RunDir) -> Iterator[str]:
    # One worker: which of several gets a connection is not for a test to say.
    arguments = (
        "--working-dir",
        str(strained_folder),
        "--arg=workers=1",
        f"--arg=model={finished_run.path}",
    )
    with served("strained:Ad2kitClassifier", strained_folder, *arguments) as address:
        yield address


@pytest.fixture(scope="module")
def texts(finished_run: RunDir, fp32: OnnxClassifier) -> list[str]:
    """As many texts as clients, whose answers no two can be taken for each other."""
    validation = load_data(finished_run.recipe.data, finished_run.recipe.seed).validation
    chosen: dict[str, float] = {}
    for text, prediction in zip(
        (text[0] for text in validation.texts),
        fp32.predict([text[0] for text in validation.texts]),
        strict=True,
    ):
        score = prediction.scores[fp32.labels[0]]
        if all(abs(score - other) > 4 * TOLERANCE for other in chosen.values()):
            chosen[text] = score
    assert len(chosen) >= CLIENTS
    return list(chosen)[:CLIENTS]


def test_a_single_text_is_answered_as_the_artefact_answers_it(
    service: str, fp32: OnnxClassifier, texts: list[str]
) -> None:
    expected = fp32.predict(texts, batch_size=1)
    for text, prediction in zip(texts, expected, strict=True):
        (found,) = classify(service, [text]).predictions
        check_prediction(found, prediction)
    check_prediction(classify(service, texts[0]).predictions[0], expected[0])  # not in a list


def test_a_list_is_answered_in_its_order(
    service: str, fp32: OnnxClassifier, texts: list[str]
) -> None:
    many = [*texts, *texts[::-1], *texts][:128]
    found = classify(service, many).predictions
    for each, prediction in zip(found, fp32.predict(many), strict=True):
        check_prediction(each, prediction)


def test_concurrent_clients_get_their_own_answers(
    service: str, fp32: OnnxClassifier, texts: list[str]
) -> None:
    together = threading.Barrier(CLIENTS)

    def client(number: int) -> list[dict[str, Any]]:
        found = []
        for turn in range(5):
            together.wait(60)
            found += classify(
                service, [texts[number], texts[(number + turn) % CLIENTS]]
            ).predictions
        return found

    with ThreadPoolExecutor(CLIENTS) as pool:
        answers = list(pool.map(client, range(CLIENTS)))
    expected = fp32.predict(texts, batch_size=1)
    for number, found in enumerate(answers):
        for turn in range(5):
            check_prediction(found[2 * turn], expected[number])
            check_prediction(found[2 * turn + 1], expected[(number + turn) % CLIENTS])


@pytest.mark.parametrize(
    "text",
    [
        pytest.param("not dull 🎉👩\u200d👩\u200d👧", id="emoji"),
        pytest.param("not\0dull", id="zero byte"),
        pytest.param("\u202eלא משעמם بكل تأكيد", id="right to left"),
        pytest.param("\u200b.", id="nearly only a zero-width space"),
        pytest.param(
            "\uff4e\uff4f\uff54 dull e\u0301\u0301\u0301", id="wide letters, stacked accents"
        ),
        pytest.param('{"texts": ["\\u0000"]}', id="JSON in JSON"),
    ],
)
def test_any_unicode_is_answered(service: str, fp32: OnnxClassifier, text: str) -> None:
    (found,) = classify(service, [text]).predictions
    check_prediction(found, fp32.predict([text])[0])


def test_a_very_long_text_is_cut_and_says_so(service: str, fp32: OnnxClassifier) -> None:
    text = ("not dull, " * 10_000)[:100_000]
    (found,) = classify(service, [text]).predictions
    assert found["truncated"] is True
    assert found["tokens"] == fp32.artifact.max_length_tokens
    check_prediction(found, fp32.predict([text])[0])


def test_info_says_what_is_served(service: str, fp32: OnnxClassifier) -> None:
    reply = call(service, "GET", "/info")
    assert reply.status == 200
    info = reply.json
    assert info["variant"] == "fp32"
    assert info["labels"] == list(fp32.labels)
    assert info["max_length_tokens"] == fp32.artifact.max_length_tokens
    assert info["limits"] == {
        "texts": 128,
        "text_characters": 2**26,
        "key_requests_per_s": None,
        "queue_texts": 1024,
        "queue_tokens": 2**17,
        "batch_tokens": 1024,
        "deadline_s": 10.0,
        "body_bytes": MEBIBYTE,
        "held_bytes": 24 * MEBIBYTE,
        "header_bytes": 2**14,
        "headers": 100,
        "connections": 4096,
        "connection_requests": 1000,
        "header_timeout_s": 10.0,
        "body_timeout_s": 30.0,
        "write_timeout_s": 30.0,
        "keep_alive_s": 5.0,
    }
    assert info["lineage"] == fp32.artifact.lineage
    assert len(info["lineage"]["student_sha256"]) == 64
    # The artefact says itself what it passed, wherever it is moved to.
    verdict = ParityReport.read(fp32.folder / ParityReport.file_name)
    assert info["parity"] == verdict.model_dump(mode="json")
    assert verdict.passed


@pytest.mark.parametrize("path", ["/livez", "/readyz", "/healthz"])
def test_health_is_answered(service: str, path: str) -> None:
    assert call(service, "GET", path).status == 200


def test_metrics_count_requests(service: str) -> None:
    assert classify(service, ["fine", "word " * 500]).status == 200
    assert classify(service, "").status == 422
    reply = call(service, "GET", "/metrics")
    assert reply.status == 200
    lines = reply.body.decode().splitlines()
    found = {
        name: float(value)
        for name, _, value in (line.rpartition(" ") for line in lines)
        if not name.startswith("#")
    }
    assert found['ad2kit_requests_total{status="200"}'] >= 1
    assert found['ad2kit_requests_total{status="422"}'] >= 1
    assert found['ad2kit_rejected_total{reason="invalid_input"}'] >= 1
    answered = sum(v for name, v in found.items() if name.startswith("ad2kit_predictions_total"))
    assert answered == found["ad2kit_score_count"] == found["ad2kit_batch_texts_sum"] >= 2
    assert found["ad2kit_queue_seconds_count"] == answered
    assert found["ad2kit_truncated_texts_total"] >= 1
    assert {found["ad2kit_queue_texts"], found["ad2kit_queue_tokens"]} == {0.0}
    assert 'ad2kit_request_seconds_bucket{le="0.0005"}' in found


@pytest.mark.parametrize(
    ("body", "status", "kind", "said"),
    [
        pytest.param(b"{", 400, "malformed_request", "JSON", id="malformed"),
        pytest.param(b'{"texts": ["\xff"]}', 400, "malformed_request", "JSON", id="not UTF-8"),
        pytest.param(
            b'{"texts": ["\\ud800"]}', 400, "malformed_request", "JSON", id="lone surrogate"
        ),
        pytest.param(b"", 400, "malformed_request", "JSON", id="no body"),
        pytest.param(b'{"texts": [NaN]}', 422, "invalid_input", "texts", id="NaN"),
        pytest.param(
            b'{"texts": ' + 50_000 * b"[", 400, "malformed_request", "JSON", id="deeply nested"
        ),
        pytest.param(b"{}", 422, "invalid_input", "texts", id="no texts"),
        pytest.param(b"[]", 422, "invalid_input", "object", id="not an object"),
        pytest.param(
            b'{"texts": ["a"], "text": 1}', 422, "invalid_input", "'text'", id="unknown field"
        ),
        pytest.param(b'{"texts": 5}', 422, "invalid_input", "texts", id="wrong type"),
        pytest.param(b'{"texts": [null]}', 422, "invalid_input", "texts", id="null"),
        pytest.param(b'{"texts": []}', 422, "invalid_input", "at least 1", id="empty list"),
        pytest.param(b'{"texts": ["a", ""]}', 422, "invalid_input", "text 1", id="empty text"),
        pytest.param(b'{"texts": " "}', 422, "invalid_input", "visible", id="blank text"),
        pytest.param(
            '{"texts": ["a", "\u200b\ufeff"]}'.encode(),
            422,
            "invalid_input",
            "text 1: ",
            id="invisible text",
        ),
        pytest.param(b'{"texts": [["a", "b"]]}', 422, "invalid_input", "text 0", id="a pair"),
        pytest.param(
            b'{"texts": [["a", "b", "c"]]}', 422, "invalid_input", "found 3 texts", id="three"
        ),
        pytest.param(
            json.dumps({"texts": ["a"] * 129}).encode(),
            413,
            "too_large",
            "at most 128",
            id="too many texts",
        ),
    ],
)
def test_an_invalid_body_is_refused(
    service: str, body: bytes, status: int, kind: str, said: str
) -> None:
    error = check_error(call(service, "POST", "/classify", body, JSON), status, kind)
    assert said in error["message"]


@pytest.mark.parametrize("headers", [{}, {"Content-Type": "text/plain"}], ids=["none", "text"])
def test_a_body_not_declared_as_json_is_refused(service: str, headers: dict[str, str]) -> None:
    reply = call(service, "POST", "/classify", b'{"texts": ["a"]}', headers)
    check_error(reply, 415, "unsupported_media_type")


def body_of(size: int) -> bytes:
    frame = b'{"texts": [""]}'
    return frame.replace(b'""', b'"' + b"a" * (size - len(frame)) + b'"')


def chunks_of(body: bytes) -> Iterator[bytes]:
    for start in range(0, len(body), 2**16):
        yield body[start : start + 2**16]


def test_a_body_of_just_the_limit_is_read(service: str) -> None:
    body = body_of(MEBIBYTE)
    assert len(body) == MEBIBYTE
    assert len(call(service, "POST", "/classify", body, JSON).predictions) == 1
    assert len(call(service, "POST", "/classify", chunks_of(body), JSON).predictions) == 1


def test_a_body_over_the_limit_is_refused(service: str) -> None:
    body = body_of(MEBIBYTE + 1)
    check_error(call(service, "POST", "/classify", body, JSON), 413, "too_large")
    # Without a Content-Length only counting what arrives can notice.
    check_error(call(service, "POST", "/classify", chunks_of(body), JSON), 413, "too_large")
    # With one, nothing of the body needs to arrive.
    announced = {**JSON, "Content-Length": str(100 * MEBIBYTE)}
    check_error(call(service, "POST", "/classify", b"", announced), 413, "too_large")
    assert classify(service, "still there").predictions


@pytest.mark.parametrize(
    ("method", "path", "status", "kind"),
    [
        ("GET", "/nowhere", 404, "not_found"),
        ("POST", "/nowhere", 404, "not_found"),
        ("GET", "/classify", 405, "method_not_allowed"),
        ("PUT", "/classify", 405, "method_not_allowed"),
        ("POST", "/info", 405, "method_not_allowed"),
    ],
)
def test_a_wrong_path_or_method_is_refused(
    service: str, method: str, path: str, status: int, kind: str
) -> None:
    body = None if method == "GET" else b'{"texts": ["a"]}'
    check_error(call(service, method, path, body, JSON), status, kind)


def test_more_texts_than_the_queue_holds_are_put_off(strained: str) -> None:
    tokenised = metrics_of(strained)["ad2kit_tokenise_seconds_count"]
    for size in (1, 5000):  # in the event loop, and beside it
        reply = classify(strained, ["fine " * size] * 3)
        check_error(reply, 429, "overloaded")
        assert reply.headers["retry-after"] == "1"
    # They were refused for their number, before anything was spent on them.
    assert metrics_of(strained)["ad2kit_tokenise_seconds_count"] == tokenised
    assert len(classify(strained, ["fine", "fine"]).predictions) == 2


def test_a_failure_inside_is_told_without_our_insides(strained: str) -> None:
    reply = classify(strained, "a disaster")
    check_error(reply, 500, "internal")
    assert b"insides" not in reply.body
    assert classify(strained, "fine").predictions


def test_an_answer_that_takes_too_long_is_given_up(strained: str) -> None:
    start = time.monotonic()
    check_error(classify(strained, "dull"), 504, "deadline")
    assert time.monotonic() - start < 2.4  # it did not wait for the engine
    while classify(strained, "fine").status == 504:  # the engine is still at it
        assert time.monotonic() - start < 30
    assert classify(strained, "fine").predictions


def test_a_stop_answers_what_is_under_way(strained_folder: Path, finished_run: RunDir) -> None:
    busy = strained_folder / "busy"
    busy.unlink(missing_ok=True)
    # One worker: which of several gets a connection is not for a test to say.
    arguments = (
        "--working-dir",
        str(strained_folder),
        "--arg=workers=1",
        f"--arg=model={finished_run.path}",
    )
    with ThreadPoolExecutor(1) as pool:
        with served("strained:Ad2kitClassifier", strained_folder, *arguments) as address:
            reply = pool.submit(classify, address, "awkward")
            end = time.monotonic() + 30
            while not busy.exists():
                assert time.monotonic() < end
                time.sleep(0.01)
        assert len(reply.result().predictions) == 1


def test_the_latest_run_that_passed_is_served_by_its_smallest_variant(
    finished_run: RunDir, tmp_path_factory: pytest.TempPathFactory, texts: list[str]
) -> None:
    steady = OnnxClassifier(finished_run.onnx("steady"), threads=1)
    folder = tmp_path_factory.mktemp("latest")
    with serving(folder, f"runs_dir={finished_run.path.parent}") as address:
        assert call(address, "GET", "/info").json["variant"] == "steady"
        for text, prediction in zip(texts, steady.predict(texts, batch_size=1), strict=True):
            (found,) = classify(address, [text]).predictions
            check_prediction(found, prediction)


def test_a_service_of_nothing_ends_at_once_and_says_why(tmp_path: Path) -> None:
    with (
        pytest.raises(RunError, match=f"no run under {tmp_path} has .* make one with `ad2kit run"),
        serving(tmp_path, f"runs_dir={tmp_path}"),
    ):
        pass


TEXTS = "?text=fine&text=%3Cb%3Edull%3C/b%3E%20beyond%20measure"


def test_the_page_shows_answers_as_text_and_asks_nobody_else(
    service: str, fp32: OnnxClassifier, browser: Any
) -> None:
    budget, shown = "--virtual-time-budget=5000", ""
    for options in ((), ("--window-size=360,800",), ("--force-dark-mode",)):
        shown, console = browser(f"{service}/{TEXTS}", budget, *options)
        assert console == []
    for text in ("fine", "<b>dull</b> beyond measure"):
        (answer,) = fp32.predict([text])
        assert f"<strong>{answer.label}</strong>" in shown
        for score in answer.scores.values():
            assert f"<span>{100 * score:.1f} %</span>" in shown
        assert f"{answer.tokens} tokens" in shown
    assert "&lt;b&gt;dull&lt;/b&gt; beyond measure" in shown
    assert "2 texts in " in shown
    assert "<td>parity gate</td><td>passed</td>" in shown
    assert "connect-src 'self'" in call(service, "GET", "/").headers["content-security-policy"]
    for page in (call(service, "GET", "/").body, shown.encode()):
        assert b"http://" not in page.replace(service.encode(), b"")
        assert b"https://" not in page
    empty, _ = browser(f"{service}/?text=%20", budget)
    assert "Type a text first." in empty


def test_without_a_valid_key_nothing_but_health_and_metrics_answers(
    finished_run: RunDir, tmp_path_factory: pytest.TempPathFactory
) -> None:
    keys = tmp_path_factory.mktemp("keys") / "keys"
    keys.write_text("old-key\nnew-key\n")
    int8 = finished_run.onnx("int8")
    with serving(keys.parent, f"model={int8}", f"api_keys_file={keys}") as address:
        body = json.dumps({"texts": "fine"}).encode()
        for key in ("old-key", "new-key"):  # both, while clients change over
            headers = {**JSON, "Authorization": f"Bearer {key}"}
            assert call(address, "POST", "/classify", body, headers).status == 200
        for headers in (
            JSON,
            {**JSON, "Authorization": "Bearer old-ke"},
            {**JSON, "Authorization": "Basic old-key"},
        ):
            refused = call(address, "POST", "/classify", body, headers)
            check_error(refused, 401, "unauthorized")
            assert refused.headers["www-authenticate"] == "Bearer"
        check_error(call(address, "GET", "/info"), 401, "unauthorized")
        for path in ("/", "/livez", "/readyz", "/metrics"):
            assert call(address, "GET", path).status == 200


@pytest.mark.parametrize("keys", ["absent file", "empty file", "empty variable"])
def test_keys_that_went_wrong_open_nothing(
    keys: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = [f"--arg=api_keys_file={tmp_path / 'keys'}"]
    if keys == "empty file":
        (tmp_path / "keys").write_text(" \n")
    elif keys == "empty variable":
        monkeypatch.setenv("AD2KIT_API_KEYS", " , ")
        arguments = []
    said = refused(SERVICE, "--working-dir", str(CHECKOUT), *arguments)
    assert "key a line" in said


@pytest.mark.parametrize("argument", ["model", "shadow"])
def test_a_folder_that_is_no_model_starts_no_worker(argument: str, tmp_path: Path) -> None:
    argument = f"--arg={argument}={tmp_path}"
    said = refused(SERVICE, "--working-dir", str(CHECKOUT), argument)
    assert "neither a run folder nor an exported variant" in said
    assert "give runs/NAME" in said


def test_a_client_that_leaves_costs_no_inference(strained: str, strained_folder: Path) -> None:
    def counted() -> float:
        text = call(strained, "GET", "/metrics").body.decode()
        (line,) = [each for each in text.splitlines() if each.startswith("ad2kit_batch_texts_sum")]
        return float(line.split()[1])

    (strained_folder / "busy").unlink(missing_ok=True)
    before = counted()
    with ThreadPoolExecutor(1) as pool:
        busy = pool.submit(classify, strained, "awkward")
        end = time.monotonic() + 30
        while not (strained_folder / "busy").exists():
            assert time.monotonic() < end
            time.sleep(0.01)
        host, port = strained.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port))) as leaving:
            body = json.dumps({"texts": "fine"}).encode()
            head = "POST /classify HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
            leaving.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
            time.sleep(0.2)
        assert busy.result().status == 200
    assert classify(strained, "fine").status == 200
    assert counted() == before + 2  # the one that left was never computed
    told = call(strained, "GET", "/metrics").body.decode()
    assert 'ad2kit_rejected_total{reason="client_gone"} 1.0' in told


def test_parity_asks_a_running_service(
    service: str, finished_run: RunDir, copied_run: RunDir
) -> None:
    found = judge_service(finished_run, service)
    assert (found.texts, found.flips) == (100, 0)
    found.check_same("never said")
    # The same service beside a run whose artefact is another one.
    artifact = OnnxArtifact.read(copied_run.onnx("fp32") / OnnxArtifact.file_name)
    write_record(
        copied_run.onnx("fp32") / OnnxArtifact.file_name,
        artifact.model_copy(update={"labels": artifact.labels[::-1]}),
    )
    other = judge_service(copied_run, service)
    assert other.flips == 100
    with pytest.raises(GateFailed, match="100 label flips"):
        other.check_same("it is elsewhere")
    for address in ("http://127.0.0.1:9", "http://local host", "localhost:3000", f"{service}/x"):
        with pytest.raises(UserError, match="expected an ad2kit service at"):
            judge_service(finished_run, address)
    with pytest.raises(UserError, match="HTTP Error 422"):
        ask(service, [""])


def test_a_server_is_found_beside_a_process_that_has_ended(service: str) -> None:
    with subprocess.Popen([sys.executable, "-c", ""]) as ended:
        process = psutil.Process(ended.pid)
        wait_for(lambda: process.status() == psutil.STATUS_ZOMBIE)
        assert command_of(process) == []
        assert "bentoml" in " ".join(command_of(server_at(service)))


@pytest.mark.skipif(not Path("/proc/self/maps").is_file(), reason="needs Linux's /proc")
def test_the_running_server_has_not_loaded_torch(service: str) -> None:
    assert classify(service, "fine").predictions
    maps = [
        Path(f"/proc/{process.pid}/maps").read_text()
        for process in server_at(service).children(recursive=True)
    ]
    assert any("onnxruntime" in libraries for libraries in maps)  # this does find libraries
    assert not any("libtorch" in libraries for libraries in maps)


def test_the_service_imports_neither_torch_nor_transformers(finished_run: RunDir) -> None:
    code = (
        "import json, sys\n"
        "from bentoml._internal.utils.args import set_arguments\n"
        "set_arguments({'model': sys.argv[1]})\n"
        "from serving.service import OnnxClassifier\n"
        "OnnxClassifier(sys.argv[1], threads=1).predict(['not dull'])\n"
        "print(json.dumps(sorted({name.partition('.')[0] for name in sys.modules})))\n"
    )
    found = subprocess.run(
        [sys.executable, "-c", code, str(finished_run.onnx("fp32"))],
        cwd=CHECKOUT,
        capture_output=True,
        text=True,
        check=True,
    )
    modules = set(json.loads(found.stdout))
    assert {"ad2kit", "bentoml", "onnxruntime", "tokenizers"} <= modules
    heavy = {"torch", "transformers", "optimum", "datasets", "onnx", "sklearn", "scipy", "pyarrow"}
    assert not heavy & modules
