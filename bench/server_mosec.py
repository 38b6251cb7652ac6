"""What mosec serves in `servers.py`."""

from __future__ import annotations

from typing import Any

from mosec import Worker
from servers import classifier


class Inference(Worker):  # type: ignore[misc]
    """Texts in batches to the artefact."""

    def __init__(self) -> None:
        super().__init__()
        self.engine = classifier()

    def forward(self, data: list[dict[str, str]]) -> Any:
        """Return the predictions of a batch."""
        return [each.as_dict() for each in self.engine.predict([one["text"] for one in data])]
