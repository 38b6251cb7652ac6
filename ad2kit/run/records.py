"""The frozen types that a run writes to disk: their base classes, and the record of a campaign.

Each file carries ``schema_version``; a file of another version is refused. Names of numbers end in
their unit. Fractions lie in [0, 1]. The records of each stage are in the ``records.py`` of its
package, which needs nothing but pydantic.
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

    Computed fields are written for readers and never read back: an edited verdict in a file has no
    effect, only edited values have one. NaN and infinity are written as "NaN" and "Infinity",
    because JSON has no such numbers, and null would not be read back as one.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, ser_json_inf_nan="strings")

    @model_validator(mode="before")
    @classmethod
    def _drop_computed_fields(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        return {key: value for key, value in data.items() if key not in cls.model_computed_fields}


class Record(Part):
    """Base of every record that is a file of its own, or one line of a file."""

    cure: ClassVar[str] = "delete it and run its stage again"
    schema_version: Literal[1] = SCHEMA_VERSION

    @classmethod
    def read(cls, path: Path) -> Self:
        """Read and check the record in one file.

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
        """Check the content of one record; ``where`` names its source for errors.

        Raises:
            RunError: it is not a record of this type, or of another version.
        """
        try:
            return cls.model_validate_json(content)
        except ValidationError as error:
            first_error = error.errors()[0]
            key = ".".join(map(str, first_error["loc"]))
            raise RunError(
                f"{where} is not a {cls.__name__} of schema version "
                f"{cls.model_fields['schema_version'].default}: "
                f"{key}: {first_error['msg']}",
                hint=f"the file was edited or comes from another version of ad2kit; {cls.cure}",
            ) from error


class CampaignVerdict(Part):
    """The verdict of a campaign's rule on a variant, at the ``look``-th look at validation rows.

    ``interval`` is of the retained score; it misses the true value with probability ``error``.
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
        """Whether the rule found no failure."""
        return not self.failures


class CampaignRecord(Record):
    """``campaign.json``: the campaign that made a run, and the verdicts of its rule on variants.

    A command uses the run of a campaign only if the run is named. If the campaign has a ``rule``,
    a variant may be shipped if both this rule and the gate have passed it.
    """

    file_name: ClassVar[str] = "campaign.json"

    command: str
    rule: str | None = None
    verdicts: tuple[CampaignVerdict, ...] = ()

    def refusals(self, variant: str, manifest_sha256: str) -> list[str]:
        """Return the reasons of the rule against shipping a variant; empty if it has passed."""
        if self.rule is None:
            return []
        rule = f"by the rule of `{self.command}` ({self.rule})"
        for verdict in self.verdicts:
            if (verdict.variant, verdict.manifest_sha256) == (variant, manifest_sha256):
                return [f"{failure}, {rule}" for failure in verdict.failures]
        return [f"{variant}: not passed {rule}: it was not judged as it lies there"]
