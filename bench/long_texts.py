"""Long texts whose evidence stands at the end: windows beside cutting, from training to HTTP.

    python -m bench.long_texts custom --tokens 600 1900 teacher.model=runs/demo-X/teacher ...

Each text is a row of facts from the embedded grammar, which say nothing about its label, and then
one opinion, which decides it. For each way to read them a teacher is fine-tuned, a student is
distilled, exported and judged, and the fp32 variant is asked over HTTP.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from rich.console import Console

import ad2kit
from ad2kit.data.demo_reviews import DOMAINS, LABELS, WORDS, alternatives, opinions
from ad2kit.data.splits import load_data
from ad2kit.packaging.bento import served
from ad2kit.packaging.check import ask
from ad2kit.run.folder import open_run
from ad2kit.run.recipe import load_recipe

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from ad2kit.run.folder import RunDir

CHECKOUT = Path(__file__).parents[1]
# An opinion of one clause, so that few rows are enough to learn what decides the label.
_PLAIN = re.compile(r"(?i)(?!.*(n't|\b(not?|never|nothing|hardly|but|though|although|hop|expect)))")
_WORDS_OF_AN_OPINION = 8


class Measured(NamedTuple):
    """The accuracy of teacher and student on the validation rows, and of the service over HTTP.

    ``gap`` is the largest difference between a score over HTTP and that of the artefact.
    """

    teacher: float
    student: float
    http: float
    gap: float
    windows: int


def facts(rng: random.Random) -> str:
    """Return a sentence that says nothing about the label."""
    domain = rng.choice(DOMAINS)
    sentence = re.sub(
        r"\{(\w+)\}",
        lambda slot: rng.choice(alternatives(WORDS[slot[1]], reserved=False)),
        rng.choice(alternatives(domain["fact"], reserved=False)),
    )
    return f"{sentence[0].upper()}{sentence[1:]}."


def rows(
    seed: int, count: int, tokens: tuple[int, int], distinct: int | None = None
) -> Iterator[dict[str, str]]:
    """Yield balanced rows of so many words and signs, which is a little less than their tokens.

    With ``distinct`` there are only so many opinions of each label, short and the same for any
    seed.
    """
    rng = random.Random(seed)  # noqa: S311  (repeatable, not secret)
    plain: list[list[str]] = [[], []]
    most = 2_000 if distinct else 20 * count + 600
    for text, label in opinions(0 if distinct else seed, most, validation_rows=0).train:
        if len(text.split()) <= _WORDS_OF_AN_OPINION and _PLAIN.match(text):
            plain[label].append(text)
    if distinct:
        plain = [sorted(texts, key=len) for texts in plain]
    for number in range(count):
        label = number % len(LABELS)
        opinion = plain[label][number // len(LABELS) % (distinct or count)]
        least = rng.randint(*tokens) - len(re.findall(r"\w+|[^\w\s]", opinion))
        sentences: list[str] = []
        length = 0
        while length < least:
            sentences.append(facts(rng))
            length += len(re.findall(r"\w+|[^\w\s]", sentences[-1]))
        yield {"text": " ".join([*sentences[:-1], opinion]), "label": LABELS[label]}


def write(
    folder: Path,
    seed: int,
    counts: tuple[int, int],
    tokens: tuple[int, int],
    distinct: int | None = None,
) -> None:
    """Write the training and validation rows of a recipe's ``data.source``; see :func:`rows`."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, count, each in zip(("train", "validation"), counts, (seed, seed + 1), strict=True):
        lines = (json.dumps(row) + "\n" for row in rows(each, count, tokens, distinct))
        (folder / f"{name}.jsonl").write_text("".join(lines))


def measured(run: RunDir, log: Path) -> Measured:
    """Distil, export and judge a run, and ask its fp32 variant for all validation rows by HTTP."""
    ad2kit.distill(run)
    ad2kit.export(run)
    report = ad2kit.judge(run)
    validation = load_data(run.recipe.data, run.recipe.seed).validation
    texts = [text for (text,) in validation.texts]
    expected = ad2kit.load(run.onnx("fp32"), threads=1).predict(texts, batch_size=1)
    arguments = [
        f"--working-dir={CHECKOUT}",
        "--arg=workers=1",
        "--arg=threads=1",
        f"--arg=model={run.onnx('fp32')}",
    ]
    log.mkdir(parents=True, exist_ok=True)
    with served("serving.service:Ad2kitClassifier", log, *arguments) as address:
        answers = [answer for text in texts for answer in ask(address, [text])]
    labels = np.array([LABELS[label] for label in validation.labels])
    gaps = [
        abs(answer["scores"][name] - score)
        for answer, prediction in zip(answers, expected, strict=True)
        for name, score in prediction.scores.items()
    ]
    (verdict,) = (each for each in report.variants if each.variant == "fp32")
    return Measured(
        teacher=report.teacher_score,
        student=verdict.score,
        http=float(np.mean([answer["label"] for answer in answers] == labels)),
        gap=max(gaps),
        windows=sum(answer.get("windows", 1) for answer in answers),
    )


def both(
    recipe: str, folder: Path, overrides: Sequence[str], only: Sequence[str] = ("windows", "cut")
) -> dict[str, Measured]:
    """Return what was measured for each way to read long texts."""
    found = {}
    for way in only:
        own = [each for each in overrides if way == "windows" or "window" not in each]
        source = [f"data.source={folder / 'rows'}", f"data.long_texts={way}"]
        run = open_run(load_recipe(recipe, [*own, *source]), folder / "runs")
        found[way] = measured(run, folder / way)
    return found


def table(found: dict[str, Measured]) -> Iterator[str]:
    """Yield the lines of a table."""
    yield "| long texts | teacher | student | retained | over HTTP | largest gap | windows |"
    yield "|---|---|---|---|---|---|---|"
    for way, each in found.items():
        yield (
            f"| {way} | {each.teacher:.4f} | {each.student:.4f} | "
            f"{each.student / each.teacher:.1%} | {each.http:.4f} | {each.gap:.0e} | "
            f"{each.windows} |"
        )


def main(arguments: list[str]) -> Any:
    """Make the rows, measure, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("recipe")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE")
    parser.add_argument("--rows", type=int, nargs=2, default=(400, 400))
    parser.add_argument("--tokens", type=int, nargs=2, default=(600, 1900))
    parser.add_argument("--distinct", type=int)
    parser.add_argument("--seed", type=int, default=17)
    parser.add_argument("--folder", type=Path)
    given = parser.parse_intermixed_args(arguments)
    folder = given.folder or Path(tempfile.mkdtemp(prefix="long-texts-"))
    write(folder / "rows", given.seed, tuple(given.rows), tuple(given.tokens), given.distinct)
    found = both(given.recipe, folder.resolve(), given.overrides)
    Console(width=200).print(*table(found), sep="\n", markup=False, highlight=False)


if __name__ == "__main__":
    main(sys.argv[1:])
