"""Decisions of a server's parent process, which its workers follow.

A worker that decided for itself could serve another run, other keys or other metrics than its
siblings, because runs, files and free disk space change while a server runs.

A setting may name a folder that later leads to another artefact. The parent process tries this
artefact in a process of its own, and then writes a new decision, which the workers follow one by
one. If the artefact cannot be served, the old one stays.
"""

from __future__ import annotations

import hashlib
import logging
import os
import signal
import subprocess
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
from ad2kit.gate.shipping import latest_passed_run
from ad2kit.run.errors import Ad2kitError, RunError
from ad2kit.run.files import sha256_of, write_text
from ad2kit.service.models import Version
from ad2kit.service.monitoring import check_shadow, metrics_folder, serve_metrics
from ad2kit.service.settings import SERVER, Settings, read_settings

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

logger = logging.getLogger(__name__)

WATCH_S = 1.0
_DECISIONS = "server.json"
# What stands for the keys where models have names; a name has no spaces.
KEYS = "the list of API keys"
# A version that cannot be served may be a copy that is not complete yet.
RETRY_S = 30.0
_TRY = """
import sys
from ad2kit.run.errors import Ad2kitError
from ad2kit.service.models import Model, Version
try:
    Model.load(Version.of(sys.argv[1]), threads=1)
except Ad2kitError as error:
    sys.exit(f"{error.message}; {error.hint}")
print("it can be served")
"""
_TRY_S = 600.0


class Server(BaseModel):
    """The decisions that all workers of a server share.

    Attributes:
        pid: process id of the parent process.
        settings: the operator's settings.
        models: the versions of the models by name; the service's own model has the name "".
        refused: why the newest version of a model, or of the keys, is not in force, by its name.
        shadow: the teacher's artefact, if there is a shadow teacher.
        metrics: the folder in which the workers keep their metrics; None before the server starts.
        keys_sha256: the hash of the keys.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    pid: int
    settings: Settings
    models: dict[str, Version]
    refused: dict[str, str] = {}
    shadow: Version | None
    metrics: Path | None = None
    keys_sha256: str

    def hand_on(self) -> None:
        """Write the decisions into the environment that the workers will inherit.

        From now on the folders of the settings are watched. A new decision stands in a file.

        Raises:
            UserError: the port for the metrics cannot be had.
        """
        folder = metrics_folder()
        server = self.model_copy(update={"metrics": folder})
        os.environ[SERVER] = server.model_dump_json()
        if self.settings.metrics_port is not None:
            serve_metrics(folder, self.settings.metrics_port)
        if self.settings.is_watched:
            Watch(server, folder / _DECISIONS).start()

    def newest(self) -> Server:
        """Return the newest decisions."""
        if self.metrics is None or not (self.metrics / _DECISIONS).is_file():
            return self
        return Server.model_validate_json((self.metrics / _DECISIONS).read_bytes())

    def check(self, version: Version, *, own: bool) -> None:
        """Refuse a version that does not fit the settings, or whose shadow has another task.

        Raises:
            UserError, ModelError: say what does not fit.
        """
        artifact = read_artifact(version.folder)
        self.settings.check_model_fits(artifact.length)
        if own and self.shadow is not None:
            check_shadow(artifact, read_artifact(self.shadow.folder), self.shadow.folder)


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
        server = server.newest()
        _check_unchanged(server)
        return server
    packed = place / "artifact"
    settings = read_settings(arguments, os.environ, sys.argv, packed=packed.is_dir())
    settings.check_they_fit()
    settings.keys()
    shadow = None if settings.shadow is None else Version.of(settings.shadow)
    given: dict[str, str | Path] = dict(settings.followed())
    if not settings.model:
        given[""] = packed if packed.is_dir() else _latest(settings, place.parent)
    server = Server(
        pid=os.getpid(),
        settings=settings,
        models={name: Version.of(folder) for name, folder in sorted(given.items())},
        shadow=shadow,
        keys_sha256=_keys_sha256(settings),
    )
    for name, version in server.models.items():
        server.check(version, own=not name)
    return server


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


class Watch:
    """The parent process's watch over the folders that its settings name.

    Args:
        server: the decisions so far.
        file: where a new decision is written.
    """

    def __init__(self, server: Server, file: Path) -> None:
        self.server = server
        self.file = file
        self._tried = dict[str, tuple[Version, float]]()

    def start(self) -> None:
        """Look again and again, in a thread."""
        threading.Thread(target=self._watch, name="ad2kit-watch", daemon=True).start()

    def _watch(self) -> None:
        while True:
            time.sleep(WATCH_S)
            try:
                self.look()
            except Exception:  # a defect, or no room for the file: the workers go on as they are
                logger.exception("looking for new versions of the models failed")

    def look(self) -> None:
        """Write a new decision if a folder leads to another artefact, or the keys have changed."""
        models = dict(self.server.models)
        refused = dict(self.server.refused)
        for name, given in self.server.settings.followed().items():
            try:
                version = Version.of(given, models[name])
            except (Ad2kitError, OSError) as error:
                refused[name] = _words(error)
                continue
            if version == models[name]:
                refused.pop(name, None)
            elif self._is_due(name, version):
                refused[name] = self._fault(version, own=not name)
                if not refused[name]:
                    models[name] = version
                    del refused[name]
        keys_sha256 = self.server.keys_sha256
        try:
            keys_sha256 = _keys_sha256(self.server.settings)
            refused.pop(KEYS, None)
        except (Ad2kitError, OSError) as error:
            refused[KEYS] = _words(error)
        update = {"models": models, "refused": refused, "keys_sha256": keys_sha256}
        decided = self.server.model_copy(update=update)
        if decided != self.server:
            write_text(self.file, decided.model_dump_json())
            self.server = decided

    def _is_due(self, name: str, version: Version) -> bool:
        """Tell whether to try a version: one that has failed is tried again after a while."""
        last, when = self._tried.get(name, (None, 0.0))
        now = time.monotonic()
        if version == last and now < when + RETRY_S:
            return False
        self._tried[name] = (version, now)
        return True

    def _fault(self, version: Version, *, own: bool) -> str:
        """Return why a version cannot be served; "" if it can."""
        try:
            self.server.check(version, own=own)
        except (Ad2kitError, OSError) as error:
            return _words(error)
        # In a process of its own: what happens to it does not happen to the server.
        python_path = os.pathsep.join(sys.path)
        try:
            tried = subprocess.run(
                [sys.executable, "-c", _TRY, str(version.folder)],
                env=os.environ | {"PYTHONPATH": python_path},
                capture_output=True,
                text=True,
                check=False,
                timeout=_TRY_S,
            )
        except subprocess.TimeoutExpired:
            return f"a process that loaded it took longer than {_TRY_S:g} s"
        # Not its exit code: Circus may collect that first, and Python then takes it for 0.
        if tried.stdout == "it can be served\n":
            return ""
        last_line = tried.stderr.strip().rpartition("\n")[2]
        return last_line or f"a process that loaded it ended with {tried.returncode}"


def follow(server: Server, take: Callable[[Server], None]) -> None:
    """Hand new decisions of the parent process to a worker, in a thread.

    Args:
        server: the decisions so far.
        take: puts new decisions into force.
    """

    def watch() -> None:
        taken = server
        while True:
            time.sleep(WATCH_S)
            try:
                newest = taken.newest()
                if newest != taken:
                    take(newest)
                    taken = newest
            except Exception:  # whatever it is, what was in force stays; try again
                logger.exception("a new decision could not be put into force")
                time.sleep(RETRY_S)

    threading.Thread(target=watch, name="ad2kit-follow", daemon=True).start()


def _latest(settings: Settings, checkout: Path) -> Path:
    """Return the most recent run of a checkout that passed its gate.

    Raises:
        UserError: there is none.
    """
    runs_dir = Path(settings.runs_dir or "runs")
    if settings.runs_dir is None and not runs_dir.is_dir():
        runs_dir = checkout / "runs"
    return latest_passed_run(runs_dir).path


def _keys_sha256(settings: Settings) -> str:
    """Return the hash of the keys and their names."""
    keys = "\n".join(f"{name}:{key}" for key, name in settings.keys().items())
    return hashlib.sha256(keys.encode()).hexdigest()


def _check_unchanged(server: Server) -> None:
    """Refuse to start a worker that would serve another model or other keys than its siblings.

    Raises:
        RunError: names the artefact or the keys that have changed.
    """
    versions = [*server.models.values(), *([server.shadow] if server.shadow else [])]
    changed = [
        f"the artefact in {version.folder}"
        for version in versions
        if sha256_of(version.folder / OnnxArtifact.file_name) != version.sha256
    ]
    if _keys_sha256(server.settings) != server.keys_sha256:
        changed.append(KEYS)
    if changed:
        raise RunError(
            f"{changed[0]} is not what it was when this server was started",
            hint="start the server again, so that all its workers serve the same",
        )


def _words(error: Exception) -> str:
    """Return an error in one line."""
    return f"{error.message}; {error.hint}" if isinstance(error, Ad2kitError) else str(error)
