"""Which variants of a run may be shipped, and which of them is: what package and service take."""

from __future__ import annotations

import logging
from pathlib import Path
from statistics import geometric_mean

from ad2kit.exporting.records import OnnxArtifact
from ad2kit.gate.records import LatencyReport, ParityReport
from ad2kit.run.errors import GateFailed, ModelError, RunError
from ad2kit.run.files import sha256_of
from ad2kit.run.folder import RunDir, judged_runs
from ad2kit.run.records import CampaignRecord

logger = logging.getLogger(__name__)


def refusals(run: RunDir) -> dict[str, list[str]]:
    """Return what speaks against shipping each variant that was judged; nothing if it may go.

    A variant may be shipped as long as neither it nor the thresholds changed after the gate, and
    where no rule has refused it: neither the gate nor that of the campaign that made the run.
    """
    if not run.parity_report.is_file():
        return {}
    report, campaign, found = ParityReport.read(run.parity_report), campaign_of(run), {}
    thresholds = run.recipe.parity
    for verdict in report.variants:
        variant, sha256 = verdict.variant, verdict.manifest_sha256
        reasons = report.failures(variant)
        manifest = run.onnx(variant) / OnnxArtifact.file_name
        if not manifest.is_file() or sha256_of(manifest) != sha256:
            reasons.append(f"{variant}: the artefact changed after it was judged")
        if report.thresholds != thresholds:
            reasons.append(f"{variant}: the thresholds of the recipe changed after it was judged")
        if campaign is not None:
            reasons += campaign.refusals(variant, sha256)
        found[variant] = reasons
    return found


def campaign_of(run: RunDir) -> CampaignRecord | None:
    """Return what the campaign that made a run has written into it, if one has."""
    record = run.campaign_record
    return CampaignRecord.read(record) if record.is_file() else None


def passed_variants(run: RunDir) -> list[Path]:
    """Return the variants that may be shipped, see :func:`refusals`; the one to ship first."""
    found = [run.onnx(variant) for variant, reasons in refusals(run).items() if not reasons]
    times = _times(run, found) if run.recipe.export.ship == "fastest" else {}
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
        reasons = [
            reason
            for name, all_of in refusals(run).items()
            if variant in (None, name)
            for reason in all_of
        ]
        raise GateFailed(
            f"{variant or 'no variant'} of {run.path} has not passed parity as it lies there now:\n"
            + "\n".join(f"  {reason}" for reason in reasons),
            hint=f"`ad2kit parity {run.path}` judges again what has changed; `ad2kit package "
            f"{run.path} --variant {variant or known[0]} --allow-failed-parity` overrides",
        )
    return run.onnx(variant or known[0]), True


def latest_passed_run(runs_dir: Path) -> RunDir:
    """Return the run under ``runs_dir`` that passed its gate last.

    Runs that a campaign made are passed over, by whatever thresholds they were judged: they are
    served when they are named.

    Raises:
        RunError: none has passed.
    """
    of_a_campaign, reasons = None, ""
    for run in judged_runs(runs_dir):
        try:
            if passed_variants(run):
                if not run.campaign_record.is_file():
                    return run
                of_a_campaign = of_a_campaign or run
            elif not reasons and not run.campaign_record.is_file():
                against = [reason for found in refusals(run).values() for reason in found]
                reasons = "\n  ".join([f"; the latest, {run.path}:", *against])
        except RunError as error:
            # One damaged run must not take the others out of service.
            logger.warning("passed over: %s", error.message)
    but = "" if of_a_campaign is None else f" but those of campaigns, such as {of_a_campaign.path}"
    raise RunError(
        f"no run under {runs_dir.resolve()} has a variant that passed the parity gate"
        f"{but}{reasons}",
        hint="make one with `ad2kit run demo`, or look at `ad2kit parity`"
        if of_a_campaign is None
        else "name the run that is meant",
    )


def servable_artifact(folder: str | Path) -> Path:
    """Return the folder of the ONNX variant to serve: ``folder`` itself, or a run's best.

    Raises:
        RunError: ``folder`` is a run in which no variant has passed the parity gate.
        ModelError: ``folder`` is neither.
    """
    path = Path(folder)
    if (path / OnnxArtifact.file_name).is_file():
        return path
    run = RunDir(path)
    if not run.recipe_file.is_file():
        raise ModelError(
            f"'{path}' is neither a run folder nor an exported variant: it has no "
            f"{OnnxArtifact.file_name} and no recipe.json",
            hint="give runs/NAME or runs/NAME/onnx/VARIANT",
        )
    variants = passed_variants(run)
    if not variants:
        reasons = [f"\n  {reason}" for found in refusals(run).values() for reason in found]
        raise RunError(
            f"{path} has no variant that passed the parity gate" + "".join(reasons),
            hint=f"run `ad2kit export {path}`, or give the folder of one variant, {path}/onnx/fp32",
        )
    return variants[0]
