"""How much does the adversary matter, and at which radius?

    python bench/radius.py sst2-minilm data.source=FOLDER data.max_train_rows=2000

One teacher, and students of the same recipe and seed that differ in the adversary alone: plain
distillation, then six decades of the radius in both norms with one ascent step from zero, then
two and three steps at the radius that is best on rows that no training has seen. `levers.py` says
what the columns mean.
"""

from __future__ import annotations

import argparse
import json

import numpy as np

from bench.levers import set_up

RADII = {
    "linf": (1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1),
    "l2": (1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0),
}


def attack(norm: str, radius: float, steps: int = 1) -> tuple[str, ...]:
    """Return settings that reach the border of the ball, with half a ball to spare for turns."""
    step_size = radius if steps == 1 else 1.5 * radius / steps
    settings = {"norm": norm, "radius": radius, "step_size": step_size, "steps": steps}
    return tuple(f"distill.adversary.{key}={value}" for key, value in settings.items())


def main() -> None:
    """Sweep, and print a row for each student and a last line of JSON."""
    bench, seeds, _ = set_up(argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0]))
    rows = [bench.student(seed, "distill.alpha=0") for seed in seeds]
    balls = [(norm, radius) for norm, radii in RADII.items() for radius in radii]
    found = {ball: [bench.student(seed, *attack(*ball)) for seed in seeds] for ball in balls}
    best = max(balls, key=lambda ball: np.mean([row["unseen"] for row in found[ball]]))
    rows += [row for each in found.values() for row in each]
    rows += [bench.student(s, *attack(*best, steps)) for steps in (2, 3) for s in seeds]
    print(json.dumps({"unseen_rows": len(bench.unseen), "rows": rows}))


if __name__ == "__main__":
    main()
