"""How a Bento is operated: each setting is seen to work, and what went wrong opens nothing."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import signal
import socket
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.error import HTTPError

import bentoml
import psutil
import pytest

from ad2kit.__main__ import main
from ad2kit.exporting.records import OnnxArtifact
from ad2kit.packaging.bento import served
from ad2kit.packaging.check import fetch, judge_service
from ad2kit.run.errors import ModelError, RunError, UserError
from ad2kit.service.models import Version
from ad2kit.service.process import Server, this_server
from ad2kit.service.settings import SERVER
from tests.http_client import (
    CHECKOUT,
    JSON,
    SERVICE,
    Reply,
    bearer,
    call,
    check_error,
    log_of,
    metrics_of,
    refused,
    server_at,
    wait_for,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

    from ad2kit.gate.records import BentoRecord
    from ad2kit.run.folder import RunDir

pytestmark = pytest.mark.slow

PUBLIC = {"/", "/livez", "/readyz", "/healthz", "/metrics"}
NAMED = "0123456789abcdef"
TEXT = json.dumps({"texts": ["fine"]}).encode()
# A user whom /etc/passwd does not know, as in many containers. It may read and not write.
STRANGER = """#!/bin/sh
exec setpriv --reuid=12345 --regid=12345 --clear-groups \\
    --inh-caps=+dac_read_search --ambient-caps=+dac_read_search {python} "$@"
"""


@pytest.fixture(scope="module")
def bento(packaged: tuple[RunDir, BentoRecord]) -> Path:
    return Path(bentoml.bentos.get(packaged[1].tag).path)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("settings")
    content = f"\ufeff# of Ann\none\n\n# of Bob\ntwo\ncarol: {NAMED}\n"
    (folder / "keys").write_text(content, encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def operated(bento: Path, packaged: tuple[RunDir, BentoRecord], folder: Path) -> Iterator[str]:
    """A Bento with every setting that it takes, by the environment."""
    environment = {
        **os.environ,
        "AD2KIT_API_KEYS": "three,four",
        "AD2KIT_API_KEYS_FILE": str(folder / "keys"),
        "AD2KIT_WORKERS": "2",
        "AD2KIT_THREADS": "3",
        "AD2KIT_SHADOW": str(packaged[0].onnx("fp32")),
        "AD2KIT_SHADOW_SHARE": "1",
        "AD2KIT_ACCESS_LOG": "true",
    }
    with served(bento, folder, environment=environment) as address:
        yield address


def said_in(folder: Path, message: str) -> list[dict[str, Any]]:
    """The records of the workers that say this."""
    return [record for record in log_of(folder) if record["message"] == message]


def counted(address: str, name: str) -> float:
    """The sum of a metric over its labels."""
    found = metrics_of(address).items()
    return sum(value for row, value in found if row.partition("{")[0] == name)


def test_keys_are_asked_for_on_every_route_that_is_not_public(operated: str) -> None:
    document = call(operated, "GET", "/docs.json", headers=bearer("one"))
    assert document.status == 200
    paths = {
        (method.upper(), path)
        for path, methods in document.json["paths"].items()
        for method in methods
        if path not in PUBLIC
    }
    assert ("POST", "/classify") in paths
    others = ("/info", "/docs.json", "/schema.json", "/nowhere", "/static_content/x", "//metrics")
    for method, path in sorted(paths | {("GET", path) for path in others}):
        body = TEXT if method == "POST" else None
        check_error(call(operated, method, path, body, JSON), 401, "unauthorized")
        check_error(call(operated, method, path, body, bearer("five")), 401, "unauthorized")
    for key in ("one", "two", "three", "four"):
        assert call(operated, "POST", "/classify", TEXT, bearer(key)).status == 200
    for path in PUBLIC:
        assert call(operated, "GET", path).status == 200


def test_requests_are_counted_and_logged_by_the_name_of_their_key(
    operated: str, folder: Path
) -> None:
    for key, body, status in ((NAMED, TEXT, 200), (NAMED, b"{}", 422)):
        headers = {**bearer(key), "X-Request-ID": "of-carol"}
        assert call(operated, "POST", "/classify", body, headers).status == status
    wait_for(lambda: counted(operated, "ad2kit_key_requests_total") == 2)
    assert 'ad2kit_key_requests_total{name="carol"}' in metrics_of(operated)

    def logged() -> list[tuple[Any, Any]]:
        of_carol = [each for each in log_of(folder) if each.get("request_id") == "of-carol"]
        return [(each["status"], each["key_name"]) for each in of_carol]

    wait_for(lambda: sorted(logged()) == [(200, "carol"), (422, "carol")])
    assert NAMED not in (folder / "server.log").read_text()


def test_there_are_as_many_workers_and_threads_as_were_asked_for(
    operated: str, folder: Path
) -> None:
    wait_for(lambda: len(said_in(folder, "ready")) == 2)
    ready = said_in(folder, "ready")
    assert [record["threads"] for record in ready] == [3, 3]
    workers = {process.pid for process in server_at(operated).children()}
    assert workers == {record["process"] for record in ready}


def test_the_shadow_is_asked_and_each_answer_logged(operated: str, folder: Path) -> None:
    shadowed, answered = counted(operated, "ad2kit_shadow_texts_total"), said_in(folder, "answered")
    for _ in range(5):
        assert call(operated, "POST", "/classify", TEXT, bearer("one")).status == 200
    # Or more: what the tests before have asked may still be waiting for the shadow.
    wait_for(lambda: counted(operated, "ad2kit_shadow_texts_total") >= shadowed + 5)
    wait_for(lambda: len(said_in(folder, "answered")) >= len(answered) + 5)


def test_parity_asks_a_service_with_a_key(
    operated: str,
    packaged: tuple[RunDir, BentoRecord],
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run, _ = packaged
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")  # nobody listens there
    monkeypatch.delenv("no_proxy", raising=False)
    for key in (None, "five"):
        with pytest.raises(UserError, match="401") as told:
            judge_service(run, operated, key)
        assert "--api-keys-file" in told.value.hint
    assert judge_service(run, operated, "two").flips == 0

    def parity(*arguments: str) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["ad2kit", "parity", str(run.path), *arguments])
        with pytest.raises(SystemExit) as stop:
            main()
        return int(stop.value.code or 0), capsys.readouterr().err

    against = ("--against-service", operated)
    code, said = parity(*against)
    assert (code, "--api-keys-file FILE" in said) == (2, True)
    assert parity(*against, "--api-keys-file", str(folder / "keys"))[0] == 0
    code, said = parity("--api-keys-file", str(folder / "keys"))
    assert (code, "expected --against-service" in said) == (2, True)
    monkeypatch.setenv("AD2KIT_API_KEYS", "four")
    code, said = parity(*against)
    assert (code, "100 answers equal" in said) == (0, True)


@pytest.mark.parametrize("option", ["--arg", "--arg-file"])
def test_an_argument_that_a_bento_loses_starts_nothing_and_the_advice_works(
    option: str, bento: Path, folder: Path, tmp_path: Path
) -> None:
    (tmp_path / "arguments.yaml").write_text(f"api_keys_file: {folder / 'keys'}\n")
    value = f"api_keys_file={folder / 'keys'}"
    if option == "--arg-file":
        value = str(tmp_path / "arguments.yaml")
    said = refused(bento, option, value)
    assert f"`{option} api_keys_file=` was given, and BentoML drops it when it serves a B" in said
    (advice,) = re.findall(r"set (AD2KIT_\S+) in the environment", said)
    name, _, keys = shlex.split(advice)[0].partition("=")
    with served(bento, tmp_path, environment={**os.environ, name: keys}) as address:
        check_error(call(address, "GET", "/info"), 401, "unauthorized")
        assert call(address, "GET", "/info", headers=bearer("one")).status == 200


def test_what_is_wrong_starts_no_bento(bento: Path, tmp_path: Path) -> None:
    (tmp_path / "binary").write_bytes(bytes(range(256)))
    for variable, value, said in (
        ("API_KEYS", ",", "there is none"),
        ("API_KEYS_FILE", str(tmp_path), "it is a folder"),
        ("API_KEYS_FILE", str(tmp_path / "binary"), "cannot read the API keys"),
        ("API_KEY", "one", "did you mean 'AD2KIT_API_KEYS'?"),
        ("WORKERS", "0", "AD2KIT_WORKERS: expected a whole number, at least 1"),
    ):
        assert said in refused(bento, **{f"AD2KIT_{variable}": value})


def test_workers_end_with_their_parent_and_leave_the_port(bento: Path, tmp_path: Path) -> None:
    with served(bento, tmp_path) as address:
        server = server_at(address)
        workers = server.children()
        # One that is still starting has nothing to drain.
        wait_for(lambda: len(said_in(tmp_path, "ready")) == len(workers))
        server.send_signal(signal.SIGKILL)
        gone, alive = psutil.wait_procs(workers, timeout=60)
        assert (len(gone), alive) == (len(workers), [])
        with pytest.raises(ConnectionRefusedError):
            call(address, "GET", "/livez")
    assert len(said_in(tmp_path, "draining")) == len(workers)  # as on SIGTERM


def test_a_worker_that_is_restarted_serves_and_counts_as_its_siblings_do(
    finished_run: RunDir, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a user without a name where there can be one, with no room for temporary files at last."""
    temporary = tmp_path / "temporary"
    temporary.mkdir(mode=0o777)
    if os.getuid() == 0:
        if shutil.which("setpriv") is None:
            pytest.skip("needs setpriv: root can write everywhere")
        stranger = tmp_path / "python"
        stranger.write_text(STRANGER.format(python=sys.executable))
        stranger.chmod(0o755)
        temporary.chmod(0o777)
        monkeypatch.setattr(sys, "executable", str(stranger))
    shutil.copytree(finished_run.path, tmp_path / "runs" / "one")
    environment = {
        name: value
        for name, value in os.environ.items()
        if name not in ("USER", "LOGNAME", "LNAME", "USERNAME")
    }
    environment |= {
        "TMPDIR": str(temporary),
        "BENTOML_HOME": str(temporary / "bentoml"),
        "AD2KIT_WORKERS": "2",
        "AD2KIT_RUNS_DIR": str(tmp_path / "runs"),
    }
    arguments = ("--working-dir", str(CHECKOUT))
    with served(SERVICE, tmp_path, *arguments, environment=environment) as address:
        wait_for(lambda: len(said_in(tmp_path, "ready")) == 2)
        for _ in range(20):
            assert call(address, "POST", "/classify", TEXT, JSON).status == 200
        # Another run passes its gate meanwhile, and the temporary folder takes no new files.
        shutil.copytree(finished_run.path, tmp_path / "runs" / "two")
        report = tmp_path / "runs" / "two" / "parity.json"
        later = report.stat().st_mtime + 60
        os.utime(report, (later, later))
        temporary.chmod(0o555)
        killed = server_at(address).children()[0]
        killed.kill()
        wait_for(lambda: len(said_in(tmp_path, "ready")) == 3)
        first, second, third = said_in(tmp_path, "ready")
        assert third["process"] not in (first["process"], second["process"])
        assert (
            third["model"] == first["model"] == str(tmp_path / "runs" / "one" / "onnx" / "steady")
        )
        before = 20.0
        for _ in range(40):  # whichever worker answers
            after = counted(address, "ad2kit_requests_total")
            assert after >= before
            assert call(address, "POST", "/classify", TEXT, JSON).status == 200
            before = after + 1
    temporary.chmod(0o777)


def test_a_key_has_a_rate_in_all_workers_together(bento: Path, tmp_path: Path) -> None:
    settings = {
        "AD2KIT_API_KEYS": "one,two",
        "AD2KIT_WORKERS": "2",
        "AD2KIT_MAX_KEY_REQUESTS_PER_S": "5",
    }
    with served(bento, tmp_path, environment=os.environ | settings) as address:

        def ask(key: str) -> Reply:
            return call(address, "POST", "/classify", TEXT, {**JSON, **bearer(key)})

        start = time.monotonic()
        replies = [ask("one") for _ in range(60)]
        seconds = time.monotonic() - start
        answered = sum(reply.status == 200 for reply in replies)
        assert 5 <= answered <= 6 + 5 * seconds
        refused = [reply for reply in replies if reply.status != 200]
        assert refused
        error = check_error(refused[0], 429, "overloaded")
        assert "this key may send 5 requests per second" in error["message"]
        assert refused[0].headers["retry-after"] == "1"
        assert ask("two").status == 200
        assert call(address, "GET", "/readyz").status == 200


def test_a_port_that_is_taken_starts_no_server(bento: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("0.0.0.0", 0))  # noqa: S104  (nobody listens)
        port = taken.getsockname()[1]
        said = refused(bento, AD2KIT_METRICS_PORT=str(port))
    assert f"AD2KIT_METRICS_PORT={port}: the metrics cannot be served there" in said


def test_keys_are_changed_while_the_service_runs(bento: Path, tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    keys.write_text("one\n")
    settings = {"AD2KIT_API_KEYS_FILE": str(keys), "AD2KIT_WORKERS": "2"}
    with served(bento, tmp_path, environment=os.environ | settings) as address:

        def let_in() -> set[str]:
            """The keys that every one of both workers lets in, and no other."""
            found = [{key for key in ("one", "two") if info(key).status == 200} for _ in range(20)]
            return found[0] if found == [found[0]] * 20 else set()

        def info(key: str) -> Reply:
            return call(address, "GET", "/info", headers=bearer(key))

        assert let_in() == {"one"}
        keys.write_text("one\ntwo\n")
        wait_for(lambda: let_in() == {"one", "two"})
        keys.write_text("two\n")
        wait_for(lambda: let_in() == {"two"})
        keys.write_text("# no key any more\n")  # it must not open the service
        wait_for(lambda: info("two").json["refused"] == ["the list of API keys"])
        assert let_in() == {"two"}
        assert call(address, "POST", "/classify", TEXT, JSON).status == 401
        keys.write_text("one\n")
        wait_for(lambda: let_in() == {"one"})


@pytest.fixture
def place(tmp_path: Path, packaged: tuple[RunDir, BentoRecord]) -> Path:
    """The folder of a service that holds its artefact."""
    shutil.copytree(packaged[0].onnx("steady"), tmp_path / "artifact")
    return tmp_path


def handed_on(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let this process look like a worker of a server."""
    server = server.model_copy(update={"pid": os.getppid()})
    monkeypatch.setenv(SERVER, server.model_dump_json())


def test_a_worker_takes_what_its_parent_decided(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (place / "keys").write_text("one\n")
    monkeypatch.setenv("AD2KIT_API_KEYS_FILE", str(place / "keys"))
    decided = this_server(place, {}, worker=False)
    assert decided.models[""].folder == place / "artifact"
    handed_on(decided, monkeypatch)
    monkeypatch.setenv("AD2KIT_THREADS", "7")  # whatever a worker may find there
    worker = this_server(place, {}, worker=True)
    assert worker == decided.model_copy(update={"pid": os.getppid()})
    assert worker.settings.keys() == {"one": ""}
    # The parent process of another server looks for itself.
    assert this_server(place, {}, worker=False).settings.threads == 7


@pytest.mark.parametrize("setting", ["", "AD2KIT_MODEL", "AD2KIT_SHADOW"])
def test_a_worker_knows_the_artefact_of_a_checkout_that_has_a_relative_name(
    setting: str,
    packaged: tuple[RunDir, BentoRecord],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """`bentoml serve`, as the README has it, finds the run by the name runs/RUN."""
    run = tmp_path / "runs" / packaged[0].path.name
    shutil.copytree(packaged[0].path, run)
    monkeypatch.chdir(tmp_path)
    if setting:
        monkeypatch.setenv(setting, f"runs/{run.name}")
    handed_on(this_server(tmp_path / "serving", {}, worker=False), monkeypatch)
    worker = this_server(tmp_path / "serving", {}, worker=True)
    assert worker.models[""].folder == run / "onnx" / "steady"
    shadow = worker.models[""] if setting == "AD2KIT_SHADOW" else None
    assert worker.shadow == shadow


def test_a_worker_serves_no_other_model_and_no_other_keys(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (place / "keys").write_text("one\n")
    monkeypatch.setenv("AD2KIT_API_KEYS_FILE", str(place / "keys"))
    handed_on(this_server(place, {}, worker=False), monkeypatch)
    this_server(place, {}, worker=True)
    (place / "keys").write_text("other\n")
    with pytest.raises(RunError, match="the list of API keys is not what it was") as refusal:
        this_server(place, {}, worker=True)
    assert "start the server again" in refusal.value.hint
    (place / "keys").write_text("one\n")
    manifest = place / "artifact" / OnnxArtifact.file_name
    manifest.write_text(manifest.read_text() + "\n")
    with pytest.raises(RunError, match=f"the artefact in {place}/artifact is not what it was"):
        this_server(place, {}, worker=True)


def test_a_worker_without_its_parent_does_not_start(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gone = this_server(place, {}, worker=False).model_copy(update={"pid": 2**22 + 1})
    monkeypatch.setenv(SERVER, gone.model_dump_json())
    with pytest.raises(RunError, match="process 4194305, is gone"):
        this_server(place, {}, worker=True)


def test_a_model_whose_files_are_gone_is_refused(
    place: Path, packaged: tuple[RunDir, BentoRecord], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AD2KIT_SHADOW", str(packaged[0].path))
    expected = Version.of(packaged[0].path)
    assert expected.folder == packaged[0].onnx("steady").resolve()
    assert this_server(place, {}, worker=False).shadow == expected
    (place / "artifact" / "model.onnx").unlink()
    with pytest.raises(ModelError, match=r"artifact/model\.onnx"):
        this_server(place, {}, worker=False)


@pytest.fixture
def elsewhere() -> Iterator[tuple[str, list[tuple[str, str | None]]]]:
    """A server that keeps what it was asked for and with which key; /away leads to /here."""
    asked = list[tuple[str, str | None]]()

    class Elsewhere(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append((self.path, self.headers["Authorization"]))
            self.send_response(302 if self.path == "/away" else 200)
            self.send_header("Location", "/here")
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *_: object) -> None:
            """Say nothing."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Elsewhere) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}", asked
        server.shutdown()


def test_only_other_machines_are_asked_by_the_proxy(
    elsewhere: tuple[str, list[tuple[str, str | None]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    address, asked = elsewhere
    for name in ("http_proxy", "HTTP_PROXY"):
        monkeypatch.setenv(name, address)
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    fetch("http://ad2kit.invalid/info", key="one")
    assert asked == [("http://ad2kit.invalid/info", "Bearer one")]
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    for host in ("127.0.0.1", "localhost"):
        fetch(f"{address.replace('127.0.0.1', host)}/info")
        assert asked.pop() == ("/info", None)
    with pytest.raises(OSError, match="refused"):
        fetch("http://ad2kit.invalid/info")


def test_a_key_is_not_sent_to_where_a_redirection_leads(
    elsewhere: tuple[str, list[tuple[str, str | None]]],
) -> None:
    address, asked = elsewhere
    fetch(f"{address}/away", key="one")
    assert asked == [("/away", "Bearer one"), ("/here", None)]
    assert issubclass(HTTPError, OSError)  # what callers of fetch catch
