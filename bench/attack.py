"""What strangers can do to a Bento: attacks on it, each beside an honest client; loopback alone.

    python -m bench.attack BENTO-TAG [--json FILE] [--compare FILE] [--only WORD ...]

Each attack has a server of its own: ``bentoml serve TAG`` on a free port of 127.0.0.1, with the
ad2kit that the Bento was built with, one worker with one thread on one core unless the
attack needs two. The attackers are another process, and stop by themselves after some seconds.
Meanwhile an honest client opens a connection every 50 ms and asks for a short text, and a probe
asks for /readyz every 250 ms.

*memory*, *headers*, *slow clients* and *lists* load the service; *keys* asks by every way to give
keys whether it stays shut; *restart* kills workers and the parent, fills the folder for temporary
files, and starts the service as a user without a name. The bounds below and in victim.py say what
is held.
Prints a table, with --compare beside what an earlier run has written to its --json. Exit code 1 if
something was broken.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import multiprocessing
import os
import re
import resource
import socket
import subprocess
import sys
import tempfile
import time
import zipfile
from collections import Counter
from concurrent.futures import BrokenExecutor, ProcessPoolExecutor
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import bentoml
import psutil

from ad2kit.run.machine import environment
from bench.attackers import ATTACKS, HOST, STILL_THERE, Aim, Attack, answer, attack
from bench.overload import BROKEN
from bench.serve import Ended, drive
from bench.victim import Bento, Outcome, Server, fetch, get, honest, hurt

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Mapping, Sequence

# The other bounds stand in victim.py. A worker holds the model, what is queued, and what is read.
MAX_WORKER_MB = 350.0
# Ten seconds after the attack a worker holds at most so many times what it held before.
MAX_KEPT = 1.5
# A worker is back when it has stayed so long, and it is so within BACK_S.
STAY_S, BACK_S = 5.0, 20.0
PARENT_GONE_S = 10.0
KEY, NOT_THE_KEY = "the-right-key", "another-key"
REFUSED = "refused to start"


def faults(load: Attack, outcome: Outcome) -> list[str]:
    """Return the bounds that a load has broken."""
    found = list[str]()
    if outcome.mb is not None:
        before, peak, after = outcome.mb
        found += [f"a worker above {MAX_WORKER_MB:g} MB"] if not peak <= MAX_WORKER_MB else []
        found += ["memory is kept"] if not after <= MAX_KEPT * before else []
    got = outcome.got
    found += ["answered with 200"] if load.refused and got.get("200") else []
    there = sum(n for what, n in got.items() if STILL_THERE in what)
    found += [f"{there} {STILL_THERE}"] if load.sent_away and there else []
    found += [f"{got['500']} x 500"] if "500" in got else []
    return found + hurt(outcome, load.allowed)


def loaded(bento: Bento, name: str, attackers: ProcessPoolExecutor) -> Outcome:
    """Make one of the attacks that load the service."""
    load, outcome = ATTACKS[name], Outcome(name)

    async def act(server: Server) -> None:
        columns = json.loads((await fetch(server.port, get("/info")))[1])["text_columns"]
        aim, running = Aim(server.port, load.seconds, columns), asyncio.get_running_loop()
        async with honest(server, outcome, columns):
            outcome.got = dict(await running.run_in_executor(attackers, attack, name, aim))

    with bento.served() as server:
        workers = server.workers()
        drive(act(server))
        outcome.broken = faults(load, outcome)
        if server.workers() != workers:
            outcome.broken.append("a worker ended")
    return outcome


# Keys


CLOSED = (
    "POST /classify",
    "GET /info",
    "GET /docs.json",
    "GET /schema.json",
    "GET /static_content/swagger-ui.css",
)
# Nobody has to answer these; without a key nobody may.
DETOURS = (
    "GET /docs",
    "GET /docs/",
    "GET /info/",
    "GET //info",
    "GET /%69nfo",
    "GET /info?/metrics",
    "GET /metrics/../info",
    "GET /metrics/",
    "GET http://a/info",
    "HEAD /info",
    "OPTIONS /classify",
    "POST /classify/",
    "GET /classify",
)
PUBLIC = ("GET /readyz", "GET /livez", "GET /healthz", "GET /metrics", "GET /")
STRANGERS = (
    "",
    "Authorization: Bearer ",
    f"Authorization: Bearer {NOT_THE_KEY}",
    f"Authorization: Basic {KEY}",
    f"Authorization: {KEY}",
)


def knock(port: int, door: str, header: str = "") -> str:
    """Return the status of a request with a header."""
    method, path = door.split()
    body = json.dumps({"texts": ["fine"]}) if method == "POST" else ""
    kind = "Content-Type: application/json\r\n" if body else ""
    lines = (
        f"{method} {path} HTTP/1.1\r\nHost: a\r\nConnection: close\r\n{kind}"
        f"Content-Length: {len(body)}\r\n{header}{chr(13) + chr(10) if header else ''}\r\n"
    )
    return drive(answer(port, [(lines + body).encode()]))


@dataclass(frozen=True)
class Way:
    """A way to give keys, and whether the service has to start with it."""

    name: str
    arguments: tuple[str, ...] = ()
    env: Mapping[str, str] = field(default_factory=dict)
    serves: bool = False


def ways(folder: Path) -> list[Way]:
    """Write files of keys, good and bad ones, and return the ways to give them."""
    good = {
        "one key": KEY.encode(),
        "a BOM, a comment, blanks, a key": f"\ufeff# ours\r\n\r\n {KEY} \r\n".encode(),
    }
    bad = {
        "nothing in it": b"",
        "blanks in it": b" \n\t\n",
        "a comment in it": b"# ours\n",
        "bytes in it": bytes(range(256)),
    }
    files = {"no such file": folder / "absent", "a folder": folder}
    for number, (name, content) in enumerate((good | bad).items()):
        files[name] = folder / f"keys-{number}"
        files[name].write_bytes(content)
    found = []
    for name, path in files.items():
        env = {"AD2KIT_API_KEYS_FILE": str(path)}
        found.append(Way(f"AD2KIT_API_KEYS_FILE, {name}", (), env, name in good))
        found.append(Way(f"--arg api_keys_file, {name}", ("--arg", f"api_keys_file={path}")))
    listed = folder / "arguments.yaml"
    listed.write_text(json.dumps({"api_keys_file": str(files["one key"])}))
    found.append(Way("--arg-file, one key", ("--arg-file", str(listed))))
    for name, keys in {"two keys": f"old, {KEY}", "nothing": "", "commas": " , "}.items():
        found.append(Way(f"AD2KIT_API_KEYS, {name}", (), {"AD2KIT_API_KEYS": keys}, KEY in keys))
    return found


def doors(port: int) -> tuple[dict[str, int], list[str]]:
    """Try all doors without a key and with it; return the statuses, and what is wrong."""
    got, broken = Counter[str](), list[str]()
    tries = [(door, header) for door in CLOSED for header in STRANGERS]
    without = [(door, header, knock(port, door, header)) for door, header in tries]
    detours = [(door, knock(port, door)) for door in DETOURS]
    got.update(f"{status} without a key" for *_, status in without)
    unlocked = {door for door, _, status in without if status != "401"}
    ways_in = [door for door, status in detours if status[0] in "23"]
    if len(unlocked) == len(CLOSED):
        broken.append("open to everybody")
    else:
        broken += [f"open: {door}" for door in (*sorted(unlocked), *ways_in)]
    with_key = {door: knock(port, door, f"Authorization: Bearer {KEY}") for door in CLOSED}
    got.update(f"{status} with it" for status in with_key.values())
    broken += [f"{status} with the key: {d}" for d, status in with_key.items() if status != "200"]
    public = {door: knock(port, door) for door in PUBLIC}
    broken += [f"{status} of the public {d}" for d, status in public.items() if status != "200"]
    return dict(got), broken


def refusal_faults(log: str, *, serves: bool) -> list[str]:
    """Return what is wrong with a server that did not start; ``log`` is the end of what it said."""
    found = [f"{REFUSED} with a key"] if serves else []
    if "Traceback" in log:
        found.append("refused with a traceback")
    # What fails for another reason is no refusal of keys.
    if not re.search(r"\bkeys?\b|api_keys", log, re.IGNORECASE):
        found.append(f"says nothing of keys ({cause(log)})")
    return found


def locked(bento: Bento, way: Way) -> Outcome:
    """Serve with keys that are given in some way: it is shut, or it does not start."""
    outcome = Outcome(f"keys: {way.name}")
    try:
        with bento.served(*way.arguments, env=way.env, patience_s=30.0) as server:
            outcome.got, outcome.broken = doors(server.port)
    except Ended as ended:
        outcome.got = {REFUSED: 1}
        outcome.broken = refusal_faults(str(ended), serves=way.serves)
    except RuntimeError:
        outcome.broken = ["neither ready nor ended after 30 s"]
    return outcome


# Restarts


def counters(exposition: str) -> dict[str, float]:
    """Return the counters and histograms of an exposition of metrics, by name and labels."""
    from prometheus_client.parser import text_string_to_metric_families

    return {
        f"{sample.name}{sorted(sample.labels.items())}": sample.value
        for family in text_string_to_metric_families(exposition)
        if family.type in ("counter", "histogram")
        for sample in family.samples
        if not sample.name.endswith("_created")
    }


def fell(earlier: Mapping[str, float], later: Mapping[str, float]) -> list[str]:
    """Return the names of those that became smaller; what is absent later is zero."""
    return sorted(name for name, value in earlier.items() if later.get(name, 0.0) < value)


async def models(port: int) -> set[str]:
    """Return the models that /info names over 40 connections."""
    found = [await fetch(port, get("/info")) for _ in range(40)]
    return {
        json.loads(body)["model_sha256"] if status == 200 else str(status) for status, body in found
    }


async def is_back(server: Server, many: int, watch: Callable[[], Awaitable[None]]) -> bool:
    """Wait until as many workers have been the same for some seconds, and watch meanwhile."""
    seen, since, end = set[int](), time.monotonic(), time.monotonic() + BACK_S
    while time.monotonic() < end:
        await watch()
        await asyncio.sleep(0.25)
        now = {worker.pid for worker in server.workers()}
        if now != seen:
            seen, since = now, time.monotonic()
        elif len(now) == many and time.monotonic() > since + STAY_S:
            return True
    return False


async def kill_workers(server: Server, outcome: Outcome, times: int) -> None:
    """Kill a worker, some times; another must come, serve the same model, and forget nothing."""
    served, fallen, totals = await models(server.port), set[str](), dict[str, float]()
    columns = json.loads((await fetch(server.port, get("/info")))[1])["text_columns"]
    many, back = len(server.workers()), Counter[str]()

    async def watch() -> None:
        nonlocal totals
        with contextlib.suppress(OSError):  # a killed worker takes its connections along
            status, body = await fetch(server.port, get("/metrics"))
            if status == 200:
                later = counters(body.decode())
                fallen.update(fell(totals, later))
                totals = later

    async with honest(server, outcome, columns):
        await watch()
        for _ in range(times):
            for victim in server.workers()[:1]:
                victim.kill()
            back["back" if await is_back(server, many, watch) else "not back"] += 1
        served |= await models(server.port)
    outcome.got = dict(back)
    outcome.broken = hurt(outcome, BROKEN)
    if back["not back"]:
        outcome.broken.append(f"a worker is not back after {BACK_S:g} s")
    if len(served) > 1:
        outcome.broken.append(f"{len(served)} models: {', '.join(sorted(served))}")
    if fallen:
        outcome.broken.append(f"{len(fallen)} counters fell, such as {min(fallen)}")


def worker_killed(bento: Bento, name: str) -> Outcome:
    """Kill workers with kill -9."""
    outcome = Outcome(name)
    with bento.served(workers=2) as server:
        drive(kill_workers(server, outcome, times=3))
    return outcome


def without_room(bento: Bento, name: str) -> Outcome:
    """Kill a worker while the folder for temporary files, of 32 MB, is full."""
    with tempfile.TemporaryDirectory(prefix="ad2kit-attack-") as temporary:
        # The mount is seen by the server alone, and goes with it.
        mount = (
            "unshare",
            "--user",
            "--map-root-user",
            "--mount",
            "sh",
            "-c",
            'mount -t tmpfs -o size=32m tmpfs "$0" && exec "$@"',
            temporary,
        )
        outcome = Outcome(name, skipped=impossible(mount))
        if outcome.skipped:
            return outcome
        with bento.served(workers=2, env={"TMPDIR": temporary}, prefix=mount) as server:
            drive(models(server.port))
            seen = Path(f"/proc/{server.process.pid}/root{temporary}")
            with (seen / "full").open("wb", buffering=0) as full:
                while os.statvfs(seen).f_bavail:
                    full.write(bytes(2**12))
            drive(kill_workers(server, outcome, times=1))
    return outcome


def parent_killed(bento: Bento, name: str) -> Outcome:
    """Kill the parent of the workers with kill -9: they leave, and the port is free."""
    outcome = Outcome(name)
    with bento.served(workers=2) as server:
        workers, start = server.workers(), time.monotonic()
        server.process.kill()
        _, alive = psutil.wait_procs(workers, timeout=PARENT_GONE_S)
        seconds = time.monotonic() - start
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((HOST, server.port))
            except OSError:
                outcome.broken.append("the port is not free")
        for worker in alive:
            worker.kill()
    if alive:
        outcome.broken.append(f"{len(alive)} workers left after {PARENT_GONE_S:g} s")
    else:
        outcome.got = {f"workers gone after {seconds:.1f} s": len(workers)}
    return outcome


def user_without_name(bento: Bento, name: str) -> Outcome:
    """Serve as a user id that has no passwd entry, as containers do."""
    user = ("unshare", "--user", "--map-user=54321")
    outcome = Outcome(name, skipped=impossible(user))
    if outcome.skipped:
        return outcome
    with tempfile.TemporaryDirectory(prefix="ad2kit-attack-") as home:
        env = {"HOME": home, "BENTOML_HOME": str(bento.folder.parents[2])}
        try:
            with bento.served(env=env, prefix=user, patience_s=45.0) as server:
                workers = server.workers()
                outcome.got = {knock(server.port, "POST /classify"): 1}
                time.sleep(5.0)
                if server.workers() != workers or "200" not in outcome.got:
                    outcome.broken.append("its workers do not stay")
        except RuntimeError as error:
            outcome.broken.append(f"does not serve ({cause(str(error))})")
    return outcome


def folder_for_others(bento: Bento, name: str) -> Outcome:
    """Look whether another user, such as a container's, may read the Bento's folder."""
    paths = [bento.folder, *bento.folder.rglob("*")]
    shut = [path for path in paths if not path.stat().st_mode & (0o1 if path.is_dir() else 0o4)]
    outcome = Outcome(name, {"files and folders": len(paths)})
    if shut:
        outcome.broken.append(f"{len(shut)} are shut, such as {shut[0].name}")
    return outcome


def impossible(prefix: Sequence[str]) -> str:
    """Return why a command cannot be run behind a prefix on this machine; nothing if it can."""
    found = subprocess.run([*prefix, "true"], capture_output=True, text=True, check=False)
    return found.stderr.strip()


def cause(log: str) -> str:
    """Return the last error that the end of a log names, or else its last line."""
    found = re.findall(r"[A-Z]\w*Error: [^\\\n\"]+", log) or log.strip().splitlines()
    return found[-1] if found else "no word"


RESTARTS: dict[str, Callable[[Bento, str], Outcome]] = {
    "restart: kill -9 of a worker, three times": worker_killed,
    "restart: the same, the temporary folder full": without_room,
    "restart: kill -9 of the parent": parent_killed,
    "restart: a user id without a passwd entry": user_without_name,
    "restart: the Bento's folder, read by others": folder_for_others,
}


# What comes of it


HEADER = (
    "attack",
    "what came",
    "worker MB: before → peak → after",
    "honest ms: p50 / p99 / max",
    "its errors",
    "/readyz max ms",
    "verdict",
)


def cells(outcome: Outcome) -> list[str]:
    """Return an outcome as the cells of a table."""

    def counts(found: Mapping[str, int]) -> str:
        return ", ".join(f"{n:,} × {what}" for what, n in sorted(found.items()))

    honest_ms = outcome.honest_ms or ()
    return [
        outcome.name,
        counts(outcome.got),
        " → ".join(f"{mb:.0f}" for mb in outcome.mb or ()),
        " / ".join(f"{ms:.0f}" for ms in honest_ms),
        counts(outcome.honest_errors) or ("none" if honest_ms else ""),
        "" if outcome.ready_ms is None else f"{outcome.ready_ms:.0f}",
        outcome.verdict,
    ]


def table(now: Sequence[Outcome], before: Sequence[Outcome] = ()) -> str:
    """Return outcomes as a table of markdown; with earlier ones, each below its earlier one."""
    earlier = {outcome.name: outcome for outcome in before}
    lines = [list(HEADER), ["---"] * len(HEADER)]
    for outcome in now:
        first, *rest = cells(outcome)
        if outcome.name in earlier:
            lines.append([f"{first}: before", *cells(earlier[outcome.name])[1:]])
            first = f"{first}: now"
        lines.append([first, *rest])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def read(path: Path) -> list[Outcome]:
    """Return the outcomes that an earlier run has written."""
    return [Outcome(**each) for each in json.loads(path.read_text())["outcomes"]]


def opened(tag: str, scratch: Path) -> Bento:
    """Find a Bento and the ad2kit that it was built with: its own copy, or the wheel of 0.1.0."""
    folder = Path(bentoml.bentos.get(tag).path)
    if (folder / "src" / "ad2kit").is_dir():
        return Bento(tag, folder, folder / "src")
    (wheel,) = folder.glob("env/python/wheels/ad2kit-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(scratch / "code")
    return Bento(tag, folder, scratch / "code")


def main() -> None:
    """Make the attacks; see the module."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("tag")
    parser.add_argument("--json", type=Path, help="write what came there")
    parser.add_argument("--compare", type=Path, help="what an earlier run has written")
    parser.add_argument("--only", nargs="*", default=[""], help="words of the attacks to make")
    options = parser.parse_args()
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, min(hard, 2**13)), hard))
    before = read(options.compare) if options.compare else []
    outcomes = []
    with (
        tempfile.TemporaryDirectory(prefix="ad2kit-attack-") as temporary,
        ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as attackers,
    ):
        scratch = Path(temporary)
        try:
            bento = opened(options.tag, scratch)
        except bentoml.exceptions.NotFound as error:
            parser.error(str(error))
        trials: dict[str, Callable[[], Outcome]] = {
            name: partial(loaded, bento, name, attackers) for name in ATTACKS
        }
        trials |= {f"keys: {way.name}": partial(locked, bento, way) for way in ways(scratch)}
        trials |= {name: partial(trial, bento, name) for name, trial in RESTARTS.items()}
        try:
            with bento.served():
                print(f"{bento.tag} serves; now the attacks", flush=True)
        except RuntimeError as error:
            sys.exit(f"{bento.tag} does not serve at all: {error}")
        chosen = [name for name in trials if any(word in name for word in options.only)]
        if not chosen:
            parser.error(f"no attack has any of {options.only} in its name: {', '.join(trials)}")
        for name in chosen:
            try:
                outcome = trials[name]()
            except BrokenExecutor:
                raise  # ours, and not the service's
            except (RuntimeError, OSError) as error:
                outcome = Outcome(name, broken=[f"does not serve ({cause(str(error))})"])
            outcomes.append(outcome)
            print(" | ".join(cells(outcome)), flush=True)
    print(f"\n{table(outcomes, before)}\n")
    facts = {
        "tag": options.tag,
        "outcomes": [asdict(outcome) for outcome in outcomes],
        "environment": environment(1),
    }
    if options.json is not None:
        options.json.write_text(json.dumps(facts, indent=1) + "\n")
    broken = [outcome.name for outcome in outcomes if outcome.broken]
    print(f"broken: {len(broken)} of {len(outcomes)}")
    sys.exit(1 if broken else 0)


if __name__ == "__main__":
    main()
