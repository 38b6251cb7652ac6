"""The cache command: what runs keep in `.shared` that is only read or computed again, and its room.

Fine-tuned teachers lie there, too; they cost a training, and are not listed.
"""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING

from filelock import FileLock, Timeout

from ad2kit.run.files import LOCK, TEMPORARY, writing
from ad2kit.run.records import Part

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

# Each kind of entry, a folder of the store, in words.
_KINDS = {
    "tables": "the rows of large tables",
    "tokens": "the token ids of large splits",
    "logits": "the teachers' logits on training and validation texts",
}


class Kept(Part):
    """The entries of one kind, and the bytes that they take on the disk."""

    kind: str
    content: str
    entries: int
    size_bytes: int


def contents(shared: Path) -> list[Kept]:
    """Return what is kept in a store, by kind; see :mod:`ad2kit.training.shared`."""
    return [
        Kept(
            kind=kind,
            content=content,
            entries=sum(1 for _ in _entries(shared / kind)),
            size_bytes=sum(map(_size, _entries(shared / kind))),
        )
        for kind, content in _KINDS.items()
    ]


def clear(shared: Path) -> list[Path]:
    """Delete what is kept in a store; return the entries that another process is writing.

    A process that reads an entry keeps what it reads until it ends.
    """
    busy: list[Path] = []
    if not shared.is_dir():
        return busy
    with writing(shared):
        for entry in [each for kind in _KINDS for each in _entries(shared / kind)]:
            if entry.is_file():
                entry.unlink()
                continue
            try:
                with FileLock(entry / LOCK, timeout=0):
                    shutil.rmtree(entry)
            except Timeout:
                busy.append(entry)
    return busy


def _entries(folder: Path) -> Iterator[Path]:
    """Yield the entries of one kind, whole or not; a file is an entry once it has its name."""
    if folder.is_dir():
        yield from (each for each in sorted(folder.iterdir()) if TEMPORARY not in each.name)


def _size(entry: Path) -> int:
    """Return the bytes of a file, or of all files in a folder."""
    files = [entry] if entry.is_file() else entry.rglob("*")
    return sum(file.stat().st_size for file in files if file.is_file())
