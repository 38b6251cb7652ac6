"""What an operator may set of the service, and what of it is refused before a worker starts.

Refusals are BentoML's ``InvalidArgument``, because its command prints those without a traceback.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from bentoml.exceptions import InvalidArgument
from pydantic import BaseModel, ConfigDict, Field

from ad2kit.classifier import read_artifact, servable_artifact
from ad2kit.errors import Ad2kitError

if TYPE_CHECKING:
    from collections.abc import Callable


class Arguments(BaseModel):
    """What ``bentoml serve --arg name=value`` may set.

    ``workers`` processes share the cores, each with ``threads`` for the engine; one for each core
    with one thread if neither is set. ``api_keys_file`` holds one key a line. ``shadow`` is a run
    or an artefact of the teacher, which scores ``shadow_share`` of the texts in the background.
    ``access_log`` writes a line for each request.
    """

    model_config = ConfigDict(extra="forbid")

    model: str | None = Field(None, min_length=1)
    runs_dir: str | None = Field(None, min_length=1)
    workers: int | None = Field(None, ge=1)
    threads: int | None = Field(None, ge=1)
    api_keys_file: str | None = None
    shadow: str | None = Field(None, min_length=1)
    shadow_share: float = Field(0.01, gt=0, le=1)
    access_log: bool = False

    def insist_on_models(self, artifact_folder: Callable[[], Path]) -> None:
        """Refuse a model or a shadow that cannot be served, or a share of no shadow.

        Raises:
            InvalidArgument: says why, and what to give instead.
        """
        if self.shadow is None and "shadow_share" in self.model_fields_set:
            raise InvalidArgument(
                f"shadow_share={self.shadow_share:g} is the share of texts that a shadow scores, "
                "and there is no shadow; add `--arg shadow=FOLDER`, or leave shadow_share out"
            )
        try:
            if self.shadow is not None:
                read_artifact(servable_artifact(self.shadow))
            read_artifact(artifact_folder())
        except Ad2kitError as error:
            raise InvalidArgument(f"{error.message}; {error.hint}") from error

    def api_keys(self) -> list[str]:
        """Return the keys that clients may use, of the file and of AD2KIT_API_KEYS (with commas).

        Raises:
            InvalidArgument: the file cannot be read, or holds no key.
        """
        asked = self.api_keys_file or os.environ.get("AD2KIT_API_KEYS")
        keys = os.environ.get("AD2KIT_API_KEYS", "").split(",")
        if self.api_keys_file is not None:
            try:
                keys += Path(self.api_keys_file).read_text(encoding="utf-8").splitlines()
            except (OSError, UnicodeDecodeError) as error:
                raise InvalidArgument(
                    f"cannot read the API keys in {self.api_keys_file}: {error}; give a text file "
                    "with one key a line"
                ) from error
        keys = [key.strip() for key in keys if key.strip()]
        if asked is not None and not keys:
            # A secret that went wrong must not open the service.
            raise InvalidArgument(
                "API keys were asked for and there is none: write one key a line into "
                "api_keys_file, or several with commas into AD2KIT_API_KEYS; unset both to serve "
                "everybody"
            )
        return keys
