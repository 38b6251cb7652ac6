"""The records of bulk scoring: the job and the bad rows on disk, and the final report."""

from __future__ import annotations

from typing import ClassVar, Literal, Self

from pydantic import computed_field

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
        lines = self._different_settings(previous)
        files = {file.url: file for file in self.inputs}
        previous_files = {file.url: file for file in previous.inputs}
        for url in sorted(files.keys() | previous_files.keys()):
            if url not in files or url not in previous_files:
                lines.append(f"{url} is an input only {'now' if url in files else 'there'}")
            elif files[url] != previous_files[url]:
                lines.append(f"{url} has changed since")
        return lines

    def _different_settings(self, previous: Self) -> list[str]:
        """Return a line for each setting that differs from a previous job."""
        lines = []
        settings, previous_settings = self._settings(), previous._settings()
        for name in sorted(settings.keys() | previous_settings.keys()):
            now, there = (each.get(name) for each in (settings, previous_settings))
            if now != there:
                lines.append(f"{name}: {_plain(there)} there, {_plain(now)} now")
        return lines

    def _settings(self) -> dict[str, object]:
        """Return the settings by name; those in a mapping have the names of both."""
        settings: dict[str, object] = {}
        for name in type(self).model_fields:
            value = getattr(self, name)
            if isinstance(value, dict):
                settings |= {f"{name}.{key}": item for key, item in value.items()}
            elif name != "inputs":
                settings[name] = value
        return settings


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


def _plain(value: object) -> str:
    if isinstance(value, tuple):
        return ",".join(map(str, value))
    return f"{value:.80}" if isinstance(value, str) else str(value)
