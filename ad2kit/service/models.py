"""The models that a worker has loaded, and the exchange of one version for another.

A new version is loaded beside the old one and gives its golden answers before it gets requests.
The requests that the old version has read are answered by it.
"""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict

from ad2kit.exporting.classifier import OnnxClassifier
from ad2kit.exporting.golden import warm_up
from ad2kit.exporting.records import OnnxArtifact
from ad2kit.gate.records import ParityReport
from ad2kit.gate.shipping import servable_artifact
from ad2kit.run.files import sha256_of

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

logger = logging.getLogger(__name__)


class Version(BaseModel):
    """One version of a model.

    Attributes:
        given: the run or artefact that was named, without links in its path.
        folder: the folder of the artefact that was chosen there.
        sha256: the hash of its manifest, which has the hashes of all its files.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    given: Path
    folder: Path
    sha256: str

    @classmethod
    def of(cls, given: str | Path, last: Version | None = None) -> Version:
        """Return what a run or an artefact stands for now; its files are not read.

        Args:
            given: a run or an artefact, or a link to one.
            last: what it stood for before. A new measurement of the same run does not choose
                another variant.

        Raises:
            RunError, ModelError: nothing there can be served.
            OSError: the artefact of before is gone.
        """
        real = Path(given).resolve()
        if last is not None and real == last.given:
            folder = last.folder
        else:
            folder = servable_artifact(real).resolve()
        return cls(given=real, folder=folder, sha256=sha256_of(folder / OnnxArtifact.file_name))


@dataclass(frozen=True)
class Model:
    """A model that is loaded and has given its golden answers.

    Attributes:
        version: where it lies.
        classifier: what answers.
        parity: what it passed, as plain data; None if its folder has no parity report.
        golden_answers: how many answers were compared.
    """

    version: Version
    classifier: OnnxClassifier
    parity: dict[str, Any] | None
    golden_answers: int

    @classmethod
    def load(cls, version: Version, threads: int) -> Model:
        """Load a version of a model, and ask for its golden answers.

        Raises:
            ModelError: a file is damaged, or this machine computes other answers.
        """
        classifier = OnnxClassifier(version.folder, threads=threads)
        report = version.folder / ParityReport.file_name
        lineage = version.folder.with_name("lineage.json")  # in a Bento
        parity = None
        if lineage.is_file():
            parity = json.loads(lineage.read_text(encoding="utf-8"))["parity"]
        elif report.is_file():
            parity = json.loads(report.read_text(encoding="utf-8"))
        return cls(version, classifier, parity, warm_up(classifier))

    def facts(self) -> dict[str, Any]:
        """Return what GET /info says of the model, as plain data."""
        artifact = self.classifier.artifact
        return {
            "variant": artifact.variant,
            "task": artifact.task,
            "labels": list(artifact.labels),
            "text_columns": artifact.text_columns,
            **artifact.length._asdict(),
            "model_sha256": artifact.files["model.onnx"],
            "lineage": artifact.lineage,
            "parity": self.parity,
        }


class Loaded:
    """The models of a worker, and why the newest versions of some are refused.

    Args:
        models: the versions to load, by the name of the model.
        refused: the reasons, by the name of the model.
        threads: the threads of each model; one model computes at a time.
        exchanged: called with the name and the classifier of a new version.

    Raises:
        ModelError: a model cannot be loaded.
    """

    def __init__(
        self,
        models: Mapping[str, Version],
        refused: Mapping[str, str],
        threads: int,
        exchanged: Callable[[str, OnnxClassifier], None],
    ) -> None:
        self.refused = refused
        self._threads = threads
        self._exchanged = exchanged
        self.models = {name: Model.load(version, threads) for name, version in models.items()}

    def take(self, models: Mapping[str, Version], refused: Mapping[str, str]) -> None:
        """Load the versions that are new beside the old ones, and exchange them one by one.

        Raises:
            ModelError: a version cannot be loaded; the old one stays.
        """
        for name, reason in refused.items():
            if reason != self.refused.get(name):
                facts = {"refused": name, "reason": reason, "in_force": "the old version"}
                logger.error("a new version is refused", extra=facts)
        self.refused = refused
        for name, version in models.items():
            if self.models[name].version != version:
                model = Model.load(version, self._threads)
                self.models[name] = model
                self._exchanged(name, model.classifier)
                facts = {"model_name": name, "model": str(version.folder)}
                logger.info("a new version of a model is served", extra=facts)
