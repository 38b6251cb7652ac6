"""Which variants of a run may be shipped, and which of them is: what package and service take."""

from __future__ import annotations

import logging
from statistics import geometric_mean
from typing import TYPE_CHECKING

from ad2kit.errors import GateFailed, RunError
from ad2kit.files import sha256_of
from ad2kit.records import LatencyReport, OnnxArtifact
from ad2kit.run_dir import RunDir
from ad2kit.verdicts import ParityReport

if TYPE_CHECKING:
    from pathlib import Path

logger = logging.getLogger(__name__)


def passed_variants(run: RunDir) -> list[Path]:
    """Return the variants that passed parity and have not changed since, the one to ship first."""
    if not run.parity_report.is_file():
        return []
    report, recipe, found = ParityReport.read(run.parity_report), run.recipe, []
    if report.thresholds != recipe.parity:
        return []  # judged by other thresholds than the recipe has now
    for verdict in report.variants:
        manifest = run.onnx(verdict.variant) / OnnxArtifact.file_name
        if verdict.passed and manifest.is_file() and sha256_of(manifest) == verdict.manifest_sha256:
            found.append(manifest.parent)
    times = _times(run, found) if recipe.export.ship == "fastest" else {}
    # By the manifest: whether the files are there is seen, and said, when one is loaded.
    sizes = {f: OnnxArtifact.read(f / OnnxArtifact.file_name).model_bytes for f in found}
    return sorted(found, key=lambda folder: (times.get(folder, 0.0), sizes[folder]))


def _times(run: RunDir, folders: list[Path]) -> dict[Path, float]:
    """Return the geometric mean of the median times of variants; nothing if one is not measured."""
    if not run.latency_report.is_file():
        return {}
    latency = LatencyReport.read(run.latency_report)
    if any(
        latency.artifacts.get(folder.name) != sha256_of(folder / OnnxArtifact.file_name)
        for folder in folders
    ):
        return {}
    return {
        folder: geometric_mean(cell.p50_ms for cell in latency.cells if cell.system == folder.name)
        for folder in folders
    }


def choose_variant(
    run: RunDir, variant: str | None, *, allow_failed_parity: bool = False
) -> tuple[Path, bool]:
    """Return the folder of ``variant``, or of the one to ship, and whether its gate was overridden.

    Raises:
        RunError: no parity report yet, or an unknown variant.
        GateFailed: it has not passed.
    """
    run.require(run.parity_report, command="parity")
    report = ParityReport.read(run.parity_report)
    known = [verdict.variant for verdict in report.variants]
    if variant is not None and variant not in known:
        raise RunError(
            f"no variant '{variant}' in {run.path}, only {', '.join(known)}",
            hint="choose one of them, or add it to export.variants and run again",
        )
    for folder in passed_variants(run):
        if variant in (None, folder.name):
            return folder, False
    if not allow_failed_parity:
        failed = "; ".join(report.failures(variant))
        raise GateFailed(
            f"{variant or 'no variant'} of {run.path} has not passed parity as it lies there now: "
            f"{failed or 'the artefact or the thresholds changed after it was judged'}",
            hint="see parity.json; `ad2kit parity` judges again, --allow-failed-parity overrides",
        )
    return run.onnx(variant or known[0]), True


def latest_passed_run(runs_dir: Path) -> RunDir:
    """Return the run under ``runs_dir`` that passed its gate last.

    Raises:
        RunError: none has passed.
    """
    reports = sorted(runs_dir.glob("*/parity.json"), key=lambda path: path.stat().st_mtime)
    for report in reversed(reports):
        try:
            if passed_variants(RunDir(report.parent)):
                return RunDir(report.parent)
        except RunError as error:
            # One damaged run must not take the others out of service.
            logger.warning("passed over: %s", error.message)
    raise RunError(
        f"no run under {runs_dir.resolve()} has a variant that passed the parity gate",
        hint="make one with `ad2kit run demo`, or look at `ad2kit parity`",
    )
