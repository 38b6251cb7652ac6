"""Commands of ad2kit as forks of one process that has imported them: imports take most of the time.

A fork runs the whole command line in a process of its own, with its own arguments, environment,
folder, input and output. Variables that libraries read when they are imported must be those of the
warm process. As a script, ``warm.py SOCKET ARGUMENTS...`` is the command itself::

    python tests/warm.py SOCKET check my.yaml
"""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import traceback
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, TypedDict

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

ROOT = Path(__file__).parents[1]
STANDARD = (0, 1, 2)
# What commands import when they begin or later.
MODULES = (
    "ad2kit.__main__",
    "ad2kit.campaigns.run",
    "ad2kit.campaigns.fit",
    "ad2kit.campaigns.compare",
    "ad2kit.gate.plots",
    "ad2kit.planning.check",
    "optimum.exporters.onnx.convert",
    "transformers.models.bert.modeling_bert",
)
# Those of them that read no variables of the Hugging Face hub when they are imported.
LIBRARIES = (
    "matplotlib.figure",
    "onnx",
    "onnxruntime",
    "pandas",
    "pyarrow.dataset",
    "scipy.stats",
    "sklearn.linear_model",
    "sklearn.metrics",
    "torch._dynamo",
)


class _Request(TypedDict):
    arguments: list[str]
    cwd: str
    environment: dict[str, str]
    before: str


class Command:
    """A command that runs in a fork.

    Attributes:
        pid: the process id of the fork.
    """

    def __init__(self, connection: socket.socket) -> None:
        self._answers = connection.makefile("r")
        connection.close()
        self.pid = int(self._answers.readline())

    def kill(self) -> None:
        """Kill the fork, if it has not ended."""
        os.kill(self.pid, signal.SIGKILL)

    def wait(self) -> int:
        """Wait for its end, and return its exit code; the number of a signal is negative."""
        with self._answers:
            return int(self._answers.readline())


class Warm:
    """A warm process.

    Args:
        address: the path of its socket.
    """

    def __init__(self, address: str) -> None:
        self.address = address

    def start(
        self,
        *arguments: str | Path,
        cwd: Path | None = None,
        environment: Mapping[str, str] = os.environ,
        files: tuple[int, ...] = STANDARD,
        before: str = "",
    ) -> Command:
        """Start ``ad2kit ARGUMENTS``.

        Args:
            arguments: the arguments of the command line.
            cwd: the folder that it runs in; if None, the current one.
            environment: its environment.
            files: its input, output and errors, as file descriptors.
            before: code that the fork runs first.
        """
        request: _Request = {
            "arguments": list(map(str, arguments)),
            "cwd": str(cwd or Path.cwd()),
            "environment": dict(environment),
            "before": before,
        }
        connection = socket.socket(socket.AF_UNIX)
        connection.connect(self.address)
        socket.send_fds(connection, [b"3"], list(files))
        connection.sendall(json.dumps(request).encode())
        connection.shutdown(socket.SHUT_WR)
        return Command(connection)

    def run(
        self,
        *arguments: str | Path,
        cwd: Path | None = None,
        environment: Mapping[str, str] = os.environ,
        before: str = "",
    ) -> subprocess.CompletedProcess[str]:
        """Run ``ad2kit ARGUMENTS`` to its end; return what it printed, and its exit code."""
        with (
            Path(os.devnull).open() as nothing,
            tempfile.TemporaryFile("w+") as out,
            tempfile.TemporaryFile("w+") as err,
        ):
            files = (nothing.fileno(), out.fileno(), err.fileno())
            command = self.start(
                *arguments, cwd=cwd, environment=environment, files=files, before=before
            )
            code = command.wait()
            out.seek(0)
            err.seek(0)
            return subprocess.CompletedProcess(arguments, code, out.read(), err.read())


@contextmanager
def warm_process(modules: tuple[str, ...] = MODULES) -> Iterator[Warm]:
    """Start a process that has imported some modules; it ends with the block."""
    # The path of a socket has 107 characters at most, and pytest's folders may have more.
    with tempfile.TemporaryDirectory(prefix="ad2kit-warm-") as folder:
        address = f"{folder}/socket"
        code = f"from tests.warm import _serve; _serve({address!r}, {modules!r})"
        server = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE)
        assert server.stdout
        try:
            assert server.stdout.readline() == b"ready\n"
            yield Warm(address)
        finally:
            server.kill()
            server.wait()
            server.stdout.close()


def _serve(address: str, modules: tuple[str, ...]) -> None:
    """Import the modules, and fork for each request; each fork is watched by another one."""
    for module in modules:
        if importlib.util.find_spec(
            module.partition(".")[0]
        ):  # optimum is not there with version 5
            __import__(module)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for the watchers
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(address)
        listener.listen()
        print("ready", flush=True)
        while True:
            connection, _ = listener.accept()
            with connection:
                if os.fork() == 0:
                    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                    listener.close()
                    _watch(connection)


def _watch(connection: socket.socket) -> None:
    """Run a command in a fork, say how it ended, and end."""
    _, files, _, _ = socket.recv_fds(connection, 1, len(STANDARD))
    with connection.makefile("r") as stream:
        request = json.load(stream)
    child = os.fork()
    if child == 0:
        connection.close()
        _run(request, files)
    connection.sendall(f"{child}\n".encode())
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    connection.sendall(f"{code}\n".encode())
    os._exit(0)


def _run(request: _Request, files: list[int]) -> None:
    """Become the command; its threads may not be those that the warm process had."""
    import atexit

    from ad2kit.__main__ import main

    for ours, given in zip(STANDARD, files, strict=True):
        os.dup2(given, ours)
        os.close(given)
    os.chdir(request["cwd"])
    os.environ.clear()
    os.environ.update(request["environment"])
    sys.argv = ["ad2kit", *request["arguments"]]
    code = 1
    try:
        exec(request["before"], {})  # noqa: S102  (code of a test)
        main()
    except SystemExit as stop:
        code = int(stop.code or 0)
    except BaseException:
        traceback.print_exc()
    finally:
        # The destructors of the libraries would wait for threads that no fork has.
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    sys.exit(Warm(sys.argv[1]).start(*sys.argv[2:]).wait())
