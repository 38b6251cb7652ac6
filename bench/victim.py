"""A Bento that is attacked, and what an honest client sees of it meanwhile. See attack.py."""

from __future__ import annotations

import asyncio
import contextlib
import math
import os
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import psutil

from bench.attackers import HOST, READY, answer, classify
from bench.load import Load, connect
from bench.overload import is_worker
from bench.serve import drive, free_port, started

if TYPE_CHECKING:
    import subprocess
    from collections.abc import (
        AsyncIterator,
        Awaitable,
        Callable,
        Collection,
        Iterator,
        Mapping,
        Sequence,
    )

# The bounds of what others may notice of an attack. The probe's patience is that of
# serving/deploy/kubernetes.yaml.
MAX_READY_MS = MAX_HONEST_P99_MS = 2000.0
SETTLE_S = 10.0
# Here a worker is killed, so that an attack stays an experiment.
TOO_MUCH_MB = 6000.0
# Where getpass looks for the user's name before it asks for the passwd entry.
_NAMES = ("LOGNAME", "USER", "LNAME", "USERNAME")


@dataclass
class Outcome:
    """What came of one attack.

    ``got`` is what the attackers were answered, and how often; ``mb`` the resident memory of the
    largest worker before, at most, and ten seconds after.
    """

    name: str
    got: dict[str, int] = field(default_factory=dict)
    mb: list[float] | None = None
    honest_ms: list[float] | None = None  # p50, p99, the slowest
    honest_errors: dict[str, int] = field(default_factory=dict)
    ready_ms: float | None = None  # the slowest
    ready_errors: dict[str, int] = field(default_factory=dict)
    broken: list[str] = field(default_factory=list)
    skipped: str = ""

    @property
    def verdict(self) -> str:
        """Say whether the service held."""
        if self.skipped:
            return f"skipped: {self.skipped}"
        return f"broken: {'; '.join(self.broken)}" if self.broken else "held"


@dataclass(frozen=True)
class Bento:
    """A Bento, and the folder with the ad2kit that it was built with."""

    tag: str
    folder: Path
    code: Path

    @contextlib.contextmanager
    def served(
        self,
        *arguments: str,
        workers: int = 1,
        env: Mapping[str, str] | None = None,
        prefix: Sequence[str] = (),
        patience_s: float = 60.0,
    ) -> Iterator[Server]:
        """Serve it.

        Raises:
            Ended: it ended before it was ready.
            RuntimeError: it was not ready in time.
        """
        port = free_port()
        # A service that knows no AD2KIT_WORKERS takes a worker for each core that it may use.
        cores = ",".join(map(str, sorted(os.sched_getaffinity(0))[:workers]))
        ours = {
            name: value
            for name, value in os.environ.items()
            if name not in _NAMES and not name.startswith("AD2KIT_")
        }
        ours |= {
            "AD2KIT_WORKERS": str(workers),
            "AD2KIT_THREADS": "1",
            "OMP_NUM_THREADS": "1",
            "BENTOML_DO_NOT_TRACK": "true",
            "PYTHONPATH": str(self.code),
            **(env or {}),
        }
        serve = f"-m bentoml serve {self.tag} --host {HOST} --port {port}".split()
        command = ["taskset", "--cpu-list", cores, *prefix, sys.executable, *serve, *arguments]
        with tempfile.TemporaryDirectory(prefix="ad2kit-attack-") as temporary:
            # Python looks into the working directory first: a checkout's ad2kit must not be there.
            cwd = Path(temporary)

            def is_ready() -> bool:
                return drive(answer(port, [READY], 2.0)) == "200"

            with started(
                command, ours, cwd / "log", is_ready, cwd=cwd, patience_s=patience_s
            ) as process:
                yield Server(port, process)


@dataclass(frozen=True)
class Server:
    """A server that runs."""

    port: int
    process: subprocess.Popen[bytes]

    def workers(self) -> list[psutil.Process]:
        """Return its workers."""
        try:
            return [each for each in psutil.Process(self.process.pid).children() if is_worker(each)]
        except psutil.Error:
            return []

    def mb(self) -> float:
        """Return the resident memory of the largest worker; one that is too large is killed."""
        largest = 0.0
        for worker in self.workers():
            with contextlib.suppress(psutil.Error):
                mb = worker.memory_info().rss / 1e6
                largest = max(largest, mb)
                if mb > TOO_MUCH_MB:
                    worker.kill()
        return largest


async def fetch(port: int, request: bytes) -> tuple[int, bytes]:
    """Ask once over a connection of its own; return status and body."""
    async with asyncio.timeout(15.0):
        link = await connect(port)
        try:
            return await link.ask(request)
        finally:
            link.transport.abort()


def get(path: str) -> bytes:
    """Return a request for a path."""
    return f"GET {path} HTTP/1.1\r\nHost: a\r\n\r\n".encode()


async def ask(port: int, request: bytes, load: Load) -> None:
    """Ask once, and take down what came."""
    start = time.perf_counter()
    try:
        status, _ = await fetch(port, request)
    except OSError as error:
        load.errors[type(error).__name__] += 1
    else:
        if status == 200:
            load.ms.append(1e3 * (time.perf_counter() - start))
        else:
            load.errors[str(status)] += 1


@contextlib.asynccontextmanager
async def honest(server: Server, outcome: Outcome, columns: int) -> AsyncIterator[None]:
    """Ask as an honest client does, and measure the workers, while the block runs."""
    over, asked, ready, mb = asyncio.Event(), Load(), Load(), list[float]()

    async def every(period_s: float, act: Callable[[], Awaitable[None]]) -> None:
        under_way = list[asyncio.Future[None]]()
        while not over.is_set():
            under_way.append(asyncio.ensure_future(act()))
            await asyncio.sleep(period_s)
        await asyncio.gather(*under_way)

    async def measure() -> None:
        mb.append(await asyncio.to_thread(server.mb))

    short = classify(["a fine film" if columns == 1 else ["a fine film"] * columns])
    clients = asyncio.gather(
        every(0.05, lambda: ask(server.port, short, asked)),
        every(0.25, lambda: ask(server.port, get("/readyz"), ready)),
        every(0.1, measure),
    )
    await asyncio.sleep(1.0)
    before = mb[-1]
    try:
        yield
    finally:
        over.set()
        await clients
    await asyncio.sleep(SETTLE_S)
    outcome.mb = [before, max(mb), await asyncio.to_thread(server.mb)]
    outcome.honest_ms = [asked.quantile(0.5), asked.quantile(0.99), max(asked.ms, default=math.nan)]
    outcome.ready_ms = max(ready.ms, default=math.nan)
    outcome.honest_errors, outcome.ready_errors = dict(asked.errors), dict(ready.errors)


def hurt(outcome: Outcome, allowed: Collection[str]) -> list[str]:
    """Return what the honest client and the probe suffered beyond the bounds."""
    found = [
        f"{n} honest requests: {error}"
        for error, n in outcome.honest_errors.items()
        if error not in allowed
    ]
    found += [
        f"/readyz: {n} x {error}"
        for error, n in outcome.ready_errors.items()
        if error not in allowed
    ]
    # A NaN, where nothing was answered, is no good value.
    if outcome.honest_ms and not outcome.honest_ms[1] <= MAX_HONEST_P99_MS:
        found.append(f"honest p99 above {MAX_HONEST_P99_MS:g} ms")
    if outcome.ready_ms is not None and not outcome.ready_ms <= MAX_READY_MS:
        found.append(f"/readyz above {MAX_READY_MS:g} ms")
    return found
