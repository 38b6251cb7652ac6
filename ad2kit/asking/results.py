"""The distinct texts of tables, and the columns that the answers to them become."""

from __future__ import annotations

import json
from collections import Counter
from typing import TYPE_CHECKING, Any

import numpy as np

from ad2kit.asking.prompts import YES
from ad2kit.run.files import fingerprint
from ad2kit.scoring.output import part_name
from ad2kit.scoring.parts import BlockWorker
from ad2kit.tables.formats import known_format

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from numpy.typing import NDArray

    from ad2kit.asking.journal import Journal
    from ad2kit.asking.prompts import Prompt, Question
    from ad2kit.asking.records import Answer
    from ad2kit.run.sections import Task
    from ad2kit.scoring.blocks import Layout
    from ad2kit.scoring.output import OutputFolder
    from ad2kit.scoring.parts import Numbered

    Texts = tuple[str, ...]


# A label belongs to a row if its probability is above this.
_RATHER_THERE = 0.5


def label_column(task: Task, prefix: str) -> str:
    """Return the column of the answered label or labels."""
    return f"{prefix}labels" if task == "multi_label" else f"{prefix}label"


def added_columns(task: Task, answer: str, prefix: str) -> tuple[str, ...]:
    """Return the columns of the answers: a label alone has no probabilities."""
    label = label_column(task, prefix)
    if answer == "label":
        return (label,)
    confidence = () if task == "multi_label" else (f"{prefix}confidence",)
    return (f"{prefix}probabilities", label, *confidence)


class Results(BlockWorker):
    """Reads the texts of a job, and writes its parts once they are answered.

    Attributes:
        texts: the distinct texts to ask about, in the order of their fingerprints.
        rows_of: the number of rows of each of these texts.
        bad_rows: the rows without a text; after :meth:`write` also those without an answer.
        answered_rows: the rows that the parts hold.
    """

    def __init__(self, output: OutputFolder, layout: Layout, prompt: Prompt) -> None:
        super().__init__(output.url, layout)
        self.texts: list[Texts] = []
        self.rows_of = Counter[tuple[str, ...]]()
        self.bad_rows = self.answered_rows = 0
        self._prompt = prompt
        self._answers: Mapping[str, Answer] = {}
        self._unanswered: Mapping[str, str] = {}

    def read_texts(self, blocks: Sequence[Numbered], max_rows: int | None) -> None:
        """Read all texts; of those with the first fingerprints as many as have ``max_rows`` rows.

        A larger number takes the same texts, and more. Equal texts are taken together.

        Raises:
            DataError: a file is gone, or has changed since it was surveyed.
        """
        rows_of = Counter[tuple[str, ...]]()
        for _, block in blocks:
            rows, good = self.read(block)
            self.bad_rows += len(rows.bad)
            rows_of.update(rows.texts[position] for position in good)
        chosen_rows = 0
        for texts in sorted(rows_of, key=lambda texts: fingerprint(list(texts))):
            if max_rows is not None and chosen_rows >= max_rows:
                break
            self.texts.append(texts)
            self.rows_of[texts] = rows_of[texts]
            chosen_rows += rows_of[texts]

    def write(
        self, blocks: Sequence[Numbered], journal: Journal, unanswered: Mapping[str, str]
    ) -> None:
        """Write every part anew, with the answers that are known.

        Args:
            blocks: all blocks of the job.
            journal: the answers.
            unanswered: the reasons for requests without an answer that will be sent again.

        Raises:
            DataError: a file is gone, or has changed since it was surveyed.
        """
        self._answers, self._unanswered = journal.answers, unanswered
        self.output.forget_errors()
        self.output.forget_parts(
            {part_name(number, known_format(block.url).of_parts) for number, block in blocks}
        )
        self.answered_rows = 0
        self.bad_rows = sum(self(number, block).bad for number, block in blocks)

    def answers(
        self, texts: Sequence[Any], refuse: Callable[[int, str], None]
    ) -> dict[str, NDArray[Any]]:
        """Return the columns of the answers; texts that were not asked about are left out."""
        found: list[dict[str, float]] = []
        for index, row in enumerate(texts):
            probabilities: dict[str, float] | str = ""
            if row in self.rows_of:
                probabilities = self._of_row(row)
            if isinstance(probabilities, dict):
                found.append(probabilities)
            else:
                refuse(index, probabilities)
        self.answered_rows += len(found)
        values = self._several(found) if self._prompt.several else self._one(found)
        if self._prompt.ask.answer != "label":
            values = [_json(found), *values]
        return dict(zip(self.layout.added, values, strict=True))

    def _one(self, rows: list[dict[str, float]]) -> list[NDArray[Any]]:
        """Return the columns for one label a row: the label, and its probability if it has one."""
        labels = np.array([max(row, key=row.__getitem__) for row in rows], dtype=np.str_)
        if self._prompt.ask.answer == "label":
            return [labels]
        return [labels, np.array([max(row.values()) for row in rows], np.float64)]

    def _several(self, rows: list[dict[str, float]]) -> list[NDArray[Any]]:
        """Return the column for several labels a row: those that are rather there than not."""
        lists = np.empty(len(rows), dtype=object)
        lists[:] = [[name for name, share in row.items() if share > _RATHER_THERE] for row in rows]
        return [lists]

    def _of_row(self, row: Texts) -> dict[str, float] | str:
        """Return the probability of each label of a row, or why there is none."""
        probabilities: dict[str, float] = {}
        for question in self._prompt.questions(row):
            found = self._of_question(question)
            if isinstance(found, str):
                return f"'{question.label}': {found}" if found and question.label else found
            if question.label:
                probabilities[question.label] = found.get(YES, 0.0)
            else:
                probabilities = {name: found.get(name, 0.0) for name in self._prompt.labels}
        return probabilities

    def _of_question(self, question: Question) -> dict[str, float] | str:
        """Return the mean distribution of the draws of a question, or why there is none.

        A draw that is no label has no share. A question with a draw that was not answered has no
        answer yet.
        """
        draws = []
        for draw in range(self._prompt.ask.draws):
            name = question.id(draw)
            if name not in self._answers:
                return self._unanswered.get(name, "")
            draws.append(self._answers[name])
        valid = [draw.probabilities for draw in draws if draw.probabilities]
        if not valid:
            return draws[0].reason
        total = dict[str, float]()
        for probabilities in valid:
            for label, share in probabilities.items():
                total[label] = total.get(label, 0.0) + share
        return {label: share / len(valid) for label, share in total.items()}


def _json(rows: list[dict[str, float]]) -> NDArray[Any]:
    """Return a column of JSON: bytes, which writers of parts take as JSON."""
    texts = [json.dumps(row, ensure_ascii=False).encode() for row in rows]
    return np.array(texts, dtype=np.bytes_)
