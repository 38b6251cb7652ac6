"""Every failure that ad2kit reports on purpose.

    Ad2kitError
    ├── GateFailed      a gate was read and said no                     exit code 1
    ├── UserError       something that the user can put right           exit code 2
    │   ├── RecipeError     a recipe, a key or an override is wrong
    │   ├── DataError       a data set, a column, a row or a label is wrong
    │   ├── ModelError      a teacher, a student or an artefact cannot be used
    │   ├── RunError        a run folder is missing, busy, foreign or damaged
    │   ├── TextTooLong     a text has more tokens than the model may read
    │   └── DivergedError   the loss or a gradient is no longer a number
    └── MissingExtra    an optional dependency is not installed         exit code 3

A message names the expected value, the value found and the place; the hint names the next step.
Any other exception that escapes is a defect of ad2kit: exit code 70.
"""

from __future__ import annotations

import errno
from contextlib import contextmanager
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any, ClassVar

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

EXIT_INTERRUPTED = 130
EXIT_BUG = 70

_NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


class Ad2kitError(Exception):
    """Base of all errors that ad2kit raises on purpose."""

    exit_code: ClassVar[int] = EXIT_BUG

    def __init__(self, message: str, *, hint: str) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __reduce__(self) -> tuple[Any, ...]:
        """Make the error picklable for worker processes; pickle alone would lose the hint."""
        return type(self).__new__, (type(self), self.message), self.__dict__


class GateFailed(Ad2kitError):
    """A gate compared a measured value with its threshold, and the value did not pass."""

    exit_code = 1


class UserError(Ad2kitError):
    """The user has to change the input or the environment."""

    exit_code = 2


class RecipeError(UserError):
    """A recipe is unknown, unreadable, or has a wrong key or value."""


class DataError(UserError):
    """A data set cannot be read, or does not fit the recipe."""


class ModelError(UserError):
    """A model folder is missing, unsafe, incomplete, damaged, or does not fit its recipe."""


class RunError(UserError):
    """A run folder is missing, in use, from another recipe, or lacks an earlier stage."""


class TextTooLong(UserError):
    """A text has more tokens, or more windows, than the model may read."""


class DivergedError(UserError):
    """Training produced a number that is not finite; the weights were not touched by it."""


class MissingExtra(Ad2kitError):
    """A feature needs an optional dependency that is not installed."""

    exit_code = 3

    def __init__(self, module: str, *, extra: str) -> None:
        super().__init__(
            f"this needs the Python module '{module}', which is not installed",
            hint=f"pip install 'ad2kit[{extra}]'",
        )

    @classmethod
    def of(cls, error: ModuleNotFoundError) -> MissingExtra:
        """Return the error that names the extra to install for a module that is missing.

        Raises:
            ModuleNotFoundError: ``error`` itself, if the module is one of ad2kit's own.
        """
        module = error.name or str(error)
        if module.split(".")[0] == "ad2kit":
            raise error
        return cls(module, extra="scale" if module in ("ray", "optuna") else "cpu")


def nearest(wrong: str, right: Iterable[str]) -> str:
    """Return `` (did you mean 'x'?)`` for the nearest of ``right``, or an empty string."""
    matches = get_close_matches(wrong, list(right), n=1, cutoff=0.5)
    return f" (did you mean '{matches[0]}'?)" if matches else ""


def no_column(where: str, column: str, columns: Iterable[str]) -> DataError:
    """Return the error for a table that lacks a column of the recipe."""
    return DataError(
        f"{where}: no column '{column}'{nearest(column, columns)}; "
        f"columns: {', '.join(map(str, columns))}",
        hint="set data.text_columns and data.label_column",
    )


@contextmanager
def reading(name: str) -> Iterator[None]:
    """Turn an error of the operating system in the block into one of the user's.

    Raises:
        DataError: the file or folder of this name is gone, or may not be read.
    """
    try:
        yield
    except OSError as error:
        if no_room_left(error):
            raise
        raise DataError(
            f"cannot read {name}: {error}",
            hint="put it back, or correct its access rights, then run the same command again",
        ) from error


def no_room_left(error: BaseException | None) -> bool:
    """Tell whether ``error``, or one of its causes, is a full disk or an exhausted quota.

    safetensors and onnx wrap the operating system's error in their own types. These types keep
    the text of the error but not its number.
    """
    while error is not None:
        if isinstance(error, OSError) and error.errno in _NO_ROOM:
            return True
        if any(text in str(error) for text in ("No space left", "os error 28", "os error 27")):
            return True
        error = error.__cause__ or error.__context__
    return False
