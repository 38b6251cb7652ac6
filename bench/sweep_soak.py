"""Kill workers and the driver of a sweep, and compare the end with that of a sweep left alone.

    python bench/sweep_soak.py [--workers 2] [--seed 0] [--rows 400] [--epochs 8]

Eight tiny trials (two batch sizes, two learning rates, two seeds) are trained three times, by real
`ad2kit sweep` commands on a local Ray. The first sweep is left alone. Of the second some workers
are killed (SIGKILL) at random moments of their training; it has to end complete by itself. Of the
third the driver is killed once half of the trials have finished, and the same command is given
again: it has to end complete without touching what had finished. Every student must have the same
weights bit for bit in all three. Ends with a line of JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil

from ad2kit.campaigns.sweep.report import SweepReport, Trial
from ad2kit.run.folder import RunDir

TRIALS = 8
SPACE = ("sweep.batch_sizes=[16,32]", "sweep.lrs=[1e-3,3e-3]", "sweep.seeds=2")


class Sweep:
    """One `ad2kit sweep` under way; its output goes to a file beside its runs."""

    def __init__(self, runs_dir: Path, overrides: tuple[str, ...]) -> None:
        self.runs_dir = runs_dir
        self.log = runs_dir.with_suffix(".log").open("a")
        command = [sys.executable, "-m", "ad2kit", "sweep", "smoke", *SPACE, *overrides]
        self.process = subprocess.Popen(
            [*command, "--runs-dir", str(runs_dir)], stdout=self.log, stderr=self.log
        )

    def states(self) -> dict[str, str]:
        """Return the state of each run that has begun."""
        found: dict[str, str] = {}
        for ledger in self.runs_dir.glob("sweep-*/trials.jsonl"):
            for line in ledger.read_text().splitlines(keepends=True):
                if line.endswith("\n"):
                    trial = Trial.model_validate_json(line)
                    found[trial.run] = trial.state
        return found

    def finished(self) -> list[str]:
        """Return the runs whose students are finished."""
        return [run for run, state in self.states().items() if state == "finished"]

    def workers(self) -> list[psutil.Process]:
        """Return the processes of its trials."""
        found = []
        for child in psutil.Process(self.process.pid).children(recursive=True):
            try:
                if "ImplicitFunc" in " ".join(child.cmdline()):
                    found.append(child)
            except psutil.Error:  # it has just ended
                continue
        return found

    def wait(self) -> None:
        """Wait for its end, which has to be a good one."""
        if code := self.process.wait():
            sys.exit(f"the sweep in {self.runs_dir} ended with {code}; see {self.log.name}")


def kill_workers(sweep: Sweep, kills: int, generator: random.Random) -> int:
    """Kill workers at random moments while they train; return how many were hit."""
    landed = 0
    while sweep.process.poll() is None and landed < kills:
        unfinished = len(sweep.states()) > len(sweep.finished())
        workers = sweep.workers()
        if unfinished and workers and list(sweep.runs_dir.glob("*/checkpoint")):
            time.sleep(generator.uniform(0, 1))
            victim = generator.choice(workers)
            if victim.is_running():
                victim.kill()
                landed += 1
                print(f"  killed worker {victim.pid}; {len(sweep.finished())} finished", flush=True)
                time.sleep(5)
        time.sleep(0.05)
    return landed


def kill_driver(sweep: Sweep) -> dict[str, int]:
    """Kill the driver half-way; return the times of the training curves that had ended."""
    while sweep.process.poll() is None and len(sweep.finished()) < TRIALS // 2:
        time.sleep(0.05)
    os.kill(sweep.process.pid, signal.SIGKILL)
    sweep.process.wait()
    finished = sweep.finished()
    print(f"  killed the driver with {len(finished)} of {TRIALS} finished", flush=True)
    return curve_times(sweep.runs_dir, finished)


def curve_times(runs_dir: Path, runs: list[str]) -> dict[str, int]:
    """Return when the training curve of each run was last written to."""
    return {run: RunDir(runs_dir / run).curve("student").stat().st_mtime_ns for run in runs}


def outcome(runs_dir: Path) -> dict[str, object]:
    """Return what must be the same after any interruption."""
    (path,) = runs_dir.glob("sweep-*/sweep.json")
    report = SweepReport.read(path)
    runs = sorted(trial.run for trial in report.trials if trial.state == "finished")
    students = {run: RunDir(runs_dir / run).student / "sha256.json" for run in runs}
    return {
        "students": {run: json.loads(file.read_text())["files"] for run, file in students.items()},
        "selected": str(report.selected),
        "scores": report.score.model_dump(),
        "half_written": [path.name for path in runs_dir.rglob(".tmp-*")],
    }


def main() -> None:
    """Compare killed sweeps with one that was left alone; exit code 1 if they differ."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workers", type=int, default=2, help="how many workers to kill")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rows", type=int, default=400)
    parser.add_argument("--epochs", type=int, default=8)
    options = parser.parse_args()
    overrides = (
        f"data.max_train_rows={options.rows}",
        f"distill.epochs={options.epochs}",
        "teacher.finetune.epochs=1",
        "distill.checkpoint_every_steps=5",
    )
    generator = random.Random(options.seed)  # noqa: S311  (no secret)
    with tempfile.TemporaryDirectory(prefix="ad2kit-sweep-soak-") as temporary:
        alone, workers, driver = (Path(temporary) / n for n in ("alone", "workers", "driver"))
        start = time.monotonic()
        Sweep(alone, overrides).wait()
        print(f"alone: {time.monotonic() - start:.0f} s", flush=True)
        sweep = Sweep(workers, overrides)
        landed = kill_workers(sweep, options.workers, generator)
        sweep.wait()
        print(f"workers: {landed} killed, ended by itself", flush=True)
        before = kill_driver(Sweep(driver, overrides))
        Sweep(driver, overrides).wait()
        repeated = [r for r, t in before.items() if curve_times(driver, [r])[r] != t]
        expected, *found = (outcome(folder) for folder in (alone, workers, driver))
    students = expected["students"]
    assert isinstance(students, dict)
    complete = len(students) == TRIALS
    same = all(each == expected for each in found) and not expected["half_written"]
    print("identical" if same else f"different:\n  {expected}\n  {found}")
    result = {
        "trials": len(students),
        "workers_killed": landed,
        "finished_before_kill": len(before),
        "repeated": len(repeated),
        "identical": same,
    }
    print(json.dumps(result))
    sys.exit(0 if same and complete and landed == options.workers and not repeated else 1)


if __name__ == "__main__":
    main()
