"""The export stage: convert the student to ONNX, and derive the variants from it.

optimum converts where it is installed and works. It needs transformers 4; elsewhere
``torch.onnx.export`` converts. The gate judges both alike.
"""

from __future__ import annotations

import inspect
import logging
import shutil
import tempfile
import time
import warnings
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from ad2kit import __version__
from ad2kit.data import splits
from ad2kit.exporting.classifier import MODEL_FILE, OnnxClassifier, read_artifact
from ad2kit.exporting.conversion import LabelledRows
from ad2kit.exporting.golden import GOLDEN_FILE, add_golden_answers
from ad2kit.exporting.records import OnnxArtifact, QuantisationSearch
from ad2kit.exporting.tokenise import tokenisation, write_tokenizer
from ad2kit.models import text_model
from ad2kit.run.errors import MissingExtra, RunError
from ad2kit.run.files import fingerprint, sha256_of, sha256_of_folder, whole_folder, write_record
from ad2kit.run.folder import exclusive
from ad2kit.run.machine import onnxruntime_distribution, quiet_transformers, versions
from ad2kit.run.sections import Variant
from ad2kit.statistics.metrics import fit_temperature
from ad2kit.tables.texts import text_of
from ad2kit.training.records import DistillReport
from ad2kit.training.teachers import judged_select

try:
    import onnx
    import torch
    from torch.jit._trace import TracerWarning

    from ad2kit.exporting.fuse import fuse, node_counts, read_first_token_only, to_fp16
    from ad2kit.exporting.int8 import Int8Search, weights_in_8_bits
    from ad2kit.exporting.steady import make_steady
    from ad2kit.models.text_model import predict_logits
except ModuleNotFoundError as error:
    raise MissingExtra(error.name or "onnx", extra="cpu") from error

_NO_OPTIMUM = ""  # the reason why optimum is not in use
try:
    from optimum.exporters.onnx import main_export
except ImportError as error:  # it is not installed, or does not work with this transformers
    main_export = None
    _NO_OPTIMUM = str(error).partition("\n")[0]

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy as np
    from numpy.typing import NDArray

    from ad2kit.exporting.tokenise import Tokens
    from ad2kit.models.text_model import TextModel
    from ad2kit.run.folder import RunDir

logger = logging.getLogger(__name__)

_TOOLS = ("onnx", "optimum", "optimum-onnx", "torch", "transformers")
# What optimum takes for these families.
_OPSET = 18
# A static quantisation learns the range of activations from this many training texts.
_CALIBRATION_TEXTS = 128
# All activations of a calibration batch are in memory at once.
_CALIBRATION_BATCH = 4


@exclusive
def export(run: RunDir) -> list[OnnxArtifact]:
    """Write every ONNX variant that the recipe of a run asks for.

        artifacts = ad2kit.export(run)

    A variant that was exported from the same student with the same versions is kept.

    Raises:
        RunError: the run has no student yet.
        ModelError: a file of the student or of an existing variant changed since it was written, or
            the execution provider of the recipe is absent.
    """
    run.require(run.distill_report, command="distill")
    text_model.check_files(run.student)
    variants = run.recipe.export.variants
    # A variant may be made from an earlier one of this order.
    return [_export(run, v) for v in sorted(variants, key=get_args(Variant).index)]


def _export(run: RunDir, variant: Variant) -> OnnxArtifact:
    recipe = run.recipe
    distilled = DistillReport.read(run.distill_report)
    tools = versions((*_TOOLS, onnxruntime_distribution()))
    inputs = _inputs(run, variant, tools)
    folder = run.onnx(variant)
    existing = _existing_artifact(folder)
    if existing is not None and existing.inputs == inputs:
        logger.info("%s is already exported: %s", variant, folder)
        return existing
    with whole_folder(folder) as new:
        if variant == "fp32":
            export_fp32(run.student, new)
            student = text_model.load_model(run.student, distilled.labels, distilled.task)
            write_tokenizer(student.tokenizer, new)
            settings = tokenisation(student.tokenizer)
            temperature = _temperature(run, student)
        else:
            # All variants share tokeniser and temperature, so that they read and answer alike.
            fp32 = read_artifact(run.onnx("fp32"))
            settings = fp32.tokenisation
            temperature = fp32.temperature
            _copy_all_but_the_graph(fp32, run.onnx("fp32"), new)
            _convert(run, variant, new / MODEL_FILE, inputs)
        has_8_bits = variant in ("steady", "int8")
        share, in_float = weights_in_8_bits(new / MODEL_FILE) if has_8_bits else (None, ())
        artifact = OnnxArtifact(
            variant=variant,
            inputs=inputs,
            task=distilled.task,
            labels=distilled.labels,
            **recipe.data.length._asdict(),
            tokenisation=settings,
            text_columns=len(recipe.data.text_columns),
            provider=recipe.export.provider,
            nodes=node_counts(new / MODEL_FILE),
            temperature=temperature,
            files=sha256_of_folder(new),
            model_bytes=(new / MODEL_FILE).stat().st_size,
            weights_in_8_bits=share,
            in_float=in_float,
            lineage={
                "ad2kit": __version__,
                "recipe": recipe.name,
                "recipe_sha256": fingerprint(recipe.model_dump(mode="json")),
                "teacher": recipe.teacher.title,
                **distilled.hub,
                "teacher_sha256": distilled.teacher_sha256,
                "student_sha256": distilled.student_sha256,
                **{f"{name}_sha256": split.sha256 for name, split in distilled.splits.items()},
                **tools,
            },
        )
        write_record(new / OnnxArtifact.file_name, artifact)
        artifact = add_golden_answers(new)
    logger.info("%s: %.1f MB", variant, artifact.model_bytes / 1e6)
    return artifact


def _convert(run: RunDir, variant: Variant, graph: Path, inputs: str) -> None:
    """Write the graph of a variant from that of an earlier one."""
    if variant == "fused":
        fuse(run.onnx("fp32") / MODEL_FILE, graph)
    elif variant == "fp16":
        to_fp16(run.onnx("fused") / MODEL_FILE, graph)
    elif variant == "steady":
        make_steady(run.onnx("fp32") / MODEL_FILE, graph)
    else:
        write_record(run.int8_search, _quantize(run, graph, inputs))


def _inputs(run: RunDir, variant: Variant, tools: dict[str, str]) -> str:
    """Return the fingerprint of everything that a variant depends on."""
    recipe = run.recipe
    parts: list[Any] = [
        __version__,
        variant,
        sha256_of(run.student / text_model.MANIFEST),
        tools,
        *recipe.data.length.facts,
        recipe.export.provider,
        recipe.export.calibrate,
    ]
    if variant == "int8":
        parts += [
            recipe.export.search_seconds,
            recipe.parity.model_dump(mode="json"),
            "fused" in recipe.export.variants,
        ]
    return fingerprint(*parts)


def _existing_artifact(folder: Path) -> OnnxArtifact | None:
    """Return the manifest of an exported variant; None if there is none that this version can read.

    Raises:
        ModelError: a file was changed since it was written.
    """
    if not (folder / OnnxArtifact.file_name).is_file():
        return None
    try:
        return read_artifact(folder)
    except RunError as error:
        logger.info("exported again, because %s", error.message)
        return None


def _temperature(run: RunDir, student: TextModel) -> float:
    """Return the temperature fitted on ``select``; 1 unless the recipe asks for a calibration."""
    recipe = run.recipe
    if not recipe.export.calibrate:
        return 1.0
    data = splits.load_data(recipe.data, recipe.seed, run.shared)
    encoded = splits.encode(data.select, student.tokenizer, recipe.data.length)
    logits = predict_logits(student, encoded, torch.device("cpu")).numpy()
    return fit_temperature(data.task, logits, judged_select(run, data).labels)


def _quantize(run: RunDir, target: Path, inputs: str) -> QuantisationSearch:
    """Search for an int8 graph, write it to ``target``, and return the record of the search."""
    start = time.monotonic()
    recipe = run.recipe
    data = splits.load_data(recipe.data, recipe.seed, run.shared)
    fp32 = run.onnx("fp32")
    with tempfile.TemporaryDirectory(prefix="ad2kit-int8-") as temporary:
        scratch = Path(temporary)
        plain_graph = onnx.load(fp32 / MODEL_FILE)
        read_first_token_only(plain_graph)
        onnx.save(plain_graph, scratch / "plain.onnx")
        graphs = {False: scratch / "plain.onnx"}
        if "fused" in recipe.export.variants:  # the gate then tests its fidelity, too
            graphs[True] = run.onnx("fused") / MODEL_FILE

        def classifier_of(graph: Path) -> OnnxClassifier:
            return OnnxClassifier(fp32, threads=recipe.compute.threads, graph=graph)

        reference = classifier_of(graphs[False])
        select_tokens, train_tokens = (
            reference.encode([text_of(row) for row in texts])
            for texts in (data.select.texts, data.train.texts[:_CALIBRATION_TEXTS])
        )
        train_tokens = train_tokens[:_CALIBRATION_TEXTS]  # of long texts there are more windows
        search = Int8Search(
            graphs=graphs,
            reference=reference,
            classifier_of=classifier_of,
            encodings=select_tokens,
            rows=LabelledRows(data.task, recipe.data.judged_by, judged_select(run, data).labels),
            thresholds=recipe.parity,
            calibration=_calibration(reference, train_tokens),
            scratch=scratch,
        )
        taken, trials = search.write(target, recipe.export.search_seconds)
    return QuantisationSearch(
        inputs=inputs,
        rows=len(data.select),
        seconds=time.monotonic() - start,
        taken=taken,
        trials=trials,
    )


def _calibration(
    classifier: OnnxClassifier, encodings: Sequence[Tokens]
) -> list[dict[str, NDArray[np.int64]]]:
    """Return batches of equal shape, as calibration needs them; an incomplete one is dropped."""
    size = min(_CALIBRATION_BATCH, len(encodings))
    width = max(len(encoding.ids) for encoding in encodings)
    feeds = [
        classifier.feed(encodings[first : first + size], width=width)
        for first in range(0, len(encodings) - size + 1, size)
    ]
    return [{name: feed[name] for name in classifier.input_names} for feed in feeds]


def exporter() -> tuple[str, str]:
    """Return the name of the exporter that is in use, and why it is this one."""
    if main_export is not None:
        version = metadata.version("optimum-onnx")
        return "optimum", f"optimum-onnx {version} is installed"
    return "torch.onnx", f"optimum cannot be imported: {_NO_OPTIMUM}"


def export_fp32(student: Path, folder: Path) -> None:
    """Trace a model that ad2kit saved; the gate tests whether the graph is faithful.

    Writes the graph, its configuration and its tokenizer; see :func:`exporter`.
    """
    with warnings.catch_warnings(), quiet_transformers():
        # The warnings are about constants of the mask, which do not depend on the example input.
        warnings.simplefilter("ignore", TracerWarning)
        # optimum 2.1 still passes an argument that torch and transformers have renamed.
        warnings.simplefilter("ignore", FutureWarning)
        # The indices of a mask are positions of tokens, and never negative.
        warnings.filterwarnings("ignore", "Exporting aten::index operator", UserWarning)
        # DeBERTa makes a constant of a tensor that is one.
        warnings.filterwarnings("ignore", "To copy construct from a tensor", UserWarning)
        # torch would rather trace in another way, whose graphs are not fused.
        warnings.simplefilter("ignore", DeprecationWarning)
        if main_export is None:
            _export_by_torch(text_model.load_saved(student), folder)
            return
        with text_model.saved_by_this_version(student) as source:
            main_export(
                str(source),
                output=folder,
                task="text-classification",
                device="cpu",
                do_validation=False,
                no_post_process=True,
                trust_remote_code=False,
            )


def _export_by_torch(model: TextModel, folder: Path) -> None:
    """Trace a model with ``torch.onnx.export``; the graph has the inputs that its tokenizer gives.

    Attention is computed step by step (``eager``): the traced kernels would not be exact for each
    mask, and are not fused.
    """
    folder.mkdir(parents=True, exist_ok=True)
    module = model.module.eval()
    module.config.save_pretrained(folder)
    model.tokenizer.save_pretrained(folder)
    module.set_attn_implementation("eager")
    example = model.tokenizer(["a", "a b c d"], padding=True, return_tensors="pt")
    # In the order of the arguments, as the graphs of optimum.
    names = [name for name in inspect.signature(module.forward).parameters if name in example]
    axes = {0: "batch_size", 1: "sequence_length"}
    with torch.no_grad():
        torch.onnx.export(
            module,
            ({name: example[name] for name in names},),
            folder / MODEL_FILE,
            input_names=names,
            output_names=["logits"],
            dynamic_axes={**dict.fromkeys(names, axes), "logits": {0: "batch_size"}},
            opset_version=_OPSET,
            dynamo=False,
        )


def _copy_all_but_the_graph(fp32: OnnxArtifact, source: Path, target: Path) -> None:
    """Copy the files of the fp32 manifest, except the graph and the golden answers.

    Other files in the folder are not copied, because the gate writes its verdict there.
    """
    for name in fp32.files:
        if not name.startswith(MODEL_FILE) and name != GOLDEN_FILE:
            shutil.copy2(source / name, target / name)
