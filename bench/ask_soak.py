"""Kill -9 `ad2kit ask` at random moments, go on each time, and count what the server was asked.

    python bench/ask_soak.py [--rows 5000] [--kills 3] [--concurrency 8] [--seed 0]

The server is bench/language_model.py with a bag of words that was trained on the demo's reviews. It
fails one request in fifty. Every twentieth row repeats an earlier text, and each text is drawn
twice. The end must have the same bytes as a job that nobody disturbed; a text and draw may be asked
again only if it was in flight at a kill, or failed. Ends with a line of JSON.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

import yaml
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression

from ad2kit.asking.journal import NAME
from ad2kit.asking.records import AskReport
from ad2kit.data.demo_reviews import LABELS, opinions
from ad2kit.run.recipe import recipes_folder

sys.path.insert(0, str(Path(__file__).parents[1]))
from bench.language_model import LanguageModel, served

if TYPE_CHECKING:
    from collections.abc import Callable

_DRAWS = 2
_ASK = {
    "prompt": "Is the review negative or positive?\n{labels}",
    "text": "{text}",
    "answer": "samples",
    "samples": _DRAWS,
}


def bag_of_words() -> Callable[[str], dict[str, float]]:
    """Train a classifier on the demo's reviews; return its log-probabilities for a text."""
    train = opinions(seed=7).train
    vectorizer = TfidfVectorizer(ngram_range=(1, 2))
    words = vectorizer.fit_transform([text for text, _ in train])
    model = LogisticRegression(max_iter=1000).fit(words, [label for _, label in train])

    def log_probabilities(text: str) -> dict[str, float]:
        logs = model.predict_log_proba(vectorizer.transform([text]))[0]
        return dict(zip(LABELS, map(float, logs), strict=True))

    return log_probabilities


def write_job(folder: Path, rows: int) -> tuple[Path, Path]:
    """Write a recipe and a table; every twentieth row repeats an earlier text."""
    plain = yaml.safe_load((recipes_folder() / "smoke.yaml").read_text())
    plain["data"]["labels"] = list(LABELS)
    recipe, table = folder / "recipe.yaml", folder / "texts.csv"
    recipe.write_text(yaml.safe_dump(plain | {"ask": _ASK}))
    texts = [text for text, _ in opinions(seed=3, train_rows=rows).train]
    for number in range(20, rows, 20):
        texts[number] = texts[number // 2]
    with table.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([["text"], *([text] for text in texts)])
    return recipe, table


def kill(command: list[str], journal: Path, answers: int) -> None:
    """Start a job, and kill it once its journal holds so many answers."""
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while process.poll() is None:
        if journal.is_file() and journal.read_bytes().count(b'{"got"') >= answers:
            break
        time.sleep(0.02)
    process.kill()
    assert process.wait() < 0, "it ended before it was killed"


def main() -> None:
    """Ask with kills and without, and compare."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=5_000)
    parser.add_argument("--kills", type=int, default=3)
    parser.add_argument("--concurrency", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    chance = random.Random(options.seed)  # noqa: S311
    model = LanguageModel(
        bag_of_words(), fault=lambda number, _: "500" if number % 50 == 7 else "", delay_s=0.005
    )
    with tempfile.TemporaryDirectory() as name, served(model) as url:
        folder = Path(name)
        recipe, table = write_job(folder, options.rows)
        arguments = [str(recipe), str(table), "--base-url", url, "--model", "words"]
        ask = [sys.executable, "-m", "ad2kit", "ask", *arguments]
        ask += ["--concurrency", str(options.concurrency)]
        output = folder / "killed"
        most = math.floor(options.rows * _DRAWS * 0.9)
        for answers in sorted(chance.sample(range(most), options.kills)):
            kill([*ask[:6], str(output), *ask[6:]], output / NAME, answers)
        subprocess.run([*ask[:6], str(output), *ask[6:]], check=True)
        report = AskReport.read(output / AskReport.file_name)
        asked, distinct = model.asked.total(), len(model.asked)
        straight = folder / "straight"
        subprocess.run([*ask[:6], str(straight), *ask[6:]], check=True)
        same = {p.name: p.read_bytes() for p in output.glob("part-*")} == {
            p.name: p.read_bytes() for p in straight.glob("part-*")
        }
    failures = sum(report.failures.values())
    repeated = asked - distinct - failures
    outcome = {
        "rows": report.rows,
        "answered_rows": report.answered_rows,
        "texts_and_draws": distinct,
        "requests": asked,
        "failed_and_tried_again": failures,
        "asked_again_after_kills": repeated,
        "counted_as_lost": report.lost,
        "kills": options.kills,
        "concurrency": options.concurrency,
        "same_bytes": same,
    }
    print(json.dumps(outcome))
    within = 0 <= repeated <= report.lost <= options.kills * options.concurrency
    sys.exit(not (same and within and report.answered_rows == report.rows))


if __name__ == "__main__":
    main()
