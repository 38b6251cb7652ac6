"""Where a service runs: a Bento, a checkout, and the image of a Bento, without Docker.

The install script of the image runs in a fresh environment, from wheels that are made of what is
installed here. The service then runs as in the image: as a user id that nobody knows, and it can
write nowhere but in its temporary folder.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import threading
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import bentoml
import pytest

from ad2kit.data.splits import load_data
from ad2kit.exporting.classifier import OnnxClassifier
from ad2kit.packaging.bento import pinned_requirements, served
from ad2kit.packaging.check import ask
from ad2kit.service.settings import NAMED_PATHS, PATHS, SECRETS, Settings
from tests.http_client import (
    CHECKOUT,
    SERVICE,
    bearer,
    call,
    check_error,
    free_port,
    metrics_of,
    refused,
    server_at,
    serving,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

    from ad2kit.exporting.classifier import Prediction
    from ad2kit.gate.records import BentoRecord
    from ad2kit.run.folder import RunDir

pytestmark = pytest.mark.slow

TEXT = json.dumps({"texts": ["fine"]}).encode()

# As `docker run --read-only --tmpfs TEMPORARY --user 12345`; a capability lets it read all.
CONTAINED = """#!/bin/sh
exec unshare --mount sh -c '
    mount -o remount,ro,bind / && mount -t tmpfs -o mode=1777 tmpfs {temporary} &&
    exec setpriv --reuid=12345 --regid=0 --clear-groups --no-new-privs \\
        --inh-caps=+dac_read_search --ambient-caps=+dac_read_search {python} "$@"' -- "$@"
"""


@pytest.fixture(scope="module")
def bento(packaged: tuple[RunDir, BentoRecord]) -> Path:
    return Path(bentoml.bentos.get(packaged[1].tag).path)


def wheel_of(requirement: str, folder: Path) -> None:
    """Write a wheel of what is installed; ``requirement`` is NAME==VERSION."""
    found = metadata.distribution(requirement.partition("==")[0])
    tag = re.findall(r"(?m)^Tag: (\S+)$", found.read_text("WHEEL") or "")[-1]  # py2 comes first
    name = re.sub(r"[-_.]+", "_", found.metadata["Name"])
    with zipfile.ZipFile(folder / f"{name}-{found.version}-{tag}.whl", "w") as wheel:
        for path in found.files or ():
            if ".." not in path.parts and path.suffix != ".pyc":
                wheel.write(str(path.locate()), str(path))


@pytest.fixture(scope="module")
def environment(bento: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The environment that the image has."""
    wheels = tmp_path_factory.mktemp("wheels")
    requirements = (bento / "env" / "python" / "requirements.txt").read_text().split()
    for requirement in requirements:
        wheel_of(requirement, wheels)
    target = tmp_path_factory.mktemp("image") / "environment"
    offline = {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(wheels)}
    subprocess.run(
        ["sh", bento / "src" / "install.sh", bento, target],
        env={"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", **offline},
        check=True,
        stdout=subprocess.DEVNULL,
    )
    shutil.rmtree(wheels)
    return target


def contained(tmp_path: Path, environment: Path) -> dict[str, str]:
    """Let the server run as in the container; return its variables, those of the Dockerfile."""
    if os.getuid() != 0 or any(shutil.which(each) is None for each in ("unshare", "setpriv")):
        pytest.skip("needs root, unshare and setpriv")
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    script = tmp_path / "python"
    python = environment / "bin" / "python"
    script.write_text(CONTAINED.format(temporary=temporary, python=python))
    script.chmod(0o755)
    tried = subprocess.run([script, "-c", "pass"], capture_output=True, text=True, check=False)
    if tried.returncode:
        pytest.skip(f"a file system of its own is not allowed here: {tried.stderr:.200}")
    return {
        "PATH": f"{environment / 'bin'}:{os.environ['PATH']}",
        "HOME": str(temporary),
        "TMPDIR": str(temporary),
        "BENTOML_HOME": str(temporary / "bentoml"),
        "PYTHONDONTWRITEBYTECODE": "1",
        "AD2KIT_WORKERS": "1",
    }


def check_same(answers: list[dict[str, Any]], expected: list[Prediction]) -> None:
    for answer, prediction in zip(answers, expected, strict=True):
        assert answer["label"] == prediction.label
        assert answer["scores"] == pytest.approx(prediction.scores, abs=1e-5)
        assert answer["tokens"] == prediction.tokens


def test_the_bento_serves_where_only_its_own_requirements_are_installed(
    packaged: tuple[RunDir, BentoRecord],
    bento: Path,
    environment: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # As on another machine: no checkout on the path, no store of ours, another python.
    monkeypatch.delenv("PYTHONPATH", raising=False)
    monkeypatch.setenv("BENTOML_HOME", str(tmp_path / "store"))
    monkeypatch.chdir(tmp_path)
    python = str(environment / "bin" / "python")
    names = "from importlib.metadata import *; print(*(d.name for d in distributions()))"
    listed = subprocess.run([python, "-c", names], check=True, capture_output=True, text=True)
    # pip had to add nothing of its own choice: the pins are the whole closure.
    pinned = {pin.split("==")[0] for pin in pinned_requirements()}
    assert {name.lower().replace("_", "-") for name in listed.stdout.split()} == pinned
    assert not pinned & {"torch", "transformers"}

    monkeypatch.setattr(sys, "executable", python)  # whose `bentoml serve` it shall be
    run, record = packaged
    validation = load_data(run.recipe.data, run.recipe.seed).validation
    texts = [text[0] for text in validation.texts[:60]]
    expected = OnnxClassifier(run.onnx(record.variant), threads=1).predict(texts, batch_size=1)
    with served(bento, tmp_path) as address:
        server = server_at(address)
        family = [server, *server.children(recursive=True)]
        commands = [process.cmdline() for process in family]
        answers = [ask(address, [text])[0] for text in texts]
    assert {command[0] for command in commands} == {python}
    check_same(answers, expected)


def test_the_image_answers_as_the_artefact_does(
    packaged: tuple[RunDir, BentoRecord],
    bento: Path,
    environment: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    variables = contained(tmp_path, environment)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    with pytest.raises(subprocess.CalledProcessError):  # control: nothing can be written
        subprocess.run(
            [sys.executable, "-c", f"open({str(bento / 'mine')!r}, 'w')"],
            check=True,
            stderr=subprocess.DEVNULL,
        )
    texts = ["a delight from start to end", "dull, long and clumsy"]
    expected = OnnxClassifier(packaged[0].onnx(packaged[1].variant), threads=1).predict(texts)
    with served(bento, tmp_path, environment=variables) as address:
        check_same(ask(address, texts), expected)
        dockerfile = (bento / "src" / "Dockerfile").read_text()
        (check,) = re.findall(r"HEALTHCHECK .* CMD (\[.*?\])\n", dockerfile.replace("\\\n", ""))
        port = address.rpartition(":")[2]
        _, *command = json.loads(check.replace(":3000/", f":{port}/"))
        asked = [environment / "bin" / "python", *command]
        assert subprocess.run(asked, check=False).returncode == 0
    assert subprocess.run(asked, check=False, stderr=subprocess.DEVNULL).returncode == 1


def test_the_image_holds_what_it_needs_and_no_more(bento: Path, environment: Path) -> None:
    python = environment / "bin" / "python"
    for name, there in {"onnxruntime": True, "torch": False, "pip": False}.items():
        found = subprocess.run(
            [python, "-c", f"import {name}"], check=False, stderr=subprocess.DEVNULL
        )
        assert (found.returncode == 0) == there
    dockerfile = (bento / "src" / "Dockerfile").read_text()
    assert re.findall(r"(?m)^ARG PYTHON=(.*)$", dockerfile) == [platform.python_version()]
    last = dockerfile[dockerfile.rindex("FROM ") :]
    assert re.search(r"(?m)^USER (\d+):0$", last)
    assert not re.search(r"(?m)^RUN ", last)


# A value of each setting that a client sees in /info.
IN_FORCE = {
    "workers": 1,
    "threads": 2,
    "shadow_share": 0.5,
    "access_log": True,
    "root_path": "/ad2kit",
    "cors_origins": "https://a.example",
    "max_body_bytes": 2**14,
    "max_held_bytes": 2**21,
    "max_header_bytes": 2**13,
    "max_headers": 40,
    "header_timeout_s": 5.5,
    "body_timeout_s": 6.5,
    "write_timeout_s": 7.5,
    "keep_alive_s": 8.5,
    "max_connections": 90,
    "max_connection_requests": 900,
    "metrics_port": free_port(),
    "max_texts": 4,
    "max_text_characters": 1000,
    "max_key_requests_per_s": 1000.0,
    "max_queue_texts": 400,
    "max_queue_tokens": 8192,
    "max_batch_tokens": 512,
    "deadline_s": 9.5,
}


class Place(NamedTuple):
    """How a service is started in one place, and by which Python."""

    target: str
    arguments: tuple[str, ...]
    environment: dict[str, str]
    python: str = sys.executable


@pytest.fixture(scope="module", params=["Bento", "checkout", "image"])
def place(
    request: pytest.FixtureRequest,
    bento: Path,
    packaged: tuple[RunDir, BentoRecord],
    tmp_path_factory: pytest.TempPathFactory,
) -> Place:
    if request.param == "Bento":
        return Place(str(bento), (), {})
    if request.param == "checkout":
        model = {"AD2KIT_MODEL": str(packaged[0].onnx("int8"))}
        return Place(SERVICE, ("--working-dir", str(CHECKOUT)), model)
    folder = tmp_path_factory.mktemp("contained")
    variables = contained(folder, request.getfixturevalue("environment"))
    return Place(str(bento), (), variables, str(folder / "python"))


@pytest.fixture(scope="module")
def governed(
    place: Place,
    packaged: tuple[RunDir, BentoRecord],
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[str]:
    """The address of a service with a variable for each setting."""
    folder = tmp_path_factory.mktemp("governed")
    (folder / "keys").write_text("one\n")
    environment = {
        **os.environ,
        **place.environment,
        **{f"AD2KIT_{name.upper()}": str(value) for name, value in IN_FORCE.items()},
        "AD2KIT_SHADOW": str(packaged[0].onnx("int8")),
        "AD2KIT_API_KEYS_FILE": str(folder / "keys"),
    }
    with contextlib.ExitStack() as stack:
        with pytest.MonkeyPatch.context() as patch:  # of this server alone
            patch.setattr(sys, "executable", place.python)
            service = served(place.target, folder, *place.arguments, environment=environment)
            address = stack.enter_context(service)
        yield address


def test_a_wrong_value_starts_nothing_in_any_place(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "executable", place.python)
    wrong = {**place.environment, "AD2KIT_MAX_TEXTS": "0", "AD2KIT_DEADLINE_S": "soon"}
    said = refused(place.target, *place.arguments, **wrong)
    assert "AD2KIT_MAX_TEXTS" in said
    assert "at least 1, at most 65536" in said


def test_each_setting_is_in_force_in_each_place(governed: str) -> None:
    info = call(governed, "GET", "/info", headers=bearer("one")).json
    assert info["settings"] == IN_FORCE
    assert set(Settings.model_fields) == set(IN_FORCE) | {*SECRETS, *PATHS, *NAMED_PATHS}
    for name, value in info["limits"].items():
        assert value == IN_FORCE.get(f"max_{name}", IN_FORCE.get(name))
    five = json.dumps({"texts": ["fine"] * 5}).encode()
    error = check_error(call(governed, "POST", "/classify", five, bearer("one")), 413, "too_large")
    assert "at most 4 texts" in error["message"]
    assert "at most 4 texts, and 16384 bytes" in error["hint"]
    long = json.dumps({"texts": ["fine", "x" * 1001]}).encode()
    error = check_error(call(governed, "POST", "/classify", long, bearer("one")), 413, "too_large")
    assert "texts.1: expected at most 1000 characters, found 1001" in error["message"]
    document = call(governed, "GET", "/docs.json", headers=bearer("one")).json
    texts = document["components"]["schemas"]["ClassifyRequest"]["properties"]["texts"]
    assert texts["anyOf"][1]["maxItems"] == 4


@pytest.mark.parametrize("prefix", ["", "/ad2kit"])
def test_behind_a_proxy_with_a_path_each_path_works(governed: str, prefix: str) -> None:
    for path in ("/", "/info", "/docs.json", "/livez", "/readyz"):
        assert call(governed, "GET", f"{prefix}{path}", headers=bearer("one")).status == 200
    assert call(governed, "POST", f"{prefix}/classify", TEXT, bearer("one")).status == 200
    check_error(call(governed, "GET", f"{prefix}/info"), 401, "unauthorized")
    page = call(governed, "GET", prefix or "/").body.decode()
    assert '<base href="/ad2kit/">' in page
    assert re.findall(r'(?:href=|fetched\()"(/[^"]*)"', page) == ["/ad2kit/"]  # others: relative


def test_metrics_have_a_port_of_their_own(governed: str) -> None:
    assert call(governed, "POST", "/classify", TEXT, bearer("one")).status == 200
    found = metrics_of(f"http://127.0.0.1:{IN_FORCE['metrics_port']}")
    assert found['ad2kit_requests_total{status="200"}'] >= 1
    check_error(call(governed, "GET", "/metrics", headers=bearer("one")), 404, "not_found")
    document = call(governed, "GET", "/docs.json", headers=bearer("one")).json
    assert "/metrics" not in document["paths"]


def test_a_page_of_another_origin_may_ask_where_it_was_allowed(governed: str) -> None:
    asked = {"Origin": "https://a.example", "Access-Control-Request-Method": "POST"}
    told = call(governed, "OPTIONS", "/classify", headers=asked)
    assert told.status == 204
    assert told.headers["access-control-allow-origin"] == "https://a.example"
    assert "Authorization" in told.headers["access-control-allow-headers"]
    for key, status in (("one", 200), ("five", 401)):
        headers = {**bearer(key), "Origin": "https://a.example"}
        reply = call(governed, "POST", "/classify", TEXT, headers)
        assert reply.status == status
        assert reply.headers["access-control-allow-origin"] == "https://a.example"
        other = call(
            governed, "POST", "/classify", TEXT, {**headers, "Origin": "https://b.example"}
        )
        assert "access-control-allow-origin" not in other.headers


# A page that asks the service, and shows what it was told; a header and JSON need a preflight.
ASKING = """<p id="told">nothing</p><script>
const headers = {"Content-Type": "application/json", "X-Request-ID": "of-a-page"}
fetch("ADDRESS/ad2kit/classify", {method: "POST", headers, body: '{"texts": "fine"}'})
    .then(reply => reply.text()).catch(error => `${error}`)
    .then(text => { document.getElementById("told").textContent = text })
</script>"""


@contextlib.contextmanager
def page_server(port: int, page: str) -> Iterator[None]:
    """Serve one page at a port of this machine."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("Content-Type", "text/html")
            self.end_headers()
            self.wfile.write(page.encode())

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", port), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield
        server.shutdown()


def test_a_browser_has_the_page_below_a_path_and_asks_from_allowed_origins_alone(
    packaged: tuple[RunDir, BentoRecord], tmp_path: Path, browser: Any
) -> None:
    artifact = packaged[0].onnx("fp32")
    allowed, other = free_port(), free_port()
    given = (
        f"model={artifact}",
        "workers=1",
        "root_path=/ad2kit",
        f"cors_origins=http://127.0.0.1:{allowed}",
    )
    (answer,) = OnnxClassifier(artifact, threads=1).predict(["fine"])
    budget = "--virtual-time-budget=5000"
    with serving(tmp_path, *given) as address:
        shown, console = browser(f"{address}/ad2kit/?text=fine", budget)
        assert console == []
        assert f"<strong>{answer.label}</strong>" in shown
        assert "<td>parity gate</td><td>passed</td>" in shown
        page = ASKING.replace("ADDRESS", address)
        with page_server(allowed, page), page_server(other, page):
            told, console = browser(f"http://127.0.0.1:{allowed}/", budget)
            assert f'"label":"{answer.label}"' in told
            assert [line for line in console if "favicon" not in line] == []
            refused_to, console = browser(f"http://127.0.0.1:{other}/", budget)
    assert "Failed to fetch" in refused_to
    assert "has been blocked by CORS policy" in str(console)
