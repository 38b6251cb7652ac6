"""Ray: a cluster that runs already, or one of this machine's cores for as long as it is needed."""

from __future__ import annotations

import logging
import os
import socket
import sys
from contextlib import contextmanager, redirect_stdout
from typing import TYPE_CHECKING

from ad2kit.run.errors import UserError
from ad2kit.run.machine import available_cpus

if TYPE_CHECKING:
    from collections.abc import Iterator

_TIMEOUT_S = 5.0
# A gRPC server answers the opening of an HTTP/2 connection with its settings (RFC 9113, 3.4).
_HELLO = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes((0, 0, 0, 4, 0, 0, 0, 0, 0))
_SETTINGS = 4
# Ray reports usage unless told not to, and gives its workers what other processes leave; ad2kit
# speaks for itself, and works in the caller's folder.
_SETTINGS_OF_RAY = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_worker_niceness": "0",
    "RAY_BACKEND_LOG_LEVEL": "fatal",  # its C++ warns the driver of what only Ray can mend
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    "RAY_AIR_NEW_OUTPUT": "0",
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_DISABLE_SIGINT_HANDLER": "1",
    "ARROW_DEFAULT_MEMORY_POOL": "system",  # Arrow's own keeps tens of megabytes in each worker
}
# Nothing that ad2kit sends needs more; Ray would take a third of the memory.
_OBJECT_STORE_BYTES = 100_000_000


@contextmanager
def ray_cluster(address: str | None = None) -> Iterator[None]:
    """Connect to the cluster at ``address``, or start one on this machine for the block.

    A connection that this process has already is used, and left open.

    Raises:
        UserError: nothing that could be Ray answers there within seconds.
    """
    for name, value in _SETTINGS_OF_RAY.items():
        os.environ.setdefault(name, value)
    if address is not None:
        insist_on_answer(address)

    import ray

    # What goes wrong in a trial is reported by whoever started it.
    logging.getLogger("ray").setLevel(logging.CRITICAL)
    with redirect_stdout(sys.stderr):  # stdout is for results, and Ray tells of dead workers there
        if ray.is_initialized():
            yield
            return
        if address is None:
            with _silent_stderr():
                ray.init(
                    address="local",
                    num_cpus=available_cpus(),
                    include_dashboard=False,
                    object_store_memory=_OBJECT_STORE_BYTES,
                    log_to_driver=False,
                    configure_logging=False,
                )
        else:
            try:
                with _silent_stderr():
                    ray.init(address=address, log_to_driver=False, configure_logging=False)
            except (ConnectionError, RuntimeError) as error:
                reason = str(error.__cause__ or error).split(". ")[0]
                raise UserError(
                    f"the Ray cluster at {address} refuses the connection: {reason}",
                    hint="a cluster that asks for a token needs RAY_AUTH_MODE=token here, and its "
                    "token in ~/.ray/auth_token; the versions of Ray have to agree",
                ) from error
        try:
            yield
        finally:
            ray.shutdown()


def insist_on_answer(address: str) -> None:
    """Find out in seconds whether a gRPC server, as Ray's head is one, answers at HOST:PORT.

    Ray itself would try for minutes.

    Raises:
        UserError: the address is not HOST:PORT, or nothing of the kind answers.
    """
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit() or "/" in host:
        raise UserError(
            f"a cluster's address must look like HOST:PORT, found '{address}'",
            hint="`ray start --head` prints it; for example: --address 10.0.0.5:6379",
        )
    reason = "it is no Ray head"
    try:
        with socket.create_connection((host, int(port)), timeout=_TIMEOUT_S) as connection:
            connection.sendall(_HELLO)
            answer = connection.recv(9, socket.MSG_WAITALL)
            if len(answer) == 9 and answer[3] == _SETTINGS:
                return
    except (OSError, OverflowError) as error:
        reason = str(error)
    raise UserError(
        f"no Ray cluster answers at {address}: {reason}",
        hint="start one with `ray start --head`, or leave --address out to use this machine",
    )


@contextmanager
def _silent_stderr() -> Iterator[None]:
    """Keep from the user that Ray's C++ has set its log level, which it says whatever the level."""
    sys.stderr.flush()
    kept = os.dup(2)
    with open(os.devnull, "wb") as nothing:  # noqa: PTH123  (its number is what is wanted)
        os.dup2(nothing.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
