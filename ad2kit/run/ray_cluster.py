"""Ray: connect to a running cluster, or start a temporary one on this machine's cores."""

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
# By default Ray reports usage, runs its workers at a lower priority, prints its own reports, and
# changes the working folder of a trial. ad2kit wants none of this.
_SETTINGS_OF_RAY = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_worker_niceness": "0",
    "RAY_BACKEND_LOG_LEVEL": "fatal",  # else Ray's C++ warns of faults that only Ray can repair
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    "RAY_AIR_NEW_OUTPUT": "0",
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_DISABLE_SIGINT_HANDLER": "1",
    "ARROW_DEFAULT_MEMORY_POOL": "system",  # Arrow's pool keeps tens of megabytes in each worker
}
# ad2kit sends no larger objects; by default Ray reserves a third of the memory.
_OBJECT_STORE_BYTES = 100_000_000


@contextmanager
def ray_cluster(address: str | None = None) -> Iterator[None]:
    """Connect to the cluster at ``address``, or start one on this machine for the block.

    If this process is already connected, that connection is used and left open.

    Raises:
        UserError: no Ray head answers at ``address`` within seconds, or it refuses the connection.
    """
    for name, value in _SETTINGS_OF_RAY.items():
        os.environ.setdefault(name, value)
    if address is not None:
        check_answer(address)

    import ray

    # The caller that started a trial reports its errors.
    logging.getLogger("ray").setLevel(logging.CRITICAL)
    with redirect_stdout(sys.stderr):  # Ray reports dead workers on stdout, which is for results
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


def check_answer(address: str) -> None:
    """Insist that a gRPC server, such as a Ray head, answers at HOST:PORT within seconds.

    Ray itself would try for minutes.

    Raises:
        UserError: the address is not HOST:PORT, or no gRPC server answers there.
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
    """Redirect stderr to the null device: Ray's C++ reports its log level there at any level."""
    sys.stderr.flush()
    saved_stderr = os.dup(2)
    with open(os.devnull, "wb") as null_device:  # noqa: PTH123  (its file number is needed)
        os.dup2(null_device.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(saved_stderr, 2)
        os.close(saved_stderr)
