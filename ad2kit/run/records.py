"""The frozen types that a run writes to disk: what all of them are, and what opened the run.

Each file carries ``schema_version``; a file of another version is refused, not guessed at.
Numbers carry their unit in their name. Fractions lie in [0, 1]. The records of a stage stand in the
``records.py`` of its room, which needs nothing but pydantic to be read.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

from pydantic import (
    BaseModel,
    ConfigDict,
    ValidationError,
    computed_field,
    model_validator,
)

from ad2kit.run.errors import RunError

if TYPE_CHECKING:
    from pathlib import Path


SCHEMA_VERSION: Literal[1] = 1


class Part(BaseModel):
    """A piece of a record: frozen, closed to unknown keys.

    What is computed from other fields is written for readers and never read back: a verdict in
    an edited file has no effect, only the values have. A value that is no number is written as
    "NaN" or "Infinity", because JSON has no such number and null would not be one again.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, ser_json_inf_nan="strings")

    @model_validator(mode="before")
    @classmethod
    def _compute_again(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        return {key: value for key, value in data.items() if key not in cls.model_computed_fields}


class Record(Part):
    """Base of everything that is a file, or a line of one, of its own."""

    cure: ClassVar[str] = "delete it and run its stage again"
    schema_version: Literal[1] = SCHEMA_VERSION

    @classmethod
    def read(cls, path: Path) -> Self:
        """Read and check one record.

        Raises:
            RunError: the file is missing, not a record of this type, or of another version.
        """
        try:
            content = path.read_bytes()
        except FileNotFoundError as error:
            raise RunError(
                f"{path} is missing", hint="run the stage that writes it: `ad2kit run` does all"
            ) from error
        return cls.parse(content, str(path))

    @classmethod
    def parse(cls, content: bytes, where: str) -> Self:
        """Check the content of one record, which came from ``where``.

        Raises:
            RunError: it is not a record of this type, or of another version.
        """
        try:
            return cls.model_validate_json(content)
        except ValidationError as error:
            first = error.errors()[0]
            key = ".".join(map(str, first["loc"]))
            raise RunError(
                f"{where} is not a {cls.__name__} of schema version "
                f"{cls.model_fields['schema_version'].default}: "
                f"{key}: {first['msg']}",
                hint=f"the file was edited or comes from another version of ad2kit; {cls.cure}",
            ) from error


class CampaignVerdict(Part):
    """What the rule of a campaign said of a variant, at the ``look``-th look at validation rows.

    The ``interval`` of what the variant retains misses the truth with the chance ``error``.
    """

    variant: str
    manifest_sha256: str
    look: int
    error: float
    interval: tuple[float, float]
    failures: tuple[str, ...]

    @computed_field  # type: ignore[prop-decorator]
    @property
    def passed(self) -> bool:
        """Whether nothing speaks against the variant."""
        return not self.failures


class CampaignRecord(Record):
    """``campaign.json``: which campaign made a run, and what its own rule said of the variants.

    A command takes the run of a campaign only if it is named. Where the campaign has a ``rule``,
    a variant may be shipped if this rule and the gate have passed it.
    """

    file_name: ClassVar[str] = "campaign.json"

    command: str
    rule: str | None = None
    verdicts: tuple[CampaignVerdict, ...] = ()

    def refusals(self, variant: str, manifest_sha256: str) -> list[str]:
        """Return what the rule has against shipping a variant; nothing if it has passed."""
        if self.rule is None:
            return []
        rule = f"by the rule of `{self.command}` ({self.rule})"
        for verdict in self.verdicts:
            if (verdict.variant, verdict.manifest_sha256) == (variant, manifest_sha256):
                return [f"{failure}, {rule}" for failure in verdict.failures]
        return [f"{variant}: not passed {rule}: it was not judged as it lies there"]
