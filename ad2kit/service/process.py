"""Decisions of a server's parent process, which its workers follow.

A worker that decided for itself could serve another run, other keys or other metrics than its
siblings, because runs, files and free disk space change while a server runs.
"""

from __future__ import annotations

import hashlib
import os
import signal
import sys
import threading
import time
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bentoml.exceptions import InvalidArgument
from pydantic import BaseModel, ConfigDict

from ad2kit.exporting.classifier import read_artifact
from ad2kit.exporting.records import OnnxArtifact
from ad2kit.gate.shipping import latest_passed_run, servable_artifact
from ad2kit.run.errors import Ad2kitError, RunError
from ad2kit.run.files import sha256_of
from ad2kit.service.monitoring import metrics_folder
from ad2kit.service.settings import SERVER, Settings, read_settings

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

WATCH_S = 1.0


class Server(BaseModel):
    """The decisions that all workers of a server share.

    Attributes:
        pid: process id of the parent process.
        settings: the operator's settings.
        artifact: the folder of the artefact to serve.
        shadow: the folder of the teacher's artefact, if there is a shadow teacher.
        metrics: the folder in which the workers keep their metrics; None before the server starts.
        sha256: hashes of the two manifests and of the keys, as the parent process has seen them.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    pid: int
    settings: Settings
    artifact: Path
    shadow: Path | None
    metrics: Path | None = None
    sha256: dict[str, str]

    def hand_on(self) -> None:
        """Write the decisions into the environment that the workers will inherit."""
        server = self.model_copy(update={"metrics": metrics_folder()})
        os.environ[SERVER] = server.model_dump_json()


@contextmanager
def errors_of_bentoml() -> Iterator[None]:
    """Turn an ad2kit error into the type that BentoML's command prints without a traceback."""
    try:
        yield
    except Ad2kitError as error:
        raise InvalidArgument(f"{error.message}; {error.hint}") from error


def this_server(place: Path, arguments: Mapping[str, Any], *, worker: bool) -> Server:
    """Return the decisions of the server: a worker reads them, the parent process makes them.

    Args:
        place: the folder of the service; a Bento has the artefact there.
        arguments: the ``--arg`` values that BentoML hands on.
        worker: whether this process is a worker.

    Raises:
        UserError: a setting is refused, or the folder that it names cannot be served.
        RunError: the parent process is gone, or its artefacts or keys have changed since.
    """
    inherited = os.environ.get(SERVER)
    if worker and inherited is not None:
        server = Server.model_validate_json(inherited)
        if server.pid != os.getppid():
            raise RunError(
                f"the server that started this worker, process {server.pid}, is gone",
                hint="start the server again",
            )
        _check_unchanged(server)
        return server
    packed = place / "artifact"
    settings = read_settings(arguments, os.environ, sys.argv, packed=packed.is_dir())
    settings.check_they_fit()
    settings.keys()
    # Absolute, so that the parent process and its workers call the same folder by the same name.
    shadow = servable_artifact(settings.shadow).absolute() if settings.shadow is not None else None
    artifact = (packed if packed.is_dir() else _chosen(settings, place.parent)).absolute()
    if shadow is not None:
        read_artifact(shadow)
    settings.check_model_fits(read_artifact(artifact).length)
    sha256 = _sha256(settings, artifact, shadow)
    return Server(
        pid=os.getpid(),
        settings=settings,
        artifact=artifact,
        shadow=shadow,
        sha256=sha256,
    )


def end_with_parent(pid: int, drain_s: float) -> None:
    """Stop this worker as on SIGTERM when its parent process is gone, for example after a kill -9.

    Otherwise it would keep the port, and no new server could be started.

    Args:
        pid: process id of the parent process.
        drain_s: seconds in which the worker may answer its accepted requests.
    """

    def watch() -> None:
        while os.getppid() == pid:
            time.sleep(WATCH_S)
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(drain_s)
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=watch, name="end-with-parent", daemon=True).start()


def _chosen(settings: Settings, checkout: Path) -> Path:
    """Return the artefact that a checkout serves: ``model``'s, or that of the latest passed run.

    Raises:
        UserError: there is none.
    """
    if settings.model is not None:
        return servable_artifact(settings.model)
    runs_dir = Path(settings.runs_dir or "runs")
    if settings.runs_dir is None and not runs_dir.is_dir():
        runs_dir = checkout / "runs"
    return servable_artifact(latest_passed_run(runs_dir).path)


def _sha256(settings: Settings, artifact: Path, shadow: Path | None) -> dict[str, str]:
    """Return the hashes of the artefacts' manifests and of the keys, by subject in words."""
    hashes = {
        f"the artefact in {folder}": sha256_of(folder / OnnxArtifact.file_name)
        for folder in (artifact, shadow)
        if folder is not None
    }
    keys = "\n".join(f"{name}:{key}" for key, name in settings.keys().items())
    return hashes | {"the list of API keys": hashlib.sha256(keys.encode()).hexdigest()}


def _check_unchanged(server: Server) -> None:
    """Refuse to start a worker that would serve another model or other keys than its siblings.

    Raises:
        RunError: names the artefact or the keys that have changed.
    """
    hashes = _sha256(server.settings, server.artifact, server.shadow)
    for subject, expected in server.sha256.items():
        if hashes.get(subject) != expected:
            raise RunError(
                f"{subject} is not what it was when this server was started",
                hint="start the server again, so that all its workers serve the same",
            )
