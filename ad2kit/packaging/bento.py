"""The package stage: builds a Bento from a gated variant, tests it over HTTP, publishes its tag.

The Bento holds the service, the artefact, ad2kit's own code, every requirement pinned (none
of them torch), and the lineage: recipe, data fingerprints, parity report, versions, sha256.
"""

from __future__ import annotations

import json
import logging
import os
import platform
import re
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ad2kit import __version__
from ad2kit.exporting.classifier import read_artifact
from ad2kit.gate.records import BentoRecord, ParityReport
from ad2kit.gate.shipping import campaign_of, choose_variant
from ad2kit.packaging.check import compare_service, fetch
from ad2kit.run.errors import MissingExtra, RunError
from ad2kit.run.files import fingerprint, sha256_of, write_record, write_text
from ad2kit.run.folder import exclusive
from ad2kit.run.machine import onnxruntime_distribution
from ad2kit.service.settings import PREFIX
from ad2kit.training.records import DistillReport

try:
    import bentoml
except ModuleNotFoundError as error:
    raise MissingExtra("bentoml", extra="cpu") from error
from importlib import metadata

from packaging.requirements import Requirement

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from ad2kit.run.folder import RunDir
    from ad2kit.run.recipe import Recipe


# Vendors' telemetry is off unless the user says otherwise; read when bentoml is imported.
os.environ.setdefault("BENTOML_DO_NOT_TRACK", "true")

logger = logging.getLogger(__name__)

START_TIMEOUT_S = 90.0
# `bentoml serve`, told by Linux to stop when its parent dies: a kill -9 leaves no server behind.
_SERVE = """
import ctypes, os, signal, sys
if sys.platform == "linux":
    PR_SET_PDEATHSIG = 1
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
os.execv(sys.executable, [sys.executable, "-m", "bentoml", "serve", *sys.argv[1:]])
"""


@exclusive
def package(
    run: RunDir, *, variant: str | None = None, allow_failed_parity: bool = False
) -> BentoRecord:
    """Build a Bento from a run, compare its service with the artefact, and publish its tag.

        tag = ad2kit.package(run).tag

    Args:
        run: a run whose parity was judged.
        variant: the variant to take; if None, ``export.ship`` chooses among those that passed.
        allow_failed_parity: take ``variant`` although its gate failed; the lineage records this.

    Raises:
        RunError: no parity report yet, or an unknown variant.
        GateFailed: no variant passed, or the service answers differently from the artefact.
    """
    folder, forced = choose_variant(run, variant, allow_failed_parity=allow_failed_parity)
    recipe = run.recipe
    report = ParityReport.read(run.parity_report)
    campaign = campaign_of(run)
    artifact = read_artifact(folder)
    lineage = {
        "recipe": recipe.model_dump(mode="json"),
        "distill": DistillReport.read(run.distill_report).model_dump(mode="json"),
        "parity": {"forced": forced, **report.model_dump(mode="json")},
        "requirements": pinned_requirements(),
    }
    if campaign is not None:
        lineage["campaign"] = campaign.model_dump(mode="json")
    # Not in the run folder: BentoML refuses to build below a hidden folder.
    with tempfile.TemporaryDirectory(prefix="ad2kit-package-") as temporary:
        context = Path(temporary) / "context"
        context.mkdir()
        # A change of the code, of the service or of the artefact gives another tag.
        inputs = _lay_out(context, recipe, folder, lineage)
        tag = f"ad2kit-{recipe.name}:{inputs[:12]}"
        if run.bento_record.is_file() and _published(tag):
            record = BentoRecord.read(run.bento_record)
            if record.inputs == inputs:
                logger.info("already packaged: %s", tag)
                return record

        # The server under test gets no settings of other services, and a key that nobody else has.
        key = secrets.token_urlsafe()
        environment = {
            name: value for name, value in os.environ.items() if not name.startswith(PREFIX)
        }
        bento = _build(context, Path(temporary) / "store", tag, environment)
        environment[f"{PREFIX}API_KEYS"] = key
        with served(bento, bento.parent, environment=environment) as address:
            comparison = compare_service(run, folder, address, key)
        comparison.check_same(f"{tag} was not published")
        record = BentoRecord(
            inputs=inputs,
            tag=tag,
            variant=artifact.variant,
            forced=forced,
            service_texts=comparison.texts,
            service_label_flips=comparison.flips,
            service_score_gap=comparison.gap,
        )
        if _published(tag):
            bentoml.bentos.delete(tag)  # left by a run that was killed before it wrote its record
        published = bentoml.bentos.import_bento(str(bento), input_format="folder")
        _let_others_read(Path(published.path), like=context)
    write_record(run.bento_record, record)
    logger.info("published %s: %d answers over HTTP equal the artefact's", tag, comparison.texts)
    return record


def _lay_out(context: Path, recipe: Recipe, folder: Path, lineage: dict[str, Any]) -> str:
    """Write what a Bento is built from; return the fingerprint of it.

    That is the service, ad2kit's own code, the artefact, the lineage, the bentofile, and what an
    image is built with.
    """
    copy_package(context / "ad2kit")
    serving = service_file().parent
    for name in ("service.py", "page.html", "deploy/install.sh"):
        shutil.copy2(serving / name, context / Path(name).name)
    dockerfile = (serving / "deploy" / "Dockerfile").read_text()
    version = platform.python_version()
    write_text(
        context / "Dockerfile",
        re.sub(r"(?m)^ARG PYTHON=.*$", f"ARG PYTHON={version}", dockerfile),
    )
    shutil.copytree(folder, context / "artifact")
    write_text(context / "lineage.json", json.dumps(lineage, indent=2))
    bentofile = {
        "service": "service:Ad2kitClassifier",
        "name": f"ad2kit-{recipe.name}",
        "description": f"{recipe.description} Variant {folder.name}.",
        "labels": {"ad2kit": __version__, "variant": folder.name, "recipe": recipe.name},
        "include": [
            "service.py",
            "page.html",
            "Dockerfile",
            "install.sh",
            "lineage.json",
            "artifact/*",
            "ad2kit/",
        ],
        "python": {
            "packages": lineage["requirements"],
            "lock_packages": False,
        },
    }
    write_text(context / "bentofile.yaml", json.dumps(bentofile))  # JSON is YAML
    files = sorted(path for path in context.rglob("*") if path.is_file())
    return fingerprint({str(path.relative_to(context)): sha256_of(path) for path in files})


@contextmanager
def served(
    target: str | Path, folder: Path, *arguments: str, environment: Mapping[str, str] | None = None
) -> Iterator[str]:
    """Serve a Bento on a free loopback port, and yield the address of the service.

    Args:
        target: the first argument of ``bentoml serve``: a Bento's folder or tag, or a project.
        folder: working directory of the server; its log goes there too.
        arguments: more arguments of ``bentoml serve``.
        environment: variables of the server; those of this process if None.

    Raises:
        RunError: the server ended, or was not ready in time; the message holds its last lines.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [
        sys.executable,
        "-c",
        _SERVE,
        str(target),
        "--host",
        "127.0.0.1",
        "--port",
        str(port),
        *arguments,
    ]
    log_path = folder / "server.log"
    with log_path.open("wb") as log:
        process = subprocess.Popen(command, cwd=folder, env=environment, stdout=log, stderr=log)
        try:
            address = f"http://127.0.0.1:{port}"
            _wait_until_ready(process, address, log_path)
            yield address
        finally:
            process.terminate()
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _published(tag: str) -> bool:
    try:
        bentoml.bentos.get(tag)
    except bentoml.exceptions.NotFound:
        return False
    return True


def _build(context: Path, store: Path, tag: str, environment: Mapping[str, str]) -> Path:
    """Build the Bento into a store of its own, where nobody can serve it yet."""
    store.mkdir()
    result = subprocess.run(
        [sys.executable, "-m", "bentoml", "build", str(context), "--version", tag.split(":")[1]],
        env={**environment, "BENTOML_HOME": str(store)},
        cwd=context,
        capture_output=True,
        text=True,
        check=False,
    )
    bento = store / "bentos" / tag.replace(":", "/")
    if result.returncode or not (bento / "bento.yaml").is_file():
        raise RunError(
            f"`bentoml build` failed with exit code {result.returncode}:\n"
            f"{(result.stdout + result.stderr)[-2000:]}",
            hint="`ad2kit doctor` shows the versions; the run itself is unharmed",
        )
    return bento


def _let_others_read(bento: Path, like: Path) -> None:
    """Let others read a Bento as they can read the folder ``like``; BentoML locks them out."""
    allowed = like.stat().st_mode & 0o555
    for path in (bento, *bento.rglob("*")):
        mode = path.stat().st_mode
        executable = path.is_dir() or mode & 0o100
        path.chmod(mode | (allowed if executable else allowed & 0o444))


def _wait_until_ready(process: subprocess.Popen[bytes], address: str, log: Path) -> None:
    deadline = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < deadline and process.poll() is None:
        try:
            fetch(f"{address}/readyz", timeout_s=2)
            return
        except OSError:
            time.sleep(0.1)
    tail = log.read_text(errors="replace")[-2000:]
    state = "is not ready" if process.poll() is None else f"ended with {process.returncode}"
    raise RunError(
        f"the service {state} after {START_TIMEOUT_S:g} s at most; its log ends:\n{tail}",
        hint="`ad2kit doctor` shows what is installed; the run itself is unharmed",
    )


def service_file() -> Path:
    """Return the path of the BentoML service, in an installed wheel or in a checkout."""
    package_folder = Path(__file__).parents[1]
    installed = package_folder / "_serving" / "service.py"
    if installed.is_file():
        return installed
    return package_folder.parent / "serving" / "service.py"


def pinned_requirements() -> list[str]:
    """Return the requirements of a serving process, each pinned to the installed version.

    ad2kit itself is left out. We compute the closure here instead of using BentoML's lock, which
    would need the network at build time.
    """
    pending = [onnxruntime_distribution(), *(metadata.requires("ad2kit") or ())]
    pins: dict[str, str] = {}
    while pending:
        requirement = Requirement(pending.pop())
        # Our own `serve` extra counts; other packages' extras count only where they are required.
        active = [
            extra
            for extra in ("", "serve", *requirement.extras)
            if requirement.marker is None or requirement.marker.evaluate({"extra": extra})
        ]
        name = requirement.name.lower().replace("_", "-")
        if not active or name in pins or name == "ad2kit":
            continue
        distribution = metadata.distribution(name)
        pins[name] = distribution.version
        for text in distribution.requires or ():
            child = Requirement(text)
            extras = requirement.extras or {""}
            if child.marker is None or any(
                child.marker.evaluate({"extra": extra}) for extra in extras
            ):
                child.marker = None
                pending.append(str(child))
    return [f"{name}=={version.split('+')[0]}" for name, version in sorted(pins.items())]


def copy_package(folder: Path) -> None:
    """Copy the code of the installed ad2kit, editable or not, to ``folder``.

    A Bento answers with the code that was tested with it, whatever is installed where it runs.
    """
    package_folder = Path(__file__).parents[1]
    for path in package_folder.rglob("*"):
        if path.suffix in (".py", ".typed", ".html"):
            copy = folder / path.relative_to(package_folder)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, copy)
