"""Golden answers: what an artefact says of a few texts, by which a server knows that it works.

They lie in the artefact as ``golden.json``, under the same sha256 as its graph.
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

    from ad2kit.exporting.classifier import Prediction, Text

GOLDEN_FILE = "golden.json"
# Of nobody's data, and of several lengths.
TEXTS = (
    "Yes.",
    "What is the capital of the country that lies to the north of here?",
    "The first half was slow, but all that came after it, the music above all, was well made.",
)
# Golden answers were computed on another machine, and int8 kernels differ in rounding.
MAX_GAP = 0.05


def add_golden_answers(folder: Path) -> OnnxArtifact:
    """Write what a variant answers to texts of our own beside it, and into its manifest."""
    artifact = read_artifact(folder)
    texts: list[Text] = [(t, TEXTS[0]) if artifact.text_columns == 2 else t for t in TEXTS]
    answers = OnnxClassifier(folder, threads=1).predict(texts, batch_size=1)
    found = [
        {"text": text, "answer": answer.as_dict()}
        for text, answer in zip(texts, answers, strict=True)
    ]
    write_text(folder / GOLDEN_FILE, json.dumps(found, indent=2))
    files = artifact.files | {GOLDEN_FILE: sha256_of(folder / GOLDEN_FILE)}
    artifact = artifact.model_copy(update={"files": files})
    write_record(folder / OnnxArtifact.file_name, artifact)
    return artifact


def warm_up(classifier: OnnxClassifier) -> int:
    """Compute once what no user should wait for, and compare it with the golden answers.

    Returns:
        How many answers were compared: none, if the artefact was made without them.

    Raises:
        ModelError: this machine answers something else than the one that exported the artefact.
    """
    classifier.predict(["warm up" if classifier.artifact.text_columns == 1 else ("warm", "up")])
    golden = classifier.folder / GOLDEN_FILE
    examples = json.loads(golden.read_text(encoding="utf-8")) if golden.is_file() else []
    for example in examples:
        text = example["text"]
        (found,) = classifier.predict([text if isinstance(text, str) else tuple(text)])
        ours, theirs = _numbers(found), example["answer"]
        expected = theirs.get("scores") or {"value": theirs["value"]}
        # Of a probability, or as a share of a number that is larger.
        gap = max(abs(ours[name] - expected[name]) / max(1, abs(expected[name])) for name in ours)
        if not gap <= MAX_GAP:
            raise ModelError(
                f"the golden text {text!r:.60} is answered {ours}, expected {expected}",
                hint="this machine computes something else than the one that exported the model: "
                "compare `ad2kit doctor` on both",
            )
    return len(examples)


def _numbers(prediction: Prediction) -> dict[str, Any]:
    return prediction.scores or {"value": prediction.value}
