"""ad2kit: AD2 distillation of text classifiers, proven by a parity gate and served by BentoML.

    import ad2kit

    run = ad2kit.open_run("smoke", "runs")       # a recipe, and where its folder lies
    ad2kit.distill(run)                          # teacher and student
    ad2kit.export(run)                           # ONNX
    ad2kit.judge(run)                            # is it as good?
    ad2kit.measure(run)                          # how fast is it?
    ad2kit.package(run)                          # a Bento
    ad2kit.load(run.path).predict(["not at all convincing"])

A stage that is done for the same inputs is not done again. These functions, and `score` for tables
of any size, are the public interface; everything else may change. Nothing is imported before it is
used: `load` needs no torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pathlib import Path

    from ad2kit.exporting.classifier import OnnxClassifier
    from ad2kit.exporting.export import export
    from ad2kit.gate.latency import measure
    from ad2kit.gate.parity import judge
    from ad2kit.packaging.bento import package
    from ad2kit.run.folder import open_run
    from ad2kit.scoring.score import score
    from ad2kit.training.distill import distill

__version__ = "0.2.0"

__all__ = [
    "__version__",
    "distill",
    "export",
    "judge",
    "load",
    "measure",
    "open_run",
    "package",
    "score",
]

_HOME = {
    "distill": "ad2kit.training.distill",
    "export": "ad2kit.exporting.export",
    "judge": "ad2kit.gate.parity",
    "measure": "ad2kit.gate.latency",
    "open_run": "ad2kit.run.folder",
    "package": "ad2kit.packaging.bento",
    "score": "ad2kit.scoring.score",
}


def __getattr__(name: str) -> Any:
    """Import a public function when it is first used (PEP 562).

    Raises:
        MissingExtra: what it needs is not installed.
    """
    from importlib import import_module

    from ad2kit.run.errors import MissingExtra

    if name not in _HOME:
        raise AttributeError(f"module 'ad2kit' has no attribute '{name}'")
    try:
        return getattr(import_module(_HOME[name]), name)
    except ModuleNotFoundError as error:
        raise MissingExtra.of(error) from error


def __dir__() -> list[str]:
    return __all__


def load(folder: str | Path, *, threads: int | None = None) -> OnnxClassifier:
    """Load a classifier for inference, without torch or transformers.

        classifier = ad2kit.load(run.path)
        label = classifier.predict(["not at all convincing"])[0].label

    Args:
        folder: a run folder (the variant that it ships is taken) or the folder of
            one ONNX variant.
        threads: intra-op threads of ONNX Runtime; all cores that this process may use if None.

    Raises:
        RunError: the run has no variant that passed the parity gate.
        ModelError: the artefact is incomplete, or a file is not the one that was exported.
        MissingExtra: onnxruntime or tokenizers is not installed.
    """
    from ad2kit.exporting.classifier import OnnxClassifier
    from ad2kit.gate.shipping import servable_artifact

    return OnnxClassifier(servable_artifact(folder), threads=threads)
