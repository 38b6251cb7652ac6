"""The records of bulk scoring: the job and the bad rows on disk, and the final report."""

from __future__ import annotations

from typing import ClassVar, Literal, Self

from pydantic import BaseModel, computed_field

from ad2kit.run.records import Part, Record


class InputFile(Part):
    """One file of the input: its address, its size and its version.

    ``version`` is an entity tag if the store has them, else the time of the last change.
    """

    url: str
    size_bytes: int
    version: str


class Job(Record):
    """``_job.json`` of an output folder: everything that its parts depend on."""

    file_name: ClassVar[str] = "_job.json"
    cure: ClassVar[str] = "name another OUTPUT"
    command: ClassVar[str]

    text_columns: tuple[str, ...]
    csv_quotes: Literal["doubled", "backslash"] = "doubled"
    prefix: str
    block_rows: int
    inputs: tuple[InputFile, ...]

    def differences(self, previous: Self) -> list[str]:
        """Return a line for each setting and each input file that differs from a previous job."""
        lines = _differences("", self, previous)
        files = {file.url: file for file in self.inputs}
        previous_files = {file.url: file for file in previous.inputs}
        for url in sorted(files.keys() | previous_files.keys()):
            if url not in files or url not in previous_files:
                lines.append(f"{url} is an input only {'now' if url in files else 'there'}")
            elif files[url] != previous_files[url]:
                lines.append(f"{url} has changed since")
        return lines


class ScoreJob(Job):
    """The job of `ad2kit score`.

    The sizes of blocks and batches belong to it: a dynamic int8 graph quantises a batch together,
    so an answer depends a little on the other texts of its batch. ``form`` is the version of the
    format of parts; version 1 quoted the cells of text files anew.
    """

    command: ClassVar[str] = "ad2kit score"

    form: int = 1
    artifact_sha256: str
    batch_size: int
    versions: dict[str, str]


class ScoreReport(Record):
    """The report of a finished job: all its rows, and the speed of this command.

    ``scored_here`` is the number of rows that this command scored, and ``answered_here`` the number
    without the bad ones. ``seconds`` begin when the workers are started, and include their start.
    ``classifier_seconds`` is the time of tokenising and inference, summed over all workers.
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
        """The rows that this command scored per second."""
        return self.scored_here / self.seconds if self.scored_here else 0.0

    @computed_field  # type: ignore[prop-decorator]
    @property
    def rows_per_s_per_core(self) -> float:
        """The rows that this command scored per second and worker; a worker has one thread."""
        return self.rows_per_s / self.workers

    @computed_field  # type: ignore[prop-decorator]
    @property
    def limit_rows_per_s_per_core(self) -> float:
        """The rows per second of the classifier of one worker, without starting and files."""
        return self.answered_here / self.classifier_seconds if self.answered_here else 0.0


def _differences(path: str, now: BaseModel, previous: BaseModel) -> list[str]:
    """Return a line for each value but the inputs that differs, also inside of its sections."""
    lines = []
    for name in type(now).model_fields:
        value, there = getattr(now, name), getattr(previous, name)
        if isinstance(value, BaseModel) and isinstance(there, BaseModel):
            lines += _differences(f"{path}{name}.", value, there)
        elif name != "inputs" and value != there:
            lines.append(f"{path}{name}: {_plain(there)} there, {_plain(value)} now")
    return lines


def _plain(value: object) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {item}" for key, item in value.items())
    if isinstance(value, tuple):
        return ",".join(map(str, value))
    return f"{value:.80}" if isinstance(value, str) else str(value)
