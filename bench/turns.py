"""Which of several services answers more? All of them run, and are asked in short turns.

    (cd BEFORE && bentoml serve . --port 3001 &)
    (cd AFTER && bentoml serve . --port 3002 &)
    python -m bench.turns before=3001 after=3002 --run runs/demo-FINGERPRINT --variant int8

The speed of a shared machine changes by a fifth within a minute, so that one long measurement after
the other finds differences that are not there. Here a turn takes about a second, and every second
round goes backwards. Printed are right answers per second over those of the first service: the
geometric mean of the rounds, and two standard errors. All must serve the artefact of the run; give
each the same number of workers and threads. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np

from ad2kit.run.folder import RunDir
from ad2kit.run.machine import environment
from bench.load import closed_loop
from bench.serve import OURS, drive, requests, sure_texts


def ratio(values: list[float], base: list[float]) -> tuple[float, float, float]:
    """Return the geometric mean of ratios, and its interval of two standard errors."""
    logs = np.log(np.array(values) / np.array(base))
    error = 2 * logs.std(ddof=1) / len(logs) ** 0.5
    middle, low, high = np.exp([logs.mean(), logs.mean() - error, logs.mean() + error])
    return float(middle), float(low), float(high)


def main() -> None:
    """Ask in turns, and print the ratios."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("services", nargs="+", metavar="NAME=PORT")
    parser.add_argument("--run", type=Path, required=True)
    parser.add_argument("--variant", default="int8")
    parser.add_argument("--connections", type=int, nargs="+", default=[1, 32, 128])
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--seconds", type=float, default=1.2, help="of a turn")
    options = parser.parse_args()
    if options.rounds < 2:
        parser.error("--rounds: expected at least 2, for a standard error")
    ports = {
        name: int(port) for name, _, port in (each.partition("=") for each in options.services)
    }
    run = RunDir(options.run)
    sent = requests(OURS, *sure_texts(run, run.onnx(options.variant)))
    facts = []
    for port in ports.values():
        drive(closed_loop(port, sent, 32, 2.0))
    for connections in options.connections:
        rates = {name: list[float]() for name in ports}
        for turn in range(options.rounds):
            for name, port in list(ports.items())[:: -1 if turn % 2 else 1]:
                load = drive(closed_loop(port, sent, connections, options.seconds))
                rates[name].append(load.per_s)
        base = next(iter(rates.values()))
        for name, found in rates.items():
            over, low, high = ratio(found, base)
            facts.append(
                {
                    "connections": connections,
                    "service": name,
                    "per_s": np.mean(found),
                    "ratio": over,
                    "interval": [low, high],
                }
            )
            print(
                f"{connections:>4} connections  {name:<12}{np.mean(found):>7.0f}/s  "
                f"{over:.3f} [{low:.3f}, {high:.3f}]",
                flush=True,
            )
    print(json.dumps({"ratios": facts, "environment": environment(1)}))


if __name__ == "__main__":
    main()
