"""ad2kit: AD2 distillation of text classifiers, proven by a parity gate and served by BentoML.

    import ad2kit

    classifier = ad2kit.load("runs/demo-1a2b3c4d")
    classifier.predict(["not at all convincing"])

Every stage is a plain function: :func:`ad2kit.training.distill.distill`, :func:`ad2kit.exporting.export.export`,
:func:`ad2kit.gate.parity.parity`, :func:`ad2kit.gate.latency.bench`, :func:`ad2kit.service.bento.package`,
:func:`ad2kit.scoring.score.score`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

    from ad2kit.exporting.classifier import OnnxClassifier

__version__ = "0.1.0"

__all__ = ["__version__", "load"]


def load(folder: str | Path, *, threads: int | None = None) -> OnnxClassifier:
    """Load a classifier for inference, without torch or transformers.

    Args:
        folder: a run folder (the variant that it ships is taken) or the folder of
            one ONNX variant.
        threads: intra-op threads of ONNX Runtime; all cores that this process may use if None.

    Raises:
        RunError: the run has no variant that passed the parity gate.
        ModelError: the artefact is incomplete, or a file is not the one that was exported.
        MissingExtra: onnxruntime or tokenizers is not installed.
    """
    # Imported here so that `import ad2kit` stays free of onnxruntime.
    from ad2kit.exporting.classifier import OnnxClassifier
    from ad2kit.gate.shipping import servable_artifact

    return OnnxClassifier(servable_artifact(folder), threads=threads)
