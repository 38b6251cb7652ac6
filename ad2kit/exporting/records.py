"""What an export writes to disk: a variant, its tokenisation, the search for int8, and checks."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import (
    Field,
    computed_field,
)

from ad2kit.run.records import Part, Record
from ad2kit.run.sections import Provider, Task

Verdict = Literal["passed", "FAILED", "not shown"]
"""Not shown: the validation rows are too few to say that it passed, or that it failed."""


class QuantisationTrial(Part):
    """One way to quantise, tried on ``select``; all its figures are of those rows.

    ``agreement`` is with the labels of fp32 (a correlation for a regression), in batches or one by
    one, whichever is less; ``rms_error`` is the root of the mean square of what the logits differ
    by, whichever is more. ``batch_ms`` is of a text in batches of 32, ``alone_ms`` of one alone.
    """

    way: str
    agreement: float
    rms_error: float
    points_lost: float
    failures: tuple[str, ...]
    size_bytes: int
    batch_ms: float
    alone_ms: float


class QuantisationSearch(Record):
    """All that was tried for int8, in order, and what was taken."""

    # 1 did not say how far the logits were moved.
    schema_version: Literal[2] = 2  # type: ignore[assignment]
    inputs: str
    rows: int
    seconds: float
    taken: str
    trials: tuple[QuantisationTrial, ...]


class RowsNeeded(Part):
    """How many rows show a check, where there are ``present`` ones; no number does if null.

    Of samples of so many rows, four of five pass if the true value is ``truth``.
    """

    truth: float
    rows: int | None
    present: int

    @property
    def words(self) -> str:
        """What more rows would do."""
        if self.rows is None:
            return f"no number of validation rows would show a true value of {self.truth:.4g}"
        show = f"about {self.rows:,} validation rows show a true value of {self.truth:.4g}"
        if self.rows > self.present:
            return f"{show} (with 80 % power), and these are {self.present:,}"
        return (
            f"{show} (with 80 % power), and these are {self.present:,}: more rows alone will "
            "hardly show it"
        )


class Check(Part):
    """One threshold of the gate beside the value that was measured, and what it may be due to.

    An estimate from validation rows has a 95 % ``interval`` too. It is passed if the value keeps
    within the threshold and the interval within the ``limit``; it has failed if the whole interval
    misses the threshold; else so many rows do not show which, and ``needed`` says how many would.
    What was not sampled has no interval, and is passed or has failed.
    """

    question: Literal["export fidelity", "conversion cost", "distillation quality"]
    name: str
    value: float
    bound: Literal["at most", "at least"]
    threshold: float
    interval: tuple[float, float] | None = None
    limit: float | None = None
    needed: RowsNeeded | None = None
    note: str | None = None

    @property
    def reached(self) -> bool:
        """Whether the value keeps within its threshold, whatever its interval; NaN never does."""
        return self._within(self.value, self.threshold)

    @computed_field  # type: ignore[prop-decorator]
    @property
    def verdict(self) -> Verdict:
        """What so many rows say."""
        if self.interval is None:
            return "passed" if self.reached else "FAILED"
        low, high = self.interval
        worst, best = (low, high) if self.bound == "at least" else (high, low)
        if self.reached and (self.limit is None or self._within(worst, self.limit)):
            return "passed"
        return "not shown" if self._within(best, self.threshold) else "FAILED"

    @computed_field  # type: ignore[prop-decorator]
    @property
    def passed(self) -> bool:
        """Whether it is shown that the value keeps within its threshold."""
        return self.verdict == "passed"

    def _within(self, value: float, threshold: float) -> bool:
        return value <= threshold if self.bound == "at most" else value >= threshold

    @property
    def measured(self) -> str:
        """The value and its interval."""
        if self.interval is None:
            return f"{self.value:.4g}"
        low, high = self.interval
        return f"{self.value:.4g} [{low:.4g}, {high:.4g}]"

    @property
    def expected(self) -> str:
        """The threshold, and how far the interval may reach beyond it."""
        words = f"{self.bound} {self.threshold:g}"
        if self.limit is None:
            return words
        side = "from" if self.bound == "at least" else "up to"
        return f"{words}, its interval {side} {self.limit:g}"

    @property
    def words(self) -> str:
        """The check as a sentence: what was measured, what was expected, what would show it."""
        notes = [] if self.note is None else [self.note]
        if self.verdict == "not shown" and self.needed is not None:
            notes.insert(0, f"not shown: {self.needed.words}")
        return "; ".join([f"{self.name} is {self.measured}, expected {self.expected}", *notes])


class Tokenisation(Part):
    """What makes ids of a text beside ``tokenizer.json``; see :mod:`ad2kit.exporting.tokenise`.

    A text that is too long loses its end, or its beginning where ``truncation_side`` is "left".
    The model is fed the segments of a pair if ``segment_ids``, else zeros.
    """

    truncation_side: Literal["left", "right"]
    segment_ids: bool
    split_special_tokens: bool
    pad_token_id: int
    pad_type_id: int


class OnnxArtifact(Record):
    """``manifest.json`` of one ONNX variant: what the folder holds and where it comes from.

    ``provider`` executes it unless told otherwise; ``nodes`` counts the fused kinds of nodes; the
    logits are divided by ``temperature`` before they become probabilities. Of int8,
    ``weights_in_8_bits`` is the share of its weights, and ``in_float`` names the nodes that keep
    theirs in float.
    """

    file_name: ClassVar[str] = "manifest.json"
    cure: ClassVar[str] = "run `ad2kit export` on its run again, then `ad2kit parity`"

    variant: str
    inputs: str
    task: Task
    labels: tuple[str, ...]
    max_length_tokens: int
    tokenisation: Tokenisation
    text_columns: int
    provider: Provider
    nodes: dict[str, int]
    temperature: float = Field(gt=0, allow_inf_nan=False)
    files: dict[str, str]
    model_bytes: int
    weights_in_8_bits: float | None = None
    in_float: tuple[str, ...] = ()
    lineage: dict[str, str]
