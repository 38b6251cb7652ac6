"""Anything at all is sent to the service: no crash, no 500, no answer that is somebody else's.

`make soak` runs this for longer (``--hypothesis-profile=soak``).
"""

from __future__ import annotations

import copy
import http.client
import json
import threading
from typing import TYPE_CHECKING, Any

import pytest
import schemathesis
from hypothesis import given, settings
from hypothesis import strategies as st
from schemathesis import GenerationMode
from schemathesis.core.failures import FailureGroup

from ad2kit.exporting.classifier import OnnxClassifier
from ad2kit.service.errors import ERRORS
from tests.http_client import JSON, call, classify, serving

if TYPE_CHECKING:
    from collections.abc import Iterator

    from schemathesis import BaseSchema, Case

    from ad2kit.run.folder import RunDir

pytestmark = pytest.mark.slow

KNOWN = ["a fine film", "not worth the time", "it was never dull", "a waste of good actors"]
ALLOWED = {200, 400, 413, 415, 422, 429}
LARGE = 2**20


@pytest.fixture(scope="module")
def fuzzed(finished_run: RunDir, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The service, which meanwhile answers somebody whose answers are known."""
    fp32 = finished_run.onnx("fp32")
    expected = OnnxClassifier(fp32, threads=1).predict(KNOWN, batch_size=1)
    with serving(tmp_path_factory.mktemp("fuzz"), f"model={fp32}", "workers=1") as address:
        stop, wrong, answered = threading.Event(), list[Any](), 0

        def bystander() -> None:
            nonlocal answered
            while not stop.wait(0.01):
                reply = classify(address, KNOWN)
                if reply.status == 429:
                    continue  # full is no fault
                found = [each["scores"] for each in reply.predictions]
                if found != [pytest.approx(each.scores, abs=1e-5) for each in expected]:
                    wrong.append(found)
                answered += 1

        thread = threading.Thread(target=bystander)
        thread.start()
        yield address
        stop.set()
        thread.join()
        assert wrong == []
        assert answered > 10
        assert call(address, "GET", "/readyz").status == 200


@pytest.fixture(scope="module")
def documented(fuzzed: str) -> Any:
    found = schemathesis.openapi.from_url(f"{fuzzed}/docs.json")
    # A list of too many texts is refused too, with a status that schemathesis does not count.
    found.config.checks.negative_data_rejection.expected_statuses.append("413")
    return found


OPERATIONS = [
    ("/classify", "POST"),
    ("/info", "GET"),
    ("/livez", "GET"),
    ("/metrics", "GET"),
    ("/readyz", "GET"),
]


@pytest.mark.parametrize(("path", "method"), OPERATIONS)
@pytest.mark.parametrize("mode", list(GenerationMode), ids=lambda mode: mode.value)
def test_the_service_does_what_its_document_says(
    documented: BaseSchema, path: str, method: str, mode: GenerationMode
) -> None:
    """Status, content type, headers and body are as documented, for bodies that fit and others."""
    if mode is GenerationMode.NEGATIVE and path != "/classify":
        pytest.skip("nothing about it can be wrong")
    operation = documented[path][method]

    @given(case=operation.as_strategy(generation_mode=mode))
    def ask(case: Case[Any]) -> None:
        case.call_and_validate()

    ask()


def test_the_control_finds_what_a_document_leaves_out(documented: BaseSchema, fuzzed: str) -> None:
    raw = copy.deepcopy(documented.raw_schema)
    del raw["paths"]["/classify"]["post"]["responses"]["422"]
    operation = schemathesis.openapi.from_dict(raw)["/classify"]["POST"]

    @settings(max_examples=200)
    @given(case=operation.as_strategy(generation_mode=GenerationMode.NEGATIVE))
    def ask(case: Case[Any]) -> None:
        case.call_and_validate(base_url=fuzzed)

    with pytest.raises(FailureGroup) as found:
        ask()
    assert "Received: 422" in str(found.value)


def test_the_document_leaves_no_path_out(documented: BaseSchema) -> None:
    assert {
        (path, method.upper())
        for path, methods in documented.raw_schema["paths"].items()
        for method in methods
    } == set(OPERATIONS)


TRICKY = st.sampled_from(
    [
        "\ud83c",
        "a\0b",
        "\u202e\u05e9\u05dc",
        "e" + "\u0301" * 50,
        "👩\u200d👩\u200d👧",
        "\ufeff",
        "\u2028",
        "\x1b[2J",
    ]
)
TEXTS = st.one_of(st.text(), TRICKY, st.lists(TRICKY, max_size=4).map("".join))
VALUES = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), TEXTS),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXTS, inner, max_size=3),
    max_leaves=20,
)
ENDLESS = st.builds(
    lambda piece, length: json.dumps({"texts": [piece * (length // len(piece))]}),
    st.sampled_from(["a", " ", "🎉", "\0", "ab "]),
    st.sampled_from([10_000, 100_000, LARGE - 50, LARGE + 50]),
)
BODIES = st.one_of(
    st.binary(max_size=200),
    VALUES.map(json.dumps),
    st.lists(TEXTS, min_size=1, max_size=130).map(lambda texts: json.dumps({"texts": texts})),
    st.builds(
        lambda texts, more: json.dumps({"texts": texts, **more}),
        VALUES,
        st.dictionaries(TEXTS, VALUES, max_size=2),
    ),
    st.integers(1, 20_000).map(lambda depth: '{"texts": ' + "[" * depth + "]" * depth + "}"),
    st.lists(TEXTS, min_size=2, max_size=3).map(
        lambda texts: "{" + ", ".join(f'"texts": {json.dumps(text)}' for text in texts) + "}"
    ),
    ENDLESS,
)


@given(body=BODIES)
def test_any_body_is_answered_or_refused_in_one_shape(fuzzed: str, body: str | bytes) -> None:
    content = body.encode() if isinstance(body, str) else body
    reply = call(fuzzed, "POST", "/classify", content, JSON)
    assert reply.status in ALLOWED, (reply.status, reply.body)
    assert reply.headers["content-type"] == "application/json"
    if reply.status == 200:
        for each in reply.json["predictions"]:
            assert set(each) <= {"label", "score", "scores", "tokens", "truncated"}
            assert 0 <= each["score"] <= 1
        return
    error = reply.json["error"]
    assert error["type"] == ERRORS[reply.status][0]
    assert len(reply.body) < 4096  # not the whole of what was sent


@given(
    lines=st.lists(
        st.one_of(
            st.binary(max_size=60),
            st.sampled_from(
                [
                    b"POST /classify HTTP/1.1",
                    b"Content-Length: -1",
                    b"Content-Length: 5",
                    b"Host: a",
                    b"Transfer-Encoding: chunked",
                    b"Content-Type: application/json",
                    b"",
                    b"zz",
                    b"Expect: 100-continue",
                    b"Connection: close",
                    b"X: " + b"y" * 70_000,
                ]
            ),
        ),
        max_size=8,
    )
)
def test_what_is_no_http_harms_nobody_else(fuzzed: str, lines: list[bytes]) -> None:
    connection = http.client.HTTPConnection(fuzzed.removeprefix("http://"), timeout=10)
    connection.connect()
    connection.sock.sendall(b"\r\n".join(lines) + b"\r\n\r\n")
    connection.close()
    assert call(fuzzed, "GET", "/livez").status == 200
