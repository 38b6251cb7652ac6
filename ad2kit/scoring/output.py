"""The output folder of a scoring job: parts that are whole or absent, at any fsspec address.

    _job.json                       what the parts depend on
    part-00000000.parquet ...         one for each block, in order
    _errors/part-00000003.jsonl       the bad rows of a block, where it has any

A part is written after the errors of its block: where it lies, its block is done. Names that begin
with ``_`` or ``.`` are passed over by what reads the folder as one table.
"""

from __future__ import annotations

import secrets
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from ad2kit.run.errors import RunError, no_room_left
from ad2kit.run.files import locked, whole_file
from ad2kit.scoring.blocks import address_of, filesystem, is_local
from ad2kit.scoring.records import ScoreJob

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from ad2kit.scoring.records import BadRow

_ERRORS, _TEMPORARY = "_errors", ".tmp-"


def part_name(index: int, suffix: str) -> str:
    """Return the name of a part; names sort as blocks do."""
    return f"part-{index:08}.{suffix}"


class OutputFolder:
    """The folder of one job.

    Raises:
        DataError: its address cannot be used.
    """

    def __init__(self, url: str) -> None:
        self.store, path = filesystem(url)
        self.path = path.rstrip("/")
        self.url, self.is_local = address_of(self.store, self.path), is_local(self.store)

    @contextmanager
    def claimed(self, job: ScoreJob) -> Iterator[None]:
        """Hold the folder for ``job``, rid of what a killed process left half-written.

        Only a local folder can be locked. Elsewhere nothing stops two processes from doing the same
        job, and the first would miss the files that the second sweeps away.

        Raises:
            RunError: it holds something else, or another process is at work in it.
        """
        self._insist_on(job)
        try:
            self.store.makedirs(self.path, exist_ok=True)
        except OSError as error:
            if no_room_left(error):
                raise
            raise RunError(
                f"cannot write to {self.url}: {error}", hint="name a folder that can be written"
            ) from error
        with locked(Path(self.path)) if self.is_local else self._swept():
            self._insist_on(job)  # another job may have begun here meanwhile
            self.write(ScoreJob.file_name, job.model_dump_json(indent=2).encode() + b"\n")
            yield

    @contextmanager
    def _swept(self) -> Iterator[None]:
        for path in self.store.find(self.path):
            if path.rsplit("/", 1)[-1].startswith(_TEMPORARY):
                self.store.rm_file(path)
        yield

    def _insist_on(self, job: ScoreJob) -> None:
        file = f"{self.path}/{ScoreJob.file_name}"
        if self.store.exists(file):
            theirs = ScoreJob.parse(self.store.cat_file(file), f"{self.url}/{ScoreJob.file_name}")
            if differences := job.differences(theirs):
                raise RunError(
                    f"{self.url} holds the results of another job:\n  " + "\n  ".join(differences),
                    hint="name another OUTPUT, or delete this one",
                )
        elif self.names():
            raise RunError(
                f"{self.url} is not empty, and no job of `ad2kit score`: it has no "
                f"{ScoreJob.file_name}",
                hint="name an empty or a new folder",
            )

    def names(self) -> set[str]:
        """Return the names of what lies in the folder, hidden files left out."""
        if not self.store.isdir(self.path):
            return set()
        self.store.invalidate_cache(self.path)
        paths = self.store.ls(self.path, detail=False)
        names = {path.rstrip("/").rsplit("/", 1)[-1] for path in paths}
        return {name for name in names if not name.startswith(".")}

    def write_part(self, name: str, content: bytes, bad: Sequence[BadRow]) -> None:
        """Write the part of a block, and its bad rows before."""
        if bad:
            lines = "".join(row.model_dump_json() + "\n" for row in bad)
            self.write(f"{_ERRORS}/{_errors_of(name)}", lines.encode())
        self.write(name, content)

    def count_bad(self, parts: set[str]) -> int:
        """Return how many bad rows the finished parts have."""
        folder = f"{self.path}/{_ERRORS}"
        if not self.store.isdir(folder):
            return 0
        wanted = {_errors_of(name) for name in parts}
        return sum(
            self.store.cat_file(path).count(b"\n")
            for path in self.store.ls(folder, detail=False)
            if path.rsplit("/", 1)[-1] in wanted
        )

    def write(self, name: str, content: bytes) -> None:
        """Write a file of the folder, whole or not at all."""
        if self.is_local:
            path = Path(self.path) / name
            path.parent.mkdir(parents=True, exist_ok=True)
            with whole_file(path) as new:
                new.write_bytes(content)
            return
        # Not every store puts a file whole; all that fsspec knows can move one.
        folder, _, last = f"{self.path}/{name}".rpartition("/")
        new_name = f"{folder}/{_TEMPORARY}{secrets.token_hex(4)}-{last}"
        self.store.makedirs(folder, exist_ok=True)
        self.store.pipe_file(new_name, content)
        self.store.mv(new_name, f"{folder}/{last}")


def _errors_of(part: str) -> str:
    return f"{part.rpartition('.')[0]}.jsonl"
