"""Errors come home from worker processes as they were."""

from __future__ import annotations

import pickle

import pytest

from ad2kit.run.errors import Ad2kitError, DataError, MissingExtra, RunError


@pytest.mark.parametrize(
    "error",
    [DataError("no rows", hint="give rows"), RunError("", hint=""), MissingExtra("ray", extra="x")],
)
def test_an_error_survives_pickling(error: Ad2kitError) -> None:
    found = pickle.loads(pickle.dumps(error))  # noqa: S301  (what multiprocessing does)
    assert type(found) is type(error)
    assert (found.message, found.hint, str(found)) == (error.message, error.hint, str(error))
