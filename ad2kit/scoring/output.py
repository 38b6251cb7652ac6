"""The output folder of a scoring job: parts that are whole or absent, at any fsspec address.

    _job.json                       the settings and inputs that the parts depend on
    part-00000000.parquet ...         one part for each block, in order
    _errors/part-00000003.jsonl       the bad rows of a block, if it has any

A part is written after the errors of its block. So a block is done if its part exists. Readers of
the folder as one table ignore names that begin with ``_`` or ``.``.
"""

from __future__ import annotations

import re
import secrets
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from ad2kit.run.errors import RunError, no_room_left
from ad2kit.run.files import locked, whole_file
from ad2kit.scoring.blocks import address_of, filesystem, is_local
from ad2kit.scoring.records import Job

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from ad2kit.tables.rows import BadRow


_ERRORS = "_errors"
_TEMPORARY = ".tmp-"
_PART = re.compile(r"part-[0-9]{8,}\.[a-z]+")


def part_name(index: int, suffix: str) -> str:
    """Return the name of the part of a block; names sort in the order of the blocks."""
    return f"part-{index:08}.{suffix}"


class OutputFolder:
    """The folder of one job.

    Raises:
        DataError: its address cannot be used.
    """

    def __init__(self, url: str) -> None:
        self.store, path = filesystem(url)
        self.path = path.rstrip("/")
        self.url = address_of(self.store, self.path)
        self.is_local = is_local(self.store)

    @contextmanager
    def claimed(self, job: Job) -> Iterator[None]:
        """Hold the folder for ``job``, without the temporary files of a killed process.

        Only a local folder can be locked. Elsewhere two processes may do the same job at once, and
        the second deletes temporary files of the first.

        Raises:
            RunError: the folder holds something else, or another process works in it.
        """
        self._check_same_job(job)
        try:
            self.store.makedirs(self.path, exist_ok=True)
        except OSError as error:
            if no_room_left(error):
                raise
            raise RunError(
                f"cannot write to {self.url}: {error}", hint="name a folder that can be written"
            ) from error
        with locked(Path(self.path)) if self.is_local else self._swept():
            self._check_same_job(job)  # another job may have begun here before the lock
            self.write(Job.file_name, job.model_dump_json(indent=2).encode() + b"\n")
            yield

    @contextmanager
    def _swept(self) -> Iterator[None]:
        """Delete the temporary files of a folder that cannot be locked."""
        for path in self.store.find(self.path):
            if path.rsplit("/", 1)[-1].startswith(_TEMPORARY):
                self.store.rm_file(path)
        yield

    def _check_same_job(self, job: Job) -> None:
        """Refuse a folder that holds the results of another job, or other files."""
        file = f"{self.path}/{Job.file_name}"
        if self.store.exists(file):
            content = self.store.cat_file(file)
            previous = type(job).parse(content, f"{self.url}/{Job.file_name}")
            if differences := job.differences(previous):
                raise RunError(
                    f"{self.url} holds the results of another job:\n  " + "\n  ".join(differences),
                    hint="name another OUTPUT, or delete this one",
                )
        elif self.names():
            raise RunError(
                f"{self.url} is not empty, and no job of `{job.command}`: it has no "
                f"{Job.file_name}",
                hint="name an empty or a new folder",
            )

    def names(self) -> set[str]:
        """Return the names of the files and folders in the folder, without hidden ones."""
        if not self.store.isdir(self.path):
            return set()
        self.store.invalidate_cache(self.path)
        paths = self.store.ls(self.path, detail=False)
        names = {path.rstrip("/").rsplit("/", 1)[-1] for path in paths}
        return {name for name in names if not name.startswith(".")}

    def write_part(self, name: str, content: bytes, bad: Sequence[BadRow]) -> None:
        """Write the bad rows of a block, and then its part."""
        if bad:
            lines = "".join(row.model_dump_json() + "\n" for row in bad)
            self.write(f"{_ERRORS}/{_errors_name(name)}", lines.encode())
        self.write(name, content)

    def forget_errors(self) -> None:
        """Delete the lists of bad rows, before all parts are written anew."""
        folder = f"{self.path}/{_ERRORS}"
        if self.store.isdir(folder):
            self.store.rm(folder, recursive=True)

    def forget_parts(self, but: set[str]) -> None:
        """Delete the parts of an earlier, larger input: all but those of these names."""
        for name in self.names() - but:
            if _PART.fullmatch(name):
                self.store.rm_file(f"{self.path}/{name}")

    def count_bad(self, parts: set[str]) -> int:
        """Return the number of bad rows of finished parts, which are given by name."""
        folder = f"{self.path}/{_ERRORS}"
        if not self.store.isdir(folder):
            return 0
        errors_names = {_errors_name(name) for name in parts}
        return sum(
            self.store.cat_file(path).count(b"\n")
            for path in self.store.ls(folder, detail=False)
            if path.rsplit("/", 1)[-1] in errors_names
        )

    def write(self, name: str, content: bytes) -> None:
        """Write a file of the folder, whole or not at all."""
        if self.is_local:
            path = Path(self.path) / name
            path.parent.mkdir(parents=True, exist_ok=True)
            with whole_file(path) as new:
                new.write_bytes(content)
            return
        # Some stores may write half a file; all stores of fsspec can move a file.
        folder, _, file_name = f"{self.path}/{name}".rpartition("/")
        temporary_path = f"{folder}/{_TEMPORARY}{secrets.token_hex(4)}-{file_name}"
        self.store.makedirs(folder, exist_ok=True)
        self.store.pipe_file(temporary_path, content)
        self.store.mv(temporary_path, f"{folder}/{file_name}")


def _errors_name(part: str) -> str:
    """Return the name of the file with the bad rows of a part."""
    return f"{part.rpartition('.')[0]}.jsonl"
