"""A connection to Ray, an engine that other people write: quiet, without telemetry, with an end."""

from __future__ import annotations

import logging
import os
import socket
import sys
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from ad2kit.errors import MissingExtra, UserError

if TYPE_CHECKING:
    from collections.abc import Iterator

_ANSWER_SECONDS = 5.0
# Blocks are named, not sent: nothing of size passes through Ray's shared memory.
_OBJECT_STORE_BYTES = 100 * 2**20

# RFC 9113, 3.4: what a client sends first; and the SETTINGS frame that both sides begin with.
_HTTP2_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
_EMPTY_SETTINGS = bytes([0, 0, 0, 4, 0, 0, 0, 0, 0])


@contextmanager
def connected(address: str | None, cpus: int) -> Iterator[Any]:
    """Yield the module ``ray``: on this machine with ``cpus``, or connected to ``address``.

    A connection that is there already is used as it is, and left.

    Raises:
        MissingExtra: Ray is not installed.
        UserError: nothing answers at the address, or it is no Ray cluster.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    try:
        import ray
    except ModuleNotFoundError as error:
        raise MissingExtra(error.name or "ray", extra="scale") from error
    if ray.is_initialized():
        here = ray.get_runtime_context().gcs_address
        if address not in (None, here):
            raise UserError(
                f"this process is connected to the Ray cluster at {here}, and not to {address}",
                hint="call ray.shutdown() first, or leave the address out",
            )
        yield ray
        return
    where: dict[str, Any] = {"address": address}
    if address is None:
        where = {
            "address": "local", "num_cpus": cpus, "include_dashboard": False,
            "object_store_memory": _OBJECT_STORE_BYTES,
        }  # fmt: skip
    try:
        _insist_that_it_answers(address or "")
        with _silence():
            ray.init(**where, log_to_driver=False, logging_level=logging.ERROR)
    except (OSError, RuntimeError, ValueError) as error:
        raise UserError(
            f"no Ray cluster at '{address or 'this machine'}': {error}",
            hint="start one with `ray start --head`, or correct --address",
        ) from error
    try:
        yield ray
    finally:
        ray.shutdown()


def _insist_that_it_answers(address: str) -> None:
    """Knock as a client of gRPC does, which is what Ray speaks, and wait for its first frame.

    Ray itself would go on trying for minutes, also where something else listens.
    """
    host, colon, port = address.removeprefix("ray://").rpartition(":")
    if not (colon and port.isdigit()):
        return
    with socket.create_connection((host, int(port)), timeout=_ANSWER_SECONDS) as connection:
        connection.sendall(_HTTP2_PREFACE + _EMPTY_SETTINGS)
        header = connection.recv(len(_EMPTY_SETTINGS))
    if header[3:4] != _EMPTY_SETTINGS[3:4]:
        raise ConnectionError("what listens there is not Ray")


@contextmanager
def _silence() -> Iterator[None]:
    """Close the ears to what Ray's C++ writes to stderr at its start, whatever the log level."""
    sys.stderr.flush()
    kept = os.dup(2)
    with open(os.devnull, "wb") as nothing:  # noqa: PTH123  (its number is what is wanted)
        os.dup2(nothing.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
