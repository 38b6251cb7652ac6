"""What bulk scoring writes to disk beside the parts, and what it tells at its end."""

from __future__ import annotations

from typing import ClassVar

from pydantic import computed_field

from ad2kit.run.records import Part, Record


class InputFile(Part):
    """One file of the input: its address, and how its store knows one version from another.

    ``version`` is an entity tag where the store has them, else the time of the last change.
    """

    url: str
    size_bytes: int
    version: str


class ScoreJob(Record):
    """``_job.json`` of an output folder: all that its parts depend on.

    Block and batch size belong to it, because a dynamic int8 graph quantises a batch together, so
    that an answer depends a little on its company. ``form`` is how parts are written: 1 quoted the
    cells of text files anew.
    """

    file_name: ClassVar[str] = "_job.json"

    form: int = 1
    artifact_sha256: str
    text_columns: tuple[str, ...]
    prefix: str
    block_rows: int
    batch_size: int
    versions: dict[str, str]
    inputs: tuple[InputFile, ...]

    def differences(self, theirs: ScoreJob) -> list[str]:
        """Return a line for each setting and each input file that another job has otherwise."""
        found = []
        for name in type(self).model_fields:
            ours, other = getattr(self, name), getattr(theirs, name)
            if name == "inputs" or ours == other:
                continue
            found.append(f"{name}: {_plain(other)} there, {_plain(ours)} now")
        ours, other = ({each.url: each for each in job.inputs} for job in (self, theirs))
        for url in sorted(ours.keys() | other.keys()):
            if url not in ours or url not in other:
                found.append(f"{url} is an input only {'now' if url in ours else 'there'}")
            elif ours[url] != other[url]:
                found.append(f"{url} has changed since")
        return found


class BadRow(Record):
    """One line of ``_errors/<part>.jsonl``: a row that got no answer, and why.

    ``row`` counts the rows of its file from 1, a header left out; ``line`` is the first line of the
    row in a text file.
    """

    file: str
    row: int
    line: int | None
    reason: str


class ScoreReport(Record):
    """A finished job: all its rows, and the speed of those that this command scored itself.

    ``seconds`` begin when the workers are started and include what they need for that.
    ``classifier_seconds`` are those that all workers together spent on tokenising and inference of
    ``answered_here`` rows, which are all but the bad ones.
    """

    output: str
    rows: int
    bad_rows: int
    parts: int
    engine: str
    workers: int
    scored_here: int
    seconds: float
    answered_here: int
    classifier_seconds: float

    @computed_field  # type: ignore[prop-decorator]
    @property
    def rows_per_s(self) -> float:
        """Rows that this command read and scored, by second."""
        return self.scored_here / self.seconds if self.scored_here else 0.0

    @computed_field  # type: ignore[prop-decorator]
    @property
    def rows_per_s_per_core(self) -> float:
        """The same by worker, each of which has one thread."""
        return self.rows_per_s / self.workers

    @computed_field  # type: ignore[prop-decorator]
    @property
    def limit_rows_per_s_per_core(self) -> float:
        """What a worker would do if it neither started, read nor wrote: its classifier alone."""
        return self.answered_here / self.classifier_seconds if self.answered_here else 0.0


def _plain(value: object) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {each}" for key, each in value.items())
    return (
        ",".join(value)
        if isinstance(value, tuple)
        else f"{value:.80}"
        if isinstance(value, str)
        else str(value)
    )
