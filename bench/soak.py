"""Kill -9 the whole chain at random moments, start it again each time, and compare the end.

    python bench/soak.py [--kills 12] [--seed 0] [--recipe smoke]

A straight run is made first. Then `ad2kit run` of the same recipe is killed (its whole process
group, so also a build or a service under way) a random moment after a stage left its first trace,
so that every stage is hit, and started again each time. It must end with the same weights bit for
bit, the same verdict, the same Bento tag, and nothing half-written. Ends with a line of JSON.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from ad2kit.gate.records import BentoRecord, ParityReport
from ad2kit.run.files import sha256_of
from ad2kit.run.folder import RunDir

# The first traces of the stages, in the order of the chain.
MARKERS = (
    "recipe.json",
    "teacher-training.jsonl",
    "teacher-checkpoint",
    "teacher",
    "teacher.json",
    "training.jsonl",
    "checkpoint",
    "student",
    "onnx/fp32",
    "onnx/int8",
    "parity.json",
    "latency.json",
)


def command(recipe: str, runs_dir: Path) -> list[str]:
    """Return the command line of the chain."""
    return [sys.executable, "-m", "ad2kit", "run", recipe, "--runs-dir", str(runs_dir)]


def outcome(runs_dir: Path) -> dict[str, object]:
    """Return what must be the same after any interruption."""
    (folder,) = runs_dir.iterdir()
    run = RunDir(folder)
    parity = ParityReport.read(run.parity_report)
    return {
        "teacher": sha256_of(run.teacher / "model.safetensors"),
        "student": sha256_of(run.student / "model.safetensors"),
        "graphs": [sha256_of(run.onnx(v.variant) / "model.onnx") for v in parity.variants],
        "scores": [v.score for v in parity.variants],
        "passed": parity.passed,
        "tag": BentoRecord.read(run.bento_record).tag,
        "half_written": [path.name for path in folder.rglob(".tmp-*")],
    }


def chain(recipe: str, folder: Path) -> subprocess.Popen[bytes]:
    """Start the chain in a process group of its own."""
    return subprocess.Popen(
        command(recipe, folder / "runs"),
        env={**os.environ, "BENTOML_HOME": str(folder / "bentoml")},
        start_new_session=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )


def kill(recipe: str, folder: Path, marker: str, delay_s: float) -> bool:
    """Kill the chain ``delay_s`` after ``marker`` is there; tell whether it was still running."""
    process = chain(recipe, folder)
    while process.poll() is None and not list(folder.glob(f"runs/*/{marker}")):
        time.sleep(0.01)
    time.sleep(delay_s)
    running = process.poll() is None
    if running:
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    print(f"  {'killed' if running else 'had ended'} {delay_s:.2f} s after {marker}", flush=True)
    return running


def main() -> None:
    """Compare a killed chain with a straight one; exit code 1 if they differ."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=len(MARKERS))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--recipe", default="smoke")
    options = parser.parse_args()
    generator = random.Random(options.seed)  # noqa: S311  (no secret)
    every = generator.sample(range(len(MARKERS)), len(MARKERS))
    markers = sorted(itertools.islice(itertools.cycle(every), options.kills))
    with tempfile.TemporaryDirectory(prefix="ad2kit-soak-") as temporary:
        straight, killed = Path(temporary) / "straight", Path(temporary) / "killed"
        for folder in (straight, killed):
            folder.mkdir()
        landed = 0
        for marker in markers:
            landed += kill(options.recipe, killed, MARKERS[marker], generator.uniform(0, 2))
        for folder in (killed, straight):
            if code := chain(options.recipe, folder).wait():
                sys.exit(f"the chain in {folder} ended with exit code {code}")
        found, expected = outcome(killed / "runs"), outcome(straight / "runs")
    same = found == expected and not found["half_written"]
    print("identical" if same else f"different:\n  {expected}\n  {found}")
    print(json.dumps({"recipe": options.recipe, "kills": landed, "identical": same}))
    sys.exit(0 if same else 1)


if __name__ == "__main__":
    main()
