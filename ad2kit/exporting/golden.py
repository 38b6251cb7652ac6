"""Golden answers: the answers of an artefact to a few texts, by which a server tests itself.

They are stored in the artefact as ``golden.json``, and the manifest holds their sha256.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from ad2kit.exporting.classifier import OnnxClassifier, read_artifact
from ad2kit.exporting.records import OnnxArtifact
from ad2kit.run.errors import ModelError
from ad2kit.run.files import sha256_of, write_record, write_text

if TYPE_CHECKING:
    from pathlib import Path

    from ad2kit.exporting.classifier import Prediction
    from ad2kit.tables.texts import Text

GOLDEN_FILE = "golden.json"
# Texts of several lengths; none of them is from a user's data.
TEXTS = (
    "Yes.",
    "What is the capital of the country that lies to the north of here?",
    "The first half was slow, but all that came after it, the music above all, was well made.",
)
# The golden answers come from another machine, and int8 kernels differ in rounding.
MAX_GAP = 0.05


def add_golden_answers(folder: Path) -> OnnxArtifact:
    """Write a variant's answers to :data:`TEXTS` into its folder; return the new manifest.

    Texts that the variant refuses, because they are too long, are left out.
    """
    artifact = read_artifact(folder)
    texts: list[Text] = list(TEXTS)
    if artifact.text_columns == 2:
        texts = [(text, TEXTS[0]) for text in TEXTS]
    classifier = OnnxClassifier(folder, threads=1)
    refused = dict[int, str]()
    classifier.encode(texts, refuse=refused.__setitem__)
    texts = [text for position, text in enumerate(texts) if position not in refused]
    predictions = classifier.predict(texts, batch_size=1)
    examples = [
        {"text": text, "answer": prediction.as_dict()}
        for text, prediction in zip(texts, predictions, strict=True)
    ]
    write_text(folder / GOLDEN_FILE, json.dumps(examples, indent=2))
    files = artifact.files | {GOLDEN_FILE: sha256_of(folder / GOLDEN_FILE)}
    artifact = artifact.model_copy(update={"files": files})
    write_record(folder / OnnxArtifact.file_name, artifact)
    return artifact


def warm_up(classifier: OnnxClassifier) -> int:
    """Run a classifier once before the first request, and compare it with its golden answers.

    Returns:
        The number of compared answers; 0 if the artefact has no golden answers.

    Raises:
        ModelError: this machine gives other answers than the one that exported the artefact.
    """
    classifier.predict(["warm up" if classifier.artifact.text_columns == 1 else ("warm", "up")])
    golden_file = classifier.folder / GOLDEN_FILE
    examples = []
    if golden_file.is_file():
        examples = json.loads(golden_file.read_text(encoding="utf-8"))
    for example in examples:
        text = example["text"]
        (prediction,) = classifier.predict([text if isinstance(text, str) else tuple(text)])
        values = _values(prediction)
        golden_answer = example["answer"]
        expected = golden_answer.get("scores") or {"value": golden_answer["value"]}
        # The gap is absolute for numbers up to 1, such as probabilities, and relative beyond.
        gap = max(
            abs(value - expected[name]) / max(1, abs(expected[name]))
            for name, value in values.items()
        )
        if not gap <= MAX_GAP:
            raise ModelError(
                f"the golden text {text!r:.60} is answered {values}, expected {expected}",
                hint="this machine computes something else than the one that exported the model: "
                "compare `ad2kit doctor` on both",
            )
    return len(examples)


def _values(prediction: Prediction) -> dict[str, Any]:
    """Return the probabilities of the labels, or the value of a regression, by name."""
    return prediction.scores or {"value": prediction.value}
