"""What a Bento does when too much is asked of it, by the wrong clients, or of one worker alone.

    python -m bench.overload BENTO-TAG --run runs/sst2-minilm-FINGERPRINT

Trials on one server, with real texts: (1) five times its capacity for a minute, over as many
connections as that takes, and its capacity from two seconds later on, in windows of two seconds as
before; (2) the same again, to see whether memory grows each time; (3) clients that trickle bytes,
vanish, or send 100 MB, beside honest ones; (4) every connection on one worker, beside one client of
the other; (5) very many requests, and what they leave in memory; (6) kill -9 of one worker under
load; (7) SIGTERM under load. Prints what happened and ends with JSON; exit code 1 if an answer was
wrong, if a refusal was anything else than 429, if an answer came later than the deadline, or if the
server did not come back. Requests whose connection broke are counted: a killed worker loses what it
held, and what is on its way when the listener closes was never accepted.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import resource
import signal
import statistics
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil

from ad2kit.run.folder import RunDir
from ad2kit.run.machine import available_cpus, environment
from bench.load import Connection, Load, closed_loop, connect, open_loop
from bench.serve import OURS, drive, holders, report, requests, serving, sure_texts

if TYPE_CHECKING:
    from collections.abc import Collection

CONNECTIONS = 4096
WINDOWS, WINDOW_S = 7, 2.0
DEADLINE_MS = 10_000
BROKEN = {"ConnectionResetError", "ConnectionRefusedError", "BrokenPipeError", "OSError"}


def family(port: int) -> tuple[psutil.Process, list[psutil.Process]]:
    """Return the server that holds a port, and its workers."""
    server = holders(port)[0]
    while is_worker(server):  # they share the port
        server = server.parent() or server
    return server, [child for child in server.children() if is_worker(child)]


def is_worker(process: psutil.Process) -> bool:
    """Whether a process is a worker of BentoML, and lives."""
    try:
        return "_bentoml_impl" in " ".join(process.cmdline())
    except psutil.Error:  # it has just ended
        return False


def resident_mb(port: int) -> float:
    """Return the resident memory of all workers."""
    return float(sum(worker.memory_info().rss for worker in family(port)[1])) / 1e6


async def under_load(port: int, sent: list[Any], seconds: float, act: Any) -> Load:
    """Keep 64 connections busy, and do something a second after the start."""
    load = asyncio.create_task(closed_loop(port, sent, 64, seconds))
    await asyncio.sleep(1.0)
    act()
    return await load


def capacity(port: int, sent: list[Any]) -> list[float]:
    """Return the answers per second of several windows: the machine's own speed varies."""
    found = [drive(closed_loop(port, sent, 64, WINDOW_S)).per_s for _ in range(WINDOWS)]
    print(f"  capacity: {', '.join(f'{per_s:,.0f}' for per_s in found)} answers/s", flush=True)
    return found


async def too_much(
    port: int, sent: list[Any], per_s: float, seconds: float
) -> tuple[Load, list[float]]:
    """Ask at a rate; return what came, and the memory of the workers every five seconds."""
    memory = list[float]()

    async def watch() -> None:
        while True:
            await asyncio.sleep(5.0)
            memory.append(await asyncio.to_thread(resident_mb, port))

    watcher = asyncio.create_task(watch())
    load = await open_loop(port, sent, per_s, seconds, CONNECTIONS)
    watcher.cancel()
    return load, memory


async def beside_bad_clients(port: int, sent: list[Any], seconds: float) -> Load:
    """Keep 16 connections busy beside 100 clients that no service should notice.

    What the two cores spend on them, in the generator and in the service, is missing elsewhere.
    """
    head = b"POST /classify HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\n"

    async def trickle() -> None:
        link = await connect(port)
        link.transport.write(head + b"Content-Length: 1000\r\n\r\n")
        while not link.transport.is_closing():
            link.transport.write(b" ")
            await asyncio.sleep(0.2)

    async def vanish() -> None:
        while True:
            link = await connect(port)
            link.transport.write(sent[0].content)
            link.transport.abort()
            await asyncio.sleep(0.2)

    async def flood() -> None:
        while True:
            link = await connect(port)
            link.transport.write(head + b"Transfer-Encoding: chunked\r\n\r\n")
            for _ in range(100):
                if link.transport.is_closing():
                    break
                link.transport.write(b"100000\r\n" + b" " * 2**20 + b"\r\n")
                await asyncio.sleep(0.05)
            link.transport.abort()
            await asyncio.sleep(0.5)

    kinds = [trickle] * 80 + [vanish] * 18 + [flood] * 2
    bad = [asyncio.create_task(kind()) for kind in kinds]
    load = await closed_loop(port, sent, 16, seconds)
    for task in bad:
        task.cancel()
    for outcome in await asyncio.gather(*bad, return_exceptions=True):
        if isinstance(outcome, Exception) and not isinstance(outcome, OSError):
            raise outcome
    return load


async def links_of(port: int, worker: psutil.Process, wanted: int) -> list[Connection]:
    """Return connections that one worker has accepted; those of others are closed."""
    found = list[Connection]()
    while len(found) < wanted:
        new = [await connect(port) for _ in range(64)]
        await asyncio.sleep(0.2)
        theirs = {c.raddr.port for c in worker.net_connections("tcp") if c.raddr}
        for link in new:
            mine = link.transport.get_extra_info("sockname")[1] in theirs
            if mine and len(found) < wanted:
                found.append(link)
            else:
                link.transport.close()
    return found


async def skewed(
    port: int, sent: list[Any], busy: psutil.Process, idle: psutil.Process, seconds: float
) -> tuple[Load, Load]:
    """Give one worker more than its queue holds, and ask the other one thing after another."""
    many = await links_of(port, busy, 1536)
    one = await links_of(port, idle, 1)
    await asyncio.sleep(1.0)
    much, little = await asyncio.gather(
        closed_loop(port, sent, len(many), seconds, many),
        closed_loop(port, sent, 1, seconds, one),
    )
    return much, little


def main() -> None:
    """Run the trials; see the module."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("tag")
    parser.add_argument("--run", type=Path, required=True)
    parser.add_argument("--variant", default="int8")
    parser.add_argument("--seconds", type=float, default=60.0, help="of too much load")
    parser.add_argument("--requests", type=int, default=200_000, help="of trial 5")
    options = parser.parse_args()
    resource.setrlimit(
        resource.RLIMIT_NOFILE, (2 * CONNECTIONS, resource.getrlimit(resource.RLIMIT_NOFILE)[1])
    )
    run = RunDir(options.run)
    folder, workers = run.onnx(options.variant), available_cpus()
    sent = requests(OURS, *sure_texts(run, folder))
    failures, facts = list[str](), dict[str, Any]()

    def only(load: Load, what: str, allowed: Collection[str]) -> None:
        failures.extend(
            f"{what}: {n} x {error}" for error, n in load.errors.items() if error not in allowed
        )

    with serving(OURS, options.tag, folder, workers) as (port, _):
        drive(closed_loop(port, sent, 64, 3.0))
        before = capacity(port, sent)
        per_s = statistics.median(before)
        memory = [resident_mb(port)]
        for trial in ("first", "second"):
            seconds = options.seconds if trial == "first" else options.seconds / 3
            much, watched = drive(too_much(port, sent, 5 * per_s, seconds))
            report(OURS, f"5 x capacity, {trial}", much)
            only(much, "5 x capacity", {"429"})
            late = much.served_ms(0.99) > DEADLINE_MS
            failures += ["an answer came too late"] if late else []
            failures += [] if much.errors["429"] else ["nothing was refused"]
            time.sleep(2.0)
            after = capacity(port, sent)
            memory += [*watched, resident_mb(port)]
            facts[f"{trial}_overload"] = {
                "answered_per_s": much.per_s,
                "p99_ms_since_sent": much.served_ms(0.99),
                "refused": much.errors["429"],
                "capacity_before_per_s": before,
                "capacity_after_per_s": after,
                "capacity_after": statistics.median(after) / per_s,
                "memory_mb": [round(mb) for mb in (memory[0], *watched, memory[-1])],
                "memory_while_it_lasted": watched[-1] / watched[0],
            }
        alone = drive(closed_loop(port, sent, 16, 5.0))
        beside = drive(beside_bad_clients(port, sent, 10.0))
        report(OURS, "16 connections", alone)
        report(OURS, "beside bad clients", beside)
        only(beside, "beside bad clients", set())
        facts["beside_bad_clients"] = {
            "per_s": beside.per_s / alone.per_s,
            "p99": beside.quantile(0.99) / alone.quantile(0.99),
        }

        _, running = family(port)
        if len(running) > 1:
            much, little = drive(skewed(port, sent, running[0], running[1], 10.0))
            report(OURS, "all on one worker", much)
            report(OURS, "the other worker", little)
            only(much, "all on one worker", {"429"})
            only(little, "the other worker", set())
            facts["skew"] = {
                "answered_per_s": much.per_s,
                "refused": much.errors["429"],
                "p99_of_the_other_ms": little.quantile(0.99),
            }

        start_mb, asked = resident_mb(port), 0
        while asked < options.requests:
            load = drive(closed_loop(port, sent, 32, 10.0))
            only(load, "very many", set())
            asked += len(load.ms)
        facts["very_many"] = {"requests": asked, "memory_growth": resident_mb(port) / start_mb}
        print(f"{asked} requests: memory {start_mb:.0f} to {resident_mb(port):.0f} MB")

        killed = drive(under_load(port, sent, 6.0, running[0].kill))
        report(OURS, "a worker killed", killed)
        facts["lost_with_a_worker"] = sum(killed.errors.values())
        only(killed, "a worker killed", BROKEN)
        end = time.monotonic() + 10
        while len(family(port)[1]) < len(running) and time.monotonic() < end:
            time.sleep(0.1)
        again = len(family(port)[1])
        failures += [] if again == len(running) else [f"{again} of {len(running)} workers"]

        server, _ = family(port)
        stopped = drive(under_load(port, sent, 3.0, lambda: server.send_signal(signal.SIGTERM)))
        report(OURS, "SIGTERM", stopped)
        facts["on_their_way_at_sigterm"] = sum(stopped.errors.values())
        only(stopped, "at the end", BROKEN)
    print("; ".join(failures) or "all as it should be")
    print(json.dumps({**facts, "failures": failures, "environment": environment(1)}))
    sys.exit(1 if failures else 0)


if __name__ == "__main__":
    main()
