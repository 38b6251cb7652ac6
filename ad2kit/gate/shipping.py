"""The choice of the variant to ship, for package and service: which may ship, and which does."""

from __future__ import annotations

import logging
from pathlib import Path
from statistics import geometric_mean
from typing import TYPE_CHECKING

from ad2kit.exporting.records import OnnxArtifact
from ad2kit.gate.records import LatencyReport, ParityReport
from ad2kit.run.errors import DataError, GateFailed, ModelError, RunError
from ad2kit.run.files import sha256_of
from ad2kit.run.folder import RunDir, judged_runs
from ad2kit.run.records import CampaignRecord

if TYPE_CHECKING:
    from ad2kit.tables.text_files import Quotes

logger = logging.getLogger(__name__)


def refusals(run: RunDir) -> dict[str, list[str]]:
    """Return the reasons against shipping each judged variant; an empty list if it may ship.

    A variant may be shipped if it passed the gate, if neither it nor the thresholds changed after
    the gate, and if the campaign that made the run has not refused it.
    """
    if not run.parity_report.is_file():
        return {}
    report = ParityReport.read(run.parity_report)
    campaign = campaign_of(run)
    thresholds = run.recipe.parity
    reasons_by_variant = {}
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
        reasons_by_variant[variant] = reasons
    return reasons_by_variant


def campaign_of(run: RunDir) -> CampaignRecord | None:
    """Return the record of the campaign that made a run; None if no campaign made it."""
    record = run.campaign_record
    return CampaignRecord.read(record) if record.is_file() else None


def passed_variants(run: RunDir) -> list[Path]:
    """Return the folders of the variants that may be shipped, the best by ``export.ship`` first.

    See :func:`refusals`.
    """
    folders = [run.onnx(variant) for variant, reasons in refusals(run).items() if not reasons]
    ship = run.recipe.export.ship
    times_ms = _times(run, folders) if ship != "smallest" else {}
    restless = set[str]()  # an answer of theirs depends on the texts beside it
    if folders and ship == "steady":
        verdicts = ParityReport.read(run.parity_report).variants
        restless = {verdict.variant for verdict in verdicts if not verdict.is_steady}
    # The sizes come from the manifests. A missing file is an error when a variant is loaded.
    sizes = {
        folder: OnnxArtifact.read(folder / OnnxArtifact.file_name).model_bytes for folder in folders
    }
    return sorted(
        folders,
        key=lambda folder: (folder.name in restless, times_ms.get(folder, 0.0), sizes[folder]),
    )


def _times(run: RunDir, folders: list[Path]) -> dict[Path, float]:
    """Return the geometric mean of each variant's p50 in ms; nothing if one is not measured."""
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
        RunError: there is no parity report yet, or the variant is unknown.
        GateFailed: the variant has not passed, and ``allow_failed_parity`` is false.
    """
    run.require(run.parity_report, command="parity")
    report = ParityReport.read(run.parity_report)
    variants = [verdict.variant for verdict in report.variants]
    if variant is not None and variant not in variants:
        raise RunError(
            f"no variant '{variant}' in {run.path}, only {', '.join(variants)}",
            hint="choose one of them, or add it to export.variants and run again",
        )
    for folder in passed_variants(run):
        if variant in (None, folder.name):
            return folder, False
    if not allow_failed_parity:
        reasons = [
            reason
            for name, variant_reasons in refusals(run).items()
            if variant in (None, name)
            for reason in variant_reasons
        ]
        raise GateFailed(
            f"{variant or 'no variant'} of {run.path} has not passed parity as it lies there now:\n"
            + "\n".join(f"  {reason}" for reason in reasons),
            hint=f"`ad2kit parity {run.path}` judges again what has changed; `ad2kit package "
            f"{run.path} --variant {variant or variants[0]} --allow-failed-parity` overrides",
        )
    return run.onnx(variant or variants[0]), True


def latest_passed_run(runs_dir: Path) -> RunDir:
    """Return the run under ``runs_dir`` that passed its gate last.

    A run that a campaign made is never returned, whatever thresholds it was judged by. It is served
    only if the user names it.

    Raises:
        RunError: no other run has passed.
    """
    campaign_run = None
    reasons = ""
    for run in judged_runs(runs_dir):
        try:
            if passed_variants(run):
                if not run.campaign_record.is_file():
                    return run
                campaign_run = campaign_run or run
            elif not reasons and not run.campaign_record.is_file():
                reasons = "\n  ".join([f"; the latest, {run.path}:", *_all_reasons(run)])
        except RunError as error:
            # One damaged run must not stop the service of the others.
            logger.warning("passed over: %s", error.message)
    exception = ""
    hint = "make one with `ad2kit run demo`, or look at `ad2kit parity`"
    if campaign_run is not None:
        exception = f" but those of campaigns, such as {campaign_run.path}"
        hint = "name the run that is meant"
    raise RunError(
        f"no run under {runs_dir.resolve()} has a variant that passed the parity gate"
        f"{exception}{reasons}",
        hint=hint,
    )


def _all_reasons(run: RunDir) -> list[str]:
    """Return the reasons against shipping all judged variants of a run, in one list."""
    return [reason for reasons in refusals(run).values() for reason in reasons]


def servable_artifact(folder: str | Path) -> Path:
    """Return the folder of the ONNX variant to serve.

    It is ``folder`` itself if it is an exported variant, or the variant to ship if it is a run.

    Raises:
        RunError: ``folder`` is a run in which no variant has passed the parity gate.
        ModelError: ``folder`` is neither a run nor a variant.
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
        reasons = "".join(f"\n  {reason}" for reason in _all_reasons(run))
        raise RunError(
            f"{path} has no variant that passed the parity gate{reasons}",
            hint=f"run `ad2kit export {path}`, or give the folder of one variant, {path}/onnx/fp32",
        )
    return variants[0]


def table_settings(
    folder: Path,
    artifact: OnnxArtifact,
    text_columns: tuple[str, ...] | None = None,
    csv_quotes: Quotes | None = None,
) -> tuple[tuple[str, ...], Quotes]:
    """Return how a variant reads tables: the text columns, and how CSV writes quotation marks.

    What is None is taken from the recipe of the run that the variant is part of.

    Raises:
        DataError: the variant is not part of a run, or reads another number of columns.
    """
    run = RunDir(folder.resolve().parent.parent)
    data = run.recipe.data if run.recipe_file.is_file() else None
    if text_columns is None and data is None:
        raise DataError(
            f"{folder} is not part of a run, so that no recipe says which columns to read",
            hint="name them with --text-columns a or --text-columns a,b",
        )
    columns = text_columns or (data.text_columns if data else ())
    if len(columns) != artifact.text_columns:
        raise DataError(
            f"this model reads {artifact.text_columns} text column(s), found {len(columns)}: "
            f"{', '.join(columns)}",
            hint="name one column, or two of a pair, with --text-columns a,b",
        )
    return columns, csv_quotes or (data.csv_quotes if data else "doubled")
