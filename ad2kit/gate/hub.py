"""The push stage: upload a variant that passed its gate to the hub, with a model card."""

from __future__ import annotations

import logging
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from huggingface_hub import HfApi, ModelCardData, constants

from ad2kit.exporting.classifier import read_artifact
from ad2kit.gate import summary
from ad2kit.gate.records import ParityReport
from ad2kit.gate.shipping import choose_variant
from ad2kit.run.errors import UserError
from ad2kit.run.files import write_text
from ad2kit.run.folder import exclusive
from ad2kit.run.hub import HUB, causes, hub_errors, parse
from ad2kit.run.markdown import table

if TYPE_CHECKING:
    from ad2kit.run.folder import RunDir

logger = logging.getLogger(__name__)

_USE = """## Use

```python
import ad2kit, huggingface_hub

classifier = ad2kit.load(huggingface_hub.snapshot_download("{repository}"))
classifier.predict(["..."])
```

or, without ad2kit:

```python
from optimum.onnxruntime import ORTModelForSequenceClassification

model = ORTModelForSequenceClassification.from_pretrained("{repository}")
```
"""


@exclusive
def push(run: RunDir, repository: str, *, variant: str | None = None, private: bool = False) -> str:
    """Upload a variant of a run to the hub, and return the address of its page.

    The upload is the folder as it was judged, with the parity report, and a card with the tables.
    No text of the data is uploaded. The token is the hub's own (``hf auth login`` or ``HF_TOKEN``).

    Args:
        run: a run whose parity was judged.
        repository: ``owner/name``; the repository is created if it does not exist.
        variant: the variant to upload; if None, ``export.ship`` chooses among those that passed.
        private: whether a new repository is private.

    Raises:
        GateFailed: the variant has not passed its gate.
        UserError: the hub cannot be reached, or refuses.
    """
    folder, _ = choose_variant(run, variant)
    read_artifact(folder)  # raises if a file is missing or has changed
    with tempfile.TemporaryDirectory(prefix="ad2kit-push-") as temporary:
        staged = Path(temporary) / "model"
        shutil.copytree(folder, staged)
        write_text(staged / "README.md", model_card(run, folder, repository))
        try:
            api = HfApi()
            repo_url = api.create_repo(repository, private=private, exist_ok=True)
            api.upload_folder(
                repo_id=repo_url.repo_id,
                folder_path=staged,
                commit_message=f"{folder.name} of {run.path.name}",
            )
        except hub_errors(ValueError, RuntimeError) as error:
            # A name that the hub does not take is a ValueError, a large file that it does not take
            # a RuntimeError with a cause.
            reasons = [f"{type(each).__name__}: {_first_line(each)}" for each in causes(error)]
            raise UserError(
                f"cannot push to '{repository}' on {constants.ENDPOINT}: {'; '.join(reasons)}",
                hint="expected owner/name, a network and a token (`hf auth login`); without them "
                f"copy the folder {folder}, which is all that others need",
            ) from error
    return str(repo_url)


def _first_line(error: BaseException) -> str:
    """Return the first line of a message that says something."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), "")


def model_card(run: RunDir, folder: Path, repository: str) -> str:
    """Return the card of a variant in Markdown: what it is, what it passed, how to use it."""
    artifact = read_artifact(folder)
    parity = ParityReport.read(run.parity_report)
    verdict = next(variant for variant in parity.variants if variant.variant == folder.name)
    teacher = artifact.lineage["teacher"]
    metadata = ModelCardData(
        pipeline_tag="text-classification",
        tags=["ad2kit", "onnx", "knowledge-distillation"],
        # The hub can link the name of a model on the hub, but not a folder of this machine.
        base_model=parse(teacher, "model", "teacher.model").name
        if teacher.startswith(HUB)
        else None,
    )
    checks = [
        (check.name, check.measured, check.expected, check.verdict) for check in verdict.checks
    ]
    header = f"---\n{metadata.to_yaml()}\n---\n\n# {repository.rpartition('/')[2]}\n"
    description = (
        f"A text classifier, distilled from a larger teacher ({teacher}) by ad2kit with AD2 "
        "(adversarial data augmentation for task-specific knowledge distillation). This is its "
        f"{folder.name} ONNX variant: {artifact.model_bytes / 1e6:.1f} MB, "
        f"{artifact.task.replace('_', ' ')}, labels {', '.join(artifact.labels)}; "
        f"{artifact.length.words}.\n"
    )
    low, high = verdict.retained_interval
    quality = (
        f"It keeps {verdict.retained:.1%} of its teacher's score (95 % interval {low:.1%} to "
        f"{high:.1%}) on {parity.rows} labelled texts that it was not trained on.\n"
    )
    if verdict.agreement is not None:
        quality = (
            f"It {verdict.words} that it was not trained on. It was judged against "
            f"{parity.judged_against}.\n"
        )
    usage = _USE.format(repository=repository)
    lineage = [f"- {name}: `{value}`" for name, value in artifact.lineage.items()]
    return "\n".join(
        [
            header,
            description,
            quality,
            *table(summary.HEADER, summary.model_rows(run)),
            "",
            f"{summary.caption(run)}\n",
            "## What it was judged by\n",
            *table(("check", "value", "expected", "verdict"), checks),
            "",
            "The whole verdict is in `parity.json`, the sha256 of every file in `manifest.json`.\n",
            usage,
            "## Lineage\n",
            *lineage,
            "",
        ]
    )
