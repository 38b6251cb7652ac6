"""What the parent process of a server decides once, and how its workers follow it.

A worker that looked for itself could serve another run, other keys or other metrics than its
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
    """What all workers of a server have in common.

    Attributes:
        pid: the parent process.
        settings: what the operator has set.
        artifact: the folder of the artefact to serve.
        shadow: the folder of the teacher's artefact, if one is asked in the background.
        metrics: the folder where the workers leave their numbers; None before the server starts.
        sha256: of the two manifests and of the keys, as the parent process has seen them.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    pid: int
    settings: Settings
    artifact: Path
    shadow: Path | None
    metrics: Path | None = None
    sha256: dict[str, str]

    def hand_on(self) -> None:
        """Write it into the environment that the workers of this process will have."""
        server = self.model_copy(update={"metrics": metrics_folder()})
        os.environ[SERVER] = server.model_dump_json()


@contextmanager
def errors_of_bentoml() -> Iterator[None]:
    """Turn an error of ours into the one that BentoML's command prints without a traceback."""
    try:
        yield
    except Ad2kitError as error:
        raise InvalidArgument(f"{error.message}; {error.hint}") from error


def this_server(place: Path, arguments: Mapping[str, Any], *, worker: bool) -> Server:
    """Return what the parent process has handed on to this worker, or decide it, in the parent.

    Args:
        place: the folder of the service; a Bento has the artefact there.
        arguments: what BentoML handed on of ``--arg``.
        worker: whether this process is a worker.

    Raises:
        UserError: a setting is refused, or what it names cannot be served.
        RunError: the parent process is gone, or what it has decided about was changed since.
    """
    handed = os.environ.get(SERVER)
    if worker and handed is not None:
        server = Server.model_validate_json(handed)
        if server.pid != os.getppid():
            raise RunError(
                f"the server that started this worker, process {server.pid}, is gone",
                hint="start the server again",
            )
        _insist_unchanged(server)
        return server
    packed = place / "artifact"
    settings = read_settings(arguments, os.environ, sys.argv, packed=packed.is_dir())
    settings.insist_that_they_fit()
    settings.keys()
    shadow = servable_artifact(settings.shadow) if settings.shadow is not None else None
    artifact = packed if packed.is_dir() else _chosen(settings, place.parent)
    for folder in filter(None, (shadow, artifact)):
        read_artifact(folder)
    sha256 = _sha256(settings, artifact, shadow)
    return Server(
        pid=os.getpid(),
        settings=settings,
        artifact=artifact.absolute(),
        shadow=shadow,
        sha256=sha256,
    )


def end_with_parent(pid: int, drain_s: float) -> None:
    """Let this worker stop as on SIGTERM when its parent process is gone, after a kill -9 say.

    It would keep the port, and no new server could be started.

    Args:
        pid: the parent process.
        drain_s: how long it may take to answer what it has accepted.
    """

    def watch() -> None:
        while os.getppid() == pid:
            time.sleep(WATCH_S)
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(drain_s)
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=watch, name="end-with-parent", daemon=True).start()


def _chosen(settings: Settings, checkout: Path) -> Path:
    """Return the artefact that a checkout serves: of ``model``, or of the latest run that passed.

    Raises:
        UserError: there is none.
    """
    if settings.model is not None:
        return servable_artifact(settings.model)
    here = Path(settings.runs_dir or "runs")
    if settings.runs_dir is None and not here.is_dir():
        here = checkout / "runs"
    return servable_artifact(latest_passed_run(here).path)


def _sha256(settings: Settings, artifact: Path, shadow: Path | None) -> dict[str, str]:
    found = {
        f"the artefact in {folder}": sha256_of(folder / OnnxArtifact.file_name)
        for folder in (artifact, shadow)
        if folder is not None
    }
    keys = "\n".join(settings.keys())
    return found | {"the list of API keys": hashlib.sha256(keys.encode()).hexdigest()}


def _insist_unchanged(server: Server) -> None:
    """Refuse to start a worker that would serve something else than its siblings.

    Raises:
        RunError: names what was changed.
    """
    found = _sha256(server.settings, server.artifact, server.shadow)
    for what, expected in server.sha256.items():
        if found.get(what) != expected:
            raise RunError(
                f"{what} is not what it was when this server was started",
                hint="start the server again, so that all its workers serve the same",
            )
