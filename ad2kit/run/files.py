"""Files that are whole or absent, and known by their sha256."""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from filelock import FileLock, Timeout

from ad2kit.run.errors import ModelError, RunError

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from filelock import BaseFileLock
    from pydantic import BaseModel

TEMPORARY = ".tmp-"
_NEW = f"{TEMPORARY}new-"
_OLD = f"{TEMPORARY}old-"
LOCK = ".lock"


def fingerprint(*parts: Any) -> str:
    """Return the sha256 of plain data in canonical JSON, as 64 hexadecimal digits.

    An iterator among the parts yields a long list in blocks. Its JSON is never whole in memory, and
    the fingerprint is that of the list.
    """
    digest = hashlib.sha256()
    for number, part in enumerate(parts):
        digest.update(b"," if number else b"[")
        if isinstance(part, Iterator):
            separator = b"["
            for block in part:
                if len(block):
                    digest.update(separator + _canonical_json(block)[1:-1])
                    separator = b","
            digest.update(b"[]" if separator == b"[" else b"]")
        else:
            digest.update(_canonical_json(part))
    digest.update(b"]" if parts else b"[]")
    return digest.hexdigest()


def _canonical_json(data: Any) -> bytes:
    return json.dumps(data, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()


def sha256_of(path: Path) -> str:
    """Return the sha256 of a file as 64 hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_of_folder(folder: Path) -> dict[str, str]:
    """Return name -> sha256 for the files directly in ``folder``, sorted by name."""
    return {p.name: sha256_of(p) for p in sorted(folder.iterdir()) if p.is_file()}


def check_sha256(folder: Path, files: Mapping[str, str], *, hint: str) -> None:
    """Compare files of ``folder`` with the sha256 that they had when they were written.

    Raises:
        ModelError: a file is missing or has changed; the message names the first one.
    """
    for name, expected in files.items():
        path = folder / name
        actual = sha256_of(path) if path.is_file() else "no file"
        if actual != expected:
            raise ModelError(
                f"{path} is not the file that was written: sha256 expected {expected[:12]}…, "
                f"found {actual[:12]}",
                hint=hint,
            )


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Yield a temporary path; the file that is written there is renamed to ``path`` at the end.

    Each call has its own temporary path, so that two processes may write the same file.
    """
    temporary = path.with_name(f"{_NEW}{secrets.token_hex(4)}-{path.name}")
    yield temporary
    _to_disk(temporary)
    temporary.replace(path)


def write_text(path: Path, text: str) -> None:
    """Write a text file, whole or not at all."""
    with whole_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def read_lines(path: Path) -> list[str]:
    """Return the lines of a file of records; a last line that a kill cut short is left out.

    ``splitlines()`` would also split at U+2028 and its like, which a user's text may hold.
    """
    return path.read_text(encoding="utf-8").split("\n")[:-1]


def write_record(path: Path, record: BaseModel) -> None:
    """Write a record as indented JSON, whole or not at all."""
    write_text(path, record.model_dump_json(indent=2) + "\n")


@contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """Yield a temporary folder that is renamed to ``path`` at the end and replaces an older one.

    Whatever interrupts the block, either the old folder or the new one is whole afterwards. After
    an exception this holds at once. After a kill it holds as soon as the folder is written again
    or :func:`remove_leftovers` has run. Two processes must not write the same folder: the caller
    holds a lock.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    new, old = _temporary_names(path)
    _settle(path)  # removes the leftovers of a killed process
    try:
        new.mkdir()
        yield new
        for file in new.rglob("*"):
            if file.is_file():
                _to_disk(file)
        if path.exists():
            path.rename(old)
        new.rename(path)
    finally:
        _settle(path)


def _temporary_names(path: Path) -> tuple[Path, Path]:
    return path.with_name(f"{_NEW}{path.name}"), path.with_name(f"{_OLD}{path.name}")


def _settle(path: Path) -> None:
    """Rename the old folder back to ``path`` unless a new one is there; remove leftovers."""
    new, old = _temporary_names(path)
    if new.exists():
        shutil.rmtree(new)
    if old.exists():
        # A folder that is only half removed must not have the name of an old one, because that
        # name would be restored.
        old.rename(new if path.exists() else path)
        shutil.rmtree(new, ignore_errors=True)


def remove_leftovers(folder: Path) -> None:
    """Remove half-written files and folders that a killed process left below ``folder``.

    A folder with its own lock is skipped: the holder of that lock cleans it.
    """
    for old in list(folder.glob(f"{_OLD}*")):
        _settle(old.with_name(old.name.removeprefix(_OLD)))
    for path in list(folder.iterdir()):
        if path.is_dir() and not path.is_symlink():
            if path.name.startswith(TEMPORARY):
                shutil.rmtree(path)
            elif not (path / LOCK).exists():
                remove_leftovers(path)
        elif path.name.startswith(TEMPORARY):
            path.unlink(missing_ok=True)


@contextmanager
def locked(folder: Path) -> Iterator[BaseFileLock]:
    """Lock a folder for writing and remove the leftovers of a killed process.

    Raises:
        RunError: another process is writing to the folder.
    """
    lock = FileLock(folder / LOCK)
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        raise RunError(
            f"{folder} is being written by another ad2kit process",
            hint="wait for it, or stop it, then run the same command again",
        ) from error
    try:
        remove_leftovers(folder)
        yield lock
    finally:
        lock.release()


@contextmanager
def writing(store: Path) -> Iterator[None]:
    """Lock a folder that runs share for writing, and remove the leftovers of a killed process.

    A second process waits for the lock, and then finds what the first one has written.
    """
    store.mkdir(parents=True, exist_ok=True)
    with FileLock(store / LOCK):
        remove_leftovers(store)
        yield


def _to_disk(path: Path) -> None:
    """Flush a file from the cache of the operating system to the disk."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
