"""What LitServe serves in `servers.py`."""

from __future__ import annotations

from typing import Any

import litserve
from servers import classifier


class Api(litserve.LitAPI):  # type: ignore[misc]
    """Texts in batches to the artefact."""

    def setup(self, device: str) -> None:  # noqa: ARG002
        """Load the engine."""
        self.engine = classifier()

    def decode_request(self, request: dict[str, str]) -> str:
        """Return the text of a request."""
        return request["text"]

    def predict(self, texts: list[str]) -> Any:
        """Return the predictions of a batch."""
        return [each.as_dict() for each in self.engine.predict(texts)]

    def encode_response(self, output: Any) -> Any:
        """Return a prediction as it is."""
        return output
