"""The export stage: student -> ONNX through optimum, and the variants derived from it."""

from __future__ import annotations

import json
import logging
import shutil
import warnings
from importlib import metadata
from typing import TYPE_CHECKING

from ad2kit import __version__, models
from ad2kit.classifier import MODEL_FILE, read_artifact
from ad2kit.errors import MissingExtra
from ad2kit.files import fingerprint, sha256_of, sha256_of_folder, whole_folder, write_record
from ad2kit.records import DistillReport, OnnxArtifact
from ad2kit.run_dir import exclusive
from ad2kit.runtime import quiet_transformers

try:
    from optimum.exporters.onnx import main_export
    from torch.jit._trace import TracerWarning

    from ad2kit.quantize import quantize_int8
except ModuleNotFoundError as error:
    raise MissingExtra(error.name or "optimum", extra="cpu") from error

if TYPE_CHECKING:
    from pathlib import Path

    from ad2kit.run_dir import RunDir

logger = logging.getLogger(__name__)

_TOOLS = ("onnx", "optimum", "optimum-onnx", "torch", "transformers")


@exclusive
def export(run: RunDir) -> list[OnnxArtifact]:
    """Write every ONNX variant that the recipe of a run asks for.

    A variant that was exported from the same student with the same versions is kept.

    Raises:
        RunError: the run has no student yet.
        ModelError: the student, or a variant that is to be kept, was changed since it was written.
    """
    run.require(run.distill_report, command="distill")
    models.check_files(run.student)
    recipe, distilled = run.recipe, DistillReport.read(run.distill_report)
    artifacts = []
    # fp32 first: the others are made from its graph.
    for variant in sorted(recipe.export.variants, key=lambda name: name != "fp32"):
        inputs = fingerprint(
            __version__, variant, sha256_of(run.student / models.MANIFEST),
            [metadata.version(tool) for tool in _TOOLS], recipe.data.max_length_tokens,
        )  # fmt: skip
        folder = run.onnx(variant)
        if (folder / OnnxArtifact.file_name).is_file():
            artifact = read_artifact(folder)
            if artifact.inputs == inputs:
                logger.info("%s is already exported: %s", variant, folder)
                artifacts.append(artifact)
                continue
        with whole_folder(folder) as new:
            if variant == "fp32":
                _export_fp32(run.student, new)
            else:
                _copy_all_but_the_graph(run.onnx("fp32"), new)
                quantize_int8(run.onnx("fp32") / MODEL_FILE, new / MODEL_FILE)
            artifact = OnnxArtifact(
                variant=variant,
                inputs=inputs,
                task=distilled.task,
                labels=distilled.labels,
                max_length_tokens=recipe.data.max_length_tokens,
                pad_token_id=json.loads((new / "config.json").read_text())["pad_token_id"],
                text_columns=len(recipe.data.text_columns),
                files=sha256_of_folder(new),
                model_bytes=(new / MODEL_FILE).stat().st_size,
                lineage={
                    "ad2kit": __version__,
                    "recipe": recipe.name,
                    "recipe_sha256": fingerprint(recipe.model_dump(mode="json")),
                    "teacher": recipe.teacher.model,
                    "teacher_sha256": distilled.teacher_sha256,
                    "student_sha256": distilled.student_sha256,
                    **{f"{k}_sha256": facts.sha256 for k, facts in distilled.splits.items()},
                    **{tool: metadata.version(tool) for tool in _TOOLS},
                },
            )
            write_record(new / OnnxArtifact.file_name, artifact)
        logger.info("%s: %.1f MB", variant, artifact.model_bytes / 1e6)
        artifacts.append(artifact)
    return artifacts


def _export_fp32(student: Path, folder: Path) -> None:
    """Trace the student with optimum; the fidelity of the graph is the parity gate's question."""
    with warnings.catch_warnings(), quiet_transformers():
        # Constants of the mask computation, which do not depend on the example input.
        warnings.simplefilter("ignore", TracerWarning)
        # optimum 2.1 still passes an argument that torch and transformers have renamed.
        warnings.simplefilter("ignore", FutureWarning)
        warnings.simplefilter("ignore", DeprecationWarning)
        main_export(
            str(student),
            output=folder,
            task="text-classification",
            device="cpu",
            do_validation=False,
            no_post_process=True,
        )


def _copy_all_but_the_graph(source: Path, target: Path) -> None:
    for file in source.iterdir():
        if file.name not in (MODEL_FILE, OnnxArtifact.file_name):
            shutil.copy2(file, target / file.name)
