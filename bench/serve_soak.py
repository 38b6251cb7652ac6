"""What does a service do over hours: its answers, its losses, its memory?

    python -m bench.serve_soak runs/demo-FINGERPRINT --hours 2 --plot memory.svg

A checkout's service offers the run's variant and, by a link, a second model. Clients keep it busy
at a share of its capacity, with another mix of sizes and lengths each minute. Meanwhile a worker
is killed every five minutes, the keys are changed, the link leads to another artefact, a client
sends its request byte by byte, and another one sends a text of a megabyte. Each answer is compared
with that of the artefact to the text alone. Prints a line a minute. Ends with JSON, and with exit
code 1 if an answer was wrong, if a request was lost though no worker was killed in its minute, or
if the memory of a worker grew by more than 5 % after the first ten minutes.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import random
import statistics
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ad2kit.data.splits import load_data
from ad2kit.exporting.classifier import OnnxClassifier
from ad2kit.packaging.bento import served
from ad2kit.run.folder import RunDir
from ad2kit.run.machine import environment
from ad2kit.tables.texts import text_of
from bench.load import Load, Request, closed_loop, connect, open_loop
from bench.overload import BROKEN, family

if TYPE_CHECKING:
    from collections.abc import Callable

CHECKOUT = Path(__file__).parents[1]
MINUTE_S = 60.0
SIZES = (1, 1, 1, 2, 7, 32)
KEY, OLD_KEY, NEW_KEY = ("0123456789abcdef" + kind for kind in ("a", "b", "c"))
# Answers to a text alone and in company may differ by this probability.
GAP = 1e-3
SETTLED_MINUTES = 10


def request(path: str, body: bytes, is_right: Callable[[bytes], bool], key: str = KEY) -> Request:
    """Return a POST of JSON with a key."""
    head = (
        f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        f"Authorization: Bearer {key}\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    return Request(head.encode() + body, is_right)


def says(rows: list[int], known: dict[str, list[Any]]) -> Callable[[bytes], bool]:
    """Return what tells whether a body says what one of the artefacts says of each text alone.

    Args:
        rows: which texts were sent.
        known: the answers to all texts, by the artefact that may give them.
    """

    def is_right(body: bytes) -> bool:
        answers = json.loads(body)["predictions"]
        return len(answers) == len(rows) and any(
            all(
                answer["label"] == every[row].label
                and abs(answer["score"] - every[row].score) <= GAP
                for answer, row in zip(answers, rows, strict=True)
            )
            for every in known.values()
        )

    return is_right


def mix(texts: list[Any], known: dict[str, list[Any]], path: str, seed: int) -> list[Request]:
    """Return requests of many sizes to a path.

    Args:
        texts: the texts.
        known: the answers to all of them, by the artefact that may give them.
        path: the path to ask.
        seed: which mix.
    """
    source, found = random.Random(seed), list[Request]()  # noqa: S311
    for _ in range(400):
        rows = source.sample(range(len(texts)), source.choice(SIZES))
        body = json.dumps({"texts": [texts[row] for row in rows]}).encode()
        found.append(request(path, body, says(rows, known)))
    return found


@dataclass
class Soak:
    """A service under load, and what came of it.

    Attributes:
        port: the port of the service.
        folder: where the link and the file of keys lie.
        artefacts: the artefacts that the link leads to, in turn.
        memory: resident MB of the largest worker, by minutes since the start.
        lost: broken connections in minutes with a kill.
        errors: all other errors.
        events: how often each event came.
        faults: what must not be.
    """

    port: int
    folder: Path
    artefacts: list[Path]
    answered: int = 0
    memory: list[tuple[float, float]] = field(default_factory=list)
    lost: int = 0
    errors: Counter[str] = field(default_factory=Counter)
    events: Counter[str] = field(default_factory=Counter)
    faults: list[str] = field(default_factory=list)

    async def watch_memory(self, start: float) -> None:
        """Take the memory of the workers down, every ten seconds."""
        while True:
            await asyncio.sleep(10.0)
            workers = (await asyncio.to_thread(family, self.port))[1]
            with contextlib.suppress(ValueError):  # all of them have just ended
                largest = max(worker.memory_info().rss for worker in workers)
                self.memory.append(((time.monotonic() - start) / 60, largest / 1e6))

    async def kill_a_worker(self) -> None:
        """Kill -9 the older worker."""
        workers = (await asyncio.to_thread(family, self.port))[1]
        min(workers, key=lambda worker: worker.create_time()).kill()

    async def change_keys(self) -> None:
        """Add a key and take another one away; the key of the load stays."""
        old, new = (OLD_KEY, NEW_KEY) if self.events["keys changed"] % 2 else (NEW_KEY, OLD_KEY)
        (self.folder / "keys").write_text(f"{KEY}\n{new}\n")
        await asyncio.sleep(5.0)
        for key, wanted in ((new, 200), (old, 401)):
            status = await self.ask(request("/classify", b'{"texts": ["fine"]}', bool, key))
            if status != wanted:
                self.faults.append(f"a key was answered {status}, expected {wanted}")

    async def exchange_models(self) -> None:
        """Let the link lead to the other artefact."""
        target = self.artefacts[self.events["models exchanged"] % len(self.artefacts)]
        (self.folder / "new").symlink_to(target)
        (self.folder / "new").replace(self.folder / "link")

    async def send_slowly(self) -> None:
        """Send a request byte by byte, for some seconds, and go away."""
        link = await connect(self.port)
        for byte in request("/classify", b'{"texts": ["fine"]}', bool).content[:100]:
            if link.transport.is_closing():
                return
            link.transport.write(bytes([byte]))
            await asyncio.sleep(0.2)
        link.transport.abort()

    async def send_a_megabyte(self) -> None:
        """Send a text of a megabyte, which is cut."""
        status = await self.ask(
            request("/classify", json.dumps({"texts": ["film " * 200_000]}).encode(), bool)
        )
        if status not in (200, 429):
            self.faults.append(f"a text of a megabyte was answered {status}")

    async def ask(self, sent: Request) -> int:
        """Ask once on a connection of its own; return the status."""
        link = await connect(self.port)
        try:
            return (await asyncio.wait_for(link.ask(sent.content), 30))[0]
        finally:
            link.transport.close()

    async def minute(self, number: int, sent: list[Request], per_s: float) -> Load:
        """Keep the service busy for a minute, and let happen what is due."""
        due = {"a slow client": self.send_slowly, "a megabyte": self.send_a_megabyte}
        is_killing = number % 5 == 4
        if is_killing:
            due = {"workers killed": self.kill_a_worker}
        if number % 3 == 1:
            due["keys changed"] = self.change_keys
        if number % 3 == 2:
            due["models exchanged"] = self.exchange_models
        load = asyncio.create_task(open_loop(self.port, sent, per_s, MINUTE_S, 128))
        await asyncio.sleep(10.0)
        for name, act in due.items():
            await act()
            self.events[name] += 1
        found = await load
        self.answered += len(found.ms)
        for error, count in found.errors.items():
            if is_killing and error in BROKEN:
                self.lost += count
            else:
                self.errors[error] += count
        return found

    def growth(self) -> float:
        """Return the memory of the last ten minutes over that of the ten after the first ten."""
        end = self.memory[-1][0]
        early = [mb for at, mb in self.memory if SETTLED_MINUTES <= at < 2 * SETTLED_MINUTES]
        late = [mb for at, mb in self.memory if at >= end - SETTLED_MINUTES]
        return statistics.median(late) / statistics.median(early or late)


async def soak(of: Soak, mixes: Callable[[int], list[Request]], options: Any) -> dict[str, Any]:
    """Find the capacity, and then stay below it for hours."""
    capacity = (await closed_loop(of.port, mixes(0), 64, 15.0)).per_s
    start = time.monotonic()
    watcher = asyncio.create_task(of.watch_memory(start))
    number = 0
    while time.monotonic() < start + 3600 * options.hours:
        load = await of.minute(number, mixes(number), options.share * capacity)
        number += 1
        print(
            f"minute {number}: {len(load.ms):,} requests, p99 {load.quantile(0.99):.0f} ms, "
            f"{dict(load.errors)}, {of.memory[-1][1]:.0f} MB",
            flush=True,
        )
    watcher.cancel()
    return {
        "hours": options.hours,
        "requests_per_s": options.share * capacity,
        "answered": of.answered,
        "lost_with_workers": of.lost,
        "errors": dict(of.errors),
        "events": dict(of.events),
        "memory_growth": of.growth(),
        "memory_mb": [round(mb) for _, mb in of.memory[:: max(1, len(of.memory) // 60)]],
    }


def draw(memory: list[tuple[float, float]], path: Path) -> None:
    """Draw the memory of the largest worker over time."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 3), layout="constrained")
    axes = figure.subplots()
    axes.plot(*zip(*memory, strict=True), linewidth=1)
    axes.set(xlabel="minutes", ylabel="MB of the largest worker", ylim=(0, None))
    figure.savefig(path)


def main() -> None:
    """Serve, soak, and say what came of it."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("--hours", type=float, default=2.0)
    parser.add_argument("--share", type=float, default=0.8, help="of the capacity")
    parser.add_argument("--variant", default="steady")
    parser.add_argument("--plot", type=Path)
    options = parser.parse_args()
    run = RunDir(options.run)
    validation = load_data(run.recipe.data, run.recipe.seed, run.shared).validation
    texts: list[Any] = [text_of(row) for row in validation.texts]
    if len(run.recipe.data.text_columns) == 1:  # and some that are longer
        texts += [" ".join(texts[row : row + 8]) for row in range(0, len(texts) - 8, 16)]
    artefacts = [run.onnx("fp32").resolve(), run.onnx("fused").resolve()]
    known = {
        folder.name: OnnxClassifier(folder, threads=1).predict(texts, batch_size=1)
        for folder in (run.onnx(options.variant), *artefacts)
    }
    own = {options.variant: known[options.variant]}
    others = {folder.name: known[folder.name] for folder in artefacts}

    def mixes(minute: int) -> list[Request]:
        sent = mix(texts, own, "/classify", minute) + mix(texts, others, "/classify/other", minute)
        random.Random(minute).shuffle(sent)  # noqa: S311
        return sent

    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        (folder / "keys").write_text(f"{KEY}\n{NEW_KEY}\n")
        (folder / "link").symlink_to(artefacts[1])
        settings = {
            "AD2KIT_MODEL": str(run.onnx(options.variant).resolve()),
            "AD2KIT_MODELS": f"other={folder}/link",
            "AD2KIT_API_KEYS_FILE": str(folder / "keys"),
        }
        with served(CHECKOUT, folder, environment=os.environ | settings) as address:
            of = Soak(int(address.rpartition(":")[2]), folder, artefacts)
            facts = asyncio.run(soak(of, mixes, options))
    faults = of.faults + [
        f"{count} x {error}" for error, count in of.errors.items() if error != "429"
    ]
    if options.hours * 60 > 2 * SETTLED_MINUTES and facts["memory_growth"] > 1.05:
        faults.append(f"the memory grew to {facts['memory_growth']:.2f} times")
    if options.plot:
        draw(of.memory, options.plot)
    print("; ".join(faults) or "all as it should be")
    print(json.dumps({**facts, "faults": faults, "environment": environment(threads=1)}))
    sys.exit(1 if faults else 0)


if __name__ == "__main__":
    main()
