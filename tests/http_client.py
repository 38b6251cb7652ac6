"""A small client of the service, for tests: one connection a request; errors are checked."""

from __future__ import annotations

import http.client
import json
import os
import socket
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import psutil

from ad2kit.packaging.bento import served

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

CHECKOUT = Path(__file__).parents[1]
SERVICE = "serving.service:Ad2kitClassifier"
JSON = {"Content-Type": "application/json"}


@contextmanager
def serving(folder: Path, *given: str) -> Iterator[str]:
    """Serve the checkout's service with some ``--arg``; the log goes to ``folder``."""
    arguments = ["--working-dir", str(CHECKOUT), *(f"--arg={each}" for each in given)]
    with served(SERVICE, folder, *arguments) as address:
        yield address


def free_port() -> int:
    """A port of the loopback interface that nobody listens at."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def bearer(key: str) -> dict[str, str]:
    """The headers of a JSON request with a key."""
    return {**JSON, "Authorization": f"Bearer {key}"}


def refused(target: str | Path, *arguments: str, **environment: str) -> str:
    """What `bentoml serve` says that does not start."""
    done = subprocess.run(
        [sys.executable, "-m", "bentoml", "serve", str(target), *arguments],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert done.returncode != 0
    said = " ".join((done.stdout + done.stderr).split())
    assert "Traceback" not in said
    return said


def wait_for(what: Callable[[], Any]) -> None:
    """Wait until something is true, which a server does in its own time."""
    end = time.monotonic() + 60
    while not what():
        assert time.monotonic() < end
        time.sleep(0.05)


def server_at(address: str) -> psutil.Process:
    """The parent process of a server that this process started."""
    port = address.rpartition(":")[2]
    (server,) = (each for each in psutil.Process().children() if port in command_of(each))
    return server


def command_of(process: psutil.Process) -> list[str]:
    """The command line of a process, which one that has ended does not have."""
    try:
        return list(map(str, process.cmdline()))
    except psutil.NoSuchProcess:
        return []


def log_of(folder: Path) -> list[dict[str, Any]]:
    """The records of the workers; the lines of BentoML's parent process are not JSON."""
    lines = (folder / "server.log").read_text().splitlines()
    return [json.loads(line) for line in lines if line.startswith("{")]


def metrics_of(address: str) -> dict[str, float]:
    """What a service has counted, by name and labels."""
    lines = call(address, "GET", "/metrics").body.decode().splitlines()
    rows = (line.rpartition(" ") for line in lines if not line.startswith("#"))
    return {name: float(value) for name, _, value in rows}


class Reply(NamedTuple):
    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def predictions(self) -> list[dict[str, Any]]:
        assert self.status == 200, self.body
        assert set(self.json) == {"predictions"}
        return list(self.json["predictions"])


def call(
    address: str,
    method: str,
    path: str,
    body: bytes | Iterable[bytes] | None = None,
    headers: dict[str, str] | None = None,
) -> Reply:
    """Make one request; a body that is no bytes is sent in chunks, without a Content-Length."""
    connection = http.client.HTTPConnection(address.removeprefix("http://"), timeout=60)
    try:
        connection.request(method, path, body, headers or {}, encode_chunked=True)
        response = connection.getresponse()
        names = {name.lower(): value for name, value in response.getheaders()}
        return Reply(response.status, names, response.read())
    finally:
        connection.close()


def classify(address: str, texts: Any) -> Reply:
    """Ask for texts with all their scores."""
    body = json.dumps({"texts": texts, "scores": True}).encode()
    return call(address, "POST", "/classify", body, JSON)


def check_error(reply: Reply, status: int, kind: str) -> dict[str, Any]:
    """Check the contract of errors, and return what the error says."""
    assert reply.status == status, reply.body
    assert reply.headers["content-type"] == "application/json"
    assert set(reply.json) == {"error"}
    error: dict[str, Any] = reply.json["error"]
    assert set(error) == {"type", "message", "hint"}
    assert all(isinstance(value, str) and value for value in error.values())
    assert error["type"] == kind
    assert "Traceback" not in error["message"]
    return error
