"""What many training texts cost: memory, the time before the first update, and room on the disk.

    python bench/data.py --rows 10000000 --processes 1 2

A table of short texts that nobody wrote, each about 17 tokens. Its recipe is checked and trained
until 100 updates of the teacher are done, by one process and by several beside each other. Each
process is watched: `RssAnon` is its own memory, `RssFile` are pages of files, which processes share
and the system takes back. `start` are the seconds before the first update. The check reads the
tables, and the first training tokenises them; the other trainings find both in the cache.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import psutil

UPDATES = 100
_VALIDATION_ROWS = 2_000
_BLOCK_ROWS = 100_000
_WATCH_SECONDS = 0.1
_MEMORY = re.compile(r"Rss(Anon|File):\s+(\d+) kB")
_NOTES = re.compile(r"tokenised .*")
_NOUNS = [
    "film",
    "plot",
    "cast",
    "score",
    "scene",
    "story",
    "ending",
    "script",
    "pace",
    "camera",
    "humour",
    "dialogue",
]
_ADJECTIVES = (
    ("superb", "warm", "clever", "moving", "fresh", "bold", "lovely", "sharp"),
    ("dull", "clumsy", "stale", "tedious", "cold", "lazy", "weak", "hollow"),
)
_ADVERBS = [
    "quite",
    "very",
    "rather",
    "truly",
    "almost",
    "always",
    "never",
    "hardly",
    "often",
    "simply",
]


@dataclass
class Watched:
    """What was seen of a command: seconds, and the largest memory of its processes in bytes."""

    seconds: float = 0.0
    start_seconds: float = 0.0
    anonymous: dict[int, int] = field(default_factory=dict)
    files: dict[int, int] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def look(self, process: psutil.Process) -> None:
        """Note the memory of a process and of those that it started."""
        for each in (process, *process.children(recursive=True)):
            try:
                status = Path(f"/proc/{each.pid}/status").read_text(encoding="ascii")
            except (FileNotFoundError, ProcessLookupError):
                continue  # it has ended
            for kind, kilobytes in _MEMORY.findall(status):
                peaks = self.anonymous if kind == "Anon" else self.files
                peaks[each.pid] = max(peaks.get(each.pid, 0), 1024 * int(kilobytes))

    def row(self, what: str) -> dict[str, object]:
        """Return a line of the table."""
        return {
            "what": what,
            "seconds": round(self.seconds, 1),
            "start_seconds": round(self.start_seconds, 1),
            "rss_anon_gb": round(max(self.anonymous.values()) / 1e9, 3),
            "rss_file_gb": round(max(self.files.values()) / 1e9, 3),
            "notes": self.notes,
        }


def make_table(path: Path, rows: int, seed: int) -> None:
    """Write so many texts and labels as TSV."""
    generator = np.random.default_rng(seed)
    with path.open("w", encoding="utf-8") as stream:
        stream.write("text\tlabel\n")
        for start in range(0, rows, _BLOCK_ROWS):
            count = min(_BLOCK_ROWS, rows - start)
            labels = generator.integers(0, 2, count)
            words = generator.integers(0, 8, (count, 5))
            nouns = generator.integers(0, len(_NOUNS), (count, 3))
            for row, label in enumerate(labels):
                adjectives = _ADJECTIVES[label]
                a, b, c, d, e = words[row]
                x, y, z = (_NOUNS[noun] for noun in nouns[row])
                stream.write(
                    f"the {x} is {_ADVERBS[a]} {adjectives[b]} , the {y} {_ADVERBS[c]} "
                    f"{adjectives[d]} , a {adjectives[e]} {z} no {start + row}\t{label}\n"
                )


def watch(command: list[str], runs: Path, updates: int = 0) -> Watched:
    """Run a command to its end, or until its run has so many updates; watch its memory."""
    found = Watched()
    begin = time.perf_counter()
    with tempfile.TemporaryFile() as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)
        watched = psutil.Process(process.pid)
        done = 0
        while process.poll() is None:
            found.look(watched)
            for curve in runs.glob("demo-*/teacher-training.jsonl"):
                done = curve.read_bytes().count(b"\n")
                found.start_seconds = found.start_seconds or time.perf_counter() - begin
            if updates and done >= updates:
                process.send_signal(signal.SIGINT)
                process.wait()
            time.sleep(_WATCH_SECONDS)
        found.seconds = time.perf_counter() - begin
        output.seek(0)
        words = output.read().decode()
        if done < updates or (not updates and process.returncode):
            sys.exit(words)
        found.notes = _NOTES.findall(words)
    return found


def size_on_disk(folder: Path) -> int:
    """Return the bytes of all files in a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def main() -> None:
    """Measure, and print a line for each command and one of JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--folder", type=Path, help="keeps the table and the runs; default: none")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        measure(folder, arguments.rows, arguments.processes)


def measure(folder: Path, rows: int, processes: list[int]) -> None:
    """Make the table, and check and train on it."""
    make_table(folder / "train.tsv", rows, 0)
    make_table(folder / "validation.tsv", _VALIDATION_ROWS, 1)
    runs = folder / "runs"
    shutil.rmtree(runs, ignore_errors=True)
    settings = [
        "demo",
        f"data.source={folder}",
        "data.max_leakage=1",
        "teacher.finetune.epochs=1",
        "teacher.finetune.checkpoint_every_steps=1000000",
        "compute.threads=1",
        "--runs-dir",
        str(runs),
    ]
    ad2kit = [sys.executable, "-m", "ad2kit"]
    results = [watch([*ad2kit, "check", *settings], runs).row("check")]
    print(results[-1], flush=True)
    for number, count in enumerate(processes):
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        launcher += ["--local-addr=127.0.0.1", f"--nproc-per-node={count}", "-m", "ad2kit"]
        for which in ("from the tables", "from the cache")[min(number, 1) :]:
            for run in runs.glob("demo-*"):
                shutil.rmtree(run)
            command = [*(launcher if count > 1 else ad2kit), "distill", *settings]
            found = watch(command, runs, UPDATES)
            results.append(found.row(f"distill, {count} processes, {which}"))
            print(results[-1], flush=True)
    shared = runs / ".shared"
    summary = {
        "rows": rows,
        "cores": len(os.sched_getaffinity(0)),
        "table_gb": round((folder / "train.tsv").stat().st_size / 1e9, 3),
        "cached_tables_gb": round(size_on_disk(shared / "tables") / 1e9, 3),
        "cached_tokens_gb": round(size_on_disk(shared / "tokens") / 1e9, 3),
        "results": results,
    }
    print(json.dumps(summary))


if __name__ == "__main__":
    main()
