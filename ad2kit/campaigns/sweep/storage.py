"""Copies of folders at an fsspec address: ``file://``, ``s3://``, ``gs://``, ``memory://``, ...

Trials on machines without a shared disk need them. An object store cannot rename folders, so one
file, named by the caller, is written last: a folder without this file is not complete. A folder
that is copied back gets its name at the end. Its reader checks it (each model has its sha256).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import fsspec

from ad2kit.run.errors import UserError
from ad2kit.run.files import whole_folder

if TYPE_CHECKING:
    from pathlib import Path


@dataclass(frozen=True)
class Mirror:
    """Copies of folders below an address.

    Raises:
        UserError: the address cannot be written to, or needs a package that is not installed.
    """

    url: str

    def __post_init__(self) -> None:
        try:
            system, root = self._open()
            system.makedirs(root, exist_ok=True)
        except (ImportError, ValueError, OSError) as error:
            raise UserError(
                f"storage '{self.url}' cannot be used: {error}",
                hint="give an address that fsspec can write to, such as file:///shared/sweeps",
            ) from error

    def send(self, folder: Path, name: str, *, last: str) -> None:
        """Copy the files of ``folder`` to the address, ``last`` after all others.

        Hidden files are not copied.

        Args:
            folder: the folder to copy.
            name: its name at the address.
            last: the file in it that marks a complete copy.
        """
        system, root = self._open()
        files = [
            path.relative_to(folder).as_posix()
            for path in sorted(folder.rglob("*"))
            if path.is_file() and not path.name.startswith(".")
        ]
        for file in sorted(files, key=lambda file: file == last):
            target = f"{root}/{name}/{file}"
            system.makedirs(target.rpartition("/")[0], exist_ok=True)
            # Under another name first, because some stores write in place.
            system.put_file(str(folder / file), f"{target}.new")
            system.mv(f"{target}.new", target)

    def take(self, folder: Path, name: str, *, last: str) -> bool:
        """Copy the folder that was sent as ``name`` to ``folder``, which it replaces.

        Returns:
            Whether there is a complete copy, that is one with the file ``last``.
        """
        system, root = self._open()
        base = f"{root}/{name}/"
        if not system.isfile(f"{base}{last}"):
            return False
        with whole_folder(folder) as new:
            for file in system.find(base):
                target = new / file.removeprefix(base)
                target.parent.mkdir(parents=True, exist_ok=True)
                system.get_file(file, str(target))
        return True

    def _open(self) -> tuple[Any, str]:
        """Return the file system of the address, and the path in it."""
        system, root = fsspec.core.url_to_fs(self.url)
        return system, root.rstrip("/")
