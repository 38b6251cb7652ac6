"""What a Bento does when too much is asked of it, when it is stopped, and when a worker dies.

    python -m bench.overload BENTO-TAG --run runs/sst2-minilm-FINGERPRINT

Four trials on one server, with real texts: (1) five times its capacity for a minute, over as many
connections as that takes; (2) its capacity two seconds later, beside before; (3) kill -9 of one
worker under load; (4) SIGTERM under load. Prints what happened and ends with JSON; exit code 1 if
an answer was wrong, if a refusal was anything else than 429, if an answer came later than the
deadline, or if the server did not come back. Requests whose connection broke are counted: a killed
worker loses what it held, and what is on its way when the listener closes was never accepted.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import resource
import signal
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ad2kit.run_dir import RunDir
from ad2kit.runtime import available_cpus, environment
from bench.load import Load, closed_loop, open_loop
from bench.serve import OURS, drive, holders, report, requests, serving, sure_texts

if TYPE_CHECKING:
    import psutil

DEADLINE_MS = 10_000
BROKEN = {"ConnectionResetError", "ConnectionRefusedError", "BrokenPipeError", "OSError"}


def family(port: int) -> tuple[psutil.Process, list[psutil.Process]]:
    """Return the server that holds a port, and its workers."""
    workers = [p for p in holders(port) if "_bentoml_impl" in " ".join(p.cmdline())]
    return workers[0].parent() or workers[0], workers


def resident_mb(port: int) -> float:
    """Return the resident memory of all workers."""
    return float(sum(worker.memory_info().rss for worker in family(port)[1])) / 1e6


async def under_load(port: int, sent: list[Any], seconds: float, act: Any) -> Load:
    """Keep 64 connections busy, and do something a second after the start."""
    load = asyncio.create_task(closed_loop(port, sent, 64, seconds))
    await asyncio.sleep(1.0)
    act()
    return await load


def main() -> None:
    """Run the trials; see the module."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("tag")
    parser.add_argument("--run", type=Path, required=True)
    parser.add_argument("--variant", default="int8")
    parser.add_argument("--seconds", type=float, default=60.0, help="of too much load")
    options = parser.parse_args()
    connections = 4096
    resource.setrlimit(resource.RLIMIT_NOFILE, (2 * connections, resource.getrlimit(
        resource.RLIMIT_NOFILE)[1]))  # fmt: skip
    run = RunDir(options.run)
    folder, workers = run.onnx(options.variant), available_cpus()
    sent = requests(OURS, *sure_texts(run, folder))
    failures, facts = list[str](), dict[str, Any]()
    with serving(OURS, options.tag, folder, workers) as (port, _):
        drive(closed_loop(port, sent, 64, 3.0))
        before = drive(closed_loop(port, sent, 64, 5.0))
        report(OURS, "capacity before", before)
        memory = resident_mb(port)
        much = drive(open_loop(port, sent, 5 * before.per_s, options.seconds, connections))
        report(OURS, "5 x capacity", much)
        facts |= {"answered_per_s": much.per_s, "p99_ms": much.quantile(0.99),
                  "refused": much.errors["429"]}  # fmt: skip
        failures += [f"{n} x {error}" for error, n in much.errors.items() if error != "429"]
        failures += ["nothing was refused"] if not much.errors["429"] else []
        failures += ["an answer came too late"] if not much.served_ms(0.99) <= DEADLINE_MS else []
        time.sleep(2.0)
        after = drive(closed_loop(port, sent, 64, 5.0))
        report(OURS, "2 s later", after)
        facts |= {"capacity_after": after.per_s / before.per_s,
                  "memory_growth": resident_mb(port) / memory}  # fmt: skip

        _, running = family(port)
        killed = drive(under_load(port, sent, 6.0, running[0].kill))
        report(OURS, "a worker killed", killed)
        facts["lost_with_a_worker"] = sum(killed.errors.values())
        failures += [f"{n} x {error}" for error, n in killed.errors.items() if error not in BROKEN]
        end = time.monotonic() + 10
        while len(family(port)[1]) < len(running) and time.monotonic() < end:
            time.sleep(0.1)
        again = len(family(port)[1])
        failures += [] if again == len(running) else [f"{again} of {len(running)} workers"]

        server, _ = family(port)
        stopped = drive(under_load(port, sent, 3.0, lambda: server.send_signal(signal.SIGTERM)))
        report(OURS, "SIGTERM", stopped)
        facts["on_their_way_at_sigterm"] = sum(stopped.errors.values())
        failures += [f"at the end: {n} x {error}" for error, n in stopped.errors.items()
                     if error not in BROKEN]  # fmt: skip
    print("; ".join(failures) or "all as it should be")
    print(json.dumps({**facts, "failures": failures, "environment": environment(1)}))
    sys.exit(1 if failures else 0)


if __name__ == "__main__":
    main()
